"""Federated gradient-boosted trees over real XGBoost models, which travel as the bytes of their JSON form.

The model is an ArrayRecord of one uint8 array, empty before the first round: `ArrayRecord([np.zeros(0, np.uint8)])`.
A node that gets an empty one trains from nothing, and any other one loads it and boosts further. The server needs no
XGBoost: it reads, checks and joins the documents, and never trusts one.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from privfed.array import Array
from privfed.errors import RunFailed
from privfed.message import Message
from privfed.record import ArrayRecord, ConfigRecord, RecordDict
from privfed.strategies import forest
from privfed.strategies.cohort import cohort_size, draw_cohort, wait_for_nodes
from privfed.strategies.exchange import Exchange, stream_replies
from privfed.strategies.forest import Forest, ForestError
from privfed.strategies.reply import BadReply, content_of, read_metrics, read_weight
from privfed.strategies.strategy import Strategy
from privfed.strategies.view import Exclusion, Outcome, Updates, View
from privfed.update import UpdateError, arrays_of

if TYPE_CHECKING:
    from privfed.strategies.strategy import _Run

STATE = "fedxgb"


class _Boosting(Strategy):
    """What the two have in common: documents instead of arrays of known shape, so no stage but PlainStage will do."""

    needs: ClassVar[type[View]] = Updates
    unbounded: ClassVar[str] = "trees are documents, which cannot be clipped and noised as a vector"

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        if Updates not in self.stage.offers:
            raise ValueError(f"stage: {type(self).__name__} joins trees, which have no sum, and {self.stage!r} hides")

    def _ask(self, exchange: Exchange, outcome: Outcome) -> dict[int, tuple[Forest, RecordDict]]:
        """Send the instructions; return each node's forest and metrics, by node."""
        found: dict[int, tuple[Forest, RecordDict]] = {}
        silent, missing = set(exchange.nodes), "no reply before the deadline"
        outcome.bytes_down += exchange.content.count_bytes() * len(exchange.nodes)
        replies = stream_replies(exchange.grid, exchange.messages(), timeout=exchange.remaining, window=1024)
        for node, message in replies:
            silent.discard(node)
            try:
                found[node] = self._read(message, exchange, outcome)
            except (BadReply, ForestError, UpdateError) as cause:
                outcome.excluded.append(Exclusion(node, str(cause)))
            if len(found) == exchange.enough:
                missing = "not awaited: enough others had answered"
                break
        outcome.excluded += [Exclusion(node, missing) for node in sorted(silent)]
        return dict(sorted(found.items()))

    def _read(self, message: Message, exchange: Exchange, outcome: Outcome) -> tuple[Forest, RecordDict]:
        content = content_of(message)
        outcome.bytes_up += content.count_bytes()
        metrics = read_metrics(content)
        read_weight(metrics, exchange.weight_key)
        return _forest(arrays_of(content, exchange.arrays_key)), RecordDict({"metrics": metrics})

    def _instruction(self, run: _Run, server_round: int) -> RecordDict:
        config = ConfigRecord({**run.train_config, "server-round": server_round})
        return self.configure(server_round, run.arrays, config)

    def _current(self, run: _Run, server_round: int) -> Forest | None:
        array = next(iter(run.arrays.values()))
        if not array.nbytes and len(run.arrays) == 1:
            return None
        try:
            return _forest(run.arrays)
        except ForestError as cause:
            raise RunFailed(f"round {server_round}: the model on the server: {cause}") from cause


