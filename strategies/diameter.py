"""Find the set of points of least diameter, exactly: vertex cover over a threshold graph."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from privfed.strategies.gram import Square
from privfed.strategies.guard import Refusal

BUDGET = 400_000


def smallest_diameter(D: Square, size: int, budget: int = BUDGET) -> NDArray[np.intp]:
    """Return the `size` indices with the least greatest mutual distance; the first in dictionary order on ties.

    D: squared distances, symmetric. Errors: Refusal when the search takes more than `budget` branchings: far
    from every structure it is exponential in n - size.
    """
    n = len(D)
    if size <= 1:
        return np.arange(size)
    levels = np.unique(D)
    steps = [budget]
    low, high = 0, len(levels) - 1
    best = 0
    while low < high:  # the least threshold at which n - size rows cover every pair farther apart
        middle = (low + high) // 2
        found = _cover(_graph(D, float(levels[middle])), (1 << n) - 1, n - size, steps)
        if found is None:
            low = middle + 1
        else:
            high, best = middle, found
    graph = _graph(D, float(levels[high]))
    if high == len(levels) - 1:
        best = 0
    return _first(graph, n, size, best, steps)


def _first(graph: list[int], n: int, size: int, cover: int, steps: list[int]) -> NDArray[np.intp]:
    """Return the first independent set of `size` vertices in dictionary order; `cover` shows there is one."""
    alive, room = (1 << n) - 1, n - size
    chosen: list[int] = []
    for i in range(n):
        if len(chosen) == size:
            break
        if not alive >> i & 1:
            continue
        if cover >> i & 1:
            forced = graph[i] & alive
            rest = alive & ~forced & ~(1 << i)
            found = _cover(graph, rest, room - forced.bit_count(), steps)
            if found is None:
                alive &= ~(1 << i)
                room -= 1
                continue
            cover = found | forced
        forced = graph[i] & alive
        chosen.append(i)
        alive &= ~(forced | 1 << i)
        room -= forced.bit_count()
    return np.array(chosen, dtype=np.intp)


def _graph(D: Square, threshold: float) -> list[int]:
    far = np.packbits(threshold < D, axis=1, bitorder="little")
    return [int.from_bytes(row.tobytes(), "little") for row in far]


def _cover(graph: list[int], alive: int, room: int, steps: list[int]) -> int | None:
    """Return at most `room` vertices that touch every edge among `alive`, or None when there are none."""
    if room < 0:
        return None
    taken = 0
    while True:
        degrees = _degrees(graph, alive)
        if not degrees:
            return taken
        alive = sum(1 << v for v in degrees)
        top = max(degrees, key=lambda v: (degrees[v], -v))
        edges = sum(degrees.values()) // 2
        if edges > room * degrees[top]:
            return None
        if degrees[top] > room:  # it, or more neighbours than there is room for
            taken, alive, room = taken | 1 << top, alive & ~(1 << top), room - 1
            continue
        leaf = next((v for v, k in degrees.items() if k == 1), None)
        if leaf is not None:  # a leaf's neighbour is never the worse choice
            other = graph[leaf] & alive
            taken, alive, room = taken | other, alive & ~(other | 1 << leaf), room - 1
            continue
        break
    if _matching(graph, alive) > room:
        return None
    steps[0] -= 1
    if steps[0] < 0:
        raise Refusal(
            "the search for the least diameter used up its budget; these rows have no structure to prune by: "
            "lower f, raise budget, or use a rule of polynomial cost such as krum or geometric_median"
        )
    found = _cover(graph, alive & ~(1 << top), room - 1, steps)
    if found is not None:
        return taken | found | 1 << top
    around = graph[top] & alive
    found = _cover(graph, alive & ~(around | 1 << top), room - around.bit_count(), steps)
    return None if found is None else taken | found | around


def _degrees(graph: list[int], alive: int) -> dict[int, int]:
    degrees = {}
    rest = alive
    while rest:
        bit = rest & -rest
        v = bit.bit_length() - 1
        rest ^= bit
        degree = (graph[v] & alive).bit_count()
        if degree:
            degrees[v] = degree
    return degrees


def _matching(graph: list[int], alive: int) -> int:
    """Return the size of a greedy matching: a cover needs one end of each of its edges."""
    size, rest = 0, alive
    while rest:
        bit = rest & -rest
        rest ^= bit
        partners = graph[bit.bit_length() - 1] & rest
        if partners:
            rest ^= partners & -partners
            size += 1
    return size
