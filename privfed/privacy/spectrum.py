"""Compose lattice pairs in the Fourier domain and read certified bounds on delta and epsilon for any counts nearby.

At a lattice point e, the tilted sum over losses l >= e of m(l) (e^(-a (l - e)) - e^(-(a + 1) (l - e))) is, on a circle
of N points, a sum over frequencies of the product of the transforms, each to the power of its count, times the
transform of the weights. Few frequencies matter, because a power falls fast; so one transform of each lattice
answers for every count in a range at the price of a short sum. Every error term is derived and goes outwards, in
units of M^T e^(-a e), the scale of delta at tilt a:
- masses: a relative error r of one use's tilted masses becomes (1 + r)^T - 1 of the composed ones, and no weight is
  larger than a^a / (a + 1)^(a + 1);
- FFT: each output is a sum along a tree of log2 N butterflies; one multiplies by a rounded root of unity and adds, at
  an error below 2.5 ulp (4 are charged), so an output's is at most 4 ulp log2 N per unit of input. What that does to
  a power is known frequency by frequency, and weighs in with the transform of the weights. A power is taken through
  the logarithm, whose argument, below pi, is known to an ulp: less than 8 ulp per use;
- frequencies left out: the sum of their absolute values at the least counts, since no transform exceeds 1;
- wrapping: a mass beyond the circle can only add to the sum. How much is bounded by Chernoff at the counts asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from privfed.privacy.lattice import Lattice
from privfed.privacy.pair import ULP, Floats

_CERTAIN = 1e-11  # relative error of the probability of what only P has
_REST = 1e-13  # of the absolute sum may lie in frequencies that are left out
_DIRECT = 1 / 24  # beyond this share of all frequencies one inverse FFT is cheaper than a few direct sums
_FADING = 30.0  # nats that the weights have fallen by where the circle closes
_FAINT = -60.0  # nats; what has fallen this far is left out without a look at its weight
_SHIFTS = (0.1, 0.3, 1.0, 2.0, 4.0, 7.0, 14.0, 28.0)  # of the tilt, in standard deviations, for Chernoff's bounds


def circle(width: float, step: float) -> int:
    """Return the least 2^n or 3 * 2^n points whose length is at least `width`."""
    need = max(64.0, width / step + 2)
    size = 1 << math.ceil(math.log2(need))
    return size * 3 // 4 if size * 3 // 4 >= need else size


def log_moment(lattice: Lattice, step: float, order: float) -> float:
    """Return log of the order's moment of the finite losses."""
    keep = lattice.mass > 0
    exponent = order * (lattice.offset + step * lattice.index[keep]) + np.log(lattice.mass[keep])
    top = float(exponent.max())
    return top + math.log(float(np.exp(exponent - top).sum()))


def _circle_of(size: int, frequency: npt.NDArray[np.int64]) -> tuple[Floats, Floats, np.ndarray]:
    """Return real and imaginary part of 1 - z, and z, at these frequencies of a circle of this size."""
    angle = math.pi / size * frequency
    sine, cosine = np.sin(angle), np.cos(angle)
    rise, slip = 2 * sine * sine, -2 * sine * cosine
    return rise, slip, 1 - rise - 1j * slip


