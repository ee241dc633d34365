"""Order statistics of columns: a pruned sorting network for few rows, transposed row sorts for many."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TypeAlias

import numpy as np

from privfed.strategies.guard import ends_check, taint_check
from privfed.strategies.matrix import SCRATCH_BYTES, Floats, Matrix, Room, run_blocks

Comparator: TypeAlias = tuple[int, int, bool, bool]  # rows a < b; keep the minimum in a, the maximum in b
Finish: TypeAlias = Callable[[list[Floats]], Floats]

# Above this many rows the comparators cost more than numpy's vectorised sort of contiguous rows.
NETWORK_ROWS = 48
# Columns of a block of the network: fewer, and the calls cost more than the cache saves.
NETWORK_COLUMNS = 16384


@lru_cache(maxsize=128)
def comparators(n: int, ranks: tuple[int, ...], together: bool = False) -> tuple[Comparator, ...]:
    """Return Batcher's odd-even merge network for n inputs, less what the output ranks do not need [Bat68].

    together: the ranks are wanted as a set, in any order among themselves, as for a sum.
    """
    pairs = []
    p = 1
    while p < n:
        k = p
        while k >= 1:
            for j in range(k % p, n - k, 2 * k):
                for i in range(j, min(j + k, n - k)):
                    if i // (2 * p) == (i + k) // (2 * p):
                        pairs.append((i, i + k))
            k //= 2
        p *= 2
    needed, kept = set(ranks), []
    loose = set(ranks) if together else set()  # wires that still go to the set as they are
    for a, b in reversed(pairs):
        if a in loose and b in loose:
            continue
        if a in needed or b in needed:
            kept.append((a, b, a in needed, b in needed))
            needed |= {a, b}
            loose -= {a, b}
    return tuple(reversed(kept))


def run_network(network: tuple[Comparator, ...], rows: list[Floats], spare: list[Floats]) -> list[Floats]:
    """Return the rows in rank order. `spare` is scratch, one row more than there are; the rows are left as they are."""
    rows, spare = list(rows), list(spare)
    own = [False] * len(rows)  # rows in scratch may be written over, the first comparators write into it
    for a, b, low, high in network:
        first, second = rows[a], rows[b]
        if low and high:
            rows[a] = np.minimum(first, second, out=spare.pop())
            rows[b] = np.maximum(first, second, out=second if own[b] else spare.pop())
            if own[a]:
                spare.append(first)
        elif low:
            rows[a] = np.minimum(first, second, out=first if own[a] else spare.pop())
        else:
            rows[b] = np.maximum(first, second, out=second if own[b] else spare.pop())
        own[a] = own[a] or low
        own[b] = own[b] or high
    return rows


def by_rank(
    matrix: Matrix, ranks: tuple[int, ...], few: Finish, many: Callable[[Floats], Floats], *, together: bool = False
) -> Floats:
    """Sort every column and return what a finisher makes of it: one number a column.

    What it makes must move along with the column, since columns may come less a number that is added afterwards.
    few: takes the rows in rank order (only `ranks` are right), each one block wide, and must not write to them.
    many: takes columns as sorted rows, shape (columns of the block, n). together: see `comparators`.
    """
    out = np.empty(matrix.size, matrix.work)
    n = matrix.count
    small = n <= NETWORK_ROWS
    network = comparators(n, ranks, together) if small else ()
    width = matrix.width(NETWORK_COLUMNS, 2 * SCRATCH_BYTES) if small else matrix.width(2048)
    room = Room()

    def columns(start: int, stop: int) -> None:
        if small:
            block, part = matrix.shifted(start, stop)
            taint_check(matrix, block)
            spare = room.take("ranked", (n + 1, stop - start), matrix.work)
            out[start:stop] = few(run_network(network, list(block), list(spare)))
        else:
            turned = room.take("ranked", (stop - start, n), matrix.work)
            part = matrix.turned(start, stop, turned)
            turned.sort(axis=1)
            ends_check(matrix, turned)
            out[start:stop] = many(turned)
        if part is not None:
            out[start:stop] += part

    run_blocks(matrix.size, width, columns)
    return out
