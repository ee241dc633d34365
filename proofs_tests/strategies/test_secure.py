"""The secure stage: the server gets the sum whoever vanishes when, or nothing; and a node never answers twice."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed import mods
from privfed.apps import ClientApp, ServerApp
from privfed.array import Array
from privfed.context import Context
from privfed.errors import QuorumError, RunFailed
from privfed.grid import LocalGrid, MemoryRecorder
from privfed.message import Error, ErrorCode, Message
from privfed.protocols import LightSecAgg, OneShot, SecAgg, SecAggPlus
from privfed.protocols.session import Identity, Policy
from privfed.record import ArrayRecord, MetricRecord, RecordDict
from privfed.ring import REPLY, REQUEST, SECURE
from privfed.runtime.simulation import run_simulation
from privfed.strategies import FedAvg, GroupedStage, GroupMeans, SecureStage, Strategy
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
    grid = FlakyGrid(app, 5)
    result = FedAvg(fraction_evaluate=0, stage=SecureStage(protocol, max_weight=8)).start(grid, MODEL, 1)
    check_model(result.arrays, [1, 2, 3, 4, 5])
    ran = [fields["stage"] for name, fields in grid.recorder.events if name == "stage"]  # type: ignore[attr-defined]
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


def plain_app() -> ClientApp:
    app = ClientApp()
    app.train()(lambda message, context: Message(good(message, context.node_id), reply_to=message))
    return app


def test_nothing_leaves_a_node_in_the_clear() -> None:
    grid = FlakyGrid(app_of(), 4)
    replies: list[Message] = []
    pull = grid.pull_messages

    def spy(message_ids: Any) -> list[Message]:
        pulled = pull(message_ids)
        replies.extend(pulled)
        return pulled

    grid.pull_messages = spy  # type: ignore[method-assign]
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


def test_the_app_trains_once_and_sees_no_session_record() -> None:
    seen: list[list[str]] = []

    def train(message: Message, node: int) -> RecordDict:
        seen.append(sorted(message.content))
        return good(message, node)

    FedAvg(fraction_evaluate=0, stage=SecureStage(SecAgg(threshold=2))).start(FlakyGrid(app_of(train), 3), MODEL, 2)
    assert seen == [["arrays", "config"]] * 6


def stage_messages(rounds: int = 1) -> tuple[FlakyGrid, ClientApp, dict[tuple[int, int], Message]]:
    """Run a session of 3 nodes; return its requests to node 1 by (session, stage)."""
    app = app_of()
    grid = FlakyGrid(app, 3, seed=1)
    FedAvg(fraction_evaluate=0, stage=SecureStage(Toy(2))).start(grid, MODEL, rounds)
    sessions: list[Any] = []
    found = {}
    for message in grid.sent:
        config = message.content.config_records[SECURE]
        if config["number"] not in sessions:
            sessions.append(config["number"])
        if message.metadata.dst_node_id == 1:
            found[sessions.index(config["number"]), int(str(config["stage"]))] = message
    return grid, app, found


MESSAGES = stage_messages()[2]


def changed(message: Message, **values: Any) -> Message:
    content = message.content.copy()
    content.config_records[SECURE].update(values)
    return message.with_content(content)


def test_an_identical_redelivery_gets_the_same_bytes_and_does_not_train_again() -> None:
    _, app, messages = stage_messages()
    context = Context(node_id=1)
    for stage in (0, 1):
        first, again = (app(messages[0, stage], context).content[REPLY] for _ in range(2))
        assert first == again
        assert isinstance(first, ArrayRecord)


def test_another_request_of_the_same_stage_is_refused() -> None:
    _, app, messages = stage_messages(2)
    context = Context(node_id=1)
    app(messages[0, 0], context)
    other = messages[0, 0].content.copy()
    other[REQUEST] = ArrayRecord({"bytes": Array(np.zeros(5, np.uint8))})
    assert app(messages[0, 0].with_content(other), context).error == Error(
        ErrorCode.POLICY_REFUSED, "SessionOutOfOrder"
    )
    assert app(messages[1, 1], context).error.reason == "SessionOutOfOrder"
    assert app(messages[0, 1], context).has_content()
    assert app(changed(messages[0, 1], number=7), context).error.reason == "SessionOutOfOrder"
    assert app(messages[0, 0], context).error.reason == "SessionOutOfOrder"
    assert app(messages[1, 0], context).has_content()
    assert app(messages[0, 0], context).has_error()


def test_a_node_that_did_not_join_answers_no_later_stage() -> None:
    _, app, messages = stage_messages()
    assert app(messages[0, 1], Context(node_id=1)).error.reason == "SessionOutOfOrder"


def test_another_model_than_the_sessions_is_refused() -> None:
    _, app, messages = stage_messages()
    context = Context(node_id=1)
    app(messages[0, 0], context)
    tampered = messages[0, 1].content.copy()
    tampered["arrays"] = MODEL.map(lambda values: values + values.dtype.type(1))
    assert app(messages[0, 1].with_content(tampered), context).error.reason == "BindingMismatch"


@pytest.mark.parametrize("protocol", [SecAgg(threshold=2), SecAggPlus(), LightSecAgg(threshold=3)])
def test_the_protocols_hold_the_session_to_the_binding(protocol: Any) -> None:
    grid = FlakyGrid(app_of(), 4)
    FedAvg(fraction_evaluate=0, stage=SecureStage(protocol)).start(grid, MODEL, 1)
    first = next(message for message in grid.sent if message.metadata.dst_node_id == 1)
    assert app_of()(first, Context(node_id=1)).has_content()
    assert app_of()(changed(first, binding=bytes(32)), Context(node_id=1)).error.reason == "RemoteError"


def test_a_claimed_binding_must_be_the_sessions() -> None:
    _, app, messages = stage_messages()
    reply = app(changed(messages[0, 0], binding=bytes(32)), Context(node_id=1))
    assert reply.error == Error(ErrorCode.POLICY_REFUSED, "RemoteError")


VALUES = st.one_of(
    st.none(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5), st.binary(max_size=40), st.booleans(),
    st.lists(st.text(max_size=2), max_size=2), st.lists(st.floats(), max_size=3),
)  # fmt: skip


@given(st.data(), st.sampled_from([0, 1]))
@settings(max_examples=150, deadline=None)
def test_a_malformed_instruction_is_refused_and_never_trains(data: st.DataObject, stage: int) -> None:
    trained: list[int] = []

    def train(message: Message, node: int) -> RecordDict:
        trained.append(node)
        return good(message, node)

    app, context = app_of(train), Context(node_id=1)
    if stage == 1:
        app(MESSAGES[0, 0], context)
    content = MESSAGES[0, stage].content.copy()
    name = data.draw(st.sampled_from([SECURE, SECURE + ".layout", SECURE + ".protocol"]))
    record = content.config_records[name]
    key = data.draw(st.sampled_from(list(record)))
    value = data.draw(VALUES)
    before = record.pop(key)
    if value is not None:
        record[key] = value
    if value == before and type(value) is type(before):
        return
    reply = app(MESSAGES[0, stage].with_content(content), context)
    # At the first stage the protocol itself and the later stages hold the server to what it said.
    assert reply.has_error() or stage == 0 or (key == "input" and value)
    assert not trained or key == "input"


@pytest.mark.parametrize("kind", ["train", "evaluate", "query"])
def test_a_message_in_the_clear_is_refused(kind: str) -> None:
    request = Message(RecordDict({"arrays": MODEL}), 1, kind)
    assert app_of()(request, Context(node_id=1)).error.reason == "SecureAggregationRequired"
    if kind == "evaluate":
        assert app_of(kinds=("train",))(request, Context(node_id=1)).has_content()


def test_a_node_keeps_its_own_rules() -> None:
    grid = FlakyGrid(app_of(policy=Policy(min_cohort=4)), 3)
    with pytest.raises(QuorumError, match="POLICY_REFUSED RemoteError"):
        FedAvg(fraction_evaluate=0, stage=SecureStage(SecAgg(threshold=2))).start(grid, MODEL, 1)
    grid = FlakyGrid(app_of(protocols={"SecAgg": SecAgg}), 3)
    with pytest.raises(QuorumError, match="POLICY_REFUSED Refused"):
        FedAvg(fraction_evaluate=0, stage=SecureStage(Toy(2))).start(grid, MODEL, 1)


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
    strategy = Rows(fraction_evaluate=0, stage=GroupedStage(SecAgg(threshold=2), 3, max_weight=16))
    grid = FlakyGrid(app_of(), 11, seed=5)
    result = strategy.start(grid, MODEL, 1)
    groups = strategy.stage.groups  # type: ignore[attr-defined]
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
