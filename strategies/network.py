"""Order statistics of columns: a pruned sorting network for few rows, transposed row sorts for many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from privfed.strategies.compiled import Kernels, kernels_for
from privfed.strategies.guard import Tainted, limit, taint_check
from privfed.strategies.matrix import SCRATCH_BYTES, Floats, Matrix, Mixed, Room, run_blocks

Comparator: TypeAlias = tuple[int, int, bool, bool]  # wires a, b; keep the minimum in a, the maximum in b
Step: TypeAlias = tuple[bool, int, int, int]  # maximum or minimum, of two registers, into a third
Block: TypeAlias = tuple[Floats, Floats | None]  # rows of ranks, and what they come less of
Finish: TypeAlias = Callable[[Floats, Kernels | None], Floats]

# Above this many rows the comparators cost more than numpy's vectorised sort of contiguous rows.
NETWORK_ROWS = 64
# The same for comparators that are compiled.
COMPILED_ROWS = 128
# Columns of a block of the network: fewer, and the calls cost more than the cache saves.
NETWORK_COLUMNS = 24576
TURNED_COLUMNS = 2048  # columns of a block that is transposed and sorted by rows


@dataclass(frozen=True)
class Program:
    """A network as calls on registers: the rows, never written to, then scratch, where the ranks come first."""

    steps: tuple[Step, ...]
    scratch: int


@dataclass(frozen=True)
class Wanted:
    """The ranks to find, whether as a set, and the compiled loops if there are any."""

    ranks: tuple[int, ...]
    together: bool
    kernels: Kernels | None


def pairwise(size: int) -> list[tuple[int, int]]:
    """Return the sorting network of [Par92] for a power of two of inputs: pruned, it leaves least to do."""
    pairs: list[tuple[int, int]] = []

    def sort(wires: list[int]) -> None:
        half = len(wires) // 2
        pairs.extend((wires[2 * i], wires[2 * i + 1]) for i in range(half))
        if half > 1:
            sort(wires[0::2])
            sort(wires[1::2])
        reach = half // 2
        while reach:
            pairs.extend((wires[2 * i + 1], wires[2 * (i + reach)]) for i in range(half - reach))
            reach //= 2

    sort(list(range(size)))
    return pairs


@lru_cache(maxsize=128)
def comparators(n: int, ranks: tuple[int, ...], together: bool = False) -> tuple[Comparator, ...]:
    """Return a network of n wires that brings rank r to wire r, less what the output ranks do not need.

    together: the ranks are wanted as a set, in any order among themselves, as for a sum. It is a pairwise network some
    of whose inputs are fixed below or above all others, whichever split of them leaves least to do.
    """
    size = 1 << (n - 1).bit_length()
    whole = pairwise(size)
    spare = size - n
    below = sorted({0, 1, 2, 4, spare // 2, spare} & set(range(spare + 1)))
    made = (_pruned(_narrowed(whole, size, low, n), ranks, together) for low in below)
    return min(made, key=lambda network: sum(low + high for _, _, low, high in network))


def _narrowed(network: list[tuple[int, int]], size: int, below: int, n: int) -> list[tuple[int, int]]:
    """Return the network for n inputs: its first `below` are held below all of them, the rest above."""
    held = [min(max(wire - below, -1), n) for wire in range(size)]  # which input a wire carries; -1 and n are no inputs
    pairs = []
    for a, b in network:
        first, second = held[a], held[b]
        if 0 <= first < n and 0 <= second < n:
            pairs.append((first, second))
        elif first > second:
            held[a], held[b] = second, first
    rank = {wire: r for r, wire in enumerate(wire for wire in held if 0 <= wire < n)}
    return [(rank[a], rank[b]) for a, b in pairs]


def _pruned(pairs: list[tuple[int, int]], ranks: tuple[int, ...], together: bool) -> tuple[Comparator, ...]:
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


@lru_cache(maxsize=128)
def wires(n: int, ranks: tuple[int, ...], together: bool = False) -> NDArray[np.int32]:
    """Return the wires of `comparators`, two a row, all of them kept: a row nobody needs may hold anything."""
    return np.array([pair[:2] for pair in comparators(n, ranks, together)], np.int32).reshape(-1, 2)


@lru_cache(maxsize=128)
def program(n: int, ranks: tuple[int, ...], together: bool = False) -> Program:
    """Return the calls of `comparators`, each with the register it writes to: one that nothing needs any more."""
    held, free, steps, scratch = list(range(n)), list[int](), list[Step](), 0

    def fresh() -> int:
        nonlocal scratch
        scratch += not free
        return free.pop() if free else n + scratch - 1

    for a, b, low, high in comparators(n, ranks, together):
        read = held[a], held[b]
        if low and high:
            held[a] = fresh()
            steps.append((False, *read, held[a]))
        done = [register for register in read if register >= n]  # rows of the input are not written to
        last = done.pop() if done else fresh()
        free += done
        steps.append((high, *read, last))
        held[b if high else a] = last
    for rank in ranks:
        if held[rank] < n:  # never compared
            steps.append((True, held[rank], held[rank], fresh()))
            held[rank] = steps[-1][-1]
    place = {register: register for register in range(n)} | {held[rank]: n + i for i, rank in enumerate(ranks)}
    for register in range(n, n + scratch):
        place.setdefault(register, len(place))
    return Program(tuple((high, place[x], place[y], place[to]) for high, x, y, to in steps), scratch)


def run_program(made: Program, rows: Floats | list[Floats], scratch: Floats) -> None:
    """Bring what the program is for into the first rows of the scratch, in order; the rows are left as they are."""
    at = [*rows, *scratch]
    least, most = np.minimum, np.maximum
    for high, a, b, to in made.steps:  # some hundred calls a block: nothing else is done here
        (most if high else least)(at[a], at[b], out=at[to])


def by_rank(matrix: Matrix, ranks: tuple[int, ...], finish: Finish, *, together: bool = False) -> Floats:
    """Sort every column and return what a finisher makes of it: one number a column.

    ranks: without gaps. finish: takes the rows of `ranks`, shape (ranks, columns of the block), as its own, and the
    compiled loops if there are any. What it makes must move along with the column, since columns may come less a number
    that is added afterwards. together: its result hardly depends on the order of those rows; see `comparators`.
    """
    out = np.empty(matrix.size, matrix.work)
    n = matrix.count
    few = n <= NETWORK_ROWS
    kernels = kernels_for(matrix) if n <= COMPILED_ROWS else None
    exchanged = kernels is not None and (few or not isinstance(matrix, Mixed))  # products of many rows come transposed
    block = _exchanged if exchanged else _by_calls if few else _sorted
    # the same order of rows in a sum, whichever of these it is
    wanted = Wanted(ranks, together and few, kernels)
    width = matrix.width(NETWORK_COLUMNS, 2 * SCRATCH_BYTES) if few or exchanged else matrix.width(TURNED_COLUMNS)
    room = Room()

    def columns(start: int, stop: int) -> None:
        ranked, part = block(matrix, start, stop, wanted, room)
        made = out[start:stop]
        made[...] = finish(ranked, kernels)
        made += 0.0  # which zero is the lesser is not for the ways to differ in
        if part is not None:
            made += part

    run_blocks(matrix.size, width, columns)
    return out


def _exchanged(matrix: Matrix, start: int, stop: int, wanted: Wanted, room: Room) -> Block:
    """Return the rows of the ranks by the network, compiled."""
    assert wanted.kernels is not None
    if isinstance(matrix, Mixed):
        held, part = matrix.shifted(start, stop, room)  # made for this block
    else:
        rows, part = matrix.apart(start, stop)
        held = room.take("ranked", (matrix.count, stop - start), matrix.work)
        for row, target in zip(rows, held, strict=True):
            target[...] = row
    if not (matrix.clean or wanted.kernels.within(held, limit(matrix.work))):
        raise Tainted
    wanted.kernels.exchange(held, wires(matrix.count, wanted.ranks, wanted.together))
    return held[wanted.ranks[0] : wanted.ranks[-1] + 1], part


def _by_calls(matrix: Matrix, start: int, stop: int, wanted: Wanted, room: Room) -> Block:
    """Return the rows of the ranks by the network, in calls of numpy."""
    made = program(matrix.count, wanted.ranks, wanted.together)
    rows, part = matrix.apart(start, stop, room)
    taint_check(matrix, rows)
    scratch = room.take("ranked", (made.scratch, stop - start), matrix.work)
    run_program(made, rows, scratch)
    return scratch[: len(wanted.ranks)], part


def _sorted(matrix: Matrix, start: int, stop: int, wanted: Wanted, room: Room) -> Block:
    """Return the rows of the ranks by sorting the columns, as rows."""
    turned = room.take("turned", (stop - start, matrix.count), matrix.work)
    part = matrix.turned(start, stop, turned, lambda block: taint_check(matrix, block))
    turned.sort(axis=1)
    ranked = room.take("ranked", (len(wanted.ranks), stop - start), matrix.work)
    ranked[...] = turned[:, wanted.ranks[0] : wanted.ranks[-1] + 1].T
    return ranked, part
