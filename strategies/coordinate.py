"""Rules that work coordinate by coordinate: median, trimmed mean and their relatives."""

from __future__ import annotations

from typing import Any

import numpy as np

from privfed.strategies.compiled import Kernels
from privfed.strategies.guard import Refusal, Screened, count, guarded, require_majority, screen
from privfed.strategies.matrix import Floats, Matrix, Room, as_matrix, flat_vector, run_blocks
from privfed.strategies.network import by_rank
from privfed.strategies.sums import sum_rows


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

    def finish(ranked: Floats, kernels: Kernels | None) -> Floats:
        return ranked[0] if low == high else _middle(ranked[0], ranked[1])

    return by_rank(rows, (low,) if low == high else (low, high), finish, together=True)


def trimmed_rows(rows: Matrix, f: int) -> Floats:
    """Return the mean of ranks f..n-f-1 of every column."""
    n = rows.count
    share, room = 1.0 / (n - 2 * f), Room()

    def finish(ranked: Floats, kernels: Kernels | None) -> Floats:
        return sum_rows(ranked, room, kernels) * share

    return by_rank(rows, tuple(range(f, n - f)), finish, together=True)


def around(rows: Matrix, keep: int, reference: str, f: int) -> Floats:
    """Return the mean of the `keep` values of every column nearest to its median, or its f-trimmed mean.

    They are neighbours in rank order: a window, which moves up while the value above it is nearer than its lowest.
    The reference lies between two ranks, one of which is in the window: ranks too far from both are not looked for.
    Values are selected, never subtracted from running sums, where one outlier would cancel the rest.
    """
    n = rows.count
    low, high = ((n - 1) // 2, n // 2) if reference == "median" else (f, n - f - 1)
    first = max(low - keep + 1, 0)
    shifts = min(n - keep, high) - first
    ranks = tuple(range(first, first + keep + shifts))
    room = Room()

    def finish(ranked: Floats, kernels: Kernels | None) -> Floats:
        if reference == "median":
            lower, upper = ranked[low - first], ranked[high - first]
            middle = lower if n % 2 else _middle(lower, upper)
        else:
            inner = sum_rows(ranked[low - first : high - first + 1], room, kernels)
            middle = (inner * (1.0 / (n - 2 * f))).astype(rows.work)
        window = room.take("window", (keep, len(middle)), rows.work)
        window[:] = ranked[:keep]
        for i in range(shifts):
            # a later move implies all earlier ones, so a slot's newest value is the right one
            _replace_if_nearer(window[i % keep], ranked[i], ranked[i + keep], middle, room)
        return sum_rows(window, room, kernels) * (1.0 / keep)

    return by_rank(rows, ranks, finish)


def _replace_if_nearer(slot: Floats, low: Floats, high: Floats, middle: Floats, room: Room) -> None:
    """Write high to the slot where it is nearer to the middle than low.

    By the sign of the difference, as a mask of bits: numpy's `where` costs more than the rest of a window together.
    """
    bits = np.dtype(f"i{low.itemsize}")
    above, below = room.take("above", low.shape, low.dtype), room.take("below", low.shape, low.dtype)
    np.subtract(high, middle, out=above)
    np.subtract(middle, low, out=below)
    np.subtract(above, below, out=above)
    mask, change = above.view(bits), below.view(bits)
    np.right_shift(mask, 8 * low.itemsize - 1, out=mask)
    np.bitwise_xor(high.view(bits), slot.view(bits), out=change)
    np.bitwise_and(change, mask, out=change)
    np.bitwise_xor(slot.view(bits), change, out=slot.view(bits))


def _middle(low: Floats, high: Floats) -> Floats:
    return (low + high) * low.dtype.type(0.5)  # half of each would lose the last digit of the least numbers there are
