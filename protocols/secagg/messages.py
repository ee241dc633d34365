"""Messages of SecAgg and SecAgg+, in the order they travel, and the terms they are bound to [BIK+17, BBGLR+20].

Every message is: kind (1 byte), digest of the terms (32 bytes; not in the first request), body. A masked vector has
seven bytes of zeros before it, so that it starts at byte 40: numpy adds words that lie aligned twice as fast.

    advertise   server -> node  Terms               node -> server  Advertisement: keys, commitment, signature
    share       server -> node  View: who advertised node -> server  sealed shares of two secrets, one a holder
    mask        server -> node  sealed shares for it node -> server  the masked vector
    confirm     server -> node  the survivors        node -> server  its signature on them   (active mode only)
    reveal      server -> node  survivors, signatures node -> server one share a neighbour, of one secret or the other
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from privfed.protocols.codec import (
    Reader,
    blob,
    encode_session,
    node_list,
    read_session,
    table,
    u8,
    u32,
    u64,
)
from privfed.protocols.errors import DecodeError, RemoteError
from privfed.protocols.keys import KEY_BYTES, SIGNATURE_BYTES, TAG_BYTES, digest
from privfed.protocols.packed import vector_bytes
from privfed.protocols.prg import Words, word
from privfed.protocols.session import Buffer, Session
from privfed.protocols.shamir import SHARE_BYTES

ADVERTISE, SHARE, MASK, CONFIRM, REVEAL = range(1, 6)
STAGE_NAMES = {ADVERTISE: "advertise", SHARE: "share", MASK: "mask", CONFIRM: "confirm", REVEAL: "reveal"}
DIGEST_BYTES = 32
NO_SIGNATURE = bytes(SIGNATURE_BYTES)
ROW_BYTES = 3 * KEY_BYTES + SIGNATURE_BYTES
SEALED_BYTES = 2 * SHARE_BYTES + TAG_BYTES
_ROW = f"{KEY_BYTES}s" * 3 + f"{SIGNATURE_BYTES}s"

PADDING = bytes(7)
MASKED_AT = 1 + DIGEST_BYTES + len(PADDING)
WHOLE_WORDS = (32, 64)
"""Bits with which an entry fills its word, so that a vector needs no packing."""

OF_MASK_KEY, OF_SELF_SEED = 0, 1
"""Which of a node's two secrets a share is of."""


@dataclass(frozen=True, slots=True)
class Terms:
    """The session and the parameters all agree on. degree 0: the full graph."""

    session: Session
    degree: int
    threshold: int
    active: bool

    def encode(self) -> bytes:
        head = u8(ADVERTISE) + u8(self.active) + u32(self.degree) + u32(self.threshold)
        return head + encode_session(self.session)

    @classmethod
    def read(cls, reader: Reader) -> Terms:
        kind, active = reader.number(1), reader.number(1)
        degree, threshold = reader.number(4), reader.number(4)
        if kind != ADVERTISE or active > 1:
            raise DecodeError("not the terms of a session")
        if degree % 2:  # there is no such graph
            raise DecodeError(f"a degree is even, got {degree}")
        return cls(read_session(reader), degree, threshold, bool(active))

    def digest(self) -> bytes:
        return digest(b"secagg terms", self.encode())

    def point(self, node: int) -> int:
        """The Shamir point of a node: bound to its place among all nodes, whoever turns up."""
        return bisect_left(self.session.nodes, node) + 1


@dataclass(frozen=True, slots=True)
class Advertisement:
    """A node's ephemeral keys: for sealing, for masks, and the commitment to its self-mask seed."""

    seal_key: bytes
    mask_key: bytes
    commitment: bytes
    signature: bytes = NO_SIGNATURE

    def encode(self) -> bytes:
        return self.seal_key + self.mask_key + self.commitment + self.signature

    def statement(self, node: int) -> bytes:
        return u64(node) + self.seal_key + self.mask_key + self.commitment

    @classmethod
    def of(cls, data: Buffer) -> Advertisement:
        raw = bytes(data)
        return cls(raw[:32], raw[32:64], raw[64:96], raw[96:])


def head(kind: int, terms: bytes) -> bytes:
    """Return the first 33 bytes of a message. terms: the digest."""
    return u8(kind) + terms


def read_head(reader: Reader, kind: int, terms: bytes) -> None:
    """Check the first 33 bytes of a message of this kind and session."""
    if reader.number(1) != kind:
        raise DecodeError(f"not a message of the stage {STAGE_NAMES.get(kind, kind)!r}")
    if bytes(reader.take(DIGEST_BYTES)) != terms:
        raise DecodeError("the message belongs to another session, model or configuration")


