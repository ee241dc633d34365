"""Adaptive clipping: the clip follows a quantile of the norms, and update and bit together cost one round's noise.

Noise comes from the operating system; each statistical check raises a false alarm with probability below 10^-7.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed import mods
from privfed.array import Array
from privfed.context import Context
from privfed.distributed import Instruction, PlanLimits
from privfed.errors import PlanRefused, QuorumError
from privfed.grid import LocalGrid, MemoryRecorder
from privfed.message import Message
from privfed.plan import BIT, AdaptiveClip, PrivacyPlan, joint_clip, tracked
from privfed.privacy import Accountant, Gaussian
from privfed.privacy.adaptive import delta_multiplier
from privfed.privacy.distributed import solve_noise
from privfed.protocols import SecAgg
from privfed.record import ArrayRecord, ConfigRecord, RecordDict
from privfed.strategies import FedAvg, GroupedStage, SecureStage, Strategy
from privfed.update import PLAN, UPDATE, norm
from proofs_tests.plan.network import NONE, app_of, flat, model

CENTRAL, SHARED = {"relation": "zero_out"}, {"mechanism": "skellam", "max_dropped": 2}
RUNS = {
    "plain": (lambda: None, CENTRAL, None),
    "secure": (lambda: SecureStage(SecAgg(threshold=0.6)), CENTRAL, mods.secure_aggregation()),
    "grouped": (lambda: GroupedStage(SecAgg(threshold=2), 5), CENTRAL, mods.secure_aggregation()),
    "skellam": (lambda: SecureStage(SecAgg(threshold=0.6)), SHARED, mods.secure_aggregation()),
}


def passing(message: Message, context: Context, call_next: Any) -> Message:
    return call_next(message, context)


def run_of(
    kind: str, nodes: int, rounds: int, length: Any, size: int = 20, limits: PlanLimits | None = None, **changes: Any
) -> tuple[Any, list[np.ndarray]]:
    """Return the result and the model after each round; `length`: of the nodes' updates."""
    stage, terms, outer = RUNS[kind]
    plan = PrivacyPlan(**{"clip": 1.0, "noise_multiplier": 1.0, "adaptive": AdaptiveClip(), **terms, **changes})
    inner = mods.distributed_dp(limits) if plan.distributed else mods.clip()
    app = app_of(inner=[inner], outer=outer if outer is not None else passing, length=length)
    built = stage()
    strategy: Strategy = FedAvg(privacy=plan, **NONE, **({"stage": built} if built is not None else {}))
    models: list[np.ndarray] = []

    def keep(_: int, arrays: ArrayRecord) -> None:
        models.append(flat(arrays))

    return strategy.start(LocalGrid(app, nodes), model(size), rounds, evaluate_fn=keep), models


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize(("length", "start", "up"), [(8.0, 1.0, True), (0.05, 1.0, False)])
def test_the_clip_moves_towards_the_norms(kind: str, length: float, start: float, up: bool) -> None:
    result, _ = run_of(kind, 20, 4, length, clip=start, adaptive=AdaptiveClip(0.5, 0.4))
    clips = [entry["privacy"]["clip"] for entry in result.rounds]
    assert clips[0] == start
    # All bits agree, so the share within is 0 or 1; its noise has deviation 1/20: six of them leave 0.3 of 0.5.
    assert all((later > earlier) == up for earlier, later in pairwise(clips))
    for entry, after in zip(result.rounds, clips[1:], strict=False):
        share = min(1.0, max(0.0, entry["privacy"]["within-clip"]))
        assert after == pytest.approx(entry["privacy"]["clip"] * math.exp(-0.4 * (share - 0.5)), rel=1e-12)


@pytest.mark.parametrize("quantile", [0.3, 0.8])
def test_the_clip_settles_at_the_quantile(quantile: float) -> None:
    rule = AdaptiveClip(quantile, 0.5, bits_stddev=2.0)
    result, _ = run_of("plain", 50, 24, lambda node: node / 10, clip=1.0, adaptive=rule)
    late = [entry["privacy"]["clip"] for entry in result.rounds[-8:]]
    # Norms are 0.1 .. 5.0. Noise of 2 on the bits is 0.04 of the cohort; the rate halves what it does to log C.
    assert abs(np.mean(late) / (5 * quantile) - 1) < 0.25


