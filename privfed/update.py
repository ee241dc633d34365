"""Updates: what leaves a node when its full weights must not, and the reserved names that mark it.

An update is `reply - received`, array by array. Floating-point arrays keep their dtype; integer arrays become int64,
since a difference has a sign. bool arrays have no difference and are refused.

Record names that start with "privfed." belong to the framework: apps do not read or write them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.array import Array, element_count
from privfed.mapped import let_go
from privfed.record import ArrayRecord, ConfigRecord, RecordDict

Float64s = NDArray[np.float64]

RESERVED = "privfed."
UPDATE = "privfed.update"
"""A ConfigRecord in a reply: its arrays are an update, not full weights."""
PLAN = "privfed.plan"
"""A ConfigRecord in an instruction: what the privacy plan asks of the node ("clip": the L2 bound on its update)."""

BLOCK = 1 << 16
_ROOT_SAFE = 1e150


log = logging.getLogger("privfed.mods")


class UpdateError(ValueError):
    """Arrays from which no update can be made, or a reply that does not fit the model; the text says which and why."""


def carries_update(message_type: str) -> bool:
    """Return whether replies to such messages hold arrays, which a plan can clip and noise: training and queries.

    What a query answers is an update of the zeros it was asked with.
    """
    return message_type.partition(".")[0] in ("train", "query")


class NotFinite(UpdateError):
    """Numbers without an update: NaN, infinity, a change that is too large. A node's data decide that."""


def arrays_of(content: RecordDict, prefer: str = "arrays") -> ArrayRecord:
    """Return the app's one ArrayRecord (the one named `prefer` if there are several). Raises UpdateError."""
    found = {name: record for name, record in content.array_records.items() if not name.startswith(RESERVED)}
    if prefer in found:
        return found[prefer]
    if len(found) != 1:
        raise UpdateError(f"the message holds {len(found)} ArrayRecords ({', '.join(found) or 'none'}), not one")
    return next(iter(found.values()))


def arrays_name(content: RecordDict, prefer: str = "arrays") -> str:
    """Return the name under which `arrays_of` found its record."""
    record = arrays_of(content, prefer)
    return next(name for name, other in content.items() if other is record)


def is_update(content: RecordDict) -> bool:
    """Return whether the arrays of a reply are an update."""
    return UPDATE in content


def mark_update() -> ConfigRecord:
    """Return the record that marks a reply's arrays as an update."""
    return ConfigRecord({"relative": True})


def update_dtype(dtype: str) -> str:
    """Return the dtype an update of such an array has."""
    return dtype if dtype.startswith(("float", "bfloat")) else "int64"


def is_finite(values: NDArray[Any]) -> bool:
    """Return whether no element is NaN or infinite, in one pass when the sum does not overflow."""
    if values.dtype.kind != "f":
        return True
    with np.errstate(all="ignore"):
        return math.isfinite(float(values.sum(dtype=np.float64))) or bool(np.isfinite(values).all())


def check_arrays(model: ArrayRecord, given: ArrayRecord, *, update: bool = False) -> None:
    """Raise UpdateError unless `given` has the model's keys, shapes and dtypes (an update's) and is finite."""
    if given.keys() != model.keys():
        extra, lacking = sorted(given.keys() - model.keys()), sorted(model.keys() - given.keys())
        raise UpdateError(f"keys differ from the model's: extra {extra}, missing {lacking}")
    for name, expected in model.items():
        array = given[name]
        dtype = update_dtype(expected.dtype) if update else expected.dtype
        if array.shape != expected.shape:
            raise UpdateError(f"array {name!r} has shape {array.shape}, the model's has {expected.shape}")
        if array.dtype != dtype:
            raise UpdateError(f"array {name!r} has dtype {array.dtype}, not {dtype}")
        if not all(is_finite(block) for block in parts(array)):
            raise NotFinite(f"array {name!r} holds NaN or infinity")


def subtract(reply: ArrayRecord, received: ArrayRecord) -> ArrayRecord:
    """Return `reply - received` as an update, in the model's order. Raises UpdateError when it has none."""
    check_arrays(received, reply)
    return ArrayRecord({name: _difference(name, reply[name], old) for name, old in received.items()})


