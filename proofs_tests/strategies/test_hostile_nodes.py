"""What nodes can send against a strategy: none stops a round it was to be tolerated in, none is taken for honest."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from privfed import run_simulation
from privfed.apps import ClientApp, ServerApp
from privfed.array import Array
from privfed.context import Context
from privfed.errors import QuorumError, RunFailed
from privfed.grid import Grid, LocalGrid
from privfed.message import Message
from privfed.record import ArrayRecord, MetricRecord, RecordDict
from privfed.strategies import (
    RFA,
    Bulyan,
    CenteredClipping,
    FedAvg,
    FedMedian,
    FedTrimmedAvg,
    Krum,
    MultiKrum,
    NearestNeighborMixing,
    QFedAvg,
    RobustStrategy,
    Strategy,
    rules,
)

Content = dict[str, Any]
Spoil = Callable[[ArrayRecord, dict[str, Any]], RecordDict]
NONE: dict[str, Any] = {"fraction_evaluate": 0}
SIZE = 7


def honest(node: int) -> np.ndarray:
    return (1 + 0.1 * np.random.default_rng([3, node]).standard_normal(SIZE)).astype(np.float32)


def whole(arrays: ArrayRecord, metrics: dict[str, Any]) -> RecordDict:
    return RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)})


def crash(arrays: ArrayRecord, metrics: dict[str, Any]) -> RecordDict:
    raise ValueError("out of memory")


def put(value: float, where: Any = slice(None)) -> Spoil:
    def spoil(arrays: ArrayRecord, metrics: dict[str, Any]) -> RecordDict:
        values = arrays["w"].numpy()
        values[where] = value
        return whole(ArrayRecord({**arrays, "w": Array(values)}), metrics)

    return spoil


def claim(weight: Any) -> Spoil:
    return lambda arrays, metrics: whole(arrays.map(lambda x: x - 100), {**metrics, "num-examples": weight})


def shaped(array: np.ndarray) -> Spoil:
    return lambda arrays, metrics: whole(ArrayRecord({**arrays, "w": Array(array)}), metrics)


LEFT_OUT: dict[str, Spoil] = {
    "NaN": put(np.nan),
    "NaN in one coordinate": put(np.nan, 3),
    "minus infinity in one": put(-np.inf, 0),
    "negative examples": claim(-4),
    "10^30 examples": claim(10**30),
    "NaN examples": claim(float("nan")),
    "a list of examples": claim([1, 2]),
    "another shape": shaped(np.zeros((SIZE, 1), np.float32)),
    "another dtype": shaped(np.zeros(SIZE)),
    "no elements": shaped(np.zeros(0, np.float32)),
    "no arrays": lambda arrays, metrics: RecordDict({"metrics": MetricRecord(metrics)}),
    "a foreign array": lambda arrays, metrics: whole(ArrayRecord({**arrays, "x": Array(np.ones(2))}), metrics),
}
OUTLIERS: dict[str, Spoil] = {
    "1e38": put(1e38),
    "-3e38": put(-3e38),
    "1e38 in one coordinate": put(1e38, 2),
    "1e20": put(1e20),
    "a subnormal number": put(1e-42),
    "1e9 examples": claim(1e9),
    "no examples": claim(0),
}
# each with f = 2, at the least number of nodes that the rule allows
AT_THE_EDGE: dict[str, tuple[Callable[..., Strategy], int]] = {
    "median": (FedMedian, 5),
    "trimmed mean": (lambda **a: FedTrimmedAvg(beta=0.4, **a), 5),
    "Krum": (lambda **a: Krum(num_malicious_nodes=2, **a), 7),
    "multi-Krum": (lambda **a: MultiKrum(num_malicious_nodes=2, num_nodes_to_select=5, **a), 7),
    "Bulyan": (lambda **a: Bulyan(num_malicious_nodes=2, **a), 11),
    "geometric median": (RFA, 5),
    "mixing, then median": (lambda **a: NearestNeighborMixing(FedMedian(), num_malicious_nodes=2, **a), 5),
    "mixing, then Krum": (
        lambda **a: NearestNeighborMixing(Krum(num_malicious_nodes=2), num_malicious_nodes=2, **a),
        7,
    ),
    "mixing, then Bulyan": (
        lambda **a: NearestNeighborMixing(Bulyan(num_malicious_nodes=2), num_malicious_nodes=2, **a),
        11,
    ),
}


def app_of(spoil: dict[int, Spoil]) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = message.content.array_records["arrays"]
        arrays = ArrayRecord({**arrays, "w": Array(arrays["w"].numpy() + honest(context.node_id))})
        metrics = {"num-examples": 10, "train_loss": 1.0}
        return Message(spoil.get(context.node_id, whole)(arrays, metrics), reply_to=message)

    return app


def moved(strategy: Strategy, nodes: int, spoil: dict[int, Spoil], rounds: int = 1) -> tuple[np.ndarray, Any]:
    model = ArrayRecord({"w": Array(np.zeros(SIZE, np.float32)), "empty": Array(np.zeros((0, 2), np.float32))})
    result = strategy.start(LocalGrid(app_of(spoil), nodes, seed=1), model, rounds)
    return result.arrays["w"].numpy(), result.rounds


@pytest.mark.parametrize("attack", [*LEFT_OUT, *OUTLIERS])
@pytest.mark.parametrize("name", AT_THE_EDGE)
def test_f_nodes_are_withstood_at_the_least_number_of_nodes(name: str, attack: str) -> None:
    """Those whose replies cannot be used are among the f, or any of them could stop the training by a NaN."""
    make, nodes = AT_THE_EDGE[name]
    spoil = {**LEFT_OUT, **OUTLIERS}[attack]
    found, rounds = moved(make(**NONE), nodes, {1: spoil, 4: spoil})
    left = np.array([honest(node) for node in range(1, nodes + 1) if node not in (1, 4)])
    assert np.abs(found - left.mean(axis=0)).max() <= 2 * np.abs(left - left.mean(axis=0)).max()
    excluded = [one["node"] for one in rounds[0]["train-replies"]["excluded"]]
    assert excluded == ([1, 4] if attack in LEFT_OUT else [])


@pytest.mark.parametrize("name", ["Krum", "multi-Krum", "Bulyan", "mixing, then Krum"])
def test_a_node_that_fails_is_not_taken_for_one_of_the_f(name: str) -> None:
    make, nodes = AT_THE_EDGE[name]
    with pytest.raises(RunFailed, match=rf"= {nodes} rows to tolerate f = 2 .* got n = {nodes - 1}"):
        moved(make(**NONE), nodes, {4: crash})


def test_f_is_lowered_only_as_far_as_the_rows_need_it() -> None:
    strategy = Krum(num_malicious_nodes=3)
    assert [strategy.tolerated(n) for n in (11, 9, 8)] == [3, 3, 3]
    strategy.spoiled = 2
    assert [strategy.tolerated(n) for n in (11, 9, 8, 7, 6, 5, 4)] == [3, 3, 2, 2, 1, 1, 1]
    strategy.spoiled = 9
    assert [strategy.tolerated(n) for n in (9, 4, 2)] == [3, 0, 0]


def test_more_left_out_than_f_are_refused_with_the_numbers() -> None:
    spoil = LEFT_OUT["NaN"]
    with pytest.raises(RunFailed, match=r"4f \+ 3 = 3 rows to tolerate f = 0 .* got n = 2"):
        moved(Bulyan(num_malicious_nodes=1, **NONE), 7, dict.fromkeys(range(1, 6), spoil))


def test_a_state_of_the_last_round_lowers_no_f() -> None:
    make, nodes = AT_THE_EDGE["mixing, then Krum"]
    strategy = make(**NONE)
    moved(strategy, nodes, {1: LEFT_OUT["NaN"]})
    with pytest.raises(RunFailed, match="to tolerate f = 2"):
        moved(strategy, nodes, {1: crash})


@pytest.mark.parametrize("nodes", range(3, 12))
def test_a_trimmed_mean_always_leaves_a_middle(nodes: int) -> None:
    """Six nodes and beta 0.4 are 2.4 nodes a side: three would leave nothing."""
    few = int(0.4 * nodes)
    found, _ = moved(FedTrimmedAvg(beta=0.4, **NONE), nodes, dict.fromkeys(range(1, few + 1), put(1e6)))
    left = np.array([honest(node) for node in range(few + 1, nodes + 1)])
    assert (found >= left.min(axis=0) - 1e-6).all() and (found <= left.max(axis=0) + 1e-6).all()


def test_a_trimmed_mean_of_two_is_refused_before_anyone_is_asked() -> None:
    with pytest.raises(RunFailed, match=r"needs n >= 2f \+ 1 = 3 rows, got n = 2 .* or lower beta"):
        moved(FedTrimmedAvg(**NONE), 2, {})
    found, _ = moved(FedTrimmedAvg(beta=0, **NONE), 2, {})
    np.testing.assert_allclose(found, (honest(1) + honest(2)) / 2, rtol=1e-6)


def test_multi_krum_never_takes_in_an_attacker_by_taking_all() -> None:
    strategy = MultiKrum(num_malicious_nodes=2, num_nodes_to_select=9, **NONE)
    found, _ = moved(strategy, 9, {2: put(1e6), 8: put(1e6)})
    left = np.array([honest(node) for node in range(1, 10) if node not in (2, 8)])
    np.testing.assert_allclose(found, left.mean(axis=0), rtol=1e-5)
    X = np.zeros((9, 3))
    for keep in (0, 8, 9, 10):
        with pytest.raises(rules.Refusal, match=r"1 <= keep <= n - f = 7"):
            rules.multi_krum(X, 2, keep)
    with pytest.raises(ValueError, match="keep must be a whole number"):
        rules.multi_krum(X, 2, -1)


class Spy(RobustStrategy):
    """A rule of somebody's own, which knows arrays and nothing else."""

    def aggregate(self, rows: np.ndarray) -> np.ndarray:
        assert type(rows) is np.ndarray and rows.dtype == np.float32 and rows.shape[1] == SIZE
        return np.median(rows, axis=0)


