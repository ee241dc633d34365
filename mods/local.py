"""Local differential privacy: the node noises its own update, and trusts nobody with it."""

from __future__ import annotations

import logging
import math
from functools import lru_cache

from privfed.apps import CallNext, Mod
from privfed.context import Context
from privfed.errors import PlanRefused
from privfed.message import Error, ErrorCode, Message
from privfed.mods.clipping import clip_record
from privfed.privacy.accountant import Accountant
from privfed.privacy.bound import Bound
from privfed.privacy.calibration import calibrate
from privfed.privacy.events import Gaussian, event_from_json
from privfed.privacy.mechanisms import add_discrete_gaussian
from privfed.record import ArrayRecord, ConfigRecord, ConfigValue, MetricRecord, RecordDict
from privfed.update import (
    UPDATE,
    UpdateError,
    arrays_of,
    carries_update,
    flatten,
    is_update,
    mark_update,
    split,
    update_of,
)

log = logging.getLogger("privfed.mods")

STATE = "local_dp"
UNITS = ("client", "record")
RELATION, OBSERVER = "replace_one", "server"
_FLOAT_SLACK = 1 + 2.0**-20
"""Room for the rounding of the clipped norm, as it is computed."""


def local_dp(
    max_norm: float,
    *,
    epsilon: float | None = None,
    delta: float = 1e-5,
    noise_multiplier: float | None = None,
    rounds: int = 1,
    budget: float | None = None,
    weight_key: str = "num-examples",
) -> Mod:
    """Clip the node's update to L2 norm `max_norm` and add discrete Gaussian noise before it leaves.

    Protects everything the node holds (unit client, replace_one, observer server): whoever sees the reply, the server
    included, can hardly tell it from a reply made of other data. Give noise_multiplier (sd / max_norm), or epsilon:
    then the noise is the least for which `rounds` replies cost at most epsilon at delta; any epsilon > 0 will do.
    budget: epsilon at delta after which the node refuses; default: `epsilon` if given, else none.

    Only the noised update leaves: metrics stay, and the weight is 1 under `weight_key`, since how much data a node has
    is its own. A query's answer is noised alike; replies to "evaluate" are refused. What was spent is in the node's
    context: `spent`.

    Raises ValueError naming the argument.
    """
    if not (math.isfinite(max_norm) and max_norm > 0):
        raise ValueError(f"max_norm must be finite and > 0, got {max_norm}")
    if (epsilon is None) == (noise_multiplier is None):
        raise ValueError("epsilon, noise_multiplier: give one of them")
    if rounds < 1:
        raise ValueError(f"rounds must be >= 1, got {rounds}")
    limit = budget if budget is not None else epsilon
    _check_positive("budget", limit)
    _check_positive("epsilon", epsilon)
    _check_positive("noise_multiplier", noise_multiplier)

    def protect(message: Message, context: Context, call_next: CallNext) -> Message:
        z = noise_multiplier if noise_multiplier is not None else _calibrated(float(epsilon or 0), delta, rounds)
        return _noised(message, context, call_next, Gaussian(z), max_norm, True, "client", delta, limit, weight_key)

    return protect


def noise(
    sensitivity: float,
    noise_multiplier: float,
    *,
    unit: str,
    delta: float = 1e-5,
    budget: float | None = None,
    weight_key: str = "num-examples",
) -> Mod:
    """Add discrete Gaussian noise of standard deviation noise_multiplier * sensitivity to the node's update.

    The update is not clipped: **you** say that one unit ("client" or "record") contributes at most `sensitivity` (L2)
    to it, and the guarantee (replace_one, observer server) is worth what that is worth. For unit "client" use
    `local_dp`, which clips; for unit "record" the training itself must bound what a record does, as clipping gradients
    record by record and a fixed number of steps do. Everything else is as in `local_dp`.
    """
    if unit not in UNITS:
        raise ValueError(f"unit must be client or record, got {unit!r}")
    if not (math.isfinite(sensitivity) and sensitivity > 0):
        raise ValueError(f"sensitivity must be finite and > 0, got {sensitivity}")
    _check_positive("noise_multiplier", noise_multiplier)
    _check_positive("budget", budget)

    def protect(message: Message, context: Context, call_next: CallNext) -> Message:
        event = Gaussian(noise_multiplier)
        return _noised(message, context, call_next, event, sensitivity, False, unit, delta, budget, weight_key)

    return protect


