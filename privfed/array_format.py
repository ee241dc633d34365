"""Arrays at the edges: .npy and safetensors, read strictly and without pickle."""

from __future__ import annotations

import ast
import io
import struct
import tokenize
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from privfed.decoder import json_decoder
from privfed.errors import WireError

if TYPE_CHECKING:
    from privfed.array import Array

SAFETENSORS = {
    "BOOL": "bool",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}
MAX_HEADER = 1 << 24
_NPY_FAULTS = (
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    SyntaxError,
    MemoryError,
    RecursionError,
    OverflowError,
)


def write_npy(array: Array) -> bytes:
    """Return .npy bytes (version 1.0 or the lowest that fits)."""
    out = io.BytesIO()
    np.lib.format.write_array(out, np.asarray(array.compute()), allow_pickle=False)
    return out.getvalue()


def read_npy(data: bytes | memoryview) -> Array:
    """Read .npy bytes into an Array. Raises WireError."""
    from privfed.array import Array

    buffer = memoryview(data).cast("B")
    if buffer.nbytes < 10 or bytes(buffer[:6]) != b"\x93NUMPY":
        raise WireError("not a .npy buffer: the magic string is missing")
    major = buffer[6]
    size_at, size_bytes = (8, 2) if major == 1 else (8, 4)
    start = size_at + size_bytes + int.from_bytes(buffer[size_at : size_at + size_bytes], "little")
    if major not in (1, 2, 3) or start > min(buffer.nbytes, MAX_HEADER):
        raise WireError(f"not a .npy buffer this reader knows: version {major}, header to byte {start}")
    try:
        header = ast.literal_eval(bytes(buffer[size_at + size_bytes : start]).decode("utf-8"))
        shape, fortran, descr = header["shape"], header["fortran_order"], header["descr"]
        dtype = np.dtype(descr) if isinstance(descr, str) else None
    except (*_NPY_FAULTS, tokenize.TokenError) as fault:
        raise WireError(f"broken .npy header: {type(fault).__name__}") from None
    if dtype is None or dtype.hasobject or dtype.names or not isinstance(shape, tuple) or type(fortran) is not bool:
        raise WireError("a .npy header must name one plain dtype, a shape and an order")
    swapped = dtype.newbyteorder("<")
    body = buffer[start:]
    if dtype.byteorder == ">":
        if body.nbytes % dtype.itemsize:
            raise WireError("a .npy buffer of a broken length")
        body = memoryview(np.frombuffer(body, dtype).astype(swapped).tobytes())
    order = shape[::-1] if fortran else shape
    array = Array(swapped.name, order, "raw", body)
    return array if not fortran else Array(np.ascontiguousarray(array.view().T))


def write_safetensors(arrays: Mapping[str, Array]) -> bytes:
    """Return a safetensors buffer, arrays in the order of the mapping."""
    labels = {name: label for label, name in SAFETENSORS.items()}
    header: dict[str, Any] = {}
    at = 0
    for name, array in arrays.items():
        header[name] = {
            "dtype": labels[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    head = msgspec.json.encode(header)
    head += b" " * (-len(head) % 8)
    return b"".join([struct.pack("<Q", len(head)), head, *(array.data for array in arrays.values())])


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def read_safetensors(data: bytes | memoryview) -> dict[str, Array]:
    """Read a safetensors buffer without copying the arrays. Raises WireError.

    The buffers must cover the body exactly once, in the order of the header's offsets.
    """
    from privfed.array import Array

    buffer = memoryview(data).cast("B")
    if buffer.nbytes < 8:
        raise WireError("not a safetensors buffer: shorter than 8 bytes")
    size = int.from_bytes(buffer[:8], "little")
    if size > min(buffer.nbytes - 8, MAX_HEADER):
        raise WireError(f"a safetensors header of {size} bytes does not fit")
    try:
        header = json_decoder(dict[str, msgspec.Raw]).decode(buffer[8 : 8 + size])
        header.pop("__metadata__", None)
        entries = {name: json_decoder(_Entry).decode(raw) for name, raw in header.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as fault:
        raise WireError(f"broken safetensors header: {type(fault).__name__}") from None
    body = buffer[8 + size :]
    arrays: dict[str, Array] = {}
    at = 0
    for name, entry in sorted(entries.items(), key=lambda pair: pair[1].data_offsets):
        start, end = entry.data_offsets
        if start != at or not start <= end <= body.nbytes or entry.dtype not in SAFETENSORS:
            raise WireError(f"safetensors array {name!r}: offsets {start}..{end} or dtype {entry.dtype!r} are wrong")
        arrays[name] = Array(SAFETENSORS[entry.dtype], tuple(entry.shape), "raw", body[start:end])
        at = end
    if at != body.nbytes:
        raise WireError(f"safetensors body has {body.nbytes - at} bytes too many")
    return {name: arrays[name] for name in entries}
