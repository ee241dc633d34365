"""What one event costs in the measures that add up adaptively: rho, Renyi divergence at an order, mu squared."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from scipy import special

from privfed.privacy import events as ev
from privfed.privacy import rdp
from privfed.privacy.dominating import checked_terms, gaussian_mu, silent, simplify

_UP = 1 + 1e-11  # rounding of the formulas
_LARGEST_SUM = 4096  # order up to which the binomial sum is taken


def renyi_cost(event: ev.Event, order: float, *, relation: str = "add_remove", observer: str = "output") -> float:
    """Return the event's Renyi divergence at `order`, in the worse direction, rounded up."""
    checked_terms(relation, observer)
    if not order > 1:
        raise ValueError(f"order: must be above 1, not {order}")
    return sum(count * _divergence(part, order, relation) for part, count in simplify(event, 1, observer)) * _UP


def _divergence(event: ev.Event, order: float, relation: str) -> float:
    if isinstance(event, ev.PoissonSampled) and relation != "replace_one":
        mu = gaussian_mu(event.inner, relation)
        if mu is not None:
            return _sampled_gaussian(event.rate, mu, order)
    return float(rdp.divergence(event, [order], relation)[0])


def _sampled_gaussian(rate: float, mu: float, order: float) -> float:
    """Return the divergence of the Poisson-sampled Gaussian [MTZ19, Sec 3.3]; between integers, interpolate.

    (a - 1) times the divergence is convex in a, so the chord between integer orders lies above it.
    """
    if rate == 0 or mu == 0:
        return 0.0
    if math.isinf(mu):
        return math.inf
    low = math.floor(order)
    if low >= _LARGEST_SUM or rate == 1:
        return order * mu * mu / 2  # quasi-convexity: sampling never costs more
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
    # gammaln's error grows with its value, and the logarithm of the moment is at least 0
    return max(0.0, float(special.logsumexp(terms)) + 1e-14 * order * math.log(order + 1))


def gdp_cost(event: ev.Event, *, relation: str = "add_remove", observer: str = "output") -> float:
    """Return the event's mu^2, rounded up; ValueError unless it is made of unsampled Gaussians."""
    checked_terms(relation, observer)
    total = 0.0
    for part, count in simplify(event, 1, observer):
        if isinstance(part, ev.Unaccounted):
            return math.inf
        mu = gaussian_mu(part, relation)
        if mu is None:
            raise ValueError(f"event: {type(part).__name__} has no proved mu; only unsampled Gaussian noise has")
        total += count * mu * mu
    return total * _UP


def zcdp_cost(event: ev.Event, *, relation: str = "add_remove", observer: str = "output") -> float:
    """Return the event's rho, rounded up; ValueError for events that are not known to be zCDP."""
    checked_terms(relation, observer)
    return sum(count * _rho(part, relation) for part, count in simplify(event, 1, observer)) * _UP


def _rho(event: ev.Event, relation: str) -> float:
    if isinstance(event, ev.Unaccounted):
        return math.inf
    if silent(event):
        return 0.0
    mu = gaussian_mu(event, relation)
    if mu is not None:
        return mu * mu / 2
    twice = 2 if relation == "replace_one" else 1
    if isinstance(event, ev.ZCDP):
        return event.rho
    if isinstance(event, ev.DiscreteGaussian) and event.truncation is None:
        return (twice * event.sensitivity / event.sigma) ** 2 / 2 if event.sigma else math.inf
    if isinstance(event, ev.Exponential):
        return event.epsilon**2 / 8
    epsilon = _pure(event, twice)
    if epsilon is None or (isinstance(event, ev.RandomizedResponse) and relation == "add_remove"):
        raise ValueError(f"event: {type(event).__name__} has no proved rho under {relation}")
    return epsilon * math.tanh(epsilon / 2)  # the divergence of randomised response at order 1; tight [HM25]


def _pure(event: ev.Event, twice: int) -> float | None:
    """Return the epsilon of a purely private event."""
    if isinstance(event, (ev.PureDP, ev.AboveThreshold)):
        return event.epsilon
    if isinstance(event, ev.Laplace):
        return twice / event.noise_multiplier if event.noise_multiplier else math.inf
    if isinstance(event, ev.DiscreteLaplace):
        return twice * event.sensitivity / event.scale if event.scale else math.inf
    if isinstance(event, ev.RandomizedResponse):
        k, noise = event.categories, event.noise
        return math.log1p((1 - noise) * k / noise) if noise else math.inf
    return None
