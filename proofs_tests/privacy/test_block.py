"""Wide laws: what is decided by a parabola is what exact arithmetic would decide."""

from __future__ import annotations

import hashlib
from fractions import Fraction

import numpy as np
import pytest

from privfed.privacy.block import BlockSampler, Curve, GaussianCurve, PoissonCurve
from privfed.privacy.interval import exp_negative
from privfed.privacy.keystream import Keystream

CURVES: list[Curve] = [
    kind(Fraction(parameter)) for kind in (GaussianCurve, PoissonCurve) for parameter in (16385, 50000.25, 3e7, 2.0**39)
]


@pytest.mark.parametrize("curve", CURVES, ids=repr)
def test_the_parabolas_keep_to_their_error(curve: Curve) -> None:
    sampler = BlockSampler(curve)
    (start, slope, bend), error = sampler._parabolas, sampler._error
    assert error < 2e-8
    for row in range(0, len(start), 7):
        block = sampler._first + row
        offsets = np.unique(np.linspace(0, curve.width - 1, 60).astype(np.int64))
        points = block * curve.width + curve.mode + offsets
        head = block * curve.width + curve.mode + (curve.width - 1 if block < 0 else 0)
        exact = curve.loss(np.full_like(points, head), points)
        # The reference has errors of its own, up to 2^-37.
        assert np.abs(start[row] + offsets * (slope[row] + offsets * bend[row]) - exact).max() <= error + 2.0**-37


@pytest.mark.parametrize("curve", CURVES, ids=repr)
def test_every_acceptance_is_the_one_of_exact_arithmetic(curve: Curve) -> None:
    """Draw as the sampler does, and decide again in integers."""
    sampler, size = BlockSampler(curve), 300
    key = hashlib.sha256(repr(curve).encode()).digest()
    accepted = sampler._accepted(size, Keystream(lambda count: key[:count])).tolist()
    stream = Keystream(lambda count: key[:count])
    blocks, words = sampler._blocks.sample(size, stream).tolist(), stream.uint64(size).tolist()
    expected = []
    for block, word in zip(blocks, words, strict=True):
        start = block * curve.width + curve.mode
        point = start + ((word >> 32) & (curve.width - 1))
        near = curve.enclose(start + (curve.width - 1 if block < 0 else 0), 80)
        far = curve.enclose(point, 80)
        low, high = exp_negative(max(Fraction(0), far[0] - near[1]), far[1] - near[0], 64)
        uniform = (word & 0xFFFFFFFF) << 32
        assert not (uniform < high and uniform + (1 << 32) > low), "32 bits did not decide: choose another key"
        if uniform + (1 << 32) <= low:
            expected.append(point)
    assert accepted == expected
    assert len(accepted) < size  # some are refused, or nothing was tried
