"""Apps under the mod that masks, and a grid whose nodes vanish at a stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from privfed import mods
from privfed.apps import ClientApp
from privfed.array import Array
from privfed.grid import LocalGrid
from privfed.message import Message
from privfed.protocols import LightSecAgg, SecAgg, SecAggPlus
from privfed.record import ArrayRecord, MetricRecord, RecordDict
from privfed.ring import SECURE
from proofs_tests.strategies.toy import Toy

Train = Callable[[Message, int], RecordDict]
MODEL = ArrayRecord(
    {"w": Array(np.zeros((2, 3), np.float32)), "scalar": Array(np.array(0.5)), "empty": Array(np.zeros(0))}
)


def good(message: Message, node: int) -> RecordDict:
    moved = message.content.array_records["arrays"].map(lambda values: values + values.dtype.type(node / 16))
    metrics = MetricRecord({"num-examples": node, "loss": 1 / node, "accuracy": 0.25})
    return RecordDict({"arrays": moved, "metrics": metrics})


def app_of(train: Train = good, **arguments: Any) -> ClientApp:
    arguments.setdefault(
        "protocols", {"Toy": Toy, "SecAgg": SecAgg, "SecAggPlus": SecAggPlus, "LightSecAgg": LightSecAgg}
    )
    app = ClientApp(mods=[mods.secure_aggregation(**arguments)])
    app.train()(lambda message, context: Message(train(message, context.node_id), reply_to=message))
    app.evaluate()(lambda message, context: Message(train(message, context.node_id), reply_to=message))
    app.query()(lambda message, context: Message(train(message, context.node_id), reply_to=message))
    return app


class FlakyGrid(LocalGrid):
    """Nodes vanish: `vanish[node]` is the stage from which on it is gone. Requests are kept."""

    def __init__(self, app: ClientApp, nodes: int, vanish: dict[int, int] | None = None, **arguments: Any) -> None:
        super().__init__(app, nodes, **arguments)
        self.vanish = vanish or {}
        self.sent: list[Message] = []

    def push_messages(self, messages: Any) -> list[str]:
        batch = list(messages)
        self.sent += batch
        there = []
        for message in batch:
            stage = message.content.config_records[SECURE]["stage"]
            if stage < self.vanish.get(message.metadata.dst_node_id, 99):
                there.append(message)
        super().push_messages(there)
        return [message.metadata.message_id for message in batch]


def expected(nodes: list[int]) -> float:
    return sum(node * node / 16 for node in nodes) / sum(nodes)


def check_model(arrays: ArrayRecord, nodes: list[int]) -> None:
    np.testing.assert_allclose(arrays["w"].view(), np.full((2, 3), expected(nodes)), atol=2e-3)
    assert arrays["scalar"].shape == ()
    assert float(arrays["scalar"].view()) == pytest.approx(0.5 + expected(nodes), abs=2e-3)
    assert arrays["empty"].shape == (0,)


def plain_app() -> ClientApp:
    app = ClientApp()
    app.train()(lambda message, context: Message(good(message, context.node_id), reply_to=message))
    return app
