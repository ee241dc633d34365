"""What is done to rows before a rule: nearest-neighbour mixing, bucketing, clipping.

Each comes twice: as a function that returns the new rows in memory, and as `lazy(...)`, whose rows are made block
by block inside the rule and whose Gram matrix is W G W'.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from privfed.strategies.gram import Gram, Square, Vector, as_gram, center_of, gram
from privfed.strategies.guard import Refusal, Screened, Tainted, count, require_majority, screen
from privfed.strategies.matrix import Floats, Matrix, as_matrix, dense, mixed

Plan: TypeAlias = Callable[[Matrix, int], tuple[Square | Vector, int | Floats | None, tuple[Square, Square] | None]]


def neighbor_weights(G: Square | Gram, f: int) -> Square:
    """Return W of nearest-neighbour mixing: row i averages its n-f nearest rows, itself among them."""
    D = np.array(as_gram(G).distance)
    n, f = len(D), count(f)
    if f >= n:
        raise Refusal(f"neighbor_weights averages the n-f nearest of n = {n} rows, and f = {f}")
    np.fill_diagonal(D, -1.0)
    nearest = np.argsort(D, axis=1, kind="stable")[:, : n - f]
    W = np.zeros((n, n))
    np.put_along_axis(W, nearest, 1.0 / (n - f), axis=1)
    return W


def bucket_weights(n: int, size: int, rng: np.random.Generator) -> Square:
    """Return W of bucketing: rows in random order, averaged `size` at a time, the last bucket maybe smaller."""
    if not count(size, "size", 1) <= n:
        raise ValueError(f"size must be from 1 to n = {n}, got {size}")
    order = rng.permutation(n)
    buckets = -(-n // size)
    W = np.zeros((buckets, n))
    for b in range(buckets):
        members = order[b * size : (b + 1) * size]
        W[b, members] = 1.0 / len(members)
    return W


def nearest_neighbor_mixing(X: Any, f: int, *, center: Any = None) -> Any:
    """Return rows replaced by the mean of their n-f nearest rows, themselves included [AFGGPS23].

    X: n rows of d numbers, n > 2f. Returns (n, d), or a list of rows in the form of X's. Ties: lowest index. Guarantee:
    a rule with kappa behind it has 8f/(n-f) (kappa + 1), the best order there is. Breakdown point: that of the rule,
    f/n at most. Cost: one Gram matrix, n^2 d / 2 multiplications, and n^2 d more to make the rows.
    """
    return _made(lazy_mixing(X, f, center=center))


def lazy_mixing(X: Any, f: int, *, center: Any = None) -> Screened:
    """Return the rows of nearest_neighbor_mixing unmade: for any rule, in place of X."""

    def plan(rows: Matrix, f: int) -> tuple[Square, int, tuple[Square, Square]]:
        require_majority("nearest_neighbor_mixing", rows.count, f)
        G = gram(rows, center_of(rows, center))
        return neighbor_weights(G, f), G.medoid, (G.origin, G.inner)

    return _lazy(X, f, plan)


def bucketing(X: Any, size: int, rng: np.random.Generator) -> Any:
    """Return means of random buckets of `size` rows: ceil(n / size) of them [KHJ22].

    Guarantee: honest buckets vary by 1/size of what honest rows do, in expectation [KHJ22]; the rule behind it keeps
    the f of the clients, for f of them spoil at most f buckets, and n / size > 2f must hold. Breakdown point: that of
    the rule, over size. Cost: one read, and the rows made.
    """
    return _made(lazy_bucketing(X, size, rng))


def lazy_bucketing(X: Any, size: int, rng: np.random.Generator, f: int | None = None) -> Screened:
    """Return the buckets of `bucketing` unmade: for any rule, in place of X. f None: any minority."""
    size = count(size, "size", 1)
    if not isinstance(rng, np.random.Generator):
        raise ValueError(f"rng must be a numpy.random.Generator, got {type(rng).__name__}")
    rows = X if isinstance(X, Screened) else as_matrix(X)
    if isinstance(rows, Matrix):
        rows = screen(rows, (rows.count - 1) // 2 if f is None else f)
    if f is None:  # what a rule can tolerate among the buckets
        rows = replace(rows, f=min(rows.f, (-(-rows.rows.count // size) - 1) // 2))
    return _lazy(rows, rows.f, lambda rows, f: (bucket_weights(rows.count, size, rng), None, None))


def clipping(X: Any, radius: float, *, center: Any = None) -> Any:
    """Return updates scaled down to norm `radius` about center (zero by default).

    Guarantee: none of its own; behind it no row is longer than radius. Breakdown point: that of the rule behind it.
    Cost: one Gram matrix, n^2 d / 2 multiplications, and the rows made.
    """
    return _made(lazy_clipping(X, radius, center=center))


def lazy_clipping(X: Any, radius: float, f: int | None = None, *, center: Any = None) -> Screened:
    """Return the rows of `clipping` unmade: for any rule, in place of X. f None: any minority."""
    if not radius > 0:
        raise ValueError(f"radius must be positive, got {radius}")

    def plan(rows: Matrix, f: int) -> tuple[Vector, Floats | None, None]:
        origin = center_of(rows, center)
        norms = _norms(rows, origin)
        return clip_factors(norms, radius), origin, None

    return _lazy(X, f, plan)


def arc(X: Any, f: int, *, center: Any = None) -> Any:
    """Return updates clipped to the norm that adaptive robust clipping picks [AGGPS25].

    The k = floor(2f (n-f) / n) greatest norms come down to the next one below them. X: n > 2f updates, or models with
    center = the global model. Guarantee: no row comes out longer than the longest honest one, since k >= f; the paper's
    bound for the rule behind it is not checked here. Breakdown point: f/n. Cost: one Gram matrix, n^2 d / 2
    multiplications, and the rows made.
    """
    return _made(lazy_arc(X, f, center=center))


def lazy_arc(X: Any, f: int, *, center: Any = None) -> Screened:
    """Return the rows of `arc` unmade: for any rule, in place of X."""

    def plan(rows: Matrix, f: int) -> tuple[Vector, Floats | None, None]:
        require_majority("arc", rows.count, f)
        origin = center_of(rows, center)
        norms = _norms(rows, origin)
        return clip_factors(norms, arc_radius(norms, f)), origin, None

    return _lazy(X, f, plan)


def arc_radius(norms: Vector, f: int) -> float:
    """Return the clipping norm of adaptive robust clipping: the (k+1)-th greatest, k = floor(2f (n-f) / n)."""
    n = len(norms)
    k = 2 * f * (n - f) // n
    return float(np.sort(norms)[n - 1 - k])


def clip_factors(norms: Vector, radius: float) -> Vector:
    """Return what each row is multiplied by to have norm `radius` at most."""
    return np.where(norms > radius, radius / np.where(norms > radius, norms, 1.0), 1.0)


def _norms(rows: Matrix, origin: Floats | None) -> Vector:
    return np.sqrt(np.diagonal(gram(rows, origin).origin))


def _lazy(X: Any, f: int | None, plan: Plan) -> Screened:
    if isinstance(X, Screened):
        screened = X
    else:
        rows = as_matrix(X)
        value = (rows.count - 1) // 2 if f is None else count(f)
        screened = Screened(rows, (), value, tuple(range(rows.count)))
    left = screened.f if f is None else min(count(f), screened.f)
    try:
        plan_ = plan(screened.rows, left)
    except Tainted:
        screened = screen(screened.rows, left)
        left = screened.f
        plan_ = plan(screened.rows, left)
    W, origin, known = plan_
    lazy = mixed(screened.rows, W, origin, known)
    return Screened(lazy, screened.excluded, left, screened.kept)


def _made(screened: Screened) -> Any:
    rows = dense(screened.rows)
    assert rows.array is not None
    made = [rows.wrap(row) for row in rows.array]
    if isinstance(made[0], list):
        return made
    first = np.asarray(made[0])
    return rows.array.reshape(rows.count, *first.shape)
