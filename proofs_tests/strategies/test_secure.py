"""The secure stage: the server gets the sum, whoever vanishes and when, or nothing."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privfed.apps import ServerApp
from privfed.array import Array
from privfed.context import Context
from privfed.errors import QuorumError, RunFailed
from privfed.grid import LocalGrid, MemoryRecorder
from privfed.message import Message
from privfed.protocols import LightSecAgg, OneShot, SecAgg, SecAggPlus
from privfed.protocols.session import Identity
from privfed.record import ArrayRecord, MetricRecord, RecordDict
from privfed.ring import REPLY
from privfed.runtime.simulation import run_simulation
from privfed.strategies import FedAvg, GroupedStage, GroupMeans, SecureStage, Strategy
from proofs_tests.strategies.flaky_grid import MODEL, FlakyGrid, Train, app_of, check_model, expected, good, plain_app
from proofs_tests.strategies.toy import Toy


@pytest.mark.parametrize("protocol", [Toy(3), SecAgg(threshold=3), SecAggPlus(), LightSecAgg(threshold=4)])
def test_the_mean_is_fedavgs_and_metrics_travel_inside(protocol: Any) -> None:
    stage = SecureStage(
        protocol,
        max_weight=8,
        train_metrics={"loss": (0, 1), "accuracy": (0, 1)},
        evaluate_metrics={"accuracy": (0, 1)},
    )
    grid = FlakyGrid(app_of(), 5)
    result = FedAvg(stage=stage).start(grid, MODEL, num_rounds=1)
    check_model(result.arrays, [1, 2, 3, 4, 5])
    assert result.train_metrics_clientapp[1]["loss"] == pytest.approx(5 / 15, abs=1e-6)
    assert result.train_metrics_clientapp[1]["accuracy"] == pytest.approx(0.25, abs=1e-6)
    assert set(result.evaluate_metrics_clientapp[1]) == {"accuracy"}
    bound = result.rounds[0]["train-replies"]["error-bound"]
    plain = FedAvg(fraction_evaluate=0).start(LocalGrid(plain_app(), 5), MODEL, num_rounds=1)
    assert abs(float(result.arrays["scalar"].view()) - float(plain.arrays["scalar"].view())) <= bound + 1e-12
    assert {"advertise", "hello"} & {fields["stage"] for name, fields in grid.recorder.events if name == "stage"}


KEYS = {node: hashlib.sha256(b"key %d" % node).digest() for node in range(1, 6)}
ROSTER = {n: Ed25519PrivateKey.from_private_bytes(key).public_key().public_bytes_raw() for n, key in KEYS.items()}


@pytest.mark.parametrize("protocol", [OneShot(threshold=3), SecAgg(threshold=4, mode="active")])
def test_protocols_with_identities(protocol: Any) -> None:
    app = app_of(identity=lambda context: Identity(context.node_id, KEYS[context.node_id], ROSTER), protocols=None)
    recorder = MemoryRecorder()
    grid = FlakyGrid(app, 5, recorder=recorder)
    result = FedAvg(fraction_evaluate=0, stage=SecureStage(protocol, max_weight=8)).start(grid, MODEL, 1)
    check_model(result.arrays, [1, 2, 3, 4, 5])
    ran = [fields["stage"] for name, fields in recorder.events if name == "stage"]
    assert tuple(ran) == protocol.stages
    with pytest.raises(QuorumError):
        FedAvg(fraction_evaluate=0, stage=SecureStage(protocol)).start(FlakyGrid(app_of(protocols=None), 5), MODEL, 1)


def test_a_simulation_is_bit_identical_whatever_the_masks_and_threads() -> None:
    server = ServerApp()

    @server.main()
    def main(grid: Any, context: Context) -> None:
        stage = SecureStage(SecAgg(threshold=3), max_weight=8)
        FedAvg(fraction_train=0.6, fraction_evaluate=0, stage=stage).start(grid, MODEL, 2)

    runs = [run_simulation(server, app_of(protocols=None), 9, seed=4, threads=threads) for threads in (1, 4)]
    assert runs[0].arrays is not None
    assert runs[0].arrays == runs[1].arrays
    assert runs[0].metrics == runs[1].metrics


def test_nothing_leaves_a_node_in_the_clear() -> None:
    replies: list[Message] = []

    class Watched(FlakyGrid):
        def pull_messages(self, message_ids: Any) -> list[Message]:
            pulled = super().pull_messages(message_ids)
            replies.extend(pulled)
            return pulled

    grid = Watched(app_of(), 4)
    FedAvg(fraction_evaluate=0, stage=SecureStage(SecAgg(threshold=3))).start(grid, MODEL, num_rounds=1)
    assert replies
    assert all(list(reply.content) == [REPLY] for reply in replies)


@pytest.mark.parametrize(
    "vanish", [dict(zip((1, 2, 3), stages, strict=True)) for stages in product((0, 2, 3, 9), repeat=3)]
)
def test_whoever_vanishes_the_sum_is_the_survivors_or_the_round_fails(vanish: dict[int, int]) -> None:
    recorder = MemoryRecorder()
    grid = FlakyGrid(app_of(), 4, vanish, recorder=recorder)
    strategy = FedAvg(fraction_evaluate=0, min_train_nodes=2, stage=SecureStage(SecAgg(threshold=2), max_weight=8))
    there = [node for node in (1, 2, 3, 4) if vanish.get(node, 9) >= 3]
    open_to_the_end = [node for node in (1, 2, 3, 4) if vanish.get(node, 9) > 3]
    if min(len(there), len(open_to_the_end)) >= 2:
        result = strategy.start(grid, MODEL, num_rounds=1)
        check_model(result.arrays, there)
        excluded = result.rounds[0]["train-replies"]["excluded"]
        assert sorted(one["node"] for one in excluded) == sorted(set(range(1, 5)) - set(there))
    else:
        with pytest.raises(QuorumError, match="train round 1"):
            strategy.start(grid, MODEL, num_rounds=1)
        assert recorder.checkpoint is not None
        assert recorder.checkpoint.arrays == MODEL


def spoilt(change: Callable[[RecordDict], RecordDict]) -> Train:
    return lambda message, node: change(good(message, node)) if node == 2 else good(message, node)


def with_arrays(**values: Any) -> Callable[[RecordDict], RecordDict]:
    return lambda made: RecordDict({**made, "arrays": ArrayRecord({**made.array_records["arrays"], **values})})


BAD = {
    "shape": (with_arrays(scalar=Array(np.zeros(1))), "UpdateError"),
    "dtype": (with_arrays(scalar=Array(np.array(0, np.float32))), "UpdateError"),
    "key": (with_arrays(more=Array(np.array(0.0))), "UpdateError"),
    "no weight": (lambda made: RecordDict({"arrays": made["arrays"]}), "RingOverflow"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_reply_is_refused_before_masking(name: str) -> None:
    change, cause = BAD[name]
    grid = FlakyGrid(app_of(spoilt(change)), 4)
    result = FedAvg(fraction_evaluate=0, stage=SecureStage(SecAgg(threshold=2), max_weight=8)).start(grid, MODEL, 1)
    check_model(result.arrays, [1, 3, 4])
    (excluded,) = result.rounds[0]["train-replies"]["excluded"]
    assert excluded["node"] == 2
    assert cause in excluded["cause"]


@pytest.mark.parametrize("weight", [-1, math.nan, 3.0])
def test_a_node_without_finite_numbers_answers_and_counts_for_nothing(weight: float) -> None:
    """The weight is below 0 or NaN, or the model holds NaN: a refusal would tell the server, which picks the model."""
    broken = with_arrays(scalar=Array(np.array(math.nan))) if weight > 0 else dict
    train = spoilt(lambda made: RecordDict({**broken(made), "metrics": MetricRecord({"num-examples": weight})}))
    stage = SecureStage(SecAgg(threshold=2), max_weight=8)
    result = FedAvg(fraction_evaluate=0, stage=stage).start(FlakyGrid(app_of(train), 4), MODEL, 1)
    check_model(result.arrays, [1, 3, 4])
    told = result.rounds[0]["train-replies"]
    assert (told["valid"], told["clamped"], told.get("excluded", [])) == (4, 1, [])


def test_a_value_beyond_its_range_is_sent_as_its_end_and_counted() -> None:
    """Node 2 reports a weight of 10^9 where 8 is the most: as an error it would tell the server about node 2."""
    train = spoilt(lambda made: RecordDict({**made, "metrics": MetricRecord({"num-examples": 1e9})}))
    grid = FlakyGrid(app_of(train), 4)
    result = FedAvg(fraction_evaluate=0, stage=SecureStage(SecAgg(threshold=2), max_weight=8)).start(grid, MODEL, 1)
    told = result.rounds[0]["train-replies"]
    assert (told["valid"], told["clamped"], told.get("excluded", [])) == (4, 1, [])
    far = FlakyGrid(app_of(spoilt(with_arrays(scalar=Array(np.array(9.0))))), 4)
    result = FedAvg(fraction_evaluate=0, stage=SecureStage(SecAgg(threshold=2), max_weight=8)).start(far, MODEL, 1)
    assert result.rounds[0]["train-replies"]["clamped"] == 1
    good_ones = FlakyGrid(app_of(), 4)
    result = FedAvg(fraction_evaluate=0, stage=SecureStage(SecAgg(threshold=2), max_weight=8)).start(
        good_ones, MODEL, 1
    )
    assert "clamped" not in result.rounds[0]["train-replies"]


def test_all_failing_fails_the_run() -> None:
    def broken(message: Message, node: int) -> RecordDict:
        raise KeyError("private")

    with pytest.raises(QuorumError, match="4 x stage mask: CLIENT_APP_RAISED_EXCEPTION KeyError"):
        FedAvg(fraction_evaluate=0, stage=SecureStage(SecAgg(threshold=2))).start(
            FlakyGrid(app_of(broken), 4), MODEL, 1
        )


def test_nodes_without_the_mod_are_excluded_with_the_fix() -> None:
    with pytest.raises(QuorumError, match=r"mods.secure_aggregation\(\)|AppError|KeyError|CLIENT_APP"):
        FedAvg(fraction_evaluate=0, stage=SecureStage(Toy(2))).start(FlakyGrid(plain_app(), 3), MODEL, 1)


def test_an_infeasible_threshold_fails_before_any_message() -> None:
    grid = FlakyGrid(app_of(), 3)
    with pytest.raises(RunFailed, match="cannot run with 3 nodes"):
        FedAvg(fraction_evaluate=0, stage=SecureStage(SecAgg(threshold=9))).start(grid, MODEL, 1)
    assert not grid.sent


def test_what_cannot_be_hidden_is_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="evaluate_metrics"):
        FedAvg(stage=SecureStage(SecAgg(threshold=2)))

    class Apart(FedAvg):
        def configure_node(self, server_round: int, node: int, content: RecordDict) -> RecordDict:
            return content

    with pytest.raises(ValueError, match="configures nodes apart"):
        Apart(fraction_evaluate=0, stage=SecureStage(SecAgg(threshold=2)))
    for arguments, name in [
        ({"bits": 7}, "bits"),
        ({"bits": 8}, "bits"),
        ({"max_weight": 0}, "max_weight"),
        ({"stage_timeout": 0}, "stage_timeout"),
    ]:
        with pytest.raises(ValueError, match=name):
            SecureStage(SecAgg(threshold=2), **arguments)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(ValueError, match="loss"):
        SecureStage(SecAgg(threshold=2), train_metrics={"loss": (1, 1)})


class Rows(Strategy):
    """Remembers the rows it was given."""

    needs = GroupMeans

    def update(self, server_round: int, arrays: ArrayRecord, view: Any) -> ArrayRecord:
        self.view = view
        return arrays


def test_groups_give_their_means_and_cover_all_nodes() -> None:
    stage = GroupedStage(SecAgg(threshold=2), 3, max_weight=16)
    strategy = Rows(fraction_evaluate=0, stage=stage)
    grid = FlakyGrid(app_of(), 11, seed=5)
    result = strategy.start(grid, MODEL, 1)
    groups = stage.groups
    assert sorted(node for group in groups for node in group) == list(range(1, 12))
    assert sorted(len(group) for group in groups) == [3, 4, 4]
    assert strategy.view.rows.dtype == np.float32
    np.testing.assert_allclose(strategy.view.rows[:, 0], [expected(list(group)) for group in groups], atol=1e-3)
    np.testing.assert_allclose(strategy.view.weights, [sum(group) for group in groups])
    assert result.rounds[0]["train-replies"]["groups"] == 3


def test_a_group_that_loses_too_many_is_left_out_alone() -> None:
    stage = GroupedStage(SecAgg(threshold=3), 3, max_weight=8)
    grid = FlakyGrid(app_of(), 6, {1: 2}, seed=5)
    result = FedAvg(fraction_evaluate=0, stage=stage).start(grid, MODEL, 1)
    first, second = stage.groups
    assert 1 in first, "groups are ordered by their first members"
    check_model(result.arrays, list(second))
    causes = [one["cause"] for one in result.rounds[0]["train-replies"]["excluded"]]
    assert any("group 0 of 3 nodes" in cause for cause in causes)


def test_fedavg_over_groups_is_fedavg() -> None:
    stage = GroupedStage(Toy(2), 2, max_weight=8, evaluate_metrics={"accuracy": (0, 1)})
    result = FedAvg(stage=stage).start(FlakyGrid(app_of(), 7, seed=2), MODEL, 1)
    check_model(result.arrays, list(range(1, 8)))
    assert result.evaluate_metrics_clientapp[1]["accuracy"] == pytest.approx(0.25, abs=1e-6)
    with pytest.raises(ValueError, match="group_size"):
        GroupedStage(Toy(2), 1)
