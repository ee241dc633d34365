"""What travels on the network between a SuperLink, its nodes and its users: small frames, and chunks of large buffers.

A frame is a struct in MessagePack, in the one encoding that `pack` gives; `unpack` refuses every other. A message
travels as a Parcel: its envelope and the buffers it names (`privfed.wire`). What is small is inside the frame; the
rest is named by its SHA-256 and moves in chunks, each with the digest, the offset and the total size in front:

    chunk = digest(32) offset(8) total(8) data(1 .. MAX_CHUNK)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import msgspec

from privfed import wire
from privfed.decoder import msgpack_decoder
from privfed.errors import WireError
from privfed.mapped import pieces
from privfed.message import Message

MAX_FRAME = 4 << 20
"""No message on the network is larger, in bytes."""
CHUNK = 1 << 20
LARGEST_SENT = 2 << 20
MAX_CHUNK = MAX_FRAME - (4 << 10)
CHUNKS = 64
"""A chunk is CHUNK bytes; of a buffer of more than CHUNKS of them a CHUNKS-th, at most LARGEST_SENT: a SuperLink has
some copies of one in memory for every node that transfers. MAX_CHUNK is taken from others."""
INLINE = 1 << 20
"""A parcel carries up to this many bytes itself."""
MAX_BLOB = 64 << 30
MAX_PARTS = 16_384
HEAD = 48
Buffer = bytes | memoryview
S = TypeVar("S", bound="Frame")


class Frame(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """What `pack` and `unpack` work on. Fields may be added at the end, with a default, in a new protocol version."""


class Part(Frame, frozen=True):
    """A buffer by its digest; data is empty when it moves in chunks."""

    digest: bytes
    size: int
    data: bytes = b""

    def __post_init__(self) -> None:
        if len(self.digest) != wire.DIGEST_BYTES or not 0 <= self.size <= MAX_BLOB:
            raise ValueError("a part has a digest of 32 bytes and a size it may have")
        if self.data and len(self.data) != self.size:
            raise ValueError("a part carries all of its bytes or none")

    @property
    def is_inside(self) -> bool:
        """Return whether the frame carries the bytes."""
        return len(self.data) == self.size


class Parcel(Frame, frozen=True):
    """A message: its envelope, which is a part like the others (its digest is over its bytes), and its buffers."""

    envelope: Part
    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        if len(self.parts) > MAX_PARTS:
            raise ValueError(f"a message of {len(self.parts)} buffers: at most {MAX_PARTS} can travel")

    def outside(self) -> list[Part]:
        """Return the parts that move in chunks."""
        return [part for part in (self.envelope, *self.parts) if not part.is_inside]

    def open(self, fetched: Mapping[bytes, Buffer]) -> Message:
        """Put the message together from what is inside and what was fetched. Raises WireError."""
        inside: dict[bytes, Buffer] = {part.digest: part.data for part in self.parts if part.is_inside}
        named = {part.digest: fetched[part.digest] for part in self.parts if part.digest in fetched}
        envelope: Buffer | None = self.envelope.data if self.envelope.is_inside else fetched.get(self.envelope.digest)
        if envelope is None or hashlib.sha256(envelope).digest() != self.envelope.digest:
            raise WireError("the envelope does not have the hash its parcel gives")
        value = wire.decode(envelope, named | inside)
        if not isinstance(value, Message):
            raise WireError("a parcel holds records, not a message")
        return value


def parcel(message: Message) -> tuple[Parcel, dict[bytes, Buffer]]:
    """Return a message as a parcel, and the buffers that are not inside. Raises ValueError when it cannot travel."""
    envelope, buffers = wire.encode(message)
    return seal(envelope, {digest: (len(buffer), buffer) for digest, buffer in buffers.items()})


def seal(envelope: bytes, buffers: Mapping[bytes, tuple[int, Buffer]]) -> tuple[Parcel, dict[bytes, Buffer]]:
    """Make a parcel: the envelope and the smallest buffers go inside, as far as there is room."""
    name = hashlib.sha256(envelope).digest()
    sizes = {digest: size for digest, (size, _) in buffers.items()}
    room, inside = INLINE, set()
    for digest, size in sorted([(name, len(envelope)), *sizes.items()], key=lambda row: row[1]):
        if size > room:
            break
        room -= size
        inside.add(digest)
    parts = tuple(
        Part(digest=digest, size=size, data=bytes(buffer) if digest in inside else b"")
        for digest, (size, buffer) in buffers.items()
    )
    outside = {digest: buffer for digest, (_, buffer) in buffers.items() if digest not in inside}
    head = Part(digest=name, size=len(envelope), data=envelope if name in inside else b"")
    if name not in inside:
        outside[name] = envelope
    return Parcel(envelope=head, parts=parts), outside


class Hello(Frame, frozen=True, tag=1):
    """A node introduces itself: how many tasks it takes at a time, which it holds, which runs it knows."""

    slots: int
    holding: tuple[str, ...] = ()
    runs: tuple[int, ...] = ()


class Welcome(Frame, frozen=True, tag=2):
    """The SuperLink knows the node. roster: the version of the signed roster it can hand on; 0 for none."""

    node_id: int
    link: str
    roster: int = 0


class Offer(Frame, frozen=True, tag=3):
    """A task. began: the last committed round when each attempt of its run began; commit: the last one now."""

    token: str
    expires_at: float
    began: tuple[int, ...]
    commit: int
    parcel: Parcel


class Ended(Frame, frozen=True, tag=4):
    """A run has ended."""

    run_id: int


class Waiting(Frame, frozen=True, tag=5):
    """The node is known but not served yet, and why."""

    reason: str


class Stalled(Frame, frozen=True, tag=6):
    """A node says what its tasks wait for there; nothing when they go on. A SuperLink need not listen."""

    reason: str


class Answer(Frame, frozen=True):
    """A reply to a task."""

    token: str
    parcel: Parcel


class Progress(Frame, frozen=True):
    """How many bytes of a buffer have arrived."""

    digest: bytes
    size: int


class Verdict(Frame, frozen=True):
    """counted: the reply counts, now or earlier. missing: what must be uploaded before it can."""

    counted: bool
    missing: tuple[Progress, ...] = ()


class Want(Frame, frozen=True):
    """Buffers to send, each from an offset on."""

    parts: tuple[Progress, ...]


class RunQuery(Frame, frozen=True):
    """Asks for a run."""

    run_id: int


class RosterQuery(Frame, frozen=True):
    """Asks for the signed roster, if it is newer than this version; it comes as plain bytes, in pieces."""

    version: int


class Grant(Frame, frozen=True):
    """A run: see `privfed.runtime.fleet.RunGrant`."""

    run_id: int
    name: str
    bundle: bytes
    bundle_size: int
    run_config: dict[str, bool | int | float | str]
    seed: int | None
    nodes: tuple[int, ...]


Down = Welcome | Offer | Ended | Waiting
_encoder = msgspec.msgpack.Encoder(order="deterministic")
_DOWN: msgspec.msgpack.Decoder[Down] = msgspec.msgpack.Decoder(Down)


def pack(frame: Frame) -> bytes:
    """Encode a frame. Raises ValueError when it is too large to travel."""
    data = _encoder.encode(frame)
    if len(data) > MAX_FRAME:
        raise ValueError(f"a frame of {len(data)} bytes cannot travel: at most {MAX_FRAME}")
    return data


def unpack(data: bytes, kind: type[S]) -> S:
    """Decode a frame of one kind. Raises WireError for anything that `pack` does not give."""
    return _strict(data, msgpack_decoder(kind))


def unpack_down(data: bytes) -> Down:
    """Decode what a SuperLink pushes. Raises WireError."""
    return _strict(data, _DOWN)


V = TypeVar("V")


def _strict(data: bytes, decoder: msgspec.msgpack.Decoder[V]) -> V:
    if len(data) > MAX_FRAME:
        raise WireError(f"a frame of {len(data)} bytes is longer than {MAX_FRAME}")
    try:
        value = decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as fault:
        raise WireError(f"no frame: {fault}") from None
    if _encoder.encode(value) != data:
        raise WireError("a frame that is not in its one encoding")
    return value


def chunk_size(total: int) -> int:
    """Return the bytes of a chunk of a buffer of so many."""
    return min(LARGEST_SENT, max(CHUNK, total // CHUNKS))


def chunks(digest: bytes, buffer: Buffer, offset: int = 0, size: int = CHUNK) -> Iterator[bytes]:
    """Cut a buffer into chunks of so many bytes, from an offset on."""
    view = memoryview(buffer).cast("B")
    total = len(view)
    for at, piece in zip(range(offset, total, size), pieces(view[offset:], size), strict=True):
        yield chunk(digest, at, total, piece)


def chunk(digest: bytes, offset: int, total: int, data: Buffer) -> bytes:
    """Encode one chunk."""
    return b"".join((digest, offset.to_bytes(8, "big"), total.to_bytes(8, "big"), data))


def read_chunk(frame: bytes) -> tuple[bytes, int, int, memoryview]:
    """Return digest, offset, total size and data of a chunk. Raises WireError."""
    if not HEAD < len(frame) <= HEAD + MAX_CHUNK:
        raise WireError(f"a chunk of {len(frame)} bytes: it has {HEAD} and then 1 to {MAX_CHUNK}")
    digest = frame[:32]
    offset, total = int.from_bytes(frame[32:40], "big"), int.from_bytes(frame[40:48], "big")
    data = memoryview(frame)[HEAD:]
    if total > MAX_BLOB or offset + len(data) > total:
        raise WireError(f"a chunk that ends at byte {offset + len(data)} of {total}")
    return digest, offset, total, data


def wanted(parts: Sequence[Part], have: Mapping[bytes, int]) -> Want:
    """Ask for parts, each from where it was broken off."""
    return Want(parts=tuple(Progress(digest=part.digest, size=have.get(part.digest, 0)) for part in parts))
