"""Rules that look for the direction in which rows disagree most: SMEA, CAF, DnC."""

from __future__ import annotations

from itertools import combinations, islice
from math import comb, isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.strategies.gram import Gram, Square, Vector, as_gram, center_of, combine, gram, near_origin
from privfed.strategies.guard import (
    Refusal,
    count,
    guarded,
    index_set,
    keep_some,
    require,
    require_majority,
)
from privfed.strategies.matrix import Floats, Matrix

SUBSETS = 200_000


def smea_weights(G: Square | Gram, f: int, budget: int = SUBSETS) -> Vector:
    """Return equal weights on the n-f rows whose covariance has the least top eigenvalue [AGPS23].

    Looks at all C(n, f) sets; Refusal when they are more than `budget`. First in dictionary order on ties.
    """
    inner = as_gram(G).inner
    n, f = len(inner), count(f)
    keep_some("smea_weights", n, n - f)
    if comb(n, f) > budget:
        raise Refusal(f"smea would look at C({n}, {f}) = {comb(n, f)} sets, more than {budget}; use caf instead")
    sets = combinations(range(n), n - f)
    best, chosen = np.inf, np.arange(n - f)
    while batch := list(islice(sets, 4096)):
        index = np.array(batch, dtype=np.intp)
        part = inner[index[:, :, None], index[:, None, :]]
        part = part - part.mean(axis=1, keepdims=True)
        part = part - part.mean(axis=2, keepdims=True)
        top = np.linalg.eigvalsh((part + part.transpose(0, 2, 1)) / 2)[:, -1]
        first = int(np.argmin(top))
        if top[first] < best * (1 - 1e-12):
            best, chosen = float(top[first]), index[first]
    return index_set(chosen, n)


def smea(X: Any, f: int, *, budget: int = SUBSETS, center: Any = None) -> Any:
    """Return the mean of the n-f rows of least variance in their worst direction [AGPS23].

    X: n rows of d numbers, n > 2f, few enough that C(n, f) sets can be looked at. Guarantee: squared error at most
    4f/(n-2f) times the top eigenvalue of honest covariance, not its trace, so that it stays useful under noise added
    for privacy; kappa = 4f/(n-2f) all the more (docs/robustness.md). Breakdown point: f/n. Cost: n^2 d / 2
    multiplications and C(n, f) eigenvalue problems of n x n.
    """

    def body(rows: Matrix, f: int) -> Floats:
        require_majority("smea", rows.count, f)
        return combine(rows, smea_weights(gram(rows, center_of(rows, center)), f, budget))

    return guarded(X, f, body)


def caf_weights(G: Square | Gram, f: int) -> Vector:
    """Return the weights of the covariance-bound agnostic filter [AGS25].

    Rows lose weight in proportion to their squared projection on the worst direction, until n-2f of it is left;
    the weights at which that direction's variance was least are returned, summing to one.
    """
    inner = as_gram(G).inner
    n, f = len(inner), count(f)
    keep_some("caf_weights", n, n - 2 * f)
    left, best, chosen = np.ones(n), np.inf, np.full(n, 1.0 / n)
    while left.sum() > n - 2 * f:
        share = left / left.sum()
        image = inner @ share
        centred = inner - image[:, None] - image[None, :] + share @ image
        root = np.sqrt(share)
        values, vectors = np.linalg.eigh(root[:, None] * centred * root[None, :])
        if values[-1] < best:
            best, chosen = float(values[-1]), share
        spread = np.where(left > 0, (centred @ (root * vectors[:, -1])) ** 2, 0.0)
        if not spread.max() > 0:
            break
        left = left * (1.0 - spread / spread.max())
    return chosen


