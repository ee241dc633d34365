"""Rules that choose rows by their distances: Krum, Multi-Krum, Bulyan, minimum diameter, MoNNA, CGE."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.strategies.coordinate import around
from privfed.strategies.diameter import BUDGET, smallest_diameter
from privfed.strategies.gram import Gram, Square, Vector, as_gram, center_of, combine, gram
from privfed.strategies.guard import (
    Refusal,
    Screened,
    count,
    guarded,
    index_set,
    keep_some,
    require,
    require_majority,
    trusted_row,
)
from privfed.strategies.matrix import Floats, Matrix, as_matrix, full_row


def krum_scores(G: Square | Gram, f: int, neighbours: int | None = None) -> Vector:
    """Return each row's sum of squared distances to its nearest others.

    neighbours: how many others count; n-f-2 by default [BEGS17]. n-f-1 is the definition of [AFGGPS23].
    """
    D = as_gram(G).distance
    return _scores(D, _neighbours(len(D), f, neighbours))


def krum_weights(G: Square | Gram, f: int, neighbours: int | None = None) -> Vector:
    """Return weight one on the row with the least Krum score; lowest index on ties."""
    scores = krum_scores(G, f, neighbours)
    return index_set(np.array([np.argmin(scores)]), len(scores))


def multi_krum_weights(G: Square | Gram, f: int, keep: int, neighbours: int | None = None) -> Vector:
    """Return equal weights on the `keep` rows of least Krum score; lowest index on ties."""
    scores = krum_scores(G, f, neighbours)
    kept = keep_some("multi_krum_weights", len(scores), count(keep, "keep"))
    return index_set(np.argsort(scores, kind="stable")[:kept], len(scores))


def bulyan_rows(G: Square | Gram, f: int) -> NDArray[np.intp]:
    """Return the n-2f rows that Krum picks one after the other, each from what the last pick left [EGR18].

    Of m rows left, m-f-2 neighbours count, and one at least.
    """
    D = np.array(as_gram(G).distance)
    left = np.arange(len(D))
    picked = []
    f = count(f)
    for _ in range(keep_some("bulyan_rows", len(D), len(D) - 2 * f)):
        best = int(np.argmin(_scores(D, max(min(len(left) - f - 2, len(left) - 1), min(1, len(left) - 1)))))
        picked.append(left[best])
        left = np.delete(left, best)
        D = np.delete(np.delete(D, best, axis=0), best, axis=1)
    return np.sort(np.array(picked, dtype=np.intp))


def minimum_diameter_weights(G: Square | Gram, f: int, budget: int = BUDGET) -> Vector:
    """Return equal weights on the n-f rows of least diameter; the first such set in dictionary order on ties."""
    D = as_gram(G).distance
    kept = keep_some("minimum_diameter_weights", len(D), len(D) - count(f))
    return index_set(smallest_diameter(D, kept, budget), len(D))


def cge_weights(G: Square | Gram, f: int) -> Vector:
    """Return equal weights on the n-f rows of least norm; lowest index on ties."""
    norms = np.diagonal(as_gram(G).origin)
    kept = keep_some("cge_weights", len(norms), len(norms) - count(f))
    return index_set(np.argsort(norms, kind="stable")[:kept], len(norms))


def monna_weights(G: Square | Gram, f: int, pivot: int = 0) -> Vector:
    """Return equal weights on the pivot and the n-f-1 rows nearest to it; lowest index on ties."""
    row = as_gram(G).distance[pivot].copy()
    row[pivot] = -1.0
    kept = keep_some("monna_weights", len(row), len(row) - count(f))
    return index_set(np.argsort(row, kind="stable")[:kept], len(row))


def krum(X: Any, f: int, *, neighbours: int | None = None, center: Any = None) -> Any:
    """Return the row whose n-f-2 nearest others are nearest, in squared distance [BEGS17].

    X: n rows of d numbers, n >= 2f+3; with `neighbours` = n-f-1, n > 2f suffices. center: the global model, where rows
    are models, saves a second look at the rows. Ties: lowest index. Guarantee: kappa = (sqrt(2(n-f)) + sqrt(f+1))^2 /
    (n-2f-1) (docs/robustness.md); with n-f-1 neighbours 6 (1 + f/(n-2f)) [AFGGPS23]. Breakdown point: f/n. Cost: n^2 d
    / 2 multiplications.
    """
    return multi_krum(X, f, 1, neighbours=neighbours, center=center, rule="krum")


def multi_krum(
    X: Any,
    f: int,
    keep: int | None = None,
    *,
    neighbours: int | None = None,
    center: Any = None,
    rule: str = "multi_krum",
) -> Any:
    """Return the unweighted mean of the `keep` rows of least Krum score [BEGS17]; keep is n-f by default, and at most.

    X: n rows of d numbers, n >= 2f+3 (n > 2f with `neighbours` = n-f-1). Clients' claimed numbers of examples have no
    part in it: a weight is a lever. Ties: lowest index. Guarantee: Krum's kappa, for any keep (docs/robustness.md).
    Breakdown point: f/n. Cost: n^2 d / 2 multiplications. Errors: Refusal says the numbers.
    """

    def body(rows: Matrix, f: int) -> Floats:
        n = rows.count
        kept = n - f if keep is None else count(keep, "keep")
        if neighbours is not None and neighbours >= n - f - 1:
            require_majority(rule, n, f)
        else:
            require(rule, n, f, 2 * f + 3, "2f + 3")
        if not 1 <= kept <= n - f:  # more would be sure to take in one of f
            raise Refusal(f"{rule} needs 1 <= keep <= n - f = {n - f}, got keep = {kept} with n = {n} rows")
        return combine(rows, multi_krum_weights(gram(rows, center_of(rows, center)), f, kept, neighbours))

    return guarded(X, f, body)


def bulyan(X: Any, f: int, *, center: Any = None) -> Any:
    """Return the mean of the n-4f values nearest to the median of n-2f rows picked by repeated Krum [EGR18].

    X: n rows of d numbers, n >= 4f+3. theta = n-2f, beta = theta-2f, as in the paper. Guarantee: kappa = ((sqrt(c) +
    sqrt(1+c))^2 + 1) (n-f)/(n-3f) with c = (n-2f)/(n-4f), whichever rows are picked (docs/robustness.md). Breakdown
    point: f/n, about 1/4. Cost: n^2 d / 2 multiplications, n^3 log n for the picks, n d log^2 n comparisons.
    """

    def body(rows: Matrix, f: int) -> Floats:
        require("bulyan", rows.count, f, 4 * f + 3, "4f + 3")
        picked = bulyan_rows(gram(rows, center_of(rows, center)), f)
        chosen = rows if len(picked) == rows.count else rows.take(picked)
        return around(chosen, len(picked) - 2 * f, "median", 0)

    return guarded(X, f, body)


def minimum_diameter_mean(X: Any, f: int, *, budget: int = BUDGET, center: Any = None) -> Any:
    """Return the mean of the n-f rows whose greatest mutual distance is least, exactly [EGGR20].

    X: n rows of d numbers, n > 2f. Ties: the first set in dictionary order. Guarantee: within 2f/(n-f) of the greatest
    distance among honest rows, so kappa = 8f^2/(n-f) (docs/robustness.md). Breakdown point: f/n. Cost: n^2 d / 2
    multiplications, and a search that is exponential in f at worst; Refusal when it takes more than `budget` steps.
    """

    def body(rows: Matrix, f: int) -> Floats:
        require_majority("minimum_diameter_mean", rows.count, f)
        return combine(rows, minimum_diameter_weights(gram(rows, center_of(rows, center)), f, budget))

    return guarded(X, f, body)


def cge(X: Any, f: int, *, center: Any = None) -> Any:
    """Return the mean of the n-f rows of least norm (comparative gradient elimination) [GV20].

    X: n updates, or n models with center = the global model; n > 2f. The paper sums; this is the mean. Ties: lowest
    index. Guarantee: no row counts that is longer than the longest honest one; there is no kappa, since short rows of
    any direction pass. Breakdown point: f/n. Cost: n^2 d / 2 multiplications.
    """

    def body(rows: Matrix, f: int) -> Floats:
        require_majority("cge", rows.count, f)
        return combine(rows, cge_weights(gram(rows, center_of(rows, center)), f))

    return guarded(X, f, body)


def monna(X: Any, f: int, *, pivot: int | Any = 0) -> Any:
    """Return the mean of the n-f rows nearest to a trusted one [FGGPS23].

    X: n rows of d numbers, n > 2f. pivot: a row's index, or a trusted row of the server's own. Ties: lowest index.
    Guarantee: squared error at most 4f/(n-f) (v + |pivot - m|^2), m and v the mean and variance of honest rows
    (docs/robustness.md): all of it rests on the pivot being honest. Breakdown point: f/n, and the pivot alone. Cost:
    n^2 d / 2 multiplications.
    """
    given = X if isinstance(X, Screened) else as_matrix(X)
    everyone = given.rows if isinstance(given, Screened) else given
    trusted = full_row(everyone, int(pivot)) if isinstance(pivot, int | np.integer) else pivot
    vector = trusted_row(trusted, everyone, "pivot")

    def body(rows: Matrix, f: int) -> Floats:
        require_majority("monna", rows.count, f)
        G = gram(rows.append(vector))
        row = G.distance[-1][:-1]
        return combine(rows, index_set(np.argsort(row, kind="stable")[: rows.count - f], rows.count))

    return guarded(given, f, body)


def _neighbours(n: int, f: int, neighbours: int | None) -> int:
    number = n - count(f) - 2 if neighbours is None else count(neighbours, "neighbours")
    if not min(1, n - 1) <= number <= n - 1:  # a row alone has no neighbour to count
        raise Refusal(f"Krum needs 1 <= neighbours <= n - 1, got neighbours = {number} with n = {n}, f = {f}")
    return number


def _scores(D: Square, neighbours: int) -> Vector:
    others = np.array(D)
    np.fill_diagonal(others, np.inf)
    if neighbours == 0:
        return np.zeros(len(D))
    others.partition(neighbours - 1, axis=1)
    near = np.sort(others[:, :neighbours], axis=1)  # one order of summation, so that equal sets tie exactly
    return np.asarray(near.sum(axis=1))