class Spectrum:
    """The transforms of some lattices of one step, for counts from `least` to `most`, tilted to `order`."""

    def __init__(
        self,
        lattices: Sequence[Lattice],
        least: Sequence[int],
        most: Sequence[int],
        step: float,
        order: float,
        width: float,
    ) -> None:
        self.order, self.step, self.size = order, step, circle(width, step)
        self._offsets = [lattice.offset for lattice in lattices]
        self._moments = [log_moment(lattice, step, order) for lattice in lattices]
        self._certain = [math.log1p(-lattice.certain) for lattice in lattices]
        self._prepare_tails(lattices, most)
        once = [self._transform(lattice, moment) for lattice, moment in zip(lattices, self._moments, strict=True)]
        self._select(once, least, most)
        growth = sum(count * math.log1p(lattice.error) for lattice, count in zip(lattices, most, strict=True))
        self._heaviest = (order / (order + 1)) ** order / (order + 1)
        self._slack += self._heaviest * math.expm1(min(growth, 700.0))

    def _tilted(self, lattice: Lattice, moment: float) -> tuple[npt.NDArray[np.int64], Floats]:
        keep = lattice.mass > 0
        index = lattice.index[keep]
        return index, np.exp(self.order * (lattice.offset + self.step * index) + np.log(lattice.mass[keep]) - moment)

    def _transform(self, lattice: Lattice, moment: float) -> np.ndarray:
        index, tilted = self._tilted(lattice, moment)
        return np.asarray(np.fft.rfft(np.bincount(index % self.size, tilted, self.size)), dtype=np.complex128)

    def _weights(self, frequency: npt.NDArray[np.int64]) -> np.ndarray:
        """Return the transform of e^(-a d) - e^(-(a + 1) d), over the size; inner frequencies stand for two.

        With z = e^(2 i angle), 1 / (1 - a z) is the conjugate of 1 - a z over its square, and 1 - a z is written
        (1 - a) + a (1 - z), so that nothing cancels.
        """
        rise, slip, turned = _circle_of(self.size, frequency)
        near, far = math.exp(-self.order * self.step), math.exp(-(self.order + 1) * self.step)
        parts = []
        for a, gap in ((near, -math.expm1(-self.order * self.step)), (far, -math.expm1(-(self.order + 1) * self.step))):
            square = gap * gap + (2 * a) * rise  # |1 - a z|^2, as |1 - z|^2 is 2 rise
            out = np.empty(len(rise), dtype=np.complex128)
            np.divide(gap + a * rise, square, out=out.real)
            np.divide((-a) * slip, square, out=out.imag)
            parts.append(out)
        first, second = parts
        out = first * second
        out *= turned
        out *= -near * math.expm1(-self.step)
        for once, rest in ((first, -(near**self.size)), (second, far**self.size)):
            if abs(rest) > 0:
                once *= rest
                out += once
        out *= 2 / self.size
        out[(frequency == 0) | (2 * frequency == self.size)] /= 2
        return out

    def _select(self, once: list[np.ndarray], least: Sequence[int], most: Sequence[int]) -> None:
        """Keep the frequencies that matter, and bound the error of what is kept and the size of what is not."""
        per_use = 4 * ULP * math.log2(self.size)
        fall, moved = np.zeros(len(once[0])), np.zeros(len(once[0]))
        for values, low, high in zip(once, least, most, strict=True):
            square = values.real * values.real
            square += values.imag * values.imag
            np.maximum(square, per_use * per_use, out=square)
            fall += (low / 2) * np.minimum(np.log(square), 0.0)
            moved += (high * per_use) / np.sqrt(square)
        moved += 8 * ULP * (sum(most) + 4)
        near = fall > _FAINT
        near[0] = True
        if near.sum() > _DIRECT * len(fall):
            near[:] = True
        frequency = np.flatnonzero(near)
        weights = self._weights(frequency)
        part = np.exp(fall[near]) * np.abs(weights)
        wrong = part * np.expm1(np.minimum(moved[near], 30.0))
        total = float(part.sum())
        rest = 0.0
        if len(frequency) < len(
            fall
        ):  # no weight is larger than twice that of frequency 0, as all are sums of its terms
            fall += moved
            fall[near] = -math.inf
            rest = 2.1 * float(abs(weights[0])) * len(fall) * math.exp(min(0.0, float(fall.max())))
        keep = part > _REST * total / len(fall)
        keep[0] = True
        rest += float((part + wrong)[~keep].sum())
        self._slack = 1.01 * (float(wrong[keep].sum()) + rest) + 4 * per_use * (total + rest)
        self._whole = bool(keep.sum() > _DIRECT * len(fall))
        if self._whole:  # then all are near
            keep[:] = True
        self._frequency, self._kept_weights = frequency[keep], weights[keep]
        kept = [values[self._frequency] for values in once]
        self._logs = [np.log(np.where(values == 0, 1e-300, values)) for values in kept]

    def _prepare_tails(self, lattices: Sequence[Lattice], most: Sequence[int]) -> None:
        variance = 0.0
        for lattice, moment, count in zip(lattices, self._moments, most, strict=True):
            index, tilted = self._tilted(lattice, moment)
            mean = float(tilted @ index) / float(tilted.sum())
            variance += count * float(tilted @ (index - mean) ** 2) * self.step**2
        sd = math.sqrt(variance) or self.step
        shifts = np.array([factor / sd for factor in _SHIFTS])
        self._shifts = np.concatenate((-shifts, shifts))
        self._rises = np.array(
            [
                [log_moment(lattice, self.step, self.order + shift) - moment for shift in self._shifts]
                for lattice, moment in zip(lattices, self._moments, strict=True)
            ]
        )

    def at(self, counts: Sequence[int]) -> Composed:
        """Return the composition with these counts."""
        return Composed(self, counts)


