"""Rules that work coordinate by coordinate: median, trimmed mean and their relatives."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from privfed.strategies.guard import Refusal, Screened, count, guarded, require_majority, screen
from privfed.strategies.matrix import Floats, Matrix, as_matrix, flat_vector, run_blocks
from privfed.strategies.network import by_rank


def median(X: Any, f: int | None = None) -> Any:
    """Return the coordinate-wise median [YCRB18]; the mean of the two middle values when n is even.

    X: n rows of d numbers. Guarantee: kappa = n/(n-2f) for every f < n/2 (docs/robustness.md; [AFGGPS23] has 4 (1 +
    f/(n-2f))^2). Breakdown point: 1/2. Cost: n d log^2 n comparisons, in cache. Errors: Refusal when more rows than f
    (any minority) are unusable.
    """

    def body(rows: Matrix, f: int) -> Floats:
        require_majority("median", rows.count, f)
        return median_rows(rows)

    return guarded(X, f, body)


def trimmed_mean(X: Any, f: int) -> Any:
    """Return the mean of what is left in each coordinate without its f smallest and f largest values [YCRB18].

    X: n rows of d numbers, n > 2f. f is a number of clients, never a share, so that nothing rounds it down to no
    protection at all. Guarantee: kappa = f/(n-2f), the least there is (docs/robustness.md; [AFGGPS23] has 6f/(n-2f) (1
    + f/(n-2f))). Breakdown point: f/n. Cost: n d log^2 n comparisons, in cache.
    """

    def body(rows: Matrix, f: int) -> Floats:
        require_majority("trimmed_mean", rows.count, f)
        return trimmed_rows(rows, f)

    return guarded(X, f, body)


def meamed(X: Any, f: int) -> Any:
    """Return, in each coordinate, the mean of the n-f values nearest to the median [XKG18].

    X: n rows of d numbers, n > 2f. Equally near values: the lower one, whatever the order of rows. Guarantee: kappa =
    (sqrt(c) + sqrt(1+c))^2 with c = n/(n-2f) (docs/robustness.md). Breakdown point: f/n. Cost: n d log^2 n comparisons
    and f d more, in cache.
    """

    def body(rows: Matrix, f: int) -> Floats:
        require_majority("meamed", rows.count, f)
        return around(rows, rows.count - f, "median", 0)

    return guarded(X, f, body)


def phocas(X: Any, f: int) -> Any:
    """Return, in each coordinate, the mean of the n-f values nearest to the trimmed mean [XKG18b].

    X: n rows of d numbers, n > 2f. Equally near values: the lower one. Guarantee: kappa = (sqrt(c) + sqrt(1+c))^2 with
    c = f/(n-2f) (docs/robustness.md). Breakdown point: f/n. Cost: n d log^2 n comparisons and f d more, in cache.
    """

    def body(rows: Matrix, f: int) -> Floats:
        require_majority("phocas", rows.count, f)
        return around(rows, rows.count - f, "trimmed", f)

    return guarded(X, f, body)


def mean_around(X: Any, reference: Any, keep: int) -> Any:
    """Return, in each coordinate, the mean of the `keep` values nearest to `reference`; lowest index on ties.

    X: n rows of d numbers; reference: one row, or one number for all coordinates. 1 <= keep <= n. Guarantee: as that of
    meamed with c v the reference's squared error, for keep = n-f; none for a reference nobody can vouch for. Breakdown
    point: (n-keep)/n. Cost: n d log n comparisons, column by column.
    """

    def body(rows: Matrix, f: int) -> Floats:
        kept = count(keep, "keep")
        if not 1 <= kept <= rows.count:
            raise Refusal(f"mean_around needs 1 <= keep <= n, got keep = {keep} with n = {rows.count} rows")
        center = flat_vector(reference, rows, "reference")
        out = np.empty(rows.size, rows.work)

        def columns(start: int, stop: int) -> None:
            block = rows.block(start, stop).astype(np.float64)
            order = np.argsort(np.abs(block - center[start:stop]), axis=0, kind="stable")[:kept]
            out[start:stop] = np.take_along_axis(block, order, axis=0).mean(axis=0)

        run_blocks(rows.size, max(16, rows.width() // 4), columns)
        return out

    rows = X if isinstance(X, Screened) else as_matrix(X)
    clean = rows if isinstance(rows, Screened) else screen(rows, (rows.count - 1) // 2)
    return guarded(clean, None, body)


def median_rows(rows: Matrix) -> Floats:
    """Return the median of every column."""
    n = rows.count
    low, high = (n - 1) // 2, n // 2

    def few(ranked: list[Floats]) -> Floats:
        return ranked[low] if low == high else _middle(ranked[low], ranked[high])

    def many(ranked: Floats) -> Floats:
        return ranked[:, low] if low == high else _middle(ranked[:, low], ranked[:, high])

    return by_rank(rows, (low, high), few, many)


def trimmed_rows(rows: Matrix, f: int) -> Floats:
    """Return the mean of ranks f..n-f-1 of every column."""
    n = rows.count
    share = 1.0 / (n - 2 * f)

    def few(ranked: list[Floats]) -> Floats:
        return _sum_rows(ranked[f : n - f]) * share

    def many(ranked: Floats) -> Floats:
        return _sum_ranks(ranked[:, f : n - f]) * share

    return by_rank(rows, tuple(range(f, n - f)), few, many, together=True)


def around(rows: Matrix, keep: int, reference: str, f: int) -> Floats:
    """Return the mean of the `keep` values of every column nearest to its median, or its f-trimmed mean.

    They are neighbours in rank order: a window, which moves up while the value above it is nearer than its
    lowest. Values are selected, never subtracted from running sums, where one outlier would cancel the rest.
    """
    n = rows.count
    shifts = n - keep

    def few(ranked: list[Floats]) -> Floats:
        if reference == "median":
            low, high = ranked[(n - 1) // 2], ranked[n // 2]
            middle = low if n % 2 else _middle(low, high)
        else:
            middle = (_sum_rows(ranked[f : n - f]) * (1.0 / (n - 2 * f))).astype(rows.work)
        window = ranked[:keep]
        for i in range(shifts):
            entering = ranked[i + keep]
            # a later move implies all earlier ones, so a slot's newest value is the right one
            moved = entering - middle < middle - ranked[i]
            window[i % keep] = np.where(moved, entering, window[i % keep])
        return _sum_rows(window) * (1.0 / keep)

    def many(ranked: Floats) -> Floats:
        return few(list(np.array(ranked.T, order="C")))

    return by_rank(rows, tuple(range(n)), few, many)


def _middle(low: Floats, high: Floats) -> Floats:
    return low * low.dtype.type(0.5) + high * high.dtype.type(0.5)


def _sum_rows(rows: list[Floats]) -> Floats:
    """Return the sum of equally long rows: sums of eight in their own dtype, those in float64."""
    total = np.zeros(rows[0].shape)
    for low in range(0, len(rows), 8):
        group = rows[low : low + 8]
        part = group[0] if len(group) == 1 else group[0] + group[1]
        for row in group[2:]:
            np.add(part, row, out=part)
        total += part
    return total


def _sum_ranks(ranked: Floats) -> Floats:
    """Return the sum of each row: sums of 32 in their own dtype, those in float64."""
    ones = _ones(ranked.dtype)
    total = (ranked[:, :32] @ ones[: min(32, ranked.shape[1])]).astype(np.float64)
    for low in range(32, ranked.shape[1], 32):
        part = ranked[:, low : low + 32]
        total += part @ ones[: part.shape[1]]
    return total


@lru_cache(maxsize=4)
def _ones(dtype: np.dtype[Any]) -> Floats:
    return np.ones(32, dtype)