class OwnMedian(FedMedian):
    """A built-in rule with its `aggregate` replaced."""

    def aggregate(self, rows: np.ndarray) -> np.ndarray:
        assert type(rows) is np.ndarray
        return super().aggregate(rows)


INNER: dict[str, Callable[..., RobustStrategy]] = {
    "median": FedMedian,
    "trimmed mean": FedTrimmedAvg,
    "Krum": lambda: Krum(num_malicious_nodes=2),
    "multi-Krum": lambda: MultiKrum(num_malicious_nodes=2, num_nodes_to_select=3),
    "Bulyan": lambda: Bulyan(num_malicious_nodes=2),
    "geometric median": RFA,
    "centred clipping": lambda: CenteredClipping(radius=0.5, steps=2),
    "mixing": lambda: NearestNeighborMixing(FedMedian(), num_malicious_nodes=1),
    "of one's own": Spy,
    "aggregate replaced": OwnMedian,
}


@pytest.mark.parametrize("huge", [False, True])
@pytest.mark.parametrize("name", INNER)
def test_mixed_rows_give_the_same_made_or_not(name: str, huge: bool) -> None:
    rows = np.array([honest(node) for node in range(1, 14)])
    if huge:
        rows[4, 1] = 1e38
    found = NearestNeighborMixing(INNER[name](), num_malicious_nodes=2).aggregate(rows)
    kept = np.delete(rows, 4, axis=0) if huge else rows
    made = rules.nearest_neighbor_mixing(kept, 1 if huge else 2)
    # Bulyan: mixed rows of equal neighbours tie, and which value of two equally near ones counts is rounding's affair
    np.testing.assert_allclose(found, INNER[name]().aggregate(made), rtol=2e-2 if name == "Bulyan" else 2e-6)


