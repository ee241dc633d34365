"""Choose the engine for a question about a composition, and put the answers of its directions together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache
from typing import TypeVar

import numpy as np

from privfed.privacy import closed_form, rdp
from privfed.privacy import events as ev
from privfed.privacy.atoms import Atoms, OutOfRange, certain_of, loss_error
from privfed.privacy.bound import Bound, exact
from privfed.privacy.cumulant import Part
from privfed.privacy.dominating import RENYI_ONLY, gaussian_mu, pairs, silent
from privfed.privacy.engine import Bracket, Direction
from privfed.privacy.pair import NormalPair, Pair

_WIDEST = 550.0  # losses of a block; what lies beyond counts as certain
_LONG = 64  # uses from which on the lesser of two directions is asked at some counts only
_RARE = 1e-15  # deltas where what an allocation pair leaves out may show
_MOMENTS = "moments: effort limit, losses leave the range of floats"
_RENYI_LOWER = "; lower covers the parts with a dominating pair only, and tol does not apply"


Answer = TypeVar("Answer")


class Plan:
    """The parts of a composition, sorted by what is known about them."""

    def __init__(self, counts: Mapping[ev.Event, int], relation: str) -> None:
        self.relation, self.counts = relation, dict(counts)
        self.infinite = self.unresolved = False
        square = 0.0
        removed: list[Part] = []
        added: list[Part] = []
        self.renyi: list[tuple[ev.Event, int]] = []
        for event, count in counts.items():
            mu = gaussian_mu(event, relation)
            if isinstance(event, ev.Unaccounted):
                self.infinite = True
            elif silent(event):
                continue
            elif mu is not None:
                square += count * mu * mu
            elif _only_renyi(event):
                self.renyi.append((event, count))
            else:
                try:
                    both = pairs(event, relation)
                except OverflowError as cause:
                    self.infinite = True
                    self.unresolved = self.unresolved or isinstance(cause, OutOfRange)
                    continue
                if both is not None:
                    removed.append((both[0], count))
                    added.append((both[1], count))
        self.mu = math.sqrt(square)
        self.infinite = self.infinite or self.mu == math.inf
        self._parts = (removed, added)
        self._directions: tuple[Direction, ...] | None = None

    def grown(self, counts: Mapping[ev.Event, int]) -> Plan | None:
        """Return a plan for more of the same, or None to start afresh."""
        return None

    @property
    def gaussian(self) -> bool:
        """Say whether everything is plain Gaussian noise."""
        return not self._parts[0] and not self.renyi

    @property
    def sharp(self) -> bool:
        """Say whether what searches go by is exact but for rounding, or is a bound itself."""
        return self.gaussian or bool(self.renyi) or all(direction.sharp for direction in self.directions)

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Return one or two directions of the parts with dominating pairs, the Gaussians among them."""
        if self._directions is None:
            self._directions = self._made(())
        return self._directions

    def _made(self, extra: tuple[Part, ...]) -> tuple[Direction, ...]:
        removed, added = self._parts
        gauss: tuple[Part, ...] = ((NormalPair(self.mu), 1),) if self.mu > 0 else ()
        same = all(a[0] is b[0] for a, b in zip(removed, added, strict=True))
        sides = (removed,) if same else (removed, added)
        return tuple(Direction((*side, *gauss, *extra)) for side in sides)

    def _blocked(self) -> tuple[Direction, ...]:
        """Return the directions with the Renyi block as one more pair."""
        orders = np.array(rdp.ORDERS)
        return self._made(((renyi_pair(orders, self._divergences(orders)), 1),))

    def _divergences(self, orders: np.ndarray) -> np.ndarray:
        total = np.zeros(len(orders))
        for event, count in self.renyi:
            total = total + count * rdp.divergence(event, list(orders), self.relation)
        return total * (1 + 1e-12)

    def estimate(self, delta: float) -> float:
        """Return the estimate of epsilon."""
        if self.infinite or self.renyi or delta == 0:
            return self.epsilon(delta, 1e-3).estimate
        if self.gaussian:
            return closed_form.gaussian_epsilon(self.mu, delta)
        try:
            found = max(0.0, max(direction.estimate_epsilon(delta)[0] for direction in self.directions))
            return found if found < math.inf or self._opened is None else self._opened.estimate(delta)
        except OverflowError:
            return self._coarse(delta).upper

    def rough_epsilon(self, delta: float, side: int | None = None) -> float:
        """Return an epsilon for searches: the estimate, or where parts have Renyi bounds only, the moments of all.

        side: the direction that is known to cost more, if it is known; see `costlier`.
        """
        if self.renyi and self._parts[0] and delta > 0 and not self.infinite:
            return self._coarse(delta).upper
        if side is None or self._simple(delta):
            return self.estimate(delta)
        try:
            return max(0.0, self.directions[side].estimate_epsilon(delta)[0])
        except OverflowError:
            return self._coarse(delta).upper

    def _simple(self, delta: float) -> bool:
        """Say whether epsilon takes no inversion."""
        return self.infinite or bool(self.renyi) or delta == 0 or self.gaussian

    def costlier(self, delta: float) -> int | None:
        """Return the number of the direction that costs more by the estimate, None where none is composed."""
        if self._simple(delta):
            return None
        try:
            return int(np.argmax([direction.estimate_epsilon(delta)[0] for direction in self.directions]))
        except OverflowError:
            return None

    def rough_delta(self, epsilon: float) -> float:
        """Return the estimate of delta."""
        if self.infinite or self.renyi or self.gaussian:
            return self.delta(epsilon, 1e-3).estimate
        try:
            return max(direction.estimate_delta(epsilon)[0] for direction in self.directions)
        except OverflowError:
            return self._coarse_delta(epsilon).upper

    def epsilon(self, delta: float, tol: float) -> Bound:
        """Bracket epsilon(delta)."""
        if self.infinite:
            lower = 0.0 if self.unresolved else math.inf
            return Bound(lower, math.inf, math.inf, *self._unaccounted())
        if self.gaussian:
            value = closed_form.gaussian_epsilon(self.mu, delta)
            return exact(value, "closed form", "Gaussian composition [BW18, DRS22]", closed_form.SLACK)
        if delta == 0:
            return self._pure()
        if self.renyi:
            return self._renyi_epsilon(delta, tol)
        try:
            found = self._worst(delta, tol, self.directions)
        except OverflowError:
            return self._coarse(delta)
        if found.upper == math.inf and self._opened is not None:
            found = _capped(found, self._opened.epsilon(delta, tol).upper)
        return _bound(found, "epsilon", tol, 1e-3)

    def _unaccounted(self) -> tuple[str, str]:
        """Return method and proof where nothing is guaranteed."""
        if self.unresolved:
            return "none: effort limit", "losses leave the range of floats; nothing is claimed"
        return "none", "something was released without a guarantee"

    def _worst(self, delta: float, tol: float, directions: tuple[Direction, ...]) -> Bracket:
        """Return the bracket of the maximum over directions; the lesser ones only until they are seen to be less.

        In long runs the lesser one is asked at a few counts only: what a little more of the same costs at most is
        more than what this costs.
        """
        rest, beyond = list(directions), math.inf
        if len(directions) == 2 and sum(directions[0].counts) >= _LONG:
            lead, beyond = lesser(*(_rounded(direction) for direction in directions), delta, tol)
            best = rest.pop(lead).bracket_epsilon(delta, tol)
        else:
            rest.sort(key=lambda d: -d.near_epsilon(delta, tol)[0])
            best = rest.pop(0).bracket_epsilon(delta, tol)
        if beyond > best.lower:
            for direction in rest:
                best = _largest(best, direction.bracket_epsilon(delta, tol, enough=best.lower))
        return Bracket(max(0.0, best.lower), max(0.0, best.estimate), max(0.0, best.upper), best.settled)

    def delta(self, epsilon: float, tol: float) -> Bound:
        """Bracket delta(epsilon)."""
        if self.infinite:
            return Bound(0.0 if self.unresolved else 1.0, 1.0, 1.0, *self._unaccounted())
        if math.isinf(epsilon):
            return exact(0.0 if epsilon > 0 else 1.0, "closed form", "by definition")
        if self.gaussian:
            value = closed_form.gaussian_delta(self.mu, epsilon)
            bound = exact(value, "closed form", "Gaussian composition [BW18, DRS22]", 1e-10)
            lower = bound.lower if value > 1e-300 else 0.0  # below lie the numbers that have few digits
            return Bound(lower, value, min(1.0, bound.upper + 1e-300), bound.method, bound.proof)
        if self.renyi:
            return self._renyi_delta(epsilon, tol)
        try:
            found = [direction.bracket_delta(epsilon, tol) for direction in self.directions]
        except OverflowError:
            return self._coarse_delta(epsilon)
        best = found[0]
        for other in found[1:]:
            best = _largest(best, other)
        if best.upper < _RARE and self._opened is not None:
            best = _capped(best, self._opened.delta(epsilon, tol).upper)
        return _bound(best, "delta", tol, 1e-300)

    @cached_property
    def _opened(self) -> Plan | None:
        """Return the plan in which every unit takes part in one known round of each allocation; it costs more.

        Allocation pairs leave out outcomes of probability below about 1e-18, where only this bound is left.
        """
        if not any(isinstance(event, ev.RandomAllocation) for event in self.counts):
            return None
        counts: dict[ev.Event, int] = {}
        for event, count in self.counts.items():
            inner = event.inner if isinstance(event, ev.RandomAllocation) else event
            counts[inner] = counts.get(inner, 0) + count
        return Plan(counts, self.relation)

    def _pure(self) -> Bound:
        """Return epsilon at delta 0: the sum of the largest losses, if they have one."""
        if self.mu > 0 or self.renyi:
            return exact(math.inf, "closed form", "unbounded privacy losses")
        worst = wrong = 0.0
        for side in self._parts:
            worst = max(worst, sum(count * _ceiling(pair) for pair, count in side))
            wrong = max(wrong, sum(count * loss_error(pair) for pair, count in side))
        if worst == math.inf:
            return exact(math.inf, "closed form", "unbounded privacy losses")
        wrong += 1e-12 * worst
        proof = "largest privacy losses add up [DR14, Thm 3.16]"
        return Bound(max(0.0, worst - wrong), worst, worst + wrong, "closed form", proof)

    def _moments(self) -> np.ndarray:
        """Return the divergences of everything at all orders."""
        total = self.mu**2 / 2 * np.array(rdp.ORDERS)
        for event, count in self.counts.items():
            if gaussian_mu(event, self.relation) is None:
                total = total + count * rdp.divergence(event, rdp.ORDERS, self.relation)
        return np.asarray(total * (1 + 1e-12))

    def _coarse(self, delta: float) -> Bound:
        """Return the moment bound where losses are too large for a lattice."""
        upper = rdp.epsilon_of(rdp.ORDERS, self._moments(), delta) * (1 + 1e-9)
        return Bound(0.0, upper, upper, _MOMENTS, "Renyi conversion [BBG+20]")

    def _coarse_delta(self, epsilon: float) -> Bound:
        """Return the same for delta."""
        upper = _mirrored_delta(self._moments(), epsilon)
        return Bound(0.0, upper, upper, _MOMENTS, "Renyi conversion [BBG+20]")

    def _renyi_epsilon(self, delta: float, tol: float) -> Bound:
        orders = np.array(rdp.ORDERS)
        divergences = self._divergences(orders)
        if not self._parts[0]:
            upper = rdp.epsilon_of(rdp.ORDERS, divergences + self.mu**2 / 2 * orders, delta) * (1 + 1e-12)
            lower = closed_form.gaussian_epsilon(self.mu, delta) * (1 - closed_form.SLACK) if self.mu else 0.0
            lower = min(lower, upper)
            return Bound(lower, upper, upper, "Renyi divergences", "[BBG+20, Thm 21]" + _RENYI_LOWER)
        upper, near = self._within(lambda: _ends(self._worst(delta, tol, self._blocked())), (math.inf, 0.0))
        if not upper - near <= tol * max(upper, 1e-3):
            for share in (0.5, 0.95, 0.05):
                upper = min(upper, self._split(delta, share, tol))
            upper = min(upper, self._coarse(delta).upper)
        lower = min(self._within(lambda: self._worst(delta, tol, self.directions).lower, 0.0), upper)
        method = "Renyi block as a dominating pair, composed on a lattice, or delta split"
        return Bound(lower, upper, upper, method, "[BBG+20, ZDW22]" + _RENYI_LOWER)

    def _split(self, delta: float, share: float, tol: float) -> float:
        """Return an epsilon of both kinds of parts, each with its share of delta."""
        rest = rdp.epsilon_of(rdp.ORDERS, self._divergences(np.array(rdp.ORDERS)), delta * (1 - share))
        return rest + self._within(lambda: self._worst(delta * share, tol, self.directions).upper, math.inf)

    def _renyi_delta(self, epsilon: float, tol: float) -> Bound:
        if not self._parts[0]:
            upper = _mirrored_delta(self._moments(), epsilon)
            lower = closed_form.gaussian_delta(self.mu, epsilon) * (1 - 1e-10)
            return Bound(min(lower, upper), upper, upper, "Renyi divergences", "[BBG+20, Thm 20]" + _RENYI_LOWER)
        upper = self._within(
            lambda: max(direction.bracket_delta(epsilon, tol).upper for direction in self._blocked()), 1.0
        )
        if upper >= 1:
            upper = self._coarse_delta(epsilon).upper
        lower = self._within(
            lambda: max(direction.bracket_delta(epsilon, tol).lower for direction in self.directions), 0.0
        )
        return Bound(min(lower, upper), upper, upper, "Renyi block on a lattice", "[BBG+20, ZDW22]" + _RENYI_LOWER)

    @staticmethod
    def _within(work: Callable[[], Answer], otherwise: Answer) -> Answer:
        """Return what the work finds, or something else if losses leave the range of floats."""
        try:
            return work()
        except OverflowError:
            return otherwise


