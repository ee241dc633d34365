"""Decoders of msgspec, built one at a time.

msgspec looks at a Struct when it is first read into. A second thread that reads into one that is only half looked at
crashes the process (seen with msgspec 0.22: nodes in threads that start together). So nothing is read with
`msgspec.json.decode` or `msgspec.convert` but through these.
"""

from __future__ import annotations

import threading
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")
_lock = threading.Lock()
_json: dict[Any, Any] = {}
_msgpack: dict[Any, Any] = {}


def json_decoder(kind: type[T]) -> msgspec.json.Decoder[T]:
    """Return the decoder of JSON for a type."""
    found: msgspec.json.Decoder[T] | None = _json.get(kind)
    if found is None:
        with _lock:
            found = _json.setdefault(kind, msgspec.json.Decoder(kind))
    return found


def msgpack_decoder(kind: type[T]) -> msgspec.msgpack.Decoder[T]:
    """Return the decoder of MessagePack for a type."""
    found: msgspec.msgpack.Decoder[T] | None = _msgpack.get(kind)
    if found is None:
        with _lock:
            found = _msgpack.setdefault(kind, msgspec.msgpack.Decoder(kind))
    return found


def converted(document: object, kind: type[T]) -> T:
    """Return what plain data stand for. Raises msgspec.ValidationError."""
    json_decoder(kind)
    return msgspec.convert(document, kind)
