"""Refine the bracket of one composition on a window of losses: for mixtures whose lattices have no common stretch.

Where several kinds of mechanism meet, some of them with few outcomes, the transforms of `privfed.privacy.spectrum` do
not fall off, and the composition is taken on a window around the answer instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from privfed.privacy import lattice, pld
from privfed.privacy.atoms import atoms_of, certain_of
from privfed.privacy.cumulant import Cumulants, Part, reaches
from privfed.privacy.pair import Floats

LOG_TAIL = -27.0  # of the tilted mass outside the window; what is really there is charged
_FIRST, _LARGEST = 2**12, 2**20  # points of the composed lattice
_ROUNDS = 6  # of refinement
Composed = list[tuple[lattice.Lattice, int]]


def refined(
    parts: tuple[Part, ...],
    near: float,
    target: float | None,
    delta: float,
    shift: float,
    goal: tuple[float, float],
    read: Callable[[pld.Composition, bool], float],
    enough: float,
) -> tuple[float, float, bool]:
    """Take smaller steps until the bounds meet: tilt for losses near `near`, tolerate `shift` in the loss.

    target: where the answer surely is, if that is known; a bound that is close enough to it is left alone. goal: (tol,
    floor). Returns (lower, upper, whether they are close); stops early when the upper bound is at most `enough`.
    """
    tol, floor = goal
    cumulants = Cumulants(parts)
    order, window = tilt(parts, cumulants, near)
    allowed = shift / (4 * (order + 1))
    total = sum(count for _, count in parts)
    width = window[1] - window[0]
    step = min(width / _FIRST, math.sqrt(2 * allowed / total), math.sqrt(cumulants.at(order)[2]) / 2)
    step = max(step, width / (_FIRST * 16))
    lower, upper, done = -math.inf, math.inf, False
    spans = [(found, count) for found, count in ((atoms_of(pair), count) for pair, count in parts) if found]
    for _ in range(_ROUNDS):
        step = max(step, width / (2 * _LARGEST))
        step = lattice.common_step(step, spans) if spans else step
        if width / step > 16 * _LARGEST:
            break
        highs, lows, narrow = _lattices(parts, cumulants, step, order, delta, allowed)
        room = 0.0 if target is None else 0.5 * tol * max(target, floor)
        if target is None or not upper - target < room:
            upper = min(upper, read(pld.compose(highs, step, order, window), True))
        if upper > enough and (target is None or not target - lower < room):
            lower = max(lower, read(pld.compose(lows, step, order, window), False))
        done = upper - lower <= tol * max(lower, floor) or upper <= enough
        if done or width / step > _LARGEST:
            break
        ratio = (upper - lower) / (tol * max(lower, floor)) if upper < math.inf else 16.0
        if narrow:
            step /= min(6.0, max(1.5, 1.2 * ratio))
        allowed /= min(32.0, max(2.0, 2.5 * ratio))
    return lower, upper, done


def tilt(parts: tuple[Part, ...], cumulants: Cumulants, near: float) -> tuple[float, tuple[float, float]]:
    """Return the order to tilt to, and the window of losses where the tilted law then has its mass.

    The saddle point is most accurate; but with rare large losses a smaller order, at the price of a few digits,
    leaves them out and makes the window many times smaller.
    """
    spacing = max(float(getattr(pair, "spacing", 0.0)) for pair, _ in parts)
    saddle = min(cumulants.order_for_epsilon(near), 20 / spacing if spacing else math.inf)
    best = saddle, _window(cumulants, saddle, near, LOG_TAIL)
    least = cumulants.at(saddle)[0] - saddle * near
    for factor in (0.97, 0.93, 0.9, 0.86, 0.8, 0.75, 0.7):
        order = factor * saddle
        cost = cumulants.at(order)[0] - order * near - least
        if cost > 0.4:
            break
        window = _window(cumulants, order, near, LOG_TAIL - cost)
        if window[1] - window[0] < 0.7 * (best[1][1] - best[1][0]):
            best = order, window
    return best


def _window(cumulants: Cumulants, order: float, near: float, log_tail: float) -> tuple[float, float]:
    low, high = reaches(cumulants, order, log_tail, whole=True)
    return min(low, near - 2 / order), max(high, near + 8 / order)


def _lattices(
    parts: tuple[Part, ...], cumulants: Cumulants, step: float, order: float, delta: float, allowed: float
) -> tuple[Composed, Composed, bool]:
    highs, lows, narrow = [], [], False
    for pair, count in parts:
        share = allowed / (len(parts) * count)
        high = pair.span(min(1e-3, delta * 1e-6 / count))[1]
        low = pair.span(1e-14 / count)[0]
        if max(high, -low) > lattice.WIDEST_LOSS:
            raise OverflowError("losses beyond the range of floats")
        moment = cumulants.of(pair, order)

        def weight(edges: Floats, moment: float = moment) -> Floats:
            return np.asarray(order * edges - moment)

        cells = lattice.refine(pair, step, low, high, weight, share)
        narrow = narrow or bool((cells.index[1:] - cells.index[:-1]).min() <= 1)
        highs.append((lattice.spread(cells, certain_of(pair), order, moment), count))
        below = getattr(pair, "below", pair)
        ends = atoms_of(pair)
        if ends is not None:
            cells = lattice.lowered(below, cells, ends)
        elif below is not pair:
            cells = lattice.Cells(step, cells.index, below.masses(cells.edges), cells.offset)
        lows.append((lattice.merge(below, cells, certain_of(below), order, moment), count))
    return highs, lows, narrow
