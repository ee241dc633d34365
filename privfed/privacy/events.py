"""What can spend privacy, as frozen data whose meaning never changes.

C bounds what one unit contributes (L2 norm for Gaussian noise, L1 for Laplace). Noise is given relative to C or, on
the integers, in lattice steps. Under `add_remove` and `zero_out` a neighbour differs by C, under `replace_one` by 2C.
An event with no noise is legal and costs infinity; one that never touches the data costs nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from privfed.privacy import codec


def _real(owner: str, name: str, value: object, low: float, high: float = math.inf) -> None:
    """Raise ValueError unless `value` is a number in [low, high]; NaN is in no interval."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}: {owner} needs a number, not {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name}: {owner} needs a number in [{low:g}, {high:g}], not {value!r}")


def _whole(owner: str, name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name}: {owner} needs a whole number of at least {low}, not {value!r}")


@dataclass(frozen=True, slots=True)
class Event:
    """Anything that spends privacy; see the subclasses."""

    def fields(self) -> dict[str, Any]:
        """Return the JSON fields, the kind under "event"."""
        own = {field.name: codec.encode(getattr(self, field.name)) for field in fields(self)}
        return {"event": type(self).__name__, **own}

    def to_json(self) -> str:
        """Return the canonical JSON: equal events give equal texts, and `event_from_json` inverts it."""
        return codec.dump(self.fields())

    def _real(self, name: str, low: float, high: float = math.inf) -> None:
        value = getattr(self, name)
        _real(type(self).__name__, name, value, low, high)
        object.__setattr__(self, name, float(value))

    def _whole(self, name: str, low: int) -> None:
        _whole(type(self).__name__, name, getattr(self, name), low)

    def _event(self, name: str) -> None:
        if not isinstance(getattr(self, name), Event):
            raise ValueError(f"{name}: {type(self).__name__} needs an event, not {getattr(self, name)!r}")


@dataclass(frozen=True, slots=True)
class Gaussian(Event):
    """Add Gaussian noise of standard deviation noise_multiplier * C to a sum; float or finer-lattice exact noise."""

    noise_multiplier: float

    def __post_init__(self) -> None:
        self._real("noise_multiplier", 0)


@dataclass(frozen=True, slots=True)
class Laplace(Event):
    """Add Laplace noise of scale noise_multiplier * C to a sum whose contributions have L1 norm at most C."""

    noise_multiplier: float

    def __post_init__(self) -> None:
        self._real("noise_multiplier", 0)


@dataclass(frozen=True, slots=True)
class MatrixGaussian(Event):
    """Release a whole run of correlated noise at once: Gaussian noise before decoding, `sensitivity` of the encoder.

    sensitivity: the largest L2 norm, in units of C, of one unit's contributions to all rounds after encoding. One
    event stands for the whole run (tree aggregation, DP-FTRL, banded matrices).
    """

    noise_multiplier: float
    sensitivity: float

    def __post_init__(self) -> None:
        self._real("noise_multiplier", 0)
        self._real("sensitivity", 0)


@dataclass(frozen=True, slots=True)
class DiscreteGaussian(Event):
    """Add discrete Gaussian noise of parameter sigma to one integer to which a unit contributes at most `sensitivity`.

    truncation: outcomes of the noise are conditioned on |noise| <= truncation; None for the whole lattice.
    """

    sigma: float
    sensitivity: int = 1
    truncation: int | None = None

    def __post_init__(self) -> None:
        self._real("sigma", 0)
        self._whole("sensitivity", 0)
        if self.truncation is not None:
            self._whole("truncation", 0)


@dataclass(frozen=True, slots=True)
class DiscreteLaplace(Event):
    """Add noise of mass ~ exp(-|k| / scale) to one integer; a unit contributes at most `sensitivity`."""

    scale: float
    sensitivity: int = 1

    def __post_init__(self) -> None:
        self._real("scale", 0)
        self._whole("sensitivity", 0)


