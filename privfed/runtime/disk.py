"""Writing files so that a crash, a full disk or a reader sees the old content or the new, never a part."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from privfed.failpoint import around
from privfed.mapped import pieces

STRAY_SECONDS = 3600.0
_REFUSALS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "files may not get larger (ulimit -f)",
    errno.EROFS: "the disk is read-only",
    errno.EIO: "the disk fails",
    errno.EMFILE: "too many files are open",
    errno.ENFILE: "too many files are open",
}


def disk_fault(fault: BaseException) -> str:
    """Say why the disk does not take something, if that is what the fault is about; else nothing."""
    return _REFUSALS.get(fault.errno or 0, "") if isinstance(fault, OSError) else ""


def append(path: Path, data: bytes | memoryview) -> None:
    """Add to the end of a file all of it or, when the disk refuses, nothing."""
    with path.open("ab", buffering=0) as file:
        end, left = file.seek(0, os.SEEK_END), memoryview(data)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            os.ftruncate(file.fileno(), end)
            raise


def write_atomically(path: Path, data: bytes | Iterable[bytes | memoryview]) -> None:
    """Replace a file: temporary file, fsync, rename, fsync of the folder. data: bytes, or parts of them in order."""
    with around("file"):
        _replace(path, [data] if isinstance(data, bytes) else data)


def _replace(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.writelines(pieces(part))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sweep(folder: Path, pattern: str) -> None:
    """Remove what writers that were killed have left in a folder; what is younger than an hour may be at work."""
    for stray in folder.glob(pattern):
        with contextlib.suppress(OSError):  # it is gone
            if stray.stat().st_mtime < time.time() - STRAY_SECONDS:
                shutil.rmtree(stray) if stray.is_dir() else stray.unlink()


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
