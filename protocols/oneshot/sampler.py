"""True discrete Gaussians of standard deviation 6.4, drawn by inverting a table of cumulative probabilities.

A draw compares 80 uniform bits with 170 thresholds, each the exact cumulative probability times 2^80,
rounded. Sixteen bits decide all but 0.3 % of the draws (first level: a table of 65536 answers); the others
read 64 more (second level: the thresholds that share those sixteen bits). No binomial, no rounded continuous
Gaussian: the argument of docs/oneshot-security.md needs the discrete one. Table look-ups are not constant
time.
"""

from __future__ import annotations

import decimal
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

SD = "6.4"
"""Standard deviation of every secret and error coefficient, exactly."""
SIGMA = float(SD)
CUT = 85
"""Values beyond 13.3 standard deviations (total probability below 2^-127) are never drawn."""
PRECISION = 80
"""A cumulative probability is a multiple of 2^-PRECISION: 2^-74 in total variation per draw."""

_FIRST = 16
_SECOND = PRECISION - _FIRST
_AMBIGUOUS = -128


def thresholds() -> list[int]:
    """Compute round(2^80 * P[X <= k]) for k = -CUT .. CUT - 1, X a discrete Gaussian around 0."""
    with decimal.localcontext() as context:
        context.prec = 80
        denominator = 2 * decimal.Decimal(SD) ** 2
        weights = [(-decimal.Decimal(k * k) / denominator).exp() for k in range(-CUT, CUT + 1)]
        total, scale = sum(weights), decimal.Decimal(2**PRECISION)
        running, out = decimal.Decimal(0), []
        for weight in weights[:-1]:
            running += weight
            out.append(int((running / total * scale).to_integral_value(decimal.ROUND_HALF_EVEN)))
        return out


@dataclass(frozen=True, slots=True)
class _Table:
    """first: answer for each 16-bit prefix, or _AMBIGUOUS. second: prefix -> (least answer, low 64 bits)."""

    first: NDArray[np.int8]
    second: dict[int, tuple[int, NDArray[np.uint64]]]


@cache
def _table() -> _Table:
    edges = thresholds()
    prefixes = np.array([edge >> _SECOND for edge in edges])
    below = np.searchsorted(prefixes, np.arange(1 << _FIRST), side="left")
    first = (below - CUT).astype(np.int8)
    second = {}
    for prefix in sorted(set(prefixes.tolist()) & set(range(1 << _FIRST))):
        lows = [edge & ((1 << _SECOND) - 1) for edge in edges if edge >> _SECOND == prefix]
        second[prefix] = (int(first[prefix]), np.array(lows, dtype=np.uint64))
        first[prefix] = _AMBIGUOUS
    first.setflags(write=False)
    return _Table(first, second)


def draw(count: int, keystream: Callable[[int], bytes]) -> NDArray[np.int8]:
    """Draw `count` independent discrete Gaussians of standard deviation 6.4, |value| <= 85.

    keystream(n) returns the next n secret uniform bytes: 2 per value, then 8 per undecided one, in order.
    A value is the number of thresholds <= the 80 bits read (little-endian prefix first), minus 85.
    """
    table = _table()
    prefix = np.frombuffer(keystream(2 * count), dtype="<u2")
    out: NDArray[np.int8] = table.first[prefix]
    open_ = np.flatnonzero(out == _AMBIGUOUS)
    if len(open_):
        rest = np.frombuffer(keystream(8 * len(open_)), dtype="<u8")
        asked = prefix[open_]
        for bucket in np.unique(asked).tolist():
            least, lows = table.second[bucket]
            here = asked == bucket
            out[open_[here]] = least + np.searchsorted(lows, rest[here], side="right")
    return out