@dataclass(frozen=True, slots=True)
class Skellam(Event):
    """Add the difference of two Poisson(variance / 2) to one integer; a unit contributes at most `sensitivity`."""

    variance: float
    sensitivity: int = 1

    def __post_init__(self) -> None:
        self._real("variance", 0)
        self._whole("sensitivity", 0)


@dataclass(frozen=True, slots=True)
class RandomizedResponse(Event):
    """Report one of `categories` values: uniform with probability `noise`, else the truth.

    Under `zero_out` the neighbour's report is uniform; under `add_remove` there is no event, as a missing report shows.
    """

    noise: float
    categories: int = 2

    def __post_init__(self) -> None:
        self._real("noise", 0, 1)
        self._whole("categories", 2)


@dataclass(frozen=True, slots=True)
class Exponential(Event):
    """Select by the exponential mechanism (or permute-and-flip's bound): an epsilon-bounded range of privacy losses."""

    epsilon: float

    def __post_init__(self) -> None:
        self._real("epsilon", 0)


@dataclass(frozen=True, slots=True)
class AboveThreshold(Event):
    """Run the sparse vector technique until its first positive answer: epsilon-DP however many queries it takes."""

    epsilon: float

    def __post_init__(self) -> None:
        self._real("epsilon", 0)


@dataclass(frozen=True, slots=True)
class PureDP(Event):
    """Release something known only to be epsilon-DP for the accountant's relation."""

    epsilon: float

    def __post_init__(self) -> None:
        self._real("epsilon", 0)


@dataclass(frozen=True, slots=True)
class ApproximateDP(Event):
    """Release something known only to be (epsilon, delta)-DP for the accountant's relation."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        self._real("epsilon", 0)
        self._real("delta", 0, 1)


@dataclass(frozen=True, slots=True)
class ZCDP(Event):
    """Release something known only to be rho-zCDP for the accountant's relation."""

    rho: float

    def __post_init__(self) -> None:
        self._real("rho", 0)


@dataclass(frozen=True, slots=True)
class Unaccounted(Event):
    """Release without a guarantee (test randomness, a missing proof): epsilon is infinite."""

    reason: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.reason, str):
            raise ValueError(f"reason: Unaccounted needs a text, not {self.reason!r}")


NonPrivate = Unaccounted


@dataclass(frozen=True, slots=True)
class Central(Event):
    """Say that the server adds the inner event's noise: against the server itself it protects nothing."""

    inner: Event

    def __post_init__(self) -> None:
        self._event("inner")


@dataclass(frozen=True, slots=True)
class PoissonSampled(Event):
    """Run `inner` on a cohort in which every unit takes part independently with probability `rate`."""

    rate: float
    inner: Event

    def __post_init__(self) -> None:
        self._real("rate", 0, 1)
        self._event("inner")


@dataclass(frozen=True, slots=True)
class FixedSizeSampled(Event):
    """Run `inner` on `sample_size` of `population` units, drawn without replacement; only under `replace_one`."""

    sample_size: int
    population: int
    inner: Event

    def __post_init__(self) -> None:
        self._whole("population", 1)
        self._whole("sample_size", 0)
        if self.sample_size > self.population:
            raise ValueError(f"sample_size: at most the population, {self.population}, not {self.sample_size}")
        self._event("inner")


@dataclass(frozen=True, slots=True)
class TruncatedPoisson(Event):
    """Run `inner` on a Poisson cohort cut down, uniformly at random, to `cap` units when it is larger.

    population: an upper bound on the number of units.
    """

    rate: float
    population: int
    cap: int
    inner: Event

    def __post_init__(self) -> None:
        self._real("rate", 0, 1)
        self._whole("population", 1)
        self._whole("cap", 1)
        self._event("inner")


@dataclass(frozen=True, slots=True)
class RandomAllocation(Event):
    """Run `inner` in `rounds` rounds, each unit taking part in exactly one, drawn uniformly and independently.

    One event is the whole pass over the rounds (balls in bins); repeat it for several passes with fresh draws.
    """

    rounds: int
    inner: Event

    def __post_init__(self) -> None:
        self._whole("rounds", 1)
        self._event("inner")


