"""Messages of LightSecAgg: kind (1 byte), digest of the session (32 bytes), body, in the canonical codec."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeVar, cast

from privfed.protocols import codec, keys, prg
from privfed.protocols.codec import Reader
from privfed.protocols.errors import DecodeError
from privfed.protocols.lightsecagg.exact import Words
from privfed.protocols.session import Buffer, Session

ADVERTISE, SHARE, MASK, CONFIRM, REVEAL = range(1, 6)
REPLY = 0x80

SIGNATURE, DIGEST, TAG = keys.SIGNATURE_BYTES, 32, keys.TAG_BYTES
VERSION = b"privfed lightsecagg v1\0"

T = TypeVar("T")
Table = dict[int, memoryview]


def encode_table(rows: Iterable[tuple[int, Buffer]]) -> bytes:
    """`codec.table` of rows that ascend, without copying their data more than once."""
    parts: list[Buffer] = [b""]
    for node, data in rows:
        parts += (codec.u64(node), data)
    parts[0] = codec.u32(len(parts) // 2)
    return b"".join(parts)


def encode_vector(vector: Words, bits: int) -> Buffer:
    return codec.encode_vector(cast(prg.Words, vector), bits)


@dataclass(frozen=True, slots=True)
class Terms:
    """What all agree on before anything else: the session and how its masks are coded."""

    session: Session
    threshold: int
    privacy: int

    def encode(self) -> bytes:
        numbers = codec.u32(self.threshold) + codec.u32(self.privacy)
        return VERSION + codec.encode_session(self.session) + numbers

    def digest(self) -> bytes:
        return keys.digest(b"lightsecagg terms", self.encode())

    @classmethod
    def decode(cls, message: Buffer) -> Terms:
        """Read the advertise request: terms behind their own digest."""

        def read(reader: Reader) -> Terms:
            if bytes(reader.take(len(VERSION))) != VERSION:
                raise DecodeError("this is no LightSecAgg session of version 1")
            return cls(codec.read_session(reader), reader.number(4), reader.number(4))

        digest, content = parted(message, ADVERTISE)
        terms = codec.decode(content, read)
        if terms.digest() != digest:
            raise DecodeError("the digest of the session is not the one of its terms")
        return terms


def sealed(kind: int, digest: bytes, *body: Buffer) -> bytes:
    """Put a message together."""
    return b"".join((bytes((kind,)), digest, *body))


def parted(message: Buffer, kind: int) -> tuple[bytes, memoryview]:
    """Check the kind; returns the digest and the body."""
    reader = Reader(message)
    found, digest = reader.number(1), bytes(reader.take(DIGEST))
    if found != kind:
        raise DecodeError(f"message is of kind {found:#x}, expected {kind:#x}")
    return digest, reader.rest()


def body(message: Buffer, kind: int, digest: bytes, read: Callable[[Reader], T]) -> T:
    """Decode all of the body of a message of this kind and session with `read`."""
    found, content = parted(message, kind)
    if found != digest:
        raise DecodeError("message belongs to another session")
    return codec.decode(content, read)


@dataclass(frozen=True, slots=True)
class Advertisement:
    """A node's keys of this session. digest, binding: of the session it saw. All of it is under the signature."""

    public_key: bytes
    verify_key: bytes
    digest: bytes
    binding: bytes
    signature: bytes

    SIZE = 3 * 32 + 32 + SIGNATURE

    def signed_by(self, node: int) -> bool:
        return keys.verified(self.verify_key, self.signature, *self._statement(node))

    def sign(self, node: int, secret_key: bytes) -> Advertisement:
        return replace(self, signature=keys.sign(secret_key, *self._statement(node)))

    def _statement(self, node: int) -> tuple[bytes, bytes]:
        fields = (self.public_key, self.verify_key, self.digest, self.binding)
        return b"lightsecagg advertise", codec.u64(node) + b"".join(fields)

    def encode(self) -> bytes:
        fields = (self.public_key, self.verify_key, self.digest, self.binding, self.signature)
        return b"".join(fields)

    @classmethod
    def decode(cls, raw: memoryview) -> Advertisement:
        read = Reader(raw)
        first, second, third, fourth = (bytes(read.take(32)) for _ in range(4))
        return cls(first, second, third, fourth, bytes(read.take(SIGNATURE)))


def confirmation(context: bytes, survivors: tuple[int, ...]) -> tuple[bytes, bytes]:
    """What a node signs, label and text: this session, these keys, these survivors."""
    return b"lightsecagg confirm", context + codec.node_list(survivors)
