"""Every check of the mod that masks: what a server may say instead, and the refusal that meets it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from privfed.array import Array
from privfed.context import shared_settings
from privfed.message import Message
from privfed.mods.masking import STATE
from privfed.protocols import SecAgg
from privfed.protocols.errors import DecodeError
from privfed.protocols.session import FACTS, Policy
from privfed.record import ArrayRecord, ConfigRecord, RecordDict
from privfed.ring import BUFFER, REQUEST, SECURE, Layout
from privfed.runtime.engine import Assignment, execute
from privfed.runtime.store import Lease, NodeState
from proofs_tests.mods.federation import INPUT_STAGE, KINDS, RUN, Federation, identity_of, model, only_at

OTHER: dict[str, Any] = {"run": 2, "round": 9, "action": "evaluate", "bits": 16, "dimension": 5}


# --- the session against the message, the run and the model


@KINDS
@pytest.mark.parametrize("fact", FACTS)
def test_a_session_of_other_facts_than_the_messages_is_refused(protocol: Any, fact: str) -> None:
    lab = Federation(protocol)
    server, refusals = lab.session(1, told={fact: OTHER[fact]})
    assert refusals == {"RemoteError"}
    assert server.result is None
    assert lab.trained == 0
    assert lab.session(1)[0].result is not None, "nothing was kept of it"


@KINDS
def test_a_session_of_one_run_is_none_of_another(protocol: Any) -> None:
    """Under a second run id the marks are others: a contribution or a mask must not be valid there."""
    lab = Federation(protocol)
    assert lab.session(1)[0].result is not None
    for context in lab.contexts.values():
        context.run_id, context.mod_states = RUN + 1, {}
    assert lab.session(2)[1] == {"RemoteError"}
    assert lab.session(3, told={"run": RUN + 1})[0].result is not None


def trained_until(turn: int) -> Callable[[int], str]:
    return lambda stage: "train" if stage < turn else "evaluate"


@KINDS
def test_the_kind_of_message_is_the_same_at_every_stage(protocol: Any) -> None:
    """Opened as an evaluation, it may not end as training: the marks go by the kind."""
    for turn in range(1, len(protocol.stages)):
        lab = Federation(protocol)
        server, refusals = lab.session(1, kind_at=trained_until(turn))
        assert server.result is None
        assert refusals <= {"SessionOutOfOrder", "BindingMismatch"}
        assert refusals


@KINDS
@pytest.mark.parametrize("dimension", [3, 5, 400])
def test_a_layout_for_another_model_is_refused_before_the_app_runs(protocol: Any, dimension: int) -> None:
    lab = Federation(protocol)
    server, refusals = lab.session(1, layout=Layout(32, 3, dimension, 8.0, None, ()))
    assert refusals == {"LayoutMismatch"}
    assert server.result is None
    assert lab.trained == 0


def test_a_layout_without_an_update_fits_every_model() -> None:
    lab = Federation(SecAgg(threshold=2))
    metrics = Layout(32, 3, 0, 1.0, 8.0, ())
    assert lab.session(1, kind="evaluate", layout=metrics)[1] == {"RingOverflow"}, "the app gives no weight"
    assert lab.trained == 3


@pytest.mark.parametrize("fact", FACTS)
def test_what_the_nodes_own_policy_knows_holds_as_well(fact: str) -> None:
    right: dict[str, Any] = {"run": RUN, "round": 1, "action": "train", "bits": 32, "dimension": 4}
    assert Federation(SecAgg(threshold=2), Policy(**{fact: right[fact]})).session(1)[0].result is not None
    assert Federation(SecAgg(threshold=2), Policy(**{fact: OTHER[fact]})).session(1)[1] == {"Refused"}


def test_the_layouts_least_survivors_hold() -> None:
    plain = Layout(32, 3, 4, 8.0, None, ())
    lab = Federation(SecAgg(threshold=2))
    assert lab.session(1, layout=replace(plain, min_survivors=3))[0].result is not None
    for least, policy in ((4, Policy()), (2, Policy(min_survivors=4))):
        lab = Federation(SecAgg(threshold=2), policy)
        assert lab.session(1, layout=replace(plain, min_survivors=least))[1] == {"RemoteError"}


@KINDS
def test_a_session_bound_to_another_model_than_the_message_is_refused(protocol: Any) -> None:
    lab = Federation(protocol)
    assert lab.session(1, told={"binding": bytes(32)})[1] == {"RemoteError"}
    assert lab.trained == 0


# --- what a node remembers


@KINDS
def test_a_redelivery_gets_the_same_bytes_and_the_app_runs_once(protocol: Any) -> None:
    lab = Federation(protocol)
    first: dict[int, Message] = {}
    original = lab.ask

    def again(message: Message) -> Message:
        reply = original(message)
        first[message.metadata.dst_node_id] = reply
        repeated = original(message)
        assert repeated.content == reply.content
        return repeated

    lab.ask = again
    assert lab.session(1)[0].result is not None
    assert lab.trained == len(first) == 3


@pytest.mark.parametrize("what", ["kind", "layout", "header", "parameter", "request"])
def test_what_differs_in_anything_is_no_redelivery(what: str) -> None:
    lab = Federation(SecAgg(threshold=2))
    original = lab.ask
    refusals: list[str | None] = []

    def twice(message: Message) -> Message:
        reply = original(message)
        other, kind = message.content.copy(), "train.default" if what == "kind" else "train"
        if what == "layout":
            other.config_records[SECURE + ".layout"]["max-value"] = 4.0
        elif what == "header":
            other.config_records[SECURE]["weight-key"] = "other"
        elif what == "parameter":
            other.config_records[SECURE + ".protocol"]["threshold"] = 3
        elif what == "request":
            other[REQUEST] = ArrayRecord({BUFFER: Array(np.zeros(5, np.uint8))})
        again = original(Message(other, message.metadata.dst_node_id, kind))
        refusals.append(again.error.reason if again.has_error() else None)
        return reply

    lab.ask = twice
    assert lab.session(1)[0].result is not None
    assert set(refusals) == {"SessionOutOfOrder"}
    assert lab.trained == 3


@KINDS
def test_a_stage_of_a_session_that_was_not_joined_is_refused(protocol: Any) -> None:
    """As after a restart that lost the node's memory: nothing of that session is answered any more."""
    for lost in range(1, len(protocol.stages)):
        lab = Federation(protocol)

        def forget(content: RecordDict, lab: Federation = lab) -> None:
            for context in lab.contexts.values():
                context.mod_states = {}

        server, refusals = lab.session(1, change=only_at(lost, forget))
        assert refusals == {"SessionOutOfOrder"}
        assert server.result is None


