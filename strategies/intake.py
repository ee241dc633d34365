"""The intake of a stage: every reply is read once and either counts or is excluded with its node and cause."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from privfed.message import Message
from privfed.record import RecordDict
from privfed.strategies.diagnostic import describe_metrics
from privfed.strategies.exchange import Exchange
from privfed.strategies.metric import metrics_of
from privfed.strategies.reply import BadReply, Reply, read_evaluate, read_train
from privfed.strategies.view import Exclusion, Outcome, Sum, Unreleased, Updates


class Intake:
    """Read the replies of an exchange in the order of its nodes. spoiled: how many held what cannot be used."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._metrics: list[RecordDict] = []
        self._rejected = False
        self.spoiled = 0
        size = exchange.content.count_bytes()
        self.outcome = Outcome(bytes_down=size * len(exchange.nodes))

    def train(self) -> Iterator[Reply]:
        """Yield valid training replies; `reject` during the loop's body excludes the one at hand."""
        exchange = self._exchange

        def read(node: int, message: Message) -> Reply:
            reply = read_train(node, message, exchange.model, exchange.arrays_key, exchange.weight_key)
            cause = exchange.objection(metrics_of(reply.metrics)) if exchange.objection is not None else None
            if cause is not None:
                raise BadReply(cause)
            return reply

        return self._read(read)

    def evaluate(self) -> Iterator[Reply]:
        """Yield valid evaluation replies."""
        return self._read(lambda node, m: read_evaluate(node, m, self._exchange.weight_key))

    def reject(self, node: int, cause: str) -> None:
        """Exclude the reply that was yielded last."""
        self._rejected = True
        self.spoiled += 1
        self.outcome.excluded.append(Exclusion(node, cause))

    def void(self, cause: str) -> None:
        """Let no reply of the exchange count."""
        self.outcome.excluded.append(Exclusion(0, cause))
        self.outcome.valid = 0
        self._metrics.clear()

    def finish(self, view: Sum | Updates | Unreleased | None) -> Outcome:
        """Return the outcome."""
        self.outcome.view = view
        if self._exchange.clip is not None:  # nothing reads the nodes' metrics under a plan
            return self.outcome
        self.outcome.metrics = self._exchange.aggregate(self._metrics)
        spread = describe_metrics(self._metrics, self._exchange.weight_key)
        if spread:
            self.outcome.notes["metric-spread"] = spread
        return self.outcome

    def _read(self, read: Callable[[int, Message], Reply]) -> Iterator[Reply]:
        silent, missing = set(self._exchange.nodes), "no reply before the deadline"
        for node, message in self._exchange.replies():
            silent.discard(node)
            if message.has_content():
                self.outcome.bytes_up += message.content.count_bytes()
            try:
                reply = read(node, message)
            except BadReply as cause:
                self.spoiled += message.has_content()  # an error, or silence, is no proof of anything
                self.outcome.excluded.append(Exclusion(node, str(cause)))
                continue
            self._rejected = False
            yield reply
            if not self._rejected:
                self.outcome.valid += 1
                self._metrics.append(reply.metrics)
                if self.outcome.valid == self._exchange.enough:
                    missing = "not awaited: enough others had answered"
                    break
        for node in sorted(silent):
            self.outcome.excluded.append(Exclusion(node, missing))
