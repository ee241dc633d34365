"""The truth where every outcome can be counted: laws of atoms composed outcome by outcome, to 40 digits.

The uses of a law are composed on the lattice of its losses if these are evenly spaced (integers multiplied as one large
number, so nothing is rounded on the way), else by every multiset of outcomes. Two halves of a composition meet in the
middle: sorted by loss, each outcome of one half takes a tail sum of the other. Nothing of the engines is imported.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence

import mpmath
import numpy as np
import numpy.typing as npt
from mpmath import mpf
from scipy import special

from proofs_tests.privacy.oracle import DIGITS, Law, gaussian_delta, size_of

LARGEST = 20_000  # outcomes of one half
_PLACES = 256
_SAME = mpf(10) ** -30
_NOTHING = mpf(10) ** -46  # outcomes of P this rare are left out; together they move no delta by 1e-40
Floats = npt.NDArray[np.float64]
Outcomes = list[tuple[mpf, mpf]]  # loss and P mass


class TooMany(ArithmeticError):
    """There are more outcomes than can be counted."""


def sorted_outcomes(law: Law) -> Outcomes:
    """Return the outcomes by increasing loss, those of equal loss as one, without those that never matter."""
    out: Outcomes = []
    with mpmath.workdps(DIGITS):
        for loss, mass in sorted(zip(law.losses, law.weights, strict=True)):
            if mass < _NOTHING:
                continue
            if out and loss - out[-1][0] < _SAME:
                out[-1] = (out[-1][0], out[-1][1] + mass)
            else:
                out.append((loss, mass))
    return out


def _spacing(outcomes: Outcomes) -> mpf | None:
    """Return the step of evenly spaced losses, None for others."""
    if len(outcomes) < 2:
        return mpf(1)
    steps = [b[0] - a[0] for a, b in itertools.pairwise(outcomes)]
    return steps[0] if max(steps) - min(steps) < _SAME else None


def multiply(first: list[int], second: list[int]) -> list[int]:
    """Return the convolution of two lists of fixed-point masses: one product of two large integers."""
    slot = 2 * _PLACES // 8 + 4
    a, b = (int.from_bytes(b"".join(m.to_bytes(slot, "little") for m in x), "little") for x in (first, second))
    size = len(first) + len(second) - 1
    data = (a * b).to_bytes(slot * size, "little")
    return [int.from_bytes(data[slot * k : slot * (k + 1)], "little") >> _PLACES for k in range(size)]


def _trimmed(start: int, masses: list[int]) -> tuple[int, list[int]]:
    least = int(_NOTHING * (1 << _PLACES))
    keep = [k for k, m in enumerate(masses) if m > least]
    return start + keep[0], masses[keep[0] : keep[-1] + 1]


def convolved(masses: Sequence[mpf], count: int) -> tuple[int, list[mpf]]:
    """Return (first, masses) of the sum of `count` independent indices with these masses."""
    with mpmath.workdps(2 * DIGITS):
        power = (0, [int(m * (1 << _PLACES)) for m in masses])
        total = (0, [1 << _PLACES])
        while count:
            if count & 1:
                total = _trimmed(total[0] + power[0], multiply(total[1], power[1]))
            count >>= 1
            if count:
                power = _trimmed(2 * power[0], multiply(power[1], power[1]))
        return total[0], [mpf(m) / (1 << _PLACES) for m in total[1]]


def _multisets(outcomes: Outcomes, count: int) -> Outcomes:
    """Return loss and mass of every multiset of `count` outcomes."""
    ways = [1 / mpmath.factorial(k) for k in range(count + 1)]
    state = [(count, mpf(0), mpf(1))]
    for number, (loss, p) in enumerate(outcomes):
        row = [p**k * ways[k] for k in range(count + 1)]
        last = number == len(outcomes) - 1
        state = [
            (left - k, x + k * loss, mass * row[k])
            for left, x, mass in state
            for k in (range(left, left + 1) if last else range(left + 1))
        ]
    whole = mpmath.factorial(count)
    return [(x, mass * whole) for _, x, mass in state if mass * whole > _NOTHING]


def _pieces(law: Law, count: int) -> list[Outcomes]:
    """Return the outcomes of `count` uses as one list, or as two for halves of the uses; TooMany."""
    outcomes = sorted_outcomes(law)
    step = _spacing(outcomes)
    if step is not None:
        first, masses = convolved([m for _, m in outcomes], count)
        return [[(count * outcomes[0][0] + (first + k) * step, m) for k, m in enumerate(masses) if m > _NOTHING]]
    halves = [count - count // 2, count // 2]
    if size_of(len(outcomes), halves[0]) > LARGEST:
        raise TooMany("multisets")
    return [_multisets(outcomes, half) for half in halves if half]


def _product(first: Outcomes, second: Outcomes) -> Outcomes:
    if len(first) * len(second) > LARGEST:
        raise TooMany("a half")
    return [(a + b, p * q) for a, p in first for b, q in second if p * q > _NOTHING]


class Counted:
    """delta(epsilon) of laws of atoms, each used a number of times, beside Gaussian noise of strength mu."""

    def __init__(self, laws: Sequence[tuple[Law, int]], mu: float = 0.0) -> None:
        with mpmath.workdps(DIGITS):
            if any(math.isfinite(law.highest) for law, _ in laws):
                raise TooMany("a density")
            pieces = sorted((piece for law, n in laws if n for piece in _pieces(law, n)), key=len, reverse=True)
            left: Outcomes = [(mpf(0), mpf(1))]
            right: Outcomes = [(mpf(0), mpf(1))]
            for piece in pieces:
                if len(left) <= len(right) or mu:
                    left = _product(left, piece)
                else:
                    right = _product(right, piece)
            if mu and len(left) > 3000:
                raise TooMany("normal distributions")
            self.left, self.mu = left, mpf(mu)
            self.kept = mpmath.fprod((1 - law.certain) ** count for law, count in laws)
            right.sort()
            self.places = [x for x, _ in right]
            self.p_above = self._suffixes([m for _, m in right])
            self.q_above = self._suffixes([m * mpmath.exp(-x) for x, m in right])

    @staticmethod
    def _suffixes(masses: list[mpf]) -> list[mpf]:
        return [*itertools.accumulate(reversed(masses), initial=mpf(0))][::-1]

    def delta(self, epsilon: mpf | float) -> mpf:
        """Return delta(epsilon) to about 40 digits."""
        with mpmath.workdps(DIGITS):
            e = mpf(epsilon)
            if self.mu:
                finite = mpmath.fsum(p * gaussian_delta(self.mu, e - x) for x, p in self.left)
            else:
                parts = []
                for x, p in self.left:
                    k = bisect_right(self.places, e - x)
                    parts.append(p * (self.p_above[k] - mpmath.exp(e - x) * self.q_above[k]))
                finite = mpmath.fsum(parts)
            return min(mpf(1), finite + 1 - self.kept)


def allocated(mu: float, rounds: int, epsilon: float, remove: bool) -> float:
    """Return delta of one pass of random allocation over 2 or 3 rounds, relative error about 1e-9.

    With R the mean of `rounds` lognormals, delta is E (R - e^eps)+ for one direction and E (1 - e^eps R)+ for the
    other. Given all but one of them that is an option's price in closed form; the others are integrated by Gauss's
    rule on both sides of where they reach the strike alone, as the price is steep there.
    """
    strikes = np.array([rounds * math.exp(epsilon if remove else -epsilon)])
    weights = np.ones(1)
    for _ in range(rounds - 1):
        z, weight = _split_normal(strikes, mu)
        strikes = (strikes[:, None] - np.exp(mu * z - mu * mu / 2)).ravel()
        weights = (weights[:, None] * weight).ravel()
    inside = np.maximum(strikes, 1e-300)
    d = -np.log(inside) / mu + mu / 2
    if remove:  # E (X - strike)+
        price = np.where(strikes > 0, special.ndtr(d) - inside * special.ndtr(d - mu), 1 - strikes)
        return float(weights @ price) / rounds
    price = np.where(strikes > 0, inside * special.ndtr(mu - d) - special.ndtr(-d), 0.0)
    return float(weights @ price) * math.exp(epsilon) / rounds


def _split_normal(strikes: Floats, mu: float) -> tuple[Floats, Floats]:
    """Return nodes and weights of the normal law for each strike, in panels that end where a lognormal reaches it."""
    low, high, panels = -9.0, 9.0 + 2 * mu, 8
    points, weights = np.polynomial.legendre.leggauss(24)
    at = np.clip((np.log(np.maximum(strikes, 1e-300)) + mu * mu / 2) / mu, low, high)
    share = (np.arange(panels) / panels) ** 2  # short panels near the end
    width = np.diff(np.append(share, 1.0))
    inner = (share[:, None] + width[:, None] * (1 + points) / 2).ravel()
    scaled = np.outer(width / 2, weights).ravel()
    z = np.concatenate((at[:, None] - (at - low)[:, None] * inner, at[:, None] + (high - at)[:, None] * inner), axis=1)
    w = np.concatenate(((at - low)[:, None] * scaled, (high - at)[:, None] * scaled), axis=1)
    return z, w * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
