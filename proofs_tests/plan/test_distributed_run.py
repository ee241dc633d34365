"""A run under distributed noise: the sum and the planned noise, paid for before it is opened, or nothing.

Noise comes from the operating system; each statistical check raises a false alarm with probability below 10^-7.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from privfed import mods
from privfed.errors import PlanRefused, QuorumError, RunFailed
from privfed.grid import MemoryRecorder
from privfed.plan import AdaptiveClip, PrivacyPlan
from privfed.privacy.ledger import Ledger
from privfed.privacy.sampling import AvailabilitySampler, FixedSizeSampler, PoissonSampler
from privfed.protocols import LightSecAgg, SecAgg, SecAggPlus
from privfed.ring import REPLY
from privfed.strategies import FedAdam, FedAvg, GroupedStage, SecureStage
from proofs_tests.plan.network import NONE, Network, app_of, flat, model, update_of
from proofs_tests.strategies.toy import Toy

NODES, SIZE = 20, 1 << 12
MASK = 2  # the stage at which nodes give their input, in all protocols here
PROTOCOLS = [
    SecAgg(threshold=0.6),
    SecAggPlus(neighbours=12, threshold=4, dropout=0.3, corrupt=0.1),
    LightSecAgg(threshold=13),
]
SIGMAS = 5.6  # two-sided normal: 2 * 10^-8


def plan_of(**changes: Any) -> PrivacyPlan:
    given: dict[str, Any] = {"clip": 1.0, "noise_multiplier": 1.5, "mechanism": "skellam", "max_dropped": 0.3}
    return PrivacyPlan(**{**given, "max_colluding": 2, **changes})


def secure(protocol: Any = PROTOCOLS[0], **arguments: Any) -> FedAvg:
    return FedAvg(stage=SecureStage(protocol), privacy=plan_of(**arguments), **NONE)


def gone(count: int, stage: int = MASK) -> dict[int, int]:
    return dict.fromkeys(range(3, 3 + count), stage)


@pytest.mark.parametrize("dropped", [0, 2, 6])
@pytest.mark.parametrize(
    ("protocol", "mechanism", "adaptive"),
    [
        *((protocol, "skellam", None) for protocol in PROTOCOLS),
        (PROTOCOLS[0], "discrete_gaussian", None),
        (PROTOCOLS[0], "skellam", AdaptiveClip()),
        (PROTOCOLS[1], "discrete_gaussian", AdaptiveClip()),
    ],
    ids=["SecAgg", "SecAggPlus", "LightSecAgg", "discrete Gaussian", "adaptive", "discrete Gaussian, adaptive"],
)
def test_the_sum_carries_the_planned_noise_whoever_drops(
    protocol: Any, mechanism: str, adaptive: AdaptiveClip | None, dropped: int
) -> None:
    grid = Network(app_of(length=1.5), NODES, gone(dropped))
    result = secure(protocol, mechanism=mechanism, adaptive=adaptive).start(grid, model(SIZE), 1, timeout=60)
    assert result.rounds[0]["privacy"]["mechanism"] == mechanism
    there = [node for node in range(1, NODES + 1) if node not in gone(dropped)]
    clipped = sum(update_of(node, SIZE, 1.0) for node in there)
    noise = flat(result.arrays) * NODES - clipped
    # Each node's share is planned for 20 - 6 - 2 honest survivors; rounding adds less than 10^-6 of it.
    planned = 1.5**2 * len(there) / (NODES - 6 - 2)
    share = planned / len(there)
    if adaptive is not None:  # bits noised with deviation 1.5 leave 1.5 / sqrt(1 - 1/4) for the update
        planned, share = planned / (1 - 1 / 4), share / (1 - 1 / 4)
    assert abs(np.mean(noise**2) / planned - 1) < SIGMAS * math.sqrt(2 / SIZE)
    assert abs(noise.mean()) < SIGMAS * math.sqrt(planned / SIZE)
    assert abs(stats.kurtosis(noise)) < SIGMAS * math.sqrt(24 / SIZE) + 0.1  # the fourth moment's own tail
    assert stats.kstest(noise / math.sqrt(planned), "norm").pvalue > 1e-8
    # Were six shares missing, the first check would say so.
    assert abs(planned / (planned - 6 * share) - 1) > SIGMAS * math.sqrt(2 / SIZE)


@pytest.mark.parametrize("adaptive", [None, AdaptiveClip()])
def test_short_floats_carry_the_same_noise(adaptive: AdaptiveClip | None) -> None:
    strategy = secure(adaptive=adaptive)
    result = strategy.start(Network(app_of(length=1.5), NODES), model(SIZE, "float32"), 1)
    assert {array.dtype for array in result.arrays.values()} == {"float32"}
    noise = flat(result.arrays) * NODES - sum(update_of(node, SIZE, 1.0) for node in range(1, NODES + 1))
    planned = 1.5**2 * NODES / (NODES - 6 - 2)
    if adaptive is not None:
        planned *= 1 / (1 - 1 / 4)  # bits noised with deviation 1.5 leave 1.5 / sqrt(1 - 1/4) for the update
    assert abs(np.mean(noise**2) / planned - 1) < SIGMAS * math.sqrt(2 / SIZE)


def independent_epsilon(
    multiplier: float, scale: float, honest: int, dimension: int, rounds: int, delta: float
) -> float:
    """[AKL21, Thm 3.5] with [KLS21, Prop 22] and the conversion of [CKS20, Prop 12], written out once more."""
    clip_steps, root = scale, math.sqrt(dimension)
    beta_slack = math.sqrt(2 * 0.5)  # beta = exp(-1/2)
    square = min((clip_steps + root) ** 2, clip_steps**2 + dimension / 4 + beta_slack * (clip_steps + root / 2))
    l2 = math.sqrt(square)
    l1 = min(root * l2, square)
    variance = honest * (multiplier * scale / math.sqrt(honest)) ** 2
    best = math.inf
    for order in range(2, 2000):
        extra = min(((2 * order - 1) * square + 6 * l1) / (4 * variance**2), 3 * l1 / (2 * variance))
        divergence = rounds * (order * square / (2 * variance) + extra)
        best = min(best, divergence + math.log1p(-1 / order) - math.log(delta * order) / (order - 1))
    return best


def test_epsilon_is_that_of_an_independent_computation() -> None:
    strategy = secure(max_dropped=4, max_colluding=2)
    result = strategy.start(Network(app_of(), NODES), model(500), 3)
    scale = plan_of(max_dropped=4, max_colluding=2).parameters(NODES, 500, 3).scale
    for number, entry in enumerate(result.rounds, start=1):
        wanted = independent_epsilon(1.5, scale, 14, 512, number, 1e-5)
        assert entry["privacy"]["epsilon"] == pytest.approx(wanted, rel=2e-3)  # the accountant's orders are a grid
        assert entry["privacy"]["epsilon"] >= wanted * (1 - 1e-9)
    said = result.rounds[0]["privacy"]
    assert (said["observer"], said["relation"], said["unit"]) == ("server", "zero_out", "client")
    assert (said["mechanism"], said["max-dropped"], said["max-colluding"], said["bits"]) == ("skellam", 4, 2, 20)


def test_a_budget_is_kept_and_used() -> None:
    plan = plan_of(noise_multiplier=None, epsilon=6.0, max_dropped=2)
    strategy = FedAvg(stage=SecureStage(PROTOCOLS[0]), privacy=plan, **NONE)
    result = strategy.start(Network(app_of(), NODES), model(100), 4)
    assert result.epsilon is not None
    assert 5.99 < result.epsilon <= 6.0
    more = PrivacyPlan(**{**plan_arguments(plan), "rounds": 2})
    with pytest.raises(RunFailed, match="round 3 was not started: budget of"):
        FedAvg(stage=SecureStage(PROTOCOLS[0]), privacy=more, **NONE).start(Network(app_of(), NODES), model(100), 3)


def plan_arguments(plan: PrivacyPlan) -> dict[str, Any]:
    return {name: getattr(plan, name) for name in plan.__dataclass_fields__}


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: type(protocol).__name__)
def test_too_many_drops_open_and_cost_nothing(protocol: Any, tmp_path: Path) -> None:
    recorder = MemoryRecorder()
    recorder.ledger_path = tmp_path / "ledger.jsonl"
    grid = Network(app_of(), NODES, gone(7), recorder=recorder)
    with pytest.raises(QuorumError, match="13 nodes answered at stage 'mask', 14 are needed"):
        secure(protocol).start(grid, model(50), 1)
    assert max(grid.stages) == MASK  # nobody was asked to open anything
    assert Ledger.read(recorder.ledger_path).entries == ()


class Careless(SecureStage):
    """A server that opens whatever it has."""

    def _authorise(self, exchange: Any, drive: Any) -> None:
        return


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: type(protocol).__name__)
def test_nodes_themselves_open_no_sum_with_too_little_noise(protocol: Any) -> None:
    strategy = FedAvg(stage=Careless(protocol), privacy=plan_of(), **NONE)
    with pytest.raises(QuorumError, match="RemoteError"):
        strategy.start(Network(app_of(), NODES, gone(7)), model(50), 1)
    with pytest.raises(RuntimeError, match="opened no sum that was charged before"):
        strategy.start(Network(app_of(), NODES, gone(6)), model(50), 1)


def test_the_round_is_charged_before_the_sum_is_opened(tmp_path: Path) -> None:
    for dies, charges in ((3, 1), (2, 0)):
        recorder = MemoryRecorder()
        recorder.ledger_path = tmp_path / f"{dies}.jsonl"
        with pytest.raises(KeyboardInterrupt):
            secure().start(Network(app_of(), NODES, dies=dies, recorder=recorder), model(50), 1)
        assert len(Ledger.read(recorder.ledger_path).entries) == charges


def test_nothing_but_masked_integers_leaves_a_node() -> None:
    grid = Network(app_of(), NODES)
    result = secure().start(grid, model(50), 1)
    assert {name for reply in grid.replies for name in reply.content} == {REPLY}
    assert set(result.rounds[0]) == {"round", "train", "privacy"}
    assert result.rounds[0]["train"] == {}


def test_a_cohort_that_cannot_add_enough_noise_is_not_asked() -> None:
    grid = Network(app_of(), 13)
    with pytest.raises(RunFailed, match="13 nodes are there, and the plan needs the noise of 14 of 20"):
        secure(population=20).start(grid, model(50), 1)
    assert grid.stages == []
    # Fewer than planned are as good as dropped; more are left out.
    secure(population=20).start(Network(app_of(), 15), model(50), 1)
    grid = Network(app_of(), 25)
    secure(population=20).start(grid, model(50), 1)
    assert len(grid.replies) == 20 * 4


def test_noise_is_fresh_and_its_seed_is_only_a_tests() -> None:
    def start(inner: Any, insecure: int | None) -> np.ndarray:
        recorder = MemoryRecorder(insecure_test_randomness=insecure)
        grid = Network(app_of(inner=[inner]), NODES, recorder=recorder, seed=1)
        result = secure().start(grid, model(50), 2)
        assert result.epsilon is not None
        assert math.isinf(result.epsilon) == (insecure is not None)
        return flat(result.arrays)

    assert not np.any(start(mods.distributed_dp(), None) == start(mods.distributed_dp(), None))
    assert not np.any(start(mods.distributed_dp(), 5) == start(mods.distributed_dp(), 5))
    seeded = mods.distributed_dp(insecure_test_randomness=7)
    assert start(seeded, 5).tobytes() == start(seeded, 5).tobytes()
    with pytest.raises(QuorumError, match="PlanRefused"):
        start(seeded, None)


def test_server_optimisers_and_fixed_cohorts() -> None:
    sampler = FixedSizeSampler(12, 20)
    plan = plan_of(sampler=sampler, relation="replace_one", max_colluding=1, observer="output")
    result = FedAdam(stage=SecureStage(SecAgg(threshold=0.6)), privacy=plan, **NONE).start(
        Network(app_of(), 20), model(50), 1
    )
    assert result.rounds[0]["privacy"]["cohort"] == 12.0
    plan = plan_of(sampler=AvailabilitySampler(12), max_colluding=1, relation="replace_one", observer="output")
    unsampled = FedAvg(stage=SecureStage(SecAgg(threshold=0.6)), privacy=plan, **NONE).start(
        Network(app_of(), 20), model(50), 1
    )
    assert result.epsilon is not None
    assert unsampled.epsilon is not None
    assert result.epsilon == unsampled.epsilon  # no amplification is claimed


@pytest.mark.parametrize(
    ("stage", "text"),
    [
        (None, "PlainStage"),
        (GroupedStage(SecAgg(threshold=2), 3), "GroupedStage"),
        (SecureStage(Toy()), "opens the sum at that very stage"),
    ],
    ids=["plain", "grouped", "toy"],
)
def test_a_stage_that_shows_more_than_the_noised_sum_is_refused(stage: Any, text: str) -> None:
    with pytest.raises(PlanRefused, match=text):
        FedAvg(stage=stage, privacy=plan_of(), **NONE)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"relation": "add_remove"}, PlanRefused, "adds no noise either"),
        ({"sampler": PoissonSampler(0.1)}, PlanRefused, "PoissonSampler"),
        ({"observer": "world"}, PlanRefused, "world"),
        ({"mechanism": "laplace"}, ValueError, "mechanism"),
        ({"max_dropped": -1}, ValueError, "max_dropped"),
        ({"max_colluding": 1.0}, ValueError, "max_colluding"),
        ({"wrap_probability": 0.0}, ValueError, "wrap_probability"),
        ({"mechanism": "gaussian"}, PlanRefused, "max_dropped"),
        ({"mechanism": "gaussian", "max_dropped": 0, "max_colluding": 0, "observer": "server"}, PlanRefused, "skellam"),
    ],
)
def test_what_a_plan_cannot_claim(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        plan_of(**changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"max_dropped": 18}, "leave nobody"),
        ({"bits": 8}, "bits"),
        ({"noise_multiplier": None, "epsilon": 1e-3, "bits": 12}, "epsilon"),
    ],
)
def test_a_plan_that_does_not_suit_the_cohort_is_refused_before_anything_is_sent(
    changes: dict[str, Any], text: str
) -> None:
    grid = Network(app_of(), NODES)
    with pytest.raises(PlanRefused, match=text):
        secure(**changes).start(grid, model(5000), 1)
    assert grid.stages == []
