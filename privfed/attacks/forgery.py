"""What Byzantine clients send, made from the honest rows: for testing rules, never for use against anyone.

Every attack takes the honest rows (n-f, d) that the attacker knows and returns one row (d,), which all f Byzantine
clients send.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Rows: TypeAlias = NDArray[np.floating[Any]]
Row: TypeAlias = NDArray[np.floating[Any]]
Attack: TypeAlias = Callable[[Rows], Row]


def sign_flip(honest: Rows, scale: float = 1.0) -> Row:
    """Return minus `scale` times the mean of honest rows [AAL18]."""
    return -scale * _mean(honest)


def inner_product(honest: Rows, strength: float = 2.0) -> Row:
    """Return minus `strength` times the mean of honest rows: inner product manipulation, or IPM [XKG20].

    Small strengths hide among honest rows; `strongest` finds the worst one for a rule.
    """
    return -strength * _mean(honest)


def little_is_enough(honest: Rows, strength: float | None = None, *, clients: int | None = None) -> Row:
    """Return the mean plus `strength` standard deviations of honest rows: a little is enough, or ALIE [BBG19].

    strength None: the paper's z, for which enough honest rows lie farther out to carry a majority of `clients` (the
    honest rows and the attackers).
    """
    honest = np.asarray(honest)
    if strength is None:
        if clients is None:
            raise ValueError("give strength, or clients, the number of honest rows and attackers together")
        strength = little_strength(clients, clients - len(honest))
    if len(honest) < 2:
        raise ValueError(f"ALIE needs at least 2 honest rows to estimate a deviation, got {len(honest)}")
    return np.asarray(_mean(honest) + strength * honest.std(axis=0, ddof=1))


def little_strength(n: int, f: int) -> float:
    """Return z of the paper: the quantile (n-f-s)/(n-f) of the normal, s = floor(n/2 + 1) - f [BBG19]."""
    supporters = n // 2 + 1 - f
    share = (n - f - supporters) / (n - f)
    if not 0 < share < 1:
        raise ValueError(f"ALIE needs f attackers to be a minority that needs supporters, got n = {n}, f = {f}")
    return NormalDist().inv_cdf(share)


def mimic(honest: Rows, target: int | None = 0) -> Row:
    """Return a copy of the honest row `target` [KHJ22]; None: the one farthest out where variance is greatest."""
    honest = np.asarray(honest)
    if target is None:
        centred = honest.astype(np.float64) - _mean(honest)
        _, vectors = np.linalg.eigh(centred @ centred.T)
        target = int(np.argmax(np.abs(vectors[:, -1])))
    return np.array(honest[target])


def gaussian(honest: Rows, rng: np.random.Generator, deviation: float = 1.0) -> Row:
    """Return independent normal noise of mean zero: what a broken or lazy client sends."""
    honest = np.asarray(honest)
    noise: Row = np.asarray(rng.normal(0.0, deviation, honest.shape[1]), dtype=honest.dtype)
    return noise


def min_max(honest: Rows, direction: str = "deviation") -> Row:
    """Return mean + g p with the greatest g at which no honest row is farther than honest rows are apart [SH21].

    direction p: "deviation" (minus the standard deviation), "unit" (minus the mean's direction) or "sign".
    """
    center, push, offsets = _frame(honest, direction)
    squares = (offsets**2).sum(axis=1)
    inner = offsets @ offsets.T
    reach = float((squares[:, None] + squares[None, :] - 2 * inner).max())
    # |offset_i + g p|^2 <= reach, offset = mean - x_i: a quadratic for every honest row
    steps = [
        _root(float(push @ push), float(push @ o), float(s) - reach) for o, s in zip(offsets, squares, strict=True)
    ]
    return center + min(steps) * push


def min_sum(honest: Rows, direction: str = "deviation") -> Row:
    """Return mean + g p with the greatest g whose sum of squared distances is that of some honest row [SH21]."""
    center, push, offsets = _frame(honest, direction)
    squares = (offsets**2).sum(axis=1)
    inner = offsets @ offsets.T
    reach = float((squares[:, None] + squares[None, :] - 2 * inner).sum(axis=1).max())
    n = len(offsets)
    step = _root(n * float(push @ push), float(push @ offsets.sum(axis=0)), float(squares.sum()) - reach)
    return center + step * push


def model_replacement(honest: Rows, target: Row, *, clients: int, center: Row | None = None) -> Row:
    """Return the row that makes the mean of `clients` rows equal `target` if the others send `center` [BVHES20].

    center: the global model, or zero for updates.
    """
    target = np.asarray(target)
    start = np.zeros_like(target) if center is None else np.asarray(center)
    return start + clients * (target - start)


def scaled(update: Row, factor: float, *, center: Row | None = None) -> Row:
    """Return an update, such as a backdoored one, scaled by `factor` about `center`."""
    start = np.zeros_like(update) if center is None else np.asarray(center)
    return np.asarray(start + factor * (np.asarray(update) - start))


def non_finite(honest: Rows, value: float = np.nan, coordinate: int | None = None) -> Row:
    """Return the mean with `value` (NaN, infinity, 1e38) in one coordinate, or everywhere."""
    row = _mean(honest)
    if coordinate is None:
        row[:] = value
    else:
        row[coordinate] = value
    return row


def _mean(honest: Rows) -> Row:
    honest = np.asarray(honest)
    if honest.ndim != 2 or not len(honest):
        raise ValueError(f"honest must be a matrix of at least one row, got shape {honest.shape}")
    return np.asarray(honest.mean(axis=0, dtype=np.float64), dtype=np.result_type(honest.dtype, np.float32))


def _frame(honest: Rows, direction: str) -> tuple[Row, Row, Rows]:
    honest = np.asarray(honest, dtype=np.float64)
    center = honest.mean(axis=0)
    if direction == "deviation":
        push = -honest.std(axis=0)
    elif direction == "unit":
        push = -center / (np.linalg.norm(center) or 1.0)
    elif direction == "sign":
        push = -np.sign(center)
    else:
        raise ValueError(f'direction must be "deviation", "unit" or "sign", got {direction!r}')
    return center, push, center - honest


def _root(a: float, b: float, c: float) -> float:
    """Return the greatest g with a g^2 + 2 b g + c <= 0, or 0 when the direction is null."""
    if a <= 0:
        return 0.0
    return float((-b + np.sqrt(max(b * b - a * c, 0.0))) / a)
