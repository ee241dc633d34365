"""Randomised Hadamard rotation: it spreads a vector evenly over its coordinates, whatever the vector [KLS21, Sec 4.2].

The rotation is x -> H S x / sqrt(D), with S random signs and H the Walsh-Hadamard matrix of order D. It keeps lengths
and is its own inverse up to the order of the factors. Signs come from a public seed: they hide nothing, they flatten.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from privfed.privacy.keystream import Keystream

Float = TypeVar("Float", np.float32, np.float64)
Float64s = npt.NDArray[np.float64]

SEED_BYTES = 32
_RADIX = 4  # bits of an index done in one pass: the passes are bound by memory, so fewer are faster up to here
_LABEL = b"privfed rotation signs v1\0"


def padded(dimension: int) -> int:
    """Return the least power of two that holds `dimension` coordinates. Raises ValueError for less than one."""
    if dimension < 1:
        raise ValueError(f"dimension: must be at least 1, not {dimension}")
    return 1 << (dimension - 1).bit_length()


@lru_cache(maxsize=16)
def _kernel(bits: int, dtype: str) -> npt.NDArray[np.generic]:
    kernel = np.ones((1, 1), dtype)
    for _ in range(bits):
        kernel = np.block([[kernel, kernel], [kernel, -kernel]])
    kernel.setflags(write=False)
    return kernel


def transform(values: npt.NDArray[Float]) -> None:
    """Multiply float32 or float64[D] in place by the Walsh-Hadamard matrix of order D, a power of two, unscaled.

    Applied twice it multiplies by D. Needs one scratch vector of the same size and O(D log D) operations.
    Raises ValueError for another length, dtype or layout.
    """
    if values.ndim != 1 or values.size < 1 or values.size & (values.size - 1):
        raise ValueError(f"values: must be a vector whose length is a power of two, not of shape {values.shape}")
    if values.dtype not in (np.float32, np.float64) or not values.flags.c_contiguous or not values.flags.writeable:
        raise ValueError(f"values: must be contiguous, writeable float32 or float64, not {values.dtype}")
    bits, done = values.size.bit_length() - 1, 0
    source, target = values, np.empty_like(values)
    while done < bits:
        step = min(_RADIX, bits - done)
        kernel = _kernel(step, values.dtype.str)
        if done == 0:
            shape: tuple[int, ...] = (-1, 1 << step)
            np.matmul(source.reshape(shape), kernel, out=target.reshape(shape))
        else:
            shape = (-1, 1 << step, 1 << done)
            np.matmul(kernel, source.reshape(shape), out=target.reshape(shape))
        source, target = target, source
        done += step
    if source is not values:
        values[:] = source


def signs(seed: bytes, size: int) -> npt.NDArray[np.int8]:
    """Return int8[size] of +1 and -1 from a public seed. Raises ValueError unless it has 32 bytes."""
    if len(seed) != SEED_BYTES:
        raise ValueError(f"seed: must be {SEED_BYTES} bytes, not {len(seed)}")
    key = hashlib.sha256(_LABEL + seed).digest()
    flips = np.unpackbits(Keystream(lambda count: key[:count]).uint8(-(-size // 8)), count=size).view(np.int8)
    return np.int8(1) - np.int8(2) * flips


def rotate(values: npt.NDArray[Float], seed: bytes, factor: float = 1.0) -> npt.NDArray[Float]:
    """Return `factor` times the rotated vector, padded with zeros: [D] in the dtype of `values`, float32 or float64."""
    size = padded(values.size)
    out = np.zeros(size, values.dtype)
    np.multiply(values, signs(seed, size)[: values.size], out=out[: values.size])
    out[: values.size] *= values.dtype.type(factor / math.sqrt(size))
    transform(out)
    return out


def unrotate(values: npt.NDArray[Float], seed: bytes, dimension: int, factor: float = 1.0) -> npt.NDArray[Float]:
    """Return `factor` times the first `dimension` coordinates before rotation; `values` is used up.

    Raises ValueError when the length of `values` is not the padded dimension.
    """
    if values.size != padded(dimension):
        raise ValueError(f"values: {dimension} coordinates are padded to {padded(dimension)}, not {values.size}")
    transform(values)
    out = values[:dimension]
    out *= signs(seed, values.size)[:dimension]
    out *= values.dtype.type(factor / math.sqrt(values.size))
    return out
