"""Bracket epsilon or delta of one direction of a composition: estimate by inversion, bounds by lattices, refined."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from privfed.privacy import lattice, pld
from privfed.privacy.atoms import Atoms, atoms_of, certain_of, loss_error
from privfed.privacy.closed_form import root
from privfed.privacy.cumulant import Cumulants, Inversion, Part, invert
from privfed.privacy.pair import ULP, Pair
from privfed.privacy.stretch import Stretch, bracket_delta, stretch
from privfed.privacy.window import refined, tilt

_NEARBY = (4.0, 2.0, 1.4, 1.2, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.25)


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
        self.pairs = tuple(pair for pair, _ in self.parts)
        self.counts = tuple(count for _, count in self.parts)
        self.cumulants = Cumulants(self.parts)
        self._lines: dict[float, Inversion] = {}
        self._near: dict[tuple[float, float], tuple[float, bool]] = {}

    @cached_property
    def certain(self) -> float:
        """Probability of an outcome that only P has."""
        return _once(tuple((certain_of(pair), count) for pair, count in self.parts))

    @cached_property
    def _room(self) -> float:
        """How far the losses of single outcomes, summed over all uses, may be from the true ones."""
        return sum(count * _known_to(pair) for pair, count in self.parts)

    @cached_property
    def _mixed(self) -> bool:
        """Whether kinds of mechanism meet of which some have single outcomes: see `privfed.privacy.window`."""
        return len(self.parts) > 1 and any(atoms_of(pair) for pair in self.pairs)

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
        return sum(count * _highest(pair) for pair, count in self.parts)

    @property
    def single(self) -> bool:
        """Say whether the closed profile of one use answers."""
        return len(self.parts) == 1 and self.parts[0][1] == 1 and not hasattr(self.parts[0][0], "below")

    @property
    def sharp(self) -> bool:
        """Say whether bounds and estimate of epsilon differ by rounding only."""
        return self.single or self._exact() is not None

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
        # Chernoff's bound: what the trapezoid rule says beyond it is an echo
        orders = line.order * np.array(_NEARBY)
        most = float(np.min((self.cumulants.values(orders) - log_delta) / orders))
        xtol = 0.0 if line.settled else 1e-4
        found = line.epsilon(log_delta, slope, 6 * spread + 1 / line.order, xtol, most)
        return min(found, self.ceiling) if self.certain == 0 else found, line.settled

    def near_epsilon(self, delta: float, tol: float) -> tuple[float, bool]:
        """Return the same from what a bracket to `tol` prepares anyway."""
        if self.certain >= delta or self.single or self._mixed or self._exact() is not None:
            return self.estimate_epsilon(delta)
        peak = self._peak(delta)
        if peak is not None and _close(peak.lower, peak.upper, 1e-9, 1e-9):
            return peak.upper, True
        if (delta, tol) not in self._near:
            self._near[delta, tol] = self._stretch(delta, tol).estimate(self.counts, self._finite(delta))
        return self._near[delta, tol]

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
        found = self._bracket_epsilon(delta, tol, enough - self._room)
        return Bracket(found.lower - self._room, found.estimate, found.upper + self._room, found.settled)

    def _bracket_epsilon(self, delta: float, tol: float, enough: float) -> Bracket:
        estimate, settled = self.near_epsilon(delta, tol)
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
        limit = self.ceiling + 1e-12 * abs(self.ceiling) if self.certain == 0 and delta > 1e-280 else math.inf
        if limit <= enough:
            return Bracket(-math.inf, min(estimate, limit), limit, True)
        exact = self._exact()
        if exact is not None:
            return _meet(self._lattice_epsilon(exact, delta, estimate), peak)
        target = estimate if settled else None
        if self._mixed:
            log_delta, shift = math.log(delta), tol * max(estimate, 1e-3)
            lower, upper, done = refined(
                self.parts,
                estimate,
                target,
                delta,
                shift,
                (tol, 1e-3),
                lambda composition, upper: composition.epsilon(log_delta, estimate, upper),
                enough,
            )
        else:
            lower, upper, done = self._stretch(delta, tol).bracket(
                self.counts, target, enough, lambda counts: self._elsewhere(counts, delta, tol)
            )
        if settled or not math.isfinite(upper - lower):
            middle = min(max(estimate, lower), upper)
        else:
            middle = (lower + upper) / 2
        found = Bracket(lower, middle, upper, done)
        return _meet(_meet(found, peak), Bracket(-math.inf, limit, limit, True))

    def _stretch(self, delta: float, tol: float) -> Stretch:
        most = tuple(1 << (count - 1).bit_length() for count in self.counts)
        alone = Direction(tuple(zip(self.pairs, most, strict=True))).certain >= delta if self.certain else False
        return stretch(self.pairs, self.counts, delta, tol, alone)

    def _finite(self, delta: float) -> float:
        """Return the log of the delta that the finite losses may have, given that the loss is finite."""
        return math.log((delta - self.certain) / (1 - self.certain))

    def _elsewhere(self, counts: tuple[int, ...], delta: float, tol: float) -> float:
        other = Direction(tuple(zip(self.pairs, counts, strict=True)))
        return self._stretch(delta, tol).estimate(counts, other._finite(delta))[0]

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
        wrong = mass * (self._room + 8 * ULP * (1 + self.ceiling)) + value * (count + 4) * (pair.rounding + 8 * ULP)
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
        order, window = tilt(self.parts, self.cumulants, epsilon)
        composition = pld.compose(parts, step, order, window)
        room = self._room + 4 * ULP * sum(count for _, count in parts) * max(1.0, abs(epsilon))
        upper = composition.delta(epsilon - room, True)
        lower = composition.delta(epsilon + room, False)
        return Bracket(lower, (lower + upper) / 2, upper, _close(lower, upper, 1e-2, 1e-300))

    def _lattice_epsilon(self, parts: list[tuple[lattice.Lattice, int]], delta: float, near: float) -> Bracket:
        step = float(getattr(self.parts[0][0], "spacing", 0.0))
        order, window = tilt(self.parts, self.cumulants, near)
        composition = pld.compose(parts, step, order, window)
        upper = composition.epsilon(math.log(delta), near, True)
        lower = composition.epsilon(math.log(delta), near, False)
        room = 4 * ULP * sum(count for _, count in parts) * max(1.0, abs(upper))
        return Bracket(lower - room, (lower + upper) / 2, upper + room, True)

    def bracket_delta(self, epsilon: float, tol: float) -> Bracket:
        """Bracket delta(epsilon)."""
        estimate, settled = self.estimate_delta(epsilon)
        estimate = min(estimate, 1.0)
        if self.single:
            wrong = _profile_error(self.parts[0][0], epsilon)
            return Bracket(max(0.0, estimate - wrong), estimate, min(1.0, estimate + wrong), True)
        if epsilon >= self.ceiling:  # the true ceiling may lie a rounding error higher
            # above it for sure, there is only what P alone has, and what is too rare for floats
            near = self._room + 2e-12 * abs(self.ceiling)
            unsure = 0.0 if epsilon > self.ceiling + near else near
            upper = self.certain * (1 + 1e-12) + unsure + 1e-280
            return Bracket(self.surely * (1 - 1e-12), self.certain, min(1.0, upper), True)
        top = self._top_delta(epsilon)
        if top is not None:
            return top
        exact = self._exact()
        if exact is not None:
            return self._lattice_delta(exact, epsilon)

        room = self._room
        if self._mixed:
            shift = tol / self.cumulants.order_for_epsilon(epsilon)
            lower, upper, done = refined(
                self.parts,
                epsilon,
                estimate if settled else None,
                max(estimate, 1e-300),
                shift,
                (tol, 1e-300),
                lambda composition, upper: composition.delta(epsilon + (-room if upper else room), upper),
                -math.inf,
            )
            middle = estimate if settled or not math.isfinite(upper - lower) else (lower + upper) / 2
            return Bracket(lower, min(max(middle, lower), upper), upper, done)
        line = self._line_at(self.cumulants.order_for_epsilon(epsilon))
        lower, upper, done = bracket_delta(self.pairs, self.counts, epsilon, estimate, settled, tol, line, room)
        middle = estimate if settled else (lower + upper) / 2
        return Bracket(lower, min(max(middle, lower), upper), upper, done)


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


@lru_cache(maxsize=256)
def _highest(pair: Pair) -> float:
    """Return the largest finite loss."""
    return pair.span(0.0)[1]


@lru_cache(maxsize=256)
def _known_to(pair: Pair) -> float:
    return loss_error(pair)


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
    p, q, p_error, q_error = (float(part[1]) for part in pair.masses(np.array([epsilon - loss_error(pair)])))
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
