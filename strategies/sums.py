"""Sums of rows in float64, one row after the other: compiled or by numpy, to the same bits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from privfed.strategies.compiled import TOGETHER, Kernels
from privfed.strategies.guard import Tainted, limit, taint_check
from privfed.strategies.matrix import Floats, Matrix, Mixed, Room

# Columns of a block: longer, and it leaves the cache; shorter, and memory is read in pieces too short to foresee.
COLUMNS = 65536
COMPILED_COLUMNS = 131072
LOOKED = 4  # rows that numpy looks at together before it adds them, in cache


def sum_width(matrix: Matrix, kernels: Kernels | None) -> int:
    """Return how many columns a block of a weighted sum has: of mixed rows the same ones, compiled or not."""
    if isinstance(matrix, Mixed):
        return matrix.width(COLUMNS)
    return COLUMNS if kernels is None else COMPILED_COLUMNS


def weighted_sum(
    matrix: Matrix,
    start: int,
    stop: int,
    factor: NDArray[np.float64],
    out: Floats,
    room: Room,
    *,
    kernels: Kernels | None,
    about: Floats | None = None,
    look: bool = False,
) -> None:
    """Write o + factor @ (X - o) of columns start..stop, o = `about`, zero by default, all of it in float64.

    Error: at most (n + 2) 2^-53 sum |factor (X - o)|, and half a last digit of `out`, whatever cancels. look: raise
    Tainted where a row must be looked at before it is used.
    """
    made = matrix.block(start, stop) if isinstance(matrix, Mixed) else None

    def row(index: int) -> Floats:
        return matrix.row(index, start, stop) if made is None else made[index]

    total = room.take("total", (stop - start,), np.float64)
    total[...] = 0.0
    check = matrix if look and not matrix.clean else None
    if about is not None:
        _add_apart(total, row, factor, about, room)
        np.add(total, about, out=total)
    elif kernels is None:
        _add(total, row, factor, check, room)
    elif not _add_compiled(total, row, factor, limit(matrix.work), kernels) and check is not None:
        raise Tainted
    out[...] = total


def sum_rows(rows: Floats, room: Room, kernels: Kernels | None) -> Floats:
    """Return the sum of the rows, in float64: scratch, which the next sum in this room writes to."""
    total = room.take("total", (rows.shape[1],), np.float64)
    total[...] = 0.0
    if kernels is None:
        part = room.take("part", total.shape, np.float64)
        for row in rows:
            part[...] = row
            np.add(total, part, out=total)
    else:
        _add_compiled(total, rows.__getitem__, np.ones(len(rows)), limit(rows.dtype), kernels)
    return total


def _add(
    total: Floats,
    row: Callable[[int], Floats],
    factor: NDArray[np.float64],
    check: Matrix | None,
    room: Room,
) -> None:
    part = room.take("part", total.shape, np.float64)
    for low in range(0, len(factor), LOOKED):
        rows = [row(i) for i in range(low, min(low + LOOKED, len(factor)))]
        if check is not None:
            taint_check(check, rows)
        for x, weight in zip(rows, factor[low:].tolist(), strict=False):
            part[...] = x  # converted apart: numpy's own conversion inside a product takes twice as long
            np.multiply(part, weight, out=part)
            np.add(total, part, out=total)


def _add_apart(
    total: Floats, row: Callable[[int], Floats], factor: NDArray[np.float64], about: Floats, room: Room
) -> None:
    part = room.take("part", total.shape, np.float64)
    for i, weight in enumerate(factor):
        np.subtract(row(i), about, out=part, dtype=np.float64)
        np.multiply(part, weight, out=part)
        np.add(total, part, out=total)


def _add_compiled(
    total: Floats,
    row: Callable[[int], Floats],
    factor: NDArray[np.float64],
    largest: float,
    kernels: Kernels,
) -> bool:
    """Add the rows and say whether none holds anything larger than `largest`, or not finite."""
    n = len(factor)
    tens = n // TOGETHER * TOGETHER
    good = True
    for low in range(0, tens, TOGETHER):
        rows = [np.ascontiguousarray(row(i)) for i in range(low, low + TOGETHER)]
        good &= kernels.add_ten(total, factor[low : low + TOGETHER], largest, *rows)
    for i in range(tens, n):
        good &= kernels.add_one(total, factor[i], largest, np.ascontiguousarray(row(i)))
    return good
