"""Dominating pairs (P, Q): two laws of one number, seen through their privacy loss L = log dP/dQ.

A pair answers `masses(edges)`: P and Q mass of the cells (-inf, e0], (e0, e1], ..., (en, inf) of the loss, with bounds
on their rounding errors; `nodes(reach)`: points and P-weights that integrate exp(s L) for real s up to `reach`;
`span(tail)`: an interval of losses outside which P has at most mass `tail` above and Q at most `tail` below; and
`profile(epsilon)`: the exact hockey stick of one use.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from scipy import special

Floats = npt.NDArray[np.float64]
ULP = 2.0**-52
MOST_NODES = 500_000  # of one quadrature
_CDF = 4 * ULP  # relative error of scipy's normal distribution function in its small tail; tested, half of it is seen
_RAREST = 1e-307  # tails below underflow


class Masses(NamedTuple):
    """P and Q masses of cells of the loss, and bounds on the absolute errors of both."""

    p: Floats
    q: Floats
    p_error: Floats
    q_error: Floats


class Pair(Protocol):
    """See the module."""

    def __hash__(self) -> int:
        """Return a hash: what is known of a pair is kept under it."""

    def masses(self, edges: Floats) -> Masses:
        """Return masses of the len(edges) + 1 cells between increasing finite edges."""

    def nodes(self, reach: float, wave: float = 0.0) -> tuple[Floats, Floats]:
        """Return losses and weights with sum(w exp(s L)) = E_P exp(s L) for 0 <= Re s <= reach, |Im s| <= wave."""

    def positive_nodes(self, reach: float, wave: float = 0.0) -> tuple[Floats, Floats]:
        """Return the same for the part of P where the loss is positive."""

    def span(self, tail: float) -> tuple[float, float]:
        """Return (low, high): P(L > high) <= tail and Q(L < low) <= tail."""

    def profile(self, epsilon: float) -> float:
        """Return sup over events S of P(S) - exp(epsilon) Q(S)."""


def _tails(x: Floats) -> tuple[Floats, Floats]:
    return special.ndtr(x), special.ndtr(-x)


def _room(x: Floats, growth: Floats) -> Floats:
    """Return by how much more than its own rounding a cell's mass may be off: the worse of its two edges."""
    growth = np.where(np.isfinite(x), growth, 0.0)
    return np.asarray(1 + np.maximum(np.append(growth, 0.0), np.append(0.0, growth)))


def between(lower: Floats, upper: Floats) -> tuple[Floats, Floats]:
    """Return cell masses and error bounds, from distribution functions (left, right tail) at the edges."""
    left = np.concatenate(([0.0], lower, [1.0]))
    right = np.concatenate(([1.0], upper, [0.0]))
    use_left = left[1:] < 0.5
    mass = np.where(use_left, np.diff(left), -np.diff(right))
    error = _CDF * np.where(use_left, left[1:] + left[:-1], right[1:] + right[:-1]) + _RAREST
    return np.maximum(mass, 0.0), error


