"""Every check of the mod that masks: what a server may say instead, and the refusal that meets it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed import mods
from privfed.apps import ClientApp
from privfed.array import Array
from privfed.context import shared_settings
from privfed.message import Error, ErrorCode, Message
from privfed.mods.masking import STATE
from privfed.protocols import LightSecAgg, OneShot, SecAgg, SecAggPlus
from privfed.protocols.errors import DecodeError
from privfed.protocols.session import FACTS, Policy
from privfed.record import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from privfed.ring import BUFFER, DEMANDS, NOISED, REQUEST, SECURE, VECTOR, Layout
from privfed.runtime.engine import Assignment, execute
from privfed.runtime.store import Lease, NodeState
from privfed.update import PLAN, UPDATE
from proofs_tests.mods.federation import INPUT_STAGE, PROTOCOLS, RUN, Change, Federation, identity_of, model, moved

KINDS = pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: type(protocol).__name__)
OTHER: dict[str, Any] = {"run": 2, "round": 9, "action": "evaluate", "bits": 16, "dimension": 5}


def only_at(stage: int, change: Change) -> Callable[[int], Change | None]:
    return lambda at: change if at == stage else None


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


@KINDS
def test_the_kind_of_message_is_the_same_at_every_stage(protocol: Any) -> None:
    """Opened as an evaluation, it may not end as training: the marks go by the kind."""
    for turn in range(1, len(protocol.stages)):
        lab = Federation(protocol)
        server, refusals = lab.session(1, kind_at=lambda stage, turn=turn: "train" if stage < turn else "evaluate")  # type: ignore[misc]
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

    lab.ask = again  # type: ignore[method-assign]
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

    lab.ask = twice  # type: ignore[method-assign]
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


# --- which protocol, with which parameters


@KINDS
def test_an_instance_pins_the_parameters(protocol: Any) -> None:
    name = type(protocol).__name__
    assert Federation(protocol, protocols={name: protocol}).session(1)[0].result is not None
    pinned = {name: replace(protocol, threshold=3)}
    lab = Federation(protocol, protocols=pinned)
    assert lab.session(1)[1] == {"RemoteError"}
    assert lab.trained == 0
    # A class takes what the server says, and is held to the policy alone.
    assert Federation(protocol, protocols={name: type(protocol)}).session(1)[0].result is not None


def test_a_pinned_sparse_graph_is_kept() -> None:
    pinned = {"SecAggPlus": SecAggPlus(neighbours=2, threshold=2)}
    assert Federation(SecAggPlus(threshold=2), protocols=pinned).session(1)[0].result is not None
    other = {"SecAggPlus": SecAggPlus(neighbours=2, threshold=3)}
    assert Federation(SecAggPlus(threshold=2), protocols=other).session(1)[1] == {"RemoteError"}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("SecureSum", {"total": 0, "survivors": 0, "traffic": 0, "error_bound": 0.0}),
        ("secure_sum", {"inputs": 0, "protocol": 0}),
        ("importlib", {}),
        ("Toy", {"threshold": 2}),
    ],
)
def test_only_protocols_are_protocols(name: str, parameters: dict[str, Any]) -> None:
    """Name and parameters come from the server: they must not call any other object of the package."""
    lab = Federation(SecAgg(threshold=2))

    def rename(content: RecordDict) -> None:
        content[SECURE + ".protocol"] = ConfigRecord({"name": name, **parameters})

    assert lab.session(1, change=only_at(0, rename))[1] == {"Refused"}
    assert Federation(SecAgg(threshold=2), protocols={"OneShot": OneShot}).session(1)[1] == {"Refused"}


@pytest.mark.parametrize(
    ("name", "value"), [("threshold", 1), ("threshold", "many"), ("no-such-parameter", 1), ("threads", 1)]
)
def test_parameters_that_no_protocol_has_are_refused(name: str, value: Any) -> None:
    def set_parameter(content: RecordDict) -> None:
        content.config_records[SECURE + ".protocol"][name] = value

    lab = Federation(SecAgg(threshold=2))
    assert lab.session(1, change=only_at(0, set_parameter))[1] == {"Refused"}


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 5), st.integers(-3, 2**70), st.sampled_from([0.0, 1.0, 2.0, 0.67]),
    st.floats(), st.text(max_size=4), st.binary(max_size=4), st.lists(st.integers(-1, 9), max_size=4),
    st.lists(st.text(max_size=2), max_size=2), st.lists(st.sampled_from([1.0, 2.0, 3.0]), max_size=3),
)  # fmt: skip
FIELDS = sorted({field.name for one in (SecAgg, SecAggPlus, LightSecAgg, OneShot) for field in fields(one)})


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([*PROTOCOLS, SecAggPlus(threshold=2)]), st.sampled_from(FIELDS), VALUES)
def test_whatever_parameters_a_server_names_nothing_breaks(protocol: Any, name: str, value: Any) -> None:
    """A node joins or refuses; what is not as the session's request says is no other error than a refusal."""

    def set_parameter(content: RecordDict) -> None:
        if value is not None:
            content.config_records[SECURE + ".protocol"][name] = value

    lab = Federation(protocol)
    refusals = {"Refused", "CommitteeNamed", "RemoteError", "LocalError"}
    assert lab.session(1, upto=1, change=only_at(0, set_parameter))[1] <= refusals


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("weaken", ["parameter", "layout", "arrays-key", "weight-key", "binding", "number", "name"])
def test_nothing_changes_from_stage_to_stage(stage: int, weaken: str) -> None:
    def change(content: RecordDict) -> None:
        header = content.config_records[SECURE]
        if weaken == "parameter":
            content.config_records[SECURE + ".protocol"]["threshold"] = 3
        elif weaken == "name":
            content.config_records[SECURE + ".protocol"]["name"] = "SecAggPlus"
        elif weaken == "layout":
            content.config_records[SECURE + ".layout"]["max-value"] = 4.0
        elif weaken == "binding":
            header["binding"] = bytes(32)
        elif weaken == "number":
            header["number"] = 2
        else:
            header[weaken] = "other"

    lab = Federation(SecAgg(threshold=2))
    assert lab.session(1, change=only_at(stage, change))[1] == {"SessionOutOfOrder"}
    assert lab.trained == (3 if stage == 3 else 0)


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: type(protocol).__name__)
@pytest.mark.parametrize("key", ["arrays-key", "weight-key"])
def test_where_model_and_weight_are_is_bound(protocol: Any, key: str) -> None:
    """A node told to weigh by another metric than the rest would be the only one in the sum that counts."""
    lab = Federation(protocol)

    def change(content: RecordDict) -> None:
        content.config_records[SECURE][key] = "accuracy"

    assert lab.session(1, change=lambda stage: change)[1] == {"BindingMismatch"}
    assert lab.trained == 0


