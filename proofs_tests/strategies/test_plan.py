"""Central differential privacy: the right noise on a clipped sum, charged before release, refused when unproved."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privfed import mods, strategies
from privfed.apps import ClientApp
from privfed.array import Array
from privfed.context import Context
from privfed.errors import PlanRefused, QuorumError, RunFailed
from privfed.grid import LocalGrid, MemoryRecorder
from privfed.message import Message
from privfed.plan import PrivacyPlan
from privfed.privacy import Accountant, Gaussian, calibrate
from privfed.privacy.ledger import Ledger
from privfed.privacy.sampling import AvailabilitySampler, FixedSizeSampler, PoissonSampler
from privfed.protocols import SecAgg
from privfed.record import ArrayRecord, MetricRecord, RecordDict
from privfed.strategies import (
    RFA,
    SCAFFOLD,
    Bulyan,
    CenteredClipping,
    FedAdam,
    FedAvg,
    FedBuff,
    FedMedian,
    FedNova,
    FedTrimmedAvg,
    FedXgbBagging,
    FLTrust,
    GroupedStage,
    Krum,
    MultiKrum,
    QFedAvg,
    SecureStage,
    Strategy,
)
from privfed.update import PLAN

NONE = {"fraction_evaluate": 0.0}
SIZE = 4000


def app_of(
    *, change: float = 0.0, clipped: bool = True, masked: bool = False, seen: list[Any] | None = None
) -> ClientApp:
    """Every node moves every element by `change`."""
    outer = [mods.secure_aggregation()] if masked else []
    app = ClientApp(mods=[*outer, *([mods.clip()] if clipped else [])])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if seen is not None:
            seen.append((context.node_id, message.content.config_records[PLAN]["clip"]))
        moved = message.content.array_records["arrays"].map(lambda x: x + x.dtype.type(change))
        metrics = MetricRecord({"num-examples": 10**6, "loss": 0.123})
        return Message(RecordDict({"arrays": moved, "metrics": metrics}), reply_to=message)

    return app


def model(size: int = SIZE) -> ArrayRecord:
    return ArrayRecord({"w": Array(np.zeros(size - 1)), "b": Array(np.array(0.0))})


def flat(arrays: ArrayRecord) -> np.ndarray:
    return np.concatenate([array.numpy().reshape(-1) for array in arrays.values()])


class DirectoryRecorder(MemoryRecorder):
    """Keeps the ledger in a folder."""

    def __init__(self, folder: Path, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.ledger_path = folder / "ledger.jsonl"


STAGES = [
    (None, False),
    (lambda: SecureStage(SecAgg(threshold=3)), True),
    (lambda: GroupedStage(SecAgg(threshold=2), 3), True),
]


@pytest.mark.parametrize(("stage", "masked"), STAGES, ids=["plain", "secure", "grouped"])
def test_noise_has_the_stated_scale_and_the_sum_is_of_clipped_updates(stage: Any, masked: bool) -> None:
    plan = PrivacyPlan(clip=2.0, noise_multiplier=1.5)
    grid = LocalGrid(app_of(change=5.0, masked=masked), 6)
    arguments = {"stage": stage()} if stage else {}
    result = FedAvg(privacy=plan, **arguments, **NONE).start(grid, model(), 1)
    noise = flat(result.arrays) - 2.0 / math.sqrt(SIZE)  # each of 6 updates is clipped to norm 2, uniform weights
    deviation = 1.5 * 2.0 / 6
    # Both tests fail by chance with probability below 2 * 10^-8 (5.6 standard errors).
    assert abs(noise.mean()) < 5.6 * deviation / math.sqrt(SIZE)
    assert abs(noise.std() / deviation - 1) < 5.6 / math.sqrt(2 * SIZE) + 1e-3
    privacy = result.rounds[0]["privacy"]
    accountant = Accountant(unit="client", relation="add_remove", observer="output")
    accountant.step(Gaussian(1.5))
    assert privacy["epsilon"] == pytest.approx(accountant.epsilon(1e-5).upper, rel=1e-9)
    assert {key: privacy[key] for key in ("unit", "relation", "observer", "delta", "noise-multiplier", "cohort")} == {
        "unit": "client",
        "relation": "add_remove",
        "observer": "output",
        "delta": 1e-5,
        "noise-multiplier": 1.5,
        "cohort": 6.0,
    }
    assert result.epsilon == privacy["epsilon"]


def test_noise_is_fresh_in_every_round_and_run() -> None:
    plan = PrivacyPlan(clip=1.0, noise_multiplier=1.0)
    runs = [FedAvg(privacy=plan, **NONE).start(LocalGrid(app_of(), 3, seed=1), model(50), 2) for _ in range(2)]
    assert not np.any(flat(runs[0].arrays) == flat(runs[1].arrays))


def test_client_metrics_weights_and_counts_are_not_released() -> None:
    result = FedAvg(privacy=PrivacyPlan(clip=1.0, noise_multiplier=1.0), **NONE).start(
        LocalGrid(app_of(), 3), model(50), 1
    )
    assert result.train_metrics_clientapp.get(1, MetricRecord()) == MetricRecord()
    assert set(result.rounds[0]) == {"round", "train", "privacy"}


def test_nodes_are_told_the_clip() -> None:
    seen: list[Any] = []
    FedAvg(privacy=PrivacyPlan(clip=0.25, noise_multiplier=1.0), **NONE).start(
        LocalGrid(app_of(seen=seen), 3), model(50), 1
    )
    assert seen == [(1, 0.25), (2, 0.25), (3, 0.25)]


@pytest.mark.parametrize("masked", [False, True])
def test_an_update_that_is_not_clipped_does_not_count(masked: bool) -> None:
    arguments = {"stage": SecureStage(SecAgg(threshold=2), max_value=100)} if masked else {}
    strategy = FedAvg(privacy=PrivacyPlan(clip=1.0, noise_multiplier=1.0), **arguments, **NONE)
    cause = "UpdateNotClipped" if masked else r"mods\.clip\(\)"
    with pytest.raises(QuorumError, match=cause):
        strategy.start(LocalGrid(app_of(change=5.0, clipped=False, masked=masked), 3), model(50), 1)
    short = LocalGrid(app_of(change=1e-3, clipped=False, masked=masked), 3)
    if masked:  # a node that refused by the length of its update would tell it
        with pytest.raises(QuorumError, match=cause):
            strategy.start(short, model(50), 1)
    else:
        strategy.start(short, model(50), 1)


def test_calibrated_noise_keeps_the_budget_and_epsilon_rises_to_it() -> None:
    plan = PrivacyPlan(clip=1.0, epsilon=4.0, delta=1e-5)
    result = FedAvg(privacy=plan, **NONE).start(LocalGrid(app_of(), 4), model(50), 3)
    spent = [entry["privacy"]["epsilon"] for entry in result.rounds]
    assert spent == sorted(spent)
    assert 3.9 < spent[-1] <= 4.0
    z = calibrate(Gaussian, count=3, epsilon=4.0, delta=1e-5)
    assert result.rounds[0]["privacy"]["noise-multiplier"] == pytest.approx(z, rel=1e-6)
    assert result.rounds[0]["privacy"]["budget"] == 4.0


def test_a_round_beyond_the_budget_is_refused_before_anything_is_sent() -> None:
    seen: list[Any] = []
    recorder = MemoryRecorder()
    plan = PrivacyPlan(clip=1.0, epsilon=4.0, delta=1e-5, rounds=2)
    with pytest.raises(RunFailed, match="round 3 was not started: budget of"):
        FedAvg(privacy=plan, **NONE).start(LocalGrid(app_of(seen=seen), 4, recorder=recorder), model(50), 5)
    assert len(seen) == 8
    assert recorder.checkpoint is not None
    assert recorder.checkpoint.round == 2


def test_the_ledger_is_charged_before_the_release_and_survives_a_resume(tmp_path: Path) -> None:
    plan = PrivacyPlan(clip=1.0, epsilon=6.0, delta=1e-5, rounds=4)

    class Stops(DirectoryRecorder):
        def commit(self, checkpoint: Any) -> None:
            if checkpoint.round == 2:
                raise KeyboardInterrupt
            super().commit(checkpoint)

    recorder = Stops(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        FedAvg(privacy=plan, **NONE).start(LocalGrid(app_of(), 4, recorder=recorder), model(50), 2)
    assert [entry.round for entry in Ledger.read(recorder.ledger_path).entries] == [1, 2]
    again = DirectoryRecorder(tmp_path, checkpoint=recorder.checkpoint)
    result = FedAvg(privacy=plan, **NONE).start(LocalGrid(app_of(), 4, recorder=again), model(50), 2)
    ledger = Ledger.read(recorder.ledger_path)
    assert [entry.round for entry in ledger.entries] == [1, 2, 2]  # round 2 was perhaps seen: it counts twice
    assert result.epsilon == ledger.spent
    other = DirectoryRecorder(tmp_path)
    with pytest.raises(PlanRefused, match="was started under"):
        FedAvg(privacy=PrivacyPlan(clip=1.0, epsilon=9.0, rounds=4), **NONE).start(
            LocalGrid(app_of(), 4, recorder=other), model(50), 2
        )


def test_insecure_test_randomness_is_bit_identical_and_worth_nothing() -> None:
    plan = PrivacyPlan(clip=1.0, epsilon=1.0, rounds=1, sampler=PoissonSampler(0.5), relation="add_remove")

    def start(masked: bool) -> Any:
        grid = LocalGrid(app_of(change=0.1, masked=masked), 12, recorder=MemoryRecorder(insecure_test_randomness=5))
        stage = {"stage": SecureStage(SecAgg(threshold=2))} if masked else {}
        return FedAvg(privacy=plan, min_train_nodes=1, **stage, **NONE).start(grid, model(50), 3)

    for masked in (False, True):
        first = start(masked)
        assert flat(first.arrays).tobytes() == flat(start(masked).arrays).tobytes()
        assert all(entry["privacy"]["epsilon"] == math.inf for entry in first.rounds)
        assert first.epsilon == math.inf


def test_an_empty_cohort_releases_noise_alone() -> None:
    plan = PrivacyPlan(clip=1.0, noise_multiplier=1.0, sampler=PoissonSampler(1e-6), population=10**6)
    result = FedAvg(privacy=plan, **NONE).start(LocalGrid(app_of(change=1.0), 4), model(500), 1)
    assert 0.8 < flat(result.arrays).std() < 1.2  # one expected node of a million


def test_sampling_amplifies_for_the_output() -> None:
    def epsilon(**arguments: Any) -> float:
        plan = PrivacyPlan(clip=1.0, noise_multiplier=1.0, **arguments)
        found = FedAvg(privacy=plan, min_train_nodes=1, **NONE).start(LocalGrid(app_of(), 20), model(20), 1).epsilon
        assert found is not None
        return found

    whole = epsilon()
    assert epsilon(sampler=PoissonSampler(0.1)) < whole / 2
    assert epsilon(sampler=AvailabilitySampler(5)) == whole
    assert epsilon(relation="replace_one") > whole
    assert epsilon(relation="replace_one", sampler=FixedSizeSampler(2, 20)) < epsilon(relation="replace_one")
    with pytest.raises(RunFailed, match="20 nodes for a population of 30"):
        epsilon(relation="replace_one", sampler=FixedSizeSampler(2, 30))


def test_server_optimisers_post_process() -> None:
    result = FedAdam(privacy=PrivacyPlan(clip=1.0, noise_multiplier=1.0), **NONE).start(
        LocalGrid(app_of(), 3), model(50), 2
    )
    assert result.epsilon is not None


class Custom(Strategy):
    def update(self, server_round: int, arrays: ArrayRecord, view: Any) -> ArrayRecord:
        return arrays


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (FedMedian, "its rule chooses among the updates"),
        (Krum, "its rule chooses among the updates"),
        (MultiKrum, "its rule chooses among the updates"),
        (Bulyan, "its rule chooses among the updates"),
        (FedTrimmedAvg, "its rule chooses among the updates"),
        (RFA, "its rule chooses among the updates"),
        (partial(CenteredClipping, radius=1.0), "around the last round's aggregate"),
        (partial(FLTrust, train=lambda arrays: arrays), "likeness to the server's own"),
        (partial(QFedAvg, client_learning_rate=0.1), "powers of the losses"),
        (SCAFFOLD, "arrays or weights of its own"),
        (FedNova, "arrays or weights of its own"),
        (partial(FedBuff, buffer_size=2), "how late the others are"),
        (FedXgbBagging, "trees are documents"),
        (Custom, "`linear = True`"),
    ],
)
def test_a_strategy_without_a_sensitivity_is_refused_and_says_why(make: Any, reason: str) -> None:
    name = getattr(make, "func", make).__name__
    with pytest.raises(PlanRefused, match=f"no sensitivity is stated for {name}: .*{re.escape(reason)}"):
        make(privacy=PrivacyPlan(clip=1.0, noise_multiplier=1.0), **NONE)


def test_every_strategy_either_reads_the_mean_alone_or_says_why_not() -> None:
    public = [getattr(strategies, name) for name in strategies.__all__]
    found = [one for one in public if isinstance(one, type) and issubclass(one, Strategy) and one is not Strategy]
    assert len(found) >= 20
    for one in found:
        assert one.linear or one.unbounded != Strategy.unbounded, one.__name__


def test_evaluation_metrics_are_refused_under_a_plan() -> None:
    with pytest.raises(PlanRefused, match="fraction_evaluate=0"):
        FedAvg(privacy=PrivacyPlan(clip=1.0, noise_multiplier=1.0))
    with pytest.raises(PlanRefused, match="fraction_train"):
        FedAvg(0.5, privacy=PrivacyPlan(clip=1.0, noise_multiplier=1.0), **NONE)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"clip": 0.0}, "clip"),
        ({"clip": math.nan}, "clip"),
        ({"noise_multiplier": 0.0}, "noise_multiplier"),
        ({"noise_multiplier": None}, "noise_multiplier"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"delta": 0.0}, "delta"),
        ({"rounds": 0}, "rounds"),
        ({"population": 0}, "population"),
        ({"relation": "neighbours"}, "relation"),
    ],
)
def test_nonsense_is_refused_by_name(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        PrivacyPlan(**{"clip": 1.0, "noise_multiplier": 1.0, **arguments})


@pytest.mark.parametrize("arguments", [{"observer": "server"}, {"unit": "record"}])
def test_claims_that_central_noise_cannot_support_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(PlanRefused, match=next(iter(arguments.values()))):
        PrivacyPlan(clip=1.0, noise_multiplier=1.0, **arguments)


def test_integers_and_half_floats_are_noised_too() -> None:
    initial = ArrayRecord(
        {"i": Array(np.zeros(300, np.int32)), "h": Array(np.zeros(300, np.float16)), "e": Array(np.zeros(0))}
    )
    result = FedAvg(privacy=PrivacyPlan(clip=30.0, noise_multiplier=1.0), **NONE).start(
        LocalGrid(app_of(), 3), initial, 1
    )
    assert [(a.dtype, a.shape) for a in result.arrays.values()] == [
        ("int32", (300,)),
        ("float16", (300,)),
        ("float64", (0,)),
    ]
    assert 8 < result.arrays["i"].numpy().std() < 12
    assert 8 < result.arrays["h"].numpy().astype(float).std() < 12
    with pytest.raises(ValueError, match="no elements"):
        FedAvg(privacy=PrivacyPlan(clip=1.0, noise_multiplier=1.0), **NONE).start(
            LocalGrid(app_of(), 3), ArrayRecord([np.zeros(0)]), 1
        )
