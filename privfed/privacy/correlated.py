"""Correlated noise for rounds that are not sampled: each round's noise takes back a part of what came before.

Rounds t = 1 .. n have sums g_t. A lower-triangular encoder C with ones on its diagonal turns them into rows
e_t = sum_j C[t, j] g_j; what is noised, and so is all that anybody learns, is w_t = e_t + Z_t with independent
Gaussian noise Z_t; the round's release is y_t = w_t - sum_{j < t} C[t, j] y_j, which is post-processing of the w. So
the whole run is one Gaussian mechanism whose sensitivity is that of C, for updates that may depend on earlier releases
too [DMR+22]. A sum of releases over rounds has far less noise than independent noise of the same price would leave.

- `Banded(coefficients)`: C[t, t - i] = coefficients[i]; BandMF [CGM+23] with given coefficients. Best with a
  separation of participations of at least the number of coefficients: then no two fall into one row.
- `Tree()`: row t sums the last 2^k rounds, 2^k the largest power of two that divides t: binary-tree aggregation
  [DNPR10, KMS+21] in the form that needs one release a round.

Everything is in integer steps of the lattice the sums are in: rows are rounded to it before the noise, and the
rounding is part of the sensitivity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from privfed.privacy.matrix import encoder_sensitivity

Float64s = npt.NDArray[np.float64]
MAX_ROUNDS = 2048


class Correlation(Protocol):
    """An encoder, and the stream that applies it round by round in bounded memory."""

    def encoder(self, rounds: int) -> Float64s:
        """Return C, float64[rounds, rounds]."""
        ...

    def stream(self, dimension: int) -> Stream:
        """Return the stream at its beginning."""
        ...


class Stream(Protocol):
    """The state of one run: what earlier rounds summed and released. done: the last round that was decoded."""

    done: int

    def encode(self, number: int, total: Float64s) -> Float64s:
        """Return row `number` for this round's raw sum, before rounding and noise. Raises ValueError out of order."""
        ...

    def decode(self, number: int, total: Float64s, noised: Float64s) -> Float64s:
        """Return the round's release, and go on to the next round."""
        ...

    def save(self) -> dict[str, Float64s]:
        """Return what the next rounds need; the raw sums among it are as secret as the updates."""
        ...

    def load(self, done: int, saved: Mapping[str, Float64s]) -> None:
        """Take up after round `done`. Raises ValueError for a state that does not fit."""
        ...


def check_rounds(rounds: int) -> int:
    """Return the number of rounds, or raise ValueError: the encoder is n x n."""
    if not 1 <= rounds <= MAX_ROUNDS:
        raise ValueError(f"rounds: must be between 1 and {MAX_ROUNDS} under correlated noise, not {rounds}")
    return rounds


def sensitivity(correlation: Correlation, rounds: int, separation: int) -> float:
    """Return the encoder's L2 sensitivity in units of C, when a unit takes part once in any `separation` rounds."""
    return encoder_sensitivity(correlation.encoder(check_rounds(rounds)), min(separation, rounds))


def row_sensitivity(row: Float64s, separation: int) -> float:
    """Return what one unit can move one encoded row by, in units of C: its participations are `separation` apart."""
    row = np.abs(row)
    windows = [row[start : start + separation] for start in range(0, len(row), separation)]
    return float(sum(window.max() for window in windows))


@dataclass(frozen=True, slots=True)
class Banded:
    """A band of Toeplitz coefficients; the first is 1. coefficients[i] weighs the sum of i rounds ago."""

    coefficients: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.coefficients or self.coefficients[0] != 1.0:
            raise ValueError("coefficients: the first must be 1: it weighs the round's own sum")
        if not all(math.isfinite(value) for value in self.coefficients):
            raise ValueError("coefficients: must be finite")
        if len(self.coefficients) > MAX_ROUNDS:
            raise ValueError(f"coefficients: at most {MAX_ROUNDS}, not {len(self.coefficients)}")

    @classmethod
    def square_root(cls, bands: int) -> Banded:
        """Return the first coefficients of the square root of the prefix-sum matrix, a good choice [FHU22, CGM+23].

        c[0] = 1, c[i] = c[i - 1] (2 i - 1) / (2 i).
        """
        found = [1.0]
        for i in range(1, bands):
            found.append(found[-1] * (2 * i - 1) / (2 * i))
        return cls(tuple(found))

    def encoder(self, rounds: int) -> Float64s:
        """Return C, float64[rounds, rounds]."""
        matrix = np.zeros((rounds, rounds))
        for offset, value in enumerate(self.coefficients[:rounds]):
            matrix[np.arange(offset, rounds), np.arange(rounds - offset)] = value
        return matrix

    def stream(self, dimension: int) -> BandedStream:
        """Return the stream at its beginning."""
        return BandedStream(self.coefficients, dimension)


