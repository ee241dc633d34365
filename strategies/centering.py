"""Centered clipping: updates are clipped around the last aggregate, which is remembered [KHJ21]."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from privfed.array import Array
from privfed.record import ArrayRecord, RecordDict
from privfed.strategies import rules
from privfed.strategies.guard import count
from privfed.strategies.robust import Rows, RuleStrategy

CENTER = "centered-clipping"


class CenteredClipping(RuleStrategy):
    """Add the mean of the updates clipped to `radius` around the last round's aggregate, `steps` times over.

    The first round clips around zero. radius: the distance that honest updates may have from each other.
    """

    unbounded: ClassVar[str] = (
        "it clips around the last round's aggregate and not around the model, so its bound is not the plan's clip"
    )

    def __init__(self, *, radius: float, steps: int = 1, **arguments: Any) -> None:
        if not (math.isfinite(radius) and radius > 0):
            raise ValueError(f"radius must be finite and > 0, got {radius}")
        whole = count(steps, "steps", 1)
        super().__init__(**arguments)
        self.radius = radius
        self.steps = whole
        self._center: NDArray[np.float32] | None = None

    def rule(self, rows: Rows) -> NDArray[Any]:
        """Return the aggregate and remember it as the next center."""
        found = np.asarray(rules.centered_clipping(rows, self.radius, self._center, self.steps), np.float32)
        self._center = found
        return found

    def save(self) -> RecordDict:
        """Return the center."""
        if self._center is None:
            return RecordDict()
        return RecordDict({CENTER: ArrayRecord({"center": Array(self._center)})})

    def load(self, state: RecordDict) -> None:
        """Take up the center."""
        record = state.array_records.get(CENTER)
        self._center = record["center"].numpy() if record is not None else None
