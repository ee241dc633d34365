"""Exact integer noise: discrete Gaussian, discrete Laplace, Poisson, Skellam and binomial vectors.

All parameters are taken as the exact rational numbers their floats are. Samples follow the stated law exactly,
given uniform bits (see `inversion` and `block`), and come from AES-256-CTR keyed by the operating system.
Noise is drawn by vectors, before it meets any data, so that the time taken tells nothing about one coordinate.
"""

from __future__ import annotations

import math
import os
from fractions import Fraction
from functools import lru_cache

import numpy as np

from privfed.privacy.block import BlockSampler, GaussianCurve, PoissonCurve
from privfed.privacy.interval import Enclosure, divide_up, exp_negative, shift_up
from privfed.privacy.inversion import Int64s, InversionSampler, Weights, outward
from privfed.privacy.keystream import Keystream, RandomBytes

MAX_STANDARD_DEVIATION = 2.0**36  # blocks stay below 2^32 and samples below 2^42
_DIGIT = 10  # bits of a digit of a discrete Laplace magnitude
_CHUNK = 1 << 16
_DIRECT = 128  # standard deviation up to which one table holds every outcome
_SKELLAM = 512  # the same where the wider law takes two draws


def positive(name: str, value: float | Fraction) -> Fraction:
    """Return a finite positive parameter as an exact rational; ValueError names it otherwise."""
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name}: must be finite and above 0, not {value}")
    return Fraction(value)


def _size(size: int) -> int:
    if size < 0:
        raise ValueError(f"size: must not be negative, not {size}")
    return size


