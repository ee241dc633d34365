"""Federated analytics: exact sums of integers, masked or not, of those who answered."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from privfed import mods
from privfed.apps import ClientApp
from privfed.array import Array
from privfed.context import Context
from privfed.errors import QuorumError, RunFailed
from privfed.grid import LocalGrid
from privfed.message import Message
from privfed.protocols import SecAgg
from privfed.record import ArrayRecord, ConfigRecord, RecordDict
from privfed.strategies import FedAnalytics, GroupedStage, PlainStage, SecureStage

SHAPES: dict[str, tuple[int, ...]] = {"histogram": (4,), "sum": (), "count": ()}


def app_of(broken: int | None = None, masked: bool = True) -> ClientApp:
    app = ClientApp(mods=[mods.secure_aggregation()] if masked else [])

    @app.query("histogram")
    def histogram(message: Message, context: Context) -> Message:
        if context.node_id == broken:
            raise ValueError
        assert message.content["config"] == ConfigRecord({"bins": 4})
        values = np.random.default_rng(context.node_id).uniform(0, 4, 100)
        counts = np.histogram(values, 4, (0, 4))[0].astype(float)
        arrays = {"histogram": Array(counts), "sum": Array(np.array(values.sum())), "count": Array(np.array(100.0))}
        return Message(RecordDict({"arrays": ArrayRecord(arrays)}), reply_to=message)

    return app


def truth(nodes: list[int]) -> tuple[np.ndarray, float]:
    values = np.concatenate([np.random.default_rng(node).uniform(0, 4, 100) for node in nodes])
    return np.histogram(values, 4, (0, 4))[0], float(values.sum())


STAGES: list[Any] = [
    PlainStage(),
    SecureStage(SecAgg(threshold=3), max_value=1000),
    GroupedStage(SecAgg(threshold=2), 3, max_value=1000),
]


@pytest.mark.parametrize("stage", STAGES, ids=["plain", "secure", "grouped"])
@pytest.mark.parametrize("broken", [None, 4])
def test_sums_are_those_of_the_nodes_that_answered(stage: Any, broken: int | None) -> None:
    grid = LocalGrid(app_of(broken, masked=not isinstance(stage, PlainStage)), 8)
    answer = FedAnalytics(stage=stage).query(grid, SHAPES, {"bins": 4}, action="histogram")
    counts, total = truth([node for node in range(1, 9) if node != broken])
    assert answer.nodes == (8 if broken is None else 7)
    np.testing.assert_allclose(answer.totals["histogram"], counts, atol=1e-6)
    assert answer.totals["count"].shape == ()
    assert float(answer.totals["count"]) == pytest.approx(100 * answer.nodes, abs=1e-6)
    assert float(answer.totals["sum"]) == pytest.approx(total, abs=1e-4)
    assert sorted(answer.excluded) == ([] if broken is None else [4])


def test_too_few_answers_fail() -> None:
    with pytest.raises(QuorumError, match="ValueError"):
        FedAnalytics(min_nodes=3).query(LocalGrid(app_of(2, masked=False), 3), SHAPES, {"bins": 4}, action="histogram")
    with pytest.raises(QuorumError, match="AppError"):
        FedAnalytics().query(LocalGrid(app_of(masked=False), 3), SHAPES)
    with pytest.raises(ValueError, match="min_nodes"):
        FedAnalytics(min_nodes=1)


def test_a_sum_that_is_no_number_is_refused() -> None:
    app = ClientApp()

    @app.query()
    def answer(message: Message, context: Context) -> Message:
        return Message(RecordDict({"arrays": ArrayRecord({"count": Array(np.array(1.7e308))})}), reply_to=message)

    with pytest.raises(RunFailed, match="leaves the range of float64"):
        FedAnalytics().query(LocalGrid(app, 2), {"count": ()})
