"""The journal of a session in a run's folder: what a server that crashed takes up where it was."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from privfed.failpoint import around
from privfed.protocols.errors import LocalError
from privfed.protocols.journal import JournalServer, journaled_session, read_journal
from privfed.protocols.session import Buffer, Protocol, Server, Session
from privfed.strategies.exchange import Exchange


def journal_path(exchange: Exchange, name: str) -> Path | None:
    """Return where the run keeps a session's journal; None when its recorder has no place for one."""
    place: Callable[[str], Path | None] | None = getattr(exchange.grid.recorder, "journal_path", None)
    return place(name) if place is not None else None


def write_durably(path: Path, data: bytes) -> None:
    """Replace a file, so that a crash leaves the old one or the new one. Only its owner may read it."""
    with around("journal"):
        _replace(path, data)


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(file, data)
        os.fsync(file)
    finally:
        os.close(file)
    draft.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class SessionJournal:
    """One session's file: every reply is on the disk before the server acts on it. path None: kept in memory only.

    pending: the session that a crash cut off, if the file has one of this run and action. The file stays until the next
    exchange of its kind, so that a crash before the round is committed finds even a finished sum again.
    """

    def __init__(self, path: Path | None, run: int, action: str) -> None:
        self._path = path
        self.pending: Session | None = None
        self.replayed: dict[str, int] = {}
        if path is None or not path.exists():
            return
        try:
            found = journaled_session(path.read_bytes())
        except LocalError:  # damaged: nothing can be finished from it
            return
        if found is not None and (found.run, found.action) == (run, action):
            self.pending = found

    def serve(self, protocol: Protocol, session: Session) -> Server:
        """Return the server of a session: rebuilt from the file when it is the pending one, else new, in a new file."""
        if self._path is None:
            return protocol.server(session)
        if session == self.pending:
            try:
                return self._resume(protocol, session)
            except LocalError:  # another protocol's, or damaged
                self.pending = None
        self._forget_others()
        write_durably(self._path, b"")
        return JournalServer(protocol, session, self._append)

    def discard(self) -> None:
        """Forget the session: it cannot be finished."""
        self.pending, self.replayed = None, {}
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _resume(self, protocol: Protocol, session: Session) -> Server:
        assert self._path is not None
        data = self._path.read_bytes()
        size = read_journal(data)[1]
        os.truncate(self._path, size)
        server = JournalServer.resume(protocol, session, memoryview(data)[:size], self._append)
        self.replayed = server.replayed
        return server

    def _append(self, record: Buffer) -> None:
        assert self._path is not None
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND)  # not kept open: there may be a session per group
        try:
            view = memoryview(record).cast("B")
            with around("journal"):
                while view:
                    view = view[os.write(file, view) :]
                os.fdatasync(file)
        finally:
            os.close(file)

    def _forget_others(self) -> None:
        """Delete the journals of earlier exchanges of this kind: their round was committed, or began anew."""
        assert self._path is not None
        kind, exchange = self._path.name.split("-")[:2]
        for other in self._path.parent.glob(f"{kind}-*"):
            if other.name.split("-")[1].partition(".")[0] != exchange.partition(".")[0]:
                other.unlink(missing_ok=True)
