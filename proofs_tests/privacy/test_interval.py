"""Enclosures hold without exception, and are as narrow as they were asked to be."""

from __future__ import annotations

from fractions import Fraction

import mpmath
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.privacy.interval import exp_negative, log, log_factorial


@given(st.fractions(0, 200, max_denominator=10**9), st.sampled_from([32, 100, 256]))
@settings(max_examples=60, deadline=None)
def test_exponential_is_enclosed(x: Fraction, bits: int) -> None:
    with mpmath.workprec(700):
        truth = mpmath.exp(-mpmath.mpf(x.numerator) / x.denominator) * mpmath.mpf(2) ** bits
        low, high = exp_negative(x, x, bits)
        assert low <= truth <= high
        assert high - low <= 2


@given(st.fractions(Fraction(1, 10**12), 10**12, max_denominator=10**12), st.sampled_from([32, 100, 256]))
@settings(max_examples=60, deadline=None)
def test_logarithm_is_enclosed(x: Fraction, bits: int) -> None:
    with mpmath.workprec(700):
        truth = mpmath.log(mpmath.mpf(x.numerator) / x.denominator) * mpmath.mpf(2) ** bits
        low, high = log(x, bits)
        assert low <= truth <= high
        assert high - low <= 8


@given(st.integers(64, 10**12), st.sampled_from([32, 100, 200]))
@settings(max_examples=60, deadline=None)
def test_factorial_is_enclosed(number: int, bits: int) -> None:
    with mpmath.workprec(700):
        truth = (mpmath.loggamma(number + 1) - mpmath.log(2 * mpmath.pi) / 2) * mpmath.mpf(2) ** bits
        low, high = log_factorial(number, bits)
        assert low <= truth <= high
        assert high - low <= 64
