"""The folder a federation keeps its files in, when several SuperLinks may serve it: SHARED/term-N, of one at a time.

A new holder renames the folder to its own term. Every commit of a file is a rename by path (`write_atomically`), so one
by an earlier holder happened before, and counts, or finds no such folder. Files that processes of an earlier holder may
still have open, a run's ledger and its journals, are replaced by copies: what it still writes is written into nothing.
A charge or a journal entry missed that way was made after the term began, and what it was made for cannot be released.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from privfed.failpoint import around
from privfed.runtime.disk import sync_folder, write_atomically
from privfed.runtime.run_folder import ENDED, RunFolder, RunFolderError
from privfed.runtime.tenure import TenureError

_PREFIX = "term-"


def take_folder(shared: Path, term: int) -> Path:
    """Make the federation's folder that of this term; return it. Raises TenureError when a later one has it."""
    shared.mkdir(mode=0o700, parents=True, exist_ok=True)
    mine = shared.resolve() / f"{_PREFIX}{term:010d}"
    while True:
        found = sorted(path for path in shared.resolve().glob(f"{_PREFIX}*") if path.name[len(_PREFIX) :].isdecimal())
        newest = found[-1] if found else None
        if newest is not None and newest.name > mine.name:
            raise TenureError(f"{newest} is there already: another SuperLink has taken over")
        if newest == mine:
            break
        try:
            with around("term-folder"):
                if newest is None:
                    mine.mkdir(mode=0o700)
                else:
                    newest.rename(mine)
        except FileNotFoundError:  # an earlier holder, late, has just renamed it
            continue
        break
    sync_folder(shared)
    for folder in sorted((mine / "runs").glob("*/format")):
        _detach(RunFolder(folder.parent))
    return mine


def _detach(run: RunFolder) -> None:
    """Replace what may be open elsewhere by copies, and forget who ran it."""
    try:
        if run.recorded_status.state in ENDED:
            return
    except RunFolderError:
        pass
    (run.path / "lock").unlink(missing_ok=True)
    for file in [run.ledger_path, *(run.path / "sessions").glob("*")]:
        if file.is_file() and not file.name.startswith("."):
            copy = file.with_name(f".{file.name}.copy")
            with around("term-copy"):
                shutil.copy(file, copy)
                with copy.open("rb") as handle:
                    os.fsync(handle.fileno())
                copy.replace(file)
                sync_folder(file.parent)


def publish(path: Path, document: bytes) -> None:
    """Leave a document for whoever serves next, unless it is there."""
    if not path.exists() or path.read_bytes() != document:
        write_atomically(path, document)
