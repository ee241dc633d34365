"""The pace of a training round: ask more nodes than are needed, close in time, demand a minimum [BEG+19]."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from privfed.strategies.exchange import Exchange


@dataclass(frozen=True, slots=True)
class Pace:
    """over_selection: share of nodes asked beyond those wanted; the round closes when as many as wanted have answered.

    deadline: seconds for updates to be in; None: the timeout of `start`. min_completion: share of the nodes wanted
    whose replies must count, or the round fails; `min_train_nodes` holds besides.

    With over-selection the replies that count are the first ones, so fast nodes count more often, and two runs of one
    seed may differ. Only PlainStage closes early: a secure sum takes in all who answer before the deadline, and opening
    it takes up to `stage_timeout` seconds a stage besides. Raises ValueError outside of over_selection >= 0,
    deadline > 0, 0 <= min_completion <= 1.
    """

    over_selection: float = 0.0
    deadline: float | None = None
    min_completion: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.over_selection) and self.over_selection >= 0):
            raise ValueError(f"over_selection must be finite and >= 0, got {self.over_selection}")
        if self.deadline is not None and not self.deadline > 0:
            raise ValueError(f"deadline must be > 0 seconds or None, got {self.deadline}")
        if not 0 <= self.min_completion <= 1:
            raise ValueError(f"min_completion must be in [0, 1], got {self.min_completion}")

    def asked(self, wanted: int, available: int) -> int:
        """Return how many nodes are asked so that `wanted` may answer."""
        return min(available, math.ceil(wanted * (1 + self.over_selection) - 1e-9))

    def quorum(self, wanted: int, least: int) -> int:
        """Return how many replies must count."""
        return max(least, math.ceil(wanted * self.min_completion - 1e-9))

    def applied(self, exchange: Exchange, wanted: int) -> Exchange:
        """Return the exchange with this pace's end."""
        deadline = exchange.deadline
        if self.deadline is not None:
            deadline = min(deadline, time.monotonic() + self.deadline)
        return replace(exchange, deadline=deadline, enough=wanted if self.over_selection else None)
