"""What a node insists on: a plan of distributed noise, its own limits, and a session that keeps what the plan says."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed import mods
from privfed.audit import check_mod
from privfed.context import Context
from privfed.distributed import Instruction, PlanLimits
from privfed.errors import QuorumError
from privfed.message import Error, ErrorCode, Message
from privfed.plan import PrivacyPlan
from privfed.privacy import Accountant
from privfed.privacy.distributed import NoiseParameters, solve_noise
from privfed.protocols import LightSecAgg, OneShot, SecAgg, SecAggPlus, keys
from privfed.protocols.errors import RemoteError
from privfed.protocols.session import Identity, Policy, Session
from privfed.record import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from privfed.ring import DEMANDS, NOISED, VECTOR, Layout, RingOverflow
from privfed.strategies import FedAvg, SecureStage
from privfed.strategies.exchange import Exchange
from privfed.update import PLAN
from proofs_tests.plan.network import NONE, Network, app_of, model

SIZE = 30
PARAMETERS = solve_noise(
    clip=1.0, noise_multiplier=2.0, nodes=10, dimension=SIZE, max_dropped=2, max_colluding=1, bits=20
)
INSTRUCTION = Instruction(PARAMETERS, bytes(range(32)))


def ask(
    mod: Any,
    instruction: Instruction | None = INSTRUCTION,
    *,
    kind: str = "train",
    context: Context | None = None,
    change: float = 0.01,
    calls: list[int] | None = None,
    plan: ConfigRecord | None = None,
) -> Message:
    content = RecordDict({"arrays": ArrayRecord([np.zeros(SIZE)])})
    if instruction is not None or plan is not None:
        content[PLAN] = plan if plan is not None else instruction.to_config()

    def app(message: Message, context: Context) -> Message:
        if calls is not None:
            calls.append(1)
        moved = message.content.array_records["arrays"].map(lambda values: values + change)
        return Message(RecordDict({"arrays": moved, "m": MetricRecord({"loss": 1.0})}), reply_to=message)

    return mod(Message(content, 1, kind), context if context is not None else Context(node_id=1), app)


def refusal(reply: Message) -> str:
    assert reply.has_error()
    assert reply.error.code == ErrorCode.POLICY_REFUSED
    return str(reply.error.reason)


@given(
    st.floats(1e-3, 1e3), st.floats(0.1, 100), st.integers(4, 200), st.integers(1, 5000), st.booleans(), st.binary(
        min_size=32, max_size=32
    )
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_an_instruction_is_what_was_written(
    clip: float, noise: float, nodes: int, size: int, insecure: bool, seed: bytes
) -> None:
    parameters = solve_noise(
        clip=clip, noise_multiplier=noise, nodes=nodes, dimension=size, bits=32, max_dropped=nodes // 4,
        max_colluding=1, drop_levels=(0, nodes // 4),
    )  # fmt: skip
    instruction = Instruction(parameters, seed, relation="replace_one", observer="output", insecure=insecure)
    assert Instruction.from_config(instruction.to_config()) == instruction
    assert {field.name for field in fields(NoiseParameters)} | {"mechanism", "seed", "insecure"} == {
        name.replace("-", "_") for name in instruction.to_config()
    } - {"unit", "relation", "observer"}


BAD: dict[str, Any] = {
    "mechanism": "gaussian", "clip": -1.0, "noise-multiplier": 0.0, "scale": 1, "beta": 2.0, "nodes": 3.0,
    "dimension": 0, "bits": 70, "max-dropped": 9, "max-colluding": -1, "seed": bytes(31), "insecure": 1, "unit": 1,
    "drop-levels": [1, 0], "bit-weight": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", [*BAD, *(f"no {name}" for name in INSTRUCTION.to_config())])
def test_a_malformed_plan_is_refused_before_the_app_runs(name: str) -> None:
    config, calls = INSTRUCTION.to_config(), []
    if name.startswith("no "):
        del config[name.removeprefix("no ")]
    else:
        config[name] = BAD[name]
    assert refusal(ask(mods.distributed_dp(), plan=config, calls=calls)) == "PlanRefused"
    assert calls == []


def test_a_message_without_such_a_plan_is_refused() -> None:
    assert check_mod(mods.distributed_dp(), refuses=True).passed
    calls: list[int] = []
    central = ConfigRecord({"mechanism": "gaussian", "clip": 1.0})
    assert refusal(ask(mods.distributed_dp(), plan=central, calls=calls)) == "PlanRefused"
    assert refusal(ask(mods.distributed_dp(), kind="evaluate", calls=calls)) == "PlanRefused"
    other = replace(INSTRUCTION, parameters=replace(PARAMETERS, dimension=SIZE + 1))
    assert refusal(ask(mods.distributed_dp(), other, calls=calls)) == "PlanRefused"
    assert calls == []


def test_discrete_gaussian_noise_too_small_for_its_sum_is_refused() -> None:
    small = replace(PARAMETERS, mechanism="discrete_gaussian", scale=1.0)
    assert refusal(ask(mods.distributed_dp(), replace(INSTRUCTION, parameters=small))) == "PlanRefused"
    fine = replace(PARAMETERS, mechanism="discrete_gaussian")
    assert not ask(mods.distributed_dp(), replace(INSTRUCTION, parameters=fine)).has_error()


def test_only_a_noised_vector_leaves() -> None:
    reply = ask(mods.distributed_dp())
    assert set(reply.content) == {NOISED, DEMANDS}
    assert set(reply.content.array_records[NOISED]) == {VECTOR}
    vector = reply.content.array_records[NOISED][VECTOR].numpy()
    assert (vector.dtype, vector.shape) == (np.uint32, (PARAMETERS.padded,))
    assert dict(reply.content.config_records[DEMANDS]) == {"bits": 20, "min-survivors": 8}
    again = ask(mods.distributed_dp()).content.array_records[NOISED][VECTOR].numpy()
    assert not np.array_equal(vector, again)


def test_an_error_stays_an_error_and_nan_leaves_as_noise() -> None:
    failed = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "KeyError")
    content = RecordDict({"arrays": ArrayRecord([np.zeros(SIZE)]), PLAN: INSTRUCTION.to_config()})
    context = Context(node_id=1)
    reply = mods.distributed_dp()(Message(content, 1, "train"), context, lambda m, c: Message(failed, reply_to=m))
    assert reply.error == failed
    assert context.mod_states.get("distributed_dp", RecordDict()) == RecordDict()  # nothing left, nothing counted
    spoilt = ask(mods.distributed_dp(), change=float("nan"), context=context)
    assert not spoilt.has_error()
    assert context.mod_states["distributed_dp"], "an error would tell of the node's data: zeros and noise are paid for"


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (PlanLimits(min_noise_multiplier=2.1), "noise multiplier 2 is below"),
        (PlanLimits(max_clip=0.9), "clip 1 is above"),
        (PlanLimits(min_nodes=11), "a cohort of 10 nodes"),
        (PlanLimits(corrupt=0.2), "1 colluding nodes, this node assumes 2 of 10"),
        (PlanLimits(max_epsilon=0.5), "with this round epsilon would be"),
    ],
)
def test_a_weaker_plan_than_the_node_allows_is_refused(limits: PlanLimits, text: str, caplog: Any) -> None:
    calls: list[int] = []
    assert refusal(ask(mods.distributed_dp(limits), calls=calls)) == "PlanRefused"
    assert text in caplog.text
    assert calls == []
    loose = PlanLimits(max_epsilon=50, min_noise_multiplier=2.0, max_clip=1.0, corrupt=0.1, min_nodes=10)
    assert not ask(mods.distributed_dp(loose)).has_error()


def test_terms_that_the_noise_does_not_prove_are_refused() -> None:
    for changes in ({"relation": "add_remove"}, {"unit": "record"}):
        assert refusal(ask(mods.distributed_dp(), replace(INSTRUCTION, **changes))) == "PlanRefused"


def test_a_node_counts_its_own_spending_over_a_run() -> None:
    accountant = Accountant(unit="client", relation="zero_out", observer="server")
    accountant.step(PARAMETERS.event, 3)
    context, mod = Context(node_id=1), mods.distributed_dp(PlanLimits(max_epsilon=accountant.epsilon(1e-5).upper))
    for _ in range(3):
        assert not ask(mod, context=context).has_error()
    assert refusal(ask(mod, context=context)) == "PlanRefused"
    # Other parameters add to the same account, in either order.
    weaker = replace(INSTRUCTION, parameters=replace(PARAMETERS, noise_multiplier=4.0))
    assert refusal(ask(mod, weaker, context=context)) == "PlanRefused"
    assert not ask(mod, context=Context(node_id=1)).has_error()


@pytest.mark.parametrize(
    "arguments",
    [{"max_epsilon": 0.0}, {"delta": 0.0}, {"min_noise_multiplier": -1.0}, {"max_clip": 0.0}, {"corrupt": 1.0}],
)
def test_nonsense_limits_are_refused_by_name(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        PlanLimits(**arguments)


# --- what the masking mod adds ----------------------------------------------------------------------------------


class Tampering(SecureStage):
    """A server that lays the session out to its liking."""

    changes: dict[str, Any] = {}  # noqa: RUF012 - set by each test

    def drive(self, exchange: Exchange, layout: Layout) -> Any:
        return super().drive(exchange, replace(layout, **self.changes))


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"min_survivors": 7}, "WeakSession"),
        ({"bits": 24}, "WeakSession"),
        ({"dimension": 16}, "RingOverflow"),
        ({"integers": False, "dimension": 20}, "UpdateError"),
    ],
)
def test_a_session_that_does_not_keep_the_plan_gets_no_vector(changes: dict[str, Any], cause: str) -> None:
    plan = PrivacyPlan(clip=1.0, noise_multiplier=2.0, mechanism="skellam", max_dropped=2)
    stage = Tampering(SecAgg(threshold=5))
    stage.changes = changes
    with pytest.raises(QuorumError, match=cause):
        FedAvg(stage=stage, privacy=plan, **NONE).start(Network(app_of(), 10), model(20), 1)


def test_an_update_without_noise_is_not_masked_as_if_it_had_some() -> None:
    plan = PrivacyPlan(clip=1.0, noise_multiplier=2.0, mechanism="skellam", max_dropped=2)
    strategy = FedAvg(stage=SecureStage(SecAgg(threshold=5)), privacy=plan, **NONE)
    with pytest.raises(QuorumError, match="NoiseMissing"):
        strategy.start(Network(app_of(inner=[mods.clip()]), 10), model(20), 1)
    strategy.start(Network(app_of(inner=[mods.distributed_dp(), mods.clip()]), 10), model(20), 1)


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(31, np.uint32),
        np.zeros(32, np.uint64),
        np.zeros(32, np.int32),
        np.full(32, 1 << 20, np.uint32),
        np.zeros((32, 1), np.uint32),
    ],
    ids=["short", "wide", "signed", "large", "shape"],
)
def test_a_layout_admits_only_ring_elements(vector: np.ndarray) -> None:
    layout = Layout(20, 5, 32, 1.0, None, min_survivors=4, integers=True)
    assert Layout.from_config(layout.to_config()) == layout
    assert layout.admit(np.full(32, (1 << 20) - 1, np.uint32)).size == layout.size == 32
    with pytest.raises(RingOverflow):
        layout.admit(vector)
    with pytest.raises(ValueError, match="integers"):
        Layout(20, 5, 32, 1.0, 5.0, integers=True)


@pytest.mark.parametrize(
    "protocol",
    [
        SecAgg(threshold=4),
        SecAgg(threshold=6, mode="active", corrupt=0.1),
        SecAggPlus(neighbours=8, threshold=2, corrupt=0.1),
        LightSecAgg(threshold=6),
        OneShot(threshold=7, corrupt=2),
    ],
    ids=repr,
)
@pytest.mark.parametrize("floor", [7, 8])
def test_no_protocol_opens_a_sum_below_a_nodes_floor(protocol: Any, floor: int) -> None:
    """Seven of ten nodes give their input; a node that insists on eight helps nobody to open the sum."""
    nodes = tuple(range(1, 11))
    signing = {node: os.urandom(32) for node in nodes}
    roster = {node: keys.signing_public(key) for node, key in signing.items()}
    session = Session(1, 1, "train", nodes, 4, 20)
    server = protocol.server(session)
    clients = {
        node: protocol.client(node, identity=Identity(node, signing[node], roster), policy=Policy(min_survivors=floor))
        for node in nodes
    }
    kept = dict.fromkeys(nodes, b"")
    refused: set[str] = set()
    given = "send" if "send" in protocol.stages else "mask"
    gone: set[int] = set()
    for stage in protocol.stages:
        gone |= {2, 5, 8} if stage == given else set()
        for node, request in server.outbound().items():
            if node in gone:
                continue
            try:
                kept[node], reply = clients[node].step(kept[node], request, lambda: np.ones(4, np.uint32))
                server.receive(node, reply)
            except RemoteError as fault:
                refused.add(fault.deviation)
        if refused:
            break
        server.close()
    if floor == 8:
        assert refused <= {"too-few-survivors", "cohort-too-small"}
        assert refused
        assert server.result is None
    else:
        assert server.result.total.tolist() == [7] * 4
