"""Messages of LightSecAgg and their one canonical encoding.

Every message is: kind (1 byte), digest of the session (32 bytes), body. Integers are big-endian, vectors little-endian
with the fewest whole bytes an entry needs. Lists of nodes ascend. Anything else, trailing bytes included, is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np

from privfed.protocols.errors import DecodeError
from privfed.protocols.lightsecagg.exact import Words, words
from privfed.protocols.session import Buffer, Session

ADVERTISE, SHARE, MASK, CONFIRM, REVEAL = range(1, 6)
REPLY = 0x80

KEY, SIGNATURE, DIGEST, TAG = 32, 64, 32, 16
_ACTION = 64
_HEAD = b"privfed lightsecagg v1\0"

T = TypeVar("T")
Table = tuple[tuple[int, memoryview], ...]


class Reader:
    """Takes a message apart; `end` insists that nothing is left."""

    def __init__(self, message: Buffer) -> None:
        self._view = memoryview(message).cast("B")
        self._place = 0

    def take(self, size: int) -> memoryview:
        if size < 0 or self._place + size > len(self._view):
            raise DecodeError(f"message ends after {len(self._view)} bytes, {self._place + size} are needed")
        part = self._view[self._place : self._place + size]
        self._place += size
        return part

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def nodes(self) -> tuple[int, ...]:
        """A count and that many ids, distinct and ascending from 1."""
        found = tuple(self.number(8) for _ in range(self._count(8)))
        _ascending(found)
        return found

    def table(self, size: int) -> Table:
        """A count and that many (id, `size` bytes)."""
        found = tuple((self.number(8), self.take(size)) for _ in range(self._count(8 + size)))
        _ascending(tuple(node for node, _ in found))
        return found

    def _count(self, size: int) -> int:
        count = self.number(4)
        if count * size > len(self._view) - self._place:
            raise DecodeError(f"message is too short for the {count} entries it announces")
        return count

    def end(self) -> None:
        if self._place != len(self._view):
            raise DecodeError(f"{len(self._view) - self._place} bytes follow the end of the message")


def _ascending(nodes: tuple[int, ...]) -> None:
    if any(a >= b for a, b in pairwise((0, *nodes))) or (nodes and nodes[-1] >= 1 << 63):
        raise DecodeError("node ids must be distinct, ascending and between 1 and 2^63 - 1")


def encode_nodes(nodes: tuple[int, ...]) -> bytes:
    return len(nodes).to_bytes(4, "big") + b"".join(node.to_bytes(8, "big") for node in nodes)


def encode_table(rows: tuple[tuple[int, Buffer], ...]) -> bytes:
    parts: list[Buffer] = [len(rows).to_bytes(4, "big")]
    for node, data in rows:
        parts += (node.to_bytes(8, "big"), data)
    return b"".join(parts)


def entry_bytes(bits: int) -> int:
    return -(-bits // 8)


def encode_vector(vector: Words, bits: int) -> bytes:
    size = entry_bytes(bits)
    raw = np.ascontiguousarray(vector.astype(f"<u{words(bits)().itemsize}", copy=False))
    if size == raw.itemsize:
        return raw.tobytes()
    return np.ascontiguousarray(raw.view(np.uint8).reshape(-1, raw.itemsize)[:, :size]).tobytes()


def decode_vector(raw: Buffer, length: int, bits: int) -> Words:
    """Read `length` entries below 2^bits."""
    size, kind = entry_bytes(bits), np.dtype(words(bits)).newbyteorder("<")
    data = np.frombuffer(raw, dtype=np.uint8)
    if len(data) != length * size:
        raise DecodeError(f"a vector of {length} entries of {size} bytes has {len(data)} bytes")
    if size == kind.itemsize:
        vector: Words = data.view(kind)
    else:
        wide = np.zeros((length, kind.itemsize), dtype=np.uint8)
        wide[:, :size] = data.reshape(length, size)
        vector = wide.reshape(-1).view(kind)
    if bits % 8 and length and int(vector.max()) >> bits:
        raise DecodeError(f"a vector has an entry that needs more than {bits} bits")
    return vector


@dataclass(frozen=True, slots=True)
class Terms:
    """What all agree on before anything else: the session and how its masks are coded."""

    session: Session
    threshold: int
    privacy: int

    def encode(self) -> bytes:
        s = self.session
        action = s.action.encode()
        if len(action) > _ACTION or len(s.binding) != DIGEST:
            raise DecodeError(f"action must have at most {_ACTION} bytes and binding {DIGEST}")
        return b"".join(
            (
                _HEAD,
                s.run.to_bytes(8, "big"),
                s.round.to_bytes(8, "big"),
                len(action).to_bytes(1, "big"),
                action,
                s.dimension.to_bytes(8, "big"),
                s.bits.to_bytes(1, "big"),
                s.binding,
                self.threshold.to_bytes(4, "big"),
                self.privacy.to_bytes(4, "big"),
                encode_nodes(s.nodes),
            )
        )

    def digest(self) -> bytes:
        return hashlib.sha256(self.encode()).digest()

    @classmethod
    def decode(cls, message: Buffer) -> Terms:
        """Read the advertise request: terms behind their own digest."""
        _, digest, reader = opened(message, ADVERTISE)
        if bytes(reader.take(len(_HEAD))) != _HEAD:
            raise DecodeError("this is no LightSecAgg session of version 1")
        run, round_ = reader.number(8), reader.number(8)
        try:
            action = str(reader.take(reader.number(1)), "utf-8")
        except UnicodeDecodeError as error:
            raise DecodeError("the action is not text") from error
        dimension, bits = reader.number(8), reader.number(1)
        binding, threshold, privacy = bytes(reader.take(DIGEST)), reader.number(4), reader.number(4)
        nodes = reader.nodes()
        reader.end()
        if not 1 <= bits <= 64 or len(action) > _ACTION:
            raise DecodeError(f"bits must be between 1 and 64, got {bits}")
        terms = cls(Session(run, round_, action, nodes, dimension, bits, binding), threshold, privacy)
        if terms.digest() != digest:
            raise DecodeError("the digest of the session is not the one of its terms")
        return terms


def sealed(kind: int, digest: bytes, *body: Buffer) -> bytes:
    """Put a message together."""
    return b"".join((bytes((kind,)), digest, *body))


def opened(message: Buffer, kind: int) -> tuple[int, bytes, Reader]:
    """Check the kind; returns it, the digest and a reader at the body."""
    reader = Reader(message)
    found, digest = reader.number(1), bytes(reader.take(DIGEST))
    if found != kind:
        raise DecodeError(f"message is of kind {found:#x}, expected {kind:#x}")
    return found, digest, reader


def body(message: Buffer, kind: int, digest: bytes) -> Reader:
    """A reader at the body of a message of this kind and session."""
    _, found, reader = opened(message, kind)
    if found != digest:
        raise DecodeError("message belongs to another session")
    return reader


@dataclass(frozen=True, slots=True)
class Advertisement:
    """A node's keys of this session. digest, binding: of the session it saw. All of it is under the signature."""

    public_key: bytes
    verify_key: bytes
    digest: bytes
    binding: bytes
    signature: bytes

    SIZE = 3 * 32 + 32 + SIGNATURE

    def statement(self, node: int) -> bytes:
        fields = (self.public_key, self.verify_key, self.digest, self.binding)
        return _HEAD + b"advertise" + node.to_bytes(8, "big") + b"".join(fields)

    def encode(self) -> bytes:
        fields = (self.public_key, self.verify_key, self.digest, self.binding, self.signature)
        return b"".join(fields)

    @classmethod
    def decode(cls, raw: memoryview) -> Advertisement:
        read = Reader(raw)
        keys = [bytes(read.take(32)) for _ in range(4)]
        return cls(keys[0], keys[1], keys[2], keys[3], bytes(read.take(SIGNATURE)))


def confirmation(context: bytes, survivors: tuple[int, ...]) -> bytes:
    """What a node signs: this session, these keys, these survivors."""
    return _HEAD + b"confirm" + context + encode_nodes(survivors)


def whole(message: Buffer, kind: int, digest: bytes, read: Callable[[Reader], T]) -> T:
    """Decode a body completely with `read`."""
    reader = body(message, kind, digest)
    found = read(reader)
    reader.end()
    return found
