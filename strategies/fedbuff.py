"""FedBuff: nodes train without waiting for each other, and the server moves whenever its buffer is full [NMR+22].

A node always trains on the newest model there is when it is asked. When K updates have come in, the model moves by

    server_learning_rate * sum(w_i s(t_i) D_i) / sum(w_i),        s(t) = (1 + t)^(-staleness_exponent),

where t_i is how many times the model has moved since node i got it. Equal weights and exponent 1/2 are the paper's.
"""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from privfed.context import derived_rng
from privfed.grid import Grid
from privfed.message import Message
from privfed.record import ArrayRecord, ConfigRecord, RecordDict
from privfed.strategies.cohort import wait_for_nodes
from privfed.strategies.exchange import Exchange
from privfed.strategies.fold import MeanFold
from privfed.strategies.guard import count
from privfed.strategies.pace import Pace
from privfed.strategies.reply import BadReply, Reply, read_train
from privfed.strategies.strategy import EvaluateFunction, Strategy, add_update
from privfed.strategies.view import Exclusion, Outcome, Sum, Updates, View
from privfed.update import UpdateError, dimension, subtract

if TYPE_CHECKING:
    from privfed.strategies.result import Result
    from privfed.strategies.strategy import _Run

STATE = "fedbuff"


@dataclass(frozen=True, slots=True)
class _Sent:
    """An instruction that is out: its number, its node, the model it carries and when to give it up."""

    number: int
    node: int
    version: int
    model: ArrayRecord
    expires: float


class FedBuff(Strategy):
    """Keep `concurrency` nodes training and move the model after every `buffer_size` updates; a round is one move.

    staleness_exponent: how fast old updates lose weight, >= 0. max_staleness: older ones are excluded; None: none are.
    reply_timeout: seconds after which a node is given up and another one asked; None: the timeout of `start`.
    A node that fails is not asked again in that round; when all have, the round fails. Nodes are drawn from the grid's
    seed, so that a run depends on the order of arrivals alone. Towards the end no more nodes are asked than the last
    rounds need, so that none trains in vain. A resumed run starts with no node training.

    Every update is seen, and no sensitivity is stated: PlainStage only, and no privacy plan.
    """

    needs: ClassVar[type[View]] = Updates
    unbounded: ClassVar[str] = (
        "a node may be in one buffer several times, and an update's weight depends on how late the others are"
    )

    def __init__(
        self,
        *,
        buffer_size: int = 10,
        concurrency: int = 20,
        server_learning_rate: float = 1.0,
        staleness_exponent: float = 0.5,
        max_staleness: int | None = None,
        reply_timeout: float | None = None,
        **arguments: Any,
    ) -> None:
        for name, number in (("buffer_size", buffer_size), ("concurrency", concurrency)):
            count(number, name, 1)
        if not (math.isfinite(server_learning_rate) and server_learning_rate > 0):
            raise ValueError(f"server_learning_rate must be finite and > 0, got {server_learning_rate}")
        if not (math.isfinite(staleness_exponent) and staleness_exponent >= 0):
            raise ValueError(f"staleness_exponent must be finite and >= 0, got {staleness_exponent}")
        if max_staleness is not None:
            count(max_staleness, "max_staleness (or None)")
        if reply_timeout is not None and not reply_timeout > 0:
            raise ValueError(f"reply_timeout must be > 0 seconds or None, got {reply_timeout}")
        super().__init__(**arguments)
        if self.pace != Pace():
            raise ValueError("pace: FedBuff has no rounds to close; use concurrency and reply_timeout")
        if Updates not in self.stage.offers:
            raise ValueError(
                f"stage: FedBuff takes updates one by one as they come, which {self.stage!r} hides; use FedAvg"
            )
        self.buffer_size = buffer_size
        self.concurrency = concurrency
        self.server_learning_rate = server_learning_rate
        self.staleness_exponent = staleness_exponent
        self.max_staleness = max_staleness
        self.reply_timeout = reply_timeout
        self._out: dict[str, _Sent] = {}
        self._ready: deque[tuple[_Sent, Message]] = deque()
        self._number = 0
        self._last = 0

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFunction | None = None,
    ) -> Result:
        """Run as `Strategy.start` does; num_rounds: moves of the model. Nothing is left outstanding at the end."""
        self._last = num_rounds
        self._out = {}
        self._ready.clear()
        try:
            return super().start(grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn)
        finally:
            grid.forget(list(self._out))
            self._out = {}

    def save(self) -> RecordDict:
        """Return how many instructions were sent, so that a resumed run draws other nodes next."""
        return RecordDict({STATE: ConfigRecord({"sent": self._number})})

    def load(self, state: RecordDict) -> None:
        """Take up the number of instructions."""
        record = state.config_records.get(STATE)
        self._number = int(str(record["sent"])) if record is not None else 0

    def update(self, server_round: int, arrays: ArrayRecord, view: View) -> ArrayRecord:
        """Add the buffer's mean."""
        if not isinstance(view, Sum):
            raise TypeError(f"FedBuff folds updates as they come, got {type(view).__name__}")
        return add_update(arrays, self.server_learning_rate * view.mean)

    def _train(self, run: _Run, server_round: int, metrics: dict[str, object]) -> ArrayRecord:
        buffer = _Buffer(self, run, server_round)
        deadline = time.monotonic() + run.timeout
        while True:
            while self._ready and buffer.outcome.valid < self.buffer_size:
                buffer.take(*self._ready.popleft())
            if buffer.outcome.valid == self.buffer_size or time.monotonic() >= deadline:
                break
            self._dispatch(run, server_round, buffer, deadline)
            if not self._out:  # every node there is has failed in this round
                break
            first = min(sent.expires for sent in self._out.values())
            if run.grid.wait(list(self._out), max(0.0, min(first, deadline) - time.monotonic())):
                arrived = run.grid.pull_messages(list(self._out))
                # What one pull brings has no order of arrival: take it in the order it was sent.
                pairs = [(self._out.pop(reply.metadata.reply_to_message_id), reply) for reply in arrived]
                self._ready.extend(sorted(pairs, key=lambda pair: pair[0].number))
            self._expire(run, buffer)
        exchange = self._exchange(run, server_round, "train", RecordDict(), tuple(sorted(buffer.nodes)))
        view = buffer.finish(exchange)
        self._judge(exchange, buffer.outcome, self.buffer_size, metrics)
        return self._applied(run, server_round, view)

    def _dispatch(self, run: _Run, server_round: int, buffer: _Buffer, deadline: float) -> None:
        """Ask idle nodes until `concurrency` train, or what is left to do is being done."""
        nodes = wait_for_nodes(run.grid, self.min_available_nodes, max(0.001, deadline - time.monotonic()))
        busy = {sent.node for sent in self._out.values()}
        idle = sorted(set(nodes) - busy - buffer.failed)
        left = (self._last - server_round + 1) * self.buffer_size - buffer.outcome.valid
        room = min(self.concurrency, left - len(self._ready)) - len(self._out)
        if room <= 0 or not idle:
            return
        config = ConfigRecord({**run.train_config, "server-round": server_round})
        content = self.configure(server_round, run.arrays, config)
        expires = min(deadline, time.monotonic() + (self.reply_timeout or run.timeout))
        messages = []
        for _ in range(min(room, len(idle))):
            node = idle.pop(int(derived_rng(run.grid.seed, "buffered", self._number).integers(len(idle))))
            own = self.configure_node(server_round, node, content)
            message = Message(
                own, node, "train", ttl=max(0.001, expires - time.monotonic()), group_id=str(server_round)
            )
            self._out[message.metadata.message_id] = _Sent(self._number, node, server_round, run.arrays, expires)
            self._number += 1
            messages.append(message)
            buffer.outcome.bytes_down += own.count_bytes()
        run.grid.push_messages(messages)

    def _expire(self, run: _Run, buffer: _Buffer) -> None:
        now = time.monotonic()
        late = {message_id: sent for message_id, sent in self._out.items() if sent.expires <= now}
        if not late:
            return
        run.grid.forget(list(late))
        for message_id, sent in late.items():
            del self._out[message_id]
            buffer.exclude(sent.node, "no reply in time")


