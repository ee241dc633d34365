"""The folder of a run: what it was asked, what it did round by round, and where to go on.

    format           "1"
    config.json      app, resolved configuration, nodes, seed, arguments
    versions.json    Python and the packages that compute
    status.json      state, reason, last committed round, times
    metrics.jsonl    one line a committed round
    sampling.json    how cohorts are drawn, as the strategy reported it
    operations.jsonl who was asked, who answered and how many bytes went, for the operator: no epsilon covers it
    checkpoints/     round-00003.pfw: model, strategy state and metrics of a round, written atomically;
                     round-00003.states.pfw: what the nodes kept
    privacy_ledger.jsonl   what was charged, before it was released
    sessions/        journals of the last secure sessions, so that they outlive a crash of the server
    log.txt          plain lines
    stop             there when somebody asked the run to stop
    lock             held by the process that runs it

Folders are mode 0700. A round is committed when its checkpoint has been renamed into place; metrics and status
follow from it, so that a crash between two files loses nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from privfed.decoder import json_decoder
from privfed.errors import RunStopped
from privfed.failpoint import around
from privfed.grid import Checkpoint
from privfed.runtime.checkpoint_file import CheckpointFolder, Keep, RunFolderError, find_metric, load_checkpoint
from privfed.runtime.disk import append, write_atomically
from privfed.runtime.store import NodeState

FORMAT = "1"
ENDED = ("completed", "failed", "stopped")
_PACKAGES = ("privfed", "numpy", "scipy", "cryptography", "msgspec")
OPERATIONS = ("stage", "replies", "excluded", "query")
T = TypeVar("T")
Listener = Callable[[str, Mapping[str, object]], None]
Snapshot = Callable[[], Mapping[int, NodeState]]
"""Returns what the nodes keep (and under id 0 what the server app keeps), all at one moment."""

__all__ = [
    "Keep",
    "RunFolder",
    "RunFolderError",
    "Status",
    "find_metric",
    "find_run",
    "home",
    "list_runs",
    "load_checkpoint",
]


def home() -> Path:
    """Return the folder of all runs' home: $PRIVFED_HOME, or privfed in the user's data directory."""
    chosen = os.environ.get("PRIVFED_HOME")
    if chosen:
        return Path(chosen)
    data = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(data) / "privfed"


class Status(msgspec.Struct, forbid_unknown_fields=True):
    """Where a run stands. Times are seconds since the epoch."""

    state: str = "pending"
    reason: str = ""
    round: int = 0
    started: float = 0.0
    updated: float = 0.0
    process: int = 0


@dataclass
class RunFolder:
    """A run on disk; the Recorder of its grid. journals: whether secure sessions are to outlive this process.

    patiently: does one thing that is to be reported, again while the disk refuses, where the run is to wait for it.
    """

    path: Path
    keep: Keep = field(default_factory=Keep)
    listener: Listener | None = None
    insecure_test_randomness: int | None = None
    journals: bool = True
    patiently: Callable[[Callable[[], None]], None] = field(default=lambda work: work(), repr=False)
    _log_lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _status_lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _snapshot: Snapshot | None = field(default=None, repr=False)
    _held: int | None = field(default=None, repr=False)

    @classmethod
    def create(cls, path: Path | None, config: Mapping[str, Any], **options: Any) -> RunFolder:
        """Make a new folder; path None: under `home()`, named by date and a random word."""
        if path is None:
            name = time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(3)
            path = home() / "runs" / name
        if path.exists() and any(path.iterdir()):
            raise RunFolderError(f"{path} exists and is not empty: choose another folder, or resume it")
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.mkdir(mode=0o700, exist_ok=True)
        path.chmod(0o700)
        (path / "checkpoints").mkdir(mode=0o700, exist_ok=True)
        folder = cls(path, **options)
        write_atomically(path / "format", FORMAT.encode())
        write_atomically(path / "config.json", msgspec.json.format(msgspec.json.encode(dict(config)), indent=1))
        write_atomically(path / "versions.json", msgspec.json.format(msgspec.json.encode(_versions()), indent=1))
        folder.set_status(Status("pending", started=time.time(), process=os.getpid()))
        return folder

    @classmethod
    def open(cls, path: Path, **options: Any) -> RunFolder:
        """Open an existing folder. Raises RunFolderError naming what is wrong."""
        try:
            found = (path / "format").read_text().strip()
        except OSError:
            raise RunFolderError(f"{path} is no run folder: see `privfed ls`") from None
        if found != FORMAT:
            raise RunFolderError(f"{path} has format {found}, this version reads {FORMAT}")
        return cls(path, **options)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def ledger_path(self) -> Path:
        return self.path / "privacy_ledger.jsonl"

    def journal_path(self, name: str) -> Path | None:
        return self.path / "sessions" / name if self.journals else None

    @property
    def config(self) -> dict[str, Any]:
        """What the run was asked."""
        return self._read("config.json", dict[str, Any])

    @property
    def status(self) -> Status:
        """Where the run stands; a run whose process is gone is failed."""
        status = self._read("status.json", Status)
        if status.state in ("pending", "running") and not _alive(status.process):
            status.state, status.reason = "failed", "its process is gone; resume it with `privfed run --resume`"
        return status

    @property
    def recorded_status(self) -> Status:
        """Where the run stood when that was last written, whoever wrote it."""
        return self._read("status.json", Status)

    def _read(self, name: str, kind: type[T]) -> T:
        try:
            return json_decoder(kind).decode((self.path / name).read_bytes())
        except (OSError, msgspec.MsgspecError) as fault:
            raise RunFolderError(f"{self.path / name} cannot be read: {fault}") from None

    def set_status(self, status: Status) -> None:
        """Write where the run stands."""
        status.updated = time.time()
        write_atomically(self.path / "status.json", msgspec.json.encode(status))

    def begin(self, snapshot: Snapshot | None = None, *, unasked: bool = False) -> Mapping[int, NodeState]:
        """Mark the run as running in this process, forget an old request to stop, and take up where it was.

        snapshot: gives the node states to keep with each commit. Returns those of the newest checkpoint.
        unasked: it goes on by itself, after a crash, so that a request to stop stays in force.
        Raises RunFolderError when the run is completed, another process has it, or the checkpoint is damaged.
        """
        found = self._checkpoints().read()
        status = self._read("status.json", Status)
        if status.state == "completed":
            raise RunFolderError(f"the run in {self.path} is completed: there is nothing left to do")
        self._take_lock()
        if not unasked:
            (self.path / "stop").unlink(missing_ok=True)
        self._snapshot = snapshot
        last = found[0].round if found else 0
        self.set_status(Status("running", "", last, status.started, process=os.getpid()))
        self._write_metrics(found[0].metrics if found else ())
        return found[1] if found else {}

    def end(self, state: str, reason: str = "") -> None:
        """Mark the run as completed, failed or stopped, and let go of it."""
        status = self._read("status.json", Status)
        self.set_status(Status(state, reason, status.round, status.started, process=status.process))
        self.log(f"{state}" + (f": {reason}" if reason else ""))
        self.release()

    def release(self) -> None:
        """Let go of the run without ending it, as one who will go on with it does."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def _take_lock(self) -> None:
        held = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(held)
            raise RunFolderError(f"another process runs {self.path}: wait for it, or stop it") from None
        self._held = held

    def request_stop(self) -> None:
        """Ask the run to stop after its current round."""
        write_atomically(self.path / "stop", b"")

    def log(self, line: str) -> None:
        """Append a line with the time to the log."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        with self._log_lock:
            append(self.path / "log.txt", f"{stamp} {line}\n".encode())

    def report(self, event: str, **fields: object) -> None:
        text = " ".join(f"{name}={_plain(value)}" for name, value in fields.items())
        self.patiently(lambda: self.log(f"{event} {text}".rstrip()))
        if event in OPERATIONS:
            line = msgspec.json.encode({"time": time.time(), "event": event, **_jsonable(fields)})
            self.patiently(lambda: append(self.path / "operations.jsonl", line + b"\n"))
        if event in ("waiting", "waited"):
            reason = wait_in_words(fields) if event == "waiting" else ""
            self.patiently(lambda: self.note_wait(reason))
        if event == "sampling":
            document = msgspec.json.encode(_jsonable(fields))
            self.patiently(lambda: write_atomically(self.path / "sampling.json", document))
        if self.listener is not None:
            self.listener(event, fields)

    def note_wait(self, reason: str) -> None:
        """Write down what the run waits for, or with nothing that it goes on."""
        with self._status_lock:
            status = self.recorded_status
            if status.reason != reason:
                status.reason = reason
                self.set_status(status)

    @property
    def operations(self) -> list[dict[str, Any]]:
        """What was asked and answered, in order; a line cut short by a crash is left out."""
        path, found = self.path / "operations.jsonl", []
        for line in path.read_bytes().splitlines() if path.exists() else []:
            with contextlib.suppress(msgspec.DecodeError):
                found.append(json_decoder(dict[str, Any]).decode(line))
        return found

    def _checkpoints(self) -> CheckpointFolder:
        return CheckpointFolder(self.path / "checkpoints", self.keep)

    def restore(self) -> Checkpoint | None:
        """Return the newest checkpoint. Raises RunFolderError when it is damaged."""
        found = self._checkpoints().read()
        return found[0] if found else None

    def commit(self, checkpoint: Checkpoint) -> None:
        """Persist a round. Raises RunStopped afterwards when a stop was asked for."""
        with around("round"):
            self._checkpoints().write(checkpoint, self._snapshot() if self._snapshot is not None else {})
        self._write_metrics(checkpoint.metrics)
        with self._status_lock:
            status = self._read("status.json", Status)
            status.round = checkpoint.round
            self.set_status(status)
        self.check_stop()

    def check_stop(self) -> None:
        """Raise RunStopped when a stop was asked for."""
        if (self.path / "stop").exists():
            raise RunStopped(f"stopped after round {self.recorded_status.round}, as asked")

    def _write_metrics(self, rounds: Sequence[Mapping[str, object]]) -> None:
        lines = b"".join(msgspec.json.encode(_jsonable(metrics)) + b"\n" for metrics in rounds)
        write_atomically(self.path / "metrics.jsonl", lines)

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """The metrics of every committed round."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        return [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]


