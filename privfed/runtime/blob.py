"""Buffers on their way over the network: kept on disk chunk by chunk, so that a transfer goes on where it broke off.

Nothing here says that a buffer is what its digest promises: whoever opens it checks that (`privfed.wire` does, for
arrays), and drops what is not.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from privfed.errors import PrivfedError
from privfed.mapped import read_file
from privfed.runtime.disk import append


class BlobError(PrivfedError):
    """A chunk that does not fit: out of order, of another size, or more than there is room for."""


class BlobFolder(Mapping[bytes, memoryview]):
    """Whole buffers by digest, and parts of others. Threads may share it; a process has it for itself.

    budget: bytes of all files. evict: make room by dropping what was used longest ago, instead of refusing.
    """

    def __init__(self, path: Path, budget: int, *, evict: bool = False) -> None:
        self.path = path
        self._budget = budget
        self._evict = evict
        self._lock = threading.Lock()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = sorted((file for file in path.iterdir() if file.is_file()), key=lambda file: file.stat().st_mtime)
        # What has arrived of each, oldest use first; the total is not known of a part from before a restart.
        self._arrived: dict[bytes, int] = {}
        self._whole: set[bytes] = set()
        for file in found:
            digest = bytes.fromhex(file.stem)
            self._arrived[digest] = file.stat().st_size
            if file.suffix != ".part":
                self._whole.add(digest)

    def _file(self, digest: bytes) -> Path:
        return self.path / (digest.hex() + ("" if digest in self._whole else ".part"))

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self._arrived.values())

    def arrived(self, digest: bytes) -> int:
        """Return how many bytes of a buffer are here."""
        return self._arrived.get(digest, 0)

    def add(self, digest: bytes, offset: int, total: int, data: memoryview) -> bool:
        """Append a chunk; return whether the buffer is whole now. Raises BlobError when it does not fit.

        A chunk that is here already is taken as read.
        """
        with self._lock:
            have = self._arrived.get(digest, 0)
            if digest in self._whole or offset + len(data) <= have:
                return digest in self._whole
            if offset != have or have > total:
                raise BlobError(f"a chunk at byte {offset}, but {have} bytes have arrived")
            self._make_room(digest, total - have)
            append(self._file(digest), data)
            self._arrived[digest] = have + len(data)
            if have + len(data) == total:
                part = self._file(digest)
                self._whole.add(digest)
                part.replace(self._file(digest))
            return digest in self._whole

    def _make_room(self, digest: bytes, more: int) -> None:
        if self._evict:
            for old in [one for one in self._arrived if one != digest]:
                if self.size + more <= self._budget:
                    return
                self._remove(old)
        if self.size + more > self._budget:
            raise BlobError(f"{self.size} bytes are kept and {more} more announced: the limit is {self._budget}")

    def __contains__(self, digest: object) -> bool:
        return digest in self._whole

    def __getitem__(self, digest: bytes) -> memoryview:
        """Map a buffer into memory; it stays readable when it is dropped."""
        with self._lock:
            if digest not in self._whole:
                raise KeyError(digest.hex()[:16])
            self._arrived[digest] = self._arrived.pop(digest)  # used last
            return read_file(self._file(digest))

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._whole)

    def __len__(self) -> int:
        return len(self._whole)

    def drop(self, digests: Collection[bytes]) -> None:
        """Forget buffers and parts of buffers."""
        with self._lock:
            for digest in digests:
                self._remove(digest)

    def _remove(self, digest: bytes) -> None:
        if self._arrived.pop(digest, None) is not None:
            self._file(digest).unlink(missing_ok=True)
            self._whole.discard(digest)

    def clear(self) -> None:
        """Forget everything."""
        self.drop(list(self._arrived))
