"""Messages as bytes: a canonical envelope, and raw array buffers addressed by their SHA-256.

`encode` gives the envelope and the buffers it refers to, so that one model sent to n nodes is hashed and stored once;
`dumps` puts both into one frame, each buffer at a multiple of 64 bytes, so that `loads` reads arrays without a copy.

    frame     = b"PFW1" envelope-length(8) envelope padding { buffer padding }
    envelope  = kind(1) body                    message: metadata, then records or an error; records: records
    array     = dtype(1) dimensions(1) extents(8 each) sha256(32)

Every value has one encoding. A decoder given any bytes returns a value or raises WireError.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import TypeVar

from privfed.array import DTYPES, MAX_DIMENSIONS, Array, element_count
from privfed.errors import WireError
from privfed.message import Error, Message, Metadata
from privfed.protocols.codec import Reader, blob, u8, u32, u64
from privfed.protocols.errors import DecodeError
from privfed.record import ArrayRecord, ConfigRecord, ConfigValue, MetricRecord, Record, RecordDict

MAGIC = b"PFW1"
ENVELOPE = 2
"""Its place among the `parts` of a frame."""
ALIGNMENT = 64
MAX_TEXT = 1 << 24
MAX_BYTES = 1 << 31
MAX_INTEGER = 1 << 16
"""Limits in bytes, of an encoder as of a decoder: what was encoded can be decoded."""
DIGEST_BYTES = 32
Buffer = bytes | memoryview
T = TypeVar("T")

_DTYPE_NAMES = tuple(DTYPES)
_ARRAYS, _METRICS, _CONFIG = range(3)
_INT, _FLOAT, _TRUE, _FALSE, _TEXT, _BYTES, _LIST, _BIG = range(8)
_MESSAGE, _RECORDS = range(2)
_ERROR, _CONTENT = range(2)
_NAN = struct.pack(">d", float("nan"))


def _float(value: float) -> bytes:
    return _NAN if value != value else struct.pack(">d", value)


def _read_float(reader: Reader) -> float:
    raw = bytes(reader.take(8))
    value = float(struct.unpack(">d", raw)[0])
    if value != value and raw != _NAN:
        raise DecodeError("a NaN that is not the canonical one")
    return value


def _limited(raw: bytes, limit: int, what: str) -> bytes:
    if len(raw) > limit:
        raise ValueError(f"{what} of {len(raw)} bytes cannot travel: at most {limit}, put large data into an Array")
    return blob(raw)


def _text(value: str) -> bytes:
    return _limited(value.encode(), MAX_TEXT, "a text")


def _read_text(reader: Reader) -> str:
    return bytes(reader.blob(MAX_TEXT)).decode()


def _value(value: ConfigValue) -> bytes:
    if isinstance(value, bool):
        return u8(_TRUE if value else _FALSE)
    if isinstance(value, int):
        if -(1 << 63) <= value < 1 << 63:
            return u8(_INT) + value.to_bytes(8, "big", signed=True)
        raw = value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True)
        return u8(_BIG) + _limited(raw, MAX_INTEGER, "an integer")
    if isinstance(value, float):
        return u8(_FLOAT) + _float(value)
    if isinstance(value, str):
        return u8(_TEXT) + _text(value)
    if isinstance(value, bytes):
        return u8(_BYTES) + _limited(value, MAX_BYTES, "bytes")
    return u8(_LIST) + u32(len(value)) + b"".join(_value(item) for item in value)


def _read_value(reader: Reader, *, in_list: bool = False) -> ConfigValue:
    kind = reader.number(1)
    if kind == _INT:
        return int.from_bytes(reader.take(8), "big", signed=True)
    if kind == _BIG:
        return _read_big(reader)
    if kind == _FLOAT:
        return _read_float(reader)
    if kind in (_TRUE, _FALSE):
        return kind == _TRUE
    if kind == _TEXT:
        return _read_text(reader)
    if kind == _BYTES:
        return bytes(reader.blob(MAX_BYTES))
    if kind != _LIST or in_list:
        raise DecodeError(f"no value begins with {kind}")
    items = [_read_value(reader, in_list=True) for _ in range(_count(reader))]
    if len({type(item) for item in items}) > 1:
        raise DecodeError("a list of values of several types")
    return items  # type: ignore[return-value]  # one type, checked above


def _read_big(reader: Reader) -> int:
    raw = bytes(reader.blob(MAX_INTEGER))
    value = int.from_bytes(raw, "big", signed=True)
    if -(1 << 63) <= value < 1 << 63 or raw != value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True):
        raise DecodeError("an integer longer than it needs to be")
    return value


def _count(reader: Reader) -> int:
    count = reader.number(4)
    if count > len(reader):
        raise DecodeError(f"the message is too short for the {count} entries it announces")
    return count


def _array(array: Array, buffers: dict[bytes, Buffer]) -> bytes:
    digest = array.digest
    buffers.setdefault(digest, array.data)
    head = u8(_DTYPE_NAMES.index(array.dtype)) + u8(len(array.shape))
    return head + b"".join(map(u64, array.shape)) + digest


def _read_array(reader: Reader, fetch: Callable[[bytes, int], Buffer], trusted: bool) -> Array:
    place, dimensions = reader.number(1), reader.number(1)
    if place >= len(_DTYPE_NAMES) or dimensions > MAX_DIMENSIONS:
        raise DecodeError("an array of an unknown dtype or too many dimensions")
    shape = tuple(reader.number(8) for _ in range(dimensions))
    digest = bytes(reader.take(DIGEST_BYTES))
    dtype = _DTYPE_NAMES[place]
    size = element_count(shape) * DTYPES[dtype].itemsize
    if size >= 1 << 62:
        raise DecodeError("an array larger than any memory")
    if trusted:
        return Array.trust(dtype, shape, fetch(digest, size), digest)
    array = Array(dtype, shape, "raw", fetch(digest, size))
    if array.digest != digest:
        raise WireError(f"an array does not have the hash {digest.hex()[:16]} that its envelope gives")
    return array


def _record(record: Record, buffers: dict[bytes, Buffer]) -> bytes:
    if isinstance(record, ArrayRecord):
        rows = [_text(name) + _array(array, buffers) for name, array in record.items()]
        return u8(_ARRAYS) + u32(len(rows)) + b"".join(rows)
    values = [_text(name) + _value(value) for name, value in record.items()]
    return u8(_METRICS if isinstance(record, MetricRecord) else _CONFIG) + u32(len(values)) + b"".join(values)


def _read_record(reader: Reader, fetch: Callable[[bytes, int], Buffer], trusted: bool) -> Record:
    kind = reader.number(1)
    if kind not in (_ARRAYS, _METRICS, _CONFIG):
        raise DecodeError(f"no record begins with {kind}")
    if kind == _ARRAYS:
        return ArrayRecord(_named(reader, lambda: _read_array(reader, fetch, trusted)))
    values = _named(reader, lambda: _read_value(reader))
    return MetricRecord(values) if kind == _METRICS else ConfigRecord(values)  # type: ignore[arg-type]  # it checks


def _named(reader: Reader, read: Callable[[], T]) -> dict[str, T]:
    named: dict[str, T] = {}
    for _ in range(_count(reader)):
        name = _read_text(reader)
        if name in named:
            raise DecodeError(f"the name {name!r} comes twice")
        named[name] = read()
    return named


def _records(content: RecordDict, buffers: dict[bytes, Buffer]) -> bytes:
    rows = [_text(name) + _record(record, buffers) for name, record in content.items()]
    return u32(len(rows)) + b"".join(rows)


def _read_records(reader: Reader, fetch: Callable[[bytes, int], Buffer], trusted: bool) -> RecordDict:
    return RecordDict(_named(reader, lambda: _read_record(reader, fetch, trusted)))


def _metadata(data: Metadata) -> bytes:
    numbers = u64(data.run_id) + u64(data.src_node_id) + u64(data.dst_node_id)
    times = _float(data.created_at) + _float(data.ttl) + _float(data.delivered_at)
    texts = (data.message_id, data.reply_to_message_id, data.group_id, data.message_type)
    return numbers + times + b"".join(map(_text, texts))


def _read_metadata(reader: Reader) -> Metadata:
    run, source, target = (reader.number(8) for _ in range(3))
    created, ttl, delivered = (_read_float(reader) for _ in range(3))
    message, reply_to, group, kind = (_read_text(reader) for _ in range(4))
    return Metadata(run, message, source, target, reply_to, group, created, ttl, kind, delivered)


def _envelope(value: Message | RecordDict, buffers: dict[bytes, Buffer]) -> bytes:
    if isinstance(value, RecordDict):
        return u8(_RECORDS) + _records(value, buffers)
    head = u8(_MESSAGE) + _metadata(value.metadata)
    if value.has_error():
        reason = value.error.reason
        told = u8(0) if reason is None else u8(1) + _text(reason)
        return head + u8(_ERROR) + value.error.code.to_bytes(4, "big", signed=True) + told
    return head + u8(_CONTENT) + _records(value.content, buffers)


def _read_envelope(reader: Reader, fetch: Callable[[bytes, int], Buffer], trusted: bool) -> Message | RecordDict:
    kind = reader.number(1)
    if kind == _RECORDS:
        return _read_records(reader, fetch, trusted)
    if kind != _MESSAGE:
        raise DecodeError(f"no envelope begins with {kind}")
    metadata = _read_metadata(reader)
    what = reader.number(1)
    if what == _CONTENT:
        return Message.restore(metadata, _read_records(reader, fetch, trusted))
    if what != _ERROR:
        raise DecodeError("neither content nor an error")
    code = int.from_bytes(reader.take(4), "big", signed=True)
    told = reader.number(1)
    if told > 1:
        raise DecodeError("a reason is there or it is not")
    return Message.restore(metadata, Error(code, _read_text(reader) if told else None))


def _decode(envelope: Buffer, fetch: Callable[[bytes, int], Buffer], *, trusted: bool = False) -> Message | RecordDict:
    reader = Reader(envelope)
    try:
        value = _read_envelope(reader, fetch, trusted)
        reader.end()
    except WireError:
        raise
    except (DecodeError, ValueError, TypeError, OverflowError, MemoryError) as fault:
        raise WireError(str(fault)) from None
    return value


def encode(value: Message | RecordDict) -> tuple[bytes, dict[bytes, Buffer]]:
    """Return the envelope and the buffers it names, by SHA-256 of dtype, shape and content.

    Raises ValueError for what cannot travel: a text or an integer that is too long, an id that is no unsigned 64 bits.
    """
    buffers: dict[bytes, Buffer] = {}
    try:
        return _envelope(value, buffers), buffers
    except OverflowError as fault:
        raise ValueError(f"an id or a code does not fit the wire: {fault}") from None


def decode(envelope: Buffer, buffers: Mapping[bytes, Buffer], *, trusted: bool = False) -> Message | RecordDict:
    """Read an envelope; every array's hash is checked against its buffer. Raises WireError.

    trusted: whoever gives the buffers has checked the hashes and is no stranger: they are not computed again.
    """

    def fetch(digest: bytes, size: int) -> Buffer:
        del size
        if digest not in buffers:
            raise WireError(f"the buffer {digest.hex()[:16]} is missing")
        return buffers[digest]

    return _decode(envelope, fetch, trusted=trusted)


def peek(envelope: Buffer) -> Metadata:
    """Read the metadata at the head of a message's envelope and nothing else. Raises WireError."""
    reader = Reader(envelope)
    try:
        if reader.number(1) != _MESSAGE:
            raise DecodeError("the envelope holds records, not a message")
        return _read_metadata(reader)
    except (DecodeError, ValueError) as fault:
        raise WireError(str(fault)) from None


