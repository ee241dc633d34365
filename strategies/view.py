"""Views: what a stage lets the server see of a round, and what a strategy may therefore need.

Sum          one mean of all updates
GroupMeans   the means of random groups
Updates      every node's update
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from privfed.record import MetricRecord

Float64s = NDArray[np.float64]
RandomBytes = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class Sum:
    """mean: float64[dimension], the (weighted) mean update. weight: the total it was divided by."""

    mean: Float64s
    weight: float


@dataclass(frozen=True, slots=True)
class Updates:
    """rows: float32[count, dimension], one update each, by ascending source. weights: what their nodes claim.

    metrics: what each node reported, where single nodes are seen. spoiled: replies that came and held what no rule can
    use (NaN, a wrong shape, a weight that is none): their nodes are among the Byzantine ones.
    """

    rows: NDArray[np.float32]
    sources: tuple[int, ...]
    weights: tuple[float, ...]
    metrics: tuple[MetricRecord, ...] = ()
    spoiled: int = 0

    def ordered(self) -> Updates:
        """Return the same updates by ascending source."""
        order = sorted(range(len(self.sources)), key=lambda index: self.sources[index])
        sources, weights = tuple(self.sources[i] for i in order), tuple(self.weights[i] for i in order)
        metrics = tuple(self.metrics[i] for i in order) if self.metrics else ()
        return Updates(self.rows[order], sources, weights, metrics, self.spoiled)


@dataclass(frozen=True, slots=True)
class GroupMeans(Updates):
    """rows are means over random groups; sources number the groups; weights are the groups' totals."""


@dataclass(frozen=True, slots=True)
class Unreleased:
    """A sum under a privacy plan before its noise: `release(noise_multiplier, random)` returns the noised float64 sum.

    Nothing else about the sum may be read, unless the noise is correlated over rounds (`strategies.correlated`).
    granularity: the step of the lattice that the sum and its noise are on.
    """

    release: Callable[[float, RandomBytes], Float64s] = field(repr=False)
    granularity: float


View = Sum | Updates | GroupMeans


@dataclass(frozen=True, slots=True)
class Exclusion:
    """A node whose reply does not count, and why. node 0: the cause is no single node's."""

    node: int
    cause: str


@dataclass(slots=True)
class Outcome:
    """What a stage brings back. valid: replies that count. metrics: aggregated, without the weight.

    bytes_down, bytes_up: content bytes of instructions and replies.
    """

    view: Sum | Updates | Unreleased | None = None
    valid: int = 0
    metrics: MetricRecord = field(default_factory=MetricRecord)
    excluded: list[Exclusion] = field(default_factory=list)
    bytes_down: int = 0
    bytes_up: int = 0
    notes: dict[str, object] = field(default_factory=dict)

    def causes(self) -> dict[str, int]:
        """Return how many replies each cause excluded, the most frequent first."""
        counts: dict[str, int] = {}
        for exclusion in self.excluded:
            counts[exclusion.cause] = counts.get(exclusion.cause, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
