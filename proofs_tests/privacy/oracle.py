"""The truth to 30 digits, from the definitions of the mechanisms alone: nothing of the engines is imported.

A law is what one use shows: privacy losses under P with their weights (atoms, or quadrature nodes of a rule that has
converged), and the mass that only P has. Compositions are answered by inverting the moments along a line,

    delta(eps) = 1/pi * integral over u > 0 of Re[prod M(s)^count e^(-s eps) / (s (s + 1))],  s = line + iu,

with numbers of 128 fixed binary places. The rule stops only where parts with densities have made the moments vanish:
atoms alone are counted instead (`oracle_exact`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb

import mpmath
import numpy as np
from mpmath import mpf
from mpmath.calculus.quadrature import GaussLegendre

DIGITS = 40
PLACES = 128
_ONE = 1 << PLACES
_SMALL = mpf(10) ** -28
_LONGEST = 3000  # nodes of an inversion


_ZERO = mpf(0)


@dataclass(frozen=True)
class Law:
    """Losses and P weights of one use; `certain` is the P mass where Q has none.

    highest: up to which u the nodes integrate exp(iu L); no limit for atoms. fades: the part of P that has a density
    makes moments fall for good as u grows. Moments of atoms come back, on a lattice with its period.
    """

    losses: tuple[mpf, ...]
    weights: tuple[mpf, ...]
    certain: mpf = _ZERO
    highest: float = math.inf
    fades: bool = False

    def swapped(self) -> Law:
        """Return the law with P and Q exchanged."""
        with mpmath.workdps(DIGITS):
            weights = tuple(w * mpmath.exp(-x) for x, w in zip(self.losses, self.weights, strict=True))
            certain = 1 - mpmath.fsum(weights) if self.certain > 0 else mpf(0)
            return Law(tuple(-x for x in self.losses), weights, certain, self.highest, self.fades)

    def joined(self) -> Law:
        """Return the symmetric law whose hockey stick above 0 is this one's; the rest at loss 0."""
        with mpmath.workdps(DIGITS):
            up = [(x, w) for x, w in zip(self.losses, self.weights, strict=True) if x > 0]
            down = [(-x, w * mpmath.exp(-x)) for x, w in up]
            rest = 1 - mpmath.fsum(w for _, w in up) - mpmath.fsum(w for _, w in down) - self.certain
            pairs = [*up, (mpf(0), rest), *down]
            return Law(tuple(x for x, _ in pairs), tuple(w for _, w in pairs), self.certain, self.highest, self.fades)


def tagged(first: Law, second: Law, share: mpf) -> Law:
    """Return the law of a choice that is seen: `second` with probability `share`."""
    with mpmath.workdps(DIGITS):
        weights = [w * (1 - share) for w in first.weights] + [w * share for w in second.weights]
        highest = min(first.highest, second.highest)
        certain = first.certain * (1 - share) + second.certain * share
        return Law(first.losses + second.losses, tuple(weights), certain, highest, first.fades and second.fades)


@lru_cache(maxsize=8)
def _legendre() -> tuple[tuple[mpf, mpf], ...]:
    with mpmath.workdps(DIGITS):
        return tuple(GaussLegendre(mpmath.mp).calc_nodes(5, mpmath.mp.prec))


def _panels(start: mpf, stop: mpf, width: float) -> list[tuple[mpf, mpf]]:
    count = max(1, math.ceil(float(stop - start) / width))
    half = (stop - start) / count / 2
    return [(start + half * (2 * k + 1 + x), half * weight) for k in range(count) for x, weight in _legendre()]


def _mixture(rate: mpf, up: mpf, base: mpf) -> mpf:
    return (1 - rate) * base + rate * up


@lru_cache(maxsize=64)
def gaussian(rate: float, noise: float, distance: int = 1, antipodal: bool = False, positive: bool = False) -> Law:
    """Return (1-q) N(0,1) + q N(mu,1) against N(0,1), or its mirror image; only losses above 0 if `positive`.

    mu: distance / noise.
    """
    with mpmath.workdps(DIGITS):
        q, m = mpf(rate), mpf(distance) / mpf(noise)
        mu = float(m)
        if positive:
            nodes = _panels(m / 2, 24 + 4 * m, 1.5 / max(1.0, mu))
        else:
            step = mpf(1) / math.ceil(8 * max(1.0, mu))
            first, last = math.floor((-13 - m) / step), math.ceil((24 + 4 * m) / step)
            nodes = [(k * step, step) for k in range(first, last + 1)]
        losses, weights = [], []
        for x, weight in nodes:
            p = _mixture(q, mpmath.npdf(x, m), mpmath.npdf(x))
            other = _mixture(q, mpmath.npdf(x, -m), mpmath.npdf(x)) if antipodal else mpmath.npdf(x)
            losses.append(mpmath.log(p / other))
            weights.append(weight * p)
        return Law(tuple(losses), tuple(weights), _ZERO, (10 if antipodal else 20) * max(1.0, 1 / mu), True)


