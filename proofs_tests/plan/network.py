"""Apps and grids for runs under distributed noise: nodes that vanish, and a record of what was sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from privfed import mods
from privfed.apps import ClientApp, Mod
from privfed.array import Array
from privfed.context import Context
from privfed.grid import LocalGrid
from privfed.message import Message
from privfed.record import ArrayRecord, MetricRecord, RecordDict
from privfed.ring import SECURE

NONE = {"fraction_evaluate": 0.0}


def model(size: int, dtype: str = "float64") -> ArrayRecord:
    return ArrayRecord({"w": Array(np.zeros(size - 1, dtype)), "b": Array(np.zeros((), dtype))})


def flat(arrays: ArrayRecord) -> np.ndarray:
    return np.concatenate([array.numpy().reshape(-1) for array in arrays.values()])


def update_of(node: int, size: int, length: float) -> np.ndarray:
    """A node's update: another direction for each, of that length."""
    values = np.random.default_rng(node).normal(size=size)
    return np.asarray(values * (length / np.linalg.norm(values)))


def app_of(
    length: float | Callable[[int], float] = 1.0, inner: list[Mod] | None = None, outer: Mod | None = None
) -> ClientApp:
    """Nodes whose updates are `update_of`, of that length or the node's; they report what must not leave."""
    chain = inner if inner is not None else [mods.distributed_dp()]
    app = ClientApp(mods=[outer if outer is not None else mods.secure_aggregation(), *chain])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        received = message.content.array_records["arrays"]
        size = sum(array.numpy().size for array in received.values())
        change = update_of(context.node_id, size, length(context.node_id) if callable(length) else length)
        old_w, old_b = received["w"].numpy(), received["b"].numpy()
        moved = ArrayRecord(
            {
                "w": Array((old_w + change[:-1]).astype(old_w.dtype)),
                "b": Array(np.array(old_b + change[-1]).astype(old_b.dtype)),
            }
        )
        metrics = MetricRecord({"num-examples": 10**6 * context.node_id, "loss": 0.123})
        return Message(RecordDict({"arrays": moved, "metrics": metrics}), reply_to=message)

    return app


class Network(LocalGrid):
    """`vanish[node]`: the stage from which on the node does not answer. `dies`: the stage at which the server does."""

    def __init__(
        self,
        app: ClientApp,
        nodes: int | dict[int, Context],
        vanish: dict[int, int] | None = None,
        dies: int = 99,
        **arguments: Any,
    ) -> None:
        super().__init__(app, nodes, **arguments)
        self.vanish, self.dies = vanish or {}, dies
        self.stages: list[int] = []
        self.replies: list[Message] = []

    def push_messages(self, messages: Any) -> list[str]:
        batch, there = list(messages), []
        for message in batch:
            stage = int(str(message.content.config_records[SECURE]["stage"]))
            if stage >= self.dies:
                raise KeyboardInterrupt
            self.stages.append(stage)
            if stage < self.vanish.get(message.metadata.dst_node_id, 99):
                there.append(message)
        super().push_messages(there)
        return [message.metadata.message_id for message in batch]

    def pull_messages(self, message_ids: Any) -> list[Message]:
        replies = super().pull_messages(message_ids)
        self.replies += replies
        return replies
