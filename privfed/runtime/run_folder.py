"""The folder of a run: what it was asked, what it did round by round, and where to go on.

    format           "1"
    config.json      app, resolved configuration, nodes, seed, arguments
    versions.json    Python and the packages that compute
    status.json      state, reason, last committed round, times
    metrics.jsonl    one line a committed round
    checkpoints/     round-00003.pfw: model, strategy state and metrics of a round, written atomically
    privacy_ledger.jsonl   what was charged, before it was released
    log.txt          plain lines
    stop             there when somebody asked the run to stop

Folders are mode 0700. A round is committed when its checkpoint has been renamed into place; metrics and status
follow from it, so that a crash between two files loses nothing.
"""

from __future__ import annotations

import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from privfed import wire
from privfed.errors import PrivfedError, RunStopped, WireError
from privfed.grid import Checkpoint
from privfed.record import ArrayRecord, ConfigRecord, RecordDict

FORMAT = "1"
ENDED = ("completed", "failed", "stopped")
_PACKAGES = ("privfed", "numpy", "scipy", "cryptography", "msgspec")
T = TypeVar("T")
Listener = Callable[[str, Mapping[str, object]], None]


class RunFolderError(PrivfedError):
    """A run folder that is missing, broken, or of another format."""


def home() -> Path:
    """Return the folder of all runs' home: $PRIVFED_HOME, or privfed in the user's data directory."""
    chosen = os.environ.get("PRIVFED_HOME")
    if chosen:
        return Path(chosen)
    data = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(data) / "privfed"


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Status(msgspec.Struct, forbid_unknown_fields=True):
    """Where a run stands. Times are seconds since the epoch."""

    state: str = "pending"
    reason: str = ""
    round: int = 0
    started: float = 0.0
    updated: float = 0.0
    process: int = 0


@dataclass(frozen=True, slots=True)
class Keep:
    """Which checkpoints to keep. last: this many of the newest. best: also the one with the best value of `metric`.

    The newest is always kept. metric: a round metric whose name ends in "loss" is better when lower.
    """

    last: int = 3
    best: str = ""

    @classmethod
    def parse(cls, text: str) -> Keep:
        """Read "last:3", "last:3,best" or "last:3,best:accuracy"."""
        last, best = 3, ""
        for part in filter(None, text.split(",")):
            name, _, value = part.partition(":")
            if name == "last" and value.isdigit() and int(value) >= 1:
                last = int(value)
            elif name == "best":
                best = value or "accuracy"
            else:
                raise PrivfedError(f"--keep {text!r}: write last:N, best or best:METRIC, joined by commas")
        return cls(last, best)


