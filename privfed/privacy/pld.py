"""Compose lattice pairs by one tilted FFT and read off certified bounds on delta and epsilon.

Every error term is derived and goes outwards. Relative to M^T e^(-a eps), the scale of delta at tilt a:
- masses: a relative error r of one use's tilted masses becomes (1 + r)^T - 1 of the composed ones;
- FFT: each output is a sum along a tree of log2 N butterflies, so its error is at most 8 ulp log2 N per unit of input;
  what that does to a power is known frequency by frequency. Delta is a weighted sum of the outputs, so by Parseval
  its error is at most the mean over frequencies of |error| |transform of the weights|, which falls like 1 / u^2;
- wrapping: mass outside the window is bounded by Chernoff; it can only add to what is computed inside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from privfed.privacy.lattice import Lattice
from privfed.privacy.pair import ULP, Floats

_CERTAIN = 1e-11  # relative error of the probability of what only P has
_CLEARANCE = 6.0  # in units of 1 / order: bounds are read only this far below the end of the window


@dataclass(frozen=True)
class Composition:
    """Tilted masses at losses from `start` in steps of `step`, and the error terms; see the module."""

    order: float
    log_moment: float
    start: float
    step: float
    mass: Floats
    certain: float
    slack: float
    overflow: float

    def _sums(self, reference: float) -> tuple[Floats, Floats, Floats]:
        """Return losses from well below the reference upwards, and the suffix sums of P and Q mass, in its units."""
        skipped = max(0, min(len(self.mass) - 2, int((reference - 200 / (self.order + 1) - self.start) / self.step)))
        losses = np.asarray(self.start + self.step * np.arange(skipped, len(self.mass)), dtype=np.float64)
        away = losses - reference
        weight = self.mass[skipped:] * np.exp(np.maximum(-self.order * away, -700.0))
        other = weight * np.exp(np.maximum(-away, -700.0))
        return losses, np.cumsum(weight[::-1])[::-1], np.cumsum(other[::-1])[::-1]

    def _adding(self, sums: Floats) -> Floats:
        """Bound the rounding of sums of about 1 / (step * order) terms that matter."""
        return 4 * ULP * (16 + 40 / (self.step * self.order)) * np.abs(sums)

    def delta(self, epsilon: float, upper: bool) -> float:
        """Return a bound on delta(epsilon); see `epsilon`."""
        losses, p, q = self._sums(epsilon)
        k = int(np.searchsorted(losses, epsilon, side="right"))
        if losses[-1] - epsilon < _CLEARANCE / self.order or epsilon < losses[0]:
            return 1.0 if upper else 0.0
        main = float(p[k] - q[k])
        sign = 1 if upper else -1
        scale = math.exp(min(700.0, self.log_moment - self.order * epsilon))
        slack = (self.slack + (self.overflow if upper else 0.0)) * math.exp(self.order * self.step) + float(
            self._adding(p[k : k + 1])[0]
        )
        value = scale * (max(0.0, main) + sign * slack)
        return min(1.0, max(0.0, value + self.certain * (1 + sign * _CERTAIN)))

    def epsilon(self, log_delta: float, guess: float, upper: bool) -> float:
        """Return a certified bound on the epsilon at which the composition has this delta.

        At every lattice point the bound on delta is known; between two it is linear in exp(epsilon).
        """
        losses, p, q = self._sums(guess)
        room = math.exp(log_delta) - self.certain * (1 + (_CERTAIN if upper else -_CERTAIN))
        if room <= 0:
            return math.inf
        target = math.exp(min(700.0, math.log(room) - self.log_moment + self.order * guess))
        growth = np.exp(np.clip(losses - guess, -700, 600))
        main = np.maximum(p - growth * q, 0.0)
        slack = self.slack + (self.overflow if upper else 0.0)
        with np.errstate(over="ignore"):
            outward = slack * np.exp(np.clip(-self.order * (losses - guess), -700, 600)) + self._adding(p)
        value = main + outward if upper else main - outward
        value[losses > losses[-1] - _CLEARANCE / self.order] = math.inf if upper else -math.inf
        if upper:
            inside = losses <= losses[-1] - _CLEARANCE / self.order
            met = np.flatnonzero((value <= target) & inside)
            if not len(met):
                return math.inf
            over = np.flatnonzero((value > target) & inside)
            k = int(over[-1]) + 1 if len(over) else 0
            if k >= len(losses) or not inside[k]:
                return math.inf
            rest = target - (float(outward[k - 1]) if k else math.inf)
        else:
            over = np.flatnonzero(value >= target)
            if not len(over):
                return -math.inf
            k = min(int(over[-1]) + 1, len(losses) - 1)
            rest = target + float(outward[k - 1])
        if k == 0 or q[k] <= 0:
            return float(losses[k])
        ratio = (float(p[k]) - rest) / float(q[k])
        found = guess + math.log(ratio) if ratio > 0 else float(losses[k - 1])
        if upper and rest <= 0:
            found = float(losses[k])
        return min(max(found, float(losses[k - 1])), float(losses[k]))


def log_moment(lattice: Lattice, step: float, order: float) -> float:
    """Return log of the order's moment of the finite losses."""
    keep = lattice.mass > 0
    exponent = order * (lattice.offset + step * lattice.index[keep]) + np.log(lattice.mass[keep])
    top = float(exponent.max())
    return top + math.log(float(np.exp(exponent - top).sum()))


