"""Attacks do what their papers say, on matrices and as client mods."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from privfed.apps import ClientApp
from privfed.attacks import client, forgery
from privfed.attacks.search import strongest, strongest_inner_product, strongest_little
from privfed.context import Context
from privfed.grid import LocalGrid
from privfed.message import Message
from privfed.record import ArrayRecord, MetricRecord, RecordDict
from privfed.strategies import RFA, FedAvg, FedMedian, Strategy, rules


def honest_rows(seed: int, n: int = 9, d: int = 12) -> Any:
    return np.random.default_rng(seed).standard_normal((n, d)) + 1.0


@given(seed=st.integers(0, 10**6), direction=st.sampled_from(["deviation", "unit", "sign"]))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_min_max_and_min_sum_go_exactly_to_their_bound(seed: int, direction: str) -> None:
    X = honest_rows(seed)
    D = ((X[:, None] - X[None]) ** 2).sum(axis=2)
    far = ((forgery.min_max(X, direction) - X) ** 2).sum(axis=1).max()
    assert far == pytest.approx(D.max(), rel=1e-9)
    total = ((forgery.min_sum(X, direction) - X) ** 2).sum()
    assert total == pytest.approx(D.sum(axis=1).max(), rel=1e-9)
    with pytest.raises(ValueError, match="direction"):
        forgery.min_max(X, "up")


def test_simple_forgeries() -> None:
    X = honest_rows(0)
    mean = X.mean(axis=0)
    np.testing.assert_allclose(forgery.sign_flip(X, 2.0), -2 * mean)
    np.testing.assert_allclose(forgery.inner_product(X, 0.1), -0.1 * mean)
    np.testing.assert_allclose(forgery.little_is_enough(X, 1.5), mean + 1.5 * X.std(axis=0, ddof=1))
    np.testing.assert_array_equal(forgery.mimic(X, 3), X[3])
    assert np.isnan(forgery.non_finite(X)).all()
    assert np.isinf(forgery.non_finite(X, np.inf, 4)).sum() == 1
    assert forgery.gaussian(X, np.random.default_rng(0), 3.0).std() > 1
    spread = np.vstack([X, X.mean(axis=0) + 100 * np.eye(12)[0]])
    np.testing.assert_array_equal(forgery.mimic(spread, None), spread[-1])
    np.testing.assert_allclose(forgery.scaled(X[0], 10, center=X[1]), X[1] + 10 * (X[0] - X[1]))


def test_little_is_enough_uses_the_papers_strength() -> None:
    # 50 clients, 24 attackers: s = 2 supporters among 26, z = quantile 24/26
    assert forgery.little_strength(50, 24) == pytest.approx(1.426, abs=1e-3)
    X = honest_rows(1, n=26)
    np.testing.assert_allclose(
        forgery.little_is_enough(X, clients=50), forgery.little_is_enough(X, forgery.little_strength(50, 24))
    )
    with pytest.raises(ValueError, match="minority"):
        forgery.little_strength(10, 6)
    with pytest.raises(ValueError, match="strength"):
        forgery.little_is_enough(X)
    with pytest.raises(ValueError, match="at least 2"):
        forgery.little_is_enough(X[:1], 1.0)


def test_model_replacement_decides_a_mean() -> None:
    target, center = np.arange(4.0), np.full(4, 2.0)
    X = np.vstack(
        [np.repeat(center[None], 9, axis=0), forgery.model_replacement(center[None], target, clients=10, center=center)]
    )
    np.testing.assert_allclose(rules.mean(X), target, atol=1e-14)


@pytest.mark.parametrize("search", [strongest_inner_product, strongest_little])
@pytest.mark.parametrize("rule", [rules.trimmed_mean, rules.krum, lambda X, f: rules.median(X)])
def test_search_beats_fixed_strengths_and_reports_its_damage(search: Any, rule: Any) -> None:
    X, f = honest_rows(3, n=11), 3
    found = search(X, f, partial(rule, f=f))
    result = rule(np.vstack([X, np.repeat(found.row[None], f, axis=0)]), f)
    assert found.damage == pytest.approx(np.linalg.norm(result - X.mean(axis=0)))
    for weaker in (0.0, 10.0):
        family = forgery.inner_product if search is strongest_inner_product else forgery.little_is_enough
        again = rule(np.vstack([X, np.repeat(family(X, weaker)[None], f, axis=0)]), f)
        assert found.damage >= np.linalg.norm(again - X.mean(axis=0)) - 1e-12


def test_search_on_the_mean_never_stops_growing() -> None:
    found = strongest_inner_product(honest_rows(0), 2, rules.mean)
    assert found.strength > 1e6
    with pytest.raises(ValueError, match="evaluations"):
        strongest(honest_rows(0), 2, rules.mean, forgery.inner_product, evaluations=0)


def exchange(mod: client.Mod, kind: str = "train", *, node_id: int = 7) -> RecordDict:
    start = {"w": np.full((2, 2), 10.0, np.float32), "steps": np.array([3])}
    sent = {"w": start["w"] + np.array([[1, 2], [3, 4]], np.float32), "steps": np.array([4])}

    def record(arrays: dict[str, Any]) -> ArrayRecord:
        from privfed.array import Array

        return ArrayRecord({name: Array.from_numpy_ndarray(a) for name, a in arrays.items()})

    message = Message(RecordDict({"arrays": record(start)}), dst_node_id=node_id, message_type=kind)
    reply = RecordDict({"arrays": record(sent), "metrics": MetricRecord({"num-examples": 5})})
    answer = mod(message, Context(node_id=node_id), lambda m, c: Message(reply, reply_to=m))
    return answer.content


def weights(content: RecordDict) -> Any:
    return content.array_records["arrays"]["w"].numpy()


UPDATE = np.array([[1, 2], [3, 4]], np.float32)


@pytest.mark.parametrize(
    ("mod", "expected"),
    [
        (client.flip_sign(), -UPDATE),
        (client.flip_sign(3.0), -3 * UPDATE),
        (client.boost(10.0), 10 * UPDATE),
        (client.forge(forgery.sign_flip), -UPDATE),
        (client.forge(forgery.sign_flip, lambda m, c: np.ones((3, 4))), -np.ones((2, 2))),
    ],
)
def test_a_mod_changes_the_update_and_nothing_else(mod: client.Mod, expected: Any) -> None:
    content = exchange(mod)
    np.testing.assert_allclose(weights(content), 10 + expected)
    assert weights(content).dtype == np.float32
    assert content.array_records["arrays"]["steps"].numpy() == 4
    assert content.metric_records["metrics"]["num-examples"] == 5
    np.testing.assert_allclose(weights(exchange(mod, "evaluate")), 10 + UPDATE)


def test_mods_that_poison_and_make_noise() -> None:
    assert np.isnan(weights(exchange(client.poison()))).all()
    assert np.isinf(weights(exchange(client.poison(1e39, 2)))).sum() == 1
    again = [weights(exchange(client.add_noise(1.0, seed=3), node_id=k)) for k in (1, 1, 2)]
    np.testing.assert_array_equal(again[0], again[1])
    assert not np.array_equal(again[0], again[2])
    with pytest.raises(ValueError, match="shape"):
        exchange(client.forge(lambda rows: np.ones(3)))


def test_labels_and_backdoors() -> None:
    np.testing.assert_array_equal(client.flip_labels(np.array([0, 3, 9]), 10), [9, 6, 0])
    with pytest.raises(ValueError, match="from 0 to 9"):
        client.flip_labels(np.array([10]), 10)
    x, y = client.stamp_backdoor(np.zeros((4, 2, 2)), np.arange(4), coordinates=[0, 3], value=9.0, target=7, share=0.5)
    np.testing.assert_array_equal(y, [7, 7, 2, 3])
    np.testing.assert_array_equal(x[0], [[9, 0], [0, 9]])
    assert not x[2:].any()
    with pytest.raises(ValueError, match="share"):
        client.stamp_backdoor(x, y, coordinates=[0], value=1.0, target=0, share=2.0)


def test_a_search_goes_on_where_a_rule_refuses() -> None:
    """A strength that no rule takes does no damage; a rule that refuses from the start is an error."""
    found = strongest_inner_product(honest_rows(0).astype(np.float32), 2, rules.mean, evaluations=90)
    assert np.isfinite(found.row).all() and 1e15 < found.strength < 1e18
    with pytest.raises(rules.Refusal, match="krum needs"):
        strongest_inner_product(honest_rows(0, n=4), 3, partial(rules.krum, f=3))


CLASSES, NODES = 10, 10


def learn(w: Any, inputs: Any, labels: Any, steps: int) -> Any:
    for _ in range(steps):
        odds = np.exp(inputs @ w - (inputs @ w).max(axis=1, keepdims=True))
        w = w - 0.5 * inputs.T @ (odds / odds.sum(axis=1, keepdims=True) - np.eye(CLASSES)[labels]) / len(labels)
    return w


def federation(strategy: Strategy, bad: dict[int, tuple[Callable[[Any, Any], Any], client.Mod | None]]) -> Any:
    """Train on digits, real ones, and return the model: `bad` has what a node makes of its data, and its mod."""
    digits = load_digits()
    inputs, labels = np.c_[digits.data / 16, np.ones(len(digits.data))], digits.target
    parts = np.array_split(np.random.default_rng(0).permutation(1500), NODES)

    def corrupt(message: Message, context: Context, call_next: Any) -> Message:
        mod = bad.get(context.node_id, (None, None))[1]
        return mod(message, context, call_next) if mod is not None else call_next(message, context)

    app = ClientApp(mods=[corrupt])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        mine = parts[context.node_id - 1]
        data = inputs[mine], labels[mine]
        if context.node_id in bad:
            data = bad[context.node_id][0](*data)
        w = learn(message.content.array_records["arrays"]["0"].numpy(), *data, 10)
        metrics = MetricRecord({"num-examples": len(mine)})
        return Message(RecordDict({"arrays": ArrayRecord([w]), "metrics": metrics}), reply_to=message)

    start = ArrayRecord([np.zeros((inputs.shape[1], CLASSES))])
    model = strategy.start(LocalGrid(app, NODES, seed=1), start, 15).arrays["0"].numpy()
    return model, inputs[1500:], labels[1500:]


def share(model: Any, inputs: Any, labels: Any) -> float:
    return float(((inputs @ model).argmax(axis=1) == labels).mean())


def test_label_flips_take_a_mean_along_and_no_median() -> None:
    flippers = {node: (lambda x, y: (x, client.flip_labels(y, CLASSES)), client.boost(6.0)) for node in (1, 2, 3)}
    ruined = federation(FedAvg(fraction_evaluate=0), flippers)
    assert share(*ruined) < 0.4 < 0.8 < share(*federation(FedAvg(fraction_evaluate=0), {}))
    assert share(*federation(FedMedian(fraction_evaluate=0), flippers)) > 0.8


def test_one_replaced_model_brings_a_backdoor_into_a_mean_and_into_no_geometric_median() -> None:
    """The corner pixel, always dark in digits, is the trigger; the boosted update of one node of ten carries it."""

    def poisoned(x: Any, y: Any) -> Any:
        stamped, changed = client.stamp_backdoor(x, y, coordinates=[0, 32], value=2.0, target=7, share=0.5)
        return np.r_[x, stamped], np.r_[y, changed]

    bad = {4: (poisoned, client.boost(float(NODES)))}
    hits = []
    for strategy in (FedAvg(fraction_evaluate=0), RFA(fraction_evaluate=0)):
        model, inputs, labels = federation(strategy, bad)
        stamped, _ = client.stamp_backdoor(inputs, labels, coordinates=[0, 32], value=2.0, target=7)
        others = labels != 7
        hits.append(share(model, stamped[others], np.full(others.sum(), 7)))
        assert share(model, inputs, labels) > 0.75
    assert hits[0] > 0.9 and hits[1] < 0.3