@lru_cache(maxsize=64)
def laplace(rate: float, noise: float, distance: int = 1, antipodal: bool = False) -> Law:
    """Return the same for Laplace noise of scale 1: between the kinks by quadrature, beyond them two atoms."""
    with mpmath.workdps(DIGITS):
        q, m = mpf(rate), mpf(distance) / mpf(noise)
        low = -m if antipodal else mpf(0)

        def densities(x: mpf) -> tuple[mpf, mpf]:
            base = mpmath.exp(-abs(x)) / 2
            p = _mixture(q, mpmath.exp(-abs(x - m)) / 2, base)
            return p, _mixture(q, mpmath.exp(-abs(x + m)) / 2, base) if antipodal else base

        losses, weights = [], []
        for x in (low, m):  # outside, all densities fall alike: the tail beyond an end holds as much as its density
            p, other = densities(x)
            losses.append(mpmath.log(p / other))
            weights.append(p)
        kinks = sorted({low, mpf(0), m / 2, m})
        for start, stop in itertools.pairwise(kinks):
            for x, weight in _panels(start, stop, 1.0):
                p, other = densities(x)
                losses.append(mpmath.log(p / other))
                weights.append(weight * p)
        return Law(tuple(losses), tuple(weights), highest=12 if antipodal else 25)


def _shifted(mass: Callable[[int], mpf], reach: int, rate: float, shift: int, antipodal: bool, cut: bool) -> Law:
    """Return the shifted law; beyond `reach` there is nothing if it is `cut`, and next to nothing otherwise."""
    q = mpf(rate)
    losses, weights, certain = [], [], mpf(0)
    for k in range(-reach - shift, reach + shift + 1):
        p = _mixture(q, mass(k - shift), mass(k))
        other = _mixture(q, mass(k + shift), mass(k)) if antipodal else mass(k)
        if p > 0 and other > 0:
            losses.append(mpmath.log(p / other))
            weights.append(p)
        elif cut:
            certain += p
    return Law(tuple(losses), tuple(weights), certain)


def masses(kind: str, size: float, cut: int | None = None) -> tuple[mpf, ...]:
    """Return the masses of noise on the integers at 0, 1, 2, ...: the negative side is the mirror image.

    kind and size: "gaussian" and sigma, "laplace" and scale, "skellam" and variance. cut: largest |noise|.
    """
    s = mpf(size)
    if kind == "gaussian":
        reach = math.ceil(26 * size) + 2 if cut is None else cut
        raw = [mpmath.exp(-mpf(k * k) / (2 * s * s)) for k in range(reach + 1)]
    elif kind == "laplace":
        raw = [mpmath.exp(-mpf(k) / s) for k in range(math.ceil(110 * size) + 1)]
    else:
        raw = [mpmath.besseli(k, s) for k in range(math.ceil(14 * math.sqrt(size)) + 31)]
    total = mpmath.fsum(raw) * 2 - raw[0]
    return tuple(m / total for m in raw)


@lru_cache(maxsize=64)
def integer(kind: str, size: float, rate: float, shift: int, antipodal: bool, cut: int | None = None) -> Law:
    """Return (1-q) f + q f(. - shift) against f (or the mirror image) for noise f on the integers; see `masses`."""
    with mpmath.workdps(DIGITS):
        half = masses(kind, size, cut)
        return _shifted(_mirrored(half), len(half) - 1, rate, shift, antipodal, cut is not None)


def _mirrored(half: Sequence[mpf]) -> Callable[[int], mpf]:
    return lambda k: half[abs(k)] if abs(k) < len(half) else _ZERO


def rounded(half: Sequence[mpf], rate: float, clip: mpf, mirrored: bool) -> Law:
    """Return integer noise with these masses, moved by `clip` rounded at random, with probability `rate`.

    Against the noise alone, or against the noise moved the other way.
    """
    mass, q = _mirrored(half), mpf(rate)
    low = int(mpmath.floor(clip))
    up = clip - low

    def moved(k: int, sign: int) -> mpf:
        return (1 - q) * mass(k) + q * ((1 - up) * mass(k - sign * low) + up * mass(k - sign * (low + 1)))

    reach = len(half) + low
    pairs = [(moved(k, 1), moved(k, -1) if mirrored else mass(k)) for k in range(-reach, reach + 1)]
    kept = [(p, other) for p, other in pairs if p > 0 and other > 0]
    return Law(tuple(mpmath.log(p / other) for p, other in kept), tuple(p for p, _ in kept))


