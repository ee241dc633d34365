"""Fetching the results of a run from a SuperLink into a run folder on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from privfed.errors import PrivfedError
from privfed.mapped import pieces, read_file
from privfed.runtime.control import ControlClient
from privfed.runtime.disk import write_atomically
from privfed.runtime.handshake import NetworkError, Refused
from privfed.runtime.result import CHECKPOINTS, OPERATIONS, PLAIN, ResultFile, ResultRows
from privfed.runtime.run_folder import ENDED, RunFolder, load_checkpoint

TRIES = 5
PAUSE_SECONDS = 1.0
MODEL = "model.safetensors"
Told = Callable[[str, int, int], None]
"""Told of progress: a file, and how many of its bytes are here."""


class FetchError(PrivfedError):
    """Results that cannot be fetched, or are not what their hashes say."""


def fetch(
    control: ControlClient, name: str, folder: Path, models: str, told: Told = lambda path, here, size: None
) -> ResultRows:
    """Bring a run's results into a folder, which is then a run folder of this machine; return what was brought.

    models: see `ResultQuery`; with one, its arrays are also written as `model.safetensors`. What is there already is
    not sent again, and a transfer that broke off goes on where it did. Raises FetchError, NetworkError.
    """
    for attempt in range(TRIES):
        rows = control.results(name, models)
        _check(rows, folder)
        (folder / CHECKPOINTS).mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        try:
            for file in rows.files:
                _fetch_file(control, rows.run, file, folder / file.path, told)
        except Refused:
            raise
        except (NetworkError, FetchError):  # the line was cut, or the run went on meanwhile
            if attempt + 1 == TRIES:
                raise
            time.sleep(PAUSE_SECONDS)
            continue
        for stray in folder.glob("**/.*.part"):  # of files that are no longer there
            stray.unlink()
        _settle(control, rows, folder)
        _write_model(rows, folder)
        return rows
    raise AssertionError("unreachable")


def _check(rows: ResultRows, folder: Path) -> None:
    """Refuse names that are no results, and a folder that holds another run."""
    for file in rows.files:
        number = file.path.removeprefix(f"{CHECKPOINTS}/round-").removesuffix(".pfw")
        if file.path not in (*PLAIN, OPERATIONS) and file.path != f"{CHECKPOINTS}/round-{number}.pfw":
            raise FetchError(f"the SuperLink names {file.path[:200]!r}, which is no result of a run")
        if file.path.startswith(CHECKPOINTS) and not (number.isascii() and number.isdecimal()):
            raise FetchError(f"the SuperLink names {file.path[:200]!r}, which is no checkpoint")
    if folder.exists() and any(folder.iterdir()):
        mark = folder / "fetched"
        if not mark.exists() or mark.read_text().strip() != rows.run:
            raise FetchError(f"{folder} exists and holds something else: give another folder with -o")
        return
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(folder / "fetched", f"{rows.run}\n".encode())


def _fetch_file(control: ControlClient, run: str, file: ResultFile, path: Path, told: Told) -> None:
    if path.exists() and path.stat().st_size == file.size and _digest(path) == file.digest:
        told(file.path, file.size, file.size)
        return
    part = path.with_name(f".{path.name}.{file.digest.hex()[:16]}.part")
    for old in path.parent.glob(f".{path.name}.*.part"):
        if old != part:
            old.unlink()
    here = part.stat().st_size if part.exists() else 0
    if here > file.size:
        part.unlink()
        here = 0
    with part.open("ab") as target:
        for piece in control.result(run, file, here):
            target.write(piece)
            here += len(piece)
            told(file.path, here, file.size)
            if here > file.size:
                break
    if here != file.size or _digest(part) != file.digest:
        part.unlink()
        raise FetchError(f"{file.path} of run {run} does not have the hash it was listed with")
    part.replace(path)


def _digest(path: Path) -> bytes:
    state = hashlib.sha256()
    for piece in pieces(read_file(path)):
        state.update(piece)
    return state.digest()


def _settle(control: ControlClient, rows: ResultRows, folder: Path) -> None:
    """Make the status true here: the process that runs it is on another machine."""
    status = RunFolder.open(folder).recorded_status
    if status.state not in ENDED:
        status.reason = f"round {status.round} of a run that goes on at {control.address}"
        status.state = "stopped"
    status.process = 0
    (folder / "status.json").write_bytes(msgspec.json.encode(status))


def _write_model(rows: ResultRows, folder: Path) -> None:
    """Write the newest model in a form that other programs read, and drop checkpoints that are no longer kept there."""
    names = sorted(file.path for file in rows.files if file.path.startswith(CHECKPOINTS))
    if not names:
        return
    for old in (folder / CHECKPOINTS).glob("round-*.pfw"):
        if f"{CHECKPOINTS}/{old.name}" not in names:
            with contextlib.suppress(FileNotFoundError):
                old.unlink()
    arrays = load_checkpoint(folder / names[-1]).arrays
    write_atomically(folder / MODEL, arrays.to_safetensors())