@dataclass(frozen=True, slots=True)
class DistributedNoise(Event):
    """Hold what the two distributed mechanisms share; see them.

    local_stddev: of one node's noise, in the units of `clip`. clip: the L2 norm bound C before rounding.
    scale: lattice steps per unit (1 / gamma). dimension: of the (padded, rotated) vector. survivors: honest nodes
    whose noise is in the sum and unknown to the observer. modulus: of the sum; wrapping is post-processing, kept for
    the record. beta: conditional rounding parameter, 0 for the unconditional worst case.
    """

    local_stddev: float
    clip: float
    scale: float
    dimension: int
    survivors: int
    modulus: int
    beta: float = math.exp(-0.5)

    def __post_init__(self) -> None:
        self._real("local_stddev", 0)
        self._real("clip", 0)
        self._real("scale", 0)
        self._whole("dimension", 1)
        self._whole("survivors", 0)
        self._whole("modulus", 2)
        self._real("beta", 0, 1)


@dataclass(frozen=True, slots=True)
class DistributedDiscreteGaussian(DistributedNoise):
    """Sum clipped, rotated, conditionally rounded vectors, each node adding discrete Gaussian noise [KLS21]."""


@dataclass(frozen=True, slots=True)
class DistributedSkellam(DistributedNoise):
    """Sum clipped, rotated, conditionally rounded vectors, each node adding Skellam noise [AKL21]."""


@dataclass(frozen=True, slots=True)
class Composed(Event):
    """Run several events, each a given number of times, on the same units: pairs (event, count)."""

    parts: tuple[tuple[Event, int], ...]

    def __post_init__(self) -> None:
        if not isinstance(self.parts, tuple):
            raise ValueError(f"parts: Composed needs a tuple of (event, count), not {self.parts!r}")
        for part in self.parts:
            if not (isinstance(part, tuple) and len(part) == 2 and isinstance(part[0], Event)):
                raise ValueError(f"parts: Composed needs pairs (event, count), not {part!r}")
            _whole("Composed", "count", part[1], 0)

    def fields(self) -> dict[str, Any]:
        """Return the JSON fields."""
        return {"event": "Composed", "parts": [[event.fields(), count] for event, count in self.parts]}


_KINDS: dict[str, type[Event]] = {
    kind.__name__: kind
    for kind in (
        AboveThreshold, ApproximateDP, Central, Composed, DiscreteGaussian, DiscreteLaplace,
        DistributedDiscreteGaussian, DistributedSkellam, Exponential, FixedSizeSampled, Gaussian, Laplace,
        MatrixGaussian, PoissonSampled, PureDP, RandomAllocation, RandomizedResponse, Skellam, TruncatedPoisson,
        Unaccounted, ZCDP,
    )
}  # fmt: skip


def event_from_json(text: str | dict[str, Any]) -> Event:
    """Return the event that `to_json` (or `fields`) wrote; ValueError for anything else."""
    return _parse(codec.load(text), 0)


def _parse(given: Any, depth: int) -> Event:
    codec.checked_depth(depth)
    if not isinstance(given, dict):
        raise ValueError(f"event: must be a JSON object, not {given!r}")
    kind = _KINDS.get(given["event"]) if isinstance(given.get("event"), str) else None
    if kind is None:
        raise ValueError(f"event: unknown kind {given.get('event')!r}; this version knows {', '.join(sorted(_KINDS))}")
    values = {name: codec.number(value) for name, value in given.items() if name != "event"}
    expected = {field.name for field in fields(kind)}
    if set(values) != expected:
        raise ValueError(f"event: {kind.__name__} has the fields {sorted(expected)}, not {sorted(values)}")
    if kind is Composed:
        parts = values["parts"]
        if not isinstance(parts, list) or not all(isinstance(part, list) and len(part) == 2 for part in parts):
            raise ValueError("parts: Composed needs pairs [event, count]")
        return Composed(tuple((_parse(event, depth + 1), count) for event, count in parts))
    if "inner" in values:
        values["inner"] = _parse(values["inner"], depth + 1)
    return kind(**values)
