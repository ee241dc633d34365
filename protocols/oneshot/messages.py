"""Messages of the one-shot protocol, each with one encoding: decoding refuses every other byte string.

    Invitation    server -> every node        send      the session and the parameters
    Contribution  node -> server              send      signed session key, ciphertext, a box for each member
    Bundle        server -> one member        confirm   the survivors, with the session key and the box of
    each Signature     member -> server            confirm   on the survivors it was told Quorum        server
    -> every signer      open      the signatures Share         member -> server            open      of the
    sum of the survivors' secrets

Numbers are little-endian, 8 bytes each. A contribution starts with 136 bytes so that its vector lies aligned.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from privfed.protocols.errors import DecodeError
from privfed.protocols.oneshot.sealing import KEY_BYTES, SIGNATURE_BYTES, TAG_BYTES
from privfed.protocols.oneshot.sharing import SHARE_BYTES
from privfed.protocols.session import Buffer, Session

DIGEST_BYTES = 32
BOX_BYTES = SHARE_BYTES + TAG_BYTES

_LARGEST = 1 << 64


def number(value: int) -> bytes:
    """Encode 0 <= value < 2^64."""
    return value.to_bytes(8, "little")


def numbers(values: Sequence[int]) -> bytes:
    """Encode a list of numbers, its length first."""
    return b"".join(map(number, (len(values), *values)))


class Reader:
    """Takes a message apart from the front; every way to run past the end is a DecodeError."""

    def __init__(self, wire: Buffer, tag: bytes) -> None:
        self._view = memoryview(wire).cast("B")
        self._at = 0
        if self.take(len(tag)) != tag:
            raise DecodeError(f"not a {tag[:8].decode().strip()} message")

    def view(self, size: int) -> memoryview:
        """The next `size` bytes, not copied."""
        if size > len(self._view) - self._at:
            raise DecodeError(f"message ends {size - len(self._view) + self._at} bytes early")
        self._at += size
        return self._view[self._at - size : self._at]

    def take(self, size: int) -> bytes:
        return bytes(self.view(size))

    def number(self) -> int:
        return int.from_bytes(self.view(8), "little")

    def numbers(self) -> tuple[int, ...]:
        count = self.number()
        raw = self.view(8 * count)
        return tuple(int.from_bytes(raw[8 * i : 8 * i + 8], "little") for i in range(count))

    def nodes(self) -> tuple[int, ...]:
        """A list of node ids: positive, ascending, distinct."""
        found = self.numbers()
        if any(low >= high for low, high in zip((0, *found), found, strict=False)):
            raise DecodeError("node ids are not positive, ascending and distinct")
        return found

    def rest(self) -> bytes:
        """Everything not taken yet."""
        return self.take(len(self._view) - self._at)

    def end(self) -> None:
        if self._at != len(self._view):
            raise DecodeError(f"{len(self._view) - self._at} bytes follow the message")


@dataclass(frozen=True, slots=True)
class Invitation:
    """What every party must agree on. Its encoding is hashed into the session's digest."""

    session: Session
    threshold: int
    corrupt: int
    committee: tuple[int, ...]
    slots: int
    bounded: bool

    TAG = b"invite 1"

    def encode(self) -> bytes:
        session = self.session
        action = session.action.encode()
        return b"".join(
            (
                self.TAG,
                numbers((session.run, session.round, session.dimension, session.bits)),
                number(len(action)) + action,
                session.binding,
                numbers(session.nodes),
                numbers((self.threshold, self.corrupt, self.slots, int(self.bounded))),
                numbers(self.committee),
            )
        )

    @classmethod
    def decode(cls, wire: Buffer) -> Invitation:
        reader = Reader(wire, cls.TAG)
        facts = reader.numbers()
        try:
            action = reader.take(reader.number()).decode()
        except UnicodeDecodeError as error:
            raise DecodeError("the action is no UTF-8") from error
        binding, nodes, parameters, committee = (
            reader.take(32),
            reader.nodes(),
            reader.numbers(),
            reader.nodes(),
        )
        reader.end()
        if len(facts) != 4 or len(parameters) != 4 or parameters[3] > 1:
            raise DecodeError("an invitation has four facts and four parameters")
        run, round_, dimension, bits = facts
        threshold, corrupt, slots, bounded = parameters
        session = Session(run, round_, action, nodes, dimension, bits, binding)
        return cls(session, threshold, corrupt, committee, slots, bool(bounded))