def three_points(noise: float, shares: Sequence[mpf], others: Sequence[mpf]) -> Law:
    """Return Gaussian mixtures at 0, -1 and 1 with these shares against those with the others'."""
    with mpmath.workdps(DIGITS):
        step, m = mpf(1) / math.ceil(8 * max(1.0, 1 / noise)), 1 / mpf(noise)
        losses, weights = [], []
        for k in range(math.floor((-22 - 3 * m) / step), math.ceil((22 + 3 * m) / step) + 1):
            at = [mpmath.npdf(k * step, place) for place in (mpf(0), -m, m)]
            p, other = mpmath.fdot(shares, at), mpmath.fdot(others, at)
            losses.append(mpmath.log(p / other))
            weights.append(step * p)
        return Law(tuple(losses), tuple(weights), _ZERO, 12 * max(1.0, noise), True)


def response(epsilon: float, delta: float = 0.0) -> Law:
    """Return the two answers of randomised response at epsilon, and delta of certainty."""
    with mpmath.workdps(DIGITS):
        e, kept = mpf(epsilon), 1 - mpf(delta)
        p = kept / (1 + mpmath.exp(-e))
        return Law((e, -e), (p, kept - p), mpf(delta))


def categories(noise: float, k: int, relation: str) -> Law:
    """Return k-ary randomised response: two truths, or a truth and a uniform report under zero_out."""
    with mpmath.workdps(DIGITS):
        other = mpf(noise) / k
        truth = 1 - mpf(noise) + other
        if relation == "zero_out":
            return Law((mpmath.log(truth * k), mpmath.log(other * k)), (truth, (k - 1) * other))
        return Law((mpmath.log(truth / other), -mpmath.log(truth / other), mpf(0)), (truth, other, (k - 2) * other))


def bounded_range(epsilon: float, at: float) -> Law:
    """Return one exponential mechanism with two outcomes, of losses `at` and `at` - epsilon."""
    with mpmath.workdps(DIGITS):
        e, t = mpf(epsilon), mpf(at)
        p = mpmath.expm1(e - t) / (mpmath.exp(e - t) - mpmath.exp(-t))
        return Law((t, t - e), (p, 1 - p))


def thinned(law: Law, rate: float) -> Law:
    """Return (1-q) Q + q P against Q."""
    with mpmath.workdps(DIGITS):
        q = mpf(rate)
        ratio = [1 - q + q * mpmath.exp(x) for x in law.losses]
        base = [w * mpmath.exp(-x) for x, w in zip(law.losses, law.weights, strict=True)]
        losses = [mpmath.log(r) for r in ratio]
        weights = [b * r for b, r in zip(base, ratio, strict=True)]
        if law.certain > 0:  # what Q alone had: P is left with its share
            only = 1 - mpmath.fsum(base)
            losses, weights = [*losses, mpmath.log(1 - q)], [*weights, only * (1 - q)]
        return Law(tuple(losses), tuple(weights), q * law.certain)


def gaussian_delta(mu: mpf, epsilon: mpf) -> mpf:
    """Return the hockey stick of N(mu, 1) against N(0, 1)."""
    if mu == 0:
        return max(mpf(0), -mpmath.expm1(epsilon))
    return mpmath.ncdf(mu / 2 - epsilon / mu) - mpmath.exp(epsilon) * mpmath.ncdf(-mu / 2 - epsilon / mu)


class Unresolved(ArithmeticError):
    """The inversion does not reach its precision."""