@pytest.mark.parametrize("name", [name for name in INNER if name not in ("of one's own", "aggregate replaced")])
def test_mixed_rows_never_lie_in_memory(name: str) -> None:
    rows = np.random.default_rng(0).standard_normal((16, 600_000), np.float32)
    strategy = NearestNeighborMixing(INNER[name](), num_malicious_nodes=2)
    tracemalloc.start()
    out = strategy.aggregate(rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert out.nbytes < 4 * rows.shape[1] + 1
    assert peak < out.nbytes + (16 << 20) < rows.nbytes


@pytest.mark.parametrize("loss", [0.0, -1.0, None, [1.0, 2.0]])
def test_q_fedavg_leaves_out_a_node_without_a_loss(loss: Any) -> None:
    def spoil(arrays: ArrayRecord, metrics: dict[str, Any]) -> RecordDict:
        metrics = {key: value for key, value in metrics.items() if key != "train_loss"}
        return whole(arrays, metrics if loss is None else {**metrics, "train_loss": loss})

    found, rounds = moved(QFedAvg(client_learning_rate=0.1, q=0.5, **NONE), 4, {2: spoil})
    without, _ = moved(QFedAvg(client_learning_rate=0.1, q=0.5, **NONE), 4, {2: crash})
    np.testing.assert_array_equal(found, without)
    assert [one["node"] for one in rounds[0]["train-replies"]["excluded"]] == [2]
    with pytest.raises(QuorumError, match="q-FedAvg needs a loss > 0"):
        moved(QFedAvg(client_learning_rate=0.1, **NONE), 3, {1: spoil, 2: spoil})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("q", [0.0, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("loss", [1e308, 1e-320])
def test_q_fedavg_keeps_its_digits_at_any_loss(loss: float, q: float) -> None:
    """Losses at either end of float64: the weights are theirs, to the power q."""

    def spoil(arrays: ArrayRecord, metrics: dict[str, Any]) -> RecordDict:
        return whole(arrays, {**metrics, "train_loss": loss})

    found, _ = moved(QFedAvg(client_learning_rate=1.0, q=q, **NONE), 4, {2: spoil})
    rows = np.array([honest(node) for node in range(1, 5)], np.float64)
    if q == 0:
        expected = rows.mean(axis=0)
    elif loss > 1:  # it takes over, as the paper has it
        expected = rows[1] if q > 0.1 else np.average(rows, axis=0, weights=[1, loss**q, 1, 1])
    elif q < 1:  # its step size is infinitesimal
        expected = np.zeros(SIZE)
    else:
        squares = np.delete((rows**2).sum(axis=1), 1)
        own = (rows[1] ** 2).sum() if q == 1 else 0.0
        expected = np.delete(rows, 1, axis=0).sum(axis=0) / ((q * squares + 1).sum() + own)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_rules_take_rows_that_are_made_as_they_are_read() -> None:
    rows = [honest(node) for node in range(1, 6)]
    np.testing.assert_array_equal(rules.mean(row for row in rows), rules.mean(rows))
    np.testing.assert_array_equal(rules.monna((row for row in rows), 1), rules.monna(rows, 1))


def test_a_thousand_nodes_and_many_attackers_in_a_real_simulation() -> None:
    """A third of the nodes lie, in several ways; ties of equal rows fall to the lowest node."""
    bad = dict(enumerate([*LEFT_OUT.values(), *OUTLIERS.values(), crash] * 15, start=200))
    server, results = ServerApp(), []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        model = ArrayRecord({"w": Array(np.zeros(SIZE, np.float32))})
        for strategy in (RFA(**NONE), MultiKrum(num_malicious_nodes=330, num_nodes_to_select=100, **NONE)):
            results.append(strategy.start(grid, model, 1).arrays["w"].numpy())

    run_simulation(server, app_of(bad), 1000, seed=1)
    for found in results:
        assert np.abs(found - 1).max() < 0.1


def test_a_mean_is_ruined_by_the_same_node() -> None:
    """So that what the others withstand is something."""
    found, _ = moved(FedAvg(**NONE), 7, {1: OUTLIERS["1e20"]})
    assert np.abs(found).min() > 1e18
