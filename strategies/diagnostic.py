"""What a round's visible updates and metrics say about their nodes: sizes, directions, spread.

    updates         norm      least, median, largest, and whose the largest is
                    cosine    mean over all pairs; the least with the mean direction, and whose it is
                    diversity mean squared norm over squared norm of the mean: 1 when all are equal, n when orthogonal
                    too-large nodes whose update no rule could use
    metric-spread   name -> least, median and largest over the nodes

Nothing of this exists where single nodes are hidden or a privacy plan is in force.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from privfed.mapped import let_go
from privfed.record import ArrayRecord, RecordDict
from privfed.strategies.guard import limit
from privfed.strategies.metric import metrics_of
from privfed.strategies.view import Float64s, Updates
from privfed.update import BLOCK, parts

WIDTH = 8192


def describe_updates(view: Updates) -> dict[str, object]:
    """Return norms and cosines of the rows. Two reads of them, and memory for one block."""
    rows, count = view.rows, len(view.rows)
    if not count:
        return {}
    norms, peaks = _norms(rows)
    unit = np.divide(1.0, norms, out=np.zeros(count), where=norms > 0)
    toward, total, center = np.zeros(count), 0.0, 0.0
    for start in range(0, rows.shape[1], WIDTH):
        block = rows[:, start : start + WIDTH].astype(np.float64)
        mean = block.mean(axis=0)
        center += float(mean @ mean)
        block *= unit[:, None]
        sum_of_units = block.sum(axis=0)
        total += float(sum_of_units @ sum_of_units)
        toward += block @ sum_of_units
    found: dict[str, object] = {"norm": describe_norms(norms, view.sources)}
    moved = int((norms > 0).sum())
    if moved > 1:
        cosine: dict[str, object] = {"mean": (total - moved) / (moved * (moved - 1))}
        if total > 0:  # directions that cancel have no mean to be compared with
            nonzero = np.flatnonzero(norms > 0)
            cosines = toward[nonzero] / math.sqrt(total)
            least = int(np.argmin(cosines))
            cosine.update({"least": float(cosines[least]), "least-node": view.sources[int(nonzero[least])]})
        found["cosine"] = cosine
    if center > 0:
        found["diversity"] = float(norms @ norms) / count / center
    bound = limit(rows.dtype)
    too_large = [node for node, peak in zip(view.sources, peaks, strict=True) if peak > bound]
    if too_large:
        found["too-large"] = too_large
    return found


def describe_norms(norms: Float64s, sources: Sequence[int]) -> dict[str, object]:
    """Return the least, median and largest norm, and whose the largest is (the lowest of equals)."""
    largest = int(np.argmax(norms))
    return {
        "least": float(norms.min()),
        "median": float(np.median(norms)),
        "largest": float(norms[largest]),
        "largest-node": sources[largest],
    }


def describe_metrics(contents: Iterable[RecordDict], weight_key: str | None) -> dict[str, list[float]]:
    """Return least, median and largest of every number that at least two nodes report, but the weight."""
    values: dict[str, list[float]] = {}
    for content in contents:
        for name, value in metrics_of(content).items():
            if not isinstance(value, list) and name != weight_key:
                values.setdefault(name, []).append(float(value))
    return {name: [min(found), float(np.median(found)), max(found)] for name, found in values.items() if len(found) > 1}


class NormFold:
    """Norms of updates that stream by, and their diversity."""

    def __init__(self, model: ArrayRecord) -> None:
        self._model = model
        self._norms: list[float] = []
        self._sources: list[int] = []
        self._squares = 0.0
        # Room for a block each, taken once: given back and taken again, its pages would be cleared every time.
        self._rooms = np.empty(BLOCK), np.empty(BLOCK)

    def add(self, source: int, arrays: ArrayRecord, weight: float, *, update: bool) -> None:
        """Take in a checked reply."""
        square = 0.0
        with np.errstate(over="ignore", invalid="ignore"):
            for name, base in self._model.items():
                for given, received in zip(parts(arrays[name]), parts(base), strict=True):
                    block, old = (room[: given.size] for room in self._rooms)
                    np.copyto(block, given)
                    if not update:
                        np.copyto(old, received)
                        block -= old
                    square += float(block @ block)
        self._norms.append(math.sqrt(square))
        self._sources.append(source)
        self._squares += weight * square

    def finish(self, mean: Float64s, weight: float) -> dict[str, object]:
        """Return what the replies so far say beside their mean."""
        found: dict[str, object] = {"norm": describe_norms(np.array(self._norms), self._sources)}
        center = 0.0
        for start in range(0, mean.size, BLOCK):
            block = mean[start : start + BLOCK]
            center += float(block @ block)
            let_go(block)
        if 0 < center < math.inf and math.isfinite(self._squares):
            found["diversity"] = self._squares / weight / center
        return found


def _norms(rows: NDArray[np.float32]) -> tuple[Float64s, Float64s]:
    squares, peaks = np.zeros(len(rows)), np.zeros(len(rows))
    for start in range(0, rows.shape[1], WIDTH):
        block = rows[:, start : start + WIDTH].astype(np.float64)
        squares += np.einsum("ij,ij->i", block, block)
        np.maximum(peaks, np.abs(block).max(axis=1), out=peaks)
    return np.sqrt(squares), peaks
