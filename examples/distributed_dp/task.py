"""The data and the model: softmax regression on scikit-learn's digits, split over the nodes by label skew."""

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from privfed.context import derived_rng
from privfed.partition import dirichlet

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]
CLASSES = 10
SHAPE = (65, CLASSES)
ALPHA = 0.5


def digits(seed: int | None) -> tuple[Floats, Labels, Floats, Labels]:
    """Return train rows, train labels, test rows (360) and test labels; rows have unit norm."""
    pixels, labels = load_digits(return_X_y=True)
    rows = np.c_[pixels / 16 - 0.5, np.ones(len(pixels))]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    order = derived_rng(seed or 0, "split").permutation(len(rows))
    test, train = order[:360], order[360:]
    return rows[train], labels[train], rows[test], labels[test]


def partition(seed: int | None, nodes: int) -> list[tuple[Floats, Labels]]:
    """Return every node's rows and labels: about seven for 200 nodes, and none for some."""
    rows, labels, _, _ = digits(seed)
    parts = dirichlet(labels, nodes, ALPHA, derived_rng(seed or 0, "partition"), min_examples=0)
    return [(rows[part], labels[part]) for part in parts]


def softmax(scores: Floats) -> Floats:
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))


def train(weights: Floats, rows: Floats, labels: Labels, steps: int, rate: float) -> Floats:
    """Take full-batch gradient steps on the cross-entropy; without rows the weights stay as they are."""
    targets = np.eye(CLASSES)[labels]
    for _ in range(steps if len(labels) else 0):
        weights = weights - rate * rows.T @ (softmax(rows @ weights) - targets) / len(labels)
    return weights


def accuracy(weights: Floats, rows: Floats, labels: Labels) -> float:
    return float(np.mean((rows @ weights).argmax(axis=1) == labels))
