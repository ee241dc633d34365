"""What a node keeps in SQLite and beside it: envelopes, and the array buffers they hold, each once.

Small buffers are rows, large ones content-addressed files. A buffer is written in the transaction that first refers to
it, and its file is removed in a transaction after the one that dropped the last reference, so neither a crash nor a
transaction rolled back loses one that is referred to.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from privfed import wire
from privfed.errors import PrivfedError, WireError
from privfed.failpoint import reach
from privfed.message import Message
from privfed.record import RecordDict
from privfed.runtime.array_folder import ArrayFolder, Buffer

LARGE = 1 << 16
"""Buffers of at least this many bytes are files."""
_TABLES = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS blobs (id INTEGER PRIMARY KEY, envelope BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS holds (blob INTEGER NOT NULL, digest BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS holds_blob ON holds (blob);
CREATE INDEX IF NOT EXISTS holds_digest ON holds (digest);
CREATE TABLE IF NOT EXISTS buffers (digest BLOB PRIMARY KEY, data BLOB NOT NULL);
"""


class NodeStoreError(PrivfedError):
    """The node's own store is damaged, of another format, or asked for what it does not have."""


class BlobDatabase:
    """A SQLite database whose rows may name blobs; not safe for threads, its owner locks.

    tables: the owner's own. references: a query for each column that names a blob, with the blob as its parameter.
    version: of the owner's format.
    """

    def __init__(self, folder: Path, tables: str, references: tuple[str, ...], version: str) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        self._arrays = ArrayFolder(folder / "arrays")
        # Explicit transactions only: isolation_level None takes Python's own out of the way.
        self.database = sqlite3.connect(folder / "node.db", isolation_level=None, check_same_thread=False, timeout=30)
        self.database.execute("PRAGMA journal_mode=WAL")
        self.database.execute("PRAGMA synchronous=FULL")
        self.database.executescript(_TABLES + tables)
        self._references = references
        self._dropped: set[bytes] = set()
        self._doomed: set[bytes] = set(self._arrays)
        try:
            with self.transaction():
                self._check_version(folder, version)
        except BaseException:
            self.close()
            raise

    def _check_version(self, folder: Path, version: str) -> None:
        self.database.execute("INSERT OR IGNORE INTO facts VALUES ('format', ?)", (version,))
        (found,) = self.database.execute("SELECT value FROM facts WHERE name = 'format'").fetchone()
        if found != version:
            raise NodeStoreError(f"{folder / 'node.db'} has format {found}, this version reads {version}")

    @contextmanager
    def transaction(self, step: str = "") -> Iterator[sqlite3.Connection]:
        """Do all of it, durably, or nothing. step: its name among the failpoints; nothing for one that only reads."""
        self.database.execute("BEGIN IMMEDIATE")
        try:
            self._sweep()
            yield self.database
            if step:
                reach(f"before-{step}")
            self.database.execute("COMMIT")
        except BaseException:
            if self.database.in_transaction:  # SQLite ends some by itself, when the disk is full for one
                self.database.execute("ROLLBACK")
            self._dropped.clear()
            raise
        if step:
            reach(f"after-{step}")
        self._doomed, self._dropped = self._dropped, set()

    def _sweep(self) -> None:
        """Remove the files of buffers that nobody held when this transaction began."""
        for digest in self._doomed:
            if not self._is_held(digest):
                self._arrays.remove(digest)

    def put(self, value: Message | RecordDict) -> int:
        """Keep a value; return the blob's id."""
        envelope, parts = wire.encode(value)
        blob = self.database.execute("INSERT INTO blobs (envelope) VALUES (?)", (envelope,)).lastrowid
        assert blob is not None
        for digest, buffer in parts.items():
            if len(buffer) >= LARGE:
                self._arrays.write(digest, buffer)
            else:
                self.database.execute("INSERT OR IGNORE INTO buffers VALUES (?, ?)", (digest, bytes(buffer)))
            self.database.execute("INSERT INTO holds VALUES (?, ?)", (blob, digest))
        return blob

    def message(self, blob: int) -> Message:
        """Return a message. Raises NodeStoreError when it is damaged."""
        value = self._read(blob)
        if not isinstance(value, Message):
            raise NodeStoreError("the node's store holds records where a message should be")
        return value

    def records(self, blob: int | None) -> RecordDict:
        """Return records; None stands for none at all. Raises NodeStoreError when they are damaged."""
        value = RecordDict() if blob is None else self._read(blob)
        if not isinstance(value, RecordDict):
            raise NodeStoreError("the node's store holds a message where records should be")
        return value

    def _read(self, blob: int) -> Message | RecordDict:
        row = self.database.execute("SELECT envelope FROM blobs WHERE id = ?", (blob,)).fetchone()
        if row is None:
            raise NodeStoreError(f"the node's store has no blob {blob}")
        try:
            return wire.decode(row[0], _Buffers(self.database, self._arrays))
        except (WireError, OSError) as fault:
            raise NodeStoreError(f"the node's store is damaged: {fault}") from None

    def release(self, *blobs: int | None) -> None:
        """Drop those of the blobs that no row names any more."""
        for blob in {one for one in blobs if one is not None}:
            if any(self.database.execute(query, (blob,)).fetchone() for query in self._references):
                continue
            held = {row[0] for row in self.database.execute("SELECT digest FROM holds WHERE blob = ?", (blob,))}
            self.database.execute("DELETE FROM holds WHERE blob = ?", (blob,))
            self.database.execute("DELETE FROM blobs WHERE id = ?", (blob,))
            for digest in held:
                if not self._is_held(digest):
                    self.database.execute("DELETE FROM buffers WHERE digest = ?", (digest,))
                    self._dropped.add(digest)

    def _is_held(self, digest: bytes) -> bool:
        found = self.database.execute("SELECT 1 FROM holds WHERE digest = ? LIMIT 1", (digest,)).fetchone()
        return found is not None

    def close(self) -> None:
        """Let go of the database."""
        self.database.close()


class _Buffers(Mapping[bytes, Buffer]):
    """The buffers of the store, read when asked for."""

    def __init__(self, database: sqlite3.Connection, arrays: ArrayFolder) -> None:
        self._database = database
        self._arrays = arrays

    def __getitem__(self, digest: bytes) -> Buffer:
        row = self._database.execute("SELECT data FROM buffers WHERE digest = ?", (digest,)).fetchone()
        if row is not None:
            return bytes(row[0])
        try:
            return self._arrays.read(digest)
        except FileNotFoundError:
            raise KeyError(digest) from None

    def __contains__(self, digest: object) -> bool:
        return isinstance(digest, bytes) and (self._row(digest) or digest in self._arrays)

    def _row(self, digest: bytes) -> bool:
        return self._database.execute("SELECT 1 FROM buffers WHERE digest = ?", (digest,)).fetchone() is not None

    def __iter__(self) -> Iterator[bytes]:
        yield from (row[0] for row in self._database.execute("SELECT digest FROM buffers"))
        yield from self._arrays

    def __len__(self) -> int:
        return sum(1 for _ in self)