def _symmetric(factors: tuple[Enclosure, Enclosure], bits: int) -> tuple[list[Enclosure], int]:
    """Multiply up masses of 1, 2, ... from the first ratio and the ratio of successive ratios, at `bits`.

    Returns the masses until they fall below 2^-bits and a bound on the rest.
    """
    (ratio_low, ratio_high), (bend_low, bend_high) = factors
    low = high = 1 << bits
    cells: list[Enclosure] = []
    while high > 1:
        low, high = low * ratio_low >> bits, shift_up(high * ratio_high, bits)
        cells.append((low, high))
        ratio_low, ratio_high = ratio_low * bend_low >> bits, shift_up(ratio_high * bend_high, bits)
    one = 1 << bits
    return cells, -(-one // (one - ratio_high))


def gaussian_weights(variance: Fraction, bits: int) -> Weights:
    """Enclose exp(-k^2 / (2 variance)) around 0."""
    work = bits + 32
    half = 1 / (2 * variance)
    factors = exp_negative(half, half, work), exp_negative(2 * half, 2 * half, work)
    side, rest = _symmetric(factors, work)
    one = 1 << work
    return Weights(-len(side), [*reversed(side), (one, one), *side], rest, rest)


def poisson_weights(mean: Fraction, bits: int) -> Weights:
    """Enclose mean^k / k! relative to the mode."""
    top, bottom = mean.numerator, mean.denominator
    return outward(int(mean), lambda k: (top, bottom * (k + 1)), lambda k: (k * bottom, top) if k > 0 else (0, 1), bits)


def skellam_weights(variance: Fraction, bits: int) -> Weights:
    """Enclose the masses I_k(variance) around 0, by the continued fraction of their ratios.

    r_k = I_{k+1} / I_k is 1 / (2 (k + 1) / variance + r_{k+1}), and inside (0, 1): the farther out that is put in, the
    less it matters. Ratios fall outwards.
    """
    work = bits + 32
    one = 1 << work
    reach = 16
    while _skellam_exponent(reach, float(variance)) < work * math.log(2) + math.log(reach):
        reach *= 2
    top, bottom = 2 * variance.denominator << work, variance.numerator
    ratios: list[Enclosure] = []
    low, high = 0, one
    for k in range(2 * reach, 0, -1):
        step = top * k // bottom
        low, high = (one << work) // (step + 1 + high), min(one, divide_up(one << work, step + low))
        ratios.append((low, high))
    cells: list[Enclosure] = []
    low = high = one
    while high >> 16:
        ratio_low, ratio_high = ratios.pop()
        low, high = low * ratio_low >> work, shift_up(high * ratio_high, work)
        cells.append((low, high))
    rest = divide_up(high * ratio_high, one - ratio_high)
    return Weights(-len(cells), [*reversed(cells), (one, one), *cells], rest, rest)


def _skellam_exponent(reach: int, variance: float) -> float:
    """Return the exponent of Chernoff's bound on the mass beyond `reach`."""
    return reach * math.asinh(reach / variance) - reach * reach / (math.hypot(reach, variance) + variance)


def binomial_weights(trials: int, probability: Fraction, bits: int) -> Weights:
    """Enclose C(trials, k) p^k (1-p)^(trials-k) relative to the mode."""
    top, bottom = probability.numerator, probability.denominator - probability.numerator
    mode = int((trials + 1) * probability)
    return outward(
        mode,
        lambda k: ((trials - k) * top, (k + 1) * bottom),
        lambda k: (k * bottom, (trials - k + 1) * top),
        bits,
    )


def geometric_weights(rate: Fraction, length: int | None, bits: int) -> Weights:
    """Enclose exp(-rate k) for k = 0, 1, ..., `length` of them or all; rate is at least 2^-20."""
    work = bits + 48
    ratio_low, ratio_high = exp_negative(rate, rate, work)
    one = low = high = 1 << work
    cells: list[Enclosure] = []
    while high >> 24 and (length is None or len(cells) < length):  # rounding up stalls near 1 / rate units
        cells.append((low, high))
        low, high = low * ratio_low >> work, shift_up(high * ratio_high, work)
    left_out = 0 if len(cells) == length else -(-one * high // (one - ratio_high))
    return Weights(0, cells, 0, left_out)


class LaplaceSampler:
    """Draw exactly from exp(-|k| / scale): the digits of a geometric magnitude are independent.

    A negative zero is drawn again, so that zero is not counted twice.
    """

    __slots__ = ("_digits",)

    def __init__(self, scale: Fraction) -> None:
        places = 0
        while 1 << (_DIGIT * places) < scale:
            places += 1
        self._digits = [
            self._digit(Fraction(1 << (_DIGIT * place)) / scale, place < places) for place in range(places + 1)
        ]

    def _digit(self, rate: Fraction, bounded: bool) -> InversionSampler:
        length = 1 << _DIGIT if bounded else None
        return InversionSampler(lambda bits: geometric_weights(rate, length, bits))

    def sample(self, size: int, stream: Keystream) -> Int64s:
        """Draw `size` independent outcomes."""
        out = np.empty(size, np.int64)
        done = 0
        while done < size:
            batch = self._some(min(_CHUNK, 2 * (size - done) + 16), stream)[: size - done]
            out[done : done + batch.size] = batch
            done += batch.size
        return out

    def _some(self, size: int, stream: Keystream) -> Int64s:
        magnitude = np.zeros(size, np.int64)
        for place, digit in enumerate(self._digits):
            magnitude += digit.sample(size, stream) << (_DIGIT * place)
        negative = (stream.uint8(size) & 1).astype(np.bool_)
        signed = np.where(negative, -magnitude, magnitude)
        return signed[(magnitude > 0) | ~negative]


@lru_cache(maxsize=64)
def _laplace(scale: Fraction) -> LaplaceSampler:
    return LaplaceSampler(scale)


@lru_cache(maxsize=64)
def _gaussian(variance: Fraction) -> InversionSampler | BlockSampler:
    if variance <= _DIRECT**2:
        return InversionSampler(lambda bits: gaussian_weights(variance, bits))
    return BlockSampler(GaussianCurve(variance))


@lru_cache(maxsize=64)
def _poisson(mean: Fraction) -> InversionSampler | BlockSampler:
    if mean <= _DIRECT**2:
        return InversionSampler(lambda bits: poisson_weights(mean, bits))
    return BlockSampler(PoissonCurve(mean))


@lru_cache(maxsize=64)
def _skellam(variance: Fraction) -> InversionSampler | None:
    """Return the sampler of a law that one table holds; wider ones are drawn as a difference."""
    return InversionSampler(lambda bits: skellam_weights(variance, bits)) if variance <= _SKELLAM**2 else None


@lru_cache(maxsize=64)
def _binomial(trials: int, probability: Fraction) -> InversionSampler:
    return InversionSampler(lambda bits: binomial_weights(trials, probability, bits))


def discrete_gaussian(size: int, sigma: float | Fraction, random: RandomBytes = os.urandom) -> Int64s:
    """Draw integers with mass proportional to exp(-k^2 / (2 sigma^2)) [CKS20].

    `sigma` up to 2^36; its variance is just below sigma^2. Returns int64[size].
    Raises ValueError for a sigma that is not finite, not positive or too large.
    """
    exact = positive("sigma", sigma)
    if exact > MAX_STANDARD_DEVIATION:
        raise ValueError(f"sigma: at most 2^36 lattice steps, not {float(exact):g}; choose a coarser granularity")
    return _gaussian(exact**2).sample(_size(size), Keystream(random))


def discrete_gaussian_variance(variance: Fraction, size: int, random: RandomBytes = os.urandom) -> Int64s:
    """Draw as `discrete_gaussian`, from the exact parameter sigma^2, which need not be a square."""
    if not 0 < variance <= Fraction(MAX_STANDARD_DEVIATION) ** 2:
        raise ValueError(f"variance: must be above 0 and at most 2^72 squared steps, not {float(variance):g}")
    return _gaussian(variance).sample(_size(size), Keystream(random))


def discrete_laplace(size: int, scale: float | Fraction, random: RandomBytes = os.urandom) -> Int64s:
    """Draw integers with mass proportional to exp(-|k| / scale) [CKS20]; `scale` up to 2^36. Returns int64[size]."""
    exact = positive("scale", scale)
    if exact > 2**36:
        raise ValueError(f"scale: at most 2^36 lattice steps, not {float(exact):g}; choose a coarser granularity")
    return _laplace(exact).sample(_size(size), Keystream(random))


def poisson(size: int, mean: float | Fraction, random: RandomBytes = os.urandom) -> Int64s:
    """Draw Poisson counts of that mean, up to 2^40. Returns int64[size]."""
    exact = positive("mean", mean)
    if exact > 2**40:
        raise ValueError(f"mean: at most 2^40, not {float(exact):g}; choose a coarser granularity")
    return _poisson(exact).sample(_size(size), Keystream(random))


def skellam(size: int, variance: float | Fraction, random: RandomBytes = os.urandom) -> Int64s:
    """Draw Skellam noise: the difference of two Poisson counts of mean variance / 2 [AKL21].

    Closed under sums: n vectors of variance v add up to exactly Skellam noise of variance n v.
    `variance` up to 2^41. Returns int64[size]. Raises ValueError for another variance.
    """
    half = positive("variance", variance) / 2
    if half > 2**40:
        raise ValueError(f"variance: at most 2^41, not {float(variance):g}; choose a coarser granularity")
    stream, table = Keystream(random), _skellam(2 * half)
    if table is not None:
        return table.sample(_size(size), stream)
    sampler = _poisson(half)
    out = sampler.sample(_size(size), stream)
    out -= sampler.sample(size, stream)
    return out


def binomial(size: int, trials: int, probability: float | Fraction = 0.5, random: RandomBytes = os.urandom) -> Int64s:
    """Draw binomial counts; 2 k - trials of probability 1/2 is the centred noise of cpSGD. Returns int64[size]."""
    if not 1 <= trials <= 2**24:
        raise ValueError(f"trials: must be from 1 to 2^24, not {trials}")
    if not 0 < probability < 1:
        raise ValueError(f"probability: must be inside (0, 1), not {probability}")
    return _binomial(trials, Fraction(probability)).sample(_size(size), Keystream(random))