@KINDS
def test_after_the_last_stage_nothing_secret_is_kept(protocol: Any) -> None:
    lab = Federation(protocol)
    assert lab.session(1)[0].result is not None
    for context in lab.contexts.values():
        assert context.mod_state(STATE).config_records["session"]["kept"] == b""


def test_a_server_that_broke_a_rule_gets_no_second_try_of_a_node_as_the_runtime_keeps_it() -> None:
    """The refusal is an error, and the runtime keeps nothing of those, but for what the mod says must last."""
    lab = Federation(SecAgg(threshold=2))
    states = {node: NodeState() for node in lab.contexts}
    asked: list[int] = []

    def ask(message: Message) -> Message:
        node = message.metadata.dst_node_id
        given = Assignment(lambda node: {}, identity=lambda node: identity_of(lab.contexts[node]))
        message.metadata = replace(message.metadata, run_id=RUN, message_id=f"{len(asked)}")
        asked.append(node)
        reply, after = execute(lab.app, Lease("", message, states[node].copy(), 1e18), given, lambda *_: None)
        states[node] = after if after is not None else states[node]
        return reply

    lab.ask = ask
    lab.shared = Assignment(lambda node: {}).shared
    assert lab.session(1, spoil=3)[1] == {"SessionOutOfOrder"}, "a damaged request, then the right one"
    assert lab.session(2, value=1.0)[1] == set(), "another session is another one"


# --- what all nodes must be told alike


@KINDS
@pytest.mark.parametrize("key", ["arrays-key", "weight-key"])
def test_where_model_and_weight_are_is_bound(protocol: Any, key: str) -> None:
    """A node told to weigh by another metric than the rest would be the only one in the sum that counts."""
    lab = Federation(protocol)

    def change(content: RecordDict) -> None:
        content.config_records[SECURE][key] = "accuracy"

    assert lab.session(1, change=lambda stage: change)[1] == {"BindingMismatch"}
    assert lab.trained == 0