@pytest.mark.parametrize("kind", RUNS)
def test_the_clip_of_this_round_scales_the_noise_of_this_round(kind: str) -> None:
    size, nodes, rounds = 3000, 10, 5
    result, models = run_of(kind, nodes, rounds, 0.0, size=size, adaptive=AdaptiveClip(0.5, 1.0, 2.0))
    clips, honest = [entry["privacy"]["clip"] for entry in result.rounds], 1.0
    if kind == "skellam":
        honest = nodes / (nodes - 2)  # nobody dropped: there is more noise than planned
    z = delta_multiplier(1.0, 2.0)
    for before, after, clip in zip(models, models[1:], clips, strict=False):
        deviation = z * clip * math.sqrt(honest) / nodes
        assert abs((after - before).std() / deviation - 1) < 5.6 / math.sqrt(2 * size) + 1e-3
    assert max(clips) > 1.3 * min(clips)


def test_the_bits_carry_the_stated_noise() -> None:
    rounds, stddev = 100, 3.0
    result, _ = run_of("plain", 10, rounds, 0.0, size=2, adaptive=AdaptiveClip(0.5, 1e-3, stddev))
    residuals = np.array([entry["privacy"]["within-clip"] - 1.0 for entry in result.rounds]) * 10
    assert abs(np.mean(residuals**2) / stddev**2 - 1) < 5.6 * math.sqrt(2 / rounds) + 0.2  # chi-square's skew
    assert abs(residuals.mean()) < 5.6 * stddev / math.sqrt(rounds)


def test_the_bits_of_nodes_with_their_own_noise_carry_it_too() -> None:
    rounds, nodes, stddev, clip = 300, 10, 3.0, 7.0
    plan = PrivacyPlan(clip=clip, noise_multiplier=1.0, adaptive=AdaptiveClip(0.5, 1e-3, stddev), **SHARED)
    asked = plan.parameters(nodes, 3, 1)
    weight = AdaptiveClip(bits_stddev=stddev).bit_weight(1.0, nodes) * clip
    told = Instruction(asked, bytes(32), clip=clip, bit_weight=weight)
    found = []
    for _ in range(rounds):
        vectors = [asked.encode(told.prepare(np.zeros(3), 0.0), told.seed) for _ in range(nodes)]
        total = np.add.reduce(vectors, dtype=np.uint64) & np.uint64((1 << asked.bits) - 1)
        found.append(asked.decode(total, told.seed, nodes)[-1] * told.joint / weight - nodes / 2)
    planned = stddev * math.sqrt(nodes / asked.honest)
    assert abs(np.mean(np.square(found)) / planned**2 - 1) < 5.6 * math.sqrt(2 / rounds) + 0.1
    assert abs(np.mean(found)) < 5.6 * planned / math.sqrt(rounds)


def test_a_round_costs_what_it_costs_without() -> None:
    accountant = Accountant(unit="client", relation="zero_out", observer="output")
    accountant.step(Gaussian(1.0), 3)
    result, _ = run_of("plain", 10, 3, 8.0)
    assert result.epsilon == pytest.approx(accountant.epsilon(1e-5).upper, rel=1e-9)
    fixed = run_of("skellam", 10, 3, 8.0, size=30, adaptive=None)[0].epsilon
    moving = run_of("skellam", 10, 3, 8.0, size=29)[0].epsilon  # with its bit as long as the other
    assert fixed is not None
    assert moving == pytest.approx(fixed, rel=1e-6)


def test_a_node_sees_one_event_whatever_the_clip() -> None:
    plan = PrivacyPlan(clip=1.0, noise_multiplier=1.0, adaptive=AdaptiveClip(), **SHARED)
    accountant = Accountant(unit="client", relation="zero_out", observer="server")
    accountant.step(plan.parameters(10, 20, 2).event, 2)
    limits = PlanLimits(max_epsilon=accountant.epsilon(1e-5).upper)
    result, _ = run_of("skellam", 10, 2, 8.0, limits=limits)
    assert result.rounds[0]["privacy"]["clip"] != result.rounds[1]["privacy"]["clip"]
    with pytest.raises(QuorumError, match="PlanRefused"):
        run_of("skellam", 10, 3, 8.0, limits=limits)


