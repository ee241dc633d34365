"""Clip what leaves a node: its update, all arrays together, to an L2 norm."""

from __future__ import annotations

import logging
import math

import numpy as np

from privfed.apps import CallNext, Mod
from privfed.array import Array
from privfed.context import Context
from privfed.message import Error, ErrorCode, Message
from privfed.plan import BIT, tracked
from privfed.record import ArrayRecord, ConfigRecord, RecordDict
from privfed.update import (
    PLAN,
    UPDATE,
    UpdateError,
    arrays_name,
    arrays_of,
    carries_update,
    is_update,
    mark_update,
    norm,
    update_of,
)

log = logging.getLogger("privfed.mods")
_EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7, "int64": 2.0**-52}


def clip(max_norm: float | None = None) -> Mod:
    """Turn a training reply into an update of L2 norm at most `max_norm`, 0-dimensional arrays included.

    The bound that a privacy plan asks for applies as well; without `max_norm` it is the only one. An update within
    the bound is left as it is, a longer one is scaled; integer arrays are scaled towards zero. The norm is taken in
    float64 and holds for what is sent, after rounding to each array's dtype. Replies that do not fit the arrays
    received become errors (UpdateError), and so do those that hold NaN or infinity; but where the reply is masked
    outside of this mod they become an update of zeros, as an error would tell the server of this node's data. A query's
    answer is clipped where the query has a plan; other messages pass.

    Where the plan's clip adapts, the update gets one more element, which says whether it was within the plan's clip.

    Guarantees: the norm of an update that leaves is at most the bound, and its direction is that of the update.
    Raises ValueError for a max_norm that is not finite and > 0.
    """
    if max_norm is not None and not (math.isfinite(max_norm) and max_norm > 0):
        raise ValueError(f"max_norm must be finite and > 0, got {max_norm}")

    def clip_update(message: Message, context: Context, call_next: CallNext) -> Message:
        reply = call_next(message, context)
        kind = message.metadata.message_type
        clipped = carries_update(kind) if PLAN in message.content else kind.partition(".")[0] == "train"
        if not clipped or reply.has_error():
            return reply
        try:
            hidden = context.masked is not None or context.noised
            return reply.with_content(_clipped(message.content, reply.content, max_norm, hidden=hidden))
        except UpdateError as cause:
            log.warning("node %d: the update was not sent: %s", context.node_id, cause)
            return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, "UpdateError"), reply_to=message)

    return clip_update


def _bounds(content: RecordDict, max_norm: float | None) -> tuple[float, float, float]:
    """Return the bound to clip to, the plan's own (infinity without a plan) and the weight of its bit."""
    plan = content.get(PLAN)
    given = plan if isinstance(plan, ConfigRecord) else ConfigRecord()
    asked, weight = given.get("clip", math.inf), given.get("bit-weight", 0.0)
    if PLAN in content and not (isinstance(asked, int | float) and 0 < asked < math.inf):
        raise UpdateError(f"the plan's clip is {asked!r}, not a finite number > 0")
    if not (isinstance(weight, int | float) and 0 <= weight < math.inf):
        raise UpdateError(f"the plan's bit-weight is {weight!r}, not a finite number >= 0")
    bounds = [float(str(asked))] if PLAN in content else []
    bounds += [max_norm] if max_norm is not None else []
    if not bounds:
        raise UpdateError("clip() has no max_norm and the run has no privacy plan: there is nothing to clip to")
    return min(bounds), float(str(asked)), float(weight)


def _clipped(request: RecordDict, reply: RecordDict, max_norm: float | None, *, hidden: bool) -> RecordDict:
    bound, asked, weight = _bounds(request, max_norm)
    received, name = arrays_of(request), arrays_name(reply)
    arrays = reply.array_records[name]
    bit = arrays.get(BIT) if weight else None  # a mod inside has clipped already
    if is_update(reply):
        whole = update_of(arrays, received if bit is None else tracked(received, weight), update=True, silent=hidden)
        update = ArrayRecord({key: array for key, array in whole.items() if key != BIT}) if bit else whole
    else:
        update = update_of(arrays, received, update=False, silent=hidden)
    content = RecordDict(dict(reply))
    content[name] = clip_record(update, bound)
    if weight:
        within = norm(update) <= asked if bit is None else says_within(bit, weight)
        sent = Array(np.array(weight / 2 if within else -weight / 2))
        content[name] = ArrayRecord({**content.array_records[name], BIT: sent})
    content[UPDATE] = mark_update()
    return content


def says_within(bit: Array, weight: float) -> bool:
    """Return what the bit beside an update says. Raises UpdateError for any other value than its two."""
    value = float(bit.compute())
    if abs(value) != weight / 2:
        raise UpdateError(f"the bit beside the update is {value:g}, and neither {weight / 2:g} nor {-weight / 2:g}")
    return value > 0


def adaptive_clip() -> Mod:
    """Clip to the clip that the plan has in this round, and say by one bit whether the update was within it [ATMR21].

    The clip is the plan's (`PrivacyPlan(adaptive=AdaptiveClip(...))`): it follows a quantile of the nodes' norms from
    round to round, by the noised sum of the bits, +-1/2 each. The bit is one more element of the update, inside one L2
    bound with it, and both are paid for by the round's one event. `clip` and `distributed_dp` do the same where the
    plan's clip adapts; this mod is for a node that insists on it. Inside `distributed_dp` it gives that its bit.

    A training message without such a plan is refused, and the app is not asked; other messages pass. The rest is as
    with `clip`.

    Guarantees: update and bit together have an L2 norm of at most the joint bound, hypot(clip, bit weight / 2).
    """

    inner = clip()

    def clip_and_tell(message: Message, context: Context, call_next: CallNext) -> Message:
        if message.metadata.message_type.partition(".")[0] != "train":
            return call_next(message, context)
        plan = message.content.get(PLAN)
        weight = plan.get("bit-weight") if isinstance(plan, ConfigRecord) else None
        if not isinstance(weight, float) or not (math.isfinite(weight) and weight > 0):
            log.warning("node %d refuses: the message has no plan whose clip adapts", context.node_id)
            return Message(Error(ErrorCode.POLICY_REFUSED, "PlanRefused"), reply_to=message)
        return inner(message, context, call_next)

    return clip_and_tell


def clip_record(update: ArrayRecord, bound: float) -> ArrayRecord:
    """Return the update scaled so that its joint norm is at most `bound`, or itself when it is."""
    length = norm(update)
    if length <= bound:
        return update
    scale = bound / length
    # Rounding to a short dtype may lengthen a vector by an ulp or so: then scale by an ulp less.
    ulp = max((_EPSILON[array.dtype] for array in update.values()), default=2.0**-52)
    while True:
        scaled = ArrayRecord({name: _scaled(array, scale) for name, array in update.items()})
        if norm(scaled) <= bound:
            return scaled
        scale *= 1 - ulp
        ulp *= 2


def _scaled(array: Array, scale: float) -> Array:
    values = np.multiply(array.compute(), scale, dtype=np.float64)
    return array.replace(np.asarray(np.trunc(values) if array.dtype == "int64" else values))
