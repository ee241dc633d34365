"""Split a data set over nodes: who holds which examples."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def iid(examples: int, nodes: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Split indices 0..examples-1 evenly at random; sizes differ by at most one."""
    _check(examples, nodes)
    return [np.sort(part) for part in np.array_split(rng.permutation(examples), nodes)]


def dirichlet(
    labels: NDArray[Any], nodes: int, alpha: float, rng: np.random.Generator, *, min_examples: int = 1
) -> list[NDArray[np.int64]]:
    """Split indices so that each class is spread over the nodes by a Dirichlet(alpha) draw.

    labels: class of each example, any dtype. alpha: small is skewed (0.1), large is even (100).
    min_examples: a node with fewer takes random examples from the largest nodes, so that every node can train.
    Raises ValueError when alpha <= 0 or there are not enough examples.
    """
    labels = np.asarray(labels)
    _check(len(labels), nodes)
    if not alpha > 0:
        raise ValueError(f"alpha must be > 0, got {alpha}")
    if len(labels) < nodes * min_examples:
        raise ValueError(f"{len(labels)} examples cannot give {nodes} nodes min_examples={min_examples} each")
    parts: list[list[int]] = [[] for _ in range(nodes)]
    for value in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == value))
        cuts = np.rint(np.cumsum(rng.dirichlet(np.full(nodes, alpha)))[:-1] * len(members)).astype(int)
        for part, chunk in zip(parts, np.split(members, cuts), strict=True):
            part.extend(chunk.tolist())
    while min(map(len, parts)) < min_examples:
        poor = min(range(nodes), key=lambda node: (len(parts[node]), node))
        rich = max(range(nodes), key=lambda node: (len(parts[node]), -node))
        parts[poor].append(parts[rich].pop(int(rng.integers(len(parts[rich])))))
    return [np.sort(np.array(part, dtype=np.int64)) for part in parts]


def _check(examples: int, nodes: int) -> None:
    if nodes < 1:
        raise ValueError(f"nodes must be >= 1, got {nodes}")
    if examples < nodes:
        raise ValueError(f"{examples} examples cannot be split over {nodes} nodes")
