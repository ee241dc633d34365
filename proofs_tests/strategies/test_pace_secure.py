"""The pace of rounds under stages that hide: late nodes are left out, and the others' sum is still opened."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from privfed import mods, run_simulation
from privfed.apps import ClientApp, ServerApp
from privfed.context import Context
from privfed.errors import RunFailed
from privfed.grid import Grid
from privfed.message import Message
from privfed.protocols import LightSecAgg, OneShot, SecAgg, SecAggPlus
from privfed.record import ArrayRecord, MetricRecord, RecordDict
from privfed.strategies import FedAvg, FedMedian, GroupedStage, Pace, SecureStage, Strategy

LATE = 4.0  # seconds that a slow node trains; the deadline is well before
DEADLINE = 2.0
PROTOCOLS = {
    "secagg": SecAgg(threshold=0.6),
    "secagg-four": SecAgg(threshold=4),
    "secaggplus": SecAggPlus(neighbours=4, threshold=3),
    "lightsecagg": LightSecAgg(threshold=4),
    "oneshot": OneShot(threshold=4),
}


def slow_app(slow: set[int]) -> ClientApp:
    """Node k moves the model by k; some do so late."""
    app = ClientApp(mods=[mods.secure_aggregation()])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        time.sleep(LATE if context.node_id in slow else 0.0)
        received = message.content.array_records["arrays"]["0"].numpy()
        arrays = ArrayRecord([np.asarray(received + context.node_id, received.dtype)])
        return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    return app


def simulate(strategy: Strategy, app: ClientApp, nodes: int, rounds: int = 1) -> Any:
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> Any:
        result = strategy.start(grid, ArrayRecord([np.ones(2)]), num_rounds=rounds, timeout=60)
        return {"arrays": result.arrays.to_numpy_ndarrays()[0], "rounds": result.rounds}

    return run_simulation(server, app, nodes, seed=4).result


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_a_deadline_leaves_a_late_node_out_and_the_sum_is_still_opened(name: str) -> None:
    strategy = FedAvg(
        stage=SecureStage(PROTOCOLS[name]), pace=Pace(deadline=DEADLINE, min_completion=0.8), fraction_evaluate=0.0
    )
    start = time.monotonic()
    found = simulate(strategy, slow_app({5}), 5)
    replies = found["rounds"][0]["train-replies"]
    assert (replies["nodes"], replies["valid"]) == (5, 4)
    assert [one["node"] for one in replies["excluded"]] == [5]
    np.testing.assert_allclose(found["arrays"], 1 + np.mean([1, 2, 3, 4]), atol=1e-3)
    assert time.monotonic() - start < 30


def test_too_few_before_the_deadline_fail_the_round_and_open_nothing() -> None:
    pace = Pace(deadline=DEADLINE, min_completion=1.0)
    strategy = FedAvg(stage=SecureStage(SecAgg(threshold=0.6)), pace=pace, fraction_evaluate=0.0)
    with pytest.raises(RunFailed, match="4 valid replies, 5 are needed"):
        simulate(strategy, slow_app({5}), 5)


def test_a_deadline_leaves_late_nodes_out_of_their_groups() -> None:
    stage = GroupedStage(SecAgg(threshold=2), 3)
    strategy = FedMedian(stage=stage, pace=Pace(deadline=DEADLINE), fraction_evaluate=0.0)
    found = simulate(strategy, slow_app({9}), 9)
    replies = found["rounds"][0]["train-replies"]
    assert (replies["nodes"], replies["valid"], replies["groups"]) == (9, 8, 3)
    assert [one["node"] for one in replies["excluded"]] == [9]


def test_with_over_selection_a_secure_sum_takes_in_all_who_are_in_time() -> None:
    pace = Pace(over_selection=0.25, deadline=DEADLINE)
    strategy = FedAvg(
        fraction_train=0.8, stage=SecureStage(SecAgg(threshold=0.6)), pace=pace, fraction_evaluate=0.0
    )  # 4 of 5 wanted, 5 asked
    found = simulate(strategy, slow_app(set()), 5)
    assert found["rounds"][0]["train-replies"]["valid"] == 5
    np.testing.assert_allclose(found["arrays"], 1 + 3.0, atol=1e-3)
    found = simulate(strategy, slow_app({1}), 5)
    assert found["rounds"][0]["train-replies"]["valid"] == 4
    np.testing.assert_allclose(found["arrays"], 1 + 3.5, atol=1e-3)