class Inverted:
    """delta(epsilon) of a composition: laws with counts, and Gaussian noise of strength mu, near one epsilon."""

    def __init__(self, laws: Sequence[tuple[Law, int]], mu: float, near: float) -> None:
        self.laws, self.mu = laws, mu
        self._floats = [(np.array(law.losses, float), np.array(law.weights, float), n) for law, n in laws]
        self.line = self._saddle(near)
        period = self._period(near)
        end = min([_LONGEST * 2 * math.pi / period, *(law.highest for law, _ in laws)])
        if self._left(end) > -60:
            raise Unresolved("the moments do not vanish soon enough to be inverted to 28 digits")
        with mpmath.workdps(DIGITS):
            self._walk(period)

    def _left(self, u: float) -> float:
        """Return the logarithm of what lasts at u, in floats."""
        out = -((u * self.mu) ** 2) / 2 - 2 * math.log(u)
        for (losses, weights, count), (law, _) in zip(self._floats, self.laws, strict=True):
            if law.fades:
                tilted = weights * np.exp(self.line * (losses - losses.max()))
                moment = abs(complex(np.sum(tilted * np.exp(1j * u * losses)))) / float(tilted.sum())
                out += count * math.log(max(moment, 1e-15))
        return out

    def _moment(self, order: float) -> float:
        out = order * (order + 1) * self.mu**2 / 2
        for losses, weights, count in self._floats:
            keep = weights > 0
            exponent = order * losses[keep] + np.log(weights[keep])
            top = float(exponent.max())
            out += count * (top + math.log(float(np.exp(exponent - top).sum())))
        return out

    def _saddle(self, near: float) -> float:
        orders = np.exp(np.linspace(math.log(0.05), math.log(200), 160))
        costs = [self._moment(a) - a * near - math.log(a * (a + 1)) for a in orders]
        return float(orders[int(np.argmin(costs))])

    def _period(self, near: float) -> float:
        """Return how far apart copies must be so that what they add is below 1e-26 of the answer."""
        here = self._moment(self.line)
        shifts = np.exp(np.linspace(math.log(1e-3), math.log(60), 60))
        above = min((self._moment(self.line + s) - here + 64 - s * near) / s for s in shifts)
        back = self.line * np.linspace(0.05, 0.999, 30)
        below = min((self._moment(self.line - s) - here + 64 + s * near) / s for s in back)
        return max(above, below, 1.0) + 8 / self.line + abs(near) * 0.1

    def _walk(self, period: float) -> None:
        """Compute the moments at u = 0, h, 2h, ... until they vanish, turning every node by its own angle."""
        line, step = mpf(self.line), 2 * mpmath.pi / mpf(period)
        self.step, scale = step, mpf(0)
        turns = []
        for law, count in self.laws:
            tilted = [w * mpmath.exp(line * x) for x, w in zip(law.losses, law.weights, strict=True)]
            total = mpmath.fsum(tilted)
            scale += count * mpmath.log(total)
            real = np.array([int(t / total * _ONE) for t in tilted], object)
            keep = real > 0
            angles = [mpmath.expj(step * x) for x, k in zip(law.losses, keep, strict=True) if k]
            turn_re = np.array([int(mpmath.floor(z.real * _ONE)) for z in angles], object)
            turn_im = np.array([int(mpmath.floor(z.imag * _ONE)) for z in angles], object)
            turns.append([real[keep], real[keep] * 0, turn_re, turn_im, count])
        square = mpf(self.mu) ** 2
        self.scale = scale + line * (line + 1) * square / 2
        self.values: list[mpmath.mpc] = []
        quiet = k = 0
        while quiet < 6 and k < _LONGEST:
            u = k * step
            value = mpmath.exp(-(u * u) * square / 2 + 1j * u * (line + mpf(1) / 2) * square)
            lasting = abs(value)
            for turn, (law, _) in zip(turns, self.laws, strict=True):
                re, im, turn_re, turn_im, count = turn
                factor = mpmath.mpc(mpf(int(re.sum())) / _ONE, mpf(int(im.sum())) / _ONE) ** count
                value *= factor
                lasting *= abs(factor) if law.fades else 1
                turn[0] = (re * turn_re - im * turn_im) >> PLACES
                turn[1] = (re * turn_im + im * turn_re) >> PLACES
            s = mpmath.mpc(line, u)
            self.values.append(value / (s * (s + 1)))
            quiet = quiet + 1 if lasting < _SMALL * abs(s * (s + 1)) else 0
            k += 1
        if quiet < 6 or float(k * step) > min((law.highest for law, _ in self.laws), default=math.inf):
            raise Unresolved("the moments do not vanish in time")

    def delta(self, epsilon: mpf | float) -> mpf:
        """Return delta(epsilon), relative error about 1e-20 near the epsilon it was made for."""
        with mpmath.workdps(DIGITS):
            e = mpf(epsilon)
            turn, angle, total = mpmath.expj(-self.step * e), mpmath.mpc(1), -self.values[0].real / 2
            for value in self.values:
                total += (value * angle).real
                angle *= turn
            finite = total * self.step / mpmath.pi * mpmath.exp(self.scale - mpf(self.line) * e)
            kept = mpf(1)
            for law, count in self.laws:
                kept *= (1 - law.certain) ** count
            return min(mpf(1), finite + 1 - kept)


def size_of(outcomes: int, count: int) -> int:
    """Return how many multisets there are."""
    return comb(outcomes + count - 1, count)