def test_the_nodes_policy_names_the_weight() -> None:
    """A server that has all alike weigh by a metric which is 0 on all nodes but one would read that one's update."""
    metrics = MetricRecord({"num-examples": 1, "rare-cases": 0})
    for key, known, refusals in (
        ("num-examples", "num-examples", set()),
        ("rare-cases", None, set()),
        ("rare-cases", "num-examples", {"WeightMismatch"}),
    ):
        lab = answering(lambda message: moved(1, message, metrics=metrics), Policy(weight_key=known))
        lab.weight_key = key
        assert lab.session(1, layout=Layout(32, 3, 4, 8.0, 8.0, ()))[1] == refusals
    unweighed = Federation(SecAgg(threshold=2), Policy(weight_key="num-examples"))
    assert unweighed.session(1)[0].result is not None, "where all weigh the same, no metric weighs"


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: type(protocol).__name__)
def test_the_order_of_records_is_bound(protocol: Any) -> None:
    """An app that takes the first ConfigRecord would train one node under another than the rest."""
    lab = Federation(protocol)

    def swap(content: RecordDict) -> None:
        if "config" in content:
            content["config"] = content.pop("config")

    more = {"decoy": ConfigRecord({"lr": 0.0})}
    assert lab.session(1, config={"lr": 1.0}, more=more, change=lambda stage: swap)[1] == {"BindingMismatch"}
    assert lab.trained == 0


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: type(protocol).__name__)
def test_the_group_of_the_message_is_bound(protocol: Any) -> None:
    """Apps read their round there: one far behind or ahead of the rest could be the only one whose steps count."""
    lab = Federation(protocol)
    original = lab.ask

    def later(message: Message) -> Message:
        if message.metadata.dst_node_id != 1:
            message.metadata = replace(message.metadata, group_id="1000000")
        return original(message)

    lab.ask = later  # type: ignore[method-assign]  # a late answer
    assert lab.session(1)[1] == {"BindingMismatch"}
    assert lab.trained == 1


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: type(protocol).__name__)
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