def _rounded(direction: Direction) -> tuple[Part, ...]:
    """Return the parts with counts rounded up by at most a sixteenth, but not beyond the next power of two."""
    units = [max(1, 1 << max(0, (count - 1).bit_length() - 5)) for count in direction.counts]
    return tuple(
        (pair, -(-count // unit) * unit)
        for pair, count, unit in zip(direction.pairs, direction.counts, units, strict=True)
    )


@lru_cache(maxsize=256)
def lesser(first: tuple[Part, ...], second: tuple[Part, ...], delta: float, tol: float) -> tuple[int, float]:
    """Return which of two directions costs more, and an upper bound on what the other one costs."""
    directions = Direction(first), Direction(second)
    nears = [direction.near_epsilon(delta, tol)[0] for direction in directions]
    lead = int(nears[1] > nears[0])
    return lead, directions[1 - lead].bracket_epsilon(delta, tol, enough=0.9 * nears[lead]).upper


def _ends(bracket: Bracket) -> tuple[float, float]:
    return bracket.upper, bracket.estimate


def _mirrored_delta(divergences: np.ndarray, epsilon: float) -> float:
    """Return delta from divergences in both directions, for negative epsilon by the other direction."""
    delta = float(rdp.delta_of(rdp.ORDERS, divergences, abs(epsilon))[0]) * (1 + 1e-12)
    return min(1.0, delta if epsilon >= 0 else -math.expm1(epsilon) + math.exp(epsilon) * delta)


def _only_renyi(event: ev.Event) -> bool:
    inner = event.inner if isinstance(event, ev.PoissonSampled) else event
    return isinstance(inner, RENYI_ONLY)


def _ceiling(pair: Pair) -> float:
    """Return the largest privacy loss of a pair; infinite if any part of it is unbounded in either direction.

    Sampled noise has a largest loss in one direction only, and the other one decides.
    """
    if isinstance(pair, NormalPair) or certain_of(pair) > 0:
        return math.inf
    branches = getattr(pair, "branches", None)
    if branches is not None:
        return max(_ceiling(branch) for share, branch in branches if share > 0)
    inner = getattr(pair, "pair", None) or getattr(pair, "above", None)
    if getattr(pair, "endless", False) or (inner is not None and math.isinf(_ceiling(inner))):
        return math.inf
    return float(pair.span(0.0)[1])


def renyi_pair(orders: np.ndarray, divergences: np.ndarray) -> Atoms:
    """Return a dominating pair for everything with these Renyi divergences in both directions.

    The privacy profile is convex in exp(epsilon); the least convex curve above it on a grid of losses has a pair.
    """
    most = min(_WIDEST, max(1.0, rdp.epsilon_of(list(orders), divergences, 1e-30)))
    up = np.linspace(0.0, most, 3001)
    delta = rdp.delta_of(list(orders), divergences, up)
    losses = np.concatenate((-up[:0:-1], up))
    stick = np.concatenate((np.minimum(1.0, -np.expm1(-up[:0:-1]) + np.exp(-up[:0:-1]) * delta[:0:-1]), delta))
    ratio = np.concatenate(([0.0], np.exp(losses)))
    stick = np.concatenate(([1.0], stick))
    keep = [0]
    for i in range(1, len(ratio)):  # lower convex hull
        while len(keep) > 1:
            a, b = keep[-2], keep[-1]
            if (stick[b] - stick[a]) * (ratio[i] - ratio[b]) <= (stick[i] - stick[b]) * (ratio[b] - ratio[a]):
                break
            keep.pop()
        keep.append(i)
    x, y = ratio[keep], stick[keep]
    slope = np.append(np.diff(y) / np.diff(x), 0.0)
    q = np.diff(slope)
    p = q * x[1:]
    good = q > 0
    if not good.any():
        raise OverflowError("nothing of this block lies within the range of floats")
    return Atoms(p[good], q[good], float(y[-1]), rounding=1e-9)


def _largest(first: Bracket, second: Bracket) -> Bracket:
    """Return the bracket of the maximum."""
    upper = max(first.upper, second.upper)
    lower = max(first.lower, second.lower)
    estimate = min(max(first.estimate, second.estimate, lower), upper)
    return Bracket(lower, estimate, upper, first.settled and (second.settled or second.upper <= first.lower))


def _capped(found: Bracket, upper: float) -> Bracket:
    """Return the bracket with another upper bound, if that is less."""
    upper = max(found.lower, min(found.upper, upper))
    return Bracket(found.lower, min(found.estimate, upper), upper, False)


def _bound(found: Bracket, what: str, tol: float, floor: float) -> Bound:
    method = "tilted lattices, both sides; inversion for the estimate"
    if found.lower != found.upper and not found.upper - found.lower <= tol * max(found.lower, floor):
        method += "; effort limit reached before tol"
    proof = f"{what}: connect the dots above [DGK+22], merged outcomes below; dominating pairs [ZDW22]"
    return Bound(found.lower, found.estimate, found.upper, method, proof)
