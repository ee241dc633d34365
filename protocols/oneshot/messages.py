"""Messages of the one-shot protocol, each with one encoding: decoding refuses every other byte string.

    Invitation    server -> every node        send      the session and the parameters
    Contribution  node -> server              send      signed session key, ciphertext, a box for each member
    Attendance    member -> server            send      of a member that is not among the session's nodes
    Bundle        server -> one member        confirm   the survivors, with the session key and the box of each
    Signature     member -> server            confirm   on the survivors it was told
    Quorum        server -> every signer      open      the signatures
    Share         member -> server            open      of the sum of the survivors' secrets

Every message starts with 8 bytes that name it; a contribution's vector starts at byte 136, so it lies
aligned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from privfed.protocols import codec
from privfed.protocols.codec import Reader, node_list, table, u8, u32
from privfed.protocols.errors import DecodeError
from privfed.protocols.keys import KEY_BYTES, SIGNATURE_BYTES, TAG_BYTES
from privfed.protocols.oneshot.sharing import SHARE_BYTES
from privfed.protocols.session import Buffer, Session

DIGEST_BYTES = 32
BOX_BYTES = SHARE_BYTES + TAG_BYTES

T = TypeVar("T")


def decode(wire: Buffer, tag: bytes, read: Callable[[Reader], T]) -> T:
    """Read a whole message that starts with `tag`."""

    def tagged(reader: Reader) -> T:
        if bytes(reader.take(len(tag))) != tag:
            raise DecodeError(f"not a message {tag.decode()!r}")
        return read(reader)

    return codec.decode(wire, tagged)


@dataclass(frozen=True, slots=True)
class Invitation:
    """What every party must agree on. Its encoding is hashed into the session's digest."""

    session: Session
    threshold: int
    corrupt: int
    committee: tuple[int, ...]
    slots: int
    bounded: bool

    TAG = b"OS inv 1"

    def encode(self) -> bytes:
        numbers = u32(self.threshold) + u32(self.corrupt) + u8(self.slots) + u8(self.bounded)
        return self.TAG + codec.encode_session(self.session) + numbers + node_list(self.committee)

    @classmethod
    def read(cls, reader: Reader) -> Invitation:
        session = codec.read_session(reader)
        threshold, corrupt, slots, bounded = (reader.number(size) for size in (4, 4, 1, 1))
        if bounded > 1:
            raise DecodeError(f"bounded is 0 or 1, got {bounded}")
        return cls(session, threshold, corrupt, reader.nodes(), slots, bool(bounded))

    @classmethod
    def decode(cls, wire: Buffer) -> Invitation:
        return decode(wire, cls.TAG, cls.read)


@dataclass(frozen=True, slots=True)
class Header:
    """What a member must see of each contribution: the digest it is for and the signed session key."""

    digest: bytes
    public_key: bytes
    signature: bytes

    SIZE = DIGEST_BYTES + KEY_BYTES + SIGNATURE_BYTES

    def encode(self) -> bytes:
        return self.digest + self.public_key + self.signature

    @classmethod
    def read(cls, reader: Reader) -> Header:
        digest, public_key, signature = map(reader.take, (DIGEST_BYTES, KEY_BYTES, SIGNATURE_BYTES))
        return cls(bytes(digest), bytes(public_key), bytes(signature))


@dataclass(frozen=True, slots=True)
class Contribution:
    """A node's only message of the send stage. boxes: the other members', in the committee's order."""

    header: Header
    ciphertext: Buffer
    boxes: bytes = field(repr=False)

    TAG = b"OS con 1"

    def encode(self) -> bytes:
        return b"".join((self.TAG, self.header.encode(), self.ciphertext, self.boxes))

    @classmethod
    def decode(cls, wire: Buffer, ciphertext_bytes: int, boxes: int) -> Contribution:
        """Decode without copying the ciphertext."""

        def read(reader: Reader) -> Contribution:
            header, vector = Header.read(reader), reader.take(ciphertext_bytes)
            return cls(header, vector, bytes(reader.take(BOX_BYTES * boxes)))

        return decode(wire, cls.TAG, read)


