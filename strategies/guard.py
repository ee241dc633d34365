"""Keep rows no rule can survive out of the arithmetic, and refuse what no rule can promise."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.strategies.matrix import Floats, Matrix, as_matrix, flat_vector, run_blocks


class Refusal(ValueError):
    """A rule's precondition does not hold for these rows and this f; the message says the numbers."""


class Tainted(Exception):
    """A block holds a row that must be looked at before it is used; caught inside the rules."""


@dataclass(frozen=True)
class Exclusion:
    """One row that was left out: its index in the input and why."""

    index: int
    reason: str


@dataclass(frozen=True, eq=False)
class Screened:
    """Rows fit for arithmetic, what was left out, and how many Byzantine rows may still be among them.

    Every rule accepts it in place of X. `f` is what is left of the f given to `screen`.
    """

    rows: Matrix
    excluded: tuple[Exclusion, ...]
    f: int
    kept: tuple[int, ...] = field(repr=False)


def limit(dtype: np.dtype[Any]) -> float:
    """Return the largest magnitude at which a block's sums of squares cannot overflow."""
    return 2.0**57 if dtype.itemsize <= 4 else 2.0**490


def count(f: Any, name: str = "f", least: int = 0) -> int:
    """Return f as an int; ValueError, with the argument's name, when it is no whole number of at least `least`."""
    try:
        value = operator.index(f)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {f!r}") from None
    if isinstance(f, bool | np.bool_) or value < least:
        raise ValueError(f"{name} must be a whole number >= {least}, got {f!r}")
    return value


def trusted_row(vector: Any, matrix: Matrix, name: str) -> Floats:
    """Return a row of the server's own flat, in the dtype the rules work in; ValueError when no rule could use it."""
    return usable_vector(vector, matrix, name).astype(matrix.work, copy=False)


def usable_vector(vector: Any, matrix: Matrix, name: str) -> Floats:
    """Return a row-shaped vector flat; ValueError, with its name, when it holds more than a row may."""
    flat = flat_vector(vector, matrix, name)
    largest = float(np.abs(flat).max(initial=0.0))
    if largest > limit(matrix.work):
        raise ValueError(f"{name} holds {largest:.3g}, more than the {limit(matrix.work):.3g} a row may hold")
    return flat


def keep_some(rule: str, n: int, keep: int, least: int = 1) -> int:
    """Return `keep`; Refusal when it is not from `least` to n rows."""
    if not least <= keep <= n:
        raise Refusal(f"{rule} would keep {keep} of n = {n} rows; it needs from {least} to n")
    return keep


def require(rule: str, n: int, f: int, least: int, formula: str) -> None:
    """Refuse when n rows are fewer than `least`, which `formula` gives for this f."""
    if n < least:
        raise Refusal(
            f"{rule} needs n >= {formula} = {least} rows to tolerate f = {f} Byzantine clients, got n = {n}; "
            f"collect more replies or lower f"
        )


def require_majority(rule: str, n: int, f: int) -> None:
    """Refuse when honest rows are no majority."""
    require(rule, n, f, 2 * f + 1, "2f + 1")


def taint_check(matrix: Matrix, rows: Floats | list[Floats]) -> None:
    """Raise Tainted when a part of a row may be non-finite or huge; one dot product a row."""
    if matrix.clean:
        return
    with np.errstate(all="ignore"):  # overflow and NaN are the answer
        if isinstance(rows, list):
            squares = np.array([np.dot(row, row) for row in rows])
        else:
            squares = np.matmul(rows[:, None, :], rows[:, :, None])
        if not (squares <= limit(matrix.work) ** 2).all():
            raise Tainted


def screen(X: Any, f: int, *, largest: float | None = None) -> Screened:
    """Leave out the rows that hold NaN, infinity or a magnitude above `largest`, and count them against f.

    `largest` defaults to 2**57 (about 1.4e17) for float16 and float32 and 2**490 for float64: below it no sum of
    squares overflows, so everything kept is computed exactly as it is. Errors: Refusal when more than f rows go.
    """
    if isinstance(X, Screened):
        return X
    matrix = as_matrix(X)
    f = count(f)
    bound = limit(matrix.work) if largest is None else float(largest)
    if not bound > 0:
        raise ValueError(f"largest must be positive, got {largest}")
    reasons = _reasons(matrix, bound)
    excluded = tuple(Exclusion(i, reason) for i, reason in enumerate(reasons) if reason)
    if len(excluded) > f:
        listed = ", ".join(f"row {e.index} {e.reason}" for e in excluded[:5])
        raise Refusal(
            f"{len(excluded)} of {matrix.count} rows cannot be used ({listed}) and the rule was told to tolerate "
            f"f = {f}; find out why these clients diverged, or raise f"
        )
    kept = tuple(i for i, reason in enumerate(reasons) if not reason)
    rows = replace(matrix.take(kept) if excluded else matrix, clean=True)
    return Screened(rows, excluded, f - len(excluded), kept)


def _reasons(matrix: Matrix, bound: float) -> list[str]:
    peaks = [np.zeros(matrix.count)]

    def look(start: int, stop: int) -> None:
        block = matrix.block(start, stop)
        # max and min carry NaN along, and need no copy of the block
        high, low = block.max(axis=1, initial=0.0), block.min(axis=1, initial=0.0)
        peaks.append(np.maximum(high, -low).astype(np.float64))

    run_blocks(matrix.size, matrix.width(), look)
    peak = np.max(peaks, axis=0)
    return [
        "is NaN" if np.isnan(p) else "is infinite" if np.isinf(p) else f"exceeds {bound:.3g}" if p > bound else ""
        for p in peak
    ]


def guarded(X: Any, f: Any, body: Callable[[Matrix, int], Floats]) -> Any:
    """Run `body(rows, f)` and, when it meets a tainted row, screen and run it on the rest.

    f None stands for what a rule without f tolerates: every minority.
    """
    if isinstance(X, Screened):
        left = X.f if f is None else min(count(f), X.f)
        return X.rows.wrap(body(X.rows, left).astype(X.rows.dtype, copy=False))
    matrix = as_matrix(X)
    value = (matrix.count - 1) // 2 if f is None else count(f)
    try:
        flat = body(matrix, value)
    except Tainted:
        clean = screen(matrix, value)
        flat = body(clean.rows, clean.f)
    return matrix.wrap(flat.astype(matrix.dtype, copy=False))


def index_set(chosen: NDArray[np.intp], n: int) -> NDArray[np.float64]:
    """Return equal weights on the chosen rows and zero elsewhere, summing to one."""
    weights = np.zeros(n)
    weights[chosen] = 1.0 / len(chosen)
    return weights
