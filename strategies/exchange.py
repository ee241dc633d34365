"""One exchange: the instructions of a round, and everything a stage must know to bring back what they yield."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from privfed.grid import Grid
from privfed.message import Message
from privfed.record import ArrayRecord, MetricRecord, RecordDict
from privfed.strategies.metric import MetricsFunction
from privfed.strategies.view import Sum, View

if TYPE_CHECKING:
    from privfed.privacy.distributed import NoiseParameters

MESSAGE_BUDGET = 64 << 20
"""Bytes of replies that may be in flight at once when a round is streamed."""


def stream_replies(
    grid: Grid, messages: Iterable[Message], *, timeout: float, window: int, ordered: bool = False
) -> Iterator[tuple[int, Message]]:
    """Yield each reply with the node that was asked, whoever the reply says it is from."""
    asked: dict[str, int] = {}

    def noted() -> Iterator[Message]:
        for message in messages:
            asked[message.metadata.message_id] = message.metadata.dst_node_id
            yield message

    for reply in grid.stream(noted(), timeout=timeout, window=window, ordered=ordered):
        yield asked.pop(reply.metadata.reply_to_message_id), reply


@dataclass(frozen=True, slots=True)
class SharedNoise:
    """A round whose noise the nodes add. charge: pays for the sum, known by a hash of its session; it may refuse.

    Whoever drives the session calls it before the stage that opens the sum. seed: rotates the vectors; public. removed:
    node -> level of drops and keys of the parts of its noise that it gave away for it.
    """

    parameters: NoiseParameters
    seed: bytes
    denominator: float
    charge: Callable[[bytes], None] = field(repr=False)
    removed: dict[int, tuple[int, tuple[bytes, ...]]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Exchange:
    """content: the same object for every node, sent once. deadline: time.monotonic() seconds. need: the view to bring.

    enough: replies that count after which no more are awaited; None: all are.
    weight_key None: every reply weighs 1 (a privacy plan). clip: the plan's bound on one update's L2 norm, or None.
    noise: None unless the nodes add it. objection: says what is wrong with a training reply's metrics, or None.
    """

    grid: Grid
    round: int
    kind: str
    content: RecordDict
    nodes: tuple[int, ...]
    deadline: float
    model: ArrayRecord
    arrays_key: str
    weight_key: str | None
    metrics_function: MetricsFunction
    need: type[View] = Sum
    clip: float | None = None
    noise: SharedNoise | None = None
    content_for: Callable[[int], RecordDict] | None = field(default=None, repr=False)
    enough: int | None = None
    objection: Callable[[MetricRecord], str | None] | None = field(default=None, repr=False)

    @property
    def remaining(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self.deadline - time.monotonic())

    def messages(self) -> Iterator[Message]:
        """Yield one instruction per node, ascending; equal contents are one object."""
        ttl = max(self.remaining, 0.001)
        group = str(self.round)
        for node in self.nodes:
            content = self.content if self.content_for is None else self.content_for(node)
            yield Message(content, node, self.kind, ttl=ttl, group_id=group)

    def replies(self) -> Iterator[tuple[int, Message]]:
        """Send the instructions; yield node and reply, a bounded number at a time.

        In the order of the nodes; in that of arrival when `enough` is given.
        """
        size = max(1, self.model.count_bytes())
        window = min(1024, max(4, MESSAGE_BUDGET // size))
        return stream_replies(
            self.grid, self.messages(), timeout=self.remaining, window=window, ordered=self.enough is None
        )

    def aggregate(self, contents: list[RecordDict]) -> MetricRecord:
        """Aggregate the metrics of valid replies."""
        return self.metrics_function(contents, self.weight_key or "") if contents else MetricRecord()