@dataclass(frozen=True, slots=True)
class Attendance:
    """What a member says that gives no input: it is there, and for which session."""

    digest: bytes

    TAG = b"OS att 1"

    def encode(self) -> bytes:
        return self.TAG + self.digest

    @classmethod
    def decode(cls, wire: Buffer) -> Attendance:
        return decode(wire, cls.TAG, lambda reader: cls(bytes(reader.take(DIGEST_BYTES))))


@dataclass(frozen=True, slots=True)
class Bundle:
    """What one member needs to sign and to open. The box from the member itself is b""."""

    survivors: tuple[int, ...]
    headers: tuple[Header, ...]
    boxes: tuple[bytes, ...] = field(repr=False)

    TAG = b"OS bun 1"

    def encode(self) -> bytes:
        headers = (header.encode() for header in self.headers)
        return b"".join((self.TAG, node_list(self.survivors), *headers, *self.boxes))

    @classmethod
    def decode(cls, wire: Buffer, node: int) -> Bundle:
        """Decode the bundle meant for `node`."""

        def read(reader: Reader) -> Bundle:
            survivors = reader.nodes()
            headers = tuple(Header.read(reader) for _ in survivors)
            sizes = (0 if peer == node else BOX_BYTES for peer in survivors)
            return cls(survivors, headers, tuple(bytes(reader.take(size)) for size in sizes))

        return decode(wire, cls.TAG, read)


@dataclass(frozen=True, slots=True)
class Signature:
    """A member's signature on the survivors and contributions it was told."""

    signature: bytes

    TAG = b"OS sig 1"

    def encode(self) -> bytes:
        return self.TAG + self.signature

    @classmethod
    def decode(cls, wire: Buffer) -> Signature:
        return decode(wire, cls.TAG, lambda reader: cls(bytes(reader.take(SIGNATURE_BYTES))))


@dataclass(frozen=True, slots=True)
class Quorum:
    """The members that signed and their signatures."""

    signatures: dict[int, bytes]

    TAG = b"OS quo 1"

    def encode(self) -> bytes:
        return self.TAG + table(self.signatures.items())

    @classmethod
    def decode(cls, wire: Buffer) -> Quorum:
        rows = decode(wire, cls.TAG, lambda reader: reader.table(SIGNATURE_BYTES))
        return cls({node: bytes(signature) for node, signature in rows.items()})


@dataclass(frozen=True, slots=True)
class Share:
    """A member's share of the sum of the survivors' secrets, in wire form."""

    share: bytes = field(repr=False)

    TAG = b"OS shr 1"

    def encode(self) -> bytes:
        return self.TAG + self.share

    @classmethod
    def decode(cls, wire: Buffer) -> Share:
        return decode(wire, cls.TAG, lambda reader: cls(bytes(reader.take(SHARE_BYTES))))


@dataclass(frozen=True, slots=True)
class Kept:
    """What a node keeps. stage: the one it waits for, or "". header: of its own contribution, then b"".

    signed: what it signed of the survivors, 32 bytes, b"" before.
    """

    stage: str
    invitation: bytes
    share: bytes = field(repr=False)
    header: bytes = b""
    signed: bytes = b""

    TAG = b"OS kep 1"
    WAITING = ("confirm", "open", "")

    def encode(self) -> bytes:
        parts = (self.invitation, self.share, self.header, self.signed)
        return self.TAG + u8(self.WAITING.index(self.stage)) + b"".join(map(codec.blob, parts))

    @classmethod
    def decode(cls, kept: bytes) -> Kept:
        def read(reader: Reader) -> Kept:
            place = reader.number(1)
            if place >= len(cls.WAITING):
                raise DecodeError("no such stage")
            return cls(cls.WAITING[place], *(bytes(reader.blob()) for _ in range(4)))

        return decode(kept, cls.TAG, read)
