"""Loops that numpy has no single call for, compiled by numba where the extra `fast` is installed.

numpy can neither add float32 rows in float64 nor compare and exchange two rows without a pass over memory for every
step. Each loop here has a twin of numpy calls that makes the same bits: the same additions in the same order, products
rounded before they are added. So results do not depend on the extra, only the time they take does. Nothing is cached
on disk: a process compiles what it needs, which takes about a second, and so only for large inputs.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.strategies.matrix import Floats, Matrix

# Below this many numbers what is saved in a call is not worth the second that compiling takes.
LEAST_NUMBERS = 10**7
TOGETHER = 10  # rows added in one pass: `add_ten`
TILE = 1024  # columns exchanged at a time: two rows of them and their results stay in the first-level cache
VARIABLE = "PRIVFED_FAST"

_least: ContextVar[int | None] = ContextVar("least", default=LEAST_NUMBERS)
_lock = threading.Lock()
_made: dict[str, Kernels | None] = {}


@dataclass(frozen=True)
class Kernels:
    """The loops of this module, compiled for rows of one dtype."""

    add_ten: Callable[..., bool]
    add_one: Callable[..., bool]
    within: Callable[..., bool]
    exchange: Callable[..., None]


@contextmanager
def fast(least: int | None = LEAST_NUMBERS) -> Iterator[None]:
    """Let the rules called inside use compiled loops for inputs of at least `least` numbers; None: for none.

    Results do not depend on it. Without the extra `fast`, with PRIVFED_FAST=0 in the environment, or in a process whose
    address space is limited, there are none.
    """
    if least is not None and least < 0:
        raise ValueError(f"least must be at least 0, got {least}")
    token = _least.set(least)
    try:
        yield
    finally:
        _least.reset(token)


def kernels_for(matrix: Matrix) -> Kernels | None:
    """Return the compiled loops for these rows, or None where numpy is to be used."""
    least = _least.get()
    if least is None or matrix.count * matrix.size < least:
        return None
    chosen = os.environ.get(VARIABLE, "1")
    if chosen not in ("0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 (no compiled loops) or 1, got {chosen!r}")
    if chosen == "0":
        return None
    name = matrix.work.name
    with _lock:
        if name not in _made:
            _made[name] = _compile(name)
        return _made[name]


def _memory_is_limited() -> bool:
    """Say whether this process has a limit on its address space: a compiler that runs into one ends the process."""
    try:
        resource = importlib.import_module("resource")
    except ImportError:  # not a POSIX system
        return False
    return bool(resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY)


def _compile(name: str) -> Kernels | None:
    if importlib.util.find_spec("numba") is None or _memory_is_limited():
        return None
    try:
        numba = importlib.import_module("numba")
    except ImportError as error:  # a numpy that it does not know yet
        warnings.warn(f"the extra `fast` cannot be used, rules take longer: {error}", RuntimeWarning, stacklevel=4)
        return None
    types: Any = numba.types
    one = getattr(types, name)
    row = types.Array(one, 1, "C", readonly=True, aligned=False)  # rows of maps and messages too
    total = types.Array(types.float64, 1, "C")
    factors = types.Array(types.float64, 1, "C", readonly=True)
    block = types.Array(one, 2, "C")
    pairs = types.Array(types.int32, 2, "C", readonly=True)

    def compiled(function: Callable[..., Any], answer: Any, *arguments: Any) -> Any:
        # never fastmath, which may reorder sums or fuse a product with the sum it goes to
        return numba.njit(answer(*arguments), nogil=True)(function)

    return Kernels(
        compiled(add_ten, types.boolean, total, factors, one, *[row] * TOGETHER),
        compiled(add_one, types.boolean, total, types.float64, one, row),
        compiled(within, types.boolean, block, one),
        compiled(exchange, types.void, block, pairs),
    )


def add_ten(
    total: NDArray[np.float64],
    factor: NDArray[np.float64],
    bound: Any,
    x0: Floats,
    x1: Floats,
    x2: Floats,
    x3: Floats,
    x4: Floats,
    x5: Floats,
    x6: Floats,
    x7: Floats,
    x8: Floats,
    x9: Floats,
) -> bool:
    """Add ten rows times their factors to the total, one after the other; say whether all is within the bound.

    Ten at a time, since the total is then read and written once for ten rows, which come in ten streams.
    """
    w0, w1, w2, w3, w4 = factor[0], factor[1], factor[2], factor[3], factor[4]
    w5, w6, w7, w8, w9 = factor[5], factor[6], factor[7], factor[8], factor[9]
    good = True
    for j in range(total.size):
        a, b, c, d, e, f, g, h, k, m = x0[j], x1[j], x2[j], x3[j], x4[j], x5[j], x6[j], x7[j], x8[j], x9[j]
        s = total[j] + w0 * np.float64(a)
        s = s + w1 * np.float64(b)
        s = s + w2 * np.float64(c)
        s = s + w3 * np.float64(d)
        s = s + w4 * np.float64(e)
        s = s + w5 * np.float64(f)
        s = s + w6 * np.float64(g)
        s = s + w7 * np.float64(h)
        s = s + w8 * np.float64(k)
        total[j] = s + w9 * np.float64(m)
        good &= (abs(a) <= bound) & (abs(b) <= bound) & (abs(c) <= bound) & (abs(d) <= bound) & (abs(e) <= bound)
        good &= (abs(f) <= bound) & (abs(g) <= bound) & (abs(h) <= bound) & (abs(k) <= bound) & (abs(m) <= bound)
    return good


def add_one(total: NDArray[np.float64], factor: float, bound: Any, x: Floats) -> bool:
    """Do what `add_ten` does with one row: the rows that are left when they come in tens."""
    good = True
    for j in range(total.size):
        a = x[j]
        total[j] += factor * np.float64(a)
        good &= abs(a) <= bound
    return bool(good)


def within(rows: Floats, bound: Any) -> bool:
    """Say whether no number is NaN, infinite or larger than the bound."""
    good = True
    for i in range(rows.shape[0]):
        row = rows[i]
        for j in range(row.size):
            good &= abs(row[j]) <= bound
    return bool(good)


def exchange(rows: Floats, pairs: NDArray[np.int32]) -> None:
    """Bring, for one pair (a, b) after the other, the lesser of each column to row a and the greater to row b."""
    for start in range(0, rows.shape[1], TILE):
        stop = min(start + TILE, rows.shape[1])
        for q in range(pairs.shape[0]):
            low, high = rows[pairs[q, 0], start:stop], rows[pairs[q, 1], start:stop]
            for j in range(low.size):
                a, b = low[j], high[j]
                low[j] = a if a < b else b
                high[j] = a if a > b else b
