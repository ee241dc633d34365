"""Noise that protects a released vector: quantise to a lattice, then integer sensitivity, then integer noise.

Floating-point noise leaks through its low bits; here the value is rounded to a power-of-two lattice before anything
random happens, the rounding is part of the sensitivity, and the noise is an exact integer sample.

Why a discrete Gaussian may be accounted as a Gaussian [Peikert10]: round a continuous Gaussian of variance t^2 around
an integer vector, coordinate by coordinate, to k with mass proportional to exp(-(k - x)^2 / (2 s^2)). That is
post-processing of the Gaussian mechanism of standard deviation t. By Poisson summation the normalising sum over k is
s sqrt(2 pi) (1 +- e) for every x, with e = 2.01 exp(-2 pi^2 s^2), so the result's mass is within a factor
(1 + e)/(1 - e) per coordinate of the discrete Gaussian of variance t^2 + s^2. With s^2 = 16, d coordinates and T
releases differ by a factor exp(+- 2.1 d T e) < 1 + 10^-110 for d T <= 10^24: far inside the accountant's own slack.
So adding 16 to the variance pays for the lattice, in any dimension, under sampling and composition alike.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from privfed.privacy.events import Gaussian
from privfed.privacy.inversion import Int64s
from privfed.privacy.keystream import RandomBytes
from privfed.privacy.noise import MAX_STANDARD_DEVIATION, discrete_gaussian_variance

Float64s = npt.NDArray[np.float64]

ROUNDING_VARIANCE = 16  # s^2 above, in squared lattice steps
_RESOLUTION = 2.0**-16  # default share of the sensitivity that rounding may add
_MAX_STEPS = 2.0**62


def nearby(value: float) -> float:
    """Return the next larger float: an upper bound on a correctly rounded sum, product or root."""
    return math.nextafter(value, math.inf)


def _checked(values: npt.ArrayLike) -> Float64s:
    array = np.asarray(values, np.float64)
    if array.ndim != 1:
        raise ValueError(f"values: must be one-dimensional, not of shape {array.shape}; flatten the update first")
    if not np.isfinite(array).all():
        raise ValueError("values: contain NaN or infinity; check updates where they arrive, before they are summed")
    return array


def default_granularity(sensitivity: float, dimension: int) -> float:
    """Return the power of two at which rounding adds at most 2^-16 of the sensitivity."""
    step = sensitivity * _RESOLUTION / math.sqrt(max(dimension, 1))
    return 2.0 ** math.floor(math.log2(step))


@dataclass(frozen=True, slots=True)
class Lattice:
    """Hold the step of a power-of-two lattice; converting to and from it is exact up to the stated rounding."""

    granularity: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.granularity) and self.granularity > 0):
            raise ValueError(f"granularity: must be finite and above 0, not {self.granularity}")
        if math.frexp(self.granularity)[0] != 0.5 or not 2.0**-900 <= self.granularity <= 2.0**900:
            raise ValueError(f"granularity: must be a power of two from 2^-900 to 2^900, not {self.granularity}")

    def quantise(self, values: npt.ArrayLike) -> Int64s:
        """Round float64[d] to the nearest lattice steps, ties to even. Returns int64[d].

        Raises ValueError for NaN, infinity, or values of 2^62 steps and more.
        """
        with np.errstate(over="ignore", under="ignore"):  # too large is refused below, too small rounds to zero
            steps = _checked(values) / self.granularity
        if steps.size and np.abs(steps).max() >= _MAX_STEPS:
            raise ValueError(
                f"values: up to {np.abs(steps).max() * self.granularity:g} do not fit 62 bits of granularity "
                f"{self.granularity:g}; clip the values or choose a coarser granularity"
            )
        return np.rint(steps).astype(np.int64)

    def restore(self, steps: Int64s) -> Float64s:
        """Return the float64[d] that integer steps stand for (rounded to 53 bits: post-processing)."""
        return steps.astype(np.float64) * self.granularity

    def sensitivity(self, bound: float, dimension: int, roundings: int = 2) -> float:
        """Bound in steps how far a quantised vector moves when the vector moves by `bound` (L2).

        Each rounding moves a vector by at most sqrt(d) / 2 steps: two when a sum is rounded once (before and after
        the change), one when every contribution was rounded by itself.
        """
        return nearby(nearby(bound / self.granularity) + nearby(nearby(math.sqrt(dimension)) * roundings / 2))


def gaussian_variance(noise_multiplier: float, steps: float) -> Fraction:
    """Return the discrete Gaussian's variance that is worth `Gaussian(noise_multiplier)` at that sensitivity."""
    variance = (Fraction(noise_multiplier) * Fraction(steps)) ** 2 + ROUNDING_VARIANCE
    if variance > Fraction(MAX_STANDARD_DEVIATION) ** 2:
        raise ValueError(
            f"granularity: noise of {math.sqrt(variance):g} steps is more than 2^36; choose a coarser granularity"
        )
    return variance


