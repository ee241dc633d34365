"""What one event costs in the measures that filters may add: rho (zCDP), mu^2 (GDP) and Renyi divergences.

These are closed forms and proved inequalities only. An event without one raises ValueError: a filter never guesses.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from scipy import special

from privfed.privacy import events
from privfed.privacy.events import Event

_SAMPLED = (events.PoissonSampled, events.FixedSizeSampled, events.TruncatedPoisson)
_MARGIN = 1e-12  # relative; covers the roundings of the sums below
_LARGEST_INTEGER_ORDER = 4096


def _scale(relation: str) -> float:
    """Return how far a neighbour moves a sum, in units of C."""
    if relation not in ("add_remove", "zero_out", "replace_one"):
        raise ValueError(f"relation: must be add_remove, zero_out or replace_one, not {relation!r}")
    return 2.0 if relation == "replace_one" else 1.0


def _refusal(event: Event, measure: str, relation: str) -> ValueError:
    return ValueError(
        f"event: {type(event).__name__} has no proved cost in {measure} under {relation}; take another filter, or "
        "composition for events fixed beforehand"
    )


def seen(event: Event, observer: str) -> Event | None:
    """Return what the observer faces: without sampling against the server; None if nothing protects from it."""
    if observer not in ("output", "server"):
        raise ValueError(f"observer: must be output or server, not {observer!r}")
    if isinstance(event, events.Unaccounted):
        return None
    if isinstance(event, events.Central):
        return None if observer == "server" else seen(event.inner, observer)
    if observer == "server" and isinstance(event, (*_SAMPLED, events.RandomAllocation)):
        return seen(event.inner, observer)
    return event


def _mu(event: Event, relation: str) -> float | None:
    """Return mu of Gaussian events on real vectors, else None."""
    match event:
        case events.Gaussian(noise_multiplier=z):
            return _scale(relation) / z if z else math.inf
        case events.MatrixGaussian(noise_multiplier=z, sensitivity=sensitivity):
            if sensitivity == 0:
                return 0.0
            return _scale(relation) * sensitivity / z if z else math.inf
    return None


def _pure(event: Event, relation: str) -> float | None:
    """Return the epsilon of a purely private event, else None."""
    match event:
        case events.PureDP(epsilon=epsilon) | events.AboveThreshold(epsilon=epsilon):
            return epsilon
        case events.Laplace(noise_multiplier=z):
            return _scale(relation) / z if z else math.inf
        case events.DiscreteLaplace(scale=scale, sensitivity=sensitivity):
            if sensitivity == 0:
                return 0.0
            return _scale(relation) * sensitivity / scale if scale else math.inf
        case events.RandomizedResponse(noise=noise, categories=k) if relation != "add_remove":
            return math.log1p((1 - noise) * k / noise) if noise else math.inf
    return None


def _rho(event: Event, relation: str) -> float | None:
    """Return rho of one event if it is zCDP, else None."""
    mu = _mu(event, relation)
    if mu is not None:
        return mu * mu / 2
    epsilon = _pure(event, relation)
    if epsilon is not None:
        return min(epsilon * epsilon / 2, epsilon)  # [BS16, Prop 3.3]
    match event:
        case events.ZCDP(rho=rho):
            return rho
        case events.Exponential(epsilon=epsilon):
            return epsilon * epsilon / 8  # bounded range [CR21]
        case events.DiscreteGaussian(sigma=sigma, sensitivity=sensitivity, truncation=None):
            if sensitivity == 0:
                return 0.0
            return (_scale(relation) * sensitivity / sigma) ** 2 / 2 if sigma else math.inf  # [CKS20, Thm 4]
    return None


def zcdp_cost(event: Event, *, relation: str, observer: str) -> float:
    """Return rho of one event, rounded up; ValueError if it is not known to be zCDP."""
    faced = seen(event, observer)
    if faced is None:
        return math.inf
    if isinstance(faced, events.Composed):
        return math.fsum(n * zcdp_cost(part, relation=relation, observer=observer) for part, n in faced.parts if n)
    rho = _rho(faced, relation)
    if rho is None:
        raise _refusal(faced, "rho", relation)
    return rho * (1 + _MARGIN)


def gdp_cost(event: Event, *, relation: str, observer: str) -> float:
    """Return mu^2 of one event, rounded up; ValueError if it is not known to be Gaussian."""
    faced = seen(event, observer)
    if faced is None:
        return math.inf
    if isinstance(faced, events.Composed):
        return math.fsum(n * gdp_cost(part, relation=relation, observer=observer) for part, n in faced.parts if n)
    mu = _mu(faced, relation)
    if mu is None:
        raise _refusal(faced, "mu^2", relation)
    return mu * mu * (1 + _MARGIN)


def renyi_cost(event: Event, order: float, *, relation: str, observer: str) -> float:
    """Return a bound on the Renyi divergence of one event at `order` > 1, in both directions, rounded up."""
    faced = seen(event, observer)
    if faced is None:
        return math.inf
    if isinstance(faced, events.Composed):
        terms = {"relation": relation, "observer": observer}
        return math.fsum(n * renyi_cost(part, order, **terms) for part, n in faced.parts if n)
    return _divergence(faced, order, relation) * (1 + _MARGIN)


def _divergence(event: Event, order: float, relation: str) -> float:
    rho = _rho(event, relation)
    epsilon = _pure(event, relation)
    if epsilon is not None:
        return _pure_divergence(epsilon, order)
    if rho is not None:
        return order * rho
    if isinstance(event, (events.PoissonSampled, events.FixedSizeSampled)):
        return _sampled_divergence(event, order, relation)
    raise _refusal(event, "Renyi divergence", relation)


def _pure_divergence(epsilon: float, order: float) -> float:
    """Return the divergence of randomised response, the largest of any epsilon-DP pair [BS16, Prop 3.3]."""
    if epsilon == 0 or math.isinf(epsilon):
        return epsilon
    # log of (e^(a e) + e^((1-a) e)) / (1 + e^e)
    log_sum = np.logaddexp(order * epsilon, (1 - order) * epsilon) - np.logaddexp(0, epsilon)
    return min(float(log_sum) / (order - 1), epsilon, order * epsilon * epsilon / 2)


def _sampled_divergence(event: events.PoissonSampled | events.FixedSizeSampled, order: float, relation: str) -> float:
    """Bound a sampled event: exactly for Poisson and Gaussian noise, else by joint convexity where that applies."""
    if isinstance(event, events.FixedSizeSampled):
        fixed, rate = True, event.sample_size / event.population
    else:
        fixed, rate = False, event.rate
    if rate == 0:
        return 0.0
    if rate == 1:
        return renyi_cost(event.inner, order, relation=relation, observer="output")
    mu = _mu(event.inner, relation)
    if relation == "replace_one":
        # The worlds agree unless the unit is drawn; exp((a-1) D) is jointly convex.
        inner = renyi_cost(event.inner, order, relation=relation, observer="output")
        return float(np.logaddexp(math.log1p(-rate), math.log(rate) + (order - 1) * inner)) / (order - 1)
    if fixed or mu is None:
        raise _refusal(event, "Renyi divergence", relation)
    return _sampled_gaussian(rate, mu, order)


def _sampled_gaussian(rate: float, mu: float, order: float) -> float:
    """Return the divergence of the Poisson-sampled Gaussian [MTZ19, Sec 3.3]; between integers, interpolate.

    (a - 1) times the divergence is convex in a, so the chord between integer orders lies above it.
    """
    if math.isinf(mu):
        return math.inf
    low = math.floor(order)
    if low >= _LARGEST_INTEGER_ORDER:
        return order * mu * mu / 2
    below = _log_moment(rate, mu, low)
    if low == order:
        return below / (order - 1)
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
    # gammaln's errors grow with its value; the sum is at least 1, its logarithm at least 0
    return max(0.0, float(special.logsumexp(terms)) + 1e-14 * order * math.log(order + 1))
