"""Server optimisers and robust strategies: the published cases, state that survives, stages that are refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed import mods
from privfed.apps import ClientApp
from privfed.array import Array
from privfed.context import Context
from privfed.errors import RunFailed
from privfed.grid import LocalGrid, MemoryRecorder
from privfed.message import Message
from privfed.protocols import SecAgg
from privfed.record import ArrayRecord, MetricRecord, RecordDict
from privfed.strategies import (
    RFA,
    Bulyan,
    CenteredClipping,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedBuff,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    FLTrust,
    GroupedStage,
    Krum,
    MultiKrum,
    NearestNeighborMixing,
    QFedAvg,
    SecureStage,
    Strategy,
)


def app_of(values: list[Any], weights: list[int] | None = None, *, relative: bool = False) -> ClientApp:
    """Node k replies values[k - 1], or moves by it."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        index = context.node_id - 1
        received = message.content.array_records["arrays"].to_numpy_ndarrays()
        mine = values[index] if isinstance(values[index], list) else [values[index]]
        arrays = [np.asarray(x + r if relative else x, r.dtype) for x, r in zip(mine, received, strict=True)]
        metrics = MetricRecord({"num-examples": weights[index] if weights else 1})
        return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message)

    return app


def run(
    strategy: Strategy, values: list[Any], start: list[Any], *, rounds: int = 1, **arguments: Any
) -> list[np.ndarray]:
    grid = LocalGrid(app_of(values, **arguments), len(values))
    initial = ArrayRecord([np.asarray(one, np.float64) for one in start])
    return strategy.start(grid, initial, rounds).arrays.to_numpy_ndarrays()


NONE = {"fraction_evaluate": 0.0}


def test_momentum_one_with_rate_one_is_the_weighted_mean() -> None:
    layers = [
        [np.array([[1.0, 2, 3], [4, 5, 6]]), np.array([7.0, 8, 9, 10])],
        [np.array([[29.0, 23, 19], [17, 13, 11]]), np.array([7.0, 5, 3, 2])],
    ]
    start = [np.zeros((2, 3)), np.zeros(4)]
    after = run(FedAvgM(server_learning_rate=1 + 1e-9, **NONE), layers, start, rounds=2, weights=[1, 2])
    for got, first, second in zip(after, *layers, strict=True):
        np.testing.assert_allclose(got, (first + 2 * second) / 3, atol=1e-5)
    assert run(FedAvgM(**NONE), [1.0, 3.0], [0.0], weights=[1, 2])[0] == pytest.approx(7 / 3)


def test_momentum_accumulates() -> None:
    after = run(
        FedAvgM(server_momentum=0.5, server_learning_rate=2.0, **NONE), [1.0, 3.0], [0.0], rounds=3, relative=True
    )
    # The mean update is 2 in every round: velocities 2, 3, 3.5.
    assert after[0] == pytest.approx(2 * (2 + 3 + 3.5))


def test_adagrad_reference() -> None:
    after = run(
        FedAdagrad(eta=0.1, eta_l=0.316, tau=0.5, **NONE),
        [np.full(4, 0.2), np.full(4, 1.0)],
        [np.full(4, 0.1)],
        weights=[5, 5],
    )
    np.testing.assert_allclose(after[0], np.full(4, 0.15), rtol=1e-12)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=6), st.sampled_from(["adagrad", "adam", "yogi"]))
@settings(max_examples=40, deadline=None)
def test_adaptive_steps_follow_the_paper(updates: list[float], name: str) -> None:
    strategy: Any = {"adagrad": FedAdagrad, "adam": FedAdam, "yogi": FedYogi}[name](eta=0.05, tau=0.01, **NONE)
    x, m, v = 0.5, 0.0, 0.0
    beta_1 = 0.0 if name == "adagrad" else 0.9
    grid = LocalGrid(rounds_app(updates), 2)
    for delta in updates:
        m = beta_1 * m + (1 - beta_1) * delta
        square = delta * delta
        v = {"adagrad": v + square, "adam": 0.99 * v + 0.01 * square, "yogi": v - 0.01 * square * np.sign(v - square)}[
            name
        ]
        x += 0.05 * m / (np.sqrt(v) + 0.01)
    result = strategy.start(grid, ArrayRecord([np.array(0.5)]), len(updates))
    assert float(result.arrays["0"].view()) == pytest.approx(x, rel=1e-9, abs=1e-9)


def rounds_app(updates: list[float]) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        moved = message.content.array_records["arrays"].map(
            lambda x: x + updates[int(message.content["config"]["server-round"]) - 1]
        )
        return Message(RecordDict({"arrays": moved, "m": MetricRecord({"num-examples": 1})}), reply_to=message)

    return app