def test_a_resumed_run_goes_on_with_its_clip() -> None:
    recorder = MemoryRecorder()
    plan = PrivacyPlan(clip=1.0, noise_multiplier=1.0, adaptive=AdaptiveClip(learning_rate=0.5))
    app = app_of(inner=[mods.clip()], outer=passing, length=8.0)
    FedAvg(privacy=plan, **NONE).start(LocalGrid(app, 10, recorder=recorder), model(20), 3)
    again = MemoryRecorder(recorder.checkpoint)
    result = FedAvg(privacy=plan, **NONE).start(LocalGrid(app, 10, recorder=again), model(20), 4)
    last, share = (result.rounds[2]["privacy"][name] for name in ("clip", "within-clip"))
    expected = last * math.exp(-0.5 * (min(1.0, max(0.0, share)) - 0.5))
    assert result.rounds[3]["privacy"]["clip"] == pytest.approx(expected, rel=1e-12)


@given(st.floats(0, 1e6), st.floats(1e-6, 1e6), st.floats(0.05, 5), st.floats(6, 1e3), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_update_and_bit_keep_one_bound(length: float, clip: float, z: float, cohort: float, label: int) -> None:
    weight = AdaptiveClip().bit_weight(z, cohort) * clip
    values = np.random.default_rng(label).normal(size=7)
    values *= length / np.linalg.norm(values)
    joint, size = joint_clip(clip, weight), float(np.linalg.norm(values))
    # On a node with its own noise: everything over the joint bound.
    parameters = solve_noise(clip=1.0, noise_multiplier=z, nodes=10, dimension=8)
    vector = Instruction(parameters, bytes(32), clip=clip, bit_weight=weight).prepare(values, size)
    assert np.linalg.norm(vector) <= 1 + 1e-12
    assert math.copysign(1, vector[-1]) == (1 if size <= clip else -1)
    # On a node that clips only: in the units of the update.
    received = ArrayRecord([np.zeros(7)])
    content = RecordDict({"arrays": received, PLAN: ConfigRecord({"clip": clip, "bit-weight": weight})})
    answer = RecordDict({"arrays": ArrayRecord([values])})
    for chain in (mods.clip(), mods.compose(mods.clip(), mods.clip(clip * 3))):
        reply = chain(Message(content, 1, "train"), Context(), lambda m, c: Message(answer, reply_to=m))
        update = reply.content.array_records["arrays"]
        assert UPDATE in reply.content
        assert list(update) == list(tracked(received, weight))
        assert norm(update) <= joint * (1 + 1e-12)
        assert float(update[BIT].numpy()) == (weight / 2 if norm(ArrayRecord([values])) <= clip else -weight / 2)
    # What the budget is split into adds up to what was promised [ATMR21, Thm 1].
    stddev = max(cohort / 20, z)
    assert math.hypot(1, weight / clip / 2) * z == pytest.approx(delta_multiplier(z, stddev), rel=1e-9)
    assert math.hypot(1, weight / clip / 2) * z / (weight / clip) == pytest.approx(stddev, rel=1e-9)


@pytest.mark.parametrize("inner", [mods.adaptive_clip, mods.clip, lambda: mods.clip(0.5)])
def test_a_clip_inside_says_how_long_updates_were(inner: Any) -> None:
    """Half of the updates are 8 long, half 0.1: where a mod inside has clipped them, the bits still say so."""
    plan = PrivacyPlan(
        clip=1.0, noise_multiplier=0.05, adaptive=AdaptiveClip(bits_stddev=0.05), mechanism="skellam", bits=30
    )
    strategy = FedAvg(stage=SecureStage(SecAgg(threshold=0.6)), privacy=plan, **NONE)
    app = app_of(lambda node: 8.0 if node % 2 else 0.1, inner=[mods.distributed_dp(), inner()])
    result = strategy.start(LocalGrid(app, 10), model(20), 1)
    # The mean of ten bits has noise of sd 0.005: six of them.
    assert result.rounds[0]["privacy"]["within-clip"] == pytest.approx(0.5, abs=0.03)


def ask(mod: Any, message: Message, length: float = 3.0) -> tuple[Message, int]:
    asked: list[int] = []

    def answer(message: Message, context: Context) -> Message:
        asked.append(1)
        values = np.zeros(7)
        values[2] = length
        return Message(RecordDict({"arrays": ArrayRecord([values])}), reply_to=message)

    return mod(message, Context(), answer), len(asked)


def instructed(kind: str = "train", **plan: Any) -> Message:
    return Message(RecordDict({"arrays": ArrayRecord([np.zeros(7)]), PLAN: ConfigRecord(plan)}), 1, kind)


def test_the_mod_follows_a_plan_whose_clip_adapts_and_no_other() -> None:
    mod = mods.adaptive_clip()
    for length, bit in ((3.0, -0.25), (0.7, 0.25), (1.0, 0.25), (0.0, 0.25)):
        update = ask(mod, instructed(clip=1.0, **{"bit-weight": 0.5}), length)[0].content.array_records["arrays"]
        assert float(update[BIT].numpy()) == bit
        assert norm(update) == pytest.approx(math.hypot(min(1.0, length), 0.25), rel=1e-12)
    bare = Message(RecordDict({"arrays": ArrayRecord([np.zeros(7)])}), 1, "train")
    for weight in ({}, {"bit-weight": 0.0}, {"bit-weight": -1.0}, {"bit-weight": math.inf}, {"bit-weight": 1}):
        reply, asked = ask(mod, instructed(clip=1.0, **weight))
        assert (reply.error.reason, asked) == ("PlanRefused", 0)
    reply, asked = ask(mod, bare)
    assert (reply.error.reason, asked) == ("PlanRefused", 0)
    for kind in ("evaluate", "query"):  # no round of training: nothing adapts
        reply, asked = ask(mod, instructed(kind, clip=1.0))
        assert (reply.has_error(), asked) == (False, 1)


@pytest.mark.parametrize("kind", RUNS)
def test_the_mod_gives_what_clip_and_noise_give(kind: str) -> None:
    """In place of clip, and inside distributed_dp, the clip moves to the same quantile."""
    stage, terms, outer = RUNS[kind]
    plan = PrivacyPlan(clip=1.0, noise_multiplier=0.3, adaptive=AdaptiveClip(learning_rate=1.0), **terms)
    inner = [mods.distributed_dp(), mods.adaptive_clip()] if plan.distributed else [mods.adaptive_clip()]
    app = app_of(inner=inner, outer=outer if outer is not None else passing, length=6.0)
    built = stage()
    strategy = FedAvg(privacy=plan, **NONE, **({"stage": built} if built is not None else {}))
    result = strategy.start(LocalGrid(app, 10), model(20), 8)
    # Noise of about 0.5 on the sum of ten bits moves the log of the clip by at most 6 sqrt(8) 0.05 = 0.85 in all.
    assert 3.0 < result.rounds[-1]["privacy"]["clip"] < 20.0


@pytest.mark.parametrize("value", [0.0, 1e9, 0.25 + 1e-9, math.nan])
@pytest.mark.parametrize("make", [mods.adaptive_clip, mods.clip])
def test_a_bit_that_is_none_is_refused(make: Any, value: float) -> None:
    """An app that writes a bit itself could have sent any number in it."""

    def forged(message: Message, context: Context) -> Message:
        arrays = ArrayRecord({"0": Array(np.zeros(7)), BIT: Array(np.array(value))})
        return Message(RecordDict({"arrays": arrays, UPDATE: ConfigRecord({"relative": True})}), reply_to=message)

    reply = make()(instructed(clip=1.0, **{"bit-weight": 0.5}), Context(), forged)
    assert reply.error.reason == "UpdateError"


def test_bits_that_would_spend_more_than_there_is_are_refused() -> None:
    for terms in (CENTRAL, SHARED):
        plan = PrivacyPlan(clip=1.0, noise_multiplier=2.0, adaptive=AdaptiveClip(bits_stddev=1.0), **terms)
        stage = {"stage": SecureStage(SecAgg(threshold=0.6))}
        with pytest.raises(PlanRefused, match="bits_stddev"):
            FedAvg(privacy=plan, **stage, **NONE).start(LocalGrid(app_of(), 10), model(20), 1)


@pytest.mark.parametrize(
    "arguments",
    [{"quantile": 0.0}, {"quantile": 1.0}, {"learning_rate": 0.0}, {"learning_rate": math.inf}, {"bits_stddev": 0.0}],
)
def test_nonsense_is_refused_by_name(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        AdaptiveClip(**arguments)
