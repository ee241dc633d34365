"""Inner products of rows, in blocks, guarded against overflow and cancellation: all most rules need.

A rule of this kind is `weights(G, f) -> w`, then `w @ X`: two reads of the input and n x n numbers between.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from privfed.strategies.compiled import kernels_for
from privfed.strategies.guard import Tainted, limit, usable_vector
from privfed.strategies.matrix import (
    Floats,
    Matrix,
    Mixed,
    Room,
    centred_block,
    full_row,
    run_blocks,
)
from privfed.strategies.sums import sum_width, weighted_sum

Square: TypeAlias = NDArray[np.float64]
Vector: TypeAlias = NDArray[np.float64]

# A squared distance below this share of the two squared norms has lost the digits the rules need: recentre.
RESOLVED = 1e-3
BLOCK = 8192
# Products of up to a million multiplications need no packing in OpenBLAS, which is half the time of a thin one.
PANEL_ROWS, PANEL_PRODUCTS, PANEL_MOST = 8, 10**6, 128
SEGMENTS = 4  # sums run in this fixed tree, so that results do not depend on the number of threads


@dataclass(frozen=True, eq=False)
class Gram:
    """What the rules know about the rows: n x n float64 each.

    origin: inner products about the given centre (zero by default): norms and cosines of updates.
    distance: squared distances, symmetric, zero diagonal, free of cancellation.
    medoid: the row whose median distance to the others is least; lowest index on ties.
    inner: inner products about the medoid, the reference at which honest rows keep their digits.
    """

    origin: Square = field(repr=False)
    distance: Square = field(repr=False)
    medoid: int
    inner: Square = field(repr=False)

    @property
    def count(self) -> int:
        """Return the number of rows."""
        return len(self.origin)


def distances(G: Square) -> Square:
    """Return squared distances from inner products: symmetric, never negative, zero on the diagonal."""
    norm = np.diagonal(G)
    D = norm[:, None] + norm[None, :]
    D -= G
    D -= G.T
    np.maximum(D, 0.0, out=D)
    np.fill_diagonal(D, 0.0)
    return D


def medoid(D: Square) -> int:
    """Return the row with the least median squared distance to all rows; lowest index on ties."""
    return int(np.argmin(np.sort(D, axis=1)[:, len(D) // 2]))


def recentre(G: Square, index: int) -> Square:
    """Return inner products about row `index`; symmetric to the last bit."""
    column = G[:, index]
    moved = G - (column[:, None] + column[None, :])
    moved += G[index, index]
    moved += moved.T
    moved *= 0.5
    moved[index, :] = moved[:, index] = 0.0
    return np.asarray(moved)


def as_gram(G: Square | Gram) -> Gram:
    """Return a Gram from a plain n x n matrix of inner products; ValueError when it is none."""
    if isinstance(G, Gram):
        return G
    G = np.asarray(G, dtype=np.float64)
    if G.ndim != 2 or G.shape[0] != G.shape[1] or not len(G):
        raise ValueError(f"G must be a square matrix of inner products, got shape {G.shape}")
    if not np.isfinite(G).all():
        raise ValueError("G is not finite; screen the rows before taking inner products")
    D = distances(G)
    middle = medoid(D)
    return Gram(G, D, middle, recentre(G, middle))


def gram(matrix: Matrix, center: Floats | None = None) -> Gram:
    """Return the inner products and distances of rows, about `center` (flat) where one is known.

    Distances are right to 1e-4 however far the rows lie from the origin: rows too close for the first pass are
    measured again about a row among them. Raises Tainted when rows need screening first.
    """
    if isinstance(matrix, Mixed) and matrix.weights.ndim == 2 and center is None and matrix.source is not None:
        return _mixed_gram(matrix)
    origin = inner_products(matrix, center)
    D = distances(origin)
    groups = _unresolved(origin, D)
    if not groups:
        middle = medoid(D)
        return Gram(origin, D, middle, recentre(origin, middle))
    first = medoid(D)
    inner = inner_products(matrix, first)
    D = distances(inner)
    for group in _unresolved(inner, D):
        D[np.ix_(group, group)] = _close_distances(matrix, group, D)
    middle = medoid(D)
    return Gram(origin, D, middle, inner if middle == first else recentre(inner, middle))


def near_origin(G: Gram) -> bool:
    """Say that rows lie no farther from the origin than a few times from each other: a mean needs no other centre."""
    return bool(G.origin[G.medoid, G.medoid] <= 4.0 * np.median(G.distance[G.medoid]))


def inner_products(matrix: Matrix, origin: int | Floats | None = None) -> Square:
    """Return (x_i - o) . (x_j - o) for all pairs of rows, accumulated in float64 over blocks of columns."""
    n = matrix.count
    width = BLOCK if matrix.direct and origin is None else matrix.width(BLOCK)
    blocks = -(-matrix.size // width)
    share = max(-(-blocks // SEGMENTS), 1) * width
    sums: dict[int, Square] = {}

    def segment(start: int, stop: int) -> None:
        G = np.zeros((n, n))
        with np.errstate(all="ignore"):  # overflow and NaN are looked for, in every part
            for low in range(start, stop, width):
                block, _ = centred_block(matrix, low, min(low + width, stop), origin)
                _add_products(block, G, check=not matrix.clean)
        sums[start] = G

    run_blocks(matrix.size, share, segment)
    total = np.zeros((n, n))
    for start in sorted(sums):
        total += sums.pop(start)
    lower = np.tril(total, -1)
    lower += lower.T
    np.fill_diagonal(lower, np.diagonal(total))
    return lower


def _add_products(block: Floats, G: Square, *, check: bool) -> None:
    """Add the inner products of the rows of a block to G, of which only the lower triangle is right."""
    n, columns = block.shape
    bound = limit(block.dtype) ** 2
    few = n <= PANEL_MOST
    width = max(64, PANEL_PRODUCTS // (n * PANEL_ROWS) // 64 * 64) if few else columns
    part = np.zeros((n, n), block.dtype)
    for start in range(0, columns, width):
        X = block[:, start : start + width]
        if few:
            for row in range(0, n, PANEL_ROWS):
                stop = row + PANEL_ROWS
                np.matmul(X[row:], X[row:stop].T, out=part[row:, row:stop])
        else:
            np.matmul(X, X.T, out=part)
        if check and not (np.diagonal(part) <= bound).all():
            raise Tainted
        G += part


def combine(matrix: Matrix, weights: Vector, origin: int | Floats | None = None) -> Floats:
    """Return o + sum_i w_i (x_i - o) over the rows with a weight other than zero.

    Rows without weight are not read. See `weighted_sum`.
    """
    if isinstance(matrix, Mixed) and matrix.source is not None and abs(weights.sum() - 1.0) < 1e-9:
        # an affine mix of o + W (x - o) is one of x, whichever point it is taken about
        through = weights @ matrix.weights if matrix.weights.ndim == 2 else weights * matrix.weights
        plain = origin is None and through.min() >= 0 and abs(through.sum() - 1.0) < 1e-9
        return combine(matrix.source, through, None if plain else matrix.origin)
    chosen = np.flatnonzero(weights)
    out = np.zeros(matrix.size, matrix.work)
    if origin is None and len(chosen) == 1 and weights[chosen[0]] == 1.0:
        index = int(chosen[0])

        def copy(start: int, stop: int) -> None:
            out[start:stop] = matrix.row(index, start, stop)

        run_blocks(matrix.size, 1 << 16, copy)
        return out
    if isinstance(origin, int):
        origin = full_row(matrix, origin)
    everything = len(chosen) == matrix.count
    rows = matrix if everything else matrix.take(chosen)
    factor, room, kernels = weights[chosen], Room(), kernels_for(rows)

    def add(start: int, stop: int) -> None:
        part = None if origin is None else origin[start:stop]
        weighted_sum(rows, start, stop, factor, out[start:stop], room, kernels=kernels, about=part)

    if len(chosen):
        run_blocks(matrix.size, sum_width(rows, kernels), add)
    elif origin is not None:
        out[:] = origin
    return out


def _unresolved(G: Square, D: Square) -> list[NDArray[np.intp]]:
    """Return the groups of rows, connected by pairs, that lie too close together for this origin."""
    norm = np.diagonal(G)
    near = RESOLVED * (norm[:, None] + norm[None, :]) > D
    np.fill_diagonal(near, False)
    groups, left = [], set(np.flatnonzero(near.any(axis=1)).tolist())
    while left:
        stack, group = [min(left)], set()
        while stack:
            i = stack.pop()
            if i in left:
                left.discard(i)
                group.add(i)
                stack.extend(np.flatnonzero(near[i]).tolist())
        groups.append(np.array(sorted(group), dtype=np.intp))
    return groups


def _close_distances(matrix: Matrix, group: NDArray[np.intp], D: Square, depth: int = 0) -> Square:
    """Return the squared distances inside a tight group, measured about its own medoid.

    Each level gains more than a factor of 30 in scale; below 8 levels float32 itself has nothing left to tell.
    """
    middle = medoid(D[np.ix_(group, group)])
    rows = matrix.take(group)
    G = inner_products(rows, middle)
    inner = distances(G)
    if depth < 8:
        for part in _unresolved(G, inner):
            if len(part) < len(group):
                inner[np.ix_(part, part)] = _close_distances(rows, part, inner, depth + 1)
    return inner


def _mixed_gram(matrix: Mixed) -> Gram:
    """Return the Gram of rows W X from that of X: W G W', without a look at the mixed rows."""
    assert matrix.source is not None
    known = matrix.known
    if known is None:
        below = gram(matrix.source)
        known = below.origin, below.inner
    W = matrix.weights
    origin, inner = _congruent(W, known[0]), _congruent(W, known[1])
    D = distances(inner)
    middle = medoid(D)
    return Gram(origin, D, middle, recentre(inner, middle))


def _congruent(W: Square, G: Square) -> Square:
    out = W @ G @ W.T
    out += out.T
    out *= 0.5
    return np.asarray(out)


def center_of(matrix: Matrix, center: Any) -> Floats | None:
    """Return a caller's centre (None, array, or list of layers) flat, in the dtype blocks are read in."""
    return None if center is None else usable_vector(center, matrix, "center")