@dataclass
class RunFolder:
    """A run on disk; the Recorder of its grid."""

    path: Path
    keep: Keep = field(default_factory=Keep)
    listener: Listener | None = None
    insecure_test_randomness: int | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

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

    def _read(self, name: str, kind: type[T]) -> T:
        try:
            return msgspec.json.decode((self.path / name).read_bytes(), type=kind)
        except (OSError, msgspec.MsgspecError) as fault:
            raise RunFolderError(f"{self.path / name} cannot be read: {fault}") from None

    def set_status(self, status: Status) -> None:
        """Write where the run stands."""
        status.updated = time.time()
        write_atomically(self.path / "status.json", msgspec.json.encode(status))

    def begin(self) -> None:
        """Mark the run as running in this process; forget an old request to stop."""
        (self.path / "stop").unlink(missing_ok=True)
        status = self._read("status.json", Status)
        self.set_status(Status("running", "", status.round, status.started, process=os.getpid()))

    def end(self, state: str, reason: str = "") -> None:
        """Mark the run as completed, failed or stopped."""
        status = self._read("status.json", Status)
        self.set_status(Status(state, reason, status.round, status.started, process=status.process))
        self.log(f"{state}" + (f": {reason}" if reason else ""))

    def request_stop(self) -> None:
        """Ask the run to stop after its current round."""
        write_atomically(self.path / "stop", b"")

    def log(self, line: str) -> None:
        """Append a line with the time to the log."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        with self._lock, (self.path / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{stamp} {line}\n")

    def report(self, event: str, **fields: object) -> None:
        text = " ".join(f"{name}={_plain(value)}" for name, value in fields.items())
        self.log(f"{event} {text}".rstrip())
        if self.listener is not None:
            self.listener(event, fields)

    def _checkpoints(self) -> list[Path]:
        return sorted((self.path / "checkpoints").glob("round-*.pfw"))

    def restore(self) -> Checkpoint | None:
        """Return the newest checkpoint. Raises RunFolderError when it is damaged."""
        found = self._checkpoints()
        return load_checkpoint(found[-1]) if found else None

    def commit(self, checkpoint: Checkpoint) -> None:
        """Persist a round. Raises RunStopped afterwards when a stop was asked for."""
        write_atomically(self.path / "checkpoints" / f"round-{checkpoint.round:05d}.pfw", dump_checkpoint(checkpoint))
        lines = b"".join(msgspec.json.encode(_jsonable(metrics)) + b"\n" for metrics in checkpoint.metrics)
        write_atomically(self.path / "metrics.jsonl", lines)
        status = self._read("status.json", Status)
        status.round = checkpoint.round
        self.set_status(status)
        self._prune(checkpoint)
        if (self.path / "stop").exists():
            raise RunStopped(f"stopped after round {checkpoint.round}, as asked")

    def _prune(self, checkpoint: Checkpoint) -> None:
        kept = {path.name for path in self._checkpoints()[-self.keep.last :]}
        values = {
            place + 1: value
            for place, metrics in enumerate(checkpoint.metrics)
            if isinstance(value := find_metric(metrics, self.keep.best), int | float)
        }
        if self.keep.best and values:
            choose = min if self.keep.best.endswith("loss") else max
            kept.add(f"round-{choose(values, key=lambda number: values[number]):05d}.pfw")
        for path in self._checkpoints():
            if path.name not in kept:
                path.unlink()

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """The metrics of every committed round."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        return [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]


def find_metric(metrics: Mapping[str, object], name: str) -> object:
    """Return the value of a metric by name, looking into nested tables; None when it is not there."""
    if name in metrics:
        return metrics[name]
    for value in metrics.values():
        if isinstance(value, Mapping) and (found := find_metric(value, name)) is not None:
            return found
    return None


def dump_checkpoint(checkpoint: Checkpoint) -> bytes:
    """Return a checkpoint as one frame."""
    rounds = msgspec.json.encode([_jsonable(m) for m in checkpoint.metrics])
    meta = ConfigRecord({"round": checkpoint.round, "metrics": rounds})
    state = {f"state.{name}": record for name, record in checkpoint.state.items()}
    return wire.dumps(RecordDict({"checkpoint": meta, "arrays": checkpoint.arrays, **state}))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; every array is checked against its hash. Raises RunFolderError naming the file."""
    try:
        records = wire.loads(path.read_bytes())
        assert isinstance(records, RecordDict)
        meta, arrays = records["checkpoint"], records["arrays"]
        assert isinstance(meta, ConfigRecord)
        assert isinstance(arrays, ArrayRecord)
        number, metrics = meta["round"], meta["metrics"]
        assert isinstance(number, int)
        assert isinstance(metrics, bytes)
        rounds = msgspec.json.decode(metrics, type=list[dict[str, Any]])
    except (OSError, WireError, KeyError, AssertionError, msgspec.MsgspecError) as fault:
        raise RunFolderError(
            f"the checkpoint {path} is damaged ({fault}): delete it to go on from an older one"
        ) from None
    state = RecordDict(
        {name.removeprefix("state."): record for name, record in records.items() if name.startswith("state.")}
    )
    return Checkpoint(number, arrays, state, tuple(rounds))


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
