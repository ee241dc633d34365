"""Renyi divergences at orders where densities underflow: never below the truth, never a warning."""

from __future__ import annotations

import itertools
import math

import mpmath
import numpy as np
import pytest
from mpmath import mpf

from privfed.privacy import events as ev
from privfed.privacy import rdp

ORDERS = [1.5, 2.0, 8.0, 30.0, 64.0, 200.0, 1024.0]


def discrete_gaussian_divergence(sigma: float, shift: int, rate: float, order: float) -> float:
    """Return the divergence of (1-q) f + q f(. - shift) from f by summing every outcome that matters."""
    with mpmath.workdps(30):
        s, q, a = mpf(sigma), mpf(rate), mpf(order)
        low, high = math.floor(-14 * sigma), math.ceil(order * shift + 14 * sigma)
        total = mpmath.nsum(lambda k: mpmath.exp(-(k**2) / (2 * s * s)), [-mpmath.inf, mpmath.inf])
        moment = mpf(0)
        for k in range(low, high + 1):
            base = mpmath.exp(-mpf(k * k) / (2 * s * s)) / total
            ratio = 1 - q + q * mpmath.exp(mpf(2 * k * shift - shift * shift) / (2 * s * s))
            moment += base * ratio**a
        return float(mpmath.log(moment) / (a - 1))


@pytest.mark.parametrize(("sigma", "shift", "rate"), [(0.7, 1, 1.0), (1.0, 1, 1.0), (1.0, 1, 0.1), (3.0, 2, 0.3)])
def test_divergences_of_integer_noise_hold_where_masses_underflow(sigma: float, shift: int, rate: float) -> None:
    inner = ev.DiscreteGaussian(sigma, shift)
    event = inner if rate == 1 else ev.PoissonSampled(rate, inner)
    found = rdp.divergence(event, ORDERS, "add_remove")
    for order, value in zip(ORDERS, found, strict=True):
        truth = discrete_gaussian_divergence(sigma, shift, rate, order)
        assert value >= truth * (1 - 1e-9)
        if order * shift < 10 * sigma:
            assert value <= truth * (1 + 1e-9)


FAR = [
    (ev.Skellam(4.0), "add_remove"),
    (ev.PoissonSampled(0.1, ev.Skellam(4.0)), "add_remove"),
    (ev.PoissonSampled(0.1, ev.DiscreteGaussian(1.0)), "replace_one"),
    (ev.FixedSizeSampled(1, 10, ev.DiscreteGaussian(1.0)), "replace_one"),
    (ev.TruncatedPoisson(0.1, 9, 3, ev.DiscreteGaussian(1.0)), "add_remove"),
    (ev.TruncatedPoisson(0.1, 9, 3, ev.Gaussian(0.3)), "zero_out"),
    (ev.PoissonSampled(0.1, ev.Gaussian(0.05)), "replace_one"),
    (ev.PoissonSampled(0.1, ev.Laplace(0.01)), "replace_one"),
    (ev.RandomAllocation(4, ev.Gaussian(0.3)), "add_remove"),
]


@pytest.mark.parametrize(("event", "relation"), FAR)
def test_divergences_rise_with_the_order(event: ev.Event, relation: str) -> None:
    """True of every divergence; a value that falls has lost mass to underflow."""
    found = rdp.divergence(event, [*ORDERS, 1e4], relation)
    assert np.isfinite(found).all()
    assert (np.diff(found) >= -1e-9 * found[1:]).all()


def test_extreme_distributed_noise_is_infinite_and_not_a_warning() -> None:
    """Warnings are errors in this suite."""
    sizes = [0.0, 1e-300, 1e-100, 1.0, 1e100]
    for stddev, clip, scale, survivors in itertools.product(sizes, sizes, [1e-100, 1.0, 1e100], [0, 1, 10**6]):
        for kind in (ev.DistributedSkellam, ev.DistributedDiscreteGaussian):
            event = kind(stddev, clip, scale, 10, survivors, 2**20, 0.0)
            for asked in (event, ev.PoissonSampled(0.1, event)):
                found = rdp.divergence(asked, [1.1, 2.0, 64.0], "add_remove")
                assert not np.isnan(found).any()
                assert (found >= 0).all()
                if clip > 0 and (survivors == 0 or stddev == 0):
                    assert np.isinf(found).all()
