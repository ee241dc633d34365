"""Arithmetic in R_q = Z_q[X]/(X^2048 + 1), q = 2^54, exact, with float64 FFTs.

Coefficients are stored *folded*: a polynomial is the row (x_0, x_1024, x_1, x_1025, ...), which read as
complex numbers is the polynomial modulo X^1024 - i, so that a negacyclic product is a twisted FFT of length
1024. Residues are uint64 modulo 2^64; only the low 54 bits count, and nothing masks them before the wire
does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.fft
from numpy.typing import NDArray

N = 2048
"""Ring dimension."""
LOG_Q = 54
"""Residues are modulo q = 2^54."""
LIMB = 27
"""A public polynomial is two centred limbs of 27 bits."""

Words = NDArray[np.uint64]
Limbs = NDArray[np.int32]

_HALF = N // 2
_GUARD = 0.25
"""A product further than this from an integer may have been rounded wrongly: split the limbs further."""
_FFT_ERROR = 40 * 2.0**-53
"""Worst-case error of the twisted product, relative to the product of the factors' Euclidean norms."""


class RoundingError(ArithmeticError):
    """A float64 product was too far from an integer to be trusted."""


def _twist() -> NDArray[np.complex128]:
    out: NDArray[np.complex128] = np.exp(1j * np.pi * np.arange(_HALF) / N)
    return out


_TWIST = _twist()
_UNTWIST = _TWIST.conj()


def fold(plain: NDArray[Any]) -> NDArray[Any]:
    """Reorder the last axis from x_0, x_1, ... to folded order."""
    return np.stack([plain[..., :_HALF], plain[..., _HALF:]], axis=-1).reshape(plain.shape)


def unfold(folded: NDArray[Any]) -> NDArray[Any]:
    """Reorder the last axis from folded order to x_0, x_1, ..."""
    pairs = folded.reshape(*folded.shape[:-1], _HALF, 2)
    return np.concatenate([pairs[..., 0], pairs[..., 1]], axis=-1)


def _forward(folded: NDArray[np.float64]) -> NDArray[np.complex128]:
    """Transform float64[..., 2048] in place."""
    z = folded.view(np.complex128)
    z *= _TWIST
    out: NDArray[np.complex128] = scipy.fft.fft(z, axis=-1, overwrite_x=True)
    return out


def _backward(spectrum: NDArray[np.complex128]) -> NDArray[np.float64]:
    out: NDArray[np.complex128] = scipy.fft.ifft(spectrum, axis=-1, overwrite_x=True)
    out *= _UNTWIST
    return out.view(np.float64)


def limbs_from(keystream: bytes | bytearray | memoryview) -> Limbs:
    """Read public polynomials of 16384 keystream bytes: int32[blocks, 2, 2048], low limb first, centred."""
    words = np.frombuffer(keystream, dtype="<u4").reshape(-1, 2, N)
    out: Limbs = (words >> np.uint32(32 - LIMB)).view(np.int32)
    out -= np.int32(1 << (LIMB - 1))
    return out


def value(limbs: Limbs) -> Words:
    """Residues modulo 2^64 of public polynomials: int32[..., 2, 2048] -> uint64[..., 2048]."""
    wide = limbs.astype(np.int64)
    return (wide[..., 0, :] + (wide[..., 1, :] << LIMB)).view(np.uint64)


def _split(limbs: Limbs, parts: int) -> tuple[NDArray[np.float64], int]:
    """(float64[..., parts, 2048], width): the same residues as `parts` signed limbs of `width` bits."""
    if parts == 2:
        return limbs.astype(np.float64), LIMB
    width = -(-LOG_Q // parts)
    rest = value(limbs).view(np.int64)
    rest = (rest << (64 - LOG_Q)) >> (64 - LOG_Q)
    out = np.empty((*rest.shape[:-1], parts, N))
    for part in range(parts - 1):
        low = ((rest + (1 << (width - 1))) & ((1 << width) - 1)) - (1 << (width - 1))
        out[..., part, :] = low
        rest = (rest - low) >> width
    out[..., parts - 1, :] = rest
    return out, width


@dataclass(frozen=True, slots=True)
class Multiplier:
    """A small polynomial, transformed once and multiplied with many public ones.

    parts: limbs into which the public factor is split so that float64 products round to the exact integer.
    """

    parts: int
    spectrum: NDArray[np.complex128]

    @classmethod
    def of(cls, small: NDArray[np.signedinteger], parts: int | None = None) -> Multiplier:
        """Prepare signed int[2048] in folded order. Raises ValueError when not even 6 limbs are exact."""
        values = small.astype(np.float64)
        if parts is None:
            parts = _parts(float(np.linalg.norm(values)))
        return cls(parts, _forward(values))

    def times(self, limbs: Limbs) -> Words:
        """Multiply exactly: int32[blocks, 2, 2048] -> uint64[blocks, 2048], modulo 2^54 in the low bits.

        Raises RoundingError when a coefficient lies more than 1/4 from an integer.
        """
        factors, width = _split(limbs, self.parts)
        spectra = _forward(factors)
        spectra *= self.spectrum
        exact = _backward(spectra)
        rounded = np.rint(exact)
        exact -= rounded
        if max(exact.max(initial=0.0), -exact.min(initial=0.0)) > _GUARD:
            raise RoundingError(f"a product of {self.parts} limbs is not within {_GUARD} of an integer")
        total: Words = rounded[..., self.parts - 1, :].astype(np.int64).view(np.uint64)
        for part in range(self.parts - 2, -1, -1):
            total <<= np.uint64(width)
            total += rounded[..., part, :].astype(np.int64).view(np.uint64)
        return total


def _parts(norm: float) -> int:
    """Fewest limbs whose products with a factor of this norm err by less than 1/4 in the worst case."""
    for parts in range(2, 7):
        largest = 2.0 ** (-(-LOG_Q // parts) - 1) * N**0.5
        if _FFT_ERROR * largest * norm < _GUARD:
            return parts
    raise ValueError(f"small has Euclidean norm {norm:.3g}, too large for an exact product")
