"""Rows of equal length, read in blocks of columns and never stacked."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.floating[Any]]
Wrap: TypeAlias = Callable[[Floats], Any]

# 2 MiB of scratch stays inside a core's second-level cache, which is what makes blocks pay.
SCRATCH_BYTES = 2 << 20
MIXED_COLUMNS = 2048  # products this thin need no packing in OpenBLAS when rows are few
_threads: ContextVar[int] = ContextVar("threads", default=1)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let the rules called inside use `count` threads; results do not depend on it."""
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    token = _threads.set(count)
    try:
        yield
    finally:
        _threads.reset(token)


class Room(threading.local):
    """Scratch of each thread of one run over blocks, made once: fresh memory for every block costs page faults."""

    def __init__(self) -> None:
        self._held: dict[str, Floats] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: Any) -> Floats:
        """Return scratch of this shape; what was under the name is lost."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.size < size:
            held = self._held[name] = np.empty(size, dtype)
        return held[:size].reshape(shape)


def run_blocks(size: int, width: int, task: Callable[[int, int], None]) -> None:
    """Call `task(start, stop)` for every block of `width` columns, on the threads allowed."""
    starts = range(0, size, width)
    count = min(_threads.get(), len(starts))
    if count <= 1:
        for start in starts:
            task(start, min(start + width, size))
        return
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(lambda start: task(start, min(start + width, size)), starts))


@dataclass(frozen=True, eq=False)
class Matrix:
    """n rows of d numbers each: a 2-D array (memory maps too), or rows made of flat segments.

    `dtype` is the type results are returned in, `work` the one blocks are read in: float16 computes in
    float32, integers in float64. `wrap` gives a flat result the form of one row of the input. `clean` says that
    the rows were screened.
    """

    count: int
    size: int
    dtype: np.dtype[Any]
    wrap: Wrap = field(repr=False)
    array: NDArray[Any] | None = field(default=None, repr=False)
    rows: tuple[tuple[NDArray[Any], ...], ...] = field(default=(), repr=False)
    clean: bool = False

    @property
    def work(self) -> np.dtype[Any]:
        """Return the dtype in which blocks are read."""
        return np.dtype(np.float32) if self.dtype in (np.float16, np.float32) else np.dtype(np.float64)

    @property
    def direct(self) -> bool:
        """Say whether a block is a view of the input and costs no copy."""
        return self.array is not None and self.array.dtype == self.work

    def width(self, most: int = 8192, budget: int = SCRATCH_BYTES) -> int:
        """Return how many columns a block of all rows may have to stay within the scratch budget."""
        fit = budget // (max(self.count, 1) * self.work.itemsize)
        return max(16, min(most, fit) // 16 * 16)

    def block(self, start: int, stop: int) -> Floats:
        """Return columns start..stop of all rows: a view where possible, never to be written to."""
        if self.array is not None:
            return self.array[:, start:stop].astype(self.work, copy=False)
        out = np.empty((self.count, stop - start), self.work)
        for i in range(self.count):
            self._copy(i, start, stop, out[i])
        return out

    def shifted(self, start: int, stop: int, room: Room | None = None) -> tuple[Floats, Floats | None]:
        """Return columns start..stop of all rows less one vector, and that vector's part; None stands for zero.

        What is made lies in the room, if one is given, until the next block.
        """
        return self.block(start, stop), None

    def apart(self, start: int, stop: int, room: Room | None = None) -> tuple[list[Floats], Floats | None]:
        """Return what `shifted` does row by row: views also of rows that are no one array, never to be written to."""
        return [self.row(i, start, stop) for i in range(self.count)], None

    def turned(self, start: int, stop: int, out: Floats, look: Callable[[Floats], None]) -> Floats | None:
        """Write columns start..stop, shifted, as the rows of `out`; return what they were shifted by.

        look: sees the block first, and brings it into the cache by that.
        """
        block, part = self.shifted(start, stop)
        look(block)
        out[...] = block.T
        return part

    def row(self, index: int, start: int, stop: int) -> Floats:
        """Return columns start..stop of one row: a view where possible, never to be written to."""
        if self.array is not None:
            return self.array[index, start:stop].astype(self.work, copy=False)
        at = 0
        for segment in self.rows[index]:
            if at <= start and stop <= at + segment.size:
                return segment[start - at : stop - at].astype(self.work, copy=False)
            at += segment.size
        out = np.empty(stop - start, self.work)
        self._copy(index, start, stop, out)
        return out

    def take(self, index: Sequence[int] | NDArray[np.intp]) -> Matrix:
        """Return the chosen rows, as views."""
        array = self.array
        rows = tuple(self.rows[i] if array is None else (array[i],) for i in index)
        return Matrix(len(rows), self.size, self.dtype, self.wrap, None, rows, self.clean)

    def append(self, vector: Floats) -> Matrix:
        """Return the rows with one more, flat, behind them."""
        rows = tuple((r,) for r in self.array) if self.array is not None else self.rows
        return Matrix(self.count + 1, self.size, self.dtype, self.wrap, None, (*rows, (vector,)), self.clean)

    def _copy(self, index: int, start: int, stop: int, out: Floats) -> None:
        at = 0
        for segment in self.rows[index]:
            low, high = max(start - at, 0), min(stop - at, segment.size)
            if low < high:
                out[at + low - start : at + high - start] = segment[low:high]
            at += segment.size


@dataclass(frozen=True, eq=False)
class Mixed(Matrix):
    """Rows `o + W (x - o)` of another matrix, made block by block when they are read.

    W is (rows, rows of source), or one factor a row. The origin o is a row of the source (an index) or a flat
    vector; mixing about it keeps float32 rounding at the scale of the differences, not of the model.
    """

    source: Matrix | None = None
    weights: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    origin: int | Floats | None = None
    known: Any = None  # inner products of the source (about its origin, its medoid), where W came of them

    @property
    def direct(self) -> bool:
        """Say that every block is made."""
        return False

    def width(self, most: int = 8192, budget: int = SCRATCH_BYTES) -> int:
        """Return how many columns a block may have: fewer, since the source's share the cache with the mixed ones."""
        return super().width(min(most, 16384))

    def block(self, start: int, stop: int) -> Floats:
        """Return columns start..stop of the mixed rows."""
        made, origin = self.shifted(start, stop)
        return made if origin is None else np.add(made, origin, out=made)

    def shifted(self, start: int, stop: int, room: Room | None = None) -> tuple[Floats, Floats | None]:
        """Return columns start..stop of the mixed rows less the origin, and its part."""
        return self._make(self.source, self.weights, start, stop, room)

    def apart(self, start: int, stop: int, room: Room | None = None) -> tuple[list[Floats], Floats | None]:
        """Return what `shifted` does row by row."""
        made, origin = self.shifted(start, stop, room)
        return list(made), origin

    def turned(self, start: int, stop: int, out: Floats, look: Callable[[Floats], None]) -> Floats | None:
        """Write columns start..stop, less the origin, as the rows of `out`: one product, no transposition, no look."""
        assert self.source is not None
        if self.weights.ndim == 1:
            return super().turned(start, stop, out, look)
        centred, origin = centred_block(self.source, start, stop, self.origin)
        np.matmul(centred.T, self.weights.T.astype(self.work), out=out)
        return origin

    def _make(
        self,
        source: Matrix | None,
        weights: NDArray[np.float64],
        start: int,
        stop: int,
        room: Room | None = None,
    ) -> tuple[Floats, Floats | None]:
        assert source is not None
        room = Room() if room is None else room
        held = None if self.origin is None else room.take("centred", (source.count, stop - start), self.work)
        centred, origin = centred_block(source, start, stop, self.origin, held)
        factor = weights.astype(self.work)
        made = room.take("made", (len(factor), stop - start), self.work)
        if factor.ndim == 1:
            return np.multiply(centred, factor[:, None], out=made), origin
        for low in range(0, stop - start, MIXED_COLUMNS):
            np.matmul(factor, centred[:, low : low + MIXED_COLUMNS], out=made[:, low : low + MIXED_COLUMNS])
        return made, origin

    def row(self, index: int, start: int, stop: int) -> Floats:
        """Return columns start..stop of one mixed row."""
        assert self.source is not None
        source = self.source if self.weights.ndim == 2 else self.source.take([index])
        made, origin = self._make(source, self.weights[[index]], start, stop)
        return np.asarray(made[0] if origin is None else made[0] + origin)

    def take(self, index: Sequence[int] | NDArray[np.intp]) -> Matrix:
        """Return the chosen mixed rows; they stay lazy."""
        chosen = np.asarray(index, dtype=np.intp)
        weights, source = self.weights[chosen], self.source
        assert source is not None
        if weights.ndim == 1:
            source = source.take(chosen)
        return mixed(source, weights, self.origin, self.known)

    def append(self, vector: Floats) -> Matrix:
        """Return all rows, made, with one more behind them."""
        return dense(self).append(vector)


