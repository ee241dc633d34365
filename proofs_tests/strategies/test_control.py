"""SCAFFOLD and FedNova: the papers' own arithmetic, the drift they remove, and the sums they need no more than."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed import mods, run_simulation
from privfed.apps import ClientApp, ServerApp
from privfed.array import Array
from privfed.context import Context
from privfed.errors import PlanRefused, RunFailed
from privfed.grid import Grid, LocalGrid, MemoryRecorder
from privfed.message import Message
from privfed.plan import PrivacyPlan
from privfed.protocols import SecAgg
from privfed.record import ArrayRecord, MetricRecord, RecordDict
from privfed.strategies import (
    SCAFFOLD,
    ControlVariate,
    FedAvg,
    FedNova,
    SecureStage,
    Strategy,
    normalize_update,
)

RATE = 0.1


class Quadratics:
    """Node k minimises curvature_k / 2 * (x - center_k)^2 by gradient descent: the simplest data that differ."""

    def __init__(self, seed: int, nodes: int, size: int = 3) -> None:
        rng = np.random.default_rng(seed)
        self.centers = rng.normal(0, 2, (nodes, size))
        self.curvatures = rng.uniform(0.2, 2, (nodes, size))
        self.steps = rng.integers(1, 9, nodes)
        self.weights = rng.integers(1, 50, nodes)

    def gradient(self, index: int, x: np.ndarray) -> np.ndarray:
        return np.asarray(self.curvatures[index] * (x - self.centers[index]))

    def optimum(self, weights: np.ndarray | None = None) -> np.ndarray:
        share = np.ones(len(self.centers)) if weights is None else weights
        pull = share[:, None] * self.curvatures
        return np.asarray((pull * self.centers).sum(0) / pull.sum(0))

    def descend(self, index: int, x: np.ndarray, steps: int, correction: Any = 0.0) -> np.ndarray:
        for _ in range(steps):
            x = x - RATE * (self.gradient(index, x) + correction)
        return x

    def scaffold_app(self, steps: int, mod: Any = None) -> ClientApp:
        app = ClientApp(mods=[mod] if mod else [])

        @app.train()
        def train(message: Message, context: Context) -> Message:
            control = ControlVariate(message, context)
            moved = self.descend(context.node_id - 1, control.weights[0], steps, control.corrections[0])
            return reply(message, control.finish([moved], steps, RATE))

        return app

    def nova_app(self, mod: Any = None) -> ClientApp:
        app = ClientApp(mods=[mod] if mod else [])

        @app.train()
        def train(message: Message, context: Context) -> Message:
            index = context.node_id - 1
            steps = int(self.steps[index])
            start = message.content.array_records["arrays"]["0"].numpy()
            arrays = normalize_update(message, [self.descend(index, start, steps)], steps)
            return reply(message, arrays, int(self.weights[index]))

        return app


def reply(message: Message, arrays: ArrayRecord, weight: int = 1) -> Message:
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": weight})})
    return Message(content, reply_to=message)


def model(size: int = 3, dtype: str = "float64") -> ArrayRecord:
    return ArrayRecord([np.zeros(size, dtype)])


def run(strategy: Strategy, app: ClientApp, nodes: int, rounds: int, arrays: ArrayRecord | None = None) -> np.ndarray:
    grid = LocalGrid(app, nodes, seed=3)
    result = strategy.start(grid, arrays if arrays is not None else model(), num_rounds=rounds)
    return np.asarray(result.arrays.to_numpy_ndarrays()[0])


@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(1, 6), st.sampled_from([1.0, 0.5]))
@settings(max_examples=20, deadline=None)
def test_scaffold_is_the_papers_recursion(seed: int, nodes: int, steps: int, rate: float) -> None:
    data = Quadratics(seed, nodes)
    x, c, own = np.zeros(3), np.zeros(3), np.zeros((nodes, 3))
    for _ in range(4):
        moved = np.array([data.descend(i, x, steps, c - own[i]) for i in range(nodes)])
        renewed = own - c + (x - moved) / (steps * RATE)
        x, c, own = x + rate * (moved - x).mean(0), c + (renewed - own).mean(0), renewed
    strategy = SCAFFOLD(server_learning_rate=rate, fraction_evaluate=0.0)
    np.testing.assert_allclose(run(strategy, data.scaffold_app(steps), nodes, 4), x, atol=1e-12)


def test_scaffold_moves_c_by_the_share_that_took_part() -> None:
    data = Quadratics(1, 10)
    strategy = SCAFFOLD(fraction_train=0.5, fraction_evaluate=0.0)
    grid = LocalGrid(data.scaffold_app(3), 10, seed=3)
    strategy.start(grid, model(), num_rounds=6)
    kept = [context.state.array_records.get("scaffold") for context in grid.contexts.values()]
    own = np.array([record["0"].numpy() if record is not None else np.zeros(3) for record in kept])
    control = strategy.save().array_records["scaffold"]["control.0"].numpy()
    np.testing.assert_allclose(control, own.mean(0), atol=1e-12)  # the invariant of Algorithm 1


def test_scaffold_finds_the_optimum_that_averaging_misses() -> None:
    data = Quadratics(5, 6)
    plain = ClientApp()

    @plain.train()
    def train(message: Message, context: Context) -> Message:
        start = message.content.array_records["arrays"]["0"].numpy()
        return reply(message, ArrayRecord([data.descend(context.node_id - 1, start, 20)]))

    average = run(FedAvg(fraction_evaluate=0.0), plain, 6, 60)
    corrected = run(SCAFFOLD(fraction_evaluate=0.0), data.scaffold_app(20), 6, 60)
    optimum = data.optimum()
    assert np.linalg.norm(average - optimum) > 0.05
    assert np.linalg.norm(corrected - optimum) < 1e-3


def test_scaffold_resumes_where_it_stopped() -> None:
    data = Quadratics(8, 4)
    whole = run(SCAFFOLD(fraction_evaluate=0.0), data.scaffold_app(3), 4, 6)
    recorder = MemoryRecorder()
    grid = LocalGrid(data.scaffold_app(3), 4, seed=3, recorder=recorder)
    SCAFFOLD(fraction_evaluate=0.0).start(grid, model(), num_rounds=3)
    again = LocalGrid(data.scaffold_app(3), grid.contexts, seed=3, recorder=MemoryRecorder(recorder.checkpoint))
    result = SCAFFOLD(fraction_evaluate=0.0).start(again, model(), num_rounds=6)
    np.testing.assert_array_equal(result.arrays.to_numpy_ndarrays()[0], whole)


@given(st.integers(0, 10**6), st.integers(2, 6))
@settings(max_examples=20, deadline=None)
def test_fednova_is_the_papers_step(seed: int, nodes: int) -> None:
    data = Quadratics(seed, nodes)
    p = data.weights / data.weights.sum()
    x = np.zeros(3)
    for _ in range(3):
        steps = data.steps
        per_step = np.array([(data.descend(i, x, int(steps[i])) - x) / steps[i] for i in range(nodes)])
        x = x + (p @ steps) * (p @ per_step)
    np.testing.assert_allclose(run(FedNova(fraction_evaluate=0.0), data.nova_app(), nodes, 3), x, atol=1e-12)


def test_fednova_with_equal_steps_is_fedavg() -> None:
    data = Quadratics(2, 5)
    data.steps[:] = 4
    plain = ClientApp()

    @plain.train()
    def train(message: Message, context: Context) -> Message:
        start = message.content.array_records["arrays"]["0"].numpy()
        index = context.node_id - 1
        return reply(message, ArrayRecord([data.descend(index, start, 4)]), int(data.weights[index]))

    expected = run(FedAvg(fraction_evaluate=0.0), plain, 5, 3)
    np.testing.assert_allclose(run(FedNova(fraction_evaluate=0.0), data.nova_app(), 5, 3), expected, atol=1e-12)


@pytest.mark.parametrize("name", ["scaffold", "fednova"])
def test_they_run_under_secure_aggregation(name: str) -> None:
    data = Quadratics(4, 5)
    mod = mods.secure_aggregation()
    app = data.scaffold_app(3, mod) if name == "scaffold" else data.nova_app(mod)
    make = SCAFFOLD if name == "scaffold" else FedNova
    plain_app = data.scaffold_app(3) if name == "scaffold" else data.nova_app()
    plain = run(make(fraction_evaluate=0.0), plain_app, 5, 2)
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> ArrayRecord:
        stage = SecureStage(SecAgg(threshold=0.6), max_value=16.0, max_weight=64)
        return make(fraction_evaluate=0.0, stage=stage).start(grid, model(), num_rounds=2).arrays

    result = run_simulation(server, app, 5, seed=3)
    np.testing.assert_allclose(result.result.to_numpy_ndarrays()[0], plain, atol=1e-4)


def test_what_cannot_work_is_refused_with_the_cause() -> None:
    data = Quadratics(1, 3)
    with pytest.raises(ValueError, match="server_learning_rate must be finite and > 0, got 0"):
        SCAFFOLD(server_learning_rate=0)
    with pytest.raises(PlanRefused, match="no sensitivity is stated for SCAFFOLD"):
        SCAFFOLD(fraction_evaluate=0.0, privacy=PrivacyPlan(clip=1.0, epsilon=1.0, delta=1e-5))
    with pytest.raises(ValueError, match=r"initial_arrays\['0'\] is int64"):
        run(SCAFFOLD(fraction_evaluate=0.0), data.scaffold_app(1), 3, 1, ArrayRecord([np.zeros(3, np.int64)]))
    clash = ArrayRecord({"local-steps": Array(np.zeros(3))})
    with pytest.raises(ValueError, match="keeps the names"):
        run(FedNova(fraction_evaluate=0.0), data.nova_app(), 3, 1, clash)
    with pytest.raises(RunFailed, match="CLIENT_APP_RAISED_EXCEPTION ValueError"):
        run(FedAvg(fraction_evaluate=0.0), data.scaffold_app(1), 3, 1)  # a SCAFFOLD app under another strategy
