"""Privacy filters: stop a run whose parameters were chosen along the way before it costs more than was promised.

Adding up the realised costs of adaptively chosen events is only a theorem for some measures. For rho (zCDP) and a
Renyi divergence at one fixed order it is [FZ21, WRRW23]; for mu^2 (Gaussian differential privacy) it is
[ST22, KTH23]. Numerical composition of the events themselves ("composition") is right when the events were fixed
beforehand or do not depend on what was released. What a filter guarantees is its limit, whatever was spent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from privfed.privacy import conversion
from privfed.privacy.accountant import Accountant
from privfed.privacy.argument import number, whole
from privfed.privacy.cost import gdp_cost, renyi_cost, zcdp_cost
from privfed.privacy.dominating import checked_terms
from privfed.privacy.events import Event

_TOLERANCES = (1e-3, 1e-4, 1e-5)  # of a composition's bracket; calibration certifies at 1e-4
FilterName = Literal["composition", "zcdp", "renyi", "gdp"]


class BudgetExceeded(Exception):
    """A charge would exceed the budget; nothing was charged and nothing may be released."""

    def __init__(self, owner: str, spent: float, after: float, limit: float, measure: str) -> None:
        self.owner, self.spent, self.after, self.limit, self.measure = owner, spent, after, limit, measure
        super().__init__(
            f"budget of {owner or 'this run'} exceeded: {measure} {spent:.6g} of {limit:.6g} is spent and this charge "
            f"would make it {after:.6g}; stop here, or plan fewer rounds or more noise from the start"
        )


class Meter(Protocol):
    """Add up what events cost, in one measure."""

    @property
    def measure(self) -> str:
        """What is counted: epsilon, rho, ..."""

    @property
    def limit(self) -> float:
        """The most that may be spent."""

    @property
    def spent(self) -> float:
        """What was added so far."""

    def preview(self, event: Event, count: int = 1) -> float:
        """Return what would be spent after `count` times the event; ValueError if it has no cost here."""

    def add(self, event: Event, count: int = 1) -> None:
        """Add without asking whether the limit allows it (for replay)."""


class _Additive:
    """Keep a running sum, rounded up, of costs that a theorem lets us add adaptively."""

    measure = ""

    def __init__(self, limit: float) -> None:
        self._limit = number("limit", limit, 0)
        self._spent = 0.0

    @property
    def limit(self) -> float:
        """The most that may be spent."""
        return self._limit

    @property
    def spent(self) -> float:
        """What was added so far."""
        return self._spent

    def cost(self, event: Event) -> float:
        """Return what one event costs; ValueError if nothing is proved in this measure."""
        raise ValueError(f"event: {type(event).__name__} has no cost in {self.measure}")

    def preview(self, event: Event, count: int = 1) -> float:
        """Return what would be spent after `count` times the event."""
        count = whole("count", count)
        if not isinstance(event, Event):
            raise ValueError(f"event: must be an event, not {event!r}")
        cost = self.cost(event)
        if count == 0 or cost == 0:
            return self._spent
        return math.nextafter(self._spent + math.nextafter(count * cost, math.inf), math.inf)

    def admits(self, event: Event, count: int = 1) -> bool:
        """Say whether the limit allows the event."""
        return self.preview(event, count) <= self._limit

    def add(self, event: Event, count: int = 1) -> None:
        """Add without asking whether the limit allows it (for replay)."""
        self._spent = self.preview(event, count)

    def charge(self, event: Event, count: int = 1) -> None:
        """Add, or raise BudgetExceeded and change nothing; call it before the event's release."""
        after = self.preview(event, count)
        if not after <= self._limit:
            raise BudgetExceeded("", self._spent, after, self._limit, self.measure)
        self._spent = after


class ZcdpFilter(_Additive):
    """Stop before the sum of rho exceeds `limit`; the whole run is then limit-zCDP however it was steered [WRRW23]."""

    measure = "rho"

    def __init__(self, limit: float, *, relation: str = "add_remove", observer: str = "output") -> None:
        super().__init__(limit)
        checked_terms(relation, observer)
        self._relation, self._observer = relation, observer

    @classmethod
    def within(cls, epsilon: float, delta: float, **terms: str) -> ZcdpFilter:
        """Return the widest filter whose guarantee is (epsilon, delta)."""
        return cls(_widest(lambda rho: conversion.zcdp_epsilon(rho, delta), epsilon), **terms)

    def cost(self, event: Event) -> float:
        """Return the event's rho."""
        return zcdp_cost(event, relation=self._relation, observer=self._observer)

    def epsilon(self, delta: float) -> float:
        """Return what the filter guarantees whatever was spent: epsilon of its limit."""
        return conversion.zcdp_epsilon(self._limit, delta)


class GdpFilter(_Additive):
    """Stop before the root of the sum of mu^2 exceeds the limit; the run is then limit-GDP [ST22, KTH23].

    Spending is kept as mu^2, since that is what adds.
    """

    measure = "mu^2"

    def __init__(self, limit: float, *, relation: str = "add_remove", observer: str = "output") -> None:
        super().__init__(limit)
        checked_terms(relation, observer)
        self._relation, self._observer = relation, observer

    @classmethod
    def within(cls, epsilon: float, delta: float, **terms: str) -> GdpFilter:
        """Return the widest filter whose guarantee is (epsilon, delta)."""
        return cls(_widest(lambda square: conversion.gdp_epsilon(math.sqrt(square), delta), epsilon), **terms)

    def cost(self, event: Event) -> float:
        """Return the event's mu^2."""
        return gdp_cost(event, relation=self._relation, observer=self._observer)

    def epsilon(self, delta: float) -> float:
        """Return what the filter guarantees whatever was spent."""
        return conversion.gdp_epsilon(math.sqrt(self._limit), delta)


