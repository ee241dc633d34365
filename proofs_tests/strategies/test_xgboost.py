"""Federated trees with real XGBoost: the joined model predicts the sum of its parts, and bad trees stay out."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import xgboost
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_breast_cancer, load_iris

from privfed import run_simulation
from privfed.apps import ClientApp, ServerApp
from privfed.context import Context
from privfed.errors import PlanRefused, QuorumError, RunFailed
from privfed.grid import Grid, LocalGrid, MemoryRecorder
from privfed.message import Message
from privfed.plan import PrivacyPlan
from privfed.protocols import SecAgg
from privfed.record import ArrayRecord, MetricRecord, RecordDict
from privfed.strategies import FedXgbBagging, FedXgbCyclic, GroupedStage, forest

BINARY = {"objective": "binary:logistic", "max_depth": 3, "eta": 0.3, "base_score": 0.5, "nthread": 1, "seed": 1}
SOFT = {**BINARY, "objective": "multi:softprob", "num_class": 3}
NODES = 4
Spoil = Callable[[int, dict[str, Any]], Any]


@lru_cache
def data(name: str) -> tuple[np.ndarray, np.ndarray]:
    rows, labels = (load_breast_cancer if name == "cancer" else load_iris)(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(rows))
    return rows[order], labels[order]


def share(node: int, name: str) -> xgboost.DMatrix:
    rows, labels = data(name)
    return xgboost.DMatrix(rows[node - 1 :: NODES + 1], labels[node - 1 :: NODES + 1])


def held_out(name: str) -> tuple[xgboost.DMatrix, np.ndarray]:
    rows, labels = data(name)
    return xgboost.DMatrix(rows[NODES :: NODES + 1]), labels[NODES :: NODES + 1]


def load(array: np.ndarray) -> xgboost.Booster:
    booster = xgboost.Booster({"nthread": 1})
    booster.load_model(bytearray(array.tobytes()))
    return booster


def boost(array: np.ndarray, node: int, name: str, parameters: dict[str, Any], trees: int = 1) -> xgboost.Booster:
    start = load(array) if array.size else None
    return xgboost.train(parameters, share(node, name), trees, xgb_model=start)


def app_of(
    *, whole: bool, name: str = "cancer", parameters: dict[str, Any] = BINARY, spoil: Spoil | None = None
) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        array = next(iter(message.content.array_records["arrays"].values())).numpy()
        old = load(array).num_boosted_rounds() if array.size else 0
        booster = boost(array, context.node_id, name, parameters)
        raw = (booster if whole else booster[old:]).save_raw("json")
        if spoil is not None:
            made = spoil(context.node_id, json.loads(raw))
            raw = made if isinstance(made, bytes) else json.dumps(made).encode()
        arrays = ArrayRecord([np.frombuffer(raw, np.uint8)])
        metrics = MetricRecord({"num-examples": 10})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return app


def empty() -> ArrayRecord:
    return ArrayRecord([np.zeros(0, np.uint8)])


def margins(array: np.ndarray, rows: xgboost.DMatrix) -> np.ndarray:
    return np.asarray(load(array).predict(rows, output_margin=True))


@pytest.mark.parametrize(("name", "parameters"), [("cancer", BINARY), ("iris", SOFT)])
@pytest.mark.parametrize("average", [True, False])
def test_the_joined_model_predicts_the_sum_of_its_parts(name: str, parameters: dict[str, Any], average: bool) -> None:
    strategy = FedXgbBagging(average_trees=average, fraction_evaluate=0.0)
    grid = LocalGrid(app_of(whole=False, name=name, parameters=parameters), NODES)
    (model,) = strategy.start(grid, empty(), num_rounds=1).arrays.to_numpy_ndarrays()
    rows, _ = held_out(name)
    alone = [boost(np.zeros(0), node, name, parameters) for node in range(1, NODES + 1)]
    base = 0.5 if name == "iris" else 0.0  # logit(0.5) = 0
    parts = sum(one.predict(rows, output_margin=True) - base for one in alone)
    np.testing.assert_allclose(margins(model, rows), base + parts / (NODES if average else 1), atol=1e-5)


def test_both_learn_what_one_node_alone_does_not_better() -> None:
    rows, labels = held_out("cancer")
    alone = np.mean((boost(np.zeros(0), 1, "cancer", BINARY, 12).predict(rows) > 0.5) == labels)
    for strategy, whole in ((FedXgbBagging, False), (FedXgbCyclic, True)):
        grid = LocalGrid(app_of(whole=whole), NODES)
        result = strategy(fraction_evaluate=0.0).start(grid, empty(), num_rounds=12)
        booster = load(result.arrays.to_numpy_ndarrays()[0])
        accuracy = np.mean((booster.predict(rows) > 0.5) == labels)
        assert accuracy >= alone - 0.01
        assert accuracy > 0.93
        assert len(booster.get_dump()) == (12 * NODES if strategy is FedXgbBagging else 12)


def test_cyclic_is_boosting_in_turn_and_survives_a_resume() -> None:
    array = np.zeros(0, np.uint8)
    for turn in range(6):
        array = np.frombuffer(boost(array, turn % NODES + 1, "cancer", BINARY).save_raw("json"), np.uint8)
    recorder = MemoryRecorder()
    FedXgbCyclic(fraction_evaluate=0.0).start(
        LocalGrid(app_of(whole=True), NODES, recorder=recorder), empty(), num_rounds=3
    )
    grid = LocalGrid(app_of(whole=True), NODES, recorder=MemoryRecorder(recorder.checkpoint))
    result = FedXgbCyclic(fraction_evaluate=0.0).start(grid, empty(), num_rounds=6)
    rows, _ = held_out("cancer")
    np.testing.assert_array_equal(margins(result.arrays.to_numpy_ndarrays()[0], rows), margins(array, rows))


def test_cyclic_passes_over_a_node_that_fails_or_rewrites_history() -> None:
    def spoil(node: int, document: dict[str, Any]) -> Any:
        trees = document["learner"]["gradient_booster"]["model"]["trees"]
        if node == 2 and len(trees) > 1:
            trees[0]["split_conditions"] = [9.0 for _ in trees[0]["split_conditions"]]
        return b"no model" if node == 3 else document

    grid = LocalGrid(app_of(whole=True, spoil=spoil), NODES)
    result = FedXgbCyclic(fraction_evaluate=0.0).start(grid, empty(), num_rounds=2)
    replies = result.rounds[1]["train-replies"]
    assert [one["node"] for one in replies["excluded"]] == [2, 3]
    assert "trees that are not its own" in replies["excluded"][0]["cause"]
    assert "not an XGBoost JSON model" in replies["excluded"][1]["cause"]
    assert replies["valid"] == 1
    assert len(load(result.arrays.to_numpy_ndarrays()[0]).get_dump()) == 2


def edit(path: str, value: Any) -> Spoil:
    """Set a place in node 2's document."""

    def spoil(node: int, document: dict[str, Any]) -> Any:
        if node != 2:
            return document
        place: Any = document["learner"]
        *way, last = path.split("/")
        for step in way:
            place = place[int(step) if step.isdigit() else step]
        place[int(last) if last.isdigit() else last] = value
        return document

    return spoil


