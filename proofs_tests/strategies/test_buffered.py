"""FedBuff: the paper's step whatever the order of arrivals, bounded waits, and nothing outstanding at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed import run_simulation
from privfed.apps import ClientApp, ServerApp
from privfed.context import Context
from privfed.errors import PlanRefused, QuorumError
from privfed.grid import Grid, LocalGrid, MemoryRecorder
from privfed.message import Message
from privfed.plan import PrivacyPlan
from privfed.protocols import SecAgg
from privfed.record import ArrayRecord, MetricRecord, RecordDict
from privfed.strategies import FedBuff, GroupedStage


def app_of(value: Callable[[int, np.ndarray], np.ndarray], weight: Callable[[int], int] = lambda node: 1) -> ClientApp:
    """Node k replies value(k, received)."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        received = message.content.array_records["arrays"]["0"].numpy()
        metrics = MetricRecord({"num-examples": weight(context.node_id), "node": context.node_id})
        arrays = ArrayRecord([np.asarray(value(context.node_id, received))])
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return app


class LateGrid(LocalGrid):
    """Deliver replies one at a time, in an order drawn from `rng`; nodes in `silent` never answer."""

    def __init__(self, app: ClientApp, nodes: int, seed: int, silent: Iterable[int] = (), **arguments: Any) -> None:
        super().__init__(app, nodes, seed=seed, **arguments)
        self.rng = np.random.default_rng(seed)
        self.silent = set(silent)
        self.pushed: list[Message] = []
        self.out: dict[str, int] = {}
        self.most = 0
        self.forgotten: list[str] = []

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        batch = list(messages)
        self.pushed += batch
        ids = super().push_messages(batch)
        self.out.update({message.metadata.message_id: message.metadata.dst_node_id for message in batch})
        self.most = max(self.most, len(self.out))
        assert len(set(self.out.values())) == len(self.out)  # no node is asked while it trains
        return ids

    def _deliverable(self, message_ids: Iterable[str]) -> list[str]:
        return [one for one in message_ids if one in self.out and self.out[one] not in self.silent]

    def wait(self, message_ids: Iterable[str], timeout: float | None) -> bool:
        if self._deliverable(message_ids):
            return True
        time.sleep(min(timeout or 0.0, 0.05))
        return False

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        ready = self._deliverable(message_ids)
        one = ready[int(self.rng.integers(len(ready)))]
        del self.out[one]
        return super().pull_messages([one])

    def forget(self, message_ids: Iterable[str]) -> None:
        ids = list(message_ids)
        self.forgotten += ids
        for one in ids:
            self.out.pop(one, None)


def model() -> ArrayRecord:
    return ArrayRecord([np.zeros(2)])


