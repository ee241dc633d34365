"""Replace a pair by one that lives on a lattice of losses: a dominating one (spread) or a dominated one (merge).

Both act on cells of the loss with known P and Q mass. Spreading a cell's mass to its two ends so that both masses are
kept only adds information (connect the dots [DGK+22]). Merging outcomes is post-processing; masses from both sides of
a lattice point are merged in the very proportion that makes the ratio of the merged outcome exactly that point's.
Cells are narrow where the tilted law has its mass and wide where it has little, all of them multiples of one step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from privfed.privacy.atoms import atoms_of
from privfed.privacy.pair import ULP, Floats, Masses, Pair

Ints = npt.NDArray[np.int64]
WIDEST_LOSS = 600.0  # beyond it exp(loss) leaves the range of floats


def places(offset: float, step: float, index: Ints) -> Floats:
    """Return the losses offset + step * index."""
    return np.asarray(offset + step * index, dtype=np.float64)


@dataclass(frozen=True)
class Lattice:
    """P masses at loss offset + step * index; `certain` has infinite loss; `error` bounds rounding, tilted."""

    index: Ints
    mass: Floats
    certain: float
    error: float
    offset: float = 0.0


@dataclass(frozen=True)
class Cells:
    """Cells between the losses offset + step * index, their masses, and the bound on the rounding of both, tilted."""

    step: float
    index: Ints
    masses: Masses
    offset: float = 0.0
    coarse: bool = False  # the step itself is what keeps cells from being fine enough

    @property
    def edges(self) -> Floats:
        """Return the losses at the edges."""
        return places(self.offset, self.step, self.index)

    def error(self, order: float, log_moment: float) -> float:
        """Return the sum of mass errors under the tilt, relative to the moment."""
        edges = self.edges
        top = np.append(edges, edges[-1])
        tilt = np.exp(np.minimum(order * top - log_moment, 700.0))
        with np.errstate(over="ignore", invalid="ignore"):
            wrong = self.masses.p_error + self.masses.q_error * np.exp(np.minimum(top, WIDEST_LOSS))
            return float(np.sum(wrong[:-1] * tilt[:-1])) + (16 + 4 * order) * ULP


def spread_parts(cells: Cells) -> tuple[Floats, Floats]:
    """Return the P mass every inner cell sends to its lower and its upper edge."""
    edges = cells.edges
    p, q = cells.masses.p[1:-1], cells.masses.q[1:-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        upper = (p - q * np.exp(edges[:-1])) / -np.expm1(edges[:-1] - edges[1:])
    upper = np.clip(np.where(np.isnan(upper), p, upper), 0.0, p)  # an empty width keeps its mass on top
    return p - upper, upper


def bulk(pair: Pair, step: float, low: float, high: float) -> float:
    """Return the loss of all outcomes within half a step of the median, merged: a lattice point belongs there.

    In small-rate cases nearly all mass has nearly this loss, and any other place would have to be mended with mass
    from the tails, which are what matters.
    """
    left, right = low, high
    for _ in range(3):
        edges = np.linspace(left, right, 65)
        middle = int(np.searchsorted(np.cumsum(pair.masses(edges).p), 0.5))
        left, right = float(edges[max(0, middle - 1)]), float(edges[min(64, middle)])
    centre = (left + right) / 2
    p, q = pair.masses(np.array([centre - step / 2, centre + step / 2]))[:2]
    return math.log(p[1] / q[1]) if p[1] > 0 and q[1] > 0 else centre


def refine(
    pair: Pair, step: float, low: float, high: float, log_weight: Callable[[Floats], Floats], allowed: float
) -> Cells:
    """Return cells over [low, high] whose spreading adds at most about `allowed` to the weighted variance.

    log_weight: by how much variance at a loss matters.
    """
    ends = atoms_of(pair)
    if ends is not None and ends[1] - ends[0] > step:
        return _refined(pair, step, *_aligned(step, ends), log_weight, allowed)
    offset = bulk(pair, step, low, high)
    first, last = min(0, math.floor((low - offset) / step)), max(0, math.ceil((high - offset) / step))
    stride = 1 << max(0, math.ceil(math.log2(max(1, (last - first) / 96))))
    first, last = first // stride, -(-last // stride)
    index = stride * np.arange(first, max(last, first + 1) + 1, dtype=np.int64)
    return _refined(pair, step, offset, index, log_weight, allowed)


def aligned_step(step: float, ends: tuple[float, float]) -> float:
    """Return the step, or the next smaller one, that puts both atoms on one lattice (a hair inside their span)."""
    gap = (ends[1] - ends[0]) * (1 - 4e-13)
    return gap / math.ceil(gap / step) if gap > step else step


def common_step(step: float, spans: Sequence[tuple[tuple[float, float], int]]) -> float:
    """Return a step of at most `step`, and at least half of it, that nearly puts the atoms of all pairs on its lattice.

    spans: both atoms of a pair and how often it is used. The nearest atoms are met exactly. Others should lie just
    inside an edge: what spreading their mass adds to the variance is least there.
    """
    ends = min((span for span, _ in spans), key=lambda span: span[1] - span[0])
    gap = (ends[1] - ends[0]) * (1 - 4e-13)
    if gap <= step:
        return step
    least = math.ceil(gap / step)
    parts = np.arange(least, min(2 * least, least + 4096) + 1)
    steps = gap / parts
    added = np.zeros(len(parts))
    for span, count in spans:
        if span != ends:
            inside = (np.ceil((span[1] - span[0]) / steps) * steps - (span[1] - span[0])) / 2
            added += count * inside * np.abs(steps - inside)
    return float(steps[int(np.argmin(added))])


def _aligned(step: float, ends: tuple[float, float]) -> tuple[float, Ints]:
    """Return the offset and coarse indices between two atoms, so that each atom lies just outside its edge."""
    count = round((ends[1] - ends[0]) / step)
    start = (ends[0] + ends[1]) / 2 - count * step / 2
    middle = min(max(round(-start / step), 0), count)
    stride = max(1, count // 96)
    index = np.unique(np.concatenate((np.arange(0, count, stride), [middle, count]))).astype(np.int64)
    return start + middle * step, index - middle


def _refined(
    pair: Pair, step: float, offset: float, index: Ints, log_weight: Callable[[Floats], Floats], allowed: float
) -> Cells:
    """Split cells until little variance is added; see `refine`."""
    while True:
        cells = Cells(step, index, pair.masses(places(offset, step, index)), offset)
        lower, upper = spread_parts(cells)
        width = np.diff(index)
        weight = np.exp(np.minimum(log_weight(cells.edges), 700.0))
        light, heavy = lower * weight[:-1], upper * weight[1:]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            added = np.where(light + heavy > 0, light * heavy / (light + heavy), 0.0) * (width * step) ** 2
        split = (added > allowed / (2 * len(width))) & (width > 1)
        if not split.any() or added.sum() <= allowed or len(index) > 60_000:
            return replace(cells, coarse=bool(added[width == 1].sum() > allowed / 4))
        quarter = split & (width > 2) & (added > 4 * allowed / len(width))
        middles = index[:-1][split] + width[split] // 2
        extra = [index[:-1][quarter] + width[quarter] // 4, index[:-1][quarter] + 3 * (width[quarter] // 4)]
        index = np.sort(np.concatenate((index, middles, *extra)))


def lowered(pair: Pair, cells: Cells, ends: tuple[float, float]) -> Cells:
    """Return cells for merging two atoms: the upper one a hair above the last edge, the lower one above the first.

    What lies below every edge would be lost, and what lies inside a cell goes down to its lower edge.
    """
    top = ends[1] - 2e-13 * (ends[1] - ends[0])
    off = top - float(cells.edges[-1])
    first, last = int(cells.index[0]), int(cells.index[-1])
    index = np.unique(np.concatenate((cells.index, np.array([first - 1, first + 1, last - 1]))))
    offset = cells.offset + (off if abs(off) < 2 * cells.step else 0.0)
    return Cells(cells.step, index, pair.masses(places(offset, cells.step, index)), offset)


def spread(cells: Cells, certain: float, order: float, log_moment: float) -> Lattice:
    """Return the dominating lattice pair."""
    lower, upper = spread_parts(cells)
    mass = np.zeros(len(cells.index))
    mass[:-1] += lower
    mass[1:] += upper
    mass[0] += cells.masses.p[0]
    top = min(float(cells.masses.q[-1]) * math.exp(cells.edges[-1]), float(cells.masses.p[-1]))
    mass[-1] += top
    lost = float(cells.masses.p[-1]) - top + float(cells.masses.p_error[-1])
    return Lattice(cells.index, mass, certain + max(0.0, lost), cells.error(order, log_moment), cells.offset)


def merge(pair: Pair, cells: Cells, certain: float, order: float, log_moment: float) -> Lattice:
    """Return the dominated lattice pair.

    What is left at the median may lie above its lattice point with too little below to mend it; then the lattice is
    moved by just that much.
    """
    best: Lattice | None = None
    least = math.inf
    for _ in range(6):
        p, q = cells.masses.p.tolist(), cells.masses.q.tolist()
        edges = cells.edges.tolist()
        mode = int(np.searchsorted(cells.index, 0))
        mass = [0.0] * len(edges)
        low = _from_below(mass, edges, p, q, mode)
        high = _from_above(mass, edges, p, q, mode)
        dropped = _balance(mass, edges, mode, low[0] + high[0], low[1] + high[1])
        if dropped < least:
            error = cells.error(order, log_moment)
            best, least = Lattice(cells.index, np.array(mass), certain, error, cells.offset), dropped
        if dropped <= 1e-13 or not dropped < cells.step / 4:
            break
        offset = cells.offset + dropped
        cells = Cells(cells.step, cells.index, pair.masses(places(offset, cells.step, cells.index)), offset)
    assert best is not None
    return best


def _from_below(
    mass: list[float], edges: list[float], p: list[float], q: list[float], mode: int
) -> tuple[float, float]:
    """Fill the edges below the mode upwards: what waits below an edge takes what it needs of the cells above it."""
    wait_p, wait_q = p[0], q[0]
    k = 0
    while k < mode:
        ratio = math.exp(edges[k])
        need = ratio * wait_q - wait_p
        cell, got_p = k + 1, wait_p
        have = p[cell] - ratio * q[cell]
        while need > have and cell < mode:
            need, got_p, cell = need - have, got_p + p[cell], cell + 1
            have = p[cell] - ratio * q[cell]
        if need > max(have, 0.0):
            _drop(mass, edges, k, wait_p, wait_q)
            share = 0.0
            cell = k + 1
        else:
            share = need / have if need > 0 else 0.0  # rounding left the pool above its edge: down is valid
            mass[k] += got_p + share * p[cell]
        wait_p, wait_q = (1 - share) * p[cell], (1 - share) * q[cell]
        k = cell
    return wait_p, wait_q


def _from_above(
    mass: list[float], edges: list[float], p: list[float], q: list[float], mode: int
) -> tuple[float, float]:
    """Fill the edges above the mode downwards; an excess without a match is dropped."""
    wait_p, wait_q = p[-1], q[-1]
    k = len(edges) - 1
    while k > mode:  # cell k lies below edge k
        ratio = math.exp(edges[k])
        need = wait_p - ratio * wait_q
        cell, got_p = k, wait_p
        have = ratio * q[cell] - p[cell]
        while need > have and cell > mode + 1:
            need, got_p, cell = need - have, got_p + p[cell], cell - 1
            have = ratio * q[cell] - p[cell]
        share = min(1.0, need / have) if need > 0 and have > 0 else 0.0
        mass[k] += got_p + share * p[cell]
        wait_p, wait_q = (1 - share) * p[cell], (1 - share) * q[cell]
        k = cell - 1
    return wait_p, wait_q


def _drop(mass: list[float], edges: list[float], at: int, p: float, q: float) -> None:
    """Put (p, q) on the highest edge its ratio reaches: with Q enlarged to fit, the hockey stick only falls."""
    while at >= 0 and p < math.exp(edges[at]) * q:
        at -= 1
    if at >= 0:
        mass[at] += p


def _balance(mass: list[float], edges: list[float], at: int, p: float, q: float) -> float:
    """Merge the rest (p, q) into edge `at`, with as much of the other atoms as the ratio needs.

    If they do not suffice, an excess is dropped (a larger Q only lowers the hockey stick), and returned, and with a
    deficit the rest goes down to the next edge that its ratio reaches.
    """
    excess = p - math.exp(edges[at]) * q
    k = at - 1 if excess > 0 else at + 1
    step = -1 if excess > 0 else 1
    while excess != 0 and 0 <= k < len(edges):
        worth = mass[k] * math.expm1(edges[at] - edges[k])  # its deficit if below, minus its excess if above
        if abs(worth) >= abs(excess):
            share = excess / worth
            mass[at] += p + share * mass[k]
            mass[k] *= 1 - share
            return 0.0
        p, q = p + mass[k], q + mass[k] * math.exp(-edges[k])
        excess -= worth
        mass[k] = 0.0
        k += step
    _drop(mass, edges, at, p, q)
    return max(0.0, excess)
