"""Answer for every composition of the same pairs whose counts lie in one stretch, each between powers of two.

What is costly is done once per stretch: the tilt, the lattices as fine as the largest counts need, their transforms,
and the line of the inversion. What depends on the counts is a short sum. Everything about a stretch follows from its
pairs, its largest counts, delta and tol, so an answer is the same whatever was asked before.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from privfed.privacy import lattice
from privfed.privacy.atoms import atoms_of, certain_of
from privfed.privacy.cumulant import Cumulants, Inversion, discrete, invert_between, reaches
from privfed.privacy.pair import Floats, Pair
from privfed.privacy.spectrum import Spectrum

LOG_TAIL = -27.0  # of the tilted mass outside the window; what is really there is charged
_FIRST, _LARGEST = 2**12, 2**21  # points of the composed lattice
_ROUNDS = 7  # of refinement
_KEPT = 48  # stretches
_PRECISE = 1e-11  # of an estimate, relative

Counts = tuple[int, ...]


@dataclass
class Level:
    """Lattices of one fineness, above and below, transformed when asked for."""

    step: float
    cells: list[lattice.Cells]
    allowed: float
    narrow: bool
    upper: Spectrum | None = None
    lower: Spectrum | None = None


@dataclass(frozen=True)
class Weight:
    """How much variance of one use matters at each loss: by the curvature of delta where the rest must then be."""

    near: float
    places: Floats
    logs: Floats  # of the curvature of delta at these epsilons, relative to that at `near`

    def __call__(self, losses: Floats) -> Floats:
        """Return the log of the weight; a large loss by itself decides, and its size no longer matters."""
        left = self.near - losses
        return np.asarray(np.interp(left, self.places, self.logs) + np.minimum(left, 0.0), dtype=np.float64)


def weight_of(near: float, law: Cumulants, line: Inversion, low: float, high: float) -> tuple[Weight, float]:
    """Return the weight for losses from `low` to `high`, and the slope of -log delta at `near`.

    log delta comes from the inversion, where that has digits, and otherwise from Chernoff's bound.
    """
    orders = line.order * np.geomspace(1 / 64, 4.0, 25)
    moments = law.values(orders)
    reach = min(high, max(near, 0.0) + 2 + 10 / line.order)
    left, right = -reach * np.linspace(1.0, 0.0, 57) ** 2, min(-low, 30 / line.order) * np.linspace(0.0, 1.0, 17) ** 2
    places = near + np.concatenate((left, right[1:]))
    logs = np.minimum(0.0, (moments[:, None] - orders[:, None] * places).min(axis=0))

    if len(line.u) <= 4096:
        values, sure = line.sure_log_deltas(places)
        logs[sure] = np.minimum(logs[sure], values[sure])

    logs = np.minimum.accumulate(logs)
    with np.errstate(divide="ignore", invalid="ignore"):  # huge losses have no two places apart; they go no further
        slopes = np.maximum(-np.gradient(logs, places), 1.0)
    at = int(np.searchsorted(places, near))
    return Weight(near, places, logs - logs[at] + 2 * np.log(slopes / slopes[at])), float(slopes[at])


@dataclass(frozen=True)
class Aim:
    """Where the answer is sought: tilt to `order`, a circle of losses of this width, and what matters per pair."""

    order: float
    width: float
    moments: list[float]
    slope: float
    weight: Weight


@dataclass
class Goal:
    """Say how close is close enough: tol relative to the value, but at least to the floor."""

    tol: float
    floor: float

    def met(self, lower: float, upper: float) -> bool:
        """Say whether the two bounds are close."""
        return upper - lower <= self.tol * max(lower, self.floor)

    def ratio(self, lower: float, upper: float) -> float:
        """Return by how much the gap is too large."""
        return (upper - lower) / (self.tol * max(lower, self.floor)) if upper < math.inf else 16.0


@dataclass
class Ladder:
    """Lattices of growing fineness for counts up to `most`; each level follows from the one before."""

    pairs: tuple[Pair, ...]
    least: Counts
    most: Counts
    delta: float
    aim: Aim
    step: float
    allowed: float
    levels: list[Level] = field(default_factory=list)
    apart: bool = False  # what is known of a pair from two sides is further apart than a finer lattice can mend

    def spectrum(self, number: int, upper: bool) -> Spectrum:
        """Return the transforms of a level, made if need be."""
        level = self.levels[number]
        known = level.upper if upper else level.lower
        if known is None:
            made = [self._lattice(i, cells, upper) for i, cells in enumerate(level.cells)]
            known = Spectrum(made, self.least, self.most, level.step, self.aim.order, self.aim.width)
            if upper:
                level.upper = known
            else:
                level.lower = known
        return known

    def _lattice(self, number: int, cells: lattice.Cells, upper: bool) -> lattice.Lattice:
        pair, moment, order = self.pairs[number], self.aim.moments[number], self.aim.order
        if upper:
            return lattice.spread(cells, certain_of(pair), order, moment)
        below = getattr(pair, "below", pair)
        if below is not pair:
            cells = lattice.Cells(cells.step, cells.index, below.masses(cells.edges), cells.offset)
        return lattice.merge(below, cells, certain_of(below), order, moment)

    def grow(self, ratio: float) -> bool:
        """Add a level that brings the gap down by about the ratio; say whether there was room for one."""
        if self.levels:
            last = self.levels[-1]
            if self.apart or len(self.levels) >= _ROUNDS or self.aim.width / last.step > _LARGEST / 2:
                return False
            if last.narrow:
                self.step /= min(6.0, max(1.5, 1.2 * ratio))
            self.allowed /= min(32.0, max(2.0, 2.5 * ratio))
        self.step = max(self.step, self.aim.width / _LARGEST)
        spans = [found for found in (atoms_of(pair) for pair in self.pairs) if found]
        ends = min(spans, key=lambda span: span[1] - span[0], default=None)
        self.step = lattice.aligned_step(self.step, ends) if ends else self.step
        if self.aim.width / self.step > 16 * _LARGEST:
            return False
        self.levels.append(self._level())
        return True

    def _level(self) -> Level:
        cells, narrow = [], False
        for pair, count in zip(self.pairs, self.most, strict=True):
            low, high = _reach(pair, count, self.delta)
            share = self.allowed / (len(self.pairs) * count)
            made = lattice.refine(pair, self.step, low, high, self.aim.weight, share)
            narrow = narrow or made.coarse
            cells.append(made)
        return Level(self.step, cells, self.allowed, narrow)


def _reach(pair: Pair, count: int, delta: float) -> tuple[float, float]:
    """Return the losses between which the lattice lies; what is above becomes certain, what is below is merged."""
    high = pair.span(min(1e-3, delta * 1e-6 / count))[1]
    low = pair.span(1e-14 / count)[0]
    if max(high, -low) > lattice.WIDEST_LOSS:
        raise OverflowError("losses beyond the range of floats")
    return low, high


def aimed(
    pairs: tuple[Pair, ...], marks: Sequence[tuple[Counts, float]], delta: float, shift: float, line: Inversion
) -> Aim:
    """Return the tilt and the circle that suit losses near each mark (counts, epsilon).

    Losses beyond the lattice are left out first: under the tilt they may be where all the mass is. The saddle point
    is most accurate, but rounding leaves digits to spare: another order may have a circle many times smaller where
    large losses are rare. shift: in the loss, which rounding may take a small share of. line: for the last mark.
    """
    most = max(mark[0] for mark in marks)
    limits = [_reach(pair, count, delta)[1] for pair, count in zip(pairs, most, strict=True)]
    laws = [Cumulants(tuple(zip(pairs, counts, strict=True)), limits=limits) for counts, _ in marks]
    spacing = max(float(getattr(pair, "spacing", 0.0)) for pair in pairs)
    orders = [law.order_for_epsilon(near) for law, (_, near) in zip(laws, marks, strict=True)]
    saddle = min(math.exp(float(np.mean(np.log(orders)))), 20 / spacing if spacing else math.inf)
    least = [law.at(saddle)[0] - saddle * near for law, (_, near) in zip(laws, marks, strict=True)]
    spare = math.log(0.25 * shift * saddle / (1.3e-15 * sum(most) + 1e-13)) + math.log(delta)
    best = (math.inf, saddle)
    for factor in (1.0, 0.97, 0.93, 0.9, 0.86, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4):
        order, width = factor * saddle, 0.0
        for law, (_, near), base in zip(laws, marks, least, strict=True):
            bound = law.at(order)[0] - order * near
            if bound > max(spare, base + 0.4) or width >= best[0]:
                width = math.inf
                break
            log_tail = min(LOG_TAIL, math.log(delta) - bound + math.log(shift * saddle) - 6)
            low, high = reaches(law, order, log_tail, whole=True)
            width = max(width, high - near, near - low + 30 / order)
        if width < (1.0 if factor == 1 else 0.9) * best[0]:
            best = width, order
    width, order = best
    moments = [laws[0].of(pair, order) for pair in pairs]
    low = min(_reach(pair, count, delta)[0] for pair, count in zip(pairs, most, strict=True))
    weight, slope = weight_of(marks[-1][1], laws[-1], line, low, max(limits))
    return Aim(order, width, moments, slope, weight)


class Stretch:
    """Brackets of epsilon at one delta for counts between `most` / 2 and `most`."""

    def __init__(self, pairs: tuple[Pair, ...], most: Counts, delta: float, tol: float, alone: bool) -> None:
        self.most = most
        self.least = most if alone else tuple(count // 2 + 1 if count > 1 else 1 for count in most)
        self.goal = Goal(tol, 1e-3)
        self._log_delta = math.log(delta)
        self._pairs, self._delta = pairs, delta
        laws = [Cumulants(tuple(zip(pairs, counts, strict=True))) for counts in (self.least, self.most)]
        orders = [law.order_for_delta(self._log_delta) for law in laws]
        effort = 1 << (12 if any(discrete(pair) for pair in pairs) else 16)
        self._inverted = invert_between(laws[0], laws[1], math.sqrt(orders[0] * orders[1]), effort)
        self._ladder: Ladder | None = None
        self._start: tuple[int, int] | None = None
        self._nears = (0.0, 0.0)

    def estimate(self, counts: Counts, log_delta: float) -> tuple[float, bool]:
        """Return the estimate of epsilon for these counts and whether the inversion resolved it.

        log_delta: of the losses that are finite, given that they are.
        """
        settled = self._inverted.settled_at(counts)
        guess = self._inverted.slope(counts)
        spread = math.sqrt(max(self._inverted.bend(counts), 1e-300))
        line = self._inverted.line(counts)
        most = self._inverted.most(counts, log_delta)
        xtol = _PRECISE * (1e-3 + abs(guess)) if settled else 1e-4
        return line.epsilon(log_delta, guess, 6 * spread + 1 / line.order, xtol, most), settled

    def _share(self, counts: Counts) -> float:
        """Say how far the counts have come from the least to the most."""
        span = sum(self.most) - sum(self.least)
        return (sum(counts) - sum(self.least)) / span if span else 1.0

    def bracket(
        self, counts: Counts, target: float | None, enough: float, ends: Callable[[Counts], float]
    ) -> tuple[float, float, bool]:
        """Return (lower, upper, whether they are close); stop early when the upper bound is at most `enough`.

        target: the estimate if it is resolved; ends: returns the estimate at other counts.
        """
        if self._ladder is None:
            self._ladder = self._begun(ends)
        near = self._near(counts) if target is None else target
        if enough > -math.inf:
            upper = self._read(counts, 0, near, True)
            if upper <= enough:
                return -math.inf, upper, True
        if self._start is None:
            self._start = self._primed(self._nears[1] if self._inverted.settled_at(self.most) else None)
        high, low = self._start
        while True:
            upper, lower = self._read(counts, high, near, True), self._read(counts, low, near, False)
            done = self.goal.met(lower, upper) or upper <= enough
            if done:
                return lower, upper, True
            room = 0.4 * self.goal.tol * max(near, self.goal.floor)
            wide = upper - near > room, near - lower > room
            if target is None or wide[0] == wide[1]:
                wide = True, True
            finer = self._finer(high, wide[0]), self._finer(low, wide[1])
            if finer == (high, low):  # the side that should come closer cannot: let the other one
                finer = self._finer(high, not wide[0]), self._finer(low, not wide[1])
            if finer == (high, low):
                return lower, upper, False
            high, low = finer

    def _finer(self, number: int, wanted: bool) -> int:
        """Return the next level if that is wanted and there is room for one, else the same."""
        assert self._ladder is not None
        exists = wanted and (number + 1 < len(self._ladder.levels) or self._ladder.grow(2.5))
        return number + 1 if exists else number

    def _near(self, counts: Counts) -> float:
        return self._nears[0] + self._share(counts) * (self._nears[1] - self._nears[0])

    def _read(self, counts: Counts, number: int, near: float, upper: bool) -> float:
        assert self._ladder is not None
        spectrum = self._ladder.spectrum(number, upper)
        return spectrum.at(counts).epsilon(self._log_delta, near, upper)

    def _begun(self, ends: Callable[[Counts], float]) -> Ladder:
        """Return a ladder with its first level."""
        self._nears = ends(self.least), ends(self.most)
        marks = ((self.least, self._nears[0]), (self.most, self._nears[1]))
        total = sum(self.most)
        shift = self.goal.tol * max(self._nears[1], self.goal.floor)
        aim = aimed(self._pairs, marks, self._delta, shift, self._inverted.line(self.most))
        allowed = shift / (4 * (aim.slope + 1))
        bend = self._inverted.bend(self.most)
        step = min(aim.width / _FIRST, math.sqrt(2 * allowed / total), math.sqrt(bend) / 2)
        step = max(step, aim.width / (_FIRST * 16))
        ladder = Ladder(self._pairs, self.least, self.most, self._delta, aim, step, allowed)
        ladder.grow(1.0)
        return ladder

    def _primed(self, target: float | None) -> tuple[int, int]:
        """Return the levels at which both sides are close enough for the largest counts."""
        assert self._ladder is not None
        near = self._nears[1] if target is None else target
        goal = Goal(0.8 * self.goal.tol, self.goal.floor)
        room = 0.5 * goal.tol * max(near, goal.floor)
        lower, upper, high, low = -math.inf, math.inf, 0, 0
        gap, enclosed = math.inf, any(hasattr(pair, "below") for pair in self._pairs)
        for number in range(_ROUNDS):
            if target is None or not upper - target < room:
                high, upper = number, self._read(self.most, number, near, True)
            if target is None or not target - lower < room:
                low, lower = number, self._read(self.most, number, near, False)
            if goal.met(lower, upper):
                break
            gap, before = goal.ratio(lower, upper), gap
            self._ladder.apart = enclosed and gap > 0.7 * before
            if number + 1 == len(self._ladder.levels) and not self._ladder.grow(gap):
                break
        return high, low


def bracket_delta(
    pairs: tuple[Pair, ...],
    counts: Counts,
    epsilon: float,
    estimate: float,
    settled: bool,
    tol: float,
    line: Inversion,
    room: float,
) -> tuple[float, float, bool]:
    """Return (lower, upper, whether they are close) of delta at epsilon, give or take `room`, for these counts."""
    goal = Goal(tol, 1e-300)
    delta = max(estimate, 1e-300)
    aim = aimed(pairs, ((counts, epsilon),), delta, 1e-2 * tol, line)
    total = sum(counts)
    allowed = tol / (4 * aim.slope * (aim.slope + 1))
    step = max(min(aim.width / _FIRST, math.sqrt(2 * allowed / total)), aim.width / (_FIRST * 16))
    ladder = Ladder(pairs, counts, counts, delta, aim, step, allowed)
    lower, upper, done, room = -math.inf, math.inf, False, 0.5 * tol * delta
    ratio = 1.0
    while not done and ladder.grow(ratio):
        number = len(ladder.levels) - 1
        if not settled or not upper - delta < room:
            upper = min(upper, ladder.spectrum(number, True).at(counts).delta(epsilon - room, True))
        if not settled or not delta - lower < room:
            lower = max(lower, ladder.spectrum(number, False).at(counts).delta(epsilon + room, False))
        done = goal.met(lower, upper)
        ratio = goal.ratio(lower, upper)
    return lower, upper, done


_known: OrderedDict[tuple[object, ...], Stretch] = OrderedDict()


def stretch(pairs: tuple[Pair, ...], counts: Counts, delta: float, tol: float, alone: bool) -> Stretch:
    """Return the stretch these counts lie in, kept between queries; for these counts `alone` if asked."""
    most = counts if alone else tuple(1 << (count - 1).bit_length() for count in counts)
    key = (pairs, most, delta, tol, alone)
    if key in _known:
        _known.move_to_end(key)
        return _known[key]
    made = Stretch(pairs, most, delta, tol, alone)
    _known[key] = made
    if len(_known) > _KEPT:
        _known.popitem(last=False)
    return made


def forget() -> None:
    """Drop what is kept between queries (to measure without it)."""
    _known.clear()