# --- what the app answers


def answering(reply: Callable[[Message], Message], policy: Policy = Policy()) -> Federation:
    lab = Federation(SecAgg(threshold=2), policy)
    lab.app = ClientApp(mods=[mods.secure_aggregation(policy, identity=identity_of)])
    lab.app.train()(lambda message, context: reply(message))
    return lab


def test_an_error_of_the_app_passes_as_it_is() -> None:
    def fail(message: Message) -> Message:
        return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, "Tired"), reply_to=message)

    assert answering(fail).session(1)[1] == {"Tired"}


@pytest.mark.parametrize("clip", [1e-3, 1.0, 2.0 * (1 - 2.0**-20), 2.0, 100.0])
def test_an_apps_own_update_is_cut_to_the_plans_clip_and_no_refusal_tells_its_norm(clip: float) -> None:
    """The update is 1 in four elements: its norm is 2."""
    layout = Layout(32, 3, 4, 8.0, None, ())
    server, refusals = own_update(np.ones(4, np.float32)).session(1, more={PLAN: ConfigRecord({"clip": clip})})
    assert refusals == set()
    assert server.result is not None
    np.testing.assert_allclose(layout.decode(server.result.total, 3).total, 3 * min(1, clip / 2), atol=1e-6)


@pytest.mark.parametrize("plan", [{}, {"clip": "wide"}, {"clip": float("nan")}, {"clip": 0.0}, {"clip": -1.0},
                                  {"clip": 1.0, "bit-weight": float("nan")}])  # fmt: skip
def test_a_plan_without_a_clip_is_refused(plan: dict[str, Any]) -> None:
    assert own_update(np.ones(4, np.float32)).session(1, more={PLAN: ConfigRecord(plan)})[1] == {"Refused"}


def own_update(values: Any) -> Federation:
    """Nodes whose app sends an update itself."""
    made: dict[str, Any] = {"arrays": ArrayRecord({"w": Array(values)}), UPDATE: ConfigRecord({})}
    return answering(lambda message: moved(0, message, **made))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("how", ["weights", "update", "clipped", "planned", "metric", "weight"])
def test_numbers_that_are_not_finite_make_no_node_refuse(how: str, value: float) -> None:
    """A server that picks the model could else make nodes overflow by their data, and read data from who refuses."""
    spoilt = np.full(4, value, np.float32)
    metrics = MetricRecord({"num-examples": 1, "loss": 1.0})
    more = {PLAN: ConfigRecord({"clip": 1.0})} if how == "planned" else {}
    layout = Layout(32, 3, 4, 8.0, None if more else 8.0, () if more else (("loss", 0.0, 2.0),))

    def reply(message: Message, context: Any) -> Message:
        given = MetricRecord(dict(metrics))
        if context.node_id != 2:
            return moved(1 / 4, message, metrics=given)
        if how in ("metric", "weight"):
            given["loss" if how == "metric" else "num-examples"] = float(value)
            return moved(1 / 4, message, metrics=given)
        # The model is -3e38, so that 3e38 is a change beyond float32.
        records: dict[str, Any] = {"arrays": ArrayRecord({"w": Array(spoilt)}), "metrics": given}
        return moved(0, message, **records, **({UPDATE: ConfigRecord({})} if how == "update" else {}))

    lab = Federation(SecAgg(threshold=2))
    inside = [mods.clip(10.0)] if how == "clipped" else [mods.clip()] if more else []
    lab.app = ClientApp(mods=[mods.secure_aggregation(Policy(), identity=identity_of), *inside])
    lab.app.train()(reply)
    lab.weight_key = "" if more else "num-examples"
    server, refusals = lab.session(1, layout=layout, more=more, value=-3e38 if how == "weights" else 0.0)
    assert refusals == set()
    assert server.result is not None