@pytest.mark.parametrize(
    "make",
    [
        lambda: FedAvgM(server_momentum=0.9, **NONE),
        lambda: FedAdam(**NONE),
        lambda: FedYogi(**NONE),
        lambda: FedAdagrad(**NONE),
    ],
)
def test_state_is_part_of_a_checkpoint(make: Any) -> None:
    updates = [1.0, -2.0, 0.5, 3.0]

    def start(recorder: MemoryRecorder, rounds: int) -> Any:
        grid = LocalGrid(rounds_app(updates), 2, recorder=recorder)
        return make().start(grid, ArrayRecord([np.zeros(3, np.float32)]), rounds)

    whole = start(MemoryRecorder(), 4)
    first = MemoryRecorder()
    start(first, 2)
    assert start(MemoryRecorder(first.checkpoint), 4).arrays == whole.arrays
    strategy = make()
    again = [
        strategy.start(LocalGrid(rounds_app(updates), 2), ArrayRecord([np.zeros(3, np.float32)]), 2) for _ in range(2)
    ]
    assert again[0].arrays == again[1].arrays  # a second run starts anew


def test_proximal_mu_travels() -> None:
    seen = []
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        seen.append(dict(message.content["config"]))
        return Message(
            RecordDict({"arrays": message.content["arrays"], "m": MetricRecord({"num-examples": 1})}), reply_to=message
        )

    FedProx(proximal_mu=0.1, **NONE).start(LocalGrid(app, 2), ArrayRecord([np.zeros(1)]), 1)
    assert seen[0] == {"server-round": 1, "proximal-mu": 0.1}


def test_median_references() -> None:
    rows = [np.array([1, 0.2, 0.5, 1]), np.array([0.2, 0.5, 1, 0.2]), np.array([0.5, 1, 0.2, 0.5])]
    np.testing.assert_array_equal(run(FedMedian(**NONE), rows, [np.zeros(4)], weights=[5, 2, 9])[0], np.full(4, 0.5))
    assert run(FedMedian(**NONE), [1.0, 3.0, 2.0], [0.0])[0] == np.array(2.0)
    more = [*rows, *[np.full(4, 0.5)] * 4]
    np.testing.assert_array_equal(run(FedTrimmedAvg(beta=0.25, **NONE), more, [np.zeros(4)])[0], np.full(4, 0.5))
    assert run(FedTrimmedAvg(beta=0.25, **NONE), [0.5, 1.0, 2.0, 100.0], [0.0])[0] == np.array(1.5)


def test_krum_family_picks_honest_updates() -> None:
    rng = np.random.default_rng(3)
    honest = [rng.normal(1, 0.01, 50) for _ in range(8)]
    rows = [*honest, *[np.full(50, 1e3)] * 2]
    start = [np.zeros(50)]
    picked = run(Krum(num_malicious_nodes=2, **NONE), rows, start)[0]
    assert any(np.allclose(picked, one, atol=1e-6) for one in honest)
    mean = run(MultiKrum(num_malicious_nodes=2, num_nodes_to_select=8, **NONE), rows, start)[0]
    np.testing.assert_allclose(mean, np.mean(honest, axis=0), atol=1e-5)
    row = run(Bulyan(num_malicious_nodes=1, **NONE), [*honest, np.full(50, 1e3)], start)[0]
    assert np.all(np.abs(row - 1) < 0.1)


@pytest.mark.parametrize(
    ("strategy", "nodes", "numbers"),
    [
        (lambda: Krum(num_malicious_nodes=1, **NONE), 4, r"2f \+ 3"),
        (lambda: Bulyan(num_malicious_nodes=1, **NONE), 6, r"4f \+ 3"),
        (lambda: FedTrimmedAvg(beta=0.4, **NONE), 2, r"2f \+ 1"),
    ],
)
def test_what_a_rule_cannot_promise_fails_the_round(strategy: Any, nodes: int, numbers: str) -> None:
    with pytest.raises(RunFailed, match=f"round 1.*{numbers}"):
        run(strategy(), [float(k) for k in range(nodes)], [0.0])


def test_an_update_beyond_float32_is_excluded() -> None:
    grid = LocalGrid(app_of([1e300, 1.0, 2.0, 3.0]), 4)
    result = FedMedian(**NONE).start(grid, ArrayRecord([np.zeros(())]), 1)
    assert float(result.arrays["0"].view()) == 2.0
    assert result.rounds[0]["train-replies"]["excluded"] == [
        {"node": 1, "cause": "its update is too large for float32"}
    ]