@dataclass(frozen=True)
class NormalPair:
    """(1-q) N(0,1) + q N(mu,1) against N(0,1), or against (1-q) N(0,1) + q N(-mu,1) if `antipodal`."""

    mu: float
    rate: float = 1.0
    antipodal: bool = False

    def loss(self, x: Floats) -> Floats:
        """Return the loss at x; it increases."""
        up = _log_mixture(self.rate, self.mu * x - self.mu**2 / 2)
        return up - _log_mixture(self.rate, -self.mu * x - self.mu**2 / 2) if self.antipodal else up

    def place(self, losses: Floats) -> Floats:
        """Return x with that loss; -inf below the smallest loss."""
        mu, rate = self.mu, self.rate
        if self.antipodal:  # 2 sinh(mu x - loss / 2) = (1 / rate - 1) exp(mu^2 / 2) 2 sinh(loss / 2), by logarithms
            size = np.abs(losses)
            with np.errstate(divide="ignore", over="ignore"):
                log_half = mu**2 / 2 + math.log((1 - rate) / (2 * rate)) + np.log(-np.expm1(-size)) + size / 2
                turned = np.where(log_half > 20, log_half + math.log(2), np.arcsinh(np.exp(np.minimum(log_half, 20.0))))
            return np.asarray(np.sign(losses) * (size / 2 + turned) / mu, dtype=np.float64)
        if rate == 1:
            return losses / mu + mu / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            big = losses + np.log1p(-(1 - rate) * np.exp(-np.maximum(losses, 0.0)))
            rise = np.log(np.maximum(np.expm1(np.minimum(losses, 1.0)) + rate, 0.0))
            return (np.where(losses > 0.5, big, rise) - math.log(rate)) / mu + mu / 2

    def masses(self, edges: Floats) -> Masses:
        """Return masses from normal distribution functions at the places of the edges."""
        x = self.place(edges)
        base, base_error = between(*_tails(x))
        shifted, shifted_error = between(*_tails(x - self.mu))
        # A place is known to a few ulp of |x| + mu, and the tail beyond it changes by as much as it lies out.
        near = _room(x, np.abs(x) * (np.abs(x) + self.mu) + self.mu / 4)
        far = _room(x, (np.abs(x) + self.mu) ** 2)
        keep, rate = 1 - self.rate, self.rate
        p = keep * base + rate * shifted
        p_error = keep * base_error * near + rate * shifted_error * far
        if not self.antipodal:
            return Masses(p, base, p_error, base_error * near)
        other, other_error = between(*_tails(x + self.mu))
        q = keep * base + rate * other
        return Masses(p, q, p_error, keep * base_error * near + rate * other_error * far)

    def nodes(self, reach: float, wave: float = 0.0) -> tuple[Floats, Floats]:
        """Return the trapezoid rule in x: spectrally accurate, the integrand is analytic in a strip."""
        step = min(0.2, 0.5 / self.mu, 2 * math.pi / (14 + 1.1 * wave * self.mu * (2 if self.antipodal else 1)))
        low = -13.0 - self.mu
        high = 13.0 + self.mu * (reach + 1)
        if high - low > MOST_NODES * step:
            raise OverflowError(f"losses of a noise multiplier of {1 / self.mu:g} are too far apart for a quadrature")
        x = np.arange(low, high + step, step)
        return self.loss(x), step * self._density(x)

    def _density(self, x: Floats) -> Floats:
        base, shifted = np.exp(-x * x / 2), np.exp(-((x - self.mu) ** 2) / 2)
        return ((1 - self.rate) * base + self.rate * shifted) / math.sqrt(2 * math.pi)

    def positive_nodes(self, reach: float, wave: float = 0.0) -> tuple[Floats, Floats]:
        """Return Gauss-Legendre panels from where the loss is 0."""
        start = float(self.place(np.array([0.0]))[0])
        stop = 13.0 + self.mu * (reach + 1)
        x, weights = panels(start, stop, max(1.0, self.mu * 2, wave * self.mu / 8))
        return self.loss(x), weights * self._density(x)

    def span(self, tail: float) -> tuple[float, float]:
        """Return the losses at the quantiles."""
        reach = -float(special.ndtri(max(tail, 1e-300)))
        back = reach + (self.mu if self.antipodal else 0.0)
        ends = self.loss(np.array([-back, self.mu + reach]))
        return float(ends[0]), float(ends[1])

    def profile(self, epsilon: float) -> float:
        """Return the hockey stick: the best test is a threshold in x."""
        x = float(self.place(np.array([epsilon]))[0])
        if x == -math.inf:
            return -math.expm1(epsilon)
        growth = math.exp(epsilon)
        if self.antipodal:
            return float(
                (1 - self.rate) * (1 - growth) * special.ndtr(-x)
                + self.rate * (special.ndtr(self.mu - x) - growth * special.ndtr(-self.mu - x))
            )
        inner = math.expm1(epsilon) / self.rate  # of the likelihood ratio of the unsampled pair, minus 1
        return float(self.rate * (special.ndtr(self.mu - x) - (1 + inner) * special.ndtr(-x)))


@lru_cache(maxsize=1)
def _legendre() -> tuple[Floats, Floats]:
    return np.polynomial.legendre.leggauss(32)


def panels(start: float, stop: float, density: float) -> tuple[Floats, Floats]:
    """Return points and weights of 32-point Gauss-Legendre panels, about `density` panels per unit length."""
    points, weights = _legendre()
    count = min(6000, max(1, math.ceil((stop - start) * density)))
    half = (stop - start) / count / 2
    left = start + 2 * half * np.arange(count)
    return (left[:, None] + half * (1 + points)).ravel(), np.tile(weights * half, count)


def _log_mixture(rate: float, exponent: Floats) -> Floats:
    """Return log(1 - rate + rate exp(exponent))."""
    if rate == 1:
        return exponent
    with np.errstate(over="ignore"):
        small = np.log1p(rate * np.expm1(np.minimum(exponent, 30.0)))
    return np.where(exponent > 30.0, np.logaddexp(exponent + math.log(rate), math.log1p(-rate)), small)