@dataclass(slots=True)
class BandedStream:
    """Keeps the sums and the releases of as many rounds as the band is wide."""

    coefficients: tuple[float, ...]
    dimension: int
    done: int = 0
    sums: list[Float64s] = field(default_factory=list, repr=False)
    releases: list[Float64s] = field(default_factory=list)

    def _past(self, kept: Sequence[Float64s]) -> Float64s:
        past = np.zeros(self.dimension)
        for weight, vector in zip(self.coefficients[1:], reversed(kept), strict=False):
            past += weight * vector
        return past

    def encode(self, number: int, total: Float64s) -> Float64s:
        """Return row `number`: this round's sum and the weighted earlier ones."""
        _expect(number, self.done)
        return np.asarray(total + self._past(self.sums))

    def decode(self, number: int, total: Float64s, noised: Float64s) -> Float64s:
        """Return the round's release, and go on to the next round."""
        _expect(number, self.done)
        release = np.asarray(noised - self._past(self.releases))
        width = len(self.coefficients) - 1
        self.sums = [*self.sums, total][-width:] if width else []
        self.releases = [*self.releases, release][-width:] if width else []
        self.done = number
        return release

    def save(self) -> dict[str, Float64s]:
        """Return the kept sums and releases, float64[kept, dimension]."""
        return {"sums": _stacked(self.sums, self.dimension), "releases": _stacked(self.releases, self.dimension)}

    def load(self, done: int, saved: Mapping[str, Float64s]) -> None:
        """Take up after round `done`."""
        kept = min(done, len(self.coefficients) - 1)
        self.sums = _rows(saved, "sums", kept, self.dimension)
        self.releases = _rows(saved, "releases", kept, self.dimension)
        self.done = done


@dataclass(frozen=True, slots=True)
class Tree:
    """Binary-tree aggregation: row t sums the last 2^k rounds, 2^k the largest power of two that divides t."""

    def encoder(self, rounds: int) -> Float64s:
        """Return C, float64[rounds, rounds]."""
        matrix = np.zeros((rounds, rounds))
        for number in range(1, rounds + 1):
            matrix[number - 1, number - (number & -number) : number] = 1.0
        return matrix

    def stream(self, dimension: int) -> TreeStream:
        """Return the stream at its beginning."""
        return TreeStream(dimension)


@dataclass(slots=True)
class TreeStream:
    """Keeps prefix sums, raw and released, at the rounds whose tree nodes are open: at most log2(n) + 1 of each."""

    dimension: int
    done: int = 0
    raw: dict[int, Float64s] = field(default_factory=dict, repr=False)
    released: dict[int, Float64s] = field(default_factory=dict)

    def _at(self, kept: Mapping[int, Float64s], number: int) -> Float64s:
        return kept[number] if number else np.zeros(self.dimension)

    def encode(self, number: int, total: Float64s) -> Float64s:
        """Return row `number`: the sum over the rounds of the tree node that ends here."""
        _expect(number, self.done)
        start = number - (number & -number)
        return np.asarray(self._at(self.raw, self.done) + total - self._at(self.raw, start))

    def decode(self, number: int, total: Float64s, noised: Float64s) -> Float64s:
        """Return the round's release, and go on to the next round."""
        _expect(number, self.done)
        start = number - (number & -number)
        before = self._at(self.released, self.done)
        prefix = np.asarray(self._at(self.released, start) + noised)
        self.raw[number] = np.asarray(self._at(self.raw, self.done) + total)
        self.released[number] = prefix
        self.done = number
        open_nodes = set(_open_nodes(number))
        self.raw = {at: kept for at, kept in self.raw.items() if at in open_nodes}
        self.released = {at: kept for at, kept in self.released.items() if at in open_nodes}
        return np.asarray(prefix - before)

    def save(self) -> dict[str, Float64s]:
        """Return the kept prefix sums, float64[kept, dimension], by ascending round."""
        order = sorted(self.raw)
        return {
            "sums": _stacked([self.raw[at] for at in order], self.dimension),
            "releases": _stacked([self.released[at] for at in order], self.dimension),
        }

    def load(self, done: int, saved: Mapping[str, Float64s]) -> None:
        """Take up after round `done`."""
        order = sorted(_open_nodes(done))
        self.raw = dict(zip(order, _rows(saved, "sums", len(order), self.dimension), strict=True))
        self.released = dict(zip(order, _rows(saved, "releases", len(order), self.dimension), strict=True))
        self.done = done


def _open_nodes(number: int) -> list[int]:
    """Return the rounds whose prefix sums later rows need: `number`, and it with its low bits cleared one by one."""
    found = []
    while number:
        found.append(number)
        number &= number - 1
    return found


def _expect(number: int, done: int) -> None:
    if number != done + 1:
        raise ValueError(f"number: round {number} cannot follow round {done}")


def _stacked(rows: Sequence[Float64s], dimension: int) -> Float64s:
    return np.stack(rows) if rows else np.zeros((0, dimension))


def _rows(saved: Mapping[str, Float64s], name: str, count: int, dimension: int) -> list[Float64s]:
    found = saved.get(name)
    if found is None or found.shape != (count, dimension) or not np.isfinite(found).all():
        raise ValueError(f"saved: {name} must be {count} vectors of {dimension} finite elements")
    return [np.array(row) for row in found]


def noise_in_steps(correlation: Correlation, rounds: int, separation: int) -> Callable[[float, int, float], float]:
    """Return a function (noise_multiplier, dimension, step over C) -> the multiplier each row's noise must have.

    The run is worth `Gaussian(noise_multiplier)` then: the encoder's sensitivity, and what rounding rows to the lattice
    adds to it, at most a step in every coordinate of every row.
    """
    whole = sensitivity(correlation, rounds, separation)

    def multiplier(noise_multiplier: float, dimension: int, step: float) -> float:
        if not (step >= 0 and math.isfinite(step)):
            raise ValueError(f"step: must be finite and not negative, not {step}")
        rounding = 0.0 if isinstance(correlation, Tree) else math.sqrt(rounds * dimension) * step
        return math.nextafter(noise_multiplier * (whole * (1 + 2.0**-30) + rounding * (1 + 2.0**-30)), math.inf)

    return multiplier
