"""Large buffers on their way between processes of one machine: received into a file without a name, then mapped."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from privfed.mapped import map_file, open_nameless

LARGE = 1 << 20
"""Buffers of at least this many bytes are spooled."""
_ALIGNMENT = 64
_PIECE = 1 << 20
Fill = Callable[[memoryview], memoryview]
"""Fills a writable buffer to its end with what comes next, and returns it."""


class Spool:
    """The large buffers of one packet: one file, one map. folder: where the file is made."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor: int | None = None
        self._end = 0
        self._places: dict[bytes, tuple[int, int]] = {}
        self._in_memory: dict[bytes, memoryview] = {}
        self._room = memoryview(b"")

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *fault: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def take(self, digest: bytes, size: int, fill: Fill, reserve: Callable[[int], memoryview]) -> None:
        """Receive a buffer into the file, or into memory when the disk refuses.

        reserve: returns so many bytes of memory.
        """
        at = 0
        try:
            descriptor, start = self._open(), self._end + -self._end % _ALIGNMENT
        except OSError:
            self._in_memory[digest] = fill(reserve(size)).toreadonly()
            return
        while at < size:
            piece = fill(self._room[: min(_PIECE, size - at)])
            try:
                _write(descriptor, piece, start + at)
            except OSError:
                self._in_memory[digest] = _finish_in_memory(descriptor, start, at, piece, fill, reserve(size))
                return
            at += len(piece)
        self._end = start + size
        self._places[digest] = start, size

    def _open(self) -> int:
        if self._descriptor is None:
            self._descriptor = open_nameless(self._folder)
            self._room = memoryview(bytearray(_PIECE))
        return self._descriptor

    def buffers(self) -> dict[bytes, memoryview]:
        """Return all buffers; the map of the file lives as long as somebody reads it."""
        if self._descriptor is None or not self._places:
            return self._in_memory
        whole = memoryview(map_file(self._descriptor, self._end))
        return self._in_memory | {digest: whole[start : start + size] for digest, (start, size) in self._places.items()}


def _finish_in_memory(
    descriptor: int, start: int, at: int, piece: memoryview, fill: Fill, data: memoryview
) -> memoryview:
    """Bring `at` bytes back from a file that has no room for the piece after them, and receive the rest."""
    done = 0
    while done < at:
        done += os.preadv(descriptor, [data[done:at]], start + done)
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, start)
    data[at : at + len(piece)] = piece
    fill(data[at + len(piece) :])
    return data.toreadonly()


def _write(descriptor: int, data: memoryview, at: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], at + done)
