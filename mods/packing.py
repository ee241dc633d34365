"""Smaller updates on the wire: stochastic quantisation and sparsification on the node, unpacking on the server.

A packed reply holds the record `privfed.packed` instead of its arrays; `unpack()`, a mod of the ServerApp, turns it
back into an update before the strategy sees it. Packing is for plain stages: a masked vector has no spare bits to
save, and `secure_aggregation` refuses what it cannot read.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from privfed.apps import CallNext, Mod
from privfed.array import Array, element_count
from privfed.context import Context
from privfed.message import Error, ErrorCode, Message
from privfed.record import ArrayRecord, ConfigRecord, ConfigValue, RecordDict
from privfed.update import (
    UPDATE,
    UpdateError,
    arrays_name,
    arrays_of,
    check_arrays,
    flatten,
    is_update,
    mark_update,
    split,
    subtract,
)

log = logging.getLogger("privfed.mods")

PACKED = "privfed.packed"
HOW = "privfed.packed.how"
RESIDUAL = "residual"
Random = Callable[[int], bytes]
Float64s = NDArray[np.float64]


def quantize(bits: int = 8, *, random: Random = os.urandom) -> Mod:
    """Send the update with `bits` bits an element (1 to 16), rounded at random so that it is right on average.

    Each array has its own scale, its largest magnitude. A value is rounded up or down with the probabilities that make
    its expectation exact to 2^-32 of a step; the coins come from the operating system. The error of an element is less
    than scale / (2^(bits-1) - 1), for bits = 1: at most 2 * scale.
    """
    if not 1 <= bits <= 16:
        raise ValueError(f"bits must be in [1, 16], got {bits}")

    def shrink(update: ArrayRecord, context: Context) -> tuple[ArrayRecord, ConfigRecord]:
        del context
        packed, scales = {}, []
        for name, array in update.items():
            values = array.compute().astype(np.float64).reshape(-1)
            scale = float(np.abs(values).max()) if values.size else 0.0
            packed[name] = Array.adopt(_pack(_round(values, scale, bits, random), bits))
            scales.append(scale)
        how: dict[str, ConfigValue] = {"kind": "quantized", "bits": bits, "names": list(update), "scales": scales}
        return ArrayRecord(packed), ConfigRecord(how)

    return _packer(shrink)


def sparsify(share: float = 0.01) -> Mod:
    """Send only the largest elements of the update, a share of them (at least one); keep the rest for the next round.

    What was not sent stays in the node's context and is added to its next update (error feedback), so nothing is lost
    on average. Under clipping or noise it must stand outside of them: what it keeps back is then already private.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")

    def shrink(update: ArrayRecord, context: Context) -> tuple[ArrayRecord, ConfigRecord]:
        flat, state = flatten(update), context.mod_state("sparsify")
        kept = state.get(RESIDUAL)
        if isinstance(kept, ArrayRecord) and kept["values"].shape == flat.shape:
            flat += kept["values"].compute()
        count = max(1, math.ceil(share * flat.size)) if flat.size else 0
        # Ties by position, so that the same update gives the same reply.
        order = np.argsort(-np.abs(flat), kind="stable")[:count]
        chosen = np.sort(order)
        values = flat[chosen].astype(np.float32)
        rest = flat.copy()
        rest[chosen] -= values
        state[RESIDUAL] = ArrayRecord({"values": Array.adopt(rest)})
        packed = ArrayRecord({"indices": Array.adopt(chosen.astype(np.uint32)), "values": Array.adopt(values)})
        how: dict[str, ConfigValue] = {"kind": "sparse", "names": list(update)}
        return packed, ConfigRecord(how)

    return _packer(shrink)


def _packer(shrink: Callable[[ArrayRecord, Context], tuple[ArrayRecord, ConfigRecord]]) -> Mod:
    def pack_reply(message: Message, context: Context, call_next: CallNext) -> Message:
        reply = call_next(message, context)
        if message.metadata.message_type.partition(".")[0] != "train" or reply.has_error():
            return reply
        try:
            name = arrays_name(reply.content)
            received, arrays = arrays_of(message.content), reply.content.array_records[name]
            if is_update(reply.content):
                check_arrays(received, arrays, update=True)
                update = ArrayRecord({key: arrays[key] for key in received})
            else:
                update = subtract(arrays, received)
            packed, how = shrink(update, context)
        except UpdateError as cause:
            log.warning("node %d: the update was not sent: %s", context.node_id, cause)
            return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, "UpdateError"), reply_to=message)
        content = RecordDict({key: record for key, record in reply.content.items() if key != name})
        content[PACKED], content[HOW] = packed, how
        content[UPDATE] = mark_update()
        return reply.with_content(content)

    return pack_reply


