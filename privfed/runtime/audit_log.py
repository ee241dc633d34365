"""The audit log: what happened on this machine, in an order nobody can change afterwards.

JSON lines, each with its number, time, event, fields, and the hash of the line before; every line is signed (Ed25519)
by the machine that writes it. A flipped byte, a line taken out, put in or moved shows at once. A tail cut off shows
against a *checkpoint*, a signed statement "line n had hash h": keep one where the machine's operator cannot write.

Fields are numbers, short texts and lists of them: counts, names, digests, reasons. Secrets and metrics of single
clients do not belong here, and nothing longer than a line of text fits.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import hashlib
import os
import re
import secrets
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from privfed.decoder import json_decoder
from privfed.errors import PrivfedError
from privfed.failpoint import around

Value = str | int | float | bool | None | list[str | int]
MAX_TEXT = 2_000
MAX_LINE = 64 * 1024
MAX_ITEMS = 1_000
_LINE = b"privfed audit line v1\0"
_CHECKPOINT = b"privfed audit checkpoint v1\0"
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,39}")
_ZERO = "0" * 64


class AuditError(PrivfedError):
    """A log that is not what was written: says which line, and what is wrong with it."""


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line. hash covers all before it; signature covers the hash."""

    number: int
    time: str
    event: str
    fields: dict[str, Value]
    previous: str
    hash: str = ""
    signature: str = ""


class Checkpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A signed statement about a log: its line `number` has this hash. key: the log's public key, hex."""

    number: int
    hash: str
    key: str
    time: str
    signature: str = ""


def _hashed(line: Line) -> str:
    bare = msgspec.structs.replace(line, hash="", signature="")
    return hashlib.sha256(_LINE + msgspec.json.encode(bare, order="sorted")).hexdigest()


def _statement(checkpoint: Checkpoint) -> bytes:
    return _CHECKPOINT + msgspec.json.encode(msgspec.structs.replace(checkpoint, signature=""), order="sorted")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True, slots=True)
class Verified:
    """What a log was found to be. cut: bytes of a last line that a crash left unfinished; it was never acknowledged."""

    lines: int
    head: str
    key: str
    cut: int = 0


class AuditLog:
    """An audit log open for appending, by this process alone. A line is durable when `record` returns.

    key: 32 bytes, an Ed25519 seed: a node's identity.key, or one of the log's own.
    Raises AuditError when the file is damaged, is another key's, or is open elsewhere.
    """

    def __init__(self, path: Path, key: bytes) -> None:
        self.path = path
        self._signer = Ed25519PrivateKey.from_private_bytes(key)
        self.key = self._signer.public_key().public_bytes_raw().hex()
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise AuditError(f"{path} is open in another process") from None
        try:
            found = verify_log(path, key=self.key, swift=True) if path.stat().st_size else Verified(0, _ZERO, self.key)
            self._number, self._head = found.lines, found.head
            if found.cut:
                os.ftruncate(self._file, path.stat().st_size - found.cut)
                self.record("tail-cut", bytes=found.cut)
            elif not found.lines:
                self.record("log-opened", key=self.key)
        except BaseException:
            os.close(self._file)
            raise

    def record(self, event: str, **fields: Value) -> None:
        """Append a line; it is durable when this returns. Raises ValueError for what does not belong in a log."""
        _check(event, fields)
        with self._lock:
            line = Line(self._number, _now(), event, fields, self._head)
            digest = _hashed(line)
            signature = self._signer.sign(_LINE + bytes.fromhex(digest)).hex()
            raw = msgspec.json.encode(msgspec.structs.replace(line, hash=digest, signature=signature)) + b"\n"
            if len(raw) > MAX_LINE:
                raise ValueError(f"fields: the line has {len(raw)} bytes, at most {MAX_LINE}")
            start = os.fstat(self._file).st_size
            try:
                with around("audit-line"):
                    if os.write(self._file, raw) != len(raw):
                        raise OSError(errno.ENOSPC, "the disk is full")
                    os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, start)  # what was not acknowledged must not stand half
                raise
            self._number, self._head = self._number + 1, digest

    def checkpoint(self) -> bytes:
        """Return a signed statement of what the log holds now, to be kept elsewhere."""
        with self._lock:
            bare = Checkpoint(self._number - 1, self._head, self.key, _now())
            signature = self._signer.sign(_statement(bare)).hex()
        return msgspec.json.encode(msgspec.structs.replace(bare, signature=signature)) + b"\n"

    def close(self) -> None:
        """Release the file; nothing can be recorded any more."""
        with self._lock:
            held, self._file = self._file, -1  # a number that the system gives to another file must not be written to
            if held >= 0:
                os.close(held)

    def __enter__(self) -> AuditLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def own_key(path: Path) -> bytes:
    """Return the key in a file of mode 0600, made on first use: for machines without an identity of their own."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        key = path.read_bytes()
        if len(key) != 32:
            raise AuditError(f"{path} must hold 32 bytes: it was cut short, move it and its log away") from None
        return key
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(key := secrets.token_bytes(32))
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink()
        raise
    return key


def _check(event: str, fields: Mapping[str, Value]) -> None:
    if not _NAME.fullmatch(event):
        raise ValueError(f"event {event!r}: use lower-case words with dashes")
    for name, value in fields.items():
        items: list[object] = list(value) if isinstance(value, list) else [value]
        if len(items) > MAX_ITEMS or any(isinstance(item, str) and len(item) > MAX_TEXT for item in items):
            raise ValueError(f"field {name!r} is too long for an audit log")
        if not all(isinstance(item, str | int | float | bool | None) for item in items):
            raise ValueError(f"field {name!r} is a {type(value).__name__}: an audit log takes numbers and short texts")
        if any(isinstance(item, float) and item - item != 0 for item in items):
            raise ValueError(f"field {name!r} is not finite: write it as text")


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a log, each with its newline; the last may lack it. Bounded in memory."""
    with path.open("rb") as file:
        while raw := file.readline(MAX_LINE + 1):
            yield raw


