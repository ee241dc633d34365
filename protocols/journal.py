"""A server that outlives its process: every reply is written down before it is acknowledged.

A server is a function of the session, its randomness and the replies in the order they came. So the journal of a
session is a seed, the replies that were taken and the ends of stages; replayed, it gives the same server, which sends
the same requests byte for byte, and nodes that answered them before answer with the bytes they stored. This holds for
every protocol of the contract. A record that a crash cut short was never acknowledged: it is ignored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from privfed.protocols.codec import Reader, encode_session, read_session, u8, u64
from privfed.protocols.errors import DecodeError, LocalError, RemoteError
from privfed.protocols.session import Buffer, Protocol, Random, RingSum, Server, Session, os_random

OPENED, REPLY, CLOSED = range(3)
Append = Callable[[Buffer], None]
"""Writes bytes at the journal's end and returns when they are durable."""

_HEAD = 1 + 8 + 8
_CHECK = 16


def _record(kind: int, node: int, body: Buffer) -> bytes:
    frame = b"".join([u8(kind), u64(node), u64(len(body)), body])
    return frame + hashlib.sha256(frame).digest()[:_CHECK]


@dataclass(frozen=True, slots=True)
class Entry:
    """One record: a kind, the node for a reply, and its bytes."""

    kind: int
    node: int
    body: memoryview


def read_journal(journal: Buffer) -> tuple[list[Entry], int]:
    """Return the whole records of a journal and the bytes they take; what follows was cut short by a crash.

    Raises LocalError when a record that is not the last one is damaged.
    """
    view, at, entries = memoryview(journal).cast("B"), 0, []
    while at + _HEAD <= len(view):
        size = int.from_bytes(view[at + 9 : at + _HEAD], "big")
        end = at + _HEAD + size
        if end + _CHECK > len(view):
            break
        if hashlib.sha256(view[at:end]).digest()[:_CHECK] != bytes(view[end : end + _CHECK]):
            if end + _CHECK == len(view):
                break
            raise LocalError(f"the journal is damaged at byte {at}: start a new session")
        entries.append(Entry(view[at], int.from_bytes(view[at + 1 : at + 9], "big"), view[at + _HEAD : end]))
        at = end + _CHECK
    return entries, at


def journaled_session(journal: Buffer) -> Session | None:
    """Return the session a journal is of; None when it was cut short before that was written. Raises LocalError."""
    entries, _ = read_journal(journal)
    if not entries or entries[0].kind != OPENED:
        return None
    try:
        return read_session(Reader(entries[0].body[32:]))
    except DecodeError as fault:
        raise LocalError(f"the journal does not say of which session it is: {fault}") from fault


def _stream(seed: bytes) -> Random:
    """Return the server's randomness, the same each time it is replayed. The seed is as secret as the journal."""
    drawn = 0

    def random(size: int) -> bytes:
        nonlocal drawn
        drawn += 1
        return hashlib.shake_256(b"privfed journal v1\0" + seed + u64(drawn)).digest(size)

    return random


class JournalServer:
    """A protocol's server with a journal: the same contract, and `resume` finishes the session after a crash.

    append: is given bytes that must be durable when it returns, before the caller acknowledges anything. The journal
    holds masked inputs and opened shares, all of which the server sees anyway; delete it with the session.
    """

    def __init__(
        self, protocol: Protocol, session: Session, append: Append, *, random: Random = os_random, _seed: bytes = b""
    ) -> None:
        seed = _seed or random(32)
        self.inner: Server = protocol.server(session, random=_stream(seed))
        self._append = append
        self._taken: dict[int, bytes] = {}
        self.replayed: dict[str, int] = {}
        """Stage -> replies of the session's nodes that `resume` found in the journal."""
        if not _seed:
            append(_record(OPENED, 0, seed + encode_session(session) + repr(protocol).encode()))

    @classmethod
    def resume(cls, protocol: Protocol, session: Session, journal: Buffer, append: Append) -> JournalServer:
        """Rebuild the server of a session that a crash cut off; first truncate to `read_journal(journal)[1]` bytes.

        Raises LocalError when the journal is of another session or protocol, or is damaged.
        """
        entries, _ = read_journal(journal)
        opened = entries[0].body if entries and entries[0].kind == OPENED else memoryview(b"")
        if bytes(opened[32:]) != encode_session(session) + repr(protocol).encode():
            raise LocalError("the journal is of another session or protocol, or of none")
        server = cls(protocol, session, append, _seed=bytes(opened[:32]))
        for entry in entries[1:]:
            try:
                if entry.kind == REPLY:
                    server.inner.receive(entry.node, entry.body)
                    server._taken[entry.node] = hashlib.sha256(entry.body).digest()
                    counted = server.replayed.get(server.stage, 0) + (entry.node in session.nodes)
                    server.replayed[server.stage] = counted
                else:
                    server.inner.close()
                    server._taken.clear()
            except RemoteError as fault:
                raise LocalError(f"the journal does not replay: {fault}") from fault
        return server

    @property
    def stage(self) -> str:
        return self.inner.stage

    @property
    def result(self) -> RingSum | None:
        return self.inner.result

    def outbound(self) -> dict[int, Buffer]:
        """Return the requests of the open stage; after `resume` the very bytes sent before the crash.

        Nodes whose reply is in the journal are not asked again.
        """
        return {node: request for node, request in self.inner.outbound().items() if node not in self._taken}

    def receive(self, node: int, reply: Buffer) -> None:
        """Take a reply and write it down. Once this returns the reply may be acknowledged.

        A reply that is in the journal changes nothing when it comes again.
        """
        if self._taken.get(node) == hashlib.sha256(reply).digest():
            return
        self.inner.receive(node, reply)
        self._append(_record(REPLY, node, reply))

    def close(self) -> None:
        """End the stage. What ended the session is not written down: it ends the same way when replayed."""
        self.inner.close()
        self._taken.clear()
        self._append(_record(CLOSED, 0, b""))
