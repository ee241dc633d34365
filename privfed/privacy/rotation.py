"""Randomised Hadamard rotation: it spreads a vector evenly over its coordinates, whatever the vector [KLS21, Sec 4.2].

The rotation is x -> H S x / sqrt(D), with S random signs and H a symmetric Hadamard matrix of order D: all its entries
are +-1, and H H = D I. So it keeps lengths, is its own inverse up to the order of the factors, and every coordinate of
the result is a sum of the vector's coordinates with random signs over sqrt(D), which is all that flatness rests on.
Signs come from a public seed: they hide nothing, they flatten.

H is a Kronecker product of Sylvester matrices, of orders that are powers of two, and up to three of the orders 12, 20,
28 and 44 [Pal33]. Powers of two alone would lengthen a vector up to twofold; these do by at most 6.5 %, from 3 * 10^4
coordinates on, and by 1.4 % in the mean.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache
from itertools import combinations_with_replacement
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from privfed.privacy.keystream import Keystream

Float = TypeVar("Float", np.float32, np.float64)
Float64s = npt.NDArray[np.float64]

SEED_BYTES = 32
_RADIX = 4  # bits of an index done in one pass: the passes are bound by memory, so fewer are faster up to here
_CHUNK = 1 << 14  # values at a time, so that what is done to them stays in the second-level cache
_LABEL = b"privfed rotation signs v1\0"
PALEY = (12, 20, 28, 44)
_MOST_PALEY = 3
# Product of Paley orders -> the orders.
_PRODUCTS = {
    math.prod(orders): orders
    for count in range(_MOST_PALEY + 1)
    for orders in combinations_with_replacement(PALEY, count)
}


@lru_cache(maxsize=64)
def _order(dimension: int) -> tuple[int, tuple[int, ...], int]:
    """Return the least order that holds so many coordinates, its Paley orders, and the bits of its power of two."""
    if dimension < 1:
        raise ValueError(f"dimension: must be at least 1, not {dimension}")
    found = []
    for product, orders in _PRODUCTS.items():
        bits = (-(-dimension // product) - 1).bit_length()
        found.append((product << bits, orders, bits))
    # Of equal orders the one with the fewest Paley factors: both sides must take the same matrix.
    return min(found, key=lambda one: (one[0], len(one[1]), one[1]))


def padded(dimension: int) -> int:
    """Return the least order of a rotation that holds `dimension` coordinates. Raises ValueError for less than one."""
    return _order(dimension)[0]


def _residues(prime: int) -> npt.NDArray[np.float64]:
    """Return float64[prime]: 0 at 0, +1 at the other squares modulo the prime, and -1 elsewhere."""
    values = np.full(prime, -1.0)
    values[[x * x % prime for x in range(prime)]] = 1.0
    values[0] = 0.0
    return values


def paley(order: int) -> npt.NDArray[np.float64]:
    """Return a symmetric Hadamard matrix of order q + 1 or 2(q + 1), for 12, 20, 28 or 44 [Pal33].

    Of order q + 1, with q = 3 modulo 4, it is the first construction with its columns turned round.
    """
    prime = order // 2 - 1 if order == 28 else order - 1
    values, place = _residues(prime), np.arange(prime)
    bordered = np.ones((prime + 1, prime + 1))
    if order == 28:
        bordered[0, 0] = 0.0
        bordered[1:, 1:] = values[(place[:, None] - place) % prime]
        return np.kron(bordered, [[1, 1], [1, -1]]) + np.kron(np.eye(prime + 1), [[1, -1], [-1, -1]])
    values[0] = -1.0
    bordered[1:, 1:] = values[(place[:, None] + place) % prime]
    return bordered


@lru_cache(maxsize=16)
def _kernel(order: int, dtype: str) -> npt.NDArray[np.generic]:
    kernel = paley(order) if order in PALEY else np.ones((1, 1))
    while len(kernel) < order:
        kernel = np.block([[kernel, kernel], [kernel, -kernel]])
    kernel = kernel.astype(dtype)
    kernel.setflags(write=False)
    return kernel


def _radices(size: int) -> list[int]:
    """Return the orders whose matrices are applied one after the other. Raises ValueError for a size without any."""
    found, orders, bits = _order(size)
    if found != size:
        raise ValueError(f"values: there is no rotation of order {size}; the next is {found}")
    return [*orders, *(1 << min(_RADIX, bits - done) for done in range(0, bits, _RADIX))]


def transform(values: npt.NDArray[Float]) -> None:
    """Multiply float32 or float64[D] in place by the Hadamard matrix of order D = padded(D), unscaled.

    Applied twice it multiplies by D. Needs one scratch vector of the same size and O(D log D) operations.
    Raises ValueError for another length, dtype or layout.
    """
    if values.ndim != 1 or values.size < 1:
        raise ValueError(f"values: must be a vector, not of shape {values.shape}")
    if values.dtype not in (np.float32, np.float64) or not values.flags.c_contiguous or not values.flags.writeable:
        raise ValueError(f"values: must be contiguous, writeable float32 or float64, not {values.dtype}")
    source, target, inner = values, np.empty_like(values), 1
    for radix in _radices(values.size):
        kernel = _kernel(radix, values.dtype.str)
        if inner == 1:
            shape: tuple[int, ...] = (-1, radix)
            np.matmul(source.reshape(shape), kernel, out=target.reshape(shape))  # the kernel is symmetric
        else:
            shape = (-1, radix, inner)
            np.matmul(kernel, source.reshape(shape), out=target.reshape(shape))
        source, target, inner = target, source, inner * radix
    if source is not values:
        values[:] = source


def _flips(seed: bytes, size: int) -> npt.NDArray[np.uint8]:
    """Return uint8[size] of 0 and 1, where 1 turns a sign."""
    if len(seed) != SEED_BYTES:
        raise ValueError(f"seed: must be {SEED_BYTES} bytes, not {len(seed)}")
    key = hashlib.sha256(_LABEL + seed).digest()
    return np.unpackbits(Keystream(lambda count: key[:count]).uint8(-(-size // 8)), count=size)


def signs(seed: bytes, size: int) -> npt.NDArray[np.int8]:
    """Return int8[size] of +1 and -1 from a public seed. Raises ValueError unless it has 32 bytes."""
    return np.int8(1) - np.int8(2) * _flips(seed, size).view(np.int8)


def _turn(values: npt.NDArray[Float], seed: bytes) -> None:
    """Multiply contiguous values in place by the signs of a public seed: their sign bits are flipped."""
    word = np.uint32 if values.dtype == np.float32 else np.uint64
    words: npt.NDArray[Any] = values.view(word)
    flips, top = _flips(seed, values.size), word(8 * values.itemsize - 1)
    for start in range(0, values.size, _CHUNK):
        part: npt.NDArray[Any] = flips[start : start + _CHUNK].astype(word)
        part <<= top
        words[start : start + _CHUNK] ^= part


def rotate(
    values: npt.NDArray[np.floating[Any]], seed: bytes, factor: float = 1.0, dtype: npt.DTypeLike | None = None
) -> npt.NDArray[Any]:
    """Return `factor` times the rotated vector, padded with zeros: [D], float32 or float64.

    dtype: of the result and of what is done, if it is not that of `values`.
    """
    size, kept = padded(values.size), values.size
    out = np.empty(size, values.dtype if dtype is None else dtype)
    out[kept:] = 0
    np.multiply(values, values.dtype.type(factor / math.sqrt(size)), out=out[:kept], casting="same_kind")
    _turn(out[:kept], seed)
    transform(out)
    return out


def unrotate(values: npt.NDArray[Float], seed: bytes, dimension: int, factor: float = 1.0) -> Float64s:
    """Return `factor` times the first `dimension` coordinates before rotation, float64; `values` is used up.

    Raises ValueError when the length of `values` is not the padded dimension.
    """
    if values.size != padded(dimension):
        raise ValueError(f"values: {dimension} coordinates are padded to {padded(dimension)}, not {values.size}")
    transform(values)
    kept = values[:dimension]
    _turn(kept, seed)
    return np.multiply(kept, factor / math.sqrt(values.size), dtype=np.float64)