def check_head(message: Buffer, terms: bytes, peer: int) -> None:
    """Raise RemoteError "inconsistent-session" for a message bound to other terms: session, model, configuration."""
    if len(message) > DIGEST_BYTES and bytes(message[1 : 1 + DIGEST_BYTES]) != terms:
        detail = "the message is bound to another session, model or configuration"
        raise RemoteError("inconsistent-session", (peer,), detail)


def room_for_masked(terms: bytes, size: int, bits: int) -> tuple[bytearray, Words]:
    """Return a masked message less its vector, and the vector: in its place with `WHOLE_WORDS`, else beside it."""
    message = bytearray(MASKED_AT + vector_bytes(size, bits))
    message[:MASKED_AT] = head(MASK, terms) + PADDING
    kind = np.dtype(word(bits)).newbyteorder("<")
    vector: Words = np.frombuffer(message, kind, offset=MASKED_AT) if bits in WHOLE_WORDS else np.empty(size, kind)
    return message, vector


def read_masked(reader: Reader) -> memoryview:
    """Return the packed vector of a node's masked message, of which the head has been read."""
    if bytes(reader.take(len(PADDING))) != PADDING:
        raise DecodeError("the bytes before a masked vector are not zero")
    return reader.rest()


def encode_advertisements(rows: Mapping[int, Advertisement]) -> bytes:
    return table((node, row.encode()) for node, row in rows.items())


def read_advertisements(reader: Reader) -> dict[int, Advertisement]:
    return {node: Advertisement(*fields) for node, *fields in reader.rows(_ROW)}


def encode_sealed(rows: Mapping[int, bytes]) -> bytes:
    return table(rows.items())


def read_sealed(reader: Reader) -> dict[int, bytes]:
    return dict(reader.rows(f"{SEALED_BYTES}s"))


def encode_signatures(rows: Mapping[int, bytes]) -> bytes:
    return table(rows.items())


def read_signatures(reader: Reader) -> dict[int, bytes]:
    return dict(reader.rows(f"{SIGNATURE_BYTES}s"))


def encode_revealed(rows: Mapping[int, tuple[int, bytes]]) -> bytes:
    return table((node, u8(which) + share) for node, (which, share) in rows.items())


def read_revealed(reader: Reader) -> dict[int, tuple[int, bytes]]:
    rows = reader.rows(f"B{SHARE_BYTES}s")
    if not {which for _, which, _ in rows} <= {OF_MASK_KEY, OF_SELF_SEED}:
        raise DecodeError("a share of neither secret")
    return {node: (which, share) for node, which, share in rows}


@dataclass(frozen=True, slots=True)
class Kept:
    """What a node keeps between two requests of a session. It holds secrets: persist it where keys may live.

    stage: last one answered. request, reply: that exchange, so that a redelivery gets the same bytes. agreed: secrets
    of the channels to those it sealed shares for, until theirs have been opened.
    """

    stage: int
    request: bytes
    reply: Buffer
    root: bytes
    terms: bytes
    seed: bytes
    view: bytes
    agreed: Mapping[int, bytes]
    inbox: Mapping[int, bytes]
    edges: tuple[int, ...]
    survivors: tuple[int, ...]

    def encode(self) -> bytes:
        # A masked vector is big: it is copied once, here, and never when the state is read.
        parts: list[Buffer] = [u8(self.stage), self.request, u32(len(self.reply)), self.reply]
        parts += [blob(self.root), blob(self.terms), self.seed]
        parts += [blob(self.view), table(self.agreed.items()), table(self.inbox.items())]
        parts += [node_list(self.edges), node_list(self.survivors)]
        return b"".join(parts)

    @classmethod
    def read(cls, reader: Reader) -> Kept:
        return cls(
            stage=reader.number(1),
            request=bytes(reader.take(DIGEST_BYTES)),
            reply=reader.blob(),
            root=bytes(reader.blob()),
            terms=bytes(reader.blob()),
            seed=bytes(reader.take(DIGEST_BYTES)),
            view=bytes(reader.blob()),
            agreed=dict(reader.rows(f"{KEY_BYTES}s")),
            inbox=dict(reader.rows(f"{2 * SHARE_BYTES}s")),
            edges=reader.nodes(),
            survivors=reader.nodes(),
        )

    def __repr__(self) -> str:
        return f"Kept(stage={STAGE_NAMES.get(self.stage)!r}, secrets not shown)"