def compose(
    parts: Sequence[tuple[Lattice, int]], step: float, order: float, window: tuple[float, float]
) -> Composition:
    """Compose lattices, each count times, around the window of losses where the tilted sum has its mass."""
    size = 1 << max(6, math.ceil(math.log2((window[1] - window[0]) / step + 2)))
    offset = sum(count * lattice.offset for lattice, count in parts)
    first = math.floor(((window[0] + window[1]) / 2 - offset) / step) - size // 2
    total = 0.0
    spectrum = np.ones(size // 2 + 1, dtype=np.complex128)
    log_mass = 0.0
    growth = survive = 0.0
    bits = math.log2(size)
    per_use = 8 * ULP * bits
    moved = np.zeros(size // 2 + 1)
    for lattice, count in parts:
        moment = log_moment(lattice, step, order)
        keep = lattice.mass > 0
        tilted = np.exp(order * (lattice.offset + step * lattice.index[keep]) + np.log(lattice.mass[keep]) - moment)
        grid = np.bincount(lattice.index[keep] % size, tilted, size)
        once = np.fft.rfft(grid)
        spectrum *= once**count
        moved += count * per_use / np.maximum(np.abs(once), per_use)
        total += count
        log_mass += count * moment
        growth += count * math.log1p(lattice.error)
        survive += count * math.log1p(-lattice.certain)
    power = np.abs(spectrum)
    wrong = power * np.expm1(np.minimum(moved + 16 * ULP * (total + 2), 30.0))
    turn = np.exp(-2j * math.pi / size * np.arange(size // 2 + 1))
    near, far = math.exp(-order * step), math.exp(-(order + 1) * step)
    first_pole = np.abs(1 - near * turn)
    response = (near - far) / (first_pole * np.abs(1 - far * turn)) + 2 * math.exp(-_CLEARANCE) / first_pole
    spots = min(float(size), 1 + 1 / (step * order * (order + 1)))
    fft_error = 1.01 * float(np.mean(wrong * response)) + 1.01 * per_use * float(np.mean(power)) * spots
    mass = np.roll(np.fft.irfft(spectrum, size), -(first % size))
    outside = _outside(parts, step, order, log_mass, offset + first * step, offset + (first + size) * step)
    slack = fft_error + math.expm1(growth)
    return Composition(
        order, log_mass, offset + first * step, step, mass, -math.expm1(survive), slack + outside, outside
    )


def _outside(
    parts: Sequence[tuple[Lattice, int]], step: float, order: float, log_mass: float, first: float, last: float
) -> float:
    """Bound, by Chernoff, the tilted mass outside the window."""
    bounds = [math.inf, math.inf]
    sd = 0.0
    for lattice, count in parts:
        keep = lattice.mass > 0
        index = lattice.index[keep]
        exponent = order * (lattice.offset + step * index) + np.log(lattice.mass[keep])
        tilted = np.exp(exponent - log_moment(lattice, step, order))
        mean = float(tilted @ index) / float(tilted.sum())
        sd += count * float(tilted @ (index - mean) ** 2) * step * step
    sd = math.sqrt(sd) or step
    for factor in (0.1, 0.3, 1.0, 2.0, 4.0, 7.0):
        for side, shift, edge in ((0, -factor / sd, first), (1, factor / sd, last)):
            moment = sum(count * log_moment(lattice, step, order + shift) for lattice, count in parts)
            bounds[side] = min(bounds[side], moment - log_mass - shift * edge)
    return math.exp(min(bounds[0], 700.0)) + math.exp(min(bounds[1], 700.0))
