"""What an attacker can do: trade-off curves, true-positive rates, Bayes risk, the mu of Gaussian privacy.

A mechanism with privacy profile delta(x) keeps every test with false-positive rate a to a false-negative rate of at
least 1 - delta(x) - e^x a for every x, in both directions; the best x gives the curve [DRS22, Prop 2.12]. Any x gives
a true bound, so a search over x cannot break the guarantee.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from privfed.privacy.bound import Bound

if TYPE_CHECKING:
    from collections.abc import Callable

    from privfed.privacy.accountant import Accountant

_PROOF = "a trade-off curve is the conjugate of the privacy profile [DRS22, Prop 2.12]"


def _best(function: Callable[[float], float], low: float, high: float) -> float:
    """Return where a concave function is largest, roughly (golden section)."""
    ratio = (math.sqrt(5) - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    f_a, f_b = function(a), function(b)
    for _ in range(40):
        if f_a > f_b:
            high, b, f_b = b, a, f_a
            a = high - ratio * (high - low)
            f_a = function(a)
        else:
            low, a, f_a = a, b, f_b
            b = low + ratio * (high - low)
            f_b = function(b)
        if high - low < 1e-5:
            break
    return (low + high) / 2


def tradeoff(accountant: Accountant, alpha: float, tol: float) -> Bound:
    """Return the least false-negative rate at false-positive rate `alpha`; see the accountant."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: must be in [0, 1], not {alpha}")
    reach = max(1.0, min(accountant.estimate(1e-12), 600.0))
    plan = accountant.plan

    def value(x: float) -> float:
        return 1 - plan.rough_delta(x) - math.exp(x) * alpha

    x = _best(value, -reach, reach)
    points = [x, 0.0]
    found = [(point, accountant.delta(point, tol=tol)) for point in points]
    lower = max(0.0, *(1 - d.upper - math.exp(point) * alpha for point, d in found))
    other = max(0.0, *(1 - d.estimate - math.exp(point) * alpha for point, d in found))
    upper = max(other, *(1 - d.lower - math.exp(point) * alpha for point, d in found))
    upper = min(1 - alpha, upper + _flatness(value, x))
    lower = min(lower, 1 - alpha)
    return Bound(lower, min(max(other, lower), max(upper, lower)), max(upper, lower), found[0][1].method, _PROOF)


def _flatness(value: Callable[[float], float], x: float) -> float:
    """Bound how much higher a concave function may be near an approximate maximum, from its neighbours."""
    step = 1e-3
    here, left, right = value(x), value(x - step), value(x + step)
    return 2 * max(0.0, left - here, right - here, here - left, here - right) + 1e-9


def flipped(curve: Bound) -> Bound:
    """Return 1 - curve: true-positive rates from false-negative rates."""
    return Bound(1 - curve.upper, 1 - curve.estimate, 1 - curve.lower, curve.method, curve.proof)


def bayes_risk(accountant: Accountant, prior: float, tol: float) -> Bound:
    """Return the least error of guessing membership when its prior probability is `prior`.

    The risk is prior * (1 - delta(x)) at x = log((1 - prior) / prior), and the mirrored value for the other direction.
    """
    if not 0 <= prior <= 1:
        raise ValueError(f"prior: must be in [0, 1], not {prior}")
    if prior in (0, 1):
        return Bound(0.0, 0.0, 0.0, "closed form", "nothing to guess")
    found = accountant.delta(math.log((1 - prior) / prior), tol=tol)
    values = [prior * (1 - delta) for delta in (found.upper, found.estimate, found.lower)]
    return Bound(values[0], values[1], values[2], found.method, "the hockey stick is the advantage of the best guess")


def gaussian_curve(mu: float, alpha: float) -> float:
    """Return the trade-off curve of mu-GDP at alpha."""
    from scipy import special

    return float(special.ndtr(special.ndtri(1 - alpha) - mu))


def gdp_mu(accountant: Accountant, fpr_range: tuple[float, float] = (0.0, 1.0), points: int = 20_000) -> float:
    """Return the least mu whose curve lies below the accountant's at false-positive rates in the range.

    By default the range is everything that floats resolve; a mechanism whose curve starts at 0 at once has no finite
    mu there, so give a range for pure differential privacy. An estimate, on `points` rates.
    """
    import numpy as np
    from scipy import special

    low, high = max(fpr_range[0], 1e-12), min(fpr_range[1], 1 - 1e-12)
    if not 0 < low < high < 1:
        raise ValueError(f"fpr_range: must be an interval inside [0, 1], not {fpr_range}")
    plan = accountant.plan
    reach = max(1.0, min(accountant.estimate(1e-12), 600.0))
    losses = np.linspace(-reach, reach, 1501)
    caught = 1 - np.array([plan.rough_delta(float(x)) for x in losses])
    alpha = special.ndtr(np.linspace(special.ndtri(low), special.ndtri(high), points))
    beta = np.zeros(points)
    for x, kept in zip(losses, caught, strict=True):
        np.maximum(beta, kept - math.exp(x) * alpha, out=beta)
    if (beta <= 0).any():
        return math.inf
    return max(0.0, float((special.ndtri(1 - alpha) - special.ndtri(beta)).max()))