def parts(value: Message | RecordDict) -> list[Buffer]:
    """Return a frame in parts that are written one after the other; buffers are not copied."""
    envelope, buffers = encode(value)
    frame: list[Buffer] = [MAGIC, u64(len(envelope)), envelope]
    at = len(MAGIC) + 8 + len(envelope)
    for buffer in buffers.values():
        gap = -at % ALIGNMENT
        frame += (bytes(gap), buffer)
        at += gap + len(buffer)
    return frame


def dumps(value: Message | RecordDict) -> bytes:
    """Return one frame with the envelope and its buffers."""
    return b"".join(parts(value))


def envelope_of(frame: Buffer) -> memoryview:
    """Return the envelope of a frame, which names the hash of every buffer in it. Raises WireError."""
    view = memoryview(frame).cast("B")
    start = len(MAGIC) + 8
    if len(view) < start or bytes(view[: len(MAGIC)]) != MAGIC:
        raise WireError("not a frame: the magic string is missing")
    end = start + int.from_bytes(view[len(MAGIC) : start], "big")
    if end > len(view):
        raise WireError("the frame ends inside its envelope")
    return view[start:end]


def loads(frame: Buffer) -> Message | RecordDict:
    """Read a frame; arrays view its memory, or a copy's when it could change. Raises WireError on anything else."""
    view = memoryview(frame).cast("B")
    if not view.readonly:
        view = memoryview(bytes(view))
    envelope = envelope_of(view)
    found: dict[bytes, memoryview] = {}
    at = len(MAGIC) + 8 + len(envelope)

    def fetch(digest: bytes, size: int) -> Buffer:
        nonlocal at
        if digest not in found:
            first = at + -at % ALIGNMENT
            if first + size > len(view) or any(view[at:first]):
                raise WireError("the frame ends inside a buffer, or its padding is not zero")
            found[digest] = view[first : first + size]
            at = first + size
        return found[digest]

    value = _decode(envelope, fetch)
    if at != len(view):
        raise WireError(f"{len(view) - at} bytes follow the end of the frame")
    return value
