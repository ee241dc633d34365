"""Fold replies into a running sum, block by block: the order of the replies is the caller's.

Memory is O(model); in an app's process, where large replies and the sum are files, it is O(block).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from privfed.mapped import let_go, zeros
from privfed.record import ArrayRecord
from privfed.strategies.view import Sum
from privfed.update import BLOCK, dimension, flatten, is_finite, parts

Float64s = NDArray[np.float64]


class MeanFold:
    """Accumulate weighted replies, full weights and updates alike, in float64."""

    def __init__(self, model: ArrayRecord) -> None:
        self._model = model
        self._sum: Float64s = zeros(dimension(model))
        self._buffer: Float64s = np.empty(min(BLOCK, max(1, self._sum.size)), np.float64)
        self._absolute = 0.0  # weight of the replies that were full weights
        self.weight = 0.0

    def add(self, arrays: ArrayRecord, weight: float, *, update: bool) -> None:
        """Add a checked reply."""
        place = 0
        for name in self._model:
            for block in parts(arrays[name]):
                part = self._buffer[: block.size]
                target = self._sum[place : place + block.size]
                with np.errstate(over="ignore", invalid="ignore"):  # the strategy refuses a sum that is not finite
                    np.multiply(block, weight, out=part, dtype=np.float64)
                    target += part
                let_go(target)
                place += block.size
        self.weight += weight
        if not update:
            self._absolute += weight

    def finish(self) -> Sum:
        """Return the mean update; the fold is used up. The caller has checked that the weight is above 0."""
        place = 0
        for array in self._model.values():
            for block in parts(array):
                mean = self._sum[place : place + block.size]
                if self._absolute:
                    # sum(w x) - W received = sum(w (x - received)); in float64 this loses 2^-53 of the weights' size.
                    part = self._buffer[: block.size]
                    with np.errstate(over="ignore", invalid="ignore"):
                        np.multiply(block, self._absolute, out=part, dtype=np.float64)
                        mean -= part
                mean /= self.weight
                let_go(mean)
                place += block.size
        return Sum(self._sum, self.weight)


class RowFold:
    """Collect updates as float32 rows, for strategies that must see each."""

    def __init__(self, model: ArrayRecord, capacity: int) -> None:
        self._model = model
        self._base = flatten(model)
        self._rows: NDArray[np.float32] = np.empty((capacity, self._base.size), np.float32)
        self.sources: list[int] = []
        self.weights: list[float] = []

    def add(self, source: int, arrays: ArrayRecord, weight: float, *, update: bool) -> bool:
        """Add a checked reply as the next row; return False, and add nothing, when float32 cannot hold it."""
        flat = flatten(arrays, self._model)
        if not update:
            flat -= self._base
        row = self._rows[len(self.sources)]
        with np.errstate(over="ignore"):
            row[:] = flat
        if not is_finite(row):
            return False
        self.sources.append(source)
        self.weights.append(weight)
        return True

    @property
    def rows(self) -> NDArray[np.float32]:
        """The rows added so far."""
        return self._rows[: len(self.sources)]