@dataclass(frozen=True)
class LaplacePair:
    """The same three pairs for Laplace laws of scale 1 at distance mu; the losses end in atoms."""

    mu: float
    rate: float = 1.0
    antipodal: bool = False

    def loss(self, x: Floats) -> Floats:
        """Return the loss at x."""
        up = _log_mixture(self.rate, np.clip(2 * x - self.mu, -self.mu, self.mu))
        return up - _log_mixture(self.rate, np.clip(-2 * x - self.mu, -self.mu, self.mu)) if self.antipodal else up

    def place(self, losses: Floats) -> Floats:
        """Return the largest x with at most that loss."""
        ends = self.loss(np.array([-self.mu, 0.0, self.mu]))
        rate, mu = self.rate, self.mu
        size = np.abs(losses) if self.antipodal else losses
        if self.antipodal:
            size = size + float(_log_mixture(rate, np.array([-mu]))[0])
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            x = (np.log(np.maximum(np.expm1(size) + rate, 0.0) / rate) + mu) / 2
        x = np.sign(losses) * np.maximum(x, 0.0) if self.antipodal else x
        first = ends[0] if self.antipodal else ends[1]
        return np.where(losses >= ends[2], math.inf, np.where(losses < first, -math.inf, x))

    def _cells(self, x: Floats) -> tuple[Floats, Floats]:
        with np.errstate(over="ignore"):
            lower = np.where(x < 0, np.exp(np.minimum(x, 0.0)) / 2, 1 - np.exp(-np.maximum(x, 0.0)) / 2)
            upper = np.where(x < 0, 1 - np.exp(np.minimum(x, 0.0)) / 2, np.exp(-np.maximum(x, 0.0)) / 2)
        return between(lower, upper)

    def masses(self, edges: Floats) -> Masses:
        """Return masses from Laplace distribution functions at the places of the edges."""
        x = self.place(edges)
        base, base_error = self._cells(x)
        shifted, shifted_error = self._cells(x - self.mu)
        other, other_error = (self._cells(x + self.mu)) if self.antipodal else (base, base_error)
        back = self.rate if self.antipodal else 0.0
        keep = 1 - self.rate
        return Masses(
            keep * base + self.rate * shifted,
            (1 - back) * base + back * other,
            4 * (keep * base_error + self.rate * shifted_error),
            4 * ((1 - back) * base_error + back * other_error),
        )

    def nodes(self, reach: float, wave: float = 0.0) -> tuple[Floats, Floats]:
        """Return Gauss-Legendre panels between the kinks, and the two atoms."""
        kinks = (-self.mu, 0.0, self.mu) if self.antipodal else (0.0, self.mu)
        first = kinks[0]
        below = (1 - self.rate) * math.exp(first) / 2 + self.rate * math.exp(first - self.mu) / 2
        rest, weights = self._between(kinks, reach, wave)
        atom = self.loss(np.array([first]))
        return np.concatenate((atom, rest)), np.concatenate(([below], weights))

    def positive_nodes(self, reach: float, wave: float = 0.0) -> tuple[Floats, Floats]:
        """Return panels from where the loss is 0, and the upper atom."""
        start = float(self.place(np.array([0.0]))[0])
        return self._between((start, self.mu), reach, wave)

    def _between(self, kinks: tuple[float, ...], reach: float, wave: float) -> tuple[Floats, Floats]:
        above = (1 - self.rate) * math.exp(-self.mu) / 2 + self.rate / 2
        # The loss has slope 2, so |s L| varies by 12 to each side within a panel: far less than 32 points resolve; and
        # where P is a mixture, its zeros are pi / 2 from the real axis.
        density = max(1 / 3, (1 + reach + wave) / 12)
        parts = [panels(a, b, density) for a, b in pairwise(kinks)]
        x = np.concatenate([part[0] for part in parts])
        law = ((1 - self.rate) * np.exp(-np.abs(x)) + self.rate * np.exp(-np.abs(x - self.mu))) / 2
        weights = np.concatenate([part[1] for part in parts]) * law
        return np.append(self.loss(x), self.loss(np.array([self.mu]))), np.append(weights, above)

    def ends(self) -> tuple[float, float]:
        """Return the losses of the two atoms."""
        ends = self.loss(np.array([-self.mu, self.mu]))
        return float(ends[0]), float(ends[1])

    def top(self) -> tuple[float, float]:
        """Return the largest loss and its P mass."""
        mass = (1 - self.rate) * math.exp(-self.mu) / 2 + self.rate / 2
        return float(self.loss(np.array([self.mu]))[0]), mass

    def span(self, tail: float) -> tuple[float, float]:
        """Return the two atoms, a hair outwards."""
        ends = self.loss(np.array([-self.mu, self.mu]))
        return float(ends[0]) * (1 + 1e-12) - 1e-300, float(ends[1]) * (1 + 1e-12)

    def profile(self, epsilon: float) -> float:
        """Return the hockey stick: the best test is a threshold in x."""
        x = self.place(np.array([epsilon]))
        if x[0] == math.inf:
            return 0.0
        masses = self.masses(np.array([epsilon]))
        return max(0.0, float(masses.p[1] - math.exp(epsilon) * masses.q[1]))
