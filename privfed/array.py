"""One immutable array: dtype, shape, buffer, and its content address."""

from __future__ import annotations

import hashlib
import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.errors import WireError
from privfed.mapped import file_of, pieces

_NUMPY_NAMES = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64"
DTYPES = {name: np.dtype(name).newbyteorder("<") for name in _NUMPY_NAMES.split()}
"""The dtypes that may travel. bfloat16 travels as its 16 bits."""
DTYPES["bfloat16"] = np.dtype("<u2")

MAX_DIMENSIONS = 32
RAW = "raw"
NPY = "numpy.ndarray"


def element_count(shape: tuple[int, ...]) -> int:
    """Return the number of elements of a shape (1 for a 0-dimensional array)."""
    count = 1
    for extent in shape:
        count *= extent
    return count


class Array:
    """An immutable array.

    `Array(ndarray)` copies it; `Array.adopt(ndarray)` does not and freezes it instead.
    `Array(dtype, shape, stype, data)` wraps a serialised buffer: stype "raw" (little-endian, C order) without a copy,
    or "numpy.ndarray" (.npy bytes).

    Raises TypeError for a dtype outside `DTYPES`, WireError for a buffer that does not fit.
    """

    __slots__ = ("_digest", "_view", "dtype")

    dtype: str
    _view: NDArray[Any]
    _digest: bytes | None

    def __init__(
        self,
        dtype: str | NDArray[Any],
        shape: tuple[int, ...] | list[int] | None = None,
        stype: str = RAW,
        data: bytes | memoryview | None = None,
    ) -> None:
        self._digest = None
        if not isinstance(dtype, str):
            self.dtype, self._view = _freeze(dtype, copy=True)
            return
        if shape is None or data is None:
            raise TypeError("Array takes an ndarray, or dtype, shape, stype and data")
        if stype == NPY:
            from privfed.array_format import read_npy

            array = read_npy(data)
            if (array.dtype, array.shape) != (dtype, tuple(shape)):
                raise WireError(f"the .npy buffer holds {array.dtype}{array.shape}, not {dtype}{tuple(shape)}")
            self.dtype, self._view = array.dtype, array._view
            return
        if stype != RAW:
            raise WireError(f"unknown stype {stype!r}: use {RAW!r} or {NPY!r}")
        self.dtype, self._view = dtype, _wrap(dtype, tuple(shape), data)

    @classmethod
    def adopt(cls, ndarray: NDArray[Any]) -> Array:
        """Wrap an ndarray without a copy where its layout allows; the ndarray becomes read-only."""
        array = cls.__new__(cls)
        array._digest = None
        array.dtype, array._view = _freeze(ndarray, copy=False)
        return array

    @classmethod
    def from_numpy_ndarray(cls, ndarray: NDArray[Any]) -> Array:
        """Copy an ndarray."""
        return cls(ndarray)

    @classmethod
    def from_float32_as_bfloat16(cls, ndarray: NDArray[Any]) -> Array:
        """Round float32 values to the nearest bfloat16 (ties to even; NaN stays NaN)."""
        bits = np.ascontiguousarray(ndarray, dtype=np.float32).view(np.uint32).reshape(np.shape(ndarray))
        rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
        rounded = np.where(np.isnan(ndarray), np.uint16(0x7FC0), rounded).astype("<u2")
        return cls("bfloat16", np.shape(ndarray), RAW, memoryview(np.ascontiguousarray(rounded).tobytes()))

    @classmethod
    def from_torch_tensor(cls, tensor: Any) -> Array:
        """Copy a PyTorch tensor, bfloat16 included."""
        tensor = tensor.detach().cpu()
        if str(tensor.dtype) == "torch.bfloat16":
            return cls.from_float32_as_bfloat16(tensor.float().numpy())
        return cls(tensor.numpy())

    def to_torch_tensor(self) -> Any:
        """Return a new PyTorch tensor; needs torch."""
        torch = importlib.import_module("torch")  # an extra, and only for those who have tensors
        tensor = torch.from_numpy(np.array(self.compute()))
        return tensor.to(torch.bfloat16) if self.dtype == "bfloat16" else tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self._view.shape

    @property
    def nbytes(self) -> int:
        return self._view.nbytes

    @property
    def stype(self) -> str:
        return RAW

    @property
    def data(self) -> memoryview:
        """The raw little-endian buffer, read-only, not copied."""
        return self._view.reshape(-1).view(np.uint8).data

    @property
    def digest(self) -> bytes:
        """SHA-256 over dtype, shape and buffer; computed once, also for all arrays at one place of a mapped file."""
        if self._digest is None:
            owner = file_of(self._view)
            if owner is None or owner.digests is None:
                self._digest = self._compute_digest()
            else:
                place = (self.dtype, self.shape, self._view.ctypes.data - owner.address)
                if place not in owner.digests:
                    owner.digests[place] = self._compute_digest()
                self._digest = owner.digests[place]
        return self._digest

    def _compute_digest(self) -> bytes:
        head = f"{self.dtype}:{','.join(map(str, self.shape))};".encode()
        state = hashlib.sha256(head)
        for piece in pieces(self.data):
            state.update(piece)
        return state.digest()

    @classmethod
    def trust(cls, dtype: str, shape: tuple[int, ...], data: bytes | memoryview, digest: bytes) -> Array:
        """Wrap a raw buffer whose digest somebody has checked who is trusted."""
        array = cls(dtype, shape, RAW, data)
        array._digest = digest
        return array

    def view(self) -> NDArray[Any]:
        """Return the buffer as a read-only ndarray, not copied (bfloat16: its bits as uint16)."""
        return self._view

    def compute(self) -> NDArray[Any]:
        """Return what arithmetic should use: `view()`, or a float32 copy of bfloat16."""
        if self.dtype != "bfloat16":
            return self._view
        return (self._view.astype(np.uint32) << np.uint32(16)).view(np.float32)

    def numpy(self) -> NDArray[Any]:
        """Return a writable copy (bfloat16: as float32)."""
        return np.array(self.compute())

    def replace(self, ndarray: NDArray[Any]) -> Array:
        """Return an Array of the same dtype with other values of the same shape.

        Integers are rounded to nearest and must fit. Raises ValueError on another shape or an overflow.
        """
        values = np.asarray(ndarray)
        if values.shape != self.shape:
            raise ValueError(f"shape {values.shape} cannot replace {self.shape}")
        if self.dtype == "bfloat16":
            return Array.from_float32_as_bfloat16(values)
        target = DTYPES[self.dtype]
        if target.kind in "iu" and values.dtype.kind in "iuf":
            values = np.rint(values) if values.dtype.kind == "f" else values
            if values.size and not _fit(values, target):
                raise ValueError(f"values do not fit {self.dtype}")
        return Array.adopt(np.array(values, dtype=target))

    def to_npy(self) -> bytes:
        """Return .npy bytes (bfloat16: float32 values)."""
        from privfed.array_format import write_npy

        return write_npy(self)

    @classmethod
    def from_npy(cls, data: bytes | memoryview) -> Array:
        """Read .npy bytes. Raises WireError on anything malformed or any dtype outside the list."""
        from privfed.array_format import read_npy

        return read_npy(data)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Array):
            return NotImplemented
        same = self.dtype == other.dtype and self.shape == other.shape
        return same and (self._view is other._view or self.data == other.data)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Array({self.dtype}, shape={self.shape})"