@KINDS
def test_the_order_of_records_is_bound(protocol: Any) -> None:
    """An app that takes the first ConfigRecord would train one node under another than the rest."""
    lab = Federation(protocol)

    def swap(content: RecordDict) -> None:
        if "config" in content:
            content["config"] = content.pop("config")

    more = {"decoy": ConfigRecord({"lr": 0.0})}
    assert lab.session(1, config={"lr": 1.0}, more=more, change=lambda stage: swap)[1] == {"BindingMismatch"}
    assert lab.trained == 0


@KINDS
def test_the_group_of_the_message_is_bound(protocol: Any) -> None:
    """Apps read their round there: one far behind or ahead of the rest could be the only one whose steps count."""
    lab = Federation(protocol)
    original = lab.ask

    def later(message: Message) -> Message:
        if message.metadata.dst_node_id != 1:
            message.metadata = replace(message.metadata, group_id="1000000")
        return original(message)

    lab.ask = later
    assert lab.session(1)[1] == {"BindingMismatch"}
    assert lab.trained == 1


@KINDS
def test_a_node_with_other_settings_than_the_session_is_bound_to_gives_nothing(protocol: Any) -> None:
    lab = Federation(protocol)
    for context in lab.contexts.values():
        context.shared = shared_settings({"local-epochs": 0}, None)
    server, refusals = lab.session(1)
    assert refusals == {"BindingMismatch"}
    assert server.result is None
    assert lab.trained == 0


def test_settings_are_all_that_nodes_are_given_alike() -> None:
    base: tuple[Any, ...] = ({"lr": 0.1, "n": 1}, 7, "app", (1, 2))
    others: list[tuple[Any, ...]] = [
        ({"lr": 0.1, "n": 2}, *base[1:]), ({"lr": 0.1, "n": 1.0}, *base[1:]), ({"lr": 0.1, "n": True}, *base[1:]),
        ({"lr": 0.1}, *base[1:]), (base[0], 8, "app", (1, 2)), (base[0], None, "app", (1, 2)),
        (base[0], 7, "other", (1, 2)), (base[0], 7, "app", (1, 2, 3)),
    ]  # fmt: skip
    assert len({shared_settings(*one) for one in (base, *others)}) == 9
    assert shared_settings({"n": 1, "lr": 0.1}, *base[1:]) == shared_settings(*base)


# --- instructions that are none


@pytest.mark.parametrize("what", ["request", "dtype", "layout", "protocol", "binding", "number"])
def test_a_malformed_instruction_is_refused(what: str) -> None:
    def spoil(content: RecordDict) -> None:
        if what == "request":
            del content[REQUEST]
        elif what == "dtype":
            content[REQUEST] = ArrayRecord({BUFFER: Array(np.zeros(5, np.int8))})
        elif what in ("layout", "protocol"):
            del content[SECURE + "." + what]
        else:
            content.config_records[SECURE][what] = "nine"

    assert Federation(SecAgg(threshold=2)).session(1, change=only_at(0, spoil))[1] == {"Refused"}


@KINDS
def test_a_stage_that_gives_the_input_must_bring_the_instructions(protocol: Any) -> None:
    def hide(content: RecordDict) -> None:
        content.config_records[SECURE]["input"] = False

    lab = Federation(protocol)
    stage = INPUT_STAGE[type(protocol).__name__]
    assert lab.session(1, change=only_at(stage, hide))[1] == {"SessionOutOfOrder"}
    assert lab.trained == 0


@KINDS
def test_another_model_or_configuration_at_the_input_is_refused(protocol: Any) -> None:
    stage = INPUT_STAGE[type(protocol).__name__]
    for name, record in (("arrays", model(1.0)), ("config", ConfigRecord({"x": 1})), ("more", ConfigRecord({}))):
        lab = Federation(protocol)

        def other(content: RecordDict, name: str = name, record: Any = record) -> None:
            content[name] = record

        assert lab.session(1, change=only_at(stage, other))[1] == {"BindingMismatch"}
        assert lab.trained == 0


@dataclass(frozen=True)
class Rude:
    """A protocol whose client lets an error of decoding through, as one that is not ours may."""

    threshold: int = 2
    stages: tuple[str, ...] = ("mask",)

    def client(self, node: int, **arguments: Any) -> Any:
        class Client:
            def step(self, kept: bytes, request: Any, source: Any) -> Any:
                raise DecodeError("no message")

        return Client()


def test_a_request_that_does_not_decode_is_refused() -> None:
    lab = Federation(SecAgg(threshold=2), protocols={"SecAgg": Rude()})
    assert lab.session(1)[1] == {"Refused"}