class FedXgbBagging(_Boosting):
    """Every node of the cohort boosts the model by trees of its own; the model grows by all of them.

    Nodes reply with their new trees alone: `booster[old_rounds:].save_raw("json")`. They must share objective and
    parameters, an explicit `base_score` above all; those that differ from the majority are excluded. average_trees:
    divide leaf values by the number of nodes, so that a round steps as far as one node does; False adds them up, and
    nodes should divide their learning rate themselves.
    """

    def __init__(self, *, average_trees: bool = True, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.average_trees = average_trees

    def _train(self, run: _Run, server_round: int, metrics: dict[str, object]) -> ArrayRecord:
        model = self._current(run, server_round)
        nodes = wait_for_nodes(run.grid, self.min_available_nodes, run.timeout)
        size = cohort_size(len(nodes), self.fraction_train, self.min_train_nodes)
        cohort = draw_cohort(run.grid, nodes, self.pace.asked(size, len(nodes)), "train", server_round)
        exchange = self._exchange(run, server_round, "train", self._instruction(run, server_round), cohort)
        exchange = self.pace.applied(exchange, size)
        outcome = Outcome()
        found = self._ask(exchange, outcome)
        kind = model.kind if model is not None else _commonest(found)
        for node in [node for node, (trees, _) in found.items() if trees.kind != kind]:
            outcome.excluded.append(Exclusion(node, "objective, base score, or numbers of features or classes differ"))
            del found[node]
        outcome.valid = len(found)
        outcome.metrics = exchange.aggregate([metrics for _, metrics in found.values()])
        outcome.notes["trees"] = sum(len(trees.trees) for trees, _ in found.values())
        self._judge(exchange, outcome, self.pace.quorum(size, self.min_train_nodes), metrics)
        for trees, _ in found.values():
            grown = trees.scaled(1 / len(found)) if self.average_trees else trees
            model = grown if model is None else model.joined(grown)
        return run.arrays if model is None else _record(run.arrays, model)


class FedXgbCyclic(_Boosting):
    """One node a round boosts the model, in the order of node ids, and hands it on.

    It replies with the entire model, whose old trees must be unchanged. When it fails, the next one in the cycle is
    asked, within the round's time; the round fails when all have.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._turn = 0

    def save(self) -> RecordDict:
        """Return the node whose turn was last."""
        return RecordDict({STATE: ConfigRecord({"turn": self._turn})})

    def load(self, state: RecordDict) -> None:
        """Take up the turn."""
        record = state.config_records.get(STATE)
        self._turn = int(str(record["turn"])) if record is not None else 0

    def _train(self, run: _Run, server_round: int, metrics: dict[str, object]) -> ArrayRecord:
        model = self._current(run, server_round)
        content = self._instruction(run, server_round)
        nodes = sorted(wait_for_nodes(run.grid, self.min_available_nodes, run.timeout))
        order = [node for node in nodes if node > self._turn] + [node for node in nodes if node <= self._turn]
        outcome, asked, limit = Outcome(), [], self.pace.deadline or run.timeout
        deadline = time.monotonic() + min(limit, run.timeout)
        grown: Forest | None = None
        for node in order:
            asked.append(node)
            exchange = self._exchange(run, server_round, "train", content, (node,))
            exchange = replace(exchange, deadline=deadline)
            grown = self._accept(self._ask(exchange, outcome), model, node, outcome, exchange)
            if grown is not None or time.monotonic() >= deadline:
                break
        whole = self._exchange(run, server_round, "train", content, tuple(asked))
        self._judge(whole, outcome, 1, metrics)
        self._turn = asked[-1]
        return run.arrays if grown is None else _record(run.arrays, grown)

    def _accept(
        self,
        found: dict[int, tuple[Forest, RecordDict]],
        model: Forest | None,
        node: int,
        outcome: Outcome,
        exchange: Exchange,
    ) -> Forest | None:
        if node not in found:
            return None
        grown, metrics = found[node]
        if model is not None and not grown.extends(model):
            outcome.excluded.append(Exclusion(node, "it changed trees that are not its own"))
            return None
        outcome.valid = 1
        outcome.metrics = exchange.aggregate([metrics])
        outcome.notes["trees"] = len(grown.trees) - (len(model.trees) if model is not None else 0)
        return grown


def _commonest(found: dict[int, tuple[Forest, RecordDict]]) -> tuple[str, str]:
    """Return the kind of most forests; of equally frequent ones, that of the lowest node."""
    counts = Counter(trees.kind for trees, _ in found.values())
    return counts.most_common(1)[0][0] if counts else ("", "")


def _forest(record: ArrayRecord) -> Forest:
    arrays = list(record.values())
    if len(arrays) != 1 or arrays[0].dtype != "uint8":
        raise ForestError("a boosted model is one uint8 array that holds its JSON form")
    return forest.read(arrays[0].view().reshape(-1))


def _record(template: ArrayRecord, model: Forest) -> ArrayRecord:
    return ArrayRecord({next(iter(template)): Array(np.asarray(model.write()))})
