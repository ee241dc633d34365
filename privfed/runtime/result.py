"""What a user may take home of a run: its model, metrics and logs, file by file, each named by its SHA-256.

Never what nodes or the server app keep between rounds, nor journals of secure sessions; what was asked of whom and how
many bytes went (`operations.jsonl`) is for operators, since no epsilon covers it.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from privfed.errors import PrivfedError
from privfed.mapped import pieces, read_file
from privfed.runtime.frame import CHUNK, Frame
from privfed.runtime.run_folder import RunFolder

PLAIN = (
    "format",
    "config.json",
    "versions.json",
    "status.json",
    "metrics.jsonl",
    "sampling.json",
    "privacy_ledger.jsonl",
    "log.txt",
    "server_app.txt",
)
OPERATIONS = "operations.jsonl"
CHECKPOINTS = "checkpoints"
MODELS = ("none", "newest", "all")
_KNOWN = 256
SMALL = 4 << 20
_CAPTURED = 64 << 20


class ResultQuery(Frame, frozen=True):
    """Asks for the results of a run. models: which checkpoints, "none", "newest" or "all" that were kept."""

    name: str
    models: str


class ResultFile(Frame, frozen=True):
    """A file of a run, relative to its folder, as it was when it was listed."""

    path: str
    size: int
    digest: bytes


class ResultRows(Frame, frozen=True):
    """The files of a run, and its state."""

    run: str
    state: str
    round: int
    files: tuple[ResultFile, ...]


class ResultPart(Frame, frozen=True):
    """Asks for the bytes of a listed file from an offset on; they come as they are, in pieces."""

    run: str
    file: ResultFile
    offset: int


class ResultError(PrivfedError):
    """A file that is not among a run's results, or not as it was listed any more."""


class Results:
    """Lists and reads results. Threads may share it.

    Small files of a run that goes on change between the two: they are read as they were listed, for a while.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, int, int], bytes] = OrderedDict()
        self._captured: OrderedDict[bytes, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def list(self, folder: RunFolder, models: str, *, operator: bool) -> tuple[ResultFile, ...]:
        """Return the files that are there now. Raises ResultError for other `models` than MODELS."""
        if models not in MODELS:
            raise ResultError(f"models {models!r}: say {', '.join(MODELS)}")
        names = [*PLAIN, OPERATIONS] if operator else list(PLAIN)
        checkpoints = sorted(f"{CHECKPOINTS}/{path.name}" for path in _checkpoints(folder))
        names += {"none": [], "newest": checkpoints[-1:], "all": checkpoints}[models]
        found = (self._file(folder.path, name) for name in names)
        return tuple(file for file in found if file is not None)

    def _file(self, home: Path, name: str) -> ResultFile | None:
        """Hash a file, unless it is as it was when it was hashed last; None when it is not there."""
        path = home / name
        try:
            status = path.stat()
            key = (str(path), status.st_size, status.st_mtime_ns)
            if status.st_size <= SMALL:
                return self._capture(name, path.read_bytes())
            with self._lock:
                digest = self._known.get(key)
            if digest is None:
                state = hashlib.sha256()
                for piece in pieces(read_file(path)[: status.st_size]):
                    state.update(piece)
                digest = state.digest()
        except FileNotFoundError:
            return None
        except PermissionError:  # another user's app made it a moment ago
            raise ResultError(f"{name} of run {home.name} is not shared by its superexec yet: ask again") from None
        with self._lock:
            self._known[key] = digest
            while len(self._known) > _KNOWN:
                self._known.popitem(last=False)
        return ResultFile(path=name, size=status.st_size, digest=digest)

    def _capture(self, name: str, data: bytes) -> ResultFile:
        digest = hashlib.sha256(data).digest()
        with self._lock:
            self._captured[digest] = data
            self._captured.move_to_end(digest)
            while sum(map(len, self._captured.values())) > _CAPTURED:
                self._captured.popitem(last=False)
        return ResultFile(path=name, size=len(data), digest=digest)

    def read(self, folder: RunFolder, asked: ResultPart, *, operator: bool) -> Iterator[memoryview]:
        """Yield the bytes of a result file. Raises ResultError for any other."""
        allowed = {*PLAIN, *(f"{CHECKPOINTS}/{path.name}" for path in _checkpoints(folder))}
        if operator:
            allowed.add(OPERATIONS)
        path, size = asked.file.path, asked.file.size
        if path not in allowed:
            raise ResultError(f"{path[:200]!r} is not among the results of run {folder.name}, or not any more")
        with self._lock:
            captured = self._captured.get(asked.file.digest)
        data = memoryview(captured) if captured is not None else read_file(folder.path / path)
        if not 0 <= asked.offset <= size <= len(data):
            raise ResultError(f"{path} of run {folder.name} has {len(data)} bytes now: list the results again")
        return pieces(data[asked.offset : size], CHUNK)


def _checkpoints(folder: RunFolder) -> Iterator[Path]:
    for path in (folder.path / CHECKPOINTS).glob("round-*.pfw"):
        if path.name.removeprefix("round-").removesuffix(".pfw").isdecimal():
            yield path
