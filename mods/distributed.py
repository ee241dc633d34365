"""Distributed differential privacy on a node: an update leaves only clipped, rounded and noised."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.apps import CallNext, Mod
from privfed.array import Array
from privfed.context import Context, derived_rng
from privfed.distributed import Instruction, PlanLimits
from privfed.errors import PlanRefused
from privfed.message import Error, ErrorCode, Message
from privfed.mods.clipping import says_within
from privfed.plan import BIT, tracked
from privfed.record import ArrayRecord, ConfigRecord, RecordDict
from privfed.ring import DEMANDS, NOISED, VECTOR
from privfed.update import (
    PLAN,
    UpdateError,
    arrays_of,
    carries_update,
    dimension,
    flatten,
    is_update,
    norm,
    update_of,
)

log = logging.getLogger("privfed.mods")

STATE = "distributed_dp"


def distributed_dp(limits: PlanLimits | None = None, *, insecure_test_randomness: int | None = None) -> Mod:
    """Turn an update, or a query's answer, into ring elements that carry this node's share of the plan's noise.

    Put it inside `mods.secure_aggregation()`, which sends nothing else then: no metrics, no weight, no update in the
    clear. It follows the privacy plan in the message, clips to the plan's clip, and needs no argument. limits: what
    this node accepts of a plan, whatever the server asks. Every message but training and queries with such a plan is
    refused, and the app is not asked. What a run may still cost this node is counted in the node's context, whenever a
    vector is made, also one that no sum used.

    Inside another one, as where the node adds its share around the app's process, it checks the plan and stands aside.

    insecure_test_randomness: seeds noise and rounding in tests; refused unless the run says that its noise is worth
    nothing. Otherwise both come from the operating system.
    """
    bounds = limits if limits is not None else PlanLimits()

    def add_share(message: Message, context: Context, call_next: CallNext) -> Message:
        try:
            instruction = _instruction(message)
            bounds.check(instruction)
            random = _randomness(instruction, insecure_test_randomness, context)
            spending = _spending(context, instruction)
            bounds.check_spending(instruction.relation, spending)
            outside, context.noised = context.noised, True
            try:
                reply = call_next(message, context)
            finally:
                context.noised = outside
            if reply.has_error():
                return reply
            if outside:
                context.mod_state(STATE)["spent"] = ConfigRecord(spending)
                return reply
            weight = instruction.bit_weight
            update, within = _update(message.content, reply.content, weight)
            values = instruction.prepare(_flat(update), norm(update) if weight else 0.0, within)
            vector, keys = _encoded(instruction, values, random)
            context.mod_state(STATE)["spent"] = ConfigRecord(spending)
        except PlanRefused as cause:
            log.warning("node %d refuses: %s", context.node_id, cause)
            return Message(Error(ErrorCode.POLICY_REFUSED, "PlanRefused"), reply_to=message)
        except UpdateError as cause:
            log.warning("node %d: the update was not sent: %s", context.node_id, cause)
            return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, "UpdateError"), reply_to=message)
        content = RecordDict({NOISED: ArrayRecord({VECTOR: Array.adopt(vector)})})
        asked = instruction.parameters
        demands = ConfigRecord({"bits": asked.bits, "min-survivors": asked.least_survivors})
        if keys:
            demands["level-survivors"] = [asked.nodes - level for level in asked.drop_levels]
            demands["level-keys"] = keys
        content[DEMANDS] = demands
        return Message(content, reply_to=message)

    return add_share


def _instruction(message: Message) -> Instruction:
    """Return the plan of the message. Raises PlanRefused unless it is one this mod can follow."""
    kind = message.metadata.message_type
    plan = message.content.get(PLAN)
    if not carries_update(kind) or not isinstance(plan, ConfigRecord):
        raise PlanRefused(f"a {kind} message without a plan of distributed noise: nothing of this node's may answer it")
    instruction = Instruction.from_config(plan)
    try:
        size = dimension(arrays_of(message.content))
    except UpdateError as cause:
        raise PlanRefused(f"the plan has no one model to be about: {cause}") from cause
    planned = instruction.parameters.dimension - bool(instruction.bit_weight)
    if size != planned:
        raise PlanRefused(f"the model has {size} elements, the plan is for {planned}")
    return instruction


def _encoded(
    instruction: Instruction, values: NDArray[Any], random: Callable[[int], bytes]
) -> tuple[NDArray[Any], list[bytes]]:
    """Return the ring vector, and the keys of those parts of its noise that may be taken off again."""
    asked = instruction.parameters
    if not asked.drop_levels:
        return asked.encode(values, instruction.seed, random), []
    vector, keys = asked.encode_removable(values, instruction.seed, random)
    return vector, list(keys)


def _randomness(instruction: Instruction, seed: int | None, context: Context) -> Callable[[int], bytes]:
    if seed is None:
        return os.urandom
    if not instruction.insecure:
        raise PlanRefused("insecure_test_randomness is set on this node, and the run claims that its noise protects")
    return derived_rng(seed, "insecure", "share", context.node_id, instruction.seed.hex()).bytes


def _spending(context: Context, instruction: Instruction) -> tuple[tuple[str, int], ...]:
    """Return what this node's vectors of the run cost with the next one: pairs (event as JSON, count)."""
    kept = context.mod_state(STATE).get("spent")
    counts = kept.items() if isinstance(kept, ConfigRecord) else ()
    spent = {event: int(str(count)) for event, count in counts}
    event = instruction.parameters.event.to_json()
    spent[event] = spent.get(event, 0) + 1
    return tuple(spent.items())


def _update(request: RecordDict, reply: RecordDict, weight: float) -> tuple[ArrayRecord, bool | None]:
    """Return the update, and what a mod inside that clipped it says of its length before; None: none did."""
    received, arrays = arrays_of(request), arrays_of(reply)
    if not is_update(reply):
        return update_of(arrays, received, update=False, silent=True), None
    bit = arrays.get(BIT) if weight else None
    whole = update_of(arrays, received if bit is None else tracked(received, weight), update=True, silent=True)
    update = ArrayRecord({name: whole[name] for name in received})
    return update, None if bit is None else says_within(bit, weight)


def _flat(update: ArrayRecord) -> NDArray[Any]:
    """Return all elements in one vector: float32 where every array is, and float64 otherwise."""
    if all(array.dtype == "float32" for array in update.values()):
        parts = [array.view().reshape(-1) for array in update.values()]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)
    return flatten(update)