def caf(X: Any, f: int, *, center: Any = None) -> Any:
    """Return the mean left by a filter that needs no bound on honest covariance [AGS25].

    X: n rows of d numbers, n > 2f. Guarantee: of SMEA's kind, in the top eigenvalue [AGS25]; its constant is not
    checked here. Breakdown point: f/n. Cost: n^2 d / 2 multiplications and at most n eigenvalue problems of n x n,
    where SMEA's number is exponential.
    """

    def body(rows: Matrix, f: int) -> Floats:
        require_majority("caf", rows.count, f)
        G = gram(rows, center_of(rows, center))
        return combine(rows, caf_weights(G, f), None if center is None and near_origin(G) else G.medoid)

    return guarded(X, f, body)


def dnc_rows(G: Square | Gram, remove: int) -> NDArray[np.intp]:
    """Return all rows but the `remove` with the greatest projection on the top direction about the mean [SH21]."""
    inner = as_gram(G).inner
    n = len(inner)
    kept = keep_some("dnc_rows", n, n - count(remove, "remove"))
    centred = inner - inner.mean(axis=0) - inner.mean(axis=1)[:, None] + inner.mean()
    _, vectors = np.linalg.eigh((centred + centred.T) / 2)
    scores = (centred @ vectors[:, -1]) ** 2
    return np.sort(np.argsort(scores, kind="stable")[:kept])


def dnc(
    X: Any,
    f: int,
    *,
    rng: np.random.Generator | None = None,
    dimension: int = 10_000,
    iterations: int = 1,
    share: float = 1.0,
) -> Any:
    """Return the mean of rows that divide-and-conquer never finds extreme [SH21].

    Each iteration projects `dimension` random coordinates on their top direction and drops the share * f most extreme
    rows; rows dropped never are averaged. X: n > 2f rows. rng draws coordinates: without one all coordinates are used,
    and one iteration says it all. Beyond the paper, drawn coordinates come after a look at all of them, so that nobody
    hides in those seldom drawn: n > (iterations + 1) ceil(share * f). Guarantee: no kappa is known; the paper's
    bound supposes attackers far out in one direction. Breakdown point: share * f / n, share at most 1. Cost: n^2 d / 2
    multiplications, and n^2 dimension / 2 an iteration.
    """
    count(iterations, "iterations", 1), count(dimension, "dimension", 1)
    if not (share > 0 and isfinite(share)):
        raise ValueError(f"share must be positive: nothing else drops anybody, got {share}")
    if rng is None and iterations != 1:
        raise ValueError("iterations beyond the first need rng: without it every iteration sees the same coordinates")

    def body(rows: Matrix, f: int) -> Floats:
        require_majority("dnc", rows.count, f)
        drop = int(np.ceil(share * f))
        draws = 0 if rng is None or dimension >= rows.size else iterations
        looks = "(iterations + 1) * " if draws else ""
        require("dnc", rows.count, f, (draws + 1) * drop + 1, f"{looks}ceil(share * f) + 1")
        G = gram(rows)  # also what notices unusable rows
        good = np.zeros(rows.count, dtype=bool)
        good[dnc_rows(G, drop)] = True
        for _ in range(draws):
            assert rng is not None
            part = gram(_columns(rows, np.sort(rng.choice(rows.size, dimension, replace=False))))
            kept = np.zeros(rows.count, dtype=bool)
            kept[dnc_rows(part, drop)] = True
            good &= kept
        return combine(rows, index_set(np.flatnonzero(good), rows.count), G.medoid)

    return guarded(X, f, body)


def _columns(rows: Matrix, index: NDArray[np.intp]) -> Matrix:
    picked = np.empty((rows.count, len(index)), rows.work)
    for i in range(rows.count):
        if rows.array is not None:
            picked[i] = rows.array[i, index]
        else:
            for at in range(0, rows.size, 1 << 18):
                stop = min(at + (1 << 18), rows.size)
                low, high = np.searchsorted(index, [at, stop])
                picked[i, low:high] = rows.row(i, at, stop)[index[low:high] - at]
    return Matrix(rows.count, len(index), rows.dtype, rows.wrap, picked, clean=rows.clean)
