"""Array buffers on disk, each once, named by its SHA-256."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from privfed.failpoint import around
from privfed.mapped import MappedFile, file_of, hand_on_digests, identify, map_file
from privfed.runtime.disk import sweep, sync_folder, write_atomically

Buffer = bytes | memoryview
MARKER = "marker"
RECENT = 64


class ArrayFolder:
    """Content-addressed files, written whole or not at all; who refers to them is somebody else's business."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._maps: weakref.WeakValueDictionary[bytes, MappedFile] = weakref.WeakValueDictionary()
        # What came in lately is read soon: its map, which knows that its hash was checked, is kept until then.
        self._recent: OrderedDict[bytes, MappedFile] = OrderedDict()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        sweep(path, "*/.*.tmp")

    def _file(self, digest: bytes) -> Path:
        name = digest.hex()
        return self.path / name[:2] / name[2:]

    @property
    def name(self) -> str:
        """Where it is."""
        return str(self.path)

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
            if not self._link(digest, file, buffer):
                write_atomically(file, [buffer])
                self._keep_copy(digest, file, buffer)

    def _link(self, digest: bytes, file: Path, buffer: Buffer) -> bool:
        """Take over the file that holds a buffer and nothing else, if there is one on the same disk."""
        owner = file_of(buffer)
        if owner is None or owner.path is None or len(owner) != len(buffer):
            return False
        temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
        try:
            os.link(owner.path, temporary)
            try:
                with temporary.open("rb") as found:
                    # The name may have been given to another file since it was mapped: that one is not taken.
                    same = identify(found.fileno()) == owner.identity
                    os.fsync(found.fileno())
                if same:
                    with around("file"):
                        temporary.replace(file)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError:
            return False
        if same:
            sync_folder(file.parent)
            self._keep(digest, owner)
        return same

    def _keep_copy(self, digest: bytes, file: Path, buffer: Buffer) -> None:
        """Keep the map of a file just written, if what it was written from is known to have its hash."""
        if len(buffer) and file_of(buffer) is not None:
            with contextlib.suppress(FileNotFoundError):  # it is removed already
                with file.open("rb") as written:
                    found = map_file(written.fileno(), len(buffer), file)
                hand_on_digests(buffer, found)
                self._keep(digest, found)

    def _keep(self, digest: bytes, found: MappedFile) -> None:
        with self._lock:
            self._maps[digest] = self._recent[digest] = found
            if len(self._recent) > RECENT:
                self._recent.popitem(last=False)

    def read(self, digest: bytes) -> memoryview:
        """Map a buffer into memory; the reader checks its hash. Raises FileNotFoundError.

        All readers share one map, and what they hold stays readable when the buffer is removed.
        """
        with self._lock:
            found = self._maps.get(digest)
            if found is None:
                path = self._file(digest)
                with path.open("rb") as file:
                    found = self._maps[digest] = map_file(file.fileno(), os.fstat(file.fileno()).st_size, path)
        return memoryview(found)

    def remove(self, digest: bytes) -> None:
        """Drop a buffer."""
        with self._lock:
            self._recent.pop(digest, None)
        self._file(digest).unlink(missing_ok=True)

    def __iter__(self) -> Iterator[bytes]:
        for folder in sorted(path for path in self.path.iterdir() if path.is_dir()):
            for file in sorted(folder.iterdir()):
                if not file.name.startswith("."):
                    yield bytes.fromhex(folder.name + file.name)
