"""Array buffers on disk, each once, named by its SHA-256."""

from __future__ import annotations

import mmap
import secrets
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

from privfed.runtime.disk import write_atomically

Buffer = bytes | memoryview
MARKER = "marker"


class ArrayFolder:
    """Content-addressed files, written whole or not at all; who refers to them is somebody else's business."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._maps: weakref.WeakValueDictionary[bytes, mmap.mmap] = weakref.WeakValueDictionary()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _file(self, digest: bytes) -> Path:
        name = digest.hex()
        return self.path / name[:2] / name[2:]

    @property
    def marker(self) -> str | None:
        """What tells this folder from another; None before it was marked."""
        try:
            return (self.path / MARKER).read_text(encoding="ascii").strip()
        except FileNotFoundError:
            return None

    def mark(self) -> str:
        """Give the folder a marker of its own; durable when this returns."""
        marker = secrets.token_hex(16)
        write_atomically(self.path / MARKER, f"{marker}\n".encode())
        return marker

    def __contains__(self, digest: bytes) -> bool:
        return self._file(digest).exists()

    def write(self, digest: bytes, buffer: Buffer) -> None:
        """Keep a buffer; durable when this returns. The caller has hashed it."""
        file = self._file(digest)
        if not file.exists():
            file.parent.mkdir(mode=0o700, exist_ok=True)
            write_atomically(file, [buffer])

    def read(self, digest: bytes) -> memoryview:
        """Map a buffer into memory; the reader checks its hash. Raises FileNotFoundError.

        All readers share one map, and what they hold stays readable when the buffer is removed.
        """
        with self._lock:
            found = self._maps.get(digest)
            if found is None:
                with self._file(digest).open("rb") as file:
                    found = self._maps[digest] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return memoryview(found)

    def remove(self, digest: bytes) -> None:
        """Drop a buffer."""
        self._file(digest).unlink(missing_ok=True)

    def __iter__(self) -> Iterator[bytes]:
        for folder in sorted(path for path in self.path.iterdir() if path.is_dir()):
            for file in sorted(folder.iterdir()):
                if not file.name.startswith("."):
                    yield bytes.fromhex(folder.name + file.name)