@pytest.mark.parametrize("dtype", ["float16", "float32", "int32", "bfloat16"])
def test_robust_strategies_keep_dtypes(dtype: str) -> None:
    def array(value: float) -> Array:
        full = np.full((2, 2), value, np.float32)
        return Array.from_float32_as_bfloat16(full) if dtype == "bfloat16" else Array(full.astype(dtype))

    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        made = RecordDict(
            {"arrays": ArrayRecord({"a": array(2 * context.node_id)}), "m": MetricRecord({"num-examples": 1})}
        )
        return Message(made, reply_to=message)

    for strategy in (FedMedian(**NONE), FedTrimmedAvg(beta=0.3, **NONE)):
        result = strategy.start(LocalGrid(app, 5), ArrayRecord({"a": array(1)}), 1)
        assert result.arrays["a"] == array(6)


def test_robust_strategies_need_rows() -> None:
    for strategy in (FedMedian, FedTrimmedAvg, Krum, MultiKrum, Bulyan):
        with pytest.raises(ValueError, match=r"needs Updates.*offers only Sum"):
            strategy(stage=SecureStage(SecAgg(threshold=2)), **NONE)


def test_robust_under_secure_aggregation_tolerates_spoilt_groups() -> None:
    values = [np.full(4, 1.0)] * 12
    values[4] = np.full(4, 7.0)
    app = app_of(values)
    masked = ClientApp(mods=[mods.secure_aggregation()])
    masked.train()(lambda message, context: app(message, context))
    stage = GroupedStage(SecAgg(threshold=2), 2)
    result = FedMedian(stage=stage, **NONE).start(LocalGrid(masked, 12, seed=1), ArrayRecord([np.zeros(4)]), 1)
    np.testing.assert_allclose(result.arrays.to_numpy_ndarrays()[0], np.full(4, 1.0), atol=1e-3)
    # Six groups of two: Krum with f = 2 needs seven.
    with pytest.raises(RunFailed, match=r"2f \+ 3 = 7.*got n = 6"):
        Krum(num_malicious_nodes=2, stage=stage, **NONE).start(LocalGrid(masked, 12), ArrayRecord([np.zeros(4)]), 1)