def find_run(name: str) -> Path:
    """Return the folder of a run by path, name or unambiguous beginning of its name. Raises RunFolderError."""
    path = Path(name)
    if (path / "format").exists():
        return path
    names = [folder.name for folder in _folders()]
    matches = [one for one in names if one == name] or [one for one in names if one.startswith(name)]
    if len(matches) == 1:
        return home() / "runs" / matches[0]
    if matches:
        raise RunFolderError(f"{name!r} is the beginning of {len(matches)} runs: {', '.join(matches[:5])}")
    raise RunFolderError(f"there is no run {name!r} in {home() / 'runs'}: see `privfed ls`")


def list_runs() -> list[RunFolder]:
    """Return the runs under `home()`, oldest first."""
    return [RunFolder(path) for path in _folders()]


def _folders() -> list[Path]:
    folder = home() / "runs"
    return sorted(path.parent for path in folder.glob("*/format")) if folder.is_dir() else []


def wait_in_words(fields: Mapping[str, object]) -> str:
    """Say what a "waiting" event of a strategy waits for."""
    return f"waits for {fields.get('what')}: has {fields.get('have')}, needs {fields.get('need')}"


def _versions() -> dict[str, str]:
    from importlib import metadata

    versions = {"python": sys.version.split()[0], "platform": sys.platform}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _alive(process: int) -> bool:
    if process == os.getpid():
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return process > 0


def _plain(value: object) -> str:
    text = value if isinstance(value, str) else msgspec.json.encode(_jsonable(value)).decode()
    return text if len(text) <= 2000 else text[:2000] + "..."


def _jsonable(value: object) -> Any:
    """Turn a value into what JSON can say; infinities and NaN become strings, so that nothing turns into null."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_jsonable(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if hasattr(value, "item") and not isinstance(value, str | bytes):
        value = value.item()
    if isinstance(value, float) and value - value != 0:
        return str(value)
    return value if isinstance(value, str | int | float | bool | type(None)) else str(value)
