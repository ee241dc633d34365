"""Bracket epsilon or delta of one direction of a composition: estimate by inversion, bounds by lattices, refined."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from privfed.privacy import lattice, pld
from privfed.privacy.atoms import Atoms, atoms_of, certain_of
from privfed.privacy.closed_form import root
from privfed.privacy.cumulant import Cumulants, Inversion, Part, invert, reaches
from privfed.privacy.pair import ULP, Pair

LOG_TAIL = -27.0  # of the tilted mass outside the window; what is really there is charged
_FIRST, _LARGEST = 2**12, 2**20  # points of the composed lattice
_ROUNDS = 6  # of refinement


@dataclass(frozen=True)
class Bracket:
    """Bounds on one number, and whether they came as close as was asked."""

    lower: float
    estimate: float
    upper: float
    settled: bool


def _close(lower: float, upper: float, tol: float, floor: float) -> bool:
    return upper - lower <= tol * max(lower, floor)


class Direction:
    """One ordered side of a composition: parts (pair, count), asked for its epsilon or delta."""

    def __init__(self, parts: tuple[Part, ...]) -> None:
        self.parts = _enumerated(tuple(part for part in parts if part[1]))
        self.cumulants = Cumulants(self.parts)
        self._lines: dict[float, Inversion] = {}

    @cached_property
    def certain(self) -> float:
        """Probability of an outcome that only P has."""
        return _once(tuple((certain_of(pair), count) for pair, count in self.parts))

    @cached_property
    def surely(self) -> float:
        """Return the same from below, for pairs that are known from two sides."""
        return _once(tuple((certain_of(getattr(pair, "below", pair)), count) for pair, count in self.parts))

    def _above_certain(self, delta: float) -> float:
        """Return epsilon where what only P has takes all of delta: finite if it is delta exactly."""
        pair, count = self.parts[0]
        once = len(self.parts) == 1 and count == 1 and isinstance(pair, Atoms) and not pair.endless
        return self.ceiling if once and self.certain == delta else math.inf

    @cached_property
    def ceiling(self) -> float:
        """The largest finite loss of the sum, as far as floats can tell."""
        return sum(count * pair.span(0.0)[1] for pair, count in self.parts)

    @property
    def single(self) -> bool:
        """Say whether the closed profile of one use answers."""
        return len(self.parts) == 1 and self.parts[0][1] == 1 and not hasattr(self.parts[0][0], "below")

    def line(self, log_delta: float) -> tuple[Inversion, float, float]:
        """Return an inversion line near this delta (kept for queries nearby), its saddle point and spread."""
        line = self._line_at(self.cumulants.order_for_delta(log_delta))
        _, slope, bend = self.cumulants.at(line.order)
        return line, slope, math.sqrt(bend)

    def _line_at(self, order: float) -> Inversion:
        for known in self._lines:
            if abs(math.log(known / order)) < 0.15:
                return self._lines[known]
        effort = 1 << (12 if any(isinstance(pair, Atoms) for pair, _ in self.parts) else 16)
        return self._lines.setdefault(order, invert(self.cumulants, order, effort))

    def estimate_epsilon(self, delta: float) -> tuple[float, bool]:
        """Return epsilon(delta), which may be negative, and whether the inversion resolved it."""
        if self.certain >= delta:
            return self._above_certain(delta), True
        if self.single:
            return _profile_root(self.parts[0][0].profile, delta), True
        peak = self._peak(delta)
        if peak is not None and _close(peak.lower, peak.upper, 1e-9, 1e-9):
            return peak.upper, True
        log_delta = math.log(delta - self.certain)  # what the finite losses, whose mass is less than 1, may add
        exact = self._exact()
        if exact is not None:
            near = self.cumulants.at(min(self.cumulants.order_for_delta(log_delta), 64.0))[1]
            return self._lattice_epsilon(exact, delta, near).estimate, True
        line, slope, spread = self.line(log_delta)
        return line.epsilon(log_delta, slope, 6 * spread + 1 / line.order, 0.0 if line.settled else 1e-4), line.settled

    def estimate_delta(self, epsilon: float) -> tuple[float, bool]:
        """Return delta(epsilon) and whether the inversion resolved it."""
        if self.single:
            return self.parts[0][0].profile(epsilon), True
        if epsilon >= self.ceiling:
            return self.certain, True
        exact = self._exact()
        if exact is not None:
            found = self._lattice_delta(exact, epsilon)
            return found.estimate, True
        line = self._line_at(self.cumulants.order_for_epsilon(epsilon))
        delta = math.exp(min(0.0, line.log_delta(epsilon)))
        return min(1.0, self.certain + delta), line.settled

    def bracket_epsilon(self, delta: float, tol: float, enough: float = -math.inf) -> Bracket:
        """Bracket epsilon(delta); stop early when the upper bound is at most `enough`."""
        estimate, settled = self.estimate_epsilon(delta)
        if math.isinf(estimate):
            lower = math.inf if self.surely * (1 - 1e-11) >= delta else 0.0
            return Bracket(lower, math.inf, math.inf, True)
        if self.single:
            if self.certain == delta:  # above every loss, where no rounding of the profile matters
                return Bracket(estimate * (1 - 1e-12), estimate, estimate * (1 + 1e-12), True)
            return _single_epsilon(self.parts[0][0], delta, estimate)
        peak = self._peak(delta)
        if peak is not None and _close(peak.lower, peak.upper, tol / 10, 1e-3):
            return peak
        limit = self.ceiling * (1 + 1e-12) if self.certain == 0 and delta > 1e-280 else math.inf
        if limit <= enough:
            return Bracket(-math.inf, min(estimate, limit), limit, True)
        exact = self._exact()
        if exact is not None:
            return _meet(self._lattice_epsilon(exact, delta, estimate), peak)
        log_delta = math.log(delta)
        shift = tol * max(estimate, 1e-3)

        def read(composition: pld.Composition, upper: bool) -> float:
            return composition.epsilon(log_delta, estimate, upper)

        target = estimate if settled else None
        found = self._refined(estimate, target, delta, shift, tol, 1e-3, read, enough)
        return _meet(_meet(found, peak), Bracket(-math.inf, limit, limit, True))

    def _peak(self, delta: float) -> Bracket | None:
        """Bracket by the largest possible loss: the outcome that has it in every use already costs nearly that."""
        asked = [getattr(pair, "top", None) for pair, _ in self.parts]
        if self.certain > 0 or any(top is None for top in asked):
            return None
        tops = [top() for top in asked if top is not None]
        most = sum(count * top[0] for top, (_, count) in zip(tops, self.parts, strict=True))
        log_mass = sum(count * math.log(top[1]) for top, (_, count) in zip(tops, self.parts, strict=True) if top[1] > 0)
        share = delta * math.exp(min(700.0, -log_mass))
        low = most + math.log1p(-share) if share < 1 else -math.inf
        slack = 1e-12 * abs(most) + 1e-15
        return Bracket(low - slack, max(low, -1e300), most + slack, True)

    def _top_delta(self, epsilon: float) -> Bracket | None:
        """Return delta in closed form where only the largest loss of a lattice exceeds epsilon."""
        peak = self._peak(1e-300)
        spacing = float(getattr(self.parts[0][0], "spacing", 0.0))
        if peak is None or len(self.parts) > 1 or not spacing or not self.ceiling - spacing < epsilon < self.ceiling:
            return None
        pair, count = self.parts[0]
        assert isinstance(pair, Atoms)
        mass = math.exp(count * math.log(pair.top()[1]))
        value = -mass * math.expm1(epsilon - self.ceiling)
        wrong = mass * 8 * ULP * (1 + self.ceiling) + value * (count + 4) * (pair.rounding + 8 * ULP)
        return Bracket(max(0.0, value - wrong), value, value + wrong, True)

    def _exact(self) -> list[tuple[lattice.Lattice, int]] | None:
        """Return the parts as they are if their losses lie on one lattice already."""
        spacing = {getattr(pair, "spacing", 0.0) for pair, _ in self.parts}
        if len(spacing) != 1 or 0.0 in spacing:
            return None
        step = spacing.pop()
        out = []
        for pair, count in self.parts:
            if not isinstance(pair, Atoms):
                return None
            losses = pair.losses
            middle = float(losses[int(np.argmax(pair.p))])
            index = np.rint((losses - middle) / step).astype(np.int64)
            mass = np.bincount(index - index.min(), pair.p).astype(np.float64)
            error = pair.rounding + 64 * ULP
            out.append((lattice.Lattice(np.arange(len(mass)) + index.min(), mass, pair.certain, error, middle), count))
        return out

    def _lattice_delta(self, parts: list[tuple[lattice.Lattice, int]], epsilon: float) -> Bracket:
        step = float(getattr(self.parts[0][0], "spacing", 0.0))
        order, window = self._tilt(epsilon)
        composition = pld.compose(parts, step, order, window)
        room = 4 * ULP * sum(count for _, count in parts) * max(1.0, abs(epsilon))
        upper = composition.delta(epsilon - room, True)
        lower = composition.delta(epsilon + room, False)
        return Bracket(lower, (lower + upper) / 2, upper, True)

    def _lattice_epsilon(self, parts: list[tuple[lattice.Lattice, int]], delta: float, near: float) -> Bracket:
        step = float(getattr(self.parts[0][0], "spacing", 0.0))
        order, window = self._tilt(near)
        composition = pld.compose(parts, step, order, window)
        upper = composition.epsilon(math.log(delta), near, True)
        lower = composition.epsilon(math.log(delta), near, False)
        room = 4 * ULP * sum(count for _, count in parts) * max(1.0, abs(upper))
        return Bracket(lower - room, (lower + upper) / 2, upper + room, True)

    def bracket_delta(self, epsilon: float, tol: float) -> Bracket:
        """Bracket delta(epsilon)."""
        estimate, settled = self.estimate_delta(epsilon)
        if self.single:
            wrong = _profile_error(self.parts[0][0], epsilon)
            return Bracket(max(0.0, estimate - wrong), estimate, min(1.0, estimate + wrong), True)
        if epsilon >= self.ceiling:  # the true ceiling may lie a rounding error higher
            upper = self.certain * (1 + 1e-12) + 2e-12 * abs(self.ceiling) + 1e-280
            return Bracket(self.surely * (1 - 1e-12), self.certain, min(1.0, upper), True)
        top = self._top_delta(epsilon)
        if top is not None:
            return top
        exact = self._exact()
        if exact is not None:
            return self._lattice_delta(exact, epsilon)

        def read(composition: pld.Composition, upper: bool) -> float:
            return composition.delta(epsilon, upper)

        order = self.cumulants.order_for_epsilon(epsilon)
        floor = 1e-300
        target = estimate if settled else None
        return self._refined(epsilon, target, max(estimate, floor), tol / order, tol, floor, read, -math.inf)

    def _refined(
        self,
        near: float,
        target: float | None,
        delta: float,
        shift: float,
        tol: float,
        floor: float,
        read: Callable[[pld.Composition, bool], float],
        enough: float,
    ) -> Bracket:
        """Take smaller steps until the bounds meet: tilt for losses near `near`, tolerate `shift` in the loss.

        target: where the answer surely is, if that is known; a bound that is close enough to it is left alone.
        """
        order, window = self._tilt(near)
        allowed = shift / (4 * (order + 1))
        total = sum(count for _, count in self.parts)
        bend = self.cumulants.at(order)[2]
        step = min((window[1] - window[0]) / _FIRST, math.sqrt(2 * allowed / total), math.sqrt(bend) / 2)
        step = max(step, (window[1] - window[0]) / (_FIRST * 16))
        lower, upper, done = -math.inf, math.inf, False
        spans = [found for found in (atoms_of(pair) for pair, _ in self.parts) if found]
        ends = min(spans, key=lambda span: span[1] - span[0], default=None)
        for _ in range(_ROUNDS):
            step = max(step, (window[1] - window[0]) / (2 * _LARGEST))
            step = lattice.aligned_step(step, ends) if ends else step
            if (window[1] - window[0]) / step > 16 * _LARGEST:
                break
            highs, lows, narrow = self._lattices(step, order, delta, allowed)
            room = 0.0 if target is None else 0.5 * tol * max(target, floor)
            if target is None or not upper - target < room:
                upper = min(upper, read(pld.compose(highs, step, order, window), True))
            if upper > enough and (target is None or not target - lower < room):
                lower = max(lower, read(pld.compose(lows, step, order, window), False))
            done = _close(lower, upper, tol, floor) or upper <= enough
            if done or (window[1] - window[0]) / step > _LARGEST:
                break
            ratio = (upper - lower) / (tol * max(lower, floor)) if upper < math.inf else 16.0
            if narrow:
                step /= min(6.0, max(1.5, 1.2 * ratio))
            allowed /= min(32.0, max(2.0, 2.5 * ratio))
        middle = (lower + upper) / 2 if target is None and math.isfinite(upper - lower) else target or 0.0
        return Bracket(lower, min(max(middle, lower), upper), upper, done)

    def _tilt(self, near: float) -> tuple[float, tuple[float, float]]:
        """Return the order to tilt to, and the window of losses where the tilted law then has its mass.

        The saddle point is most accurate; but with rare large losses a smaller order, at the price of a few digits,
        leaves them out and makes the window many times smaller.
        """
        spacing = max(float(getattr(pair, "spacing", 0.0)) for pair, _ in self.parts)
        saddle = min(self.cumulants.order_for_epsilon(near), 20 / spacing if spacing else math.inf)
        best = saddle, self._window(saddle, near, LOG_TAIL)
        least = self.cumulants.at(saddle)[0] - saddle * near
        for factor in (0.97, 0.93, 0.9, 0.86, 0.8, 0.75, 0.7):
            order = factor * saddle
            cost = self.cumulants.at(order)[0] - order * near - least
            if cost > 0.4:
                break
            window = self._window(order, near, LOG_TAIL - cost)
            if window[1] - window[0] < 0.7 * (best[1][1] - best[1][0]):
                best = order, window
        return best

    def _window(self, order: float, near: float, log_tail: float) -> tuple[float, float]:
        low, high = reaches(self.cumulants, order, log_tail, whole=True)
        return min(low, near - 2 / order), max(high, near + 8 / order)

    def _lattices(
        self, step: float, order: float, delta: float, allowed: float
    ) -> tuple[list[tuple[lattice.Lattice, int]], list[tuple[lattice.Lattice, int]], bool]:
        highs, lows, narrow = [], [], False
        for pair, count in self.parts:
            share = allowed / (len(self.parts) * count)
            high = pair.span(min(1e-3, delta * 1e-6 / count))[1]
            low = pair.span(1e-14 / count)[0]
            if max(high, -low) > lattice.WIDEST_LOSS:
                raise OverflowError("losses beyond the range of floats")
            moment = self.cumulants.of(pair, order)
            cells = lattice.refine(pair, step, low, high, order, moment, share)
            narrow = narrow or bool((cells.index[1:] - cells.index[:-1]).min() <= 1)
            highs.append((lattice.spread(cells, certain_of(pair), order, moment), count))
            below = getattr(pair, "below", pair)
            if below is not pair:
                cells = lattice.Cells(step, cells.index, below.masses(cells.edges), cells.offset)
            lows.append((lattice.merge(below, cells, certain_of(below), order, moment), count))
        return highs, lows, narrow


def _enumerated(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """Return one pair with every outcome of a composition, if those are few; else the parts as they are."""
    size = 1.0
    for pair, count in parts:
        if not isinstance(pair, Atoms) or len(pair.p) > 8 or count > 16:
            return parts
        size *= float(len(pair.p)) ** count
    if not 1 < size <= 4096 or sum(count for _, count in parts) == 1:
        return parts
    p, q, log_kept, rounding = np.ones(1), np.ones(1), 0.0, 0.0
    for pair, count in parts:
        assert isinstance(pair, Atoms)
        for _ in range(count):
            p, q = np.multiply.outer(p, pair.p).ravel(), np.multiply.outer(q, pair.q).ravel()
            log_kept += math.log1p(-pair.certain)
            rounding += pair.rounding + 2 * ULP
    return ((Atoms(p, q, -math.expm1(log_kept), rounding), 1),)


def _once(chances: tuple[tuple[float, int], ...]) -> float:
    """Return the probability that something of the given chances happens at least once."""
    if any(chance >= 1 for chance, _ in chances):
        return 1.0
    return -math.expm1(sum(count * math.log1p(-chance) for chance, count in chances))


def _meet(first: Bracket, second: Bracket | None) -> Bracket:
    """Return the intersection of two brackets."""
    if second is None:
        return first
    lower, upper = max(first.lower, second.lower), min(first.upper, second.upper)
    return Bracket(lower, min(max(first.estimate, lower), upper), upper, first.settled)


def _profile_error(pair: Pair, epsilon: float) -> float:
    """Bound the rounding of a profile: it is a difference of two masses, each with its own error."""
    growth = math.exp(min(epsilon, 700.0))
    p, q, p_error, q_error = (float(part[1]) for part in pair.masses(np.array([epsilon])))
    reach = 4 * ULP * (1 + abs(epsilon))
    return p_error + growth * q_error + reach * (p + growth * q) + 1e-12 * certain_of(pair) + 1e-290


def _single_epsilon(pair: Pair, delta: float, estimate: float) -> Bracket:
    """Return where the profile, with its rounding added and taken away, has the value delta."""
    upper = _profile_root(lambda epsilon: pair.profile(epsilon) + _profile_error(pair, epsilon), delta)
    lower = _profile_root(lambda epsilon: pair.profile(epsilon) - _profile_error(pair, epsilon), delta)
    room = 8 * ULP * (1e-3 + abs(estimate))
    return Bracket(min(lower, estimate) - room, estimate, max(upper, estimate) + room, True)


def _profile_root(profile: Callable[[float], float], delta: float) -> float:
    """Return where a decreasing profile takes the value delta."""
    target = math.log(delta)

    def excess(epsilon: float) -> float:
        value = profile(epsilon)
        return math.log(value) - target if value > 0 else -math.inf

    low, high = -1.0, 1.0
    while excess(high) > 0:
        low, high = high, 2 * high
        if high > 1e6:
            return math.inf
    while excess(low) < 0 and low > -1e6:
        low *= 2
    return root(excess, low, high)