TREE = "gradient_booster/model/trees/0"
BAD: list[tuple[Spoil, str]] = [
    (lambda node, document: b"\xff\x00" if node == 2 else document, "not an XGBoost JSON model"),
    (lambda node, document: [] if node == 2 else document, "not an XGBoost JSON model"),
    (lambda node, document: b"[" * 100_000 if node == 2 else document, "not an XGBoost JSON model"),
    (edit(f"{TREE}/split_conditions/0", float("nan")), "NaN is no finite number"),
    (edit(f"{TREE}/split_conditions/0", 1e999), "Infinity is no finite number"),
    (edit(f"{TREE}/left_children/0", 10**6), "leaves its tree"),
    (edit(f"{TREE}/left_children/1", 0), "leaves its tree"),
    (edit(f"{TREE}/left_children/0", "1"), "no integer"),
    (edit(f"{TREE}/split_indices/0", 30), "leaves its tree or the features"),
    (edit(f"{TREE}/parents/1", 2), "not its parent's child"),
    (edit(f"{TREE}/split_type/0", 1), "only numeric splits"),
    (edit(f"{TREE}/base_weights", []), "differ in length"),
    (edit(f"{TREE}/default_left/0", 7), "default_left"),
    (edit("gradient_booster/model/tree_info", []), "numbers of trees disagree"),
    (edit("gradient_booster/model/tree_info", [5]), "belongs to no class"),
    (edit("gradient_booster/model/iteration_indptr", [0, 0, 1]), "rounds do not divide"),
    (edit("gradient_booster/name", "dart"), "only gbtree"),
    (edit("learner_model_param/num_target", "2"), "several targets"),
    (edit("learner_model_param/base_score", "[7E-1]"), "base score"),
    (edit("objective/name", "reg:squarederror"), "objective"),
]