class RenyiFilter(_Additive):
    """Stop before the sum of Renyi divergences at one `order` exceeds `limit` [FZ21].

    The order is chosen before the run; taking the best order afterwards would not be covered.
    """

    measure = "divergence"

    def __init__(self, limit: float, *, order: float, relation: str = "add_remove", observer: str = "output") -> None:
        super().__init__(limit)
        self.order = number("order", order, 1, math.inf, above=True, below=True)
        checked_terms(relation, observer)
        self._relation, self._observer = relation, observer

    @classmethod
    def within(cls, epsilon: float, delta: float, *, order: float, **terms: str) -> RenyiFilter:
        """Return the widest filter at that order whose guarantee is (epsilon, delta)."""
        fixed = conversion.renyi_epsilon(0.0, order, delta)
        if fixed > epsilon:
            raise ValueError(f"order: at {order} the conversion alone costs {fixed:.4g}; take a larger order")
        return cls(_widest(lambda d: conversion.renyi_epsilon(d, order, delta), epsilon), order=order, **terms)

    def cost(self, event: Event) -> float:
        """Return the event's divergence at the order, in the worse direction."""
        return renyi_cost(event, self.order, relation=self._relation, observer=self._observer)

    def epsilon(self, delta: float) -> float:
        """Return what the filter guarantees whatever was spent."""
        return conversion.renyi_epsilon(self._limit, self.order, delta)


def _widest(epsilon_of: Callable[[float], float], epsilon: float) -> float:
    """Return the largest limit whose epsilon does not exceed the one given, rounded down."""
    epsilon = number("epsilon", epsilon, 0, above=True)
    if epsilon == math.inf:
        return math.inf
    high = 1.0
    while epsilon_of(high) <= epsilon:
        high *= 2
    limit = conversion.largest(lambda value: epsilon_of(value) <= epsilon, high)
    while epsilon_of(limit) > epsilon:
        limit *= 1 - 1e-12
    return limit


class CompositionMeter:
    """Compose the events themselves and read the certified upper epsilon at one delta."""

    measure = "epsilon"

    def __init__(self, limit: float, delta: float, *, unit: str, relation: str, observer: str) -> None:
        self._limit = limit
        self._delta = delta
        self._accountant = Accountant(unit=unit, relation=relation, observer=observer)

    @property
    def limit(self) -> float:
        """The most that may be spent."""
        return self._limit

    @property
    def spent(self) -> float:
        """Return the upper bound at delta of all events added."""
        return self._read(self._accountant)

    def preview(self, event: Event, count: int = 1) -> float:
        """Return what would be spent after `count` times the event."""
        return self._read(self._accountant.preview(event, count))

    def _read(self, accountant: Accountant) -> float:
        """Look closer while the limit lies inside the bracket: a calibrated plan must not be refused its last round."""
        for tol in _TOLERANCES:
            bound = accountant.epsilon(self._delta, tol=tol)
            if not bound.lower <= self._limit < bound.upper:
                break
        return bound.upper

    def add(self, event: Event, count: int = 1) -> None:
        """Add without asking whether the limit allows it (for replay)."""
        self._accountant.step(event, count)


@dataclass(frozen=True, slots=True)
class Budget:
    """Say how much may be spent and by which rule spending adds up.

    `filter` is "composition" when events are fixed beforehand (tightest), or "zcdp", "renyi" (with `order`) or
    "gdp" when they may depend on what was released. `epsilon` may be infinite: then spending is only recorded.
    """

    epsilon: float
    delta: float
    filter: FilterName = "composition"
    order: float | None = None

    def __post_init__(self) -> None:
        number("epsilon", self.epsilon, 0, above=True)
        number("delta", self.delta, 0, 1, below=True)
        if self.filter not in get_args(FilterName):
            raise ValueError(f"filter: must be one of {', '.join(get_args(FilterName))}, not {self.filter!r}")
        if (self.order is not None) != (self.filter == "renyi"):
            raise ValueError("order: belongs to the renyi filter, which needs it chosen beforehand")
        if self.order is not None:
            number("order", self.order, 1, math.inf, above=True, below=True)

    def meter(self, *, unit: str, relation: str, observer: str) -> Meter:
        """Return a fresh meter whose limit guarantees this budget."""
        terms = {"relation": relation, "observer": observer}
        if self.filter == "zcdp":
            return ZcdpFilter.within(self.epsilon, self.delta, **terms)
        if self.filter == "gdp":
            return GdpFilter.within(self.epsilon, self.delta, **terms)
        if self.filter == "renyi" and self.order is not None:
            return RenyiFilter.within(self.epsilon, self.delta, order=self.order, **terms)
        return CompositionMeter(self.epsilon, self.delta, unit=unit, **terms)

    def fields(self) -> dict[str, Any]:
        """Return the JSON fields, infinity as text."""
        epsilon = self.epsilon if math.isfinite(self.epsilon) else "inf"
        return {"delta": self.delta, "epsilon": epsilon, "filter": self.filter, "order": self.order}

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> Budget:
        """Read what `fields` wrote."""
        return cls(float(fields["epsilon"]), fields["delta"], fields["filter"], fields["order"])
