"""What round metrics say about updates and nodes; the pace of rounds; the arithmetic of robust rules over groups."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed import mods, run_simulation
from privfed.apps import ClientApp, ServerApp
from privfed.context import Context
from privfed.errors import PlanRefused, QuorumError, RunFailed
from privfed.grid import Grid, LocalGrid
from privfed.message import Message
from privfed.plan import PrivacyPlan
from privfed.protocols import SecAgg
from privfed.record import ArrayRecord, MetricRecord, RecordDict
from privfed.strategies import (
    RFA,
    Bulyan,
    CenteredClipping,
    FedAvg,
    FedMedian,
    FedTrimmedAvg,
    GroupedStage,
    Krum,
    MultiKrum,
    NearestNeighborMixing,
    Pace,
    SecureStage,
    Strategy,
    Updates,
)
from privfed.strategies.diagnostic import describe_updates

ROOT = Path(__file__).resolve().parents[2]
NONE: dict[str, Any] = {"fraction_evaluate": 0.0}


def app_of(value: Callable[[int], np.ndarray], secure: bool = False) -> ClientApp:
    """Node k moves the model by value(k)."""
    app = ClientApp(mods=[mods.secure_aggregation()] if secure else [])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        received = message.content.array_records["arrays"]["0"].numpy()
        arrays = ArrayRecord([np.asarray(received + value(context.node_id), received.dtype)])
        metrics = MetricRecord({"num-examples": 1, "loss": float(context.node_id)})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return app


def simulate(strategy: Strategy, app: ClientApp, nodes: int, size: int = 2, rounds: int = 1) -> Any:
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> Any:
        result = strategy.start(grid, ArrayRecord([np.ones(size)]), num_rounds=rounds, timeout=30)
        return {"arrays": result.arrays.to_numpy_ndarrays()[0], "rounds": result.rounds}

    return run_simulation(server, app, nodes, seed=4).result


@given(st.integers(0, 10**6), st.integers(2, 9), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_norms_cosines_and_diversity_are_those_of_the_definitions(seed: int, count: int, size: int) -> None:
    rows = np.random.default_rng(seed).normal(size=(count, size)).astype(np.float32)
    found: Any = describe_updates(Updates(rows, tuple(range(10, 10 + count)), (1.0,) * count))
    wide = rows.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1)
    unit = wide / norms[:, None]
    cosines = unit @ unit.T
    direction = unit.sum(0)
    assert found["norm"]["least"] == pytest.approx(norms.min())
    assert found["norm"]["median"] == pytest.approx(np.median(norms))
    assert found["norm"]["largest-node"] == 10 + int(norms.argmax())
    assert found["cosine"]["mean"] == pytest.approx(cosines[np.triu_indices(count, 1)].mean(), abs=1e-9)
    if np.linalg.norm(direction) > 1e-6:
        toward = unit @ direction / np.linalg.norm(direction)
        assert found["cosine"]["least"] == pytest.approx(toward.min(), abs=1e-9)
    assert found["diversity"] == pytest.approx((norms**2).mean() / (wide.mean(0) ** 2).sum(), rel=1e-5)
    assert "too-large" not in found


def test_zero_and_huge_rows_do_not_upset_the_diagnostics() -> None:
    zeros: Any = describe_updates(Updates(np.zeros((3, 4), np.float32), (1, 2, 3), (1.0,) * 3))
    assert zeros == {"norm": {"least": 0.0, "median": 0.0, "largest": 0.0, "largest-node": 1}}
    rows = np.ones((3, 4), np.float32)
    rows[1] = 1e38
    huge: Any = describe_updates(Updates(rows, (4, 5, 6), (1.0,) * 3))
    assert huge["too-large"] == [5]
    assert np.isfinite(huge["cosine"]["mean"])


def test_a_round_names_the_node_that_points_away() -> None:
    app = app_of(lambda node: np.array([-5.0, 0.1]) if node == 3 else np.array([1.0, 0.01 * node]))
    found = simulate(FedMedian(**NONE), app, 6)["rounds"][0]["train-replies"]
    assert found["updates"]["norm"]["largest-node"] == 3
    assert found["updates"]["cosine"]["least-node"] == 3
    assert found["updates"]["cosine"]["least"] < -0.9
    assert found["metric-spread"]["loss"] == [1.0, 3.5, 6.0]
    assert found["excluded"] == []


def test_the_mean_streams_its_norms_and_diversity() -> None:
    app = app_of(lambda node: np.array([1.0, -1.0]) * node)
    found = simulate(FedAvg(**NONE), app, 4)["rounds"][0]["train-replies"]["updates"]
    assert found["norm"]["largest"] == pytest.approx(4 * 2**0.5)
    assert found["norm"]["largest-node"] == 4
    assert found["diversity"] == pytest.approx(7.5 / 2.5**2)


def test_hidden_and_private_rounds_say_nothing_about_nodes() -> None:
    stage = SecureStage(SecAgg(threshold=3))
    found = simulate(FedAvg(stage=stage, **NONE), app_of(lambda node: np.ones(2), secure=True), 4)["rounds"][0]
    assert not {"updates", "metric-spread"} & found["train-replies"].keys()
    plan = PrivacyPlan(clip=1.0, epsilon=8.0, delta=1e-5)
    app = ClientApp(mods=[mods.clip(1.0)])
    app.train()(lambda message, context: app_of(lambda node: np.ones(2))(message, context))
    private = simulate(FedAvg(privacy=plan, **NONE), app, 4)["rounds"][0]
    assert "train-replies" not in private


def test_over_selection_closes_when_enough_have_answered() -> None:
    def value(node: int) -> np.ndarray:
        time.sleep(1.5 if node == 2 else 0.0)
        return np.full(2, float(node))

    start = time.monotonic()
    pace = Pace(over_selection=0.25)
    strategy = FedMedian(fraction_train=0.8, pace=pace, **NONE)  # 4 of 5 wanted, 5 asked
    found = simulate(strategy, app_of(value), 5)
    replies = found["rounds"][0]["train-replies"]
    assert (replies["nodes"], replies["valid"]) == (5, 4)
    assert replies["excluded"] == [{"node": 2, "cause": "not awaited: enough others had answered"}]
    np.testing.assert_allclose(found["arrays"], 1 + 3.5)  # the median of 1, 3, 4, 5
    assert time.monotonic() - start < 6


def test_a_deadline_leaves_late_nodes_out_and_min_completion_refuses_too_few() -> None:
    def value(node: int) -> np.ndarray:
        time.sleep(1.0 if node > 3 else 0.0)
        return np.full(2, float(node))

    found = simulate(FedAvg(pace=Pace(deadline=0.4), **NONE), app_of(value), 4)
    (late,) = found["rounds"][0]["train-replies"]["excluded"]
    assert late["node"] == 4
    assert late["cause"] in ("no reply before the deadline", "MESSAGE_UNAVAILABLE expired")
    np.testing.assert_allclose(found["arrays"], 1 + 2.0)
    with pytest.raises(RunFailed, match="3 valid replies, 4 are needed"):
        simulate(FedAvg(pace=Pace(deadline=0.4, min_completion=0.9), **NONE), app_of(value), 4)


@given(st.integers(1, 1000), st.floats(0, 3), st.floats(0, 1), st.integers(1, 50))
def test_pace_never_asks_fewer_than_wanted_nor_more_than_there_are(
    wanted: int, over: float, completion: float, least: int
) -> None:
    pace = Pace(over_selection=over, min_completion=completion)
    assert wanted <= pace.asked(wanted, 10**9) <= wanted * (1 + over) + 1
    assert pace.asked(wanted, wanted) == wanted
    assert max(least, wanted * completion - 1e-6) <= pace.quorum(wanted, least) <= max(least, wanted)


def test_a_pace_that_cannot_be_is_refused() -> None:
    for arguments in ({"over_selection": -0.1}, {"deadline": 0.0}, {"min_completion": 1.1}):
        (name,) = arguments
        with pytest.raises(ValueError, match=name):
            Pace(**arguments)
    plan = PrivacyPlan(clip=1.0, epsilon=1.0, delta=1e-5)
    with pytest.raises(PlanRefused, match="over_selection"):
        FedAvg(privacy=plan, pace=Pace(over_selection=0.3), **NONE)


# Robust rules over group means: f nodes spoil at most f groups.

GROUPED = [
    (lambda stage: FedMedian(stage=stage, **NONE), 4),
    (lambda stage: RFA(stage=stage, **NONE), 4),
    (lambda stage: FedTrimmedAvg(beta=0.2, stage=stage, **NONE), 4),
    (lambda stage: Krum(num_malicious_nodes=1, stage=stage, **NONE), 5),
    (lambda stage: MultiKrum(num_malicious_nodes=1, num_nodes_to_select=3, stage=stage, **NONE), 5),
    (lambda stage: Bulyan(num_malicious_nodes=1, stage=stage, **NONE), 7),
    (lambda stage: CenteredClipping(radius=0.5, steps=20, stage=stage, **NONE), 4),
]


TOLERATED = {"Krum": 1, "MultiKrum": 1, "Bulyan": 1}


@pytest.mark.parametrize(("make", "groups"), GROUPED)
def test_one_attacker_spoils_one_group_and_no_rule(make: Callable[[Any], Strategy], groups: int) -> None:
    app = app_of(lambda node: np.full(2, -7.0 if node == 1 else 1.0), secure=True)
    found = simulate(make(GroupedStage(SecAgg(threshold=2), 2)), app, 2 * groups)
    replies = found["rounds"][0]["train-replies"]
    assert replies["groups"] == groups
    assert replies["tolerated"] == TOLERATED.get(type(make(None)).__name__, (groups - 1) // 2)
    np.testing.assert_allclose(found["arrays"], 2.0, atol=0.13)
    mean = simulate(FedAvg(stage=GroupedStage(SecAgg(threshold=2), 2), **NONE), app, 2 * groups)["arrays"]
    assert (mean < 1.5).all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda stage: Krum(num_malicious_nodes=2, stage=stage, **NONE),
            r"Krum needs n >= 2f \+ 3 = 7 rows, got n = 6",
        ),
        (lambda stage: MultiKrum(num_malicious_nodes=2, stage=stage, **NONE), r"2f \+ 3 = 7 rows, got n = 6"),
        (lambda stage: Bulyan(num_malicious_nodes=1, stage=stage, **NONE), r"4f \+ 3 = 7 rows, got n = 6"),
        (
            lambda stage: NearestNeighborMixing(FedMedian(), num_malicious_nodes=3, stage=stage, **NONE),
            r"2f \+ 1 = 7 rows, got n = 6",
        ),
    ],
)
def test_too_few_groups_are_refused_with_the_arithmetic_before_anyone_is_asked(
    make: Callable[[Any], Strategy], words: str
) -> None:
    asked: list[int] = []

    def value(node: int) -> np.ndarray:
        asked.append(node)
        return np.ones(2)

    with pytest.raises(RunFailed, match=words) as caught:
        simulate(make(GroupedStage(SecAgg(threshold=2), 2)), app_of(value, secure=True), 12)
    assert "12 nodes in groups of 2" in str(caught.value)
    assert not asked


ANY_MINORITY = [
    lambda stage: FedMedian(stage=stage, **NONE),
    lambda stage: RFA(stage=stage, **NONE),
    lambda stage: FedTrimmedAvg(stage=stage, **NONE),
    lambda stage: CenteredClipping(radius=1.0, stage=stage, **NONE),
]


@pytest.mark.parametrize("make", ANY_MINORITY)
def test_two_groups_have_no_minority(make: Callable[[Any], Strategy]) -> None:
    """Of two group means a median is the mean: one node would decide it."""
    words = r"needs n >= 2f \+ 1 = 3 rows, got n = 2"
    with pytest.raises(
        RunFailed, match=words + r" \(8 nodes in groups of 4\); make the groups smaller or ask more nodes"
    ):
        simulate(make(GroupedStage(SecAgg(threshold=2), 4)), app_of(lambda node: np.ones(2), secure=True), 8)
    stage = GroupedStage(SecAgg(threshold=2), 2)

    def value(node: int) -> np.ndarray:
        if node in stage.groups[0]:
            raise ZeroDivisionError
        return np.ones(2)

    with pytest.raises(RunFailed, match=words + " groups that ended"):
        simulate(make(stage), app_of(value, secure=True), 6)


@pytest.mark.parametrize(
    ("make", "nodes", "most"),
    [
        (lambda: FedMedian(**NONE), 8, 3),
        (lambda: FedTrimmedAvg(beta=0.2, **NONE), 8, 2),
        (lambda: FedTrimmedAvg(beta=0.0, **NONE), 8, 0),
        (lambda: Krum(num_malicious_nodes=2, **NONE), 8, 2),
        (lambda: NearestNeighborMixing(FedMedian(), num_malicious_nodes=2, **NONE), 8, 2),
        (lambda: NearestNeighborMixing(Krum(), num_malicious_nodes=2, **NONE), 8, 0),
        (lambda: FedAvg(**NONE), 8, None),
    ],
)
def test_a_round_says_how_many_it_tolerates(make: Callable[[], Strategy], nodes: int, most: int | None) -> None:
    found = simulate(make(), app_of(lambda node: np.full(2, float(node))), nodes)
    assert found["rounds"][0]["train-replies"].get("tolerated") == most


def test_over_selection_lends_a_rule_no_rows() -> None:
    """Eight are asked and the round closes with five: too few for f = 2, which is said before anybody trains."""
    asked: list[int] = []

    def value(node: int) -> np.ndarray:
        asked.append(node)
        return np.ones(2)

    with pytest.raises(RunFailed, match=r"2f \+ 3 = 7 rows, got n = 5 \(5 nodes\)"):
        strategy = Krum(num_malicious_nodes=2, fraction_train=0.5, pace=Pace(over_selection=0.5), **NONE)
        simulate(strategy, app_of(value), 10)
    assert not asked
    strategy = Krum(num_malicious_nodes=1, fraction_train=0.5, pace=Pace(over_selection=0.5), **NONE)
    assert simulate(strategy, app_of(value), 10)["rounds"][0]["train-replies"]["tolerated"] == 1


def test_too_few_survivors_are_refused_as_well() -> None:
    def value(node: int) -> np.ndarray:
        if node > 4:
            raise ZeroDivisionError
        return np.ones(2)

    with pytest.raises(RunFailed, match=r"needs n >= 2f \+ 3 = 5 rows .* got n = 4"):
        simulate(Krum(num_malicious_nodes=1, **NONE), app_of(value), 6)


def test_mixing_refuses_a_stage_that_nobody_would_ask() -> None:
    with pytest.raises(ValueError, match="would hide nothing; give stage= to NearestNeighborMixing"):
        NearestNeighborMixing(FedMedian(stage=GroupedStage(SecAgg(threshold=2), 2), **NONE), num_malicious_nodes=1)


@pytest.mark.parametrize("make", [make for make, _ in GROUPED])
@pytest.mark.parametrize("grouped", [True, False])
def test_robust_and_private_without_a_sensitivity_is_refused(
    make: Callable[[Any], Strategy], grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = PrivacyPlan(clip=1.0, epsilon=1.0, delta=1e-5)
    stage = GroupedStage(SecAgg(threshold=2), 2) if grouped else None
    original = Strategy.__init__
    monkeypatch.setattr(Strategy, "__init__", lambda self, **given: original(self, **{**given, "privacy": plan}))
    with pytest.raises(PlanRefused, match="no sensitivity is stated"):
        make(stage)


def test_rows_are_ordered_by_node_when_they_came_by_arrival() -> None:
    view = Updates(np.array([[3.0], [1.0], [2.0]], np.float32), (3, 1, 2), (30.0, 10.0, 20.0)).ordered()
    assert view.sources == (1, 2, 3)
    assert view.weights == (10.0, 20.0, 30.0)
    np.testing.assert_array_equal(view.rows[:, 0], [1, 2, 3])


def test_quorum_holds_when_over_selected_nodes_fail() -> None:
    def value(node: int) -> np.ndarray:
        if node > 2:
            raise ZeroDivisionError
        return np.ones(2)

    grid = LocalGrid(app_of(value), 6, seed=1)
    strategy = FedAvg(fraction_train=0.5, pace=Pace(over_selection=1.0, min_completion=1.0), **NONE)
    with pytest.raises(QuorumError, match="2 valid replies, 3 are needed"):
        strategy.start(grid, ArrayRecord([np.ones(2)]), num_rounds=1)


def test_the_documented_custom_strategy_runs_and_is_short() -> None:
    text = (ROOT / "docs" / "robustness.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(block.splitlines()) < 30
    names: dict[str, Any] = {}
    exec(compile(block, "robustness.md", "exec"), names)  # the page's own code
    app = app_of(lambda node: np.array([5.0, -0.2]) if node > 1 else np.array([-1e3, 1e3]), secure=True)
    stage = GroupedStage(SecAgg(threshold=2), 2, max_value=2000.0)
    found = simulate(names["SignMajority"](step=0.5, stage=stage, **NONE), app, 10)
    np.testing.assert_allclose(found["arrays"], [1.5, 0.5])
