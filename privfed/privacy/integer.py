"""Pairs of noise on the integers: discrete Gaussian, discrete Laplace, Skellam; masses summed, tails bounded."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy import special

from privfed.privacy import events as ev
from privfed.privacy.atoms import Atoms, OutOfRange
from privfed.privacy.pair import Floats

Law = Callable[[npt.NDArray[np.int64]], Floats]
_LARGEST = 2_000_000  # outcomes kept
_RARE = 1e-280  # left out


def integer_pair(event: ev.Event, rate: float, antipodal: bool, distance: int) -> Atoms | None:
    """Return (1-rate) f + rate f(. - d) against f, or against its mirror image if `antipodal`; None for other events.

    Outcomes that only P has count as certain. f is log-concave, so threshold tests are best as for real noise.
    """
    if not isinstance(event, (ev.DiscreteGaussian, ev.DiscreteLaplace, ev.Skellam)):
        return None
    shift = distance * event.sensitivity
    if isinstance(event, ev.DiscreteLaplace):
        return _laplace_pair(event.scale, rate, antipodal, shift)
    reach, log_mass = _law(event)
    k = np.arange(-reach - shift, reach + shift + 1)
    here, up = log_mass(k), log_mass(k - shift)
    p = (1 - rate) * np.exp(here) + rate * np.exp(up)
    q = (1 - rate) * np.exp(here) + rate * np.exp(log_mass(k + shift)) if antipodal else np.exp(here)
    cut = isinstance(event, ev.DiscreteGaussian) and event.truncation is not None and reach == event.truncation
    only, lost = float(p[q == 0].sum()), float(q[p == 0].sum())
    if not cut:
        if max(only, lost) > _RARE:
            raise OutOfRange("a mass underflows where the other does not matter little")
        only = lost = 0.0
    both = (p > 0) & (q > 0)
    keep_p, keep_q = p[both], q[both]
    spacing = shift / event.sigma**2 if isinstance(event, ev.DiscreteGaussian) and rate == 1 else 0.0
    return Atoms(keep_p, keep_q, only, rounding=1e-13, spacing=spacing, lost=lost, endless=not cut)


def _laplace_pair(scale: float, rate: float, antipodal: bool, shift: int) -> Atoms:
    """Return the pair of discrete Laplace noise: beyond both centres all masses fall alike, so that is one outcome."""
    if scale == 0:
        raise OverflowError("no noise")
    k = np.arange(-shift if antipodal else 0, _checked(shift) + 1)
    ratio = -math.expm1(-1 / scale)  # of a mass to all from there outwards

    def masses(centre: int) -> Floats:
        found = np.asarray(np.exp(-np.abs(k - centre) / scale) * math.tanh(1 / (2 * scale)))
        found[[0, -1]] /= ratio
        return found

    p = (1 - rate) * masses(0) + rate * masses(shift)
    q = (1 - rate) * masses(0) + rate * masses(-shift) if antipodal else masses(0)
    if min(float(p.min()), float(q.min())) < _RARE:
        raise OutOfRange("a mass underflows where the other does not matter little")
    return Atoms(p, q, rounding=1e-13, spacing=2 / scale if rate == 1 else 0.0)


def _law(event: ev.DiscreteGaussian | ev.Skellam) -> tuple[int, Law]:
    """Return how far from 0 outcomes matter (mass beyond is below 1e-290) and the log masses of integers."""
    if isinstance(event, ev.DiscreteGaussian):
        sigma = event.sigma
        if sigma == 0 or event.truncation == 0:
            raise OverflowError("no noise")
        reach = math.ceil(36.5 * sigma) + 1
        if event.truncation is not None:
            reach = min(reach, event.truncation)
        size = _checked(reach)
        k = np.arange(-size, size + 1)
        total = math.log(float(np.exp(-(k**2) / (2 * sigma**2)).sum()))
        limit = math.inf if event.truncation is None else event.truncation
        return size, lambda x: np.where(np.abs(x) <= limit, -(x.astype(float) ** 2) / (2 * sigma**2) - total, -np.inf)
    if event.variance == 0:
        raise OverflowError("no noise")
    mean = event.variance
    reach = _checked(math.ceil(38 * math.sqrt(mean) + 160))
    return reach, lambda x: log_skellam(x, mean)


def log_skellam(k: npt.NDArray[np.int64], variance: float) -> Floats:
    """Return log masses of the difference of two Poisson(variance / 2), by scaled Bessel functions."""
    size = np.abs(k).astype(float)
    with np.errstate(divide="ignore"):
        direct = np.log(special.ive(size, variance))
    start = size * (math.log(variance / 2) if variance > 0 else 0.0) - special.gammaln(size + 1) - variance
    rest = (variance / 2) ** 2 / (size + 1)
    # Where the function underflows, so does the mass, unless the variance is tiny: then the series' first term is an
    # upper bound within rest^2.
    series = np.where(rest < 0.5, start + rest, -np.inf)
    return np.where(np.isfinite(direct), direct, series)


def _checked(reach: int) -> int:
    if 2 * reach > _LARGEST:
        raise ValueError(f"event: noise this wide has {2 * reach} outcomes; use its continuous counterpart")
    return reach