def _fit(values: NDArray[Any], target: np.dtype[Any]) -> bool:
    limits = np.iinfo(target)
    if values.dtype.kind == "f":
        # Compare as floats: limits.max itself may round up to a float that no longer fits.
        return bool(values.min() >= limits.min and values.max() < float(limits.max) + 1)
    return int(values.min()) >= limits.min and int(values.max()) <= limits.max


def _freeze(ndarray: NDArray[Any], *, copy: bool) -> tuple[str, NDArray[Any]]:
    values = np.asarray(ndarray)
    name = values.dtype.name
    if name not in DTYPES or name == "bfloat16":
        raise TypeError(f"dtype {values.dtype} cannot travel: use one of {', '.join(DTYPES)}")
    frozen = np.array(values, dtype=DTYPES[name], order="C", copy=True if copy else None)
    frozen.flags.writeable = False
    if not copy and np.may_share_memory(frozen, values):
        values.flags.writeable = False
    return name, frozen


def _wrap(dtype: str, shape: tuple[int, ...], data: bytes | memoryview) -> NDArray[Any]:
    if dtype not in DTYPES:
        raise WireError(f"dtype {dtype!r} cannot travel: use one of {', '.join(DTYPES)}")
    if len(shape) > MAX_DIMENSIONS or any(type(extent) is not int or extent < 0 for extent in shape):
        raise WireError(f"shape {shape} is not a list of at most {MAX_DIMENSIONS} sizes >= 0")
    buffer = memoryview(data).cast("B")
    expected = element_count(shape) * DTYPES[dtype].itemsize
    if buffer.nbytes != expected:
        raise WireError(f"buffer of {buffer.nbytes} bytes, {dtype}{shape} needs {expected}")
    if dtype == "bool" and any(np.frombuffer(piece, np.uint8).max() > 1 for piece in pieces(buffer)):
        raise WireError("a bool array may hold only the bytes 0 and 1")
    values = np.frombuffer(buffer, DTYPES[dtype]).reshape(shape)
    values.flags.writeable = False
    return values