@dataclass(frozen=True, slots=True)
class Header:
    """What a member must see of each contribution: the digest it is for and the signed session key."""

    digest: bytes
    public: bytes
    signature: bytes

    SIZE = DIGEST_BYTES + KEY_BYTES + SIGNATURE_BYTES

    def encode(self) -> bytes:
        return self.digest + self.public + self.signature

    @classmethod
    def read(cls, reader: Reader) -> Header:
        return cls(reader.take(DIGEST_BYTES), reader.take(KEY_BYTES), reader.take(SIGNATURE_BYTES))


@dataclass(frozen=True, slots=True)
class Contribution:
    """A node's only message of the send stage. boxes: the other members', in the committee's order."""

    header: Header
    ciphertext: Buffer
    boxes: bytes = field(repr=False)

    TAG = b"contrib1"

    def encode(self) -> bytes:
        return b"".join((self.TAG, self.header.encode(), self.ciphertext, self.boxes))

    @classmethod
    def decode(cls, wire: Buffer, ciphertext_bytes: int, boxes: int) -> Contribution:
        reader = Reader(wire, cls.TAG)
        header = Header.read(reader)
        ciphertext = reader.view(ciphertext_bytes)
        sealed = reader.take(BOX_BYTES * boxes)
        reader.end()
        return cls(header, ciphertext, sealed)


@dataclass(frozen=True, slots=True)
class Bundle:
    """What one member needs to sign and open. The member's own box is b""."""

    survivors: tuple[int, ...]
    headers: tuple[Header, ...]
    boxes: tuple[bytes, ...] = field(repr=False)

    TAG = b"bundle 1"

    def encode(self) -> bytes:
        headers = b"".join(header.encode() for header in self.headers)
        return b"".join((self.TAG, numbers(self.survivors), headers, *self.boxes))

    @classmethod
    def decode(cls, wire: Buffer, node: int) -> Bundle:
        """Decode the bundle meant for `node`, which has no box from itself."""
        reader = Reader(wire, cls.TAG)
        survivors = reader.nodes()
        headers = tuple(Header.read(reader) for _ in survivors)
        boxes = tuple(b"" if peer == node else reader.take(BOX_BYTES) for peer in survivors)
        reader.end()
        return cls(survivors, headers, boxes)


@dataclass(frozen=True, slots=True)
class Signature:
    """A member's signature on the survivors it was told."""

    signature: bytes

    TAG = b"signed 1"

    def encode(self) -> bytes:
        return self.TAG + self.signature

    @classmethod
    def decode(cls, wire: Buffer) -> Signature:
        reader = Reader(wire, cls.TAG)
        signature = reader.take(SIGNATURE_BYTES)
        reader.end()
        return cls(signature)


@dataclass(frozen=True, slots=True)
class Quorum:
    """The members that signed, ascending, and their signatures."""

    signers: tuple[int, ...]
    signatures: tuple[bytes, ...]

    TAG = b"quorum 1"

    def encode(self) -> bytes:
        return self.TAG + numbers(self.signers) + b"".join(self.signatures)

    @classmethod
    def decode(cls, wire: Buffer) -> Quorum:
        reader = Reader(wire, cls.TAG)
        signers = reader.nodes()
        signatures = tuple(reader.take(SIGNATURE_BYTES) for _ in signers)
        reader.end()
        return cls(signers, signatures)


@dataclass(frozen=True, slots=True)
class Share:
    """A member's share of the sum of the survivors' secrets, in wire form."""

    share: bytes = field(repr=False)

    TAG = b"opened 1"

    def encode(self) -> bytes:
        return self.TAG + self.share

    @classmethod
    def decode(cls, wire: Buffer) -> Share:
        reader = Reader(wire, cls.TAG)
        share = reader.take(SHARE_BYTES)
        reader.end()
        return cls(share)


def in_range(values: Iterable[int]) -> bool:
    """Tell whether every value fits the eight bytes of `number`."""
    return all(0 <= value < _LARGEST for value in values)
