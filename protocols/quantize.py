"""Numbers to ring elements and back: fixed point with a stated error, and an error instead of a wrap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.protocols.errors import LocalError, RangeError
from privfed.protocols.prg import Words, word

_EXACT = 1 << 52
"""Largest level: beyond it a float64 cannot tell neighbouring levels apart."""


def to_ring(values: NDArray[np.int64], bits: int) -> Words:
    """Return signed integers as residues modulo 2^bits."""
    mask = np.uint64((1 << bits) - 1)
    residues = values.astype(np.int64, copy=False).view(np.uint64) & mask
    return residues if bits > 32 else residues.astype(np.uint32)


def from_ring(residues: Words, bits: int) -> NDArray[np.int64]:
    """Return the signed integers in -2^(bits-1) .. 2^(bits-1) - 1 that the residues stand for."""
    shift = np.uint64(64 - bits)
    return (residues.astype(np.uint64) << shift).view(np.int64) >> shift.astype(np.int64)


def check_sum(largest: int, clients: int, bits: int) -> None:
    """Raise RangeError when a sum of `clients` integers of size up to `largest` could leave the ring."""
    if largest * clients >= 1 << (bits - 1):
        raise RangeError(
            f"{clients} inputs of size up to {largest} could sum to 2^{bits - 1} or more in a ring of {bits} bits: "
            "use more bits or smaller inputs"
        )


LEAST_BOUND = 2.0**-900
"""The step of a grid with a smaller bound would be no normal float64, or its inverse infinite."""


@dataclass(frozen=True, slots=True)
class FixedPoint:
    """A public grid for values of size up to `bound`, so fine that `clients` of them cannot wrap in 2^bits.

    Guarantees: decode(sum of encode(x_i)) differs from the sum of x_i by at most `error_bound` in every entry.
    """

    bound: float
    clients: int
    bits: int

    def __post_init__(self) -> None:
        word(self.bits)
        if not (np.isfinite(self.bound) and self.bound > 0):
            raise ValueError(f"bound must be finite and > 0, got {self.bound}")
        if self.bound < LEAST_BOUND:
            raise ValueError(f"bound must be at least 2^-900, got {self.bound}: float64 has no steps so small")
        if self.clients < 1:
            raise ValueError(f"clients must be >= 1, got {self.clients}")
        if ((1 << (self.bits - 1)) - 1) // self.clients < 1:
            raise RangeError(f"{self.clients} clients do not fit a ring of {self.bits} bits: use more bits")

    @property
    def levels(self) -> int:
        """Largest integer a client may send."""
        return min(((1 << (self.bits - 1)) - 1) // self.clients, _EXACT)

    @property
    def step(self) -> float:
        """Distance between neighbouring grid points."""
        return self.bound / self.levels

    @property
    def error_bound(self) -> float:
        """Largest error of an entry of the sum: half a step a client, and the rounding of the float64 result."""
        return self.clients * (self.step / 2 + self.bound * 2.0**-51)

    def integers(self, values: NDArray[Any]) -> NDArray[np.int64]:
        """Round to the nearest grid point. Raises LocalError on NaN, RangeError beyond the bound."""
        exact = np.asarray(values, dtype=np.float64)
        largest = np.abs(exact).max(initial=0.0)
        if not np.isfinite(largest):
            raise LocalError("the input has a NaN or an infinite entry")
        if largest > self.bound:
            raise RangeError(f"an entry of size {largest:.6g} exceeds the bound {self.bound:.6g}: clip before masking")
        scaled = np.rint(exact * (self.levels / self.bound)).astype(np.int64)
        return np.clip(scaled, -self.levels, self.levels)

    def encode(self, values: NDArray[Any]) -> Words:
        """Return the ring elements of float values."""
        return to_ring(self.integers(values), self.bits)

    def decode(self, residues: Words) -> NDArray[np.float64]:
        """Return the float64 values that a sum of encoded vectors stands for."""
        return from_ring(residues, self.bits).astype(np.float64) * self.step
