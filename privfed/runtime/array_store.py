"""Where the large array buffers of a SuperLink are: the seam between the durable store and files or a bucket."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from privfed.wire import Buffer


class ArrayStoreError(OSError):
    """The store of arrays refuses for now: a run waits for it, as for a full disk."""

    def __init__(self, text: str) -> None:
        super().__init__(errno.EIO, text)


class ArrayStore(Protocol):
    """Buffers, each once, by the SHA-256 of the array; who refers to them is somebody else's business.

    Whole or not there, whoever is killed when. What is read is checked by the reader (`privfed.wire`). Threads may
    share it. Methods raise ArrayStoreError, or another OSError, when the storage refuses.
    """

    @property
    def name(self) -> str:
        """Where it is, in words."""
        ...

    @property
    def marker(self) -> str | None:
        """What tells this store from another; None before it was marked."""
        ...

    def mark(self) -> str:
        """Give the store a marker of its own; durable when this returns."""
        ...

    def __contains__(self, digest: bytes) -> bool: ...

    def write(self, digest: bytes, buffer: Buffer) -> None:
        """Keep a buffer; durable when this returns. The caller has hashed it."""
        ...

    def read(self, digest: bytes) -> memoryview:
        """Return a buffer, mapped from a file; it stays readable when it is removed. Raises FileNotFoundError."""
        ...

    def remove(self, digest: bytes) -> None:
        """Drop a buffer, if it is there."""
        ...

    def __iter__(self) -> Iterator[bytes]: ...


def open_arrays(home: Path, url: str | None = None) -> ArrayStore:
    """Return the store of arrays in `home`, or the one at a URL that fsspec knows ("s3://bucket/folder").

    Raises AppError without the packages that takes, ArrayStoreError when it cannot be reached.
    """
    if url is None:
        from privfed.runtime.array_folder import ArrayFolder

        return ArrayFolder(home / "arrays")
    from privfed.runtime.array_bucket import ArrayBucket

    return ArrayBucket(url, home / "cache")
