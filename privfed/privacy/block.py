"""Exact sampling of wide integer laws: pick a block by inversion, a point in it uniformly, and accept or redraw.

Blocks of about sigma / 16 leave the mode on both sides. A block is drawn in proportion to its largest mass (at the end
nearest the mode), so a point is accepted with the ratio of its mass to that one: about 97 in 100 are. The ratio is
compared with 32 uniform bits, four times at most: with the least ratio of the block, by those bits that one word has
left beside the point's place, which leaves 1 in 20 open; by a parabola over the block with a proved error, which leaves
1 in 1000; in floating point; and, in the rare case that rounding could matter, in integers with as many bits as it
takes. What is refused is drawn again in its place. The law of what is accepted is the target, exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from privfed.privacy.interval import Enclosure, exp_negative, log, log_factorial
from privfed.privacy.inversion import Float64s, Int64s, InversionSampler, Weights
from privfed.privacy.keystream import Keystream

# Absolute error of `loss` in floating point. Losses within a block are below 4; the terms they are the difference
# of are below 256 and carry fewer than 2^8 roundings of relative size 2^-53 each, so 2^-37 bounds the error with
# room; exp and the comparison add a few 2^-53.
_SLACK = 2.0**-36
_CHUNK = 1 << 15
_SHORT = 20  # bits of a place with which 32 random bits leave enough to accept nearly all points


class Curve(Protocol):
    """A unimodal law on the integers, by its logarithm relative to the mode."""

    @property
    def mode(self) -> int: ...

    @property
    def width(self) -> int:
        """Block width, a power of two up to 2^32."""

    def loss(self, head: Int64s, point: Int64s) -> Float64s:
        """Return ln p(head) - ln p(point), with an absolute error below 2^-37."""

    def third(self, lowest: int) -> float:
        """Bound the third derivative of ln p, continued to the reals, from the point `lowest` upwards."""

    def enclose(self, point: int, bits: int) -> tuple[Fraction, Fraction]:
        """Bound ln p(mode) - ln p(point), which is not negative, to about 2^-bits."""


def _width(sigma: float) -> int:
    return 1 << max(0, int(math.log2(sigma)) - 4)


@dataclass(frozen=True)
class GaussianCurve:
    """The discrete Gaussian of parameter `variance`."""

    variance: Fraction
    mode = 0

    @cached_property
    def width(self) -> int:
        """Block width in lattice steps."""
        return _width(math.sqrt(self.variance))

    @cached_property
    def _scale(self) -> float:
        return 0.5 / float(self.variance)

    def loss(self, head: Int64s, point: Int64s) -> Float64s:
        """Return (point - head)(point + head) / (2 variance): a product, so nothing cancels."""
        return (point - head).astype(np.float64) * (point + head) * self._scale

    def third(self, lowest: int) -> float:
        """Return 0: the logarithm is a parabola."""
        return 0.0

    def enclose(self, point: int, bits: int) -> tuple[Fraction, Fraction]:
        """Return point^2 / (2 variance), exactly."""
        value = point * point / (2 * self.variance)
        return value, value


@dataclass(frozen=True)
class PoissonCurve:
    """The Poisson law of a large `mean`."""

    mean: Fraction

    @cached_property
    def mode(self) -> int:
        """The largest integer up to the mean."""
        return int(self.mean)

    @cached_property
    def width(self) -> int:
        """Block width in lattice steps."""
        return _width(math.sqrt(self.mean))

    @cached_property
    def _terms(self) -> int:
        """Count the terms whose rest is below 2^-53 of the sum within 15 standard deviations."""
        reach = 15 / math.sqrt(self.mean)
        return next(terms for terms in range(3, 40) if 2 * reach**terms < terms**2 * 2.0**-53)

    def _log(self, point: Int64s) -> Float64s:
        """Return -ln p(point) up to a constant, by the saddle-point form of Stirling's series [Loader00]."""
        mean = float(self.mean)
        x = (point - self.mode) / mean + float(self.mode - self.mean) / mean
        # mean * ((1+x) ln(1+x) - x) = mean * x^2 * sum (-x)^n / ((n+1)(n+2)), summed where |x| is small
        terms = self._terms
        series = np.full_like(x, 1 / (terms * (terms + 1)))
        for n in range(terms - 2, -1, -1):
            series *= -x
            series += 1 / ((n + 1) * (n + 2))
        return mean * x * x * series + 0.5 * np.log1p(x) + 1 / (12.0 * point)

    def loss(self, head: Int64s, point: Int64s) -> Float64s:
        """Return ln p(head) - ln p(point)."""
        return self._log(point) - self._log(head)

    def third(self, lowest: int) -> float:
        """Bound the second derivative of digamma: the sum of 2 / (n + x)^3 is at most 1 / x^2 + 2 / x^3."""
        return 1 / lowest**2 + 2 / lowest**3 if lowest > 0 else math.inf

    def enclose(self, point: int, bits: int) -> tuple[Fraction, Fraction]:
        """Bound (point - mode) ln mean - ln(point! / mode!), negated."""
        guard = bits + abs(point - self.mode).bit_length() + 4
        log_low, log_high = log(self.mean, guard)
        steps = self.mode - point
        a, b = sorted((steps * log_low, steps * log_high))
        top, bottom = log_factorial(point, guard), log_factorial(self.mode, guard)
        unit = 1 << guard
        low, high = a + top[0] - bottom[1], b + top[1] - bottom[0]
        return Fraction(max(0, low), unit), Fraction(max(0, high), unit)


