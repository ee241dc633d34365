"""A privacy odometer: what an adaptively steered run has spent so far, readable at any time.

Under the first of two neighbouring worlds, exp((a - 1) (loss - sum of divergences at order a)) is a supermartingale
that starts at 1, however the next event is chosen. By Ville's inequality it stays below 1/beta at all times at once
with probability 1 - beta. So with K orders and beta = delta / K, the loss never exceeds
min over orders of (sum of divergences + log(K / delta) / (a - 1)), except with probability delta [Lec21, WRRW23].
A reading may therefore decide when to stop; the epsilon of an accountant or filter may not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from privfed.privacy.conversion import checked_delta
from privfed.privacy.events import Event
from privfed.privacy.filters import RenyiFilter

ORDERS = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0, 128.0)


class RenyiOdometer:
    """Read the spending of a run whose events depend on what was released before.

    Guarantees: with probability 1 - delta the privacy loss is below `epsilon` at every moment of the run, so that
    stopping at a reading gives (reading, delta). Orders are fixed at the start; every one costs log(K) in the rest.
    """

    def __init__(
        self,
        delta: float,
        *,
        orders: Sequence[float] = ORDERS,
        relation: str = "add_remove",
        observer: str = "output",
    ) -> None:
        self._delta = checked_delta(delta)
        if not orders:
            raise ValueError("orders: at least one is needed")
        self._sums = [RenyiFilter(math.inf, order=a, relation=relation, observer=observer) for a in orders]

    def add(self, event: Event, count: int = 1) -> None:
        """Add `count` times the event; a refused event raises ValueError and adds nothing at any order."""
        after = [sum_.preview(event, count) for sum_ in self._sums]
        if any(math.isnan(value) for value in after):
            raise ValueError(f"event: {type(event).__name__} has no divergence here")
        for sum_ in self._sums:
            sum_.add(event, count)

    @property
    def epsilon(self) -> float:
        """Return the reading: 0 before anything is spent."""
        if all(sum_.spent == 0 for sum_ in self._sums):
            return 0.0
        share = math.log(len(self._sums) / self._delta)
        return min(sum_.spent + share / (sum_.order - 1) for sum_ in self._sums) * (1 + 1e-12)
