"""Array buffers in S3-compatible storage, or any other that fsspec knows: an object each, named as files are.

What is read is kept in a folder of this machine, as much as fits its budget, and mapped from there. Credentials and
endpoint come from where such programs take them: the environment or their configuration files, never a URL of ours.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from privfed.errors import AppError
from privfed.mapped import PIECE, pieces
from privfed.runtime.array_folder import MARKER
from privfed.runtime.array_store import ArrayStoreError
from privfed.runtime.blob import BlobError, BlobFolder
from privfed.wire import Buffer

CACHE_BYTES = 64 << 30
T = TypeVar("T")


class ArrayBucket:
    """url: "s3://bucket/folder". cache: a folder of this process alone; it is emptied. budget: bytes of it."""

    def __init__(self, url: str, cache: Path, budget: int = CACHE_BYTES) -> None:
        scheme, colon, rest = url.partition("://")
        if not colon or "@" in rest.split("/")[0]:
            raise AppError("--arrays: write s3://BUCKET/FOLDER; credentials belong into the environment, not here")
        try:
            import fsspec
        except ImportError:
            raise AppError("arrays in a bucket need their packages: pip install 'privfed[s3]'") from None
        # What was listed before says nothing: other SuperLinks write here too.
        options = {"s3": {"use_listings_cache": False}, "file": {"auto_mkdir": True}}.get(scheme, {})
        try:
            self._files, root = fsspec.core.url_to_fs(url, skip_instance_cache=True, **options)
        except (ImportError, ValueError) as cause:
            raise AppError(f"--arrays {url}: {cause}") from None
        self._root = str(root).rstrip("/")
        self.name = url
        self._cache = BlobFolder(cache, budget, evict=True)
        self._cache.clear()

    def _place(self, digest: bytes) -> str:
        name = digest.hex()
        return f"{self._root}/{name[:2]}/{name[2:]}"

    def _ask(self, work: Callable[[], T]) -> T:
        """Do something in the bucket. Raises FileNotFoundError, or ArrayStoreError whatever else went wrong."""
        try:
            return work()
        except FileNotFoundError:
            raise
        except Exception as cause:
            text = str(cause).splitlines()[0][:200] if str(cause) else ""
            raise ArrayStoreError(f"{self.name} fails: {type(cause).__name__}: {text}") from cause

    @property
    def marker(self) -> str | None:
        """What tells this bucket from another; None before it was marked."""
        try:
            return bytes(self._ask(lambda: self._files.cat_file(f"{self._root}/{MARKER}"))).decode("ascii").strip()
        except FileNotFoundError:
            return None

    def mark(self) -> str:
        """Give the bucket a marker of its own; durable when this returns."""
        marker = secrets.token_hex(16)
        self._put(f"{self._root}/{MARKER}", f"{marker}\n".encode())
        return marker

    def __contains__(self, digest: bytes) -> bool:
        return bool(self._ask(lambda: self._files.exists(self._place(digest))))

    def write(self, digest: bytes, buffer: Buffer) -> None:
        """Keep a buffer; durable when this returns. The caller has hashed it."""
        if digest not in self:
            self._put(self._place(digest), buffer)
        at = 0
        for piece in pieces(buffer):  # it is read soon
            self._hold(digest, at, len(buffer), piece)
            at += len(piece)

    def _put(self, place: str, data: Buffer) -> None:
        """Write an object that is whole when it appears."""

        def put() -> None:
            with self._files.open(place, "wb", autocommit=False) as target:
                for piece in pieces(data):
                    target.write(piece)
            target.commit()

        try:
            self._ask(put)
        except FileNotFoundError as cause:
            raise ArrayStoreError(f"{self.name} cannot be written, it is not there: {cause}") from cause

    def _hold(self, digest: bytes, at: int, total: int, piece: memoryview) -> None:
        try:
            self._cache.add(digest, at, total, piece)
        except BlobError as cause:
            raise ArrayStoreError(f"{self._cache.path} cannot hold an array of {self.name}: {cause}") from None

    def read(self, digest: bytes) -> memoryview:
        """Return a buffer, fetched unless it is here. Raises FileNotFoundError."""
        if digest not in self._cache:
            self._ask(lambda: self._fetch(digest))
        try:
            return self._cache[digest]
        except KeyError:  # dropped meanwhile
            raise FileNotFoundError(digest.hex()) from None

    def _fetch(self, digest: bytes) -> None:
        place = self._place(digest)
        total = int(self._files.info(place)["size"])
        with self._files.open(place, "rb", cache_type="none") as source:
            at = self._cache.arrived(digest)
            source.seek(at)
            while piece := source.read(min(PIECE, total - at)):
                self._hold(digest, at, total, memoryview(piece))
                at += len(piece)

    def remove(self, digest: bytes) -> None:
        """Drop a buffer, if it is there."""

        def drop() -> None:
            self._files.rm_file(self._place(digest))

        try:
            self._ask(drop)
        except FileNotFoundError:
            pass
        finally:
            self._cache.drop([digest])

    def __iter__(self) -> Iterator[bytes]:
        found: list[Any] = self._ask(lambda: self._files.find(self._root))
        for path in found:
            name = "".join(str(path).rsplit("/", 2)[1:])
            if len(name) == 64 and not set(name) - set("0123456789abcdef"):
                yield bytes.fromhex(name)
