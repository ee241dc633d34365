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
    points = np.empty(size, np.int64)
    refused = sampler._attempt(points, Keystream(lambda count: key[:count])).tolist()
    stream, short, place = Keystream(lambda count: key[:count]), curve.width <= 1 << 20, curve.width.bit_length() - 1
    blocks = (sampler._blocks.places(size, stream) + sampler._first).tolist()
    words = (stream.uint32(size) if short else stream.uint64(size)).tolist()
    left, bits = sampler._points(np.empty(size, np.int64), Keystream(lambda count: key[:count]))
    open_ = dict(zip(left.tolist(), bits.tolist(), strict=True))
    expected = []
    for index, (block, word) in enumerate(zip(blocks, words, strict=True)):
        start = block * curve.width + curve.mode
        assert points[index] == start + (word & (curve.width - 1))
        near = curve.enclose(start + (curve.width - 1 if block < 0 else 0), 80)
        far = curve.enclose(int(points[index]), 80)
        low, high = exp_negative(max(Fraction(0), far[0] - near[1]), far[1] - near[0], 64)
        first, known = word >> (place if short else 32), 32 - place if short else 32
        if index not in open_:  # accepted by the bits beside the place, so whatever the others would have been
            assert first + 1 << 64 - known <= low
            continue
        assert open_[index] >> 32 - known == first
        uniform = open_[index] << 32
        assert not (uniform < high and uniform + (1 << 32) > low), "32 bits did not decide: choose another key"
        if uniform >= high:
            expected.append(index)
    assert refused == expected
    assert refused  # or nothing was tried
    assert len(open_) < size / 5  # most are accepted at once