def verify_log(path: Path, *, key: str | None = None, checkpoint: bytes | None = None, swift: bool = False) -> Verified:
    """Check every line of a log. Raises AuditError naming the first line that is wrong.

    key: the public key (hex) its lines must be signed with; None takes the one the first line names, which shows
    damage but not a log forged as a whole. checkpoint: a statement the log must contain, against a cut tail.
    swift: check the last signature alone, which covers what all lines before it say.
    """
    stated = _read_checkpoint(checkpoint) if checkpoint is not None else None
    if key is None and stated is not None:
        key = stated.key
    number, head, cut, signer = 0, _ZERO, 0, _public(key) if key is not None else None
    last: Line | None = None
    at_checkpoint = _ZERO
    for raw in read_lines(path):
        if not raw.endswith(b"\n"):
            if len(raw) > MAX_LINE:
                raise AuditError(f"{path}: line {number} is longer than a line can be")
            cut = len(raw)
            break
        line = _decode(raw, path, number)
        if signer is None:
            key = str(line.fields.get("key", ""))
            signer = _public(key)
        if (line.number, line.previous, _hashed(line)) != (number, head, line.hash):
            raise AuditError(f"{path}: line {number} does not follow from the lines before it")
        if not swift:
            _check_signature(line, signer, path)
        last = line
        number, head = number + 1, line.hash
        if stated is not None and line.number == stated.number:
            at_checkpoint = line.hash
    if swift and last is not None and signer is not None:
        _check_signature(last, signer, path)
    if stated is not None and (at_checkpoint != stated.hash or key != stated.key):
        raise AuditError(
            f"{path} lacks line {stated.number} of the checkpoint of {stated.time}: "
            "its tail was cut, or it is another log"
        )
    return Verified(number, head, key or "", cut)


def _check_signature(line: Line, signer: Ed25519PublicKey, path: Path) -> None:
    try:
        signature = bytes.fromhex(line.signature)
        if signature.hex() != line.signature:  # one signature has one spelling
            raise ValueError("not lower-case hex")
        signer.verify(signature, _LINE + bytes.fromhex(line.hash))
    except (InvalidSignature, ValueError):
        key = signer.public_bytes_raw().hex()
        raise AuditError(f"{path}: line {line.number} is not signed by {key}") from None


def _decode(raw: bytes, path: Path, number: int) -> Line:
    try:
        line = json_decoder(Line).decode(raw)
    except (msgspec.MsgspecError, UnicodeError) as cause:
        raise AuditError(f"{path}: line {number} does not decode: {cause}") from None
    if msgspec.json.encode(line) + b"\n" != raw:
        raise AuditError(f"{path}: line {number} is not as it was written")
    return line


def _public(key: str) -> Ed25519PublicKey:
    try:
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
    except ValueError:
        raise AuditError(f"{key!r} is no public key: 64 hex digits are needed") from None


def _read_checkpoint(document: bytes) -> Checkpoint:
    try:
        checkpoint = json_decoder(Checkpoint).decode(document)
        _public(checkpoint.key).verify(bytes.fromhex(checkpoint.signature), _statement(checkpoint))
    except (msgspec.MsgspecError, InvalidSignature, ValueError) as cause:
        raise AuditError(f"the checkpoint is not one: {type(cause).__name__}") from None
    return checkpoint