class _Buffer:
    """The updates of one move."""

    def __init__(self, strategy: FedBuff, run: _Run, server_round: int) -> None:
        self._strategy = strategy
        self._round = server_round
        self._fold = MeanFold(run.arrays)
        self._weight = 0.0
        self._metrics: list[RecordDict] = []
        self._staleness: list[int] = []
        self.nodes: list[int] = []  # one entry a reply
        self.failed: set[int] = set()
        self.outcome = Outcome()

    def take(self, sent: _Sent, message: Message) -> None:
        """Fold a reply in, or exclude its node."""
        strategy, staleness = self._strategy, self._round - sent.version
        if message.has_content():
            self.outcome.bytes_up += message.content.count_bytes()
        try:
            reply = read_train(sent.node, message, sent.model, strategy.arrayrecord_key, strategy.weighted_by_key)
            if strategy.max_staleness is not None and staleness > strategy.max_staleness:
                raise BadReply(f"its model is {staleness} moves old, max_staleness is {strategy.max_staleness}")
            update = self._update(reply, sent.model)
        except (BadReply, UpdateError) as cause:
            self.exclude(sent.node, str(cause))
            return
        self._fold.add(update, reply.weight * (1 + staleness) ** -strategy.staleness_exponent, update=True)
        self._weight += reply.weight
        self._staleness.append(staleness)
        self._metrics.append(reply.metrics)
        self.outcome.valid += 1
        self.nodes.append(sent.node)

    def exclude(self, node: int, cause: str) -> None:
        """Note a node whose update does not count."""
        self.nodes.append(node)
        self.failed.add(node)
        self.outcome.excluded.append(Exclusion(node, cause))

    def finish(self, exchange: Exchange) -> Sum:
        """Return the staleness-weighted mean, or no valid update when all weights are 0."""
        self.outcome.metrics = exchange.aggregate(self._metrics)
        if self._staleness:
            self.outcome.notes["staleness"] = {
                "mean": sum(self._staleness) / len(self._staleness),
                "largest": max(self._staleness),
            }
        if self._weight <= 0:
            self.outcome.valid = 0
            self.exclude(0, "all weights are 0")
            return Sum(np.zeros(dimension(exchange.model)), 0.0)
        self._fold.weight = self._weight  # old updates count for less, and nothing makes up for it
        return self._fold.finish()

    @staticmethod
    def _update(reply: Reply, model: ArrayRecord) -> ArrayRecord:
        return reply.arrays if reply.update else subtract(reply.arrays, model)
