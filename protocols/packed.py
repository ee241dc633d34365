"""Entries of 1 to 64 bits packed without gaps, little-endian: entry i takes bits i * bits .. (i + 1) * bits - 1.

A group is the fewest entries that fill whole 64-bit words. Groups are the rows of a block; a lane, the entries
that have the same place in their groups, is then one shift and one mask of a whole column, laid out contiguously.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Wide = NDArray[np.uint64]

_BLOCK = 1 << 16
"""Entries packed at once, about: a block and its columns stay in the cache."""
_SHORT = 256
"""Fewer groups than this are packed bit by bit: the loop over lanes would cost more."""


def vector_bytes(count: int, bits: int) -> int:
    """Return the size of `count` packed entries."""
    return (count * bits + 7) // 8


def pack(values: NDArray[np.unsignedinteger[Any]], bits: int) -> Bytes:
    """Pack the low `bits` bits of every entry: unsigned[n] -> uint8[vector_bytes(n, bits)]."""
    entries, words = _group(bits)
    if len(values) < _SHORT * entries:
        octets = values.astype("<u8").view(np.uint8).reshape(-1, 8)
        return np.packbits(np.unpackbits(octets, axis=1, count=bits, bitorder="little"), bitorder="little")
    rows = _rows(len(values), entries)
    out = np.empty(vector_bytes(len(values), bits), dtype=np.uint8)
    mask = np.uint64((1 << bits) - 1)
    for start in range(0, len(values), rows * entries):
        part = values[start : start + rows * entries]
        lanes = _columns(part, entries)
        lanes &= mask
        columns = np.zeros((words, lanes.shape[1]), dtype=np.uint64)
        for lane in range(entries):
            word, shift = divmod(lane * bits, 64)
            columns[word] |= lanes[lane] << np.uint64(shift)
            if shift + bits > 64:
                columns[word + 1] |= lanes[lane] >> np.uint64(64 - shift)
        filled = vector_bytes(len(part), bits)
        at = start * bits // 8
        out[at : at + filled] = columns.T.astype("<u8", order="C").reshape(-1).view(np.uint8)[:filled]
    return out


def unpack(data: Bytes, count: int, bits: int, kind: type[np.uint32] | type[np.uint64]) -> NDArray[Any]:
    """Unpack `count` entries: uint8[vector_bytes(count, bits)], aligned or not -> kind[count]."""
    entries, words = _group(bits)
    if count < _SHORT * entries:
        flags = np.unpackbits(data, count=count * bits, bitorder="little").reshape(count, bits)
        octets = np.zeros((count, 8), dtype=np.uint8)
        octets[:, : (bits + 7) // 8] = np.packbits(flags, axis=1, bitorder="little")
        return octets.reshape(-1).view("<u8").astype(kind)
    rows = _rows(count, entries)
    out = np.empty(count, dtype=kind)
    mask = np.uint64((1 << bits) - 1)
    for start in range(0, count, rows * entries):
        size = min(rows * entries, count - start)
        at = start * bits // 8
        columns = _columns(_as_words(data[at : at + vector_bytes(size, bits)]), words)
        lanes = np.empty((entries, columns.shape[1]), dtype=kind)
        for lane in range(entries):
            word, shift = divmod(lane * bits, 64)
            value = columns[word] >> np.uint64(shift)
            if shift + bits > 64:
                value |= columns[word + 1] << np.uint64(64 - shift)
            np.bitwise_and(value, mask, out=lanes[lane], casting="unsafe")
        out[start : start + size] = lanes.T.reshape(-1)[:size]
    return out


def _group(bits: int) -> tuple[int, int]:
    """Return how many entries fill how many words of 64 bits."""
    common = math.gcd(bits, 64)
    return 64 // common, bits // common


def _rows(count: int, entries: int) -> int:
    return max(1, min(_BLOCK, count) // entries)


def _columns(values: NDArray[Any], width: int) -> Wide:
    """Return uint64[width, rows]: the values in rows of `width`, the last one filled with zeros, turned."""
    rows = -(-len(values) // width)
    if len(values) < rows * width:
        values = np.concatenate([values, np.zeros(rows * width - len(values), dtype=values.dtype)])
    return values.reshape(rows, width).T.astype(np.uint64, order="C")


def _as_words(data: Bytes) -> Wide:
    """Copy bytes into aligned words, the last one filled with zeros."""
    out = np.zeros(-(-len(data) // 8), dtype="<u8")
    out.view(np.uint8)[: len(data)] = data
    return out
