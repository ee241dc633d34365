"""Large arrays that are files: read and written piece by piece, their pages let go of in between.

Pages of a mapped file count as memory of the process that touched them until it lets go of them. What is let go of
stays in the file, and comes back when it is touched again; so a reduction over many large replies needs the memory of a
few pieces, and not of the replies.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Buffer = bytes | bytearray | memoryview
PIECE = 4 << 20
"""Bytes that are read before they are let go of."""
LARGE = 1 << 28
"""Bytes from which on working memory is a file, once `work_in` names a folder; smaller it is faster in memory."""
_folder: Path | None = None


class MappedFile(mmap.mmap):
    """The whole of a file, shared with it: letting go of pages loses nothing.

    path: where it was when it was mapped, if it had a name. identity: what tells the file from any other. digests: of
    arrays in it, by dtype, shape and place, as they were computed; None where it may still be written.
    """

    path: Path | None = None
    identity: tuple[int, int] = (0, 0)
    address: int = 0
    digests: dict[tuple[str, tuple[int, ...], int], bytes] | None = None


def map_file(descriptor: int, size: int, path: Path | None = None, *, write: bool = False) -> MappedFile:
    """Map a file of so many bytes, at least 1. The descriptor may be closed afterwards."""
    found = MappedFile(descriptor, size, access=mmap.ACCESS_WRITE if write else mmap.ACCESS_READ)
    found.path, found.identity = path, identify(descriptor)
    found.address = np.frombuffer(found, np.uint8).ctypes.data
    found.digests = None if write else {}
    return found


def identify(descriptor: int) -> tuple[int, int]:
    """Return device and number of an open file."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def read_file(path: Path) -> memoryview:
    """Map a file for reading."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        return memoryview(map_file(file.fileno(), size, path)) if size else memoryview(b"")


def file_of(buffer: object) -> MappedFile | None:
    """Return the mapped file that a buffer or an array lies in, if it does."""
    while isinstance(buffer, np.ndarray | memoryview):
        buffer = buffer.base if isinstance(buffer, np.ndarray) else buffer.obj
    return buffer if isinstance(buffer, MappedFile) else None


def hand_on_digests(buffer: Buffer, copy: MappedFile) -> None:
    """Note with a file that holds a copy of a buffer what is known of arrays in that, if it lies in a file, too."""
    source = file_of(buffer)
    if source is not None and source.digests and copy.digests is not None:
        start = np.frombuffer(buffer, np.uint8).ctypes.data - source.address
        known = [(dtype, shape, digest) for (dtype, shape, at), digest in list(source.digests.items()) if at == start]
        copy.digests |= {(dtype, shape, 0): digest for dtype, shape, digest in known}


def open_nameless(folder: Path) -> int:
    """Return the descriptor of a new file that has no name, and is gone when nobody has it open or mapped."""
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    except (AttributeError, OSError):  # not every system and file system has them
        descriptor, name = tempfile.mkstemp(dir=folder)
        Path(name).unlink()
        return descriptor


def let_go(buffer: Buffer | NDArray[Any]) -> None:
    """Free the pages of a buffer or an array (contiguous) that lies in a mapped file; do nothing with any other."""
    owner = file_of(buffer)
    if owner is None:
        return
    values = buffer if isinstance(buffer, np.ndarray) else np.frombuffer(buffer, np.uint8)
    if values.nbytes:
        start = values.ctypes.data - owner.address
        first = start - start % mmap.PAGESIZE
        owner.madvise(mmap.MADV_DONTNEED, first, start + values.nbytes - first)


def pieces(buffer: Buffer, size: int = PIECE) -> Iterator[memoryview]:
    """Yield a buffer in pieces of so many bytes; each is let go of when the next is asked for."""
    view = memoryview(buffer)
    if not view.nbytes:
        return
    view = view.cast("B")
    for start in range(0, len(view), size):
        piece = view[start : start + size]
        yield piece
        let_go(piece)


def work_in(folder: Path | None) -> None:
    """Let this process keep large working memory in files without names in a folder; None: in memory."""
    global _folder
    _folder = folder


def working_folder() -> Path | None:
    """Return the folder that `work_in` named."""
    return _folder


def zeros(count: int, dtype: DTypeLike = np.float64) -> NDArray[Any]:
    """Return a writable vector of zeros: in a file when it is large and there is a folder with room for it."""
    found = zeros_in_file(count, dtype)
    if found is None:
        found = np.empty(count, dtype)  # unlike np.zeros it asks for large pages, which come several times faster
        found.fill(0)
    return found


def zeros_in_file(count: int, dtype: DTypeLike = np.float64) -> NDArray[Any] | None:
    """Return a writable vector of zeros in a file; None where it should be in memory."""
    size = count * np.dtype(dtype).itemsize
    if _folder is None or size < LARGE:
        return None
    try:
        descriptor = open_nameless(_folder)
    except OSError:
        return None
    try:
        os.posix_fallocate(descriptor, 0, size)  # a full disk is found out here, and not by a signal later
        return np.frombuffer(map_file(descriptor, size, write=True), dtype)
    except (AttributeError, OSError):  # not every system can reserve room
        return None
    finally:
        os.close(descriptor)
