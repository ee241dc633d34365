"""Records: the typed content of a message.

An `Array` is immutable: a dtype from a fixed list, a shape and a little-endian C-contiguous buffer. `view()` reads that
buffer without a copy, `numpy()` gives a copy of your own. An `ArrayRecord` maps names to arrays, a `MetricRecord` names
to numbers, a `ConfigRecord` names to settings; a `RecordDict` holds records by name. The names and behaviour are those
that users of Flower's Message API know.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from privfed.array import Array

__all__ = ["Array", "ArrayRecord", "ConfigRecord", "MetricRecord", "Record", "RecordDict"]

MetricValue = int | float | list[int] | list[float]
Scalar = int | float | bool | str | bytes
ConfigValue = Scalar | list[int] | list[float] | list[bool] | list[str] | list[bytes]
V = TypeVar("V")
R = TypeVar("R")


class _TypedDict(MutableMapping[str, V]):
    """An ordered dict that checks every value on its way in."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, V] | Iterable[tuple[str, V]] = ()) -> None:
        self._items: OrderedDict[str, V] = OrderedDict()
        pairs = items.items() if isinstance(items, Mapping) else items
        for key, value in pairs:
            self[key] = value

    def _check(self, key: str, value: V) -> V:
        raise NotImplementedError  # pragma: no cover - every subclass defines it

    def __setitem__(self, key: str, value: V) -> None:
        if not isinstance(key, str):
            raise TypeError(f"{type(self).__name__} key must be str, got {type(key).__name__}")
        self._items[key] = self._check(key, value)

    def __getitem__(self, key: str) -> V:
        return self._items[key]

    def __delitem__(self, key: str) -> None:
        del self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return list(self._items.items()) == list(other._items.items())

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"{type(self).__name__}({dict(self._items)!r})"


class ArrayRecord(_TypedDict[Array]):
    """Named arrays, in order; a model's weights.

    `ArrayRecord(list of ndarray)` names them "0", "1", ...; `ArrayRecord(dict of Array)` keeps its names;
    `ArrayRecord(torch_state_dict=...)` takes a PyTorch state dict.
    """

    __slots__ = ()

    def __init__(
        self,
        arrays: Mapping[str, Array] | list[NDArray[Any]] | Iterable[tuple[str, Array]] = (),
        *,
        torch_state_dict: Mapping[str, Any] | None = None,
    ) -> None:
        if torch_state_dict is not None:
            arrays = {name: Array.from_torch_tensor(tensor) for name, tensor in torch_state_dict.items()}
        elif isinstance(arrays, list) and all(isinstance(item, np.ndarray | np.generic) for item in arrays):
            arrays = {str(index): Array(np.asarray(item)) for index, item in enumerate(arrays)}
        super().__init__(cast("Mapping[str, Array]", arrays))

    def _check(self, key: str, value: Array) -> Array:
        if not isinstance(value, Array):
            raise TypeError(f"ArrayRecord[{key!r}] must be an Array, got {type(value).__name__}: wrap it in Array(...)")
        return value

    @classmethod
    def from_numpy_ndarrays(cls, ndarrays: list[NDArray[Any]]) -> ArrayRecord:
        """Name the arrays "0", "1", ... and copy them."""
        return cls(list(ndarrays))

    def to_numpy_ndarrays(self) -> list[NDArray[Any]]:
        """Return writable copies, in order."""
        return [array.numpy() for array in self.values()]

    @classmethod
    def from_torch_state_dict(cls, state_dict: Mapping[str, Any]) -> ArrayRecord:
        """Copy the tensors of a PyTorch state dict."""
        return cls(torch_state_dict=state_dict)

    def to_torch_state_dict(self) -> OrderedDict[str, Any]:
        """Return an ordered dict of new tensors; needs torch."""
        return OrderedDict((name, array.to_torch_tensor()) for name, array in self.items())

    @classmethod
    def from_safetensors(cls, data: bytes | memoryview) -> ArrayRecord:
        """Read a safetensors buffer. Raises WireError on anything malformed."""
        from privfed.array_format import read_safetensors

        return cls(read_safetensors(data))

    def to_safetensors(self) -> bytes:
        """Return the record as a safetensors buffer."""
        from privfed.array_format import write_safetensors

        return write_safetensors(self)

    def count_bytes(self) -> int:
        """Return the bytes of all buffers and names."""
        return sum(array.nbytes + len(name.encode()) for name, array in self.items())

    def map(self, function: Callable[[NDArray[Any]], NDArray[Any]]) -> ArrayRecord:
        """Apply a shape- and dtype-preserving function to every array (bfloat16 arrives as float32)."""
        return ArrayRecord({name: array.replace(function(array.compute())) for name, array in self.items()})


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _plain(value: object) -> object:
    """Turn numpy scalars into Python ones; everything else is returned as it is."""
    return value.item() if isinstance(value, np.generic) else value