def unpack() -> Mod:
    """Turn packed replies back into updates; a mod of the ServerApp. A reply that does not unpack becomes an error.

    Sizes are checked against the model that was sent before anything is allocated; indices must be distinct and
    ascending, scales finite. Replies that are not packed pass.
    """

    def unpack_reply(message: Message, context: Context, call_next: CallNext) -> Message:
        reply = call_next(message, context)
        if reply.has_error() or PACKED not in reply.content:
            return reply
        try:
            received = arrays_of(message.content)
            update = _unpacked(reply.content, received)
        except (UpdateError, ValueError, TypeError, KeyError) as cause:
            log.warning("reply of node %d does not unpack: %s", message.metadata.dst_node_id, cause)
            return Message(Error(ErrorCode.INVALID_REPLY, "UpdateError"), reply_to=message)
        content = RecordDict({key: record for key, record in reply.content.items() if key not in (PACKED, HOW)})
        content[arrays_name(message.content)] = update
        return reply.with_content(content)

    return unpack_reply


def _unpacked(content: RecordDict, model: ArrayRecord) -> ArrayRecord:
    packed, how = content[PACKED], content[HOW]
    if not isinstance(packed, ArrayRecord) or not isinstance(how, ConfigRecord) or how.get("names") != list(model):
        raise UpdateError("the packed reply is not of this model")
    if how["kind"] == "sparse":
        flat = _dense(packed, sum(element_count(array.shape) for array in model.values()))
        parts = split(flat, model)
    elif how["kind"] == "quantized":
        parts = _dequantized(packed, how, model)
    else:
        raise UpdateError(f"a packed reply of kind {how['kind']!r} is unknown")
    return ArrayRecord({name: _like(array, parts[name]) for name, array in model.items()})


def _like(array: Array, values: Float64s) -> Array:
    if not np.isfinite(values).all():
        raise UpdateError("the packed reply holds NaN or infinity")
    if array.dtype.startswith(("float", "bfloat")):
        return array.replace(values)
    return Array.adopt(np.rint(values).astype(np.int64))


def _dense(packed: ArrayRecord, size: int) -> Float64s:
    indices, values = packed["indices"], packed["values"]
    if indices.dtype != "uint32" or values.dtype != "float32" or len(indices.shape) != 1:
        raise UpdateError("a sparse update has uint32 indices and float32 values")
    if indices.shape != values.shape or indices.shape[0] > size:
        raise UpdateError("a sparse update has as many indices as values, and not more than the model has elements")
    where = indices.view().astype(np.int64)
    if where.size and (int(where[-1]) >= size or bool((np.diff(where) <= 0).any())):
        raise UpdateError("the indices of a sparse update ascend and lie in the model")
    flat = np.zeros(size)
    flat[where] = values.view()
    return flat


def _dequantized(packed: ArrayRecord, how: ConfigRecord, model: ArrayRecord) -> dict[str, Float64s]:
    bits, scales = how["bits"], how["scales"]
    if type(bits) is not int or not 1 <= bits <= 16 or not isinstance(scales, list) or len(scales) != len(model):
        raise UpdateError("a quantised update has 1 to 16 bits and a scale for every array")
    parts = {}
    for (name, array), scale in zip(model.items(), scales, strict=True):
        size, found = element_count(array.shape), packed[name]
        if found.dtype != "uint8" or found.shape != (math.ceil(size * bits / 8),):
            raise UpdateError(f"array {name!r} of a quantised update has the wrong size")
        if not isinstance(scale, float) or not (math.isfinite(scale) and scale >= 0):
            raise UpdateError(f"array {name!r} of a quantised update has no scale")
        parts[name] = (_unpack(found.view(), bits, size) * (scale / _half(bits)) - scale).reshape(array.shape)
    return parts


def _half(bits: int) -> float:
    """Return half of the number of steps between -scale and scale."""
    return ((1 << bits) - 1) / 2


def _round(values: Float64s, scale: float, bits: int, random: Random) -> NDArray[np.uint16]:
    """Return levels 0 .. 2^bits - 1, rounded up with the probability that makes the expectation right."""
    if scale == 0.0:
        return np.full(values.size, (1 << bits) >> 1, np.uint16)
    steps = np.clip((values / scale + 1) * _half(bits), 0, (1 << bits) - 1)
    whole = np.floor(steps)
    coins = np.frombuffer(random(4 * values.size), np.uint32) * 2.0**-32
    return np.asarray(whole + (coins < steps - whole)).astype(np.uint16)


def _pack(levels: NDArray[np.uint16], bits: int) -> NDArray[np.uint8]:
    columns = (levels[:, None] >> np.arange(bits - 1, -1, -1, dtype=np.uint16)) & 1
    return np.packbits(columns.astype(np.uint8).reshape(-1))


def _unpack(raw: NDArray[np.uint8], bits: int, size: int) -> Float64s:
    columns = np.unpackbits(raw, count=size * bits).reshape(size, bits)
    return np.asarray(columns @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64)).astype(np.float64))
