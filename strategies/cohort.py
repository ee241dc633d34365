"""The cohort of a round: wait until enough nodes are there, then choose."""

from __future__ import annotations

import time
from collections.abc import Sequence

from privfed.context import derived_rng
from privfed.errors import RunFailed
from privfed.grid import Grid

FIRST_WAIT, LONGEST_WAIT = 0.01, 1.0


def wait_for_nodes(grid: Grid, needed: int, timeout: float) -> Sequence[int]:
    """Return the ids of the connected nodes once there are `needed`. Raises RunFailed after `timeout` seconds.

    The wait is reported, so that whoever looks at the run sees what it waits for.
    """
    deadline = time.monotonic() + timeout
    pause, told = FIRST_WAIT, -1
    while True:
        nodes = grid.get_node_ids()
        if len(nodes) >= needed:
            if told >= 0:
                grid.recorder.report("waited", what="nodes", have=len(nodes), need=needed)
            return nodes
        if len(nodes) != told:
            told = len(nodes)
            what = "nodes (min_available_nodes)"
            grid.recorder.report("waiting", what=what, have=told, need=needed, seconds=round(timeout, 3))
        left = deadline - time.monotonic()
        if left <= 0:
            raise RunFailed(
                f"{len(nodes)} nodes are connected, min_available_nodes={needed} are needed, and none came within "
                f"{timeout:g} s: start more nodes, or lower min_available_nodes"
            )
        time.sleep(min(pause, left))
        pause = min(2 * pause, LONGEST_WAIT)


def cohort_size(available: int, fraction: float, least: int) -> int:
    """Return how many nodes a round asks: a fraction of those there, at least `least`."""
    return min(available, max(int(available * fraction), least))


def draw_cohort(grid: Grid, nodes: Sequence[int], size: int, *labels: int | str) -> tuple[int, ...]:
    """Choose nodes uniformly without replacement, from the grid's seed and the labels; ascending."""
    if size >= len(nodes):
        return tuple(sorted(nodes))
    chosen = derived_rng(grid.seed, "cohort", *labels).choice(len(nodes), size=size, replace=False)
    ordered = sorted(nodes)
    return tuple(sorted(ordered[i] for i in chosen))