def test_a_node_without_finite_numbers_counts_for_nothing_and_is_counted() -> None:
    layout = Layout(32, 3, 4, 8.0, 8.0, (("loss", 0.0, 2.0),))

    def reply(message: Message, context: Any) -> Message:
        given = MetricRecord({"num-examples": 1, "loss": 1.0})
        return moved(float("nan") if context.node_id == 2 else 0.25, message, metrics=given)

    lab = Federation(SecAgg(threshold=2))
    lab.app = ClientApp(mods=[mods.secure_aggregation(Policy(), identity=identity_of)])
    lab.app.train()(reply)
    lab.weight_key = "num-examples"
    server, _ = lab.session(1, layout=layout)
    assert server.result is not None
    decoded = layout.decode(server.result.total, 3)
    assert (decoded.weight, decoded.clamped) == (2.0, 1)
    np.testing.assert_allclose(decoded.total * decoded.scale / decoded.weight, 0.25, rtol=1e-6)


def test_whether_an_update_is_refused_for_want_of_a_clip_tells_nothing_about_it() -> None:
    """A server names clips as it likes: an update that no mods.clip() made is refused under each, short or long."""
    for clip in (1e-9, 1.0, 1e9):
        lab = Federation(SecAgg(threshold=2))
        assert lab.session(1, more={PLAN: ConfigRecord({"clip": clip})})[1] == {"UpdateNotClipped"}


@pytest.mark.parametrize("layout", [
    Layout(32, 3, 4, 0.5, None), Layout(32, 3, 4, 8.0, 0.5), Layout(32, 3, 4, 8.0, 8.0, (("loss", 0.0, 1.0),)),
    Layout(32, 3, 4, 8.0, 8.0, (("loss", 90.0, 91.0),)), Layout(32, 3, 4, 1e-9, 1e-9, (("loss", 0.0, 1e-9),)),
])  # fmt: skip
def test_a_nodes_values_do_not_show_in_whether_it_refuses(layout: Layout) -> None:
    """The update is 1 in each element, the weight 1, the loss 50: no range that a server names makes nodes refuse."""

    def reply(message: Message) -> Message:
        return moved(1, message, metrics=MetricRecord({"num-examples": 1, "loss": 50.0}))

    lab = answering(reply)
    lab.weight_key = "num-examples"
    server, refusals = lab.session(1, layout=layout)
    assert refusals == set()
    assert server.result is not None
    decoded = layout.decode(server.result.total, 3)
    assert decoded.clamped == (3 if layout.counts else 0)
    np.testing.assert_allclose(decoded.total * decoded.scale / decoded.weight, min(1, layout.max_value), rtol=1e-6)


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

    lab.ask = ask  # type: ignore[method-assign]
    lab.shared = Assignment(lambda node: {}).shared
    assert lab.session(1, spoil=3)[1] == {"SessionOutOfOrder"}, "a damaged request, then the right one"
    assert lab.session(2, value=1.0)[1] == set(), "another session is another one"


def test_an_update_is_checked_like_full_weights() -> None:
    flag = ConfigRecord({})
    for key, shape, refusal in (("w", 4, set()), ("v", 4, {"UpdateError"}), ("w", 3, {"UpdateError"})):
        update = ArrayRecord({key: Array(np.ones(shape, np.float32))})
        lab = answering(lambda message, update=update: moved(0, message, arrays=update, **{UPDATE: flag}))  # type: ignore[misc]
        assert lab.session(1)[1] == refusal


@pytest.mark.parametrize("missing", [NOISED, DEMANDS, "", "bits", "min-survivors", "shape"])
def test_a_sum_of_noised_vectors_takes_nothing_else(missing: str) -> None:
    layout = Layout(32, 3, 8, 1.0, None, (), min_survivors=3, integers=True)

    def reply(message: Message) -> Message:
        size = 7 if missing == "shape" else 8
        records: dict[str, Any] = {
            NOISED: ArrayRecord({VECTOR: Array(np.ones(size, np.uint32))}),
            DEMANDS: ConfigRecord({"bits": 31 if missing == "bits" else 32, "min-survivors": 3}),
        }
        if missing == "min-survivors":
            records[DEMANDS] = ConfigRecord({"bits": 32, "min-survivors": 4})
        records.pop(missing, None)
        return moved(1, message, **records)

    refusals = {"": set(), NOISED: {"NoiseMissing"}, DEMANDS: {"NoiseMissing"}, "shape": {"RingOverflow"}}
    assert answering(reply).session(1, layout=layout)[1] == refusals.get(missing, {"WeakSession"})