def test_optimisers_run_under_secure_aggregation() -> None:
    masked = ClientApp(mods=[mods.secure_aggregation()])
    inner = app_of([1.0, 3.0, 5.0], relative=True)
    masked.train()(lambda message, context: inner(message, context))
    stage = SecureStage(SecAgg(threshold=2))
    for make in (FedAvg, FedAvgM, FedAdam, FedYogi, FedAdagrad, FedProx):
        hidden = make(stage=stage, **NONE).start(LocalGrid(masked, 3), ArrayRecord([np.zeros(1)]), 2)
        plain = make(**NONE).start(LocalGrid(inner, 3), ArrayRecord([np.zeros(1)]), 2)
        np.testing.assert_allclose(hidden.arrays["0"].view(), plain.arrays["0"].view(), atol=1e-2)


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (FedAvgM, {"server_momentum": 1.0}),
        (FedAvgM, {"server_learning_rate": 0}),
        (FedProx, {"proximal_mu": -1}),
        (FedAdam, {"beta_2": 1.0}),
        (FedAdam, {"tau": 0.0}),
        (FedYogi, {"beta_1": -0.1}),
        (FedTrimmedAvg, {"beta": 0.5}),
        (Krum, {"num_malicious_nodes": -1}),
        (Krum, {"num_malicious_nodes": 1.5}),
        (Krum, {"num_malicious_nodes": math.nan}),
        (Krum, {"num_malicious_nodes": True}),
        (Krum, {"num_malicious_nodes": "1"}),
        (MultiKrum, {"num_nodes_to_select": 0}),
        (MultiKrum, {"num_nodes_to_select": 1.5}),
        (CenteredClipping, {"steps": 1.5, "radius": 1.0}),
        (FedBuff, {"buffer_size": 2.5}),
        (FedBuff, {"max_staleness": 0.5}),
        (FedAvg, {"min_train_nodes": math.nan}),
        (FedAvg, {"min_evaluate_nodes": 1.5}),
        (FedAvg, {"min_available_nodes": "2"}),
    ],
)
def test_constructors_name_the_argument(make: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        make(**arguments)


def test_rfa_is_the_geometric_median() -> None:
    rows = [
        np.array([0.0, 0.0]),
        np.array([2.0, 0.0]),
        np.array([0.0, 2.0]),
        np.array([2.0, 2.0]),
        np.array([1.0, 1.0]),
        np.array([1e6, 1e6]),
    ]
    point = run(RFA(**NONE), rows[:5], [np.zeros(2)])[0]
    np.testing.assert_allclose(point, [1, 1], atol=1e-5)
    assert np.all(np.abs(run(RFA(**NONE), rows, [np.zeros(2)])[0]) < 3)


def test_centered_clipping_moves_with_its_center_and_remembers_it() -> None:
    rows = [np.full(4, 5.0)] * 4

    def start(recorder: MemoryRecorder, rounds: int) -> np.ndarray:
        grid = LocalGrid(app_of(rows, relative=True), 4, recorder=recorder)
        return CenteredClipping(radius=4.0, **NONE).start(grid, ArrayRecord([np.zeros(4)]), rounds).arrays["0"].numpy()

    # The update has norm 10; the center reaches 4, then 8, then 10.
    np.testing.assert_allclose(start(MemoryRecorder(), 3), np.full(4, 2.0 + 4.0 + 5.0), rtol=1e-6)
    first = MemoryRecorder()
    start(first, 2)
    np.testing.assert_allclose(start(MemoryRecorder(first.checkpoint), 3), np.full(4, 11.0), rtol=1e-6)


def test_mixing_helps_krum_average() -> None:
    rng = np.random.default_rng(0)
    honest = [rng.normal(0, 1, 200) for _ in range(9)]
    rows = [*honest, np.full(200, 50.0)]
    mixed = run(
        NearestNeighborMixing(Krum(num_malicious_nodes=1), num_malicious_nodes=1, **NONE), rows, [np.zeros(200)]
    )[0]
    plain = run(Krum(num_malicious_nodes=1, **NONE), rows, [np.zeros(200)])[0]
    truth = np.mean(honest, axis=0)
    assert np.linalg.norm(mixed - truth) < 0.1 * np.linalg.norm(plain - truth)
    with pytest.raises(ValueError, match="strategy"):
        NearestNeighborMixing(FedAvg(), num_malicious_nodes=1)  # type: ignore[arg-type]  # wrong on purpose


def test_fltrust_follows_the_servers_own_update() -> None:
    def train(server_round: int, arrays: ArrayRecord) -> ArrayRecord:
        return arrays.map(lambda x: x + 1.0)

    rows = [np.array([3.0, 3.0]), np.array([-9.0, -9.0]), np.array([1e4, 1e4]), np.array([-1.0, -2.0])]
    moved = run(FLTrust(train=train, **NONE), rows, [np.zeros(2)])[0]
    np.testing.assert_allclose(moved, [1, 1], rtol=1e-5)
    with pytest.raises(RunFailed, match="does not fit the model"):
        run(FLTrust(train=lambda r, a: ArrayRecord([np.zeros(3)]), **NONE), rows, [np.zeros(2)])


def losses_app(losses: list[float]) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        moved = message.content.array_records["arrays"].map(lambda x: x + context.node_id)
        metrics = MetricRecord({"num-examples": 1, "train_loss": losses[context.node_id - 1]})
        return Message(RecordDict({"arrays": moved, "m": metrics}), reply_to=message)

    return app


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=5), st.floats(0, 2), st.floats(0.01, 1))
@settings(max_examples=40, deadline=None)
def test_q_fedavg_takes_the_papers_step(losses: list[float], q: float, rate: float) -> None:
    strategy = QFedAvg(client_learning_rate=rate, q=q, **NONE)
    result = strategy.start(LocalGrid(losses_app(losses), len(losses)), ArrayRecord([np.zeros(2)]), 1)
    top = bottom = 0.0
    for index, loss in enumerate(losses):
        delta = -(index + 1) / rate
        top += loss**q * delta
        bottom += q * loss ** (q - 1) * 2 * delta**2 + loss**q / rate
    np.testing.assert_allclose(result.arrays["0"].view(), np.full(2, -top / bottom), rtol=1e-6)


def test_q_fedavg_needs_losses_it_can_see() -> None:
    with pytest.raises(RunFailed, match=r"train_loss=0\.0, and q-FedAvg needs a loss > 0"):
        QFedAvg(client_learning_rate=0.1, **NONE).start(
            LocalGrid(losses_app([1.0, 0.0]), 2), ArrayRecord([np.zeros(2)]), 1
        )
    with pytest.raises(ValueError, match="hides"):
        QFedAvg(client_learning_rate=0.1, stage=GroupedStage(SecAgg(threshold=2), 2), **NONE)
