"""A node in a session of the secure stage: it never answers twice, nor to anything but what the session opened with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.apps import ClientApp
from privfed.array import Array
from privfed.context import Context
from privfed.errors import QuorumError
from privfed.message import Error, ErrorCode, Message
from privfed.protocols import LightSecAgg, SecAgg, SecAggPlus
from privfed.protocols.session import Policy
from privfed.record import ArrayRecord, RecordDict
from privfed.ring import REPLY, REQUEST, SECURE
from privfed.strategies import FedAvg, SecureStage
from proofs_tests.strategies.flaky_grid import MODEL, FlakyGrid, app_of, good
from proofs_tests.strategies.toy import Toy


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
