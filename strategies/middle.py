"""Rules that find a middle: means, norm bounding, centred clipping, the geometric median."""

from __future__ import annotations

from typing import Any

import numpy as np

from privfed.strategies.compiled import kernels_for
from privfed.strategies.gram import (
    Gram,
    Square,
    Vector,
    as_gram,
    center_of,
    combine,
    gram,
    near_origin,
)
from privfed.strategies.guard import Refusal, Screened, count, guarded, require_majority
from privfed.strategies.matrix import Floats, Matrix, Room, as_matrix, run_blocks
from privfed.strategies.sums import sum_width, weighted_sum

CONVERGED = 1e-9


def mean(X: Any) -> Any:
    """Return the plain mean of rows.

    Guarantee: none; Refusal when one row is unusable. Breakdown point: 0, one row decides the result. Cost: one read.
    """
    return weighted_mean(X, None)


def weighted_mean(X: Any, weights: Any = None, *, cap: float | None = None) -> Any:
    """Return sum_i w_i x_i / sum_i w_i; equal weights when none are given [MMRHA17].

    cap: the most any one weight may count, in units of the median weight: a client that claims 1e9 examples then weighs
    no more than `cap` ordinary ones. Guarantee: none. Breakdown point: 0, one row decides the result. Cost: one read.
    Errors: Refusal when a row holds NaN, infinity or a huge number; ValueError for weights that are negative, not
    finite or all zero.
    """
    given = X if isinstance(X, Screened) else as_matrix(X)
    factor = _shares(weights, given.rows.count if isinstance(given, Screened) else given.count, cap)

    def body(rows: Matrix, f: int) -> Floats:
        out = np.empty(rows.size, rows.work)
        room, kernels = Room(), kernels_for(rows)

        def columns(start: int, stop: int) -> None:
            weighted_sum(rows, start, stop, factor, out[start:stop], room, kernels=kernels, look=True)

        run_blocks(rows.size, sum_width(rows, kernels), columns)
        return out

    return guarded(given, None if isinstance(given, Screened) else 0, body)


def clip_weights(G: Square | Gram, radius: float, steps: int = 1) -> Vector:
    """Return the weights w of `steps` of centred clipping from the origin: the result is w @ X [KHJ21].

    G: inner products of x_i - v_0 about the starting point v_0. Weights sum to at most one.
    """
    return _clip(_with_start(as_gram(G)), radius, steps)[:-1]


def centered_clipping(X: Any, radius: float, center: Any = None, steps: int = 1) -> Any:
    """Return v after `steps` of v <- v + mean_i (x_i - v) min(1, radius / |x_i - v|), from v = center [KHJ21].

    center: the last aggregate, or the global model; zero by default, right for updates. It keeps no state. radius > 0.
    Guarantee: a step goes no farther than radius, and f rows move where it goes by 2 f radius / n at most; with a
    radius that suits the honest variance the squared error is O(f/n) of it [KHJ21], no constant is stated. Breakdown
    point: 1/2. Cost: one Gram matrix, n^2 d / 2 multiplications; the steps are n^2 each.
    """
    if not radius > 0:
        raise ValueError(f"radius must be positive, got {radius}")
    count(steps, "steps", 1)

    def body(rows: Matrix, f: int) -> Floats:
        origin = center_of(rows, center)
        return combine(rows, _clip(_with_start(gram(rows, origin)), radius, steps)[:-1], origin)

    return guarded(X, None, body)


def norm_bounding(X: Any, bound: float, *, center: Any = None) -> Any:
    """Return the mean of updates scaled down to norm `bound` [SKSM19].

    X: n updates, or n models with center = the global model. Guarantee: f rows move it by 2 f bound / n at most; no
    kappa. Breakdown point: none within that bound. Cost: one Gram matrix, n^2 d / 2 multiplications.
    """
    return centered_clipping(X, bound, center, 1)


