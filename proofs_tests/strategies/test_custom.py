"""A strategy of one's own: what it sees, what is refused, and what it may tell each node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from privfed.apps import ClientApp
from privfed.context import Context
from privfed.grid import LocalGrid
from privfed.message import Message
from privfed.record import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from privfed.strategies import FedAvg, PlainStage, Sum, Updates
from privfed.strategies.strategy import Strategy

Reply = Callable[[Message, int], RecordDict]


def app_of(reply: Reply) -> ClientApp:
    """Answer train and evaluate with `reply(message, node)`."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(reply(message, context.node_id), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return Message(reply(message, context.node_id), reply_to=message)

    return app


def content(arrays: ArrayRecord) -> RecordDict:
    return RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})


class Largest(Strategy):
    """A custom strategy that needs to see every update."""

    needs = Updates

    def update(self, server_round: int, arrays: ArrayRecord, view: Any) -> ArrayRecord:
        assert isinstance(view, Updates)
        return ArrayRecord([view.rows.max(axis=0).astype(np.float64)])


class Apart(FedAvg):
    """Tells every node something else."""

    def configure_node(self, server_round: int, node: int, content: RecordDict) -> RecordDict:
        made = RecordDict(dict(content))
        made["own"] = ConfigRecord({"node": node})
        return made


class SumOnly(PlainStage):
    offers = frozenset({Sum})
    per_node = False


def test_a_custom_strategy_sees_rows_in_the_order_of_the_nodes() -> None:
    def reply(message: Message, node: int) -> RecordDict:
        return content(ArrayRecord([np.array([node, -node], np.float64)]))

    result = Largest(fraction_evaluate=0).start(LocalGrid(app_of(reply), 3), ArrayRecord([np.zeros(2)]), 1)
    assert result.arrays == ArrayRecord([np.array([3.0, -1.0])])


def test_a_stage_that_cannot_give_what_is_needed_is_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="Largest needs Updates"):
        Largest(stage=SumOnly())
    with pytest.raises(ValueError, match="configures nodes apart"):
        Apart(stage=SumOnly())


def test_nodes_may_be_configured_apart_in_the_clear() -> None:
    seen = []

    def reply(message: Message, node: int) -> RecordDict:
        seen.append((node, message.content["own"]["node"]))
        return content(ArrayRecord([np.zeros(1)]))

    Apart(fraction_evaluate=0).start(LocalGrid(app_of(reply), 3), ArrayRecord([np.zeros(1)]), 1)
    assert seen == [(1, 1), (2, 2), (3, 3)]