def spent(context: Context, delta: float) -> Bound:
    """Return what the replies of this run have cost the node so far: epsilon at delta, replace_one, observer server."""
    return _accountant(context).epsilon(delta=delta)


def _check_positive(name: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and > 0, got {value}")


@lru_cache(maxsize=64)
def _calibrated(epsilon: float, delta: float, rounds: int) -> float:
    return calibrate(Gaussian, count=rounds, epsilon=epsilon, delta=delta, relation=RELATION, observer=OBSERVER)


def _accountant(context: Context, unit: str = "client") -> Accountant:
    """Return what was spent, in the unit it was spent in; `unit` when nothing was."""
    kept = context.mod_state(STATE).get("spent")
    unit = str(kept["unit"]) if isinstance(kept, ConfigRecord) else unit
    accountant = Accountant(unit=unit, relation=RELATION, observer=OBSERVER)
    if isinstance(kept, ConfigRecord):
        for text, count in kept.items():
            if text != "unit":
                accountant.step(event_from_json(text), int(str(count)))
    return accountant


def _noised(
    message: Message,
    context: Context,
    call_next: CallNext,
    event: Gaussian,
    bound: float,
    clipped: bool,
    unit: str,
    delta: float,
    limit: float | None,
    weight_key: str,
) -> Message:
    """Answer with a noised update, or refuse."""
    kind = message.metadata.message_type
    try:
        if not carries_update(kind):
            raise PlanRefused(f"a {kind} reply carries no noise: under local privacy evaluate on the server's data")
        accountant = _accountant(context, unit)
        if accountant.unit != unit:
            raise PlanRefused(f"this node's replies were noised for unit {accountant.unit}, not {unit}")
        accountant.step(event)
        if limit is not None and not accountant.epsilon(delta=delta).upper <= limit:
            raise PlanRefused(
                f"with this reply the node would have spent more than epsilon {limit:g} at delta {delta:g}"
            )
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        update = _update(message.content, reply.content)
        if clipped:
            update = clip_record(update, bound)
        content = _content(update, event, bound, weight_key)
    except PlanRefused as cause:
        log.warning("node %d refuses: %s", context.node_id, cause)
        return Message(Error(ErrorCode.POLICY_REFUSED, type(cause).__name__), reply_to=message)
    except UpdateError as cause:
        log.warning("node %d: the update was not sent: %s", context.node_id, cause)
        return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, "UpdateError"), reply_to=message)
    _count(context, event, unit)
    return reply.with_content(content)


def _update(request: RecordDict, reply: RecordDict) -> ArrayRecord:
    received, arrays = arrays_of(request), arrays_of(reply)
    return update_of(arrays, received, update=is_update(reply), silent=True)  # else a refusal would tell without noise


def _content(update: ArrayRecord, event: Gaussian, bound: float, weight_key: str) -> RecordDict:
    values, _ = add_discrete_gaussian(
        flatten(update), sensitivity=bound * _FLOAT_SLACK, noise_multiplier=event.noise_multiplier
    )
    # Rounding to each array's dtype comes after the noise and depends on nothing else: post-processing.
    arrays = ArrayRecord({name: update[name].replace(part) for name, part in split(values, update).items()})
    content = RecordDict({"arrays": arrays})
    content["metrics"] = MetricRecord({weight_key: 1.0})
    content[UPDATE] = mark_update()
    return content


def _count(context: Context, event: Gaussian, unit: str) -> None:
    state = context.mod_state(STATE)
    kept = state.get("spent")
    counts: dict[str, ConfigValue] = dict(kept) if isinstance(kept, ConfigRecord) else {"unit": unit}
    text = event.to_json()
    counts[text] = int(str(counts.get(text, 0))) + 1
    state["spent"] = ConfigRecord(counts)
