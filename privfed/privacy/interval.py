"""Enclosures in integer arithmetic: every function returns lower and upper bounds that hold without rounding error.

A pair `(lower, upper)` of integers at `bits` encloses x when lower <= x * 2^bits <= upper. Nothing here is
floating point, so a table built from these bounds is known to as many bits as it was asked for.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache

Enclosure = tuple[int, int]


def divide_up(numerator: int, denominator: int) -> int:
    """Divide and round towards plus infinity; the denominator is positive."""
    return -(-numerator // denominator)


def shift_up(value: int, count: int) -> int:
    """Divide by 2^count and round towards plus infinity."""
    return -(-value >> count)


def enclose(value: Fraction, bits: int) -> Enclosure:
    """Enclose a rational number at `bits`."""
    scaled = value.numerator << bits
    return scaled // value.denominator, divide_up(scaled, value.denominator)


def exp_negative(lower: Fraction, upper: Fraction, bits: int) -> Enclosure:
    """Enclose exp(-x) at `bits` for any 0 <= lower <= x <= upper.

    exp(x / 2^s) is summed (all terms positive, so floors bound from below and ceilings from above), squared s
    times and inverted.
    """
    if lower > bits:  # exp(-bits) < 2^-bits
        return 0, 1
    halvings = int(upper).bit_length() + 8
    work = bits + halvings + 32
    low = (lower.numerator << work) // (lower.denominator << halvings)
    high = divide_up(upper.numerator << work, upper.denominator << halvings)
    sum_low = term_low = sum_high = term_high = 1 << work
    count = 0
    while term_high > 1:
        count += 1
        term_low = (term_low * low >> work) // count
        term_high = divide_up(shift_up(term_high * high, work), count)
        sum_low += term_low
        sum_high += term_high
    sum_high += 1  # the remaining terms shrink by more than half each: their sum is below the last term
    for _ in range(halvings):
        sum_low = sum_low * sum_low >> work
        sum_high = shift_up(sum_high * sum_high, work)
    return (1 << work + bits) // sum_high, divide_up(1 << work + bits, sum_low)


def _atanh(numerator: int, denominator: int, bits: int) -> Enclosure:
    """Enclose atanh(numerator / denominator) at `bits`, for a ratio in [0, 1/2]."""
    work = bits + 16
    square = numerator * numerator
    divisor = denominator * denominator
    low, high = (numerator << work) // denominator, divide_up(numerator << work, denominator)
    sum_low = sum_high = 0
    odd = 1
    while high > 1:
        sum_low += low // odd
        sum_high += divide_up(high, odd)
        low = low * square // divisor
        high = divide_up(high * square, divisor)
        odd += 2
    sum_high += 2  # a geometric remainder of ratio at most 1/4 after a term of at most one unit
    return sum_low >> 16, shift_up(sum_high, 16)


@cache
def _log_two(bits: int) -> Enclosure:
    low, high = _atanh(1, 3, bits + 1)
    return low, high


def log(value: Fraction, bits: int) -> Enclosure:
    """Enclose the natural logarithm of a positive rational at `bits`."""
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    mantissa = value / (Fraction(2) ** exponent)  # in (1/2, 2)
    difference, total = mantissa.numerator - mantissa.denominator, mantissa.numerator + mantissa.denominator
    low, high = _atanh(abs(difference), total, bits + 1)
    if difference < 0:
        low, high = -high, -low
    guard = abs(exponent).bit_length() + 1
    two_low, two_high = _log_two(bits + guard)
    # _log_two holds ln 2 / 2 at one bit more, which is ln 2 at the bits asked for.
    part_low, part_high = sorted((exponent * two_low, exponent * two_high))
    return low + (part_low >> guard), high + shift_up(part_high, guard)


@cache
def bernoulli(index: int) -> Fraction:
    """Return the Bernoulli number of that even index."""
    numbers = [Fraction(1)]
    for m in range(1, index + 1):
        binomial, total = 1, Fraction(0)
        for k in range(m):
            total += binomial * numbers[k]
            binomial = binomial * (m + 1 - k) // (k + 1)
        numbers.append(-total / (m + 1))
    return numbers[index]


def log_factorial(number: int, bits: int) -> Enclosure:
    """Enclose ln(number!) - ln(2 pi) / 2 at `bits`, for number >= 64 and bits <= 4 * number.

    Stirling's series; its error is below the first omitted term. The constant cancels in every ratio.
    """
    guard = number.bit_length() + 2
    log_low, log_high = log(Fraction(number), bits + guard)
    low = ((2 * number + 1) * log_low >> guard + 1) - (number << bits)
    high = shift_up((2 * number + 1) * log_high, guard + 1) - (number << bits)
    index = 1
    while True:
        term = bernoulli(2 * index) / (2 * index * (2 * index - 1) * number ** (2 * index - 1))
        term_low, term_high = enclose(term, bits)
        if term_high - term_low <= 1 and -1 <= term_low <= term_high <= 1:
            return low - 1, high + 1
        low, high = low + term_low, high + term_high
        index += 1