@pytest.mark.parametrize(("spoil", "cause"), BAD, ids=[str(number) for number in range(len(BAD))])
def test_a_bad_forest_is_excluded_with_its_cause(spoil: Spoil, cause: str) -> None:
    grid = LocalGrid(app_of(whole=False, spoil=spoil), NODES)
    result = FedXgbBagging(fraction_evaluate=0.0).start(grid, empty(), num_rounds=1)
    (excluded,) = result.rounds[0]["train-replies"]["excluded"]
    assert excluded["node"] == 2
    assert cause in excluded["cause"]
    assert len(load(result.arrays.to_numpy_ndarrays()[0]).get_dump()) == NODES - 1


@lru_cache
def sample() -> bytes:
    return bytes(boost(np.zeros(0), 1, "iris", SOFT).save_raw("json"))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_no_change_of_one_value_gets_past_the_reader_and_breaks_xgboost(draw: st.DataObject) -> None:
    document = json.loads(sample())
    place: Any = copy.deepcopy(document["learner"]["gradient_booster"]["model"])
    root = place
    while True:
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key = draw.draw(st.sampled_from(list(keys)))
        if not isinstance(place[key], dict | list) or not place[key] or draw.draw(st.integers(0, 9)) == 0:
            place[key] = draw.draw(
                st.one_of(st.integers(-3, 300), st.floats(allow_nan=False), st.sampled_from(["", "1", None, [], {}]))
            )
            break
        place = place[key]
    document["learner"]["gradient_booster"]["model"] = root
    try:
        read = forest.read(np.frombuffer(json.dumps(document).encode(), np.uint8))
    except forest.ForestError:
        return
    assert load(read.write()).predict(held_out("iris")[0]).shape == (30, 3)


def test_extra_keys_are_not_handed_on() -> None:
    document = json.loads(sample())
    document["learner"]["attributes"]["tracker"] = "abc"
    document["learner"]["gradient_booster"]["model"]["trees"][0]["extra"] = "abc"
    written = forest.read(np.frombuffer(json.dumps(document).encode(), np.uint8)).write()
    assert b"abc" not in written.tobytes()


def test_in_simulation_and_what_is_refused() -> None:
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> ArrayRecord:
        return FedXgbBagging(fraction_evaluate=0.0).start(grid, empty(), num_rounds=2).arrays

    result = run_simulation(server, app_of(whole=False), NODES).result
    assert len(load(result.to_numpy_ndarrays()[0]).get_dump()) == 2 * NODES
    with pytest.raises(ValueError, match="trees, which have no sum"):
        FedXgbBagging(stage=GroupedStage(SecAgg(threshold=2), 4), fraction_evaluate=0.0)
    with pytest.raises(PlanRefused, match="no sensitivity is stated for FedXgbCyclic"):
        FedXgbCyclic(privacy=PrivacyPlan(clip=1.0, epsilon=1.0, delta=1e-5), fraction_evaluate=0.0)
    with pytest.raises(RunFailed, match="the model on the server: not an XGBoost JSON model"):
        FedXgbCyclic(fraction_evaluate=0.0).start(
            LocalGrid(app_of(whole=True), NODES), ArrayRecord([np.ones(3, np.uint8)]), num_rounds=1
        )
    with pytest.raises(QuorumError, match="0 valid replies"):
        FedXgbCyclic(fraction_evaluate=0.0).start(
            LocalGrid(app_of(whole=True, spoil=lambda node, document: b"{}"), NODES), empty(), num_rounds=1
        )
