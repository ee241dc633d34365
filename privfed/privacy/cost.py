"""What one event costs in the measures that add up adaptively: rho, Renyi divergence at an order, mu squared."""

from __future__ import annotations

import math

from privfed.privacy import events as ev
from privfed.privacy import rdp
from privfed.privacy.argument import number
from privfed.privacy.dominating import checked_terms, gaussian_mu, silent, simplify

_UP = 1 + 1e-11  # rounding of the formulas


def renyi_cost(event: ev.Event, order: float, *, relation: str = "add_remove", observer: str = "output") -> float:
    """Return the event's Renyi divergence at `order`, in the worse direction, rounded up."""
    checked_terms(relation, observer)
    order = number("order", order, 1, above=True)
    return (
        sum(count * float(rdp.divergence(part, [order], relation)[0]) for part, count in simplify(event, 1, observer))
        * _UP
    )


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