def geometric_median_weights(G: Square | Gram, *, tolerance: float = CONVERGED, most: int = 5000) -> Vector:
    """Return the weights w of the geometric median: w @ X has the least sum of distances to the rows [Wei37].

    Weiszfeld's iteration from the row that is best itself, left by the rule of [VZ00]; stops when the residual
    of the optimality condition is at most `tolerance` a row. Weights sum to one.
    """
    gram_ = as_gram(G)
    inner, root = gram_.inner, np.sqrt(gram_.distance)
    n = len(inner)
    best = int(np.argmin(root.sum(axis=1)))
    away = root[best] > 0
    if not away.any():
        return _unit(n, best)
    toward = np.where(away, 1.0 / np.where(away, root[best], 1.0), 0.0)
    total = toward.sum()
    about = inner @ toward - inner[:, best] * total - inner[best] @ toward + inner[best, best] * total
    pull2 = max(float(toward @ about), 0.0)
    ties = n - int(away.sum())
    if pull2 <= ties**2:
        return _unit(n, best)
    step = (1.0 - ties / np.sqrt(pull2)) / toward.sum()
    weights = step * toward
    weights[best] += 1.0 - weights.sum()
    return _weiszfeld(inner, weights, tolerance, most)


def geometric_median(X: Any, f: int | None = None, *, center: Any = None) -> Any:
    """Return the point of least total distance to the rows (RFA without smoothing), converged [PKH22].

    X: n rows of d numbers. Rotation and translation move it along. Guarantee: kappa = 4 (1 + f/(n-2f))^2 for every f <
    n/2 [AFGGPS23]. Breakdown point: 1/2. Cost: one Gram matrix, n^2 d / 2 multiplications; the iterations are n^2 each.
    """

    def body(rows: Matrix, f: int) -> Floats:
        require_majority("geometric_median", rows.count, f)
        G = gram(rows, center_of(rows, center))
        return combine(rows, geometric_median_weights(G), None if center is None and near_origin(G) else G.medoid)

    return guarded(X, f, body)


def _weiszfeld(inner: Square, weights: Vector, tolerance: float, most: int) -> Vector:
    norm = np.diagonal(inner)
    scale = float(np.median(norm)) or float(norm.max())
    tiny = (1e-14 * scale) or 1e-300
    for _ in range(most):
        image = inner @ weights
        squared = norm - 2 * image + weights @ image
        pulls = 1.0 / np.sqrt(np.maximum(squared, tiny))
        after = pulls / pulls.sum()
        change = after - weights
        # |z' - z| times the sum of pulls is the norm of the gradient, at most n and zero at the optimum
        residual = np.sqrt(max(float(change @ inner @ change), 0.0)) * float(pulls.sum())
        weights = after
        if residual <= tolerance * len(norm):
            break
    return weights


def _with_start(G: Gram) -> Square:
    """Return inner products about the medoid of the rows and, last, of the point that `origin` is about."""
    toward = G.origin[G.medoid, G.medoid] - G.origin[:, G.medoid]
    n = G.count
    out = np.empty((n + 1, n + 1))
    out[:n, :n] = G.inner
    out[n, :n] = out[:n, n] = toward
    out[n, n] = G.origin[G.medoid, G.medoid]
    return out


def _clip(inner: Square, radius: float, steps: int) -> Vector:
    """Return affine weights of rows and, last, the starting point; inner products about any one origin."""
    n = len(inner) - 1
    weights = _unit(n + 1, n)
    norm = np.diagonal(inner)
    for _ in range(steps):
        image = inner @ weights
        length = np.sqrt(np.maximum(norm - 2 * image + weights @ image, 0.0))[:n]
        factor = np.divide(radius, length, out=np.ones(n), where=length > radius) / n
        weights = weights * (1.0 - factor.sum())
        weights[:n] += factor
    return weights


def _unit(n: int, index: int) -> Vector:
    weights = np.zeros(n)
    weights[index] = 1.0
    return weights


def _shares(weights: Any, n: int, cap: float | None) -> Vector:
    if weights is None:
        return np.full(n, 1.0 / n)
    values = np.asarray(weights, dtype=np.float64)
    if values.shape != (n,):
        raise ValueError(f"weights must be one number a row: X has {n} rows, weights has shape {values.shape}")
    bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if len(bad):
        raise ValueError(f"weights[{bad[0]}] is {values[bad[0]]}; weights must be finite and not negative")
    if cap is not None:
        if not cap > 0:
            raise ValueError(f"cap must be positive, got {cap}")
        positive = values[values > 0]
        values = np.minimum(values, cap * np.median(positive)) if len(positive) else values
    largest = values.max()
    if not largest > 0:
        raise Refusal("weights are all zero; there is nothing to average")
    shares = values / largest  # so that no sum of weights, however large or small, leaves the range
    return np.asarray(shares / shares.sum())
