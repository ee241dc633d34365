"""Groups of a run stay what they are."""

from __future__ import annotations

from privfed.apps import ClientApp
from privfed.grid import LocalGrid
from privfed.protocols import SecAgg
from privfed.strategies import GroupedStage


def test_groups_are_fixed_for_a_run() -> None:
    """The server must not be able to average a persistent node out of groups that change."""
    nodes = tuple(range(1, 30))
    for seed in (5, None):
        grid = LocalGrid(ClientApp(), 29, seed=seed)
        stage = GroupedStage(SecAgg(threshold=2), 4)
        assert stage.draw_groups(grid, nodes) == stage.draw_groups(grid, nodes)
    unseeded = [GroupedStage(SecAgg(threshold=2), 4).draw_groups(grid, nodes) for _ in range(2)]
    assert unseeded[0] != unseeded[1], "unseeded groups are random (equal by chance: below 1e-20)"