def mixed(source: Matrix, weights: NDArray[np.float64], origin: int | Floats | None, known: Any = None) -> Mixed:
    """Return the lazy matrix of rows `o + W (x - o)`."""
    shape = (len(weights), source.size, source.dtype, source.wrap)
    return Mixed(*shape, None, (), True, source, weights, origin, known)


def centred_block(
    matrix: Matrix, start: int, stop: int, origin: int | Floats | None, out: Floats | None = None
) -> tuple[Floats, Floats | None]:
    """Return columns start..stop less the origin (a row's index or a flat vector), in `out`, and that origin's part."""
    block = matrix.block(start, stop)
    if origin is None:
        return block, None
    part = matrix.row(origin, start, stop) if isinstance(origin, int) else origin[start:stop]
    return centred(block, part, out), part.astype(matrix.work, copy=False)


def centred(block: Floats, origin: Floats, out: Floats | None = None) -> Floats:
    """Return block - origin in the block's dtype, the difference taken in the wider of the two."""
    if block.dtype == np.float32 and origin.dtype != np.float32:
        made = np.subtract(block, origin, dtype=np.float64)
        if out is None:
            return made.astype(np.float32)
        out[...] = made
        return out
    return np.subtract(block, origin, out=out, dtype=block.dtype)


def full_row(matrix: Matrix, index: int) -> Floats:
    """Return one row, whole; ValueError when there is none of that index."""
    if not -matrix.count <= index < matrix.count:
        raise ValueError(f"X has {matrix.count} rows, there is no row {index}")
    return np.array(matrix.row(index % matrix.count, 0, matrix.size))