def _size(value: object) -> int:
    if isinstance(value, list):
        return sum(_size(item) for item in value)
    if isinstance(value, bool):
        return 1
    if isinstance(value, str):
        return len(value.encode())
    return len(value) if isinstance(value, bytes) else 8


class MetricRecord(_TypedDict[MetricValue]):
    """Named numbers: int, float, or a list of one of them. bool is not a metric."""

    __slots__ = ()

    def _check(self, key: str, value: MetricValue) -> MetricValue:
        plain = _plain(value)
        if isinstance(plain, list):
            items = [_plain(item) for item in plain]
            if len({type(item) for item in items}) <= 1 and all(_is_number(item) for item in items):
                return cast("MetricValue", items)
        elif _is_number(plain):
            return cast("MetricValue", plain)
        raise TypeError(f"MetricRecord[{key!r}] must be int, float or a list of one of them, got {value!r:.80}")

    def count_bytes(self) -> int:
        """Return 8 bytes a number plus the names."""
        return sum(_size(value) + len(key.encode()) for key, value in self.items())


class ConfigRecord(_TypedDict[ConfigValue]):
    """Named settings: int, float, bool, str, bytes, or a list of one of them."""

    __slots__ = ()

    def _check(self, key: str, value: ConfigValue) -> ConfigValue:
        allowed = (int, float, bool, str, bytes)
        plain = _plain(value)
        if isinstance(plain, list):
            items = [_plain(item) for item in plain]
            if len({type(item) for item in items}) <= 1 and all(type(item) in allowed for item in items):
                return cast("ConfigValue", items)
        elif type(plain) in allowed:
            return cast("ConfigValue", plain)
        raise TypeError(
            f"ConfigRecord[{key!r}] must be int, float, bool, str, bytes or a list of one of them, got {value!r:.80}"
        )

    def count_bytes(self) -> int:
        """Return the bytes of all values (8 a number, 1 a bool) plus the names."""
        return sum(_size(value) + len(key.encode()) for key, value in self.items())


Record = ArrayRecord | MetricRecord | ConfigRecord


class RecordDict(_TypedDict[Record]):
    """Records by name: the content of a message, and the state of a node."""

    __slots__ = ()

    def _check(self, key: str, value: Record) -> Record:
        if not isinstance(value, ArrayRecord | MetricRecord | ConfigRecord):
            raise TypeError(
                f"RecordDict[{key!r}] must be an ArrayRecord, MetricRecord or ConfigRecord, got {type(value).__name__}"
            )
        return value

    def _of(self, kind: type[R]) -> dict[str, R]:
        return {key: value for key, value in self.items() if isinstance(value, kind)}

    @property
    def array_records(self) -> dict[str, ArrayRecord]:
        """The ArrayRecords, by name (a new dict)."""
        return self._of(ArrayRecord)

    @property
    def metric_records(self) -> dict[str, MetricRecord]:
        """The MetricRecords, by name (a new dict)."""
        return self._of(MetricRecord)

    @property
    def config_records(self) -> dict[str, ConfigRecord]:
        """The ConfigRecords, by name (a new dict)."""
        return self._of(ConfigRecord)

    def copy(self) -> RecordDict:
        """Copy the dict and its records; arrays are immutable and shared."""
        return RecordDict({key: type(record)(dict(record)) for key, record in self.items()})  # type: ignore[arg-type]  # each type takes its own dict

    def count_bytes(self) -> int:
        """Return the bytes of all records and names."""
        return sum(record.count_bytes() + len(key.encode()) for key, record in self.items())