def drift(node: int, received: np.ndarray) -> np.ndarray:
    return np.asarray(received * 0.5 + node)


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 9), st.integers(2, 9), st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=30, deadline=None)
def test_every_move_is_the_papers_whatever_arrives_when(
    seed: int, size: int, concurrency: int, nodes: int, exponent: float
) -> None:
    arrived: list[tuple[int, int]] = []

    class Watched(LateGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            (reply,) = super().pull_messages(message_ids)
            sent = {one.metadata.message_id: one for one in self.pushed}[reply.metadata.reply_to_message_id]
            node = sent.metadata.dst_node_id
            arrived.append((node, int(str(sent.content["config"]["server-round"]))))
            return [reply]

    grid = Watched(app_of(drift, lambda node: node), nodes, seed)
    strategy = FedBuff(
        buffer_size=size,
        concurrency=concurrency,
        staleness_exponent=exponent,
        server_learning_rate=0.8,
        fraction_evaluate=0.0,
    )
    result = strategy.start(grid, model(), num_rounds=4)
    models = [np.zeros(2)]
    for move in range(4):
        batch = arrived[move * size : (move + 1) * size]
        step, total = np.zeros(2), 0.0
        for node, version in batch:
            base = models[version - 1]
            step += node * (move + 1 - version + 1.0) ** -exponent * (drift(node, base) - base)
            total += node
        models.append(models[-1] + 0.8 * step / total)
    np.testing.assert_allclose(result.arrays.to_numpy_ndarrays()[0], models[-1], rtol=1e-12)
    assert len(arrived) == len(grid.pushed) == 4 * size  # drained: nobody trained in vain
    assert not grid.out
    assert not grid.forgotten
    assert grid.most <= min(concurrency, nodes)


def test_the_same_arrivals_give_the_same_run() -> None:
    def once() -> tuple[bytes, list[int]]:
        grid = LateGrid(app_of(drift), 8, 11)
        result = FedBuff(buffer_size=3, concurrency=5, fraction_evaluate=0.0).start(grid, model(), num_rounds=5)
        return result.arrays["0"].data.tobytes(), [message.metadata.dst_node_id for message in grid.pushed]

    assert once() == once()


def test_round_metrics_tell_staleness_traffic_and_nodes() -> None:
    grid = LateGrid(app_of(drift), 6, 5)
    result = FedBuff(buffer_size=2, concurrency=6, fraction_evaluate=0.0).start(grid, model(), num_rounds=6)
    replies = [entry["train-replies"] for entry in result.rounds]
    assert all(one["valid"] == one["nodes"] == 2 for one in replies)
    assert replies[0]["staleness"] == {"mean": 0.0, "largest": 0}
    assert max(one["staleness"]["largest"] for one in replies) >= 2
    assert result.train_metrics_clientapp.keys() == set(range(1, 7))


def test_an_old_update_is_excluded_and_its_node_asked_later() -> None:
    grid = LateGrid(app_of(drift), 6, 5)
    strategy = FedBuff(buffer_size=2, concurrency=6, max_staleness=0, fraction_evaluate=0.0)
    result = strategy.start(grid, model(), num_rounds=4)
    causes = [cause["cause"] for entry in result.rounds for cause in entry["train-replies"]["excluded"]]
    assert causes
    assert all("max_staleness is 0" in cause for cause in causes)
    assert all(entry["train-replies"]["valid"] == 2 for entry in result.rounds)


def test_a_node_that_never_answers_costs_its_own_time_only() -> None:
    grid = LateGrid(app_of(drift), 5, 5, silent=[2])
    strategy = FedBuff(buffer_size=4, concurrency=5, reply_timeout=0.2, fraction_evaluate=0.0)
    start = time.monotonic()
    result = strategy.start(grid, model(), num_rounds=3, timeout=20)
    assert time.monotonic() - start < 5
    excluded = {one["node"] for entry in result.rounds for one in entry["train-replies"]["excluded"]}
    assert excluded <= {2}
    assert grid.forgotten
    assert not grid.out


def test_when_every_node_fails_the_run_fails_at_once_and_with_the_cause() -> None:
    def fail(node: int, received: np.ndarray) -> np.ndarray:
        raise ZeroDivisionError

    grid = LateGrid(app_of(fail), 4, 5)
    with pytest.raises(QuorumError, match=r"0 valid replies, 3 are needed.*4 x CLIENT_APP_RAISED_EXCEPTION"):
        FedBuff(buffer_size=3, concurrency=2, fraction_evaluate=0.0).start(grid, model(), num_rounds=2)
    assert len(grid.pushed) == 4


def test_silence_ends_at_the_timeout_with_nothing_left_out() -> None:
    grid = LateGrid(app_of(drift), 4, 5, silent=[1, 2, 3, 4])
    with pytest.raises(QuorumError, match="no reply in time"):
        FedBuff(buffer_size=2, concurrency=3, fraction_evaluate=0.0).start(grid, model(), num_rounds=1, timeout=0.3)
    assert not grid.out


def test_nan_and_zero_weights_never_reach_the_model() -> None:
    grid = LateGrid(app_of(lambda node, x: x + (np.nan if node == 1 else node)), 4, 5)
    result = FedBuff(buffer_size=3, concurrency=4, fraction_evaluate=0.0).start(grid, model(), num_rounds=3)
    assert np.isfinite(result.arrays.to_numpy_ndarrays()[0]).all()
    grid = LateGrid(app_of(drift, lambda node: 0), 4, 5)
    with pytest.raises(QuorumError, match="all weights are 0"):
        FedBuff(buffer_size=3, concurrency=4, fraction_evaluate=0.0).start(grid, model(), num_rounds=1)


def test_a_resumed_run_goes_on_from_its_checkpoint() -> None:
    recorder = MemoryRecorder()
    grid = LateGrid(app_of(drift), 6, 5, recorder=recorder)
    first = FedBuff(buffer_size=2, concurrency=4, fraction_evaluate=0.0)
    first.start(grid, model(), num_rounds=3)
    kept = recorder.checkpoint
    assert kept is not None
    again = LateGrid(app_of(drift), 6, 5, recorder=MemoryRecorder(kept))
    result = FedBuff(buffer_size=2, concurrency=4, fraction_evaluate=0.0).start(again, model(), num_rounds=5)
    assert [entry["round"] for entry in result.rounds] == [1, 2, 3, 4, 5]
    assert len(again.pushed) == 4
    assert all(message.content["arrays"] != model() for message in again.pushed)


def test_in_simulation_slow_nodes_do_not_hold_up_the_others() -> None:
    def value(node: int, received: np.ndarray) -> np.ndarray:
        time.sleep(0.3 if node == 1 else 0.001)
        return received * 0.9 + 1.0

    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> dict[str, Any]:
        strategy = FedBuff(buffer_size=4, concurrency=6, fraction_evaluate=0.0)
        result = strategy.start(grid, model(), num_rounds=8, timeout=30)
        return {"rounds": list(result.rounds), "arrays": result.arrays}

    done = run_simulation(server, app_of(value), 8, seed=2).result
    assert len(done["rounds"]) == 8
    assert np.isfinite(done["arrays"].to_numpy_ndarrays()[0]).all()


def test_what_cannot_be_is_refused_with_the_cause() -> None:
    for arguments in (
        {"buffer_size": 0},
        {"concurrency": 0},
        {"staleness_exponent": -1.0},
        {"max_staleness": -1},
        {"reply_timeout": 0.0},
        {"server_learning_rate": float("nan")},
    ):
        (name,) = arguments
        with pytest.raises(ValueError, match=name):
            FedBuff(**arguments)
    with pytest.raises(ValueError, match="one by one"):
        FedBuff(stage=GroupedStage(SecAgg(threshold=2), 4), fraction_evaluate=0.0)
    with pytest.raises(PlanRefused, match="no sensitivity is stated for FedBuff"):
        FedBuff(privacy=PrivacyPlan(clip=1.0, epsilon=1.0, delta=1e-5), fraction_evaluate=0.0)


def test_what_arrives_at_once_is_taken_in_the_order_it_was_sent() -> None:
    grid = LocalGrid(app_of(drift), 6, seed=5)
    strategy = FedBuff(buffer_size=2, concurrency=6, staleness_exponent=0.0, fraction_evaluate=0.0)
    result = strategy.start(grid, model(), num_rounds=3)
    # Six nodes train on the first model and answer at once: three moves by two of them each, all from version 1.
    np.testing.assert_allclose(result.arrays.to_numpy_ndarrays()[0], sum(range(1, 7)) / 2)
    assert [entry["train-replies"]["staleness"]["largest"] for entry in result.rounds] == [0, 1, 2]
