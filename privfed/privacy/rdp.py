"""Renyi divergences of events, their conversions, and distributed noise, for which only they are proved.

Every function takes real orders above 1 unless it says integer. Divergences are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy import special

from privfed.privacy import events as ev
from privfed.privacy.cumulant import Cumulants
from privfed.privacy.dominating import gaussian_mu, pairs, silent
from privfed.privacy.pair import Floats, NormalPair, Pair

ORDERS: tuple[float, ...] = tuple(
    [1 + x / 10 for x in range(1, 100)] + list(range(11, 65)) + [72, 80, 96, 128, 160, 192, 256, 384, 512, 768, 1024]
)
INTEGER_ORDERS = tuple(float(a) for a in [*range(2, 65), 72, 80, 96, 128, 160, 192, 256, 384, 512])


_LARGEST_SUM = 4096  # order up to which the binomial sum is taken
_NEAR = 20.0  # standard deviations from the origin up to which densities are far from underflow


def epsilon_of(orders: Sequence[float], divergences: Sequence[float] | Floats, delta: float) -> float:
    """Return epsilon from divergences by the conversion of [BBG+20, Thm 21], the best order taken; never below 0.

    Where the divergence is so small that its total variation is at most delta, epsilon is 0.
    """
    a, d = np.asarray(orders, dtype=float), np.asarray(divergences, dtype=float)
    if delta == 0:
        return float(d[np.isinf(a)].min()) if np.isinf(a).any() else math.inf
    if np.any(delta * delta + np.expm1(-d) >= 0):  # Bretagnolle-Huber
        return 0.0
    keep = (a > 1) & np.isfinite(a) & np.isfinite(d)
    if not keep.any():
        return math.inf
    a, d = a[keep], d[keep]
    value = d + np.log1p(-1 / a) - (math.log(delta) + np.log(a)) / (a - 1)
    return max(0.0, float(value.min()))


def classic_epsilon_of(orders: Sequence[float], divergences: Sequence[float] | Floats, delta: float) -> float:
    """Return epsilon by the first conversion, d + log(1/delta) / (a - 1) [Mir17, Prop 3]; looser, for old figures."""
    a, d = np.asarray(orders, dtype=float), np.asarray(divergences, dtype=float)
    return float((d - math.log(delta) / (a - 1)).min())


def delta_of(orders: Sequence[float], divergences: Sequence[float] | Floats, epsilon: float | Floats) -> Floats:
    """Return delta at each epsilon >= 0: the inverse of `epsilon_of`, capped by 1 and by total variation."""
    a, d = np.asarray(orders, dtype=float)[:, None], np.asarray(divergences, dtype=float)[:, None]
    x = np.atleast_1d(np.asarray(epsilon, dtype=float))[None, :]
    log = (a - 1) * (d - x) + (a - 1) * np.log1p(-1 / a) - np.log(a)
    with np.errstate(over="ignore"):
        best = np.exp(np.minimum(log.min(axis=0), 0.0))
    variation = math.sqrt(max(0.0, -math.expm1(-float(d.min()))))
    return np.asarray(np.minimum(best, variation), dtype=np.float64)


def pair_divergence(event: ev.Event, orders: Sequence[float], relation: str) -> Floats:
    """Return the divergence of an event's dominating pair, the larger of its directions."""
    both = pairs(event, relation)
    if both is None:
        return np.zeros(len(orders))
    out = np.zeros(len(orders))
    for pair in set(both) if both[0] is not both[1] else {both[0]}:
        if getattr(pair, "certain", 0.0) > 0:
            return np.full(len(orders), math.inf)
        cumulants = Cumulants(((pair, 1),))
        ceiling = pair.span(0.0)[1]
        endless = _endless(pair)
        for i, a in enumerate(orders):
            if endless and (math.isinf(a) or not _kept(pair, a - 1)):
                value = _unsampled(event, a, relation)
            else:
                value = ceiling if math.isinf(a) else max(0.0, cumulants.at(a - 1)[0]) / (a - 1)
            out[i] = max(out[i], value)
    return out


def _endless(pair: object) -> bool:
    """Say whether some part of the pair left out outcomes too rare for floats."""
    parts = [branch for _, branch in getattr(pair, "branches", ())] + [getattr(pair, "pair", None)]
    return getattr(pair, "endless", False) or any(_endless(part) for part in parts if part is not None)


def _kept(pair: Pair, power: float) -> bool:
    """Say whether the mass that decides E exp(power L) lies well inside the outcomes that were kept."""
    losses, weights = pair.nodes(0.0)
    good = weights > 0
    exponent = power * losses[good] + np.log(weights[good])
    edge = exponent[losses[good] >= losses[good].max() - 1e-9]
    return bool(exponent.max() - edge.max() > 40)


def _unsampled(event: ev.Event, order: float, relation: str) -> float:
    """Return the divergence of the noise without its sampler, which costs more: divergences are quasi-convex."""
    inner = getattr(event, "inner", event)
    displaced = relation == "replace_one" or isinstance(event, ev.TruncatedPoisson)
    distance = (2 if displaced else 1) * getattr(inner, "sensitivity", 1)
    if isinstance(inner, ev.DiscreteGaussian):  # [CKS20, Prop 5]
        return order * (distance / inner.sigma) ** 2 / 2
    assert isinstance(inner, ev.Skellam)
    return float(_skellam(np.array([order]), distance, distance, inner.variance)[0])