def update_of(given: ArrayRecord, received: ArrayRecord, *, update: bool, silent: bool) -> ArrayRecord:
    """Return a reply's update: `given` itself where it is one, else its difference from what was received.

    silent: make an update of zeros where the numbers are not finite. A node whose reply is hidden, by a mask or by
    noise of its own, must answer all the same: a server picks the model, and would read data from which nodes refuse.
    Raises UpdateError.
    """
    try:
        if not update:
            return subtract(given, received)
        check_arrays(received, given, update=True)
        return ArrayRecord({name: given[name] for name in received})
    except NotFinite as cause:
        if not silent:
            raise
        log.warning("an update of zeros is sent: %s", cause)
        return zeros_of(received)


def zeros_of(model: ArrayRecord) -> ArrayRecord:
    """Return the update that changes nothing."""
    whole = {name: update_dtype(array.dtype) == "int64" for name, array in model.items()}
    return ArrayRecord(
        {
            name: Array(np.zeros(array.shape, np.int64)) if whole[name] else array.replace(np.zeros(array.shape))
            for name, array in model.items()
        }
    )


def _difference(name: str, new: Array, old: Array) -> Array:
    if new.dtype == "bool":
        raise UpdateError(f"array {name!r} is bool and has no difference: send it as uint8")
    if update_dtype(new.dtype) == "int64":
        if new.dtype == "uint64" and max(_top(new), _top(old)) >= 1 << 63:
            raise NotFinite(f"array {name!r} holds values of 2^63 or more, whose difference may not fit int64")
        a, b = new.view().astype(np.int64), old.view().astype(np.int64)
        difference = a - b
        if difference.size and bool((((a ^ b) & (a ^ difference)) < 0).any()):
            raise NotFinite(f"array {name!r} changed by more than int64 can hold")
        return Array.adopt(np.asarray(difference))
    with np.errstate(over="ignore"):
        wide = np.asarray(np.subtract(new.compute(), old.compute(), dtype=np.float64))
        result = new.replace(wide)
    if not is_finite(result.compute()):
        raise NotFinite(f"array {name!r} changed by more than {new.dtype} can hold")
    return result


def _top(array: Array) -> int:
    return int(array.view().max()) if array.view().size else 0


def blocks(array: Array) -> Iterator[tuple[int, Float64s]]:
    """Yield (offset, float64 block) over the flattened array; a block is a fresh copy."""
    for number, values in enumerate(parts(array)):
        yield number * BLOCK, values.astype(np.float64)


def parts(array: Array) -> Iterator[NDArray[Any]]:
    """Yield the flattened array in blocks of what arithmetic should use; do not write to them.

    A block that lies in a mapped file is let go of when the next is asked for.
    """
    flat = array.view().reshape(-1)
    for start in range(0, flat.size, BLOCK):
        block = flat[start : start + BLOCK]
        yield block if array.dtype != "bfloat16" else (block.astype(np.uint32) << np.uint32(16)).view(np.float32)
        let_go(block)


def norm(record: ArrayRecord) -> float:
    """Return the joint L2 norm of all arrays, 0-dimensional ones included, in float64 without overflow."""
    with np.errstate(over="ignore", under="ignore"):
        total = sum(float(np.dot(block, block)) for array in record.values() for _, block in blocks(array))
    if 1 / _ROOT_SAFE < total < _ROOT_SAFE:
        return math.sqrt(total)
    largest = max(
        (float(np.abs(block).max()) for array in record.values() for _, block in blocks(array)),
        default=0.0,
    )
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    scaled = (block / largest for array in record.values() for _, block in blocks(array))
    return largest * math.sqrt(sum(float(np.dot(block, block)) for block in scaled))


def dimension(model: ArrayRecord) -> int:
    """Return the number of elements of all arrays."""
    return sum(element_count(array.shape) for array in model.values())


def flatten(record: ArrayRecord, order: ArrayRecord | None = None) -> Float64s:
    """Return all elements as one float64 vector, in the order of `order` (default: its own)."""
    model = record if order is None else order
    flat = np.empty(dimension(model), np.float64)
    place = 0
    for name in model:
        size = element_count(record[name].shape)
        flat[place : place + size] = record[name].compute().reshape(-1)
        place += size
    return flat


def split(flat: Float64s, model: ArrayRecord) -> dict[str, Float64s]:
    """Return views of a flat vector, shaped like the model's arrays."""
    parts: dict[str, Float64s] = {}
    place = 0
    for name, array in model.items():
        size = element_count(array.shape)
        parts[name] = flat[place : place + size].reshape(array.shape)
        place += size
    return parts
