"""Log moments of composed losses, where to tilt, and the estimate: Laplace inversion along a tilted line.

delta(eps) = e^(K(a) - a eps) / pi * integral over u > 0 of Re[e^(K(a + iu) - K(a) - iu eps) / ((a + iu)(a + 1 + iu))]
for every a > 0, with K(s) = sum of counts * log E_P e^(s L). A shift of the line near the saddle makes every error
relative to delta, however small delta is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from privfed.privacy.pair import Floats, Pair

Part = tuple[Pair, int]
_SETTLED = -26.0  # nats that the integrand must have fallen by at the end of its line
_LOST = -45.0  # nats below which a point of the line no longer counts
_UNSEEN = 1e-19  # of the largest term of an inversion; what is less is left out
_LEAST_REACH = 16.0  # of orders that nodes are made for; then 4 times as much, and so on
_AT_ONCE = 1 << 16  # terms of sums over nodes that are held at once
_MAX_REACH = 2.0**14  # beyond it, what decides is the largest loss itself


@dataclass
class Cumulants:
    """K and its derivatives for one direction of a composition; nodes are kept between queries."""

    parts: Sequence[Part]
    limits: Sequence[float] = ()  # leave out the losses of each part beyond its limit
    _nodes: dict[tuple[float, float], list[tuple[float, Floats, Floats]]] = field(default_factory=dict)

    def nodes(self, order: float, wave: float = 0.0) -> list[tuple[float, Floats, Floats]]:
        """Return, for each part, its count, and losses and weights that integrate exp(s L): s = order + iu, u <= wave.

        High orders take many nodes; low ones are not made to pay for it.
        """
        reach = self._reach(order)
        known = self._nodes.get((reach, wave))
        if known is None:
            known = []
            for number, (pair, count) in enumerate(self.parts):
                losses, weights = pair.nodes(reach, wave)
                keep = weights > 0
                if self.limits:
                    keep &= losses <= max(self.limits[number], float(losses[keep].min()))
                known.append((float(count), losses[keep], weights[keep]))
            self._nodes[reach, wave] = known
        return known

    @staticmethod
    def _reach(order: float) -> float:
        reach = _LEAST_REACH
        while reach < order * 1.5 + 1:
            reach *= 4
        return reach

    def at(self, order: float) -> tuple[float, float, float]:
        """Return K, K', K'' at a real order."""
        value = slope = bend = 0.0
        for count, losses, weights in self.nodes(order):
            exponent = order * losses + np.log(weights)
            top = float(exponent.max())
            tilted = np.exp(exponent - top)
            total = float(tilted.sum())
            mean = float(tilted @ losses) / total
            value += count * (top + math.log(total))
            slope += count * mean
            bend += count * float(tilted @ (losses - mean) ** 2) / total
        return value, slope, bend

    def values(self, orders: Floats) -> Floats:
        """Return K at many real orders: the same as `at`, in a few sweeps over the nodes."""
        out = np.zeros(len(orders))
        needed = np.array([self._reach(float(order)) for order in orders])
        for reach in np.unique(needed):
            chosen = np.flatnonzero(needed == reach)
            for count, losses, weights in self.nodes(float(orders[chosen[0]])):
                logs = np.log(weights)
                for rows in np.array_split(chosen, math.ceil(len(chosen) * len(losses) / _AT_ONCE)):
                    exponent = np.multiply.outer(orders[rows], losses)
                    exponent += logs
                    top = exponent.max(axis=1)
                    exponent -= top[:, None]
                    out[rows] += count * (top + np.log(np.exp(exponent, out=exponent).sum(axis=1)))
        return out

    def of(self, pair: Pair, order: float) -> float:
        """Return log E exp(order L) of one use of a pair."""
        for (known, _), (_, losses, weights) in zip(self.parts, self.nodes(order), strict=True):
            if known is pair:
                exponent = order * losses + np.log(weights)
                top = float(exponent.max())
                return top + math.log(float(np.exp(exponent - top).sum()))
        raise KeyError(pair)

    def lines(self, order: float, step: float, count: int, rough: bool = False) -> list[np.ndarray] | None:
        """Return, for one use of each part, K(order + iu) - K(order) at u = 0, step, ..., (count - 1) step.

        None if that takes too many nodes; rough: make do with those of u = 0.
        """
        u = step * np.arange(count)
        try:
            nodes = self.nodes(order, 0.0 if rough else step * count)
        except OverflowError:
            if rough:
                raise
            return None
        out = []
        for _, losses, weights in nodes:
            exponent = order * losses + np.log(weights)
            tilted = np.exp(exponent - exponent.max())
            tilted /= tilted.sum()
            keep = tilted > 1e-19
            tilted, kept = tilted[keep], losses[keep]
            mean = float(tilted @ kept)
            if count * len(kept) < 20_000:
                values = np.exp(1j * np.outer(u, kept - mean)) @ tilted
            else:
                values = gridded(kept - mean, tilted, step, count)
            out.append(np.log(np.where(values == 0, 1e-300, values)) + 1j * u * mean)  # on lattices some vanish
        return out

    def order_for_delta(self, log_delta: float) -> float:
        """Return the order whose saddle point stands for this delta; capped where losses have a largest value."""

        def excess(log_order: float) -> float:
            order = math.exp(log_order)
            value, slope, bend = self.at(order)
            spread = 0.5 * math.log1p(2 * math.pi * bend * order * (order + 1))
            return value - order * slope - math.log1p(order) - spread - log_delta

        return self._search(excess)

    def order_for_epsilon(self, epsilon: float) -> float:
        """Return the order at which the integrand has its saddle point for this epsilon."""

        def excess(log_order: float) -> float:
            order = math.exp(log_order)
            return epsilon + 1 / order + 1 / (1 + order) - self.at(order)[1]

        return self._search(excess)

    def _search(self, function: Callable[[float], float]) -> float:
        low, high = math.log(1e-3), math.log(4.0)
        while function(high) > 0 and high < math.log(_MAX_REACH):
            low, high = high, high + 1.5
        while function(low) < 0 and low > math.log(1e-12):
            low -= 4
        for _ in range(8):
            middle = (low + high) / 2
            if function(middle) > 0:
                low = middle
            else:
                high = middle
        return math.exp((low + high) / 2)


