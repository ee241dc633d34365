"""Log moments of composed losses, where to tilt, and the estimate: Laplace inversion along a tilted line.

delta(eps) = e^(K(a) - a eps) / pi * integral over u > 0 of Re[e^(K(a + iu) - K(a) - iu eps) / ((a + iu)(a + 1 + iu))]
for every a > 0, with K(s) = sum of counts * log E_P e^(s L). A shift of the line near the saddle makes every error
relative to delta, however small delta is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from privfed.privacy.closed_form import root
from privfed.privacy.pair import Floats, Pair

Part = tuple[Pair, int]
_MAX_REACH = 2.0**14  # beyond it, what decides is the largest loss itself


@dataclass
class Cumulants:
    """K and its derivatives for one direction of a composition; nodes are kept between queries."""

    parts: Sequence[Part]
    reach: float = 0.0
    wave: float = 0.0
    _nodes: list[tuple[float, Floats, Floats]] = field(default_factory=list)

    def extend(self, reach: float, wave: float = 0.0) -> None:
        """Make nodes that integrate exp(s L) up to Re s = reach, |Im s| = wave."""
        if reach > self.reach or wave > self.wave:
            self.reach, self.wave = max(reach, 16.0, self.reach), max(wave, self.wave)
            self._nodes = []
            for pair, count in self.parts:
                losses, weights = pair.nodes(self.reach, self.wave)
                keep = weights > 0
                self._nodes.append((float(count), losses[keep], weights[keep]))

    @property
    def smooth(self) -> Cumulants:
        """Return those of the parts that are not made of atoms alone; itself if no part is."""
        kept = [part for part in self.parts if not _discrete(part[0])]
        return self if len(kept) == len(self.parts) else Cumulants(kept)

    @property
    def size(self) -> int:
        """Number of nodes."""
        return sum(len(losses) for _, losses, _ in self._nodes)

    def at(self, order: float) -> tuple[float, float, float]:
        """Return K, K', K'' at a real order."""
        self.extend(order * 1.5 + 1)
        value = slope = bend = 0.0
        for count, losses, weights in self._nodes:
            exponent = order * losses + np.log(weights)
            top = float(exponent.max())
            tilted = np.exp(exponent - top)
            total = float(tilted.sum())
            mean = float(tilted @ losses) / total
            value += count * (top + math.log(total))
            slope += count * mean
            bend += count * float(tilted @ (losses - mean) ** 2) / total
        return value, slope, bend

    def of(self, pair: Pair, order: float) -> float:
        """Return log E exp(order L) of one use of a pair."""
        self.extend(order * 1.5 + 1)
        for (known, _), (_, losses, weights) in zip(self.parts, self._nodes, strict=True):
            if known is pair:
                exponent = order * losses + np.log(weights)
                top = float(exponent.max())
                return top + math.log(float(np.exp(exponent - top).sum()))
        raise KeyError(pair)

    def along(self, order: float, step: float, count: int) -> np.ndarray:
        """Return K(order + iu) - K(order) at u = 0, step, ..., (count - 1) step."""
        self.extend(order * 1.5 + 1, step * count)
        u = step * np.arange(count)
        out = np.zeros(count, dtype=np.complex128)
        for times, losses, weights in self._nodes:
            exponent = order * losses + np.log(weights)
            tilted = np.exp(exponent - exponent.max())
            tilted /= tilted.sum()
            keep = tilted > 1e-19
            tilted, kept = tilted[keep], losses[keep]
            mean = float(tilted @ kept)
            if count * len(kept) < 300_000:
                values = np.exp(1j * np.outer(u, kept - mean)) @ tilted
            else:
                values = gridded(kept - mean, tilted, step, count)
            with np.errstate(divide="ignore"):
                out += times * (np.log(values) + 1j * u * mean)
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
        s = self.order + 1j * self.u
        terms = (np.exp(self.along - 1j * self.u * epsilon) / (s * (s + 1))).real
        total = float(terms.sum() - terms[0] / 2) * self.step / math.pi
        return self.value - self.order * epsilon + math.log(total) if total > 0 else -math.inf

    def epsilon(self, log_delta: float, guess: float, spread: float, xtol: float = 0.0) -> float:
        """Return the epsilon of a delta, near the guess."""
        return root(lambda epsilon: self.log_delta(epsilon) - log_delta, guess - spread, guess + spread, xtol)


def _discrete(pair: Pair) -> bool:
    """Say whether a pair is made of atoms alone, however wrapped."""
    inner = getattr(pair, "pair", None) or getattr(pair, "above", None)
    branches = getattr(pair, "branches", None)
    if branches is not None:
        return any(_discrete(branch) for _, branch in branches)
    return _discrete(inner) if inner is not None else hasattr(pair, "q")


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
    low, high = -math.inf, math.inf
    for factor in (0.1, 0.3, 1.0, 2.0, 4.0, 7.0, 14.0, 28.0):
        shift = factor / sd if whole else min(order, factor / sd)
        below = cumulants.at(order - shift)[0] - value
        above = cumulants.at(order + factor / sd)[0] - value
        low = max(low, -(below - log_tail) / shift)
        high = min(high, (above - log_tail) * sd / factor)
    return min(low, slope - 5 * sd), max(high, slope + 5 * sd)


def invert(cumulants: Cumulants, order: float, effort: int = 1 << 16) -> Inversion:
    """Return K along the line at `order`, as far as it matters; `settled` is False if the effort did not reach.

    Moments of atoms may vanish and come back (on a lattice they do, with its period), so only the decay of the parts
    that have densities counts.
    """
    value, slope, bend = cumulants.at(order)
    smooth = cumulants.smooth
    sd = max(math.sqrt(bend), 1e-9)
    low, high = reaches(cumulants, order, -34.0)
    step = 2 * math.pi / (1.05 * max(high - slope, slope - low) + 4 * sd)
    if not smooth.parts:
        effort = min(effort, 1 << 12)
    count = min(effort, max(16, math.ceil(9 / sd / step)))
    while True:
        along = cumulants.along(order, step, count)
        end = step * count
        lasting = along if smooth is cumulants else smooth.along(order, step, count)
        decay = float(lasting[-(count // 5) :].real.max()) - 2 * math.log(end / (order + 1 / sd))
        settled = decay < -26
        if settled or count >= effort:
            break
        count = min(effort, count * 2)
    return Inversion(order, value, step, np.linspace(0.0, step * (count - 1), count), along, settled)
