"""Writing files so that a crash, or a reader, sees the old content or the new, never a part."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from privfed.failpoint import around
from privfed.mapped import pieces


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


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
