"""The node's side of moving large buffers: a chunk is on its way only once the one before it has been kept.

So a connection that is cut costs the bytes of one chunk at most, in either direction, however much the line holds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import grpc

from privfed.failpoint import around
from privfed.runtime.frame import RosterQuery, Want, pack
from privfed.runtime.handshake import Metadata, NetworkError
from privfed.runtime.roster import MAX_BYTES

STALL_SECONDS = 120.0
"""Seconds without a chunk, or without news of one, after which a transfer is given up and taken up again."""
Method: TypeAlias = "grpc.StreamStreamMultiCallable[bytes, bytes]"


class _Turn:
    """Lets one side speak once for each time the other has."""

    def __init__(self) -> None:
        self._allowed = threading.Semaphore(0)
        self._over = False
        self._hang_up: Callable[[], object] = bool

    def follow(self, call: grpc.Call) -> None:
        """End with a call, and end it when the other side is silent for too long."""
        self._hang_up = call.cancel
        if not call.add_callback(self.end):  # it is over already
            self.end()

    def allow(self) -> None:
        self._allowed.release()

    def end(self) -> None:
        self._over = True
        self._allowed.release()

    def wait(self) -> bool:
        """Wait for the other side; return whether there is more to say."""
        if not self._allowed.acquire(timeout=STALL_SECONDS):
            self._hang_up()
            return False
        return not self._over


def fetch_roster(channel: grpc.Channel, metadata: Metadata, version: int, seconds: float) -> bytes:
    """Return the signed roster if it is newer than this version. Raises NetworkError for what does not end."""
    method: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream("/privfed.Fleet/Roster")
    document = bytearray()
    with around("download"):
        for piece in method(pack(RosterQuery(version=version)), metadata=metadata, timeout=seconds):
            document += piece
            if len(document) > MAX_BYTES:
                raise NetworkError(f"the SuperLink sends a roster of more than {MAX_BYTES} bytes")
    return bytes(document)


def send(method: Method, metadata: Metadata, frames: Iterable[bytes]) -> None:
    """Send chunks, each after the one before it was acknowledged. Raises grpc.RpcError."""
    turn = _Turn()

    def say() -> Iterator[bytes]:
        for frame in frames:
            yield frame
            if not turn.wait():
                return

    stream = method(say(), metadata=metadata)
    turn.follow(stream)
    for _ in stream:
        turn.allow()


def fetch(method: Method, metadata: Metadata, want: Want, keep: Callable[[bytes], object]) -> None:
    """Receive chunks, each asked for once the one before it was kept. Raises grpc.RpcError, and what `keep` raises."""
    turn = _Turn()

    def say() -> Iterator[bytes]:
        yield pack(want)
        while turn.wait():
            yield b""

    stream = method(say(), metadata=metadata)
    turn.follow(stream)
    try:
        for frame in stream:
            keep(frame)
            turn.allow()
    finally:
        stream.cancel()
