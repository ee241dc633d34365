"""The data and the model: softmax regression on scikit-learn's digits, dealt out evenly or by label skew."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from privfed.context import derived_rng
from privfed.partition import dirichlet, iid
from privfed.strategies import rules

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]
CLASSES = 10
SHAPE = (65, CLASSES)


@cache
def digits(seed: int) -> tuple[Floats, Labels, Floats, Labels]:
    """Return train rows, train labels, test rows (360) and test labels; rows have unit norm."""
    pixels, labels = load_digits(return_X_y=True)
    rows = np.c_[pixels / 16 - 0.5, np.ones(len(pixels))]
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    order = derived_rng(seed, "split").permutation(len(rows))
    return rows[order[360:]], labels[order[360:]], rows[order[:360]], labels[order[:360]]


@cache
def partition(seed: int, nodes: int, alpha: float) -> list[tuple[Floats, Labels]]:
    """Return every node's rows and labels; alpha 0 deals them out evenly."""
    rows, labels, _, _ = digits(seed)
    rng = derived_rng(seed, "partition")
    parts = dirichlet(labels, nodes, alpha, rng, min_examples=10) if alpha else iid(len(labels), nodes, rng)
    return [(rows[part], labels[part]) for part in parts]


def train(weights: Floats, rows: Floats, labels: Labels, steps: int, rate: float) -> Floats:
    """Take full-batch gradient steps on the cross-entropy."""
    targets = np.eye(CLASSES, dtype=np.float32)[labels]
    for _ in range(steps):
        scores = rows @ weights
        chances = np.exp(scores - scores.max(axis=1, keepdims=True))
        chances /= chances.sum(axis=1, keepdims=True)
        weights = weights - np.float32(rate / len(labels)) * (rows.T @ (chances - targets))
    return weights


def accuracy(weights: Floats, rows: Floats, labels: Labels) -> float:
    return float(np.mean((rows @ weights).argmax(axis=1) == labels))


def aggregators(f: int) -> dict[str, Callable[[Any], Any]]:
    """Return what each strategy of the table makes of the updates: what an attacker tries its strength against."""
    plain: dict[str, Callable[[Any], Any]] = {
        "median": rules.median,
        "trimmed mean": lambda X: rules.trimmed_mean(X, f),
        "geometric median": rules.geometric_median,
        "Krum": lambda X: rules.krum(X, f),
        "multi-Krum": lambda X: rules.multi_krum(X, f),
        "Bulyan": lambda X: rules.bulyan(X, f),
    }
    made = {"mean": rules.mean, **plain}
    for name, rule in plain.items():
        made[f"NNM + {name}"] = lambda X, rule=rule: rule(rules.lazy_mixing(X, f))
    return made