def divergence(event: ev.Event, orders: Sequence[float], relation: str) -> Floats:
    """Return the Renyi divergence of a plain event at each order, never below the truth (up to 1e-12 relative).

    ValueError: no bound is known for the event under this relation.
    """
    a = np.asarray(orders, dtype=float)
    if isinstance(event, ev.Unaccounted):
        return np.full(len(a), math.inf)
    if silent(event):
        return np.zeros(len(a))
    plain = event
    if isinstance(event, ev.RandomAllocation):
        pairs(event, relation)  # ValueError where nothing is proved
        plain = event.inner  # a mixture of runs with one known round each: divergences are quasi-convex
    mu = gaussian_mu(plain, relation)
    if mu is not None:
        return a * mu * mu / 2
    if isinstance(event, ev.ZCDP):
        return a * event.rho
    if isinstance(event, ev.DistributedNoise):
        return _distributed(event, a, relation)
    if isinstance(event, ev.PoissonSampled) and isinstance(event.inner, (ev.DistributedNoise, ev.ZCDP)):
        return amplified(event, a, relation)
    try:
        mixed = _mixed_gaussians(event, a, relation)
        return pair_divergence(event, orders, relation) if mixed is None else mixed
    except OverflowError:
        return np.full(len(a), math.inf)


def _distributed(event: ev.DistributedNoise, orders: Floats, relation: str) -> Floats:
    """Return the divergence of distributed noise; infinite where the formulas leave the range of floats."""
    try:
        with np.errstate(all="ignore"):
            if isinstance(event, ev.DistributedSkellam):
                found = skellam_divergence(event, orders, relation)
            else:
                assert isinstance(event, ev.DistributedDiscreteGaussian)
                found = discrete_sum_divergence(event, orders, relation)
    except (OverflowError, ZeroDivisionError):
        return np.full(len(orders), math.inf)
    return np.where(np.isnan(found), math.inf, np.maximum(found, 0.0))


def _mixed_gaussians(event: ev.Event, orders: Floats, relation: str) -> Floats | None:
    """Return the divergence of a sampled Gaussian, None for other events.

    At large orders the mass that matters lies where densities underflow, so that integrating would miss it. There the
    unsampled event is the bound: divergences are quasi-convex.
    """
    inner = getattr(event, "inner", None)
    mu = None if inner is None else gaussian_mu(inner, relation)
    if inner is None or mu is None:
        return None
    if isinstance(event, ev.PoissonSampled) and relation != "replace_one":
        return np.array([sampled_gaussian(event.rate, mu, float(a)) for a in orders])
    if isinstance(event, ev.TruncatedPoisson):  # a unit that takes another's place is a replacement
        mu = max(mu, gaussian_mu(inner, "replace_one") or 0.0)
    out = orders * mu * mu / 2
    near = mu * (orders + 1) <= _NEAR
    if near.any():
        out[near] = np.minimum(out[near], pair_divergence(event, list(orders[near]), relation))
    return out


def sampled_gaussian(rate: float, mu: float, order: float) -> float:
    """Return the divergence of the Poisson-sampled Gaussian [MTZ19, Sec 3.3]; between integers, integrate.

    Where densities would underflow, interpolate: (a - 1) times the divergence is convex in a, so the chord between
    integer orders lies above it.
    """
    if rate == 0 or mu == 0:
        return 0.0
    if math.isinf(mu) or math.isinf(order):
        return math.inf
    low = math.floor(order)
    if low >= _LARGEST_SUM or rate == 1:
        return order * mu * mu / 2  # quasi-convexity: sampling never costs more
    below = _log_moment(rate, mu, low)
    if low == order:
        return below / (order - 1)
    if mu * (order + 1) <= _NEAR:
        log_moment = Cumulants(((NormalPair(mu, rate), 1),)).at(order - 1)[0]
        return max(0.0, log_moment) / (order - 1)
    above = _log_moment(rate, mu, low + 1)
    return ((low + 1 - order) * below + (order - low) * above) / (order - 1)


@lru_cache(maxsize=1024)
def _log_moment(rate: float, mu: float, order: int) -> float:
    """Return log E_Q (P/Q)^order for P = (1-q) N(0,1) + q N(mu,1), Q = N(0,1): the larger of both directions."""
    if order == 1:
        return 0.0
    k = np.arange(order + 1)
    choose = special.gammaln(order + 1) - special.gammaln(k + 1) - special.gammaln(order - k + 1)
    terms = choose + (order - k) * math.log1p(-rate) + k * math.log(rate) + (k * k - k) * (mu * mu / 2)
    # gammaln's error grows with its value, and the logarithm of the moment is at least 0
    return max(0.0, float(special.logsumexp(terms)) + 1e-14 * order * math.log(order + 1))