def _parameters(sensitivity: float, noise_multiplier: float) -> None:
    if not (math.isfinite(sensitivity) and sensitivity > 0):
        raise ValueError(f"sensitivity: must be finite and above 0, not {sensitivity}")
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise ValueError(f"noise_multiplier: must be finite and not negative, not {noise_multiplier}")


def add_discrete_gaussian(
    values: npt.ArrayLike,
    *,
    sensitivity: float,
    noise_multiplier: float,
    granularity: float | None = None,
    rounding_error: float = 0.0,
    random: RandomBytes = os.urandom,
) -> tuple[Float64s, Gaussian]:
    """Release float64[d] values with discrete Gaussian noise; return them and the event to charge beforehand.

    `sensitivity` is the L2 bound C on one unit's contribution to `values`; the noise has at least the standard
    deviation noise_multiplier * C, and the event is `Gaussian(noise_multiplier)` under every relation; a server that
    calls this charges `Central(event)`, since its noise hides nothing from itself.
    `granularity` is the lattice step, a power of two (default: rounding adds at most 2^-16 to C).
    `rounding_error` bounds (L2) how far `values` may be from the exact sum because floats were added up; sum with
    `LatticeSum` to have none. Raises ValueError naming what is out of range; NaN is never noised over.

    Guarantees: for vectors that differ by at most C, the releases are as indistinguishable as the event says [CKS20].
    """
    _parameters(sensitivity, noise_multiplier)
    if not (math.isfinite(rounding_error) and rounding_error >= 0):
        raise ValueError(f"rounding_error: must be finite and not negative, not {rounding_error}")
    array = _checked(values)
    lattice = Lattice(default_granularity(sensitivity, array.size) if granularity is None else granularity)
    steps = lattice.quantise(array)
    moved = lattice.sensitivity(nearby(sensitivity + nearby(2 * rounding_error)), array.size)
    if noise_multiplier > 0:
        steps += discrete_gaussian_variance(gaussian_variance(noise_multiplier, moved), array.size, random)
    return lattice.restore(steps), Gaussian(noise_multiplier=noise_multiplier)


class LatticeSum:
    """Add up contributions in integers, so that order, blocking and float rounding change nothing.

    Each contribution of norm at most `sensitivity` is rounded by itself, so it moves the sum by at most
    sensitivity / granularity + sqrt(d) / 2 steps. Norms are checked, with room for float rounding.
    """

    def __init__(self, dimension: int, *, sensitivity: float, granularity: float | None = None) -> None:
        _parameters(sensitivity, 0.0)
        if dimension < 1:
            raise ValueError(f"dimension: must be at least 1, not {dimension}")
        self._bound = sensitivity * (1 + 2.0**-20)
        self._lattice = Lattice(default_granularity(sensitivity, dimension) if granularity is None else granularity)
        self._steps = np.zeros(dimension, np.int64)
        self._reach = 0.0

    @property
    def granularity(self) -> float:
        """The lattice step."""
        return self._lattice.granularity

    def add(self, contribution: npt.ArrayLike) -> None:
        """Add one float64[d] contribution; ValueError if its norm exceeds the sensitivity or it is not finite."""
        array = _checked(contribution)
        if array.shape != self._steps.shape:
            raise ValueError(f"contribution: must have {self._steps.size} coordinates, not {array.size}")
        norm = float(np.linalg.norm(array))
        if not norm <= self._bound:
            raise ValueError(f"contribution: L2 norm {norm:g} exceeds the sensitivity; clip it first")
        self._reach += norm / self._lattice.granularity + 1
        if self._reach >= _MAX_STEPS:
            raise ValueError("granularity: the sum may not fit 62 bits; choose a coarser granularity")
        self._steps += self._lattice.quantise(array)

    def release(self, *, noise_multiplier: float, random: RandomBytes = os.urandom) -> tuple[Float64s, Gaussian]:
        """Return the noised float64[d] sum and the event to charge; call it once per charge."""
        _parameters(self._bound, noise_multiplier)
        steps = self._steps.copy()
        # The computed norm is within 2^-20 of the true one for any d below 2^30.
        moved = self._lattice.sensitivity(self._bound * (1 + 2.0**-20), steps.size, roundings=1)
        if noise_multiplier > 0:
            steps += discrete_gaussian_variance(gaussian_variance(noise_multiplier, moved), steps.size, random)
        return self._lattice.restore(steps), Gaussian(noise_multiplier=noise_multiplier)
