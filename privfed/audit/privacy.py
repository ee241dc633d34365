"""Lower bounds on epsilon from an attack's scores: what a run certainly leaked, with stated confidence.

in_scores: float[m], the attack's scores of canaries that took part; out_scores: float[n], of those that did not.
Higher means "took part". A bound of 0 says that the attack failed, not that nothing leaked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from scipy import special

from privfed.privacy.closed_form import gaussian_delta, gaussian_epsilon, gaussian_mu, root

Floats = npt.NDArray[np.float64]
Curve = Callable[[Floats], Floats]


def _checked(significance: float, delta: float) -> None:
    if not 0 < significance < 1:
        raise ValueError(f"significance: must be inside (0, 1), not {significance}")
    if not 0 <= delta < 1:
        raise ValueError(f"delta: must be in [0, 1), not {delta}")


def _scores(name: str, values: Sequence[float] | Floats) -> Floats:
    array = np.asarray(values, dtype=np.float64).ravel()
    if not len(array) or not np.isfinite(array).all():
        raise ValueError(f"{name}: must hold at least one score, all finite")
    return array


def upper_rate(errors: int, trials: int, significance: float) -> float:
    """Return the Clopper-Pearson upper limit of a rate: above the truth except with probability `significance`."""
    if not 0 <= errors <= trials or trials < 1:
        raise ValueError(f"errors: must be in [0, {trials}], not {errors}")
    return 1.0 if errors == trials else float(special.betaincinv(errors + 1, trials - errors, 1 - significance))


def epsilon_from_rates(fpr: float, fnr: float, delta: float) -> float:
    """Return the epsilon below which no mechanism allows both error rates, given upper limits of them."""
    ratios = [(1 - delta - a) / b if b > 0 else math.inf for a, b in ((fpr, fnr), (fnr, fpr))]
    return max(0.0, *(math.log(ratio) if ratio > 0 else 0.0 for ratio in ratios))


def epsilon_clopper_pearson(
    in_scores: Sequence[float] | Floats,
    out_scores: Sequence[float] | Floats,
    *,
    threshold: float,
    significance: float = 0.05,
    delta: float = 0.0,
) -> float:
    """Return a lower bound on epsilon at one threshold, which must not depend on these scores [NHS+21]."""
    _checked(significance, delta)
    inside, outside = _scores("in_scores", in_scores), _scores("out_scores", out_scores)
    fpr = upper_rate(int((outside >= threshold).sum()), len(outside), significance / 2)
    fnr = upper_rate(int((inside < threshold).sum()), len(inside), significance / 2)
    return epsilon_from_rates(fpr, fnr, delta)


def mu_lower(fp: int, negatives: int, fn: int, positives: int, significance: float = 0.05) -> float:
    """Return a lower bound on mu of a mechanism assumed Gaussian, from counts of errors [NHB+23]."""
    fpr = upper_rate(fp, negatives, significance / 2)
    fnr = upper_rate(fn, positives, significance / 2)
    return max(0.0, float(-special.ndtri(fpr) - special.ndtri(fnr)))


def epsilon_gdp(
    in_scores: Sequence[float] | Floats,
    out_scores: Sequence[float] | Floats,
    *,
    threshold: float,
    significance: float = 0.05,
    delta: float = 1e-5,
) -> float:
    """Return a lower bound on epsilon of a mechanism assumed Gaussian, at a threshold fixed beforehand [NHB+23]."""
    _checked(significance, delta)
    inside, outside = _scores("in_scores", in_scores), _scores("out_scores", out_scores)
    fp, fn = int((outside >= threshold).sum()), int((inside < threshold).sum())
    mu = mu_lower(fp, len(outside), fn, len(inside), significance)
    return gaussian_epsilon(mu, delta) if mu > 0 else 0.0


def one_run_p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Return the largest probability of so many correct guesses under (epsilon, delta)-DP [SNJ23, Thm 5.2].

    canaries: each took part with probability 1/2, independently. guesses: how many of them were guessed at.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"correct: need correct <= guesses <= canaries, not {correct}, {guesses}, {canaries}")
    q = 1 / (1 + math.exp(-epsilon))
    beta = float(_at_least(np.array([correct]), guesses, q)[0])
    if delta == 0 or correct == 0:
        return beta
    steps = np.arange(1, correct + 1)
    gained = (_at_least(correct - steps, guesses, q) - beta) / steps
    return min(1.0, beta + 2 * canaries * delta * max(0.0, float(gained.max())))


def _at_least(counts: npt.NDArray[np.int64], trials: int, rate: float) -> Floats:
    """Return P(Binomial(trials, rate) >= counts)."""
    out = np.ones(len(counts))
    inner = counts > 0
    out[inner] = special.bdtrc(counts[inner] - 1.0, trials, rate)
    return out


def one_run_epsilon(canaries: int, guesses: int, correct: int, *, significance: float, delta: float) -> float:
    """Return the largest epsilon that so many correct guesses reject at this significance [SNJ23]."""
    _checked(significance, delta)

    def margin(epsilon: float) -> float:
        return significance - one_run_p_value(canaries, guesses, correct, epsilon, delta)

    return _last(margin)


def _last(margin: Callable[[float], float]) -> float:
    """Return the largest epsilon at which a decreasing margin is still positive; 0 if none."""
    if margin(0.0) <= 0:
        return 0.0
    high = 1.0
    while margin(high) > 0:
        high *= 2
        if high > 1000:
            return high
    return root(margin, 0.0, high, 1e-12)


def hull_thresholds(in_scores: Sequence[float] | Floats, out_scores: Sequence[float] | Floats) -> list[tuple[int, int]]:
    """Return (false, true positives) at the thresholds on the upper hull of the empirical ROC curve, both ends too."""
    inside, outside = np.sort(_scores("in_scores", in_scores)), np.sort(_scores("out_scores", out_scores))
    cuts = np.append(np.unique(np.concatenate((inside, outside))), np.inf)
    true = (len(inside) - np.searchsorted(inside, cuts, side="left")).tolist()
    false = (len(outside) - np.searchsorted(outside, cuts, side="left")).tolist()
    hull: list[tuple[int, int]] = []
    for x, y in zip(reversed(false), reversed(true), strict=True):
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2], hull[-1]
            if (y1 - y0) * (x - x1) > (y - y1) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    return hull


def epsilon_one_run(
    in_scores: Sequence[float] | Floats,
    out_scores: Sequence[float] | Floats,
    *,
    significance: float = 0.05,
    delta: float = 0.0,
    threshold: float | None = None,
) -> float:
    """Return a lower bound on epsilon from one run with randomly included canaries [SNJ23].

    threshold: fixed beforehand; None tries those on the hull of the ROC curve and shares the significance among them
    (Bonferroni over the hull, as is common; with a fixed threshold the confidence is exact).
    """
    _checked(significance, delta)
    canaries = len(np.ravel(in_scores)) + len(np.ravel(out_scores))

    def margin(guesses: int, correct: int, share: float, epsilon: float) -> float:
        return share - one_run_p_value(canaries, guesses, correct, epsilon, delta)

    return _over_thresholds(in_scores, out_scores, threshold, significance, margin)


def epsilon_one_run_fdp(
    in_scores: Sequence[float] | Floats,
    out_scores: Sequence[float] | Floats,
    *,
    significance: float = 0.05,
    delta: float = 1e-5,
    threshold: float | None = None,
) -> float:
    """Return a lower bound on epsilon from one run of a mechanism assumed Gaussian [MMC24]; see `epsilon_one_run`."""
    _checked(significance, delta)
    if delta == 0:
        raise ValueError("delta: must be above 0 for a Gaussian trade-off curve")
    canaries = len(np.ravel(in_scores)) + len(np.ravel(out_scores))

    def margin(guesses: int, correct: int, share: float, epsilon: float) -> float:
        return rejection(canaries, guesses, correct, share, gaussian_growth(gaussian_mu(epsilon, delta)))

    return _over_thresholds(in_scores, out_scores, threshold, significance, margin)


def _over_thresholds(
    in_scores: Sequence[float] | Floats,
    out_scores: Sequence[float] | Floats,
    threshold: float | None,
    significance: float,
    margin: Callable[[int, int, float, float], float],
) -> float:
    """Audit at one threshold, or at all hull thresholds with shared significance.

    margin(guesses, correct, share, epsilon) is positive where epsilon is rejected. Thresholds go from the most
    promising down, and one that does not reject the best epsilon so far needs no search.
    """
    if threshold is not None:
        true = int((_scores("in_scores", in_scores) >= threshold).sum())
        false = int((_scores("out_scores", out_scores) >= threshold).sum())
        return _last(lambda epsilon: margin(true + false, true, significance, epsilon))
    hull = hull_thresholds(in_scores, out_scores)
    share = significance / len(hull)
    ranked = sorted((x, y) for x, y in hull if y > x)
    ranked.sort(key=lambda point: -(1 - upper_rate(point[0], sum(point), share)))
    best = 0.0
    for x, y in ranked:

        def at(epsilon: float, guesses: int = x + y, correct: int = y) -> float:
            return margin(guesses, correct, share, epsilon)

        if at(best) > 0:
            best = max(best, _last(at))
    return best


def gaussian_growth(mu: float) -> Callable[[float], float]:
    """Return x -> the P mass from which mu-GDP lets an event of Q mass at least x follow: Phi(Phi^-1(x) - mu)."""
    return lambda x: float(special.ndtr(special.ndtri(x) - mu))


def rejection(
    canaries: int, guesses: int, correct: int, significance: float, inverse: Callable[[float], float]
) -> float:
    """Return a positive number if so many correct guesses reject a trade-off curve [MMC24, Alg 3].

    inverse: mass an event may still have in the other world, given its mass in one; take it from any curve, such as
    the accountant's own.
    """
    r, h = significance * correct / canaries, significance * (guesses - correct) / canaries
    for i in range(correct - 1, -1, -1):
        grown = inverse(min(r, 1.0))
        if grown <= h:
            break
        r, h = min(1.0, r + i / (guesses - i) * (grown - h)), grown
    return r + h - guesses / canaries


def delta_at(epsilon: float, mu: float) -> float:
    """Return delta of mu-GDP at epsilon, to put audits on the same footing as an accountant."""
    return gaussian_delta(mu, epsilon)