@dataclass(frozen=True)
class Inversion:
    """K along one tilted line, ready to answer for any epsilon near its saddle point."""

    order: float
    value: float
    step: float
    u: Floats
    along: np.ndarray
    settled: bool

    def log_delta(self, epsilon: float) -> float:
        """Return log delta(epsilon); the trapezoid rule in u converges faster than any power of its step."""
        return self.sure_log_delta(epsilon)[0]

    @cached_property
    def _kernel(self) -> tuple[Floats, np.ndarray]:
        """Where the integrand matters, and its value there without its wave: half at u = 0, as the rule has it."""
        s = self.order + 1j * self.u
        kernel = np.exp(self.along) / (s * (s + 1))
        kernel[0] /= 2
        size = np.abs(kernel)
        keep = size > _UNSEEN * float(size.max())
        return self.u[keep], kernel[keep]

    def _terms(self, epsilon: float) -> np.ndarray:
        u, kernel = self._kernel
        phase = u * epsilon
        wave = np.empty(len(u), dtype=np.complex128)
        np.cos(phase, out=wave.real)
        np.sin(-phase, out=wave.imag)
        wave *= kernel
        return wave

    def sure_log_delta(self, epsilon: float) -> tuple[float, bool]:
        """Return the same, and whether digits are left after what cancels."""
        terms = self._terms(epsilon).real
        total = float(terms.sum()) * self.step / math.pi
        sure = total > 1e-11 * float(np.abs(terms).sum()) * self.step
        return self.value - self.order * epsilon + math.log(total) if total > 0 else -math.inf, sure

    def sure_log_deltas(self, places: Floats) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Return the same at many places."""
        u, kernel = self._kernel
        phase = np.multiply.outer(places, u)
        terms = np.cos(phase) * kernel.real + np.sin(phase) * kernel.imag
        total = terms.sum(axis=1) * (self.step / math.pi)
        sure = total > 1e-11 * np.abs(terms).sum(axis=1) * self.step
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.where(total > 0, np.log(total), -math.inf)
        return self.value - self.order * places + logs, sure

    def _newton(self, log_delta: float, low: float, high: float, xtol: float) -> float:
        """Return where log delta is crossed between two places: Newton's steps, halves where one leads outside."""
        here = (low + high) / 2
        for _ in range(60):
            terms = self._terms(here)
            total = float(terms.real.sum())
            excess = -math.inf
            if total > 0:
                excess = self.value - self.order * here + math.log(total * self.step / math.pi) - log_delta
            low, high = (here, high) if excess > 0 else (low, here)
            slope = float(self._kernel[0] @ terms.imag) / total - self.order if total > 0 else 0.0
            there = here - excess / slope if slope < 0 else math.nan
            if not low <= there <= high:
                there = (low + high) / 2
            if abs(there - here) <= max(xtol, 4e-16 * abs(there)) or high - low <= 4e-16 * abs(high):
                return there
            here = there
        return here

    def epsilon(
        self, log_delta: float, guess: float, spread: float, xtol: float = 0.0, most: float = math.inf
    ) -> float:
        """Return the epsilon of a delta, near the guess; most: an upper bound on it."""
        low, high = guess - spread, guess + spread
        at_low, sure = self.sure_log_delta(low)
        if not (sure and at_low >= log_delta >= self.log_delta(high)) and math.isfinite(most):
            low, high = self._located(log_delta, low, high, most)
        return self._newton(log_delta, low, high, xtol)

    def _located(self, log_delta: float, low: float, high: float, most: float) -> tuple[float, float]:
        """Return neighbours on a grid between which delta is crossed, the lower with digits left."""
        shares = np.array([-0.5, -0.2, -0.05, 0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
        grid = np.unique(np.concatenate((most * shares, np.minimum(most, np.linspace(low, high, 9))))).tolist()
        for here, there in reversed(list(pairwise(grid))):  # far below, what is left of delta may be noise
            value, sure = self.sure_log_delta(here)
            if sure and value >= log_delta > self.log_delta(there):
                return here, there
        return low, high


def discrete(pair: Pair) -> bool:
    """Say whether a pair is made of atoms alone, however wrapped."""
    inner = getattr(pair, "pair", None) or getattr(pair, "above", None)
    branches = getattr(pair, "branches", None)
    if branches is not None:
        return any(discrete(branch) for _, branch in branches)
    return discrete(inner) if inner is not None else hasattr(pair, "q")


def gridded(places: Floats, weights: Floats, step: float, count: int) -> np.ndarray:
    """Return sum(weights exp(i u places)) at u = 0, step, ... by a B-spline on a grid, an FFT and its undoing."""
    degree = 13
    size = 1 << math.ceil(math.log2(4 * count + 2 * degree))
    spot = places * (size * step / (2 * math.pi))
    first = np.floor(spot)
    t = spot - first
    base = first.astype(np.int64)
    spline = [np.ones_like(t)]
    for k in range(1, degree + 1):
        zero = np.zeros_like(t)
        here, before = [*spline, zero], [zero, *spline]
        spline = [((t + j) * here[j] + (k + 1 - t - j) * before[j]) / k for j in range(k + 1)]
    grid = np.zeros(size)
    for j, factor in enumerate(spline):
        grid += np.bincount((base - j) % size, weights * factor, size)
    phase = 2 * math.pi / size * np.arange(count)
    blur = np.sinc(phase / (2 * math.pi)) ** (degree + 1) * np.exp(-1j * phase * (degree + 1) / 2)
    return np.asarray(np.conj(np.fft.rfft(grid)[:count]) / blur, dtype=np.complex128)


def reaches(cumulants: Cumulants, order: float, log_tail: float, whole: bool = False) -> tuple[float, float]:
    """Return (low, high) losses outside which the law tilted to `order` has at most mass exp(log_tail), by Chernoff.

    Unless `whole`, shifts to the low side stay below `order`: there, the hockey stick itself is bounded.
    """
    value, slope, bend = cumulants.at(order)
    sd = math.sqrt(bend) or 1e-12
    most = 1e4 + 30 * order  # any shift bounds; where the law hardly varies, a larger one would cost memory alone
    rises = np.minimum(np.array([0.1, 0.3, 1.0, 2.0, 4.0, 7.0, 14.0, 28.0]) / sd, most)
    shifts = rises if whole else np.minimum(rises, order)
    moved = cumulants.values(np.concatenate((order - shifts, order + rises))) - value - log_tail
    low = float(np.max(-moved[: len(shifts)] / shifts))
    high = float(np.min(moved[len(shifts) :] / rises))
    return min(low, slope - 5 * sd), max(high, slope + 5 * sd)


@dataclass(frozen=True)
class Lines:
    """K of one use of each part along one tilted line, for counts from the least to the largest."""

    order: float
    step: float
    u: Floats
    single: list[np.ndarray]
    moments: list[tuple[float, float, float]]
    decays: list[Floats]  # real parts near the end of the line, of parts that have densities
    orders: Floats  # for an upper bound on epsilon: orders, and the log moments of every part there
    table: Floats
    resolved: bool  # whether there were nodes enough for such a wave

    def line(self, counts: Sequence[int]) -> Inversion:
        """Return the line for these counts."""
        along = counts[0] * self.single[0]
        for count, line in zip(counts[1:], self.single[1:], strict=True):
            along = along + count * line
        value = sum(count * moment[0] for count, moment in zip(counts, self.moments, strict=True))
        end = int(np.flatnonzero(along.real > _LOST)[-1]) + 1
        return Inversion(self.order, value, self.step, self.u[:end], along[:end], self.settled_at(counts))

    def slope(self, counts: Sequence[int]) -> float:
        """Return K' for these counts."""
        return sum(count * moment[1] for count, moment in zip(counts, self.moments, strict=True))

    def bend(self, counts: Sequence[int]) -> float:
        """Return K'' for these counts."""
        return sum(count * moment[2] for count, moment in zip(counts, self.moments, strict=True))

    def most(self, counts: Sequence[int], log_delta: float) -> float:
        """Return an upper bound on epsilon, by Chernoff."""
        return float(np.min((np.asarray(counts, dtype=float) @ self.table - log_delta) / self.orders))

    def settled_at(self, counts: Sequence[int]) -> bool:
        """Say whether the integrand has vanished where the line ends."""
        if not self.resolved:
            return False
        end = self.step * len(self.u)
        lasting = sum(count * decay for count, decay in zip(counts, self.decays, strict=True))
        spread = math.sqrt(self.bend(counts)) or 1e-9
        return float(np.max(lasting)) - 2 * math.log(end / (self.order + 1 / spread)) < _SETTLED


def invert_between(least: Cumulants, most: Cumulants, order: float, effort: int = 1 << 16) -> Lines:
    """Return K of one use along the line at `order`, as far as matters for the least of two sets of counts.

    Moments of atoms may vanish and come back (on a lattice they do, with its period), so only the decay of the parts
    that have densities counts. Its points are as close as the largest counts need.
    """
    alone = [Cumulants(((pair, 1),)) for pair, _ in least.parts]
    orders = order * np.array([4.0, 2.0, 1.4, 1.2, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.25])
    table = np.array([one.values(orders) for one in alone])
    moments = [one.at(order) for one in alone]
    _, slope, bend = most.at(order)
    low, high = reaches(most, order, -34.0)
    step = 2 * math.pi / (1.05 * max(high - slope, slope - low) + 4 * max(math.sqrt(bend), 1e-9))
    smooth = [not discrete(pair) for pair, _ in least.parts]
    if not any(smooth):
        effort = min(effort, 1 << 12)
    counts = [count for _, count in least.parts]
    size = min(effort, max(16, math.ceil(9 / max(math.sqrt(least.at(order)[2]), 1e-9) / step)))
    try:
        while any(smooth) and size < effort and not _fades(least, most, smooth, order, step * size):
            size = min(effort, 2 * size)
    except OverflowError:
        size = max(16, size // 2)
    lines: Lines | None = None
    while True:
        single, resolved = most.lines(order, step, size), True
        if single is None:  # so fast a wave takes too many nodes
            if lines is not None:
                return lines
            single, resolved = most.lines(order, step, size, rough=True), False
            assert single is not None
        decays = [
            (line.real if kind else 0 * line.real)[-(size // 5) :] for line, kind in zip(single, smooth, strict=True)
        ]
        u = np.linspace(0.0, step * (size - 1), size)
        lines = Lines(order, step, u, single, moments, decays, orders, table, resolved)
        if not resolved or lines.settled_at(counts) or size >= effort:
            return lines
        size = min(effort, size * 2)


def _fades(least: Cumulants, most: Cumulants, smooth: Sequence[bool], order: float, end: float) -> bool:
    """Say, by three points, whether the integrand has about vanished at the end of the line."""
    lasting = 0.0
    for (_, count), (_, losses, weights), kind in zip(least.parts, most.nodes(order, end), smooth, strict=True):
        exponent = order * losses + np.log(weights)
        tilted = np.exp(exponent - exponent.max())
        keep = tilted > 1e-12
        phase = np.multiply.outer(end * np.array([0.85, 0.92, 0.99]), losses[keep])
        there = np.hypot(np.cos(phase) @ tilted[keep], np.sin(phase) @ tilted[keep]) / tilted.sum()
        lasting += count * float(np.log(np.maximum(there, 1e-300)).max()) if kind else 0.0
    return lasting - 2 * math.log(end / (order + 1 / (math.sqrt(least.at(order)[2]) or 1e-9))) < _SETTLED


def invert(cumulants: Cumulants, order: float, effort: int = 1 << 16) -> Inversion:
    """Return K along the line at `order`, as far as it matters; `settled` is False if the effort did not reach."""
    return invert_between(cumulants, cumulants, order, effort).line([count for _, count in cumulants.parts])