def dense(matrix: Matrix) -> Matrix:
    """Return the same rows as one array in memory."""
    out = np.empty((matrix.count, matrix.size), matrix.dtype)

    def fill(start: int, stop: int) -> None:
        out[:, start:stop] = matrix.block(start, stop)

    run_blocks(matrix.size, matrix.width(), fill)
    return Matrix(matrix.count, matrix.size, matrix.dtype, matrix.wrap, out, clean=matrix.clean)


def as_matrix(X: Any) -> Matrix:
    """Read an array (n, ...), a list of equal arrays, or a list of lists of layers as a Matrix.

    Errors: ValueError names the first row whose shape or dtype differs, an empty input, or a dtype that is no
    real number. Nothing is promoted: one float16 row among float32 rows is refused.
    """
    if isinstance(X, Matrix):
        return X
    if isinstance(X, np.ndarray):
        return _from_array(X)
    if isinstance(X, Mapping):  # its keys may be numbers, too
        raise ValueError("X is a mapping; give its values, one row a client")
    rows = list(X)
    if not rows:
        raise ValueError("X has no rows; a rule needs at least one")
    if all(isinstance(r, np.ndarray) for r in rows):
        return _from_rows(rows)
    if all(isinstance(r, list | tuple) and len(r) > 0 and isinstance(r[0], np.ndarray) for r in rows):
        return _from_layers([list(r) for r in rows])
    try:
        return _from_array(np.asarray(rows, dtype=np.float64))
    except (ValueError, TypeError) as error:
        lengths = [len(r) if hasattr(r, "__len__") else 0 for r in rows]
        odd = next((i for i, k in enumerate(lengths) if k != lengths[0]), None)
        where = "" if odd is None else f": row {odd} has {lengths[odd]} entries, row 0 has {lengths[0]}"
        raise ValueError(f"X is not a matrix of numbers{where}") from error