class Composed:
    """One composition of a spectrum's lattices, asked for bounds."""

    def __init__(self, spectrum: Spectrum, counts: Sequence[int]) -> None:
        self._of = spectrum
        self._offset = sum(count * offset for count, offset in zip(counts, spectrum._offsets, strict=True))
        self._moment = sum(count * moment for count, moment in zip(counts, spectrum._moments, strict=True))
        survive = sum(count * log for count, log in zip(counts, spectrum._certain, strict=True))
        self.certain = -math.expm1(survive)
        exponent = counts[0] * spectrum._logs[0]
        for count, logs in zip(counts[1:], spectrum._logs[1:], strict=True):
            exponent = exponent + count * logs
        self._terms = np.exp(exponent) * spectrum._kept_weights
        self._rises = np.asarray(counts, dtype=float) @ spectrum._rises
        self._all: Floats | None = None
        if spectrum._whole:
            self._terms[1:-1] *= spectrum.size / 2
            self._terms[0] *= spectrum.size
            self._terms[-1] *= spectrum.size
            self._all = np.fft.irfft(self._terms, spectrum.size)

    def _sum(self, place: int) -> float:
        """Return the weighted sum of masses from lattice point `place` upwards."""
        if self._all is not None:
            return float(self._all[place % self._of.size])
        phase = self._of._frequency * (place % self._of.size) % self._of.size * (2 * math.pi / self._of.size)
        return float(self._terms.real @ np.cos(phase) - self._terms.imag @ np.sin(phase))

    def _wrapped(self, loss: float) -> float:
        """Bound by Chernoff what masses beyond the circle add: above it, and so far below that weights come round."""
        width = self._of.size * self._of.step
        fade = min(_FADING / self._of.order, 0.95 * width)
        half = len(_SHIFTS)
        below = self._rises[:half] - self._of._shifts[:half] * (loss - width + fade)
        above = self._rises[half:] - self._of._shifts[half:] * (loss + width)
        logs = (float(below.min()), float(above.min()), -self._of.order * fade)
        return float(self._of._heaviest * sum(math.exp(min(0.0, log)) for log in logs[:2]) + math.exp(logs[2]))

    def _log(self, place: int, upper: bool) -> float:
        """Return the log of a bound on the delta of the finite losses at a lattice point."""
        loss = self._offset + self._of.step * place
        value = self._sum(place)
        value += self._of._slack if upper else -(self._of._slack + self._wrapped(loss))
        value = min(value, 1.0)
        return math.log(value) + self._moment - self._of.order * loss if value > 0 else -math.inf

    def delta(self, epsilon: float, upper: bool) -> float:
        """Return a bound on delta(epsilon): known at lattice points, and linear in exp(epsilon) between two."""
        place = math.floor((epsilon - self._offset) / self._of.step)
        share = math.expm1(epsilon - self._offset - place * self._of.step) / math.expm1(self._of.step)
        share = min(max(share, 0.0), 1.0)
        low, high = (math.exp(min(0.0, self._log(place + k, upper))) for k in (0, 1))
        value = (1 - share) * low + share * high
        room = 8 * ULP * (2 + abs(epsilon)) * (1 + self._of.order)
        value *= 1 + room if upper else 1 - room
        return min(1.0, value + self.certain * (1 + (_CERTAIN if upper else -_CERTAIN)))

    def epsilon(self, log_delta: float, guess: float, upper: bool) -> float:
        """Return a bound on the epsilon at which the composition has this delta, sought from the guess on."""
        room = math.exp(log_delta) - self.certain * (1 + (_CERTAIN if upper else -_CERTAIN))
        if room <= 0:
            return math.inf
        target = math.log(room) if self.certain else log_delta
        found = self._crossing(target, guess, upper)
        if found is None:
            return math.inf if upper else -math.inf
        place, here, there = found
        share = -math.expm1(target - here) / -math.expm1(there - here) if here > there else 1.0
        share = min(max(share, 0.0), 1.0)
        value = self._offset + self._of.step * place + math.log1p(share * math.expm1(self._of.step))
        return value + (1 if upper else -1) * 8 * ULP * (1e-3 + abs(value))

    def _crossing(self, target: float, guess: float, upper: bool) -> tuple[int, float, float] | None:
        """Return a place whose bound is at least the target, the next one's being less, and the logs of both."""
        slope = -self._of.order * self._of.step
        at = round((guess - self._offset) / self._of.step)
        low: tuple[int, float] | None = None  # bound above the target
        high: tuple[int, float] | None = None
        leap = 4
        for _ in range(80):
            value = self._log(at, upper)
            if value >= target:
                low = (at, value)
            else:
                high = (at, value)
            if low is not None and high is not None:
                gap = high[0] - low[0]
                if gap == 1:
                    return low[0], low[1], high[1]
                if gap < 1:
                    return None
                share = (low[1] - target) / (low[1] - high[1]) if math.isfinite(high[1]) else 0.5
                move = round(share * gap)
                if leap > 64:
                    move = gap // 2
                at = low[0] + min(max(move, 1), gap - 1)
                leap += 6
            else:
                away = (value - target) / -slope if math.isfinite(value) else -leap
                move = max(1, round(abs(away) * 1.02 + 1))
                at += move if away >= 0 else -move
                leap *= 2
                if abs(at * self._of.step + self._offset - guess) > self._of.size * self._of.step:
                    return None
        return None
