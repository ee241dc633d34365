"""Packets between a node or a server and the process of an app: a head of plain facts, and messages in their wire form.

    packet = b"PFP1" head-length(4) values(4) buffers(4) head { length(8) envelope } { sha256(32) length(8) buffer }

The head is a JSON object. A buffer that several messages share travels once. Both sides bound what they read, and what
does not decode is a ChannelError: an app's process is not trusted.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from privfed import wire
from privfed.errors import PrivfedError, WireError
from privfed.mapped import pieces
from privfed.message import Message
from privfed.record import RecordDict
from privfed.runtime.spool import LARGE, Spool

MAGIC = b"PFP1"
MAX_HEAD = 1 << 24
MAX_VALUES = 1 << 20
MAX_PACKET = 1 << 34
"""Limits in bytes and entries; the last is the default for one packet."""
_HEAD = struct.Struct(">4sIII")
_LENGTH = struct.Struct(">Q")
_BUFFER = struct.Struct(">32sQ")
_SMALL = 1 << 16


class ChannelError(PrivfedError):
    """The other side of a channel is gone, or sends what is no packet."""


class ChannelClosed(ChannelError):
    """The other side is gone: it closed the channel, or its process ended."""


@dataclass(frozen=True, slots=True)
class Packet:
    """A head, and the messages and records that go with it."""

    head: dict[str, Any] = field(default_factory=dict)
    values: Sequence[Message | RecordDict] = ()

    def message(self, place: int) -> Message:
        """Return the message at a place. Raises ChannelError when there is none."""
        value = self.values[place] if place < len(self.values) else None
        if not isinstance(value, Message):
            raise ChannelError(f"part {place} of a packet is no message")
        return value

    def records(self, place: int) -> RecordDict:
        """Return the records at a place. Raises ChannelError when there are none."""
        value = self.values[place] if place < len(self.values) else None
        if not isinstance(value, RecordDict):
            raise ChannelError(f"part {place} of a packet is no records")
        return value


class Channel:
    """A stream socket that carries packets. Any thread may send; one at a time receives.

    limit: bytes of the largest packet that is read. spool: the folder for files without names that large buffers are
    received into, so that they need no memory; None, or a full disk: memory. trusting: the other side has launched this
    process, and the hashes it gives are not computed again.
    """

    def __init__(
        self, stream: socket.socket, limit: int = MAX_PACKET, spool: Path | None = None, *, trusting: bool = False
    ) -> None:
        self._trusting = trusting
        self._socket = stream
        self._limit = limit
        self.spool = spool
        self._sending = threading.Lock()

    def send(self, packet: Packet, known: Container[bytes] = ()) -> None:
        """Send a packet. Raises ChannelClosed when the other side is gone, ValueError for what cannot travel.

        known: digests of buffers that the other side keeps; they are not sent.
        """
        envelopes: list[bytes] = []
        buffers: dict[bytes, wire.Buffer] = {}
        for value in packet.values:
            envelope, own = wire.encode(value)
            envelopes.append(envelope)
            buffers.update((digest, buffer) for digest, buffer in own.items() if digest not in known)
        # Not msgspec: infinities, NaN and long integers must come back as they were.
        head = json.dumps(packet.head, default=_plain).encode()
        if len(head) > MAX_HEAD or len(envelopes) > MAX_VALUES or len(buffers) > MAX_VALUES:
            raise ValueError(f"a head of {len(head)} bytes or {len(envelopes)} messages cannot travel in one packet")
        try:
            with self._sending:
                self._write(_parts(head, envelopes, buffers))
        except OSError as fault:
            raise ChannelClosed(f"the other side is gone: {fault}") from None

    def _write(self, parts: Iterator[wire.Buffer]) -> None:
        """Send small parts together and large ones as they are."""
        gathered = bytearray()
        for part in parts:
            if len(part) <= _SMALL:
                gathered += part
            if len(part) > _SMALL or len(gathered) > _SMALL:
                self._socket.sendall(gathered)
                gathered = bytearray()
            if len(part) > _SMALL:
                for piece in pieces(part):
                    self._socket.sendall(piece)
        self._socket.sendall(gathered)

    def receive(self, known: Mapping[bytes, wire.Buffer] | None = None) -> Packet:
        """Wait for a packet. Raises ChannelClosed when the other side is gone, ChannelError for anything malformed.

        known: buffers that the other side need not send.
        """
        magic, size, values, buffers = _HEAD.unpack(self._read(_HEAD.size, first=True))
        if magic != MAGIC or size > MAX_HEAD or values > MAX_VALUES or buffers > MAX_VALUES:
            raise ChannelError("the other side sent no packet, or one beyond the limits")
        left = self._limit - size
        head = _decode_head(self._read(size))
        envelopes = []
        for _ in range(values):
            (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
            left = self._within(left, length)
            envelopes.append(self._read(length))
        found = self._read_buffers(buffers, left)
        try:
            there = {**(known or {}), **found}
            return Packet(head, [wire.decode(envelope, there, trusted=self._trusting) for envelope in envelopes])
        except WireError as fault:
            raise ChannelError(f"a packet does not decode: {fault}") from None

    def _read_buffers(self, count: int, left: int) -> dict[bytes, memoryview]:
        found: dict[bytes, memoryview] = {}
        with Spool(self.spool) if self.spool is not None else contextlib.nullcontext() as spool:
            for _ in range(count):
                digest, length = _BUFFER.unpack(self._read(_BUFFER.size))
                left = self._within(left, length)
                if spool is None or length < LARGE:
                    found[digest] = self._read(length)
                else:
                    spool.take(digest, length, self._fill, self._reserve)
            return found if spool is None else found | spool.buffers()

    def _within(self, left: int, length: int) -> int:
        if length > left:
            raise ChannelError(f"a packet is larger than {self._limit} bytes")
        return left - length

    def _read(self, size: int, *, first: bool = False) -> memoryview:
        """Read exactly `size` bytes; memory is used by what arrives, not by what was announced."""
        return self._fill(self._reserve(size), first=first).toreadonly()

    def _reserve(self, size: int) -> memoryview:
        try:
            return np.empty(size, np.uint8).data  # untouched pages cost nothing
        except MemoryError:
            raise ChannelError(f"there is no memory for {size} bytes of a packet") from None

    def _fill(self, data: memoryview, *, first: bool = False) -> memoryview:
        """Read as many bytes as there is room for, and return them."""
        at = 0
        try:
            while at < len(data):
                count = self._socket.recv_into(data[at:])
                if not count:
                    raise ChannelClosed("closed" if first and not at else "the stream ends in a packet")
                at += count
        except OSError as fault:
            raise ChannelClosed(f"the other side is gone: {fault}") from None
        return data

    def close(self) -> None:
        """Close the stream; a thread that waits in `receive` wakes."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def large_buffers(packet: Packet) -> dict[bytes, wire.Buffer]:
    """Return the large buffers of a packet by their digests."""
    contents = (value for value in packet.values if isinstance(value, RecordDict) or value.has_content())
    records = (value if isinstance(value, RecordDict) else value.content for value in contents)
    arrays = (array for found in records for record in found.array_records.values() for array in record.values())
    return {array.digest: array.data for array in arrays if array.nbytes >= LARGE}


def _parts(head: bytes, envelopes: Sequence[bytes], buffers: Mapping[bytes, wire.Buffer]) -> Iterator[wire.Buffer]:
    yield _HEAD.pack(MAGIC, len(head), len(envelopes), len(buffers))
    yield head
    for envelope in envelopes:
        yield _LENGTH.pack(len(envelope))
        yield envelope
    for digest, buffer in buffers.items():
        yield _BUFFER.pack(digest, len(buffer))
        yield buffer


def _plain(value: Any) -> object:
    """Turn what JSON does not know into what it does: sets, numpy scalars, and read-only mappings."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value.item() if hasattr(value, "item") else dict(value)


def _decode_head(raw: memoryview) -> dict[str, Any]:
    try:
        head = json.loads(bytes(raw))
    except (ValueError, RecursionError) as fault:
        raise ChannelError(f"the head of a packet does not decode: {fault}") from None
    if not isinstance(head, dict):
        raise ChannelError("the head of a packet is no object")
    return cast("dict[str, Any]", head)
