"""Messages can be built without a federation; replies go back where they came from and never outlive their request."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privfed import ConfigRecord, Context, Error, Message, RecordDict
from privfed.context import check_user_config, derived_rng
from privfed.message import DEFAULT_TTL


def question(**options: Any) -> Message:
    return Message(RecordDict({"c": ConfigRecord({"k": 1})}), 7, "train", **options)


def test_an_instruction_has_what_it_was_given() -> None:
    before = time.time()
    message = question(group_id="round-1")
    data = message.metadata
    assert (data.dst_node_id, data.src_node_id, data.message_type, data.group_id) == (7, 0, "train", "round-1")
    assert (data.run_id, data.reply_to_message_id, data.ttl) == (0, "", DEFAULT_TTL)
    assert before <= data.created_at <= time.time()
    assert data.expires_at == data.created_at + DEFAULT_TTL
    assert message.has_content()
    assert not message.has_error()
    assert question().metadata.message_id != data.message_id


@pytest.mark.parametrize("kind", ["train", "evaluate", "query", "train.warm_up", "system.x_1"])
def test_message_types(kind: str) -> None:
    assert Message(RecordDict(), 1, kind).metadata.message_type == kind


@pytest.mark.parametrize("kind", ["", "Train", "train.", "train.a.b", "train.1x", "train ", "other", "train\n"])
def test_other_message_types_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="message_type"):
        Message(RecordDict(), 1, kind)


def test_a_reply_goes_back_and_keeps_type_and_group() -> None:
    asked = question(group_id="g").with_metadata(run_id=5)
    for body in (RecordDict(), Error(2, "ValueError")):
        reply = Message(body, reply_to=asked)
        data = reply.metadata
        assert (data.run_id, data.src_node_id, data.dst_node_id) == (5, 7, 0)
        assert (data.reply_to_message_id, data.message_type, data.group_id) == (asked.metadata.message_id, "train", "g")
        assert data.message_id != asked.metadata.message_id


@given(st.floats(0.01, 1e6), st.none() | st.floats(0.001, 1e7), st.floats(0, 1e6))
def test_a_reply_does_not_outlive_its_request(ttl: float, own: float | None, age: float) -> None:
    asked = question(ttl=ttl)
    asked = asked.with_metadata(created_at=asked.metadata.created_at - age)
    reply = Message(RecordDict(), reply_to=asked, ttl=own).metadata
    assert reply.ttl > 0
    # A request that has expired still gets an answer that can be sent.
    assert reply.expires_at <= max(asked.metadata.expires_at, reply.created_at + 0.001) + 1e-3


@pytest.mark.parametrize("ttl", [0, -1, float("nan")])
def test_a_time_to_live_is_positive(ttl: float) -> None:
    with pytest.raises(ValueError, match="ttl"):
        question(ttl=ttl)


@pytest.mark.parametrize(
    "arguments",
    [
        ({}, 1, "train"),
        (RecordDict(),),
        (RecordDict(), 1),
        (Error(1), 1, "train"),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError):
        Message(*arguments)
    with pytest.raises(TypeError, match="reply_to"):
        Message(RecordDict(), 1, "train", reply_to=question())  # type: ignore[call-overload]  # the mistake under test


def test_content_and_error_exclude_each_other() -> None:
    asked = question()
    failed = Message(Error(2, "why"), reply_to=asked)
    with pytest.raises(ValueError, match="content, not an error"):
        _ = asked.error
    with pytest.raises(ValueError, match="an error, not content"):
        _ = failed.content
    with pytest.raises(ValueError, match="cannot be set"):
        failed.content = RecordDict()
    asked.content = RecordDict()
    assert asked.content == RecordDict()
    assert failed.error == Error(2, "why")


def test_parts_can_be_replaced_without_touching_the_original() -> None:
    asked = question()
    other = asked.with_content(RecordDict()).with_metadata(dst_node_id=9)
    assert (other.metadata.dst_node_id, other.content) == (9, RecordDict())
    assert (asked.metadata.dst_node_id, len(asked.content)) == (7, 1)
    with pytest.raises(TypeError):
        asked.with_metadata(unknown=1)


def test_seeded_generators_depend_on_seed_partition_and_labels_alone() -> None:
    def draw(seed: int | None, partition: int, *labels: int | str, node: int = 1) -> float:
        return Context(node_id=node, node_config={"partition-id": partition}, seed=seed).rng(*labels).random()

    assert draw(1, 2, "train", 3, node=4) == draw(1, 2, "train", 3, node=5)
    values = [draw(1, 2, "train", 3), draw(2, 2, "train", 3), draw(1, 3, "train", 3), draw(1, 2, "train", 4)]
    assert len({*values, draw(1, 2, "train"), draw(1, 2, 3, "train"), draw(1, 2, "train", "3")}) == 7
    assert draw(None, 2, "train") != draw(None, 2, "train")
    assert derived_rng(1, "a", 2).random() == derived_rng(1, "a", 2).random()


def test_settings_are_plain() -> None:
    assert check_user_config({"a": 1, "b": "x"}, "run_config") == {"a": 1, "b": "x"}
    for bad in ({"a": None}, {"a": [1]}, {1: 1}):
        with pytest.raises(TypeError, match="run_config"):
            check_user_config(bad, "run_config")  # type: ignore[arg-type]  # the mistake under test