def _heads(curve: Curve, bits: int) -> Weights:
    """Enclose the mass at the head of each block, outward until it no longer counts at `bits`."""
    work = bits + 32

    def side(start: int, step: int) -> tuple[list[Enclosure], int]:
        cells: list[Enclosure] = []
        head = start
        while True:
            low, high = exp_negative(*curve.enclose(head, work + 8), work)
            if cells and high < 1 << 16:
                before = cells[-1][0]
                # A log-concave law shrinks from block to block by ever more than high / before.
                return cells, 1 + high * before // (before - high)
            cells.append((low, high))
            head += step

    right, above = side(curve.mode, curve.width)
    left, below = side(curve.mode - 1, -curve.width)
    return Weights(-len(left), [*reversed(left), *right], below, above)


class BlockSampler:
    """Draw exactly from a wide unimodal law, at about 10 ns a sample whatever its width."""

    __slots__ = ("_blocks", "_curve", "_error", "_first", "_floors", "_parabolas", "_places", "_short")

    def __init__(self, curve: Curve) -> None:
        self._curve = curve
        self._blocks = InversionSampler(lambda bits: _heads(curve, bits))
        self._first, count = self._blocks.support
        self._parabolas, self._error = self._fit(count)
        self._places = curve.width.bit_length() - 1  # bits of a point's place in its block
        self._short = self._places <= _SHORT
        # Below its block's floor a uniform number accepts every point of the block: the loss grows away from the head.
        start, slope, bend = self._parabolas
        last = curve.width - 1
        most = np.maximum(start, start + last * (slope + last * bend)) + self._error
        floors = np.floor(np.maximum(0.0, 1 - most) * 2.0 ** (32 - self._places if self._short else 32))
        # Outcomes beyond the table are possible: they are taken for the ends here, which accept nothing unseen.
        floors[[0, -1]] = 0
        self._floors: npt.NDArray[Any] = floors.astype(np.uint32 if self._short else np.uint64)

    def _fit(self, count: int) -> tuple[tuple[Float64s, Float64s, Float64s], float]:
        """Return, for each block, the loss at offset r as start + r * (slope + r * bend), and a bound on its error.

        The parabola runs through three points of the block, r = 0, half, last. Its error is a sixth of the third
        derivative times the product of the distances to them, which is at most last^3 / 15 (with half in the very
        middle: last^3 / (12 sqrt 3)); the errors of the three values count fewer than four times.
        """
        width, blocks = self._curve.width, np.arange(self._first, self._first + count)
        start = blocks * width + self._curve.mode
        last, half = width - 1, width // 2
        head = start + np.where(blocks < 0, last, 0)
        low, middle, high = (self._curve.loss(head, start + offset) for offset in (0, half, last))
        first, second = (middle - low) / half, (high - low) / last
        bend = (second - first) / (last - half)
        error = self._curve.third(int(start[0])) / 6 * last**3 / 15 + 2.0**-34
        return (low, first - bend * half, bend), error

    def sample(self, size: int, stream: Keystream) -> Int64s:
        """Draw `size` independent outcomes."""
        out = np.empty(size, np.int64)
        if size:
            refused = self._attempt(out, stream)
            out[refused] = self.sample(refused.size, stream)
        return out

    def _attempt(self, out: Int64s, stream: Keystream) -> Int64s:
        """Fill `out` with a point each, and return the places of those that are refused."""
        found = []
        for start in range(0, out.size, _CHUNK):
            left, uniform = self._points(out[start : start + _CHUNK], stream)
            found.append((start + left, uniform))
        left, uniform = (np.concatenate(parts) for parts in zip(*found, strict=True))
        far = out[left] - self._curve.mode
        accepted = self._weighed(far >> self._places, far & (self._curve.width - 1), uniform.astype(np.float64), stream)
        return left[~accepted]

    def _points(self, out: Int64s, stream: Keystream) -> tuple[Int64s, Int64s]:
        """Fill `out` with a point each; return the places of those not accepted yet, and their 32 uniform bits."""
        blocks, mask = self._blocks.places(out.size, stream), self._curve.width - 1
        words = stream.uint32(out.size) if self._short else stream.uint64(out.size)
        uniform = words >> words.dtype.type(self._places if self._short else 32)
        left = np.flatnonzero(uniform >= self._floors.take(blocks, mode="clip"))
        words &= words.dtype.type(mask)
        blocks += self._first
        blocks <<= self._places
        blocks += self._curve.mode
        np.add(blocks, words if self._short else words.view(np.int64), out=out)
        bits = uniform[left].astype(np.int64)
        if self._short:  # the bits that the point's place took
            bits = bits << self._places | (stream.uint32(left.size) & np.uint32(mask))
        return left, bits

    def _weighed(self, blocks: Int64s, offset: Int64s, uniform: Float64s, stream: Keystream) -> npt.NDArray[np.bool_]:
        """Compare uniform numbers with p(point) / p(head), by a parabola where that leaves no doubt."""
        index = blocks - self._first
        start, slope, bend = (table.take(index, mode="clip") for table in self._parabolas)
        loss = start + offset * (slope + offset * bend) + self._error
        # 1 - x <= e^-x <= 1 - x + x^2 / 2 for x >= 0; no loss is negative, and 2^-30 is room for what rounding adds.
        accepted = (uniform + 1) * 2.0**-32 <= 1 - loss
        unsure = uniform * 2.0**-32 < 1 - loss + 0.5 * loss * loss + (2 * self._error + 2.0**-30)
        unsure &= ~accepted
        beyond = (index < 0) | (index >= self._parabolas[0].size)
        left = np.flatnonzero(unsure | beyond)
        point = blocks[left] * self._curve.width + self._curve.mode + offset[left]
        accepted[left] = self._judged(blocks[left], point, uniform[left], stream)
        return accepted

    def _judged(self, blocks: Int64s, point: Int64s, uniform: Float64s, stream: Keystream) -> npt.NDArray[np.bool_]:
        """Compare uniform numbers with p(point) / p(head), in floating point where that leaves no doubt."""
        width = self._curve.width
        head = blocks * width + self._curve.mode + np.where(blocks < 0, width - 1, 0)
        ratio = np.exp(-self._curve.loss(head, point)) * 2.0**32
        accepted = uniform + 1 <= ratio * (1 - _SLACK)
        for index in np.flatnonzero(~accepted & (uniform < ratio * (1 + _SLACK))):
            accepted[index] = self._resolve(int(uniform[index]), int(head[index]), int(point[index]), stream)
        return np.asarray(accepted)

    def _resolve(self, word: int, head: int, point: int, stream: Keystream) -> bool:
        """Compare a uniform number, 32 bits of it drawn, with p(point) / p(head)."""
        bits, have = 64, 32
        while True:
            word = word << (bits - have) | stream.bits(bits - have)
            near, far = self._curve.enclose(head, bits + 8), self._curve.enclose(point, bits + 8)
            low, high = exp_negative(max(Fraction(0), far[0] - near[1]), far[1] - near[0], bits)
            if word + 1 <= low:
                return True
            if word >= high:
                return False
            bits, have = 2 * bits, bits
