"""Exact products of integer matrices modulo 2^bits, in float64: every intermediate sum stays below 2^53."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Words = NDArray[np.unsignedinteger[Any]]
Floats = NDArray[np.float64]

_EXACT = 53
_COLUMNS = 512
"""Columns handled at once: operands and result of one step stay near the caches."""


def words(bits: int) -> type[np.uint32] | type[np.uint64]:
    """Smallest of uint32 and uint64 that holds residues modulo 2^bits."""
    return np.uint32 if bits <= 32 else np.uint64


def _split(a: Ints, limbs: int, width: int) -> list[Floats]:
    """Signed limbs, lowest first: a = sum limb_i * 2^(i width), |limb_i| <= 2^(width - 1) but for the last."""
    if limbs == 1:
        return [a.astype(np.float64)]
    parts, half = [], 1 << (width - 1)
    for _ in range(limbs - 1):
        low = ((a + half) & ((1 << width) - 1)) - half
        parts.append(low.astype(np.float64))
        a = (a - low) >> width
    return [*parts, a.astype(np.float64)]


def plan(largest: int, bits: int, inner: int) -> tuple[int, int, int, int]:
    """Limbs and their width of the left, then of the right factor: the fewest products that stay exact.

    largest: of the left entries. inner: terms of each sum.
    """
    left_bits = max(1, largest.bit_length()) + 1
    room = _EXACT - math.ceil(math.log2(inner)) if inner > 1 else _EXACT
    best: tuple[int, int, int, int, int] | None = None
    for left in range(1, left_bits + 1):
        for right in range(1, bits + 1):
            a, b = -(-left_bits // left), -(-bits // right)
            # A limb of w bits is at most 2^(w - 1) large, and the topmost one may carry one more.
            if (a + b - 2) + (left > 1) + (right > 1) <= room:
                pairs = sum(i * a + j * b < bits for i in range(left) for j in range(right))
                if best is None or pairs < best[0]:
                    best = (pairs, left, a, right, b)
                break
    assert best is not None
    return best[1:]


def signed(a: Words, bits: int) -> Ints:
    """Residues modulo 2^bits as the integers nearest 0."""
    shift = 64 - bits
    centred: Ints = (a.astype(np.uint64) << np.uint64(shift)).view(np.int64) >> np.int64(shift)
    return centred


def _halves(block: Words, bits: int, limbs: int, width: int) -> list[Floats]:
    """Signed limbs of residues modulo 2^bits; whole 32-bit words need no detour."""
    if limbs == 1 and bits == 32 and block.dtype == np.uint32:
        return [block.view(np.int32).astype(np.float64)]
    return _split(signed(block, bits), limbs, width)


def product(a: Ints, b: Words, bits: int) -> Words:
    """Multiply a signed integer matrix by residues modulo 2^bits: [r, k] x [k, c] -> [r, c] modulo 2^bits."""
    kind = words(bits)
    left, a_width, right, b_width = plan(int(np.abs(a).max(initial=0)), bits, a.shape[1])
    lefts = _split(a, left, a_width)
    out: Words = np.empty((a.shape[0], b.shape[1]), dtype=kind)
    columns = min(_COLUMNS, b.shape[1])
    floats = np.empty((a.shape[0], columns))
    ints = np.empty((a.shape[0], columns), dtype="<i8")
    low: Words = ints.view(np.dtype(kind).newbyteorder("<"))[:, :: 8 // out.itemsize]  # each entry's low word
    for start in range(0, b.shape[1], _COLUMNS):
        total = out[:, start : start + _COLUMNS]
        size = total.shape[1]
        if size < columns:  # the last block: views of its width keep the buffers contiguous
            floats, ints = np.empty((a.shape[0], size)), np.empty((a.shape[0], size), dtype="<i8")
            low = ints.view(np.dtype(kind).newbyteorder("<"))[:, :: 8 // out.itemsize]
        total[...] = 0
        rights = _halves(b[:, start : start + _COLUMNS], bits, right, b_width)
        for i, x in enumerate(lefts):
            for j, y in enumerate(rights):
                place = i * a_width + j * b_width
                if place < bits:
                    np.matmul(x, y, out=floats)
                    np.copyto(ints, floats, casting="unsafe")  # exact: every sum is below 2^53
                    total += np.left_shift(low, kind(place)) if place else low
        total &= kind((1 << bits) - 1)
    return out