def flat_vector(vector: Any, matrix: Matrix, name: str) -> Floats:
    """Return a row-shaped vector (array, or list of layers) flat; ValueError names it when sizes differ."""
    if isinstance(vector, list | tuple) and vector and isinstance(vector[0], np.ndarray):
        vector = np.concatenate([np.asarray(part).reshape(-1) for part in vector])
    flat = np.asarray(vector).reshape(-1)
    if flat.dtype.kind != "f":
        flat = flat.astype(np.float64)
    if flat.size == 1 and matrix.size != 1:
        flat = np.full(matrix.size, flat[0])
    if flat.size != matrix.size:
        raise ValueError(f"{name} has {flat.size} numbers, each row of X has {matrix.size}")
    if not np.isfinite(flat).all():
        raise ValueError(f"{name} is not finite")
    return flat


def _kind(dtype: np.dtype[Any]) -> np.dtype[Any]:
    if dtype.kind == "f" and dtype.itemsize <= 8:
        return dtype.newbyteorder("=")
    if dtype.kind in "iub":
        return np.dtype(np.float64)
    raise ValueError(f"X has dtype {dtype}; a rule needs real numbers (float16, float32, float64 or integers)")


def _refuse_masked(*arrays: NDArray[Any]) -> None:
    if any(isinstance(array, np.ma.MaskedArray) for array in arrays):
        raise ValueError("X has a masked array, and what it hides would be used; fill it, or leave those rows out")


def _from_array(X: NDArray[Any]) -> Matrix:
    _refuse_masked(X)
    if X.ndim == 0 or len(X) == 0:
        raise ValueError(f"X has shape {X.shape}; a rule needs at least one row")
    shape = X.shape[1:]
    flat = X if X.ndim == 2 else X.reshape(len(X), -1)
    if flat.size and flat.strides[-1] != flat.itemsize and flat.shape[1] > 1:
        flat = np.ascontiguousarray(flat)  # blocks of a transposed input would stride across the whole of it
    dtype = _kind(X.dtype)
    return Matrix(len(X), flat.shape[1], dtype, lambda out: _shaped(out, shape), flat)


def _from_rows(rows: list[NDArray[Any]]) -> Matrix:
    _refuse_masked(*rows)
    first = rows[0]
    for i, row in enumerate(rows):
        if row.shape != first.shape or row.dtype != first.dtype:
            raise ValueError(
                f"row {i} of X has shape {row.shape} and dtype {row.dtype}; "
                f"row 0 has shape {first.shape} and dtype {first.dtype}"
            )
    flat = tuple((row.reshape(-1),) for row in rows)
    dtype = _kind(first.dtype)
    return Matrix(len(rows), first.size, dtype, lambda out: _shaped(out, first.shape), None, flat)


def _from_layers(rows: list[list[NDArray[Any]]]) -> Matrix:
    _refuse_masked(*(layer for row in rows for layer in row))
    kinds = [(layer.shape, layer.dtype) for layer in rows[0]]
    for i, row in enumerate(rows):
        if [(layer.shape, layer.dtype) for layer in row] != kinds:
            raise ValueError(f"the layers of row {i} of X differ in number, shape or dtype from those of row 0")
    if len({dtype for _, dtype in kinds}) != 1:
        raise ValueError(f"the layers of X mix dtypes {sorted({str(t) for _, t in kinds})}; aggregate each apart")

    def wrap(out: Floats) -> list[Any]:
        parts, at = [], 0
        for shape, _ in kinds:
            size = int(np.prod(shape))
            parts.append(_shaped(out[at : at + size], shape))
            at += size
        return parts

    flat = tuple(tuple(layer.reshape(-1) for layer in row) for row in rows)
    size = sum(segment.size for segment in flat[0])
    return Matrix(len(rows), size, _kind(kinds[0][1]), wrap, None, flat)


def _shaped(out: Floats, shape: tuple[int, ...]) -> Any:
    return out.reshape(shape) if shape else out.reshape(-1)[0]
