"""Distributed differential privacy: every node adds a share of the noise, and only the sum of all shares protects.

A node clips its update, rotates it, scales it to a lattice, rounds it at random until the result is short enough, adds
Skellam or discrete Gaussian noise and reduces modulo 2^bits [AKL21, KLS21]. The sum, taken under any masking protocol,
then carries noise from the start: the server never sees it without, so the guarantee holds against the server too.
`privfed.privacy.distributed` chooses the lattice.

What each promise rests on:

- Sensitivity. What is compared with the bound is the rounded integer vector itself, so no float rounding
  before it matters.
- Noise. The planned noise is that of the honest survivors: nodes less max_dropped less max_colluding. What more
  survivors add is independent of it, and so post-processing. Skellam noise is closed under sums; a sum of discrete
  Gaussians is only near one, which its event counts and `check` keeps small.
- Wrap-around costs accuracy, never privacy: reducing modulo 2^bits is post-processing of the noised sum.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from privfed.privacy import rotation
from privfed.privacy.events import DistributedDiscreteGaussian, DistributedNoise, DistributedSkellam
from privfed.privacy.inversion import Float64s, Int64s
from privfed.privacy.keystream import Keystream, RandomBytes
from privfed.privacy.noise import discrete_gaussian_variance, skellam
from privfed.privacy.rdp import rounded_norm, sum_distance

SKELLAM, DISCRETE_GAUSSIAN = "skellam", "discrete_gaussian"
MECHANISMS = (SKELLAM, DISCRETE_GAUSSIAN)
BETA = math.exp(-0.5)
MAX_LEVELS = 4
LARGEST_DEPARTURE = 0.01
"""Of a sum of discrete Gaussians from one, over its sensitivity, before a setting is refused."""
MIN_BITS, MAX_BITS = 8, 62
LARGEST_VARIANCE = 2.0**41  # of one node's noise, in squared steps: what the sampler takes
LARGEST_NORM = 2.0**40  # of an update in steps: integers of that size are exact in float64
UP = 1 + 2.0**-40  # outward slack of the float arithmetic on parameters
SHORT_STEPS = 2.0**15
"""Largest root mean square of a rotated update, in steps, for float32: it moves a coordinate by some 2^-7 steps."""
SHORT_RATIO = 2.0**15
"""Largest sum in a coordinate over its planned noise for float32: it moves that by some 2^-7 of the noise."""
_ATTEMPTS = 1000
_CHUNK = 1 << 14  # values at a time, so that what is done to them stays in the second-level cache


def wrap_bound(reach: float, norm: float, variance: float, dimension: int) -> float:
    """Bound the probability that any coordinate of a rotated, noised sum leaves [-reach, reach].

    norm: of the sum of all updates, in steps. variance: of all noise together, in squared steps. dimension:
    of the rotated vector. A coordinate of the rotated sum is a Rademacher sum of variance norm^2 / dimension; the
    Chernoff bound is taken for it and the noise together, then summed over both signs and all coordinates. It holds
    for sums that do not depend on the rotation's signs. It is Skellam noise's, and covers the lighter tails of discrete
    Gaussian noise [CKS20].
    """
    if reach <= 0:
        return 1.0
    spread = norm * norm / dimension

    def slope(rate: float) -> float:
        return rate * spread + variance * math.sinh(rate) - reach

    low, high = 0.0, 1.0
    while slope(high) < 0 and high < 512:
        low, high = high, 2 * high
    for _ in range(60):
        rate = (low + high) / 2
        low, high = (rate, high) if slope(rate) < 0 else (low, rate)
    # Any rate gives a bound; the root of the slope gives the best.
    exponent = -low * reach + low * low * spread / 2 + 2 * variance * math.sinh(low / 2) ** 2
    return min(1.0, 2 * dimension * math.exp(min(0.0, exponent)) * UP)


def whole(name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name}: must be a whole number of at least {low}, not {value!r}")


def above_zero(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: must be finite and above 0, not {value!r}")


@dataclass(frozen=True, slots=True)
class NoiseParameters:
    """Everything that the nodes and the server of a round must agree on; all of it is public.

    clip: the L2 bound C on an update. noise_multiplier: standard deviation of the honest survivors' noise over C.
    nodes: how many may be in the sum. dimension: of an update. bits: the ring is Z_2^bits. scale: lattice steps per
    unit (1 / gamma). max_dropped: nodes that may be missing from the sum. max_colluding: nodes whose noise the observer
    may know. beta: share of roundings that may be refused [KLS21, Prop 22]; 0 for the unconditional bound.
    mechanism: "skellam" or "discrete_gaussian". drop_levels: ascending counts of dropped nodes, at most four and the
    last max_dropped, between which the noise adapts [Jiang+24]; Skellam only; none: it is that of the worst drop.

    Make it with `solve_noise` or `calibrate_noise`. Raises ValueError naming the argument.
    """

    clip: float
    noise_multiplier: float
    nodes: int
    dimension: int
    bits: int
    scale: float
    max_dropped: int = 0
    max_colluding: int = 0
    beta: float = BETA
    mechanism: str = SKELLAM
    drop_levels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.mechanism not in MECHANISMS:
            raise ValueError(f"mechanism: must be {' or '.join(MECHANISMS)}, not {self.mechanism!r}")
        for name in ("clip", "noise_multiplier", "scale"):
            above_zero(name, getattr(self, name))
        for name, low in (("nodes", 1), ("dimension", 1), ("bits", MIN_BITS), ("max_dropped", 0), ("max_colluding", 0)):
            whole(name, getattr(self, name), low)
        if self.bits > MAX_BITS:
            raise ValueError(f"bits: must be at most {MAX_BITS}, not {self.bits}")
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta: must be in [0, 1), not {self.beta}")
        if self.honest < 1:
            raise ValueError(
                f"max_dropped: {self.nodes} nodes less {self.max_dropped} dropped less {self.max_colluding} colluding "
                "leave nobody whose noise protects; allow fewer or ask more nodes"
            )
        self._check_levels()
        if not self.clip * self.scale <= LARGEST_NORM:
            raise ValueError(f"scale: the clip is {self.clip * self.scale:g} steps, more than 2^40; use fewer bits")
        if not self.local_variance <= LARGEST_VARIANCE:
            raise ValueError(f"scale: the local variance is {self.local_variance:g} squared steps, more than 2^41")

    def _check_levels(self) -> None:
        levels = self.drop_levels
        if not levels:
            return
        if self.mechanism != SKELLAM:
            raise ValueError(
                "drop_levels: a component would be too small for discrete Gaussian noise; use Skellam noise"
            )
        for level in levels:
            whole("drop_levels", level, 0)
        if len(levels) > MAX_LEVELS or any(a >= b for a, b in pairwise(levels)) or levels[-1] != self.max_dropped:
            raise ValueError(
                f"drop_levels: must be at most {MAX_LEVELS} ascending counts that end with max_dropped="
                f"{self.max_dropped}, not {levels}"
            )

    @property
    def honest(self) -> int:
        """Survivors whose noise the observer does not know, at the least."""
        return self.nodes - self.max_dropped - self.max_colluding

    @property
    def least_survivors(self) -> int:
        """Nodes that must be in the sum, colluding ones included: the least threshold of the masking protocol."""
        return self.nodes - self.max_dropped

    @property
    def padded(self) -> int:
        """Entries of an encoded vector: the least order of a rotation that holds the dimension."""
        return rotation.padded(self.dimension)

    @property
    def local_stddev(self) -> float:
        """Standard deviation of one node's noise, in units of the update."""
        return self.noise_multiplier * self.clip / math.sqrt(self.honest) * UP

    @property
    def local_variance(self) -> float:
        """Variance of one node's noise in squared steps, rounded up: never below what `event` charges for."""
        return (self.local_stddev * self.scale) ** 2 * UP

    @property
    def components(self) -> tuple[float, ...]:
        """Variances of the parts of one node's noise: what the first level needs, and what each further one adds."""
        if not self.drop_levels:
            return (self.local_variance,)
        # With the last level's variance for its honest survivors, every level has as much in all.
        needed = [self.local_variance * self.honest / (self.nodes - d - self.max_colluding) for d in self.drop_levels]
        return (needed[0] * UP, *((b - a) * UP for a, b in pairwise(needed)))

    def level(self, survivors: int) -> int:
        """Return the place in `drop_levels` of the least level that covers these survivors."""
        dropped = max(0, self.nodes - survivors)
        return next((place for place, level in enumerate(self.drop_levels) if dropped <= level), len(self.drop_levels))

    @property
    def norm_bound(self) -> float:
        """Largest L2 norm of a rounded update, in steps."""
        return rounded_norm(self.clip * self.scale, self.padded, self.beta)

    @property
    def growth(self) -> float:
        """Factor by which rounding lengthens the longest update."""
        return self.norm_bound / (self.clip * self.scale)

    @property
    def wrap_probability(self) -> float:
        """Bound on the probability that any coordinate of a round's sum wraps, with all nodes in it."""
        # Rounding moves each entry of each node by less than one step.
        reach = 2.0 ** (self.bits - 1) - self.nodes - 1
        return wrap_bound(reach, self.nodes * self.clip * self.scale, self.nodes * self.local_variance, self.padded)

    @property
    def departure(self) -> float:
        """How far the honest noise's sum is from one law: sqrt(D) tau over the sensitivity [KLS21, Thm 1]."""
        if self.mechanism == SKELLAM:
            return 0.0
        stddev = self.local_stddev * self.scale
        sensitivity = self.norm_bound / (math.sqrt(self.honest) * stddev)
        return math.sqrt(self.padded) * sum_distance(self.honest, stddev) / sensitivity

    def check(self) -> None:
        """Raise ValueError for discrete Gaussian noise so small in lattice steps that its sum is not near one."""
        if self.departure > LARGEST_DEPARTURE:
            raise ValueError(
                f"scale: one node's discrete Gaussian noise is {self.local_stddev * self.scale:.3g} lattice steps, too "
                f"small for the sum of {self.honest} to be near one: sqrt(D) tau is {self.departure:.3g} of the "
                f"sensitivity, more than {LARGEST_DEPARTURE:g}; use more bits, fewer nodes, or Skellam noise"
            )

    @property
    def event(self) -> DistributedNoise:
        """What one round costs, to be charged before the sum is unmasked."""
        kind = DistributedSkellam if self.mechanism == SKELLAM else DistributedDiscreteGaussian
        return kind(
            local_stddev=self.local_stddev,
            clip=self.clip,
            scale=self.scale,
            dimension=self.padded,
            survivors=self.honest,
            modulus=1 << self.bits,
            beta=self.beta,
        )

    def encode_integers(self, update: npt.ArrayLike, seed: bytes, random: RandomBytes = os.urandom) -> Int64s:
        """Return a node's noised integers before the modulus, int64[padded].

        update: float[dimension], clipped here when it is longer than `clip`. seed: the round's 32 public bytes. random:
        where rounding and noise come from; only tests pass another.
        Raises ValueError for another shape, NaN or infinity.

        Guarantees: before the noise, the L2 norm of the integers is at most `norm_bound`.
        """
        noise = self.draw(random)  # before it meets the data
        noise += self.round_update(update, seed, random)
        return noise

    def draw(self, random: RandomBytes = os.urandom) -> Int64s:
        """Return one node's noise, exact, int64[padded] in steps."""
        if self.mechanism == SKELLAM:
            return skellam(self.padded, self.local_variance, random)
        return discrete_gaussian_variance(Fraction(self.local_variance), self.padded, random)

    def component(self, place: int, key: bytes) -> Int64s:
        """Return a part of a node's noise, int64[padded]: the same to whoever has its key, 32 uniform secret bytes."""
        return skellam(self.padded, self.components[place], lambda count: key[:count])

    def encode_removable(
        self, update: npt.ArrayLike, seed: bytes, random: RandomBytes = os.urandom
    ) -> tuple[npt.NDArray[Any], tuple[bytes, ...]]:
        """Return a node's ring vector and the keys of its removable parts, one for each level after the first.

        A key is a secret until the survivors are known: with keys[level(survivors):] of every survivor, `remove` takes
        off what the sum has too much.
        """
        keys = tuple(random(32) for _ in self.components)
        noise = self.component(0, keys[0])
        for place, key in enumerate(keys[1:], start=1):
            noise += self.component(place, key)
        noise += self.round_update(update, seed, random)
        return self._reduced(noise), keys[1:]

    def remove(self, total: npt.NDArray[Any], keys: Iterable[tuple[bytes, ...]], level: int) -> npt.NDArray[Any]:
        """Return a ring sum less the parts above `level`; keys: of each survivor that gave them, in order.

        A survivor that gave none leaves more noise than planned. O(removed parts x padded) operations.
        """
        rest = total.astype(np.uint64)
        for given in keys:
            for place, key in enumerate(given, start=level + 1):
                rest -= self.component(place, key).view(np.uint64)
        rest &= np.uint64((1 << self.bits) - 1)
        return rest

    def encode(self, update: npt.ArrayLike, seed: bytes, random: RandomBytes = os.urandom) -> npt.NDArray[Any]:
        """Return a node's ring vector: uint32[padded] for up to 32 bits, else uint64. See `encode_integers`."""
        return self._reduced(self.encode_integers(update, seed, random))

    def _reduced(self, steps: Int64s) -> npt.NDArray[Any]:
        residues = steps.view(np.uint64)
        if self.bits <= 32:
            narrow = residues.astype(np.uint32)
            return narrow if self.bits == 32 else np.bitwise_and(narrow, np.uint32((1 << self.bits) - 1), out=narrow)
        return np.bitwise_and(residues, np.uint64((1 << self.bits) - 1), out=residues)

    def round_update(self, update: npt.ArrayLike, seed: bytes, random: RandomBytes = os.urandom) -> npt.NDArray[Any]:
        """Return the clipped, rotated, scaled and rounded update without noise, [padded]: a secret of the node.

        int32 where `norm_bound` fits, else int64.
        """
        values, factor = self._clipped(update)
        rotated = rotation.rotate(values, seed, factor * self.scale, self._floats)
        stream = Keystream(random)
        # Every term of the dot product is exact or rounded by 2^-53; all are positive, so the sum is as well.
        limit = self.norm_bound**2 * (1 - 2.0**-45) / (1 + (self.padded + 4) * 2.0**-52)
        steps: npt.NDArray[Any] = np.empty(rotated.size, np.int32 if self.norm_bound < 2.0**31 else np.int64)
        for _ in range(_ATTEMPTS):
            if self._rounded(rotated, steps, stream) <= limit:
                return steps
        raise RuntimeError(f"none of {_ATTEMPTS} roundings was short enough; nothing was released")

    @staticmethod
    def _rounded(rotated: npt.NDArray[Any], steps: npt.NDArray[Any], stream: Keystream) -> float:
        """Round at random into `steps`; return the squared norm."""
        squared = 0.0
        for start in range(0, rotated.size, _CHUNK):
            part = rotated[start : start + _CHUNK]
            found = np.multiply(stream.uint32(part.size), 2.0**-32)
            found += part
            np.floor(found, out=found)
            squared += float(np.dot(found, found))
            steps[start : start + _CHUNK] = found
        return squared

    @property
    def _floats(self) -> type[np.float32 | np.float64]:
        """The floats to rotate an update in: short where they move a coordinate by far less than a step."""
        return np.float32 if self.clip * self.scale <= SHORT_STEPS * math.sqrt(self.padded) else np.float64

    @property
    def _sum_floats(self) -> type[np.float32 | np.float64]:
        """The floats to rotate a sum back in: short where they move a coordinate by far less than its noise."""
        largest = self.nodes / math.sqrt(self.padded)  # of a rotated sum of updates, in clips and in the mean
        return np.float32 if largest <= SHORT_RATIO * self.noise_multiplier else np.float64

    def _clipped(self, update: npt.ArrayLike) -> tuple[npt.NDArray[Any], float]:
        """Return values and a factor: the update within the clip, less what float arithmetic may add to its norm."""
        values = np.asarray(update)
        values = values if values.dtype == np.float32 else values.astype(np.float64, copy=False)
        if values.shape != (self.dimension,):
            raise ValueError(f"update: must have the shape ({self.dimension},), not {values.shape}; flatten it first")
        short = np.float32 in (values.dtype, self._floats)
        slack = 2.0**-44 + (self.padded + 8) * 2.0**-51 + (2.0**-18 if short else 0.0)
        bound = self.clip * (1 - slack)
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            squared = _squared(values)
            if 1e-200 < squared < 1e200:
                return values, min(1.0, bound / math.sqrt(squared))
            largest = float(np.abs(values).max())
            if not math.isfinite(largest):
                raise ValueError("update: contains NaN or infinity")
            if largest == 0:
                return values, 1.0
            wide = values.astype(np.float64) / largest
            return wide, min(largest, bound / math.sqrt(_squared(wide)))

    def decode(self, total: npt.NDArray[Any], seed: bytes, survivors: int, denominator: float = 1.0) -> Float64s:
        """Return the noised sum of updates over a public denominator, float64[dimension].

        total: the sum modulo 2^bits, unsigned [padded]. survivors: nodes in it. Raises ValueError when they are fewer
        than `least_survivors` (their noise is less than planned) or more than `nodes`, and for another shape or seed.
        """
        if not self.least_survivors <= survivors <= self.nodes:
            raise ValueError(
                f"survivors: {survivors} nodes are in the sum, the plan is for {self.least_survivors} to {self.nodes}"
            )
        above_zero("denominator", denominator)
        if total.shape != (self.padded,) or total.dtype.kind != "u":
            raise ValueError(f"total: must be unsigned [{self.padded}], not {total.dtype}{list(total.shape)}")
        return rotation.unrotate(self._signed(total), seed, self.dimension, 1 / (self.scale * denominator))

    def _signed(self, total: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return ring elements as signed floats."""
        found = np.empty(total.size, self._sum_floats)
        word, sign = (np.uint32, np.int32) if self.bits <= 32 else (np.uint64, np.int64)
        shift = 8 * np.dtype(word).itemsize - self.bits
        for start in range(0, total.size, _CHUNK):
            part: npt.NDArray[Any] = total[start : start + _CHUNK].astype(word)
            part <<= word(shift)
            part = part.view(sign)
            found[start : start + _CHUNK] = part >> sign(shift)
        return found


def _squared(values: npt.NDArray[Any]) -> float:
    """Return the squared norm, summed in float64."""
    if values.dtype == np.float64:
        return float(np.dot(values, values))
    pieces = (values[start : start + _CHUNK].astype(np.float64) for start in range(0, values.size, _CHUNK))
    return sum(float(np.dot(piece, piece)) for piece in pieces)