def amplified(event: ev.PoissonSampled, orders: Floats, relation: str) -> Floats:
    """Return the divergence under Poisson sampling from integer-order divergences of the inner event [ZW19, Thm 5].

    add_remove and zero_out; other orders are bounded by the next integer.
    """
    if relation == "replace_one":
        raise ValueError(f"relation: Poisson-sampled {type(event.inner).__name__} has no proof under replace_one")
    q = event.rate
    top = math.ceil(float(orders[np.isfinite(orders)].max(initial=2.0)))
    inner = divergence(event.inner, [float(j) for j in range(2, top + 1)], relation)
    table = np.full(top + 1, np.nan)
    for a in sorted({max(2, math.ceil(o)) for o in orders if math.isfinite(o)}):
        j = np.arange(2, a + 1)
        log_choose = special.gammaln(a + 1) - special.gammaln(j + 1) - special.gammaln(a - j + 1)
        tail = log_choose + j * math.log(q) + (a - j) * math.log1p(-q) + (j - 1) * inner[: a - 1]
        factor = np.where(j > 2, math.log(3.0), 0.0)
        head = (a - 1) * math.log1p(-q) + math.log1p(a * q - q)
        table[a] = special.logsumexp(np.append(tail + factor, head)) / (a - 1)
    return np.array([max(0.0, table[max(2, math.ceil(o))]) if math.isfinite(o) else math.inf for o in orders])


def rounded_norm(l2: float, dimension: int, beta: float = math.exp(-0.5)) -> float:
    """Return the L2 norm that conditional stochastic rounding keeps to, in lattice steps [KLS21, Prop 22].

    l2: the norm before, in lattice steps. beta: share of roundings that may be refused; 0 for the worst case.
    """
    worst = (l2 + math.sqrt(dimension)) ** 2
    if beta > 0:
        slack = math.sqrt(2 * math.log(1 / beta)) * (l2 + math.sqrt(dimension) / 2)
        worst = min(worst, l2 * l2 + dimension / 4 + slack)
    return math.sqrt(worst)


def sum_distance(nodes: int, stddev: float) -> float:
    """Return tau: how far a sum of `nodes` discrete Gaussians is from one, per coordinate [KLS21, Thm 1].

    stddev: of one node's noise, in lattice steps.
    """
    k = np.arange(1, nodes)
    return float(10 * np.exp(-2 * math.pi**2 * stddev**2 * k / (k + 1)).sum())


def lattice_scale(
    local_stddev: float, clip: float, bits: int, nodes: int, dimension: int, deviations: float = 4, rho: float = 1
) -> float:
    """Return the scale (lattice steps per unit) at which a sum fits `bits` with `deviations` to spare [KLS21, Sec 4.4].

    local_stddev and clip in the units of the update; rho: flatness after rotation.
    """
    room = 4.0**bits - nodes * deviations**2
    if room <= 0:
        raise ValueError(f"bits: {bits} are too few for {nodes} nodes at {deviations} deviations")
    spread = rho * clip**2 * nodes**2 / dimension + nodes * local_stddev**2
    return math.sqrt(room) / (2 * deviations * math.sqrt(spread))


def _sensitivities(event: ev.DistributedNoise, relation: str) -> tuple[float, float]:
    """Return L1 and L2 sensitivity in lattice steps."""
    l2 = rounded_norm(event.clip * event.scale, event.dimension, event.beta)
    l2 *= 2.0 if relation == "replace_one" else 1.0
    return l2 * min(math.sqrt(event.dimension), l2), l2


def discrete_sum_divergence(event: ev.DistributedDiscreteGaussian, orders: Floats, relation: str) -> Floats:
    """Return the divergence of a sum of discrete Gaussians, the best of three bounds [KLS21, Prop 14]."""
    stddev = event.local_stddev * event.scale
    if event.survivors == 0 or stddev == 0:
        return np.full(len(orders), math.inf)
    tau, d = sum_distance(event.survivors, stddev), event.dimension
    l1, l2 = (norm / (math.sqrt(event.survivors) * stddev) for norm in _sensitivities(event, relation))
    a = orders / 2
    bounds = (a * l2**2 + tau * d, a * (l2**2 + 2 * l1 * tau + tau**2 * d), a * (l2 + math.sqrt(d) * tau) ** 2)
    return np.asarray(np.minimum.reduce(bounds), dtype=np.float64)


def skellam_divergence(event: ev.DistributedSkellam, orders: Floats, relation: str) -> Floats:
    """Return the divergence of summed Skellam noise [AKL21, Thm 3.5]; orders are rounded up to integers."""
    variance = event.survivors * (event.local_stddev * event.scale) ** 2
    if variance == 0:
        return np.full(len(orders), math.inf)
    return _skellam(orders, *_sensitivities(event, relation), variance)


def _skellam(orders: Floats, l1: float, l2: float, variance: float) -> Floats:
    a = np.maximum(2.0, np.ceil(orders))
    first = ((2 * a - 1) * l2**2 + 6 * l1) / (4 * variance**2) if variance**2 > 0 else math.inf
    return np.asarray(a * l2**2 / (2 * variance) + np.minimum(first, 3 * l1 / (2 * variance)), dtype=np.float64)
