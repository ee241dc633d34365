"""Canonical bytes: one value, one encoding; anything else is a DecodeError.

Integers are big-endian and of fixed size. A blob is a 4-byte length and its bytes. Lists of nodes ascend strictly.
Vectors are little-endian, packed to exactly `bits` bits an entry; unused bits of the last byte are zero.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from operator import lt
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from privfed.protocols.errors import DecodeError
from privfed.protocols.packed import pack, unpack, vector_bytes
from privfed.protocols.prg import Words, word
from privfed.protocols.session import Buffer, Session

MAX_NODE = (1 << 63) - 1
MAX_ACTION = 64
MAX_DIMENSION = 1 << 36

_pack_id = struct.Struct(">Q").pack

T = TypeVar("T")


def u8(value: int) -> bytes:
    return value.to_bytes(1, "big")


def u32(value: int) -> bytes:
    return value.to_bytes(4, "big")


def u64(value: int) -> bytes:
    return value.to_bytes(8, "big")


def blob(data: Buffer) -> bytes:
    return u32(len(data)) + bytes(data)


def node_list(nodes: Iterable[int]) -> bytes:
    ids = sorted(nodes)
    return u32(len(ids)) + struct.pack(f">{len(ids)}Q", *ids)


def table(rows: Iterable[tuple[int, bytes]]) -> bytes:
    """Encode (node, data) rows, data of one size."""
    ordered = sorted(rows)
    parts = [u32(len(ordered))]
    for node, data in ordered:
        parts += (_pack_id(node), data)
    return b"".join(parts)


class Reader:
    """Takes a message apart from the front; `end` insists that nothing is left."""

    __slots__ = ("_at", "_view")

    def __init__(self, message: Buffer) -> None:
        self._view = memoryview(message).cast("B")
        self._at = 0

    def __len__(self) -> int:
        """Bytes that are left."""
        return len(self._view) - self._at

    def take(self, size: int) -> memoryview:
        """Return the next `size` bytes, not copied."""
        if size < 0 or self._at + size > len(self._view):
            raise DecodeError(f"the message ends at byte {len(self._view)}, {self._at + size} are needed")
        part = self._view[self._at : self._at + size]
        self._at += size
        return part

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def blob(self, limit: int = 1 << 31) -> memoryview:
        size = self.number(4)
        if size > limit:
            raise DecodeError(f"a part of {size} bytes is longer than {limit}")
        return self.take(size)

    def rest(self) -> memoryview:
        return self.take(len(self._view) - self._at)

    def nodes(self) -> tuple[int, ...]:
        """Read ids, distinct and ascending from 1."""
        count = self._count(8)
        found = struct.unpack(f">{count}Q", self.take(8 * count))
        _ascending(found)
        return found

    def table(self, size: int) -> dict[int, memoryview]:
        """Read rows of a node and `size` bytes, nodes ascending."""
        count, width = self._count(8 + size), 8 + size
        block = self.take(count * width)
        nodes = [node for (node,) in struct.iter_unpack(f">Q{size}x", block)]
        _ascending(nodes)
        return {node: block[at + 8 : at + width] for node, at in zip(nodes, range(0, len(block), width), strict=True)}

    def rows(self, layout: str) -> list[tuple[Any, ...]]:
        """Read rows of a node and fields, copied; nodes ascending. layout: of the fields, as in `struct`."""
        row = struct.Struct(">Q" + layout)
        count = self._count(row.size)
        found = list(row.iter_unpack(self.take(count * row.size)))
        _ascending([fields[0] for fields in found])
        return found

    def _count(self, size: int) -> int:
        count = self.number(4)
        if count * size > len(self._view) - self._at:
            raise DecodeError(f"the message is too short for the {count} entries it announces")
        return count

    def end(self) -> None:
        if self._at != len(self._view):
            raise DecodeError(f"{len(self._view) - self._at} bytes follow the end of the message")


def _ascending(nodes: Sequence[int]) -> None:
    if nodes and (nodes[0] < 1 or nodes[-1] > MAX_NODE or not all(map(lt, nodes, nodes[1:]))):
        raise DecodeError("node ids must be distinct, ascending and between 1 and 2^63 - 1")


def decode(message: Buffer, read: Callable[[Reader], T]) -> T:
    """Read a whole message; raises DecodeError for anything but one canonical encoding."""
    reader = Reader(message)
    try:
        value = read(reader)
    except (ValueError, OverflowError, UnicodeDecodeError) as fault:
        raise DecodeError(str(fault)) from None
    reader.end()
    return value


def encode_session(session: Session) -> bytes:
    action = session.action.encode()
    return b"".join(
        [
            u64(session.run),
            u64(session.round),
            u8(len(action)),
            action,
            node_list(session.nodes),
            u64(session.dimension),
            u8(session.bits),
            session.binding,
        ]
    )


def read_session(reader: Reader) -> Session:
    run, number = reader.number(8), reader.number(8)
    size = reader.number(1)
    action = bytes(reader.take(size)).decode()
    nodes = reader.nodes()
    dimension, bits = reader.number(8), reader.number(1)
    binding = bytes(reader.take(32))
    if size > MAX_ACTION or dimension > MAX_DIMENSION or not 1 <= bits <= 64 or not nodes:
        raise DecodeError(f"no session: {len(nodes)} nodes, dimension {dimension}, {bits} bits, action of {size} bytes")
    return Session(run, number, action, nodes, dimension, bits, binding)


def encode_vector(vector: Words, bits: int) -> Buffer:
    """Pack entries below 2^bits. Not copied when an entry fills its word."""
    kind = np.dtype(word(bits)).newbyteorder("<")
    values = np.ascontiguousarray(vector, dtype=kind)
    if bits == kind.itemsize * 8:
        return values.view(np.uint8).data
    return pack(values, bits).data


def decode_vector(data: Buffer, dimension: int, bits: int) -> Words:
    """Unpack `dimension` entries below 2^bits; a read-only view when an entry fills its word."""
    kind = np.dtype(word(bits)).newbyteorder("<")
    raw: NDArray[np.uint8] = np.frombuffer(data, dtype=np.uint8)
    if len(raw) != vector_bytes(dimension, bits):
        raise DecodeError(
            f"{dimension} entries of {bits} bits need {vector_bytes(dimension, bits)} bytes, got {len(raw)}"
        )
    if bits == kind.itemsize * 8:
        return raw.view(kind)
    if dimension * bits % 8 and raw[-1] >> (dimension * bits % 8):
        raise DecodeError("unused bits of the last byte are not zero")
    return unpack(raw, dimension, bits, word(bits))
