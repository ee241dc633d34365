"""The mods a node puts around every app, in its own process: what they keep and sign with the app never sees.

Outermost first: what may leave at all; masking; which plans are followed; what was spent, per period and per run; the
noise of a distributed plan, or the node's own; clipping; what an app may reply at all. An app's own
`secure_aggregation` and `distributed_dp` stand aside inside of the node's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from privfed.apps import CallNext, Mod, wrap
from privfed.context import Context
from privfed.errors import PlanRefused
from privfed.message import Error, ErrorCode, Message
from privfed.mods import clip, secure_aggregation
from privfed.mods.packing import HOW, PACKED
from privfed.mods.participation import BEACON
from privfed.plan import CENTRAL, SHARED
from privfed.protocols.session import Policy
from privfed.record import ConfigRecord, RecordDict
from privfed.ring import SECURE
from privfed.runtime.audit_log import Value
from privfed.runtime.policy import NodePolicy
from privfed.update import PLAN, RESERVED, UPDATE, carries_update, mark_update

if TYPE_CHECKING:
    from privfed.privacy.ledger import Entry

# What accounts for privacy is large and is loaded with the first message that needs it: an idle node stays small.
log = logging.getLogger("privfed.node")
_DAY = 86_400
T = TypeVar("T")


class Record(Protocol):
    """Writes one line of an audit log; durable when it returns."""

    def __call__(self, event: str, **fields: Value) -> None: ...


def _once(make: Callable[[], T]) -> Callable[[], T]:
    """Make something when it is first asked for, once: the tasks of several runs may ask together, from threads."""
    made: list[T] = []
    making = threading.Lock()

    def get() -> T:
        with making:
            if not made:
                made.append(make())
            return made[0]

    return get


def node_wrap(
    policy: NodePolicy | None, ledgers: Path | None = None, record: Record | None = None
) -> Callable[[CallNext], CallNext]:
    """Return what puts the node's mods around an app. policy: the node's; None asks for nothing.

    ledgers: the folder of the node's own privacy ledgers; needed where the policy limits what is spent.
    record: writes a line of the audit log, of every answer, refusal and charge.
    """
    mods = [_audited(record)] if record is not None else []
    if policy is None:
        mods.append(_masking(None))
    else:
        mods += [_outward(policy), _masking(policy), _plans(policy), *_budgets(policy, ledgers, record)]
        mods += [_noise(policy), _clipping(policy), _inward(policy)]
    return lambda app: wrap(mods, app)


def _audited(record: Record) -> Mod:
    """Write down what was asked and what became of it; never what was in it."""

    def note(message: Message, context: Context, call_next: CallNext) -> Message:
        reply = call_next(message, context)
        asked = message.metadata
        plan = message.content.get(PLAN)
        record(
            "answered" if not reply.has_error() else "refused",
            run=asked.run_id,
            round=asked.group_id[:32],
            kind=asked.message_type,
            plan=str(plan.get("mechanism"))[:32] if isinstance(plan, ConfigRecord) else "none",
            masked=SECURE in message.content,
            reason=(reply.error.reason or "")[:200] if reply.has_error() else "",
        )
        return reply

    return note


def kind_of_plan(message: Message) -> str:
    """Return "none", "central" or "distributed": what the message's plan says. Raises PlanRefused for another."""
    plan = message.content.get(PLAN)
    if plan is None:
        return "none"
    mechanism = plan.get("mechanism") if isinstance(plan, ConfigRecord) else None
    if mechanism not in (CENTRAL, *SHARED):
        raise PlanRefused(f"mechanism {mechanism!r} is unknown to this node")
    return "central" if mechanism == CENTRAL else "distributed"


def _refuse(message: Message, cause: Exception) -> Message:
    log.warning("node %d refuses: %s", message.metadata.dst_node_id, cause)
    return Message(Error(ErrorCode.POLICY_REFUSED, type(cause).__name__), reply_to=message)


def _outward(policy: NodePolicy) -> Mod:
    """Let only the names of the policy leave. A name that may not leave stops the reply, and is not cut out of it.

    What is summed under a mask leaves as well, as part of the sum: names in the layout are names that leave.
    """

    def look(message: Message, context: Context, call_next: CallNext) -> Message:
        foreign = policy.outward.foreign(*_summed(message.content))
        if foreign:
            return _refuse(message, OutwardRefused(f"{', '.join(sorted(foreign))} may not leave this node in a sum"))
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        metrics = {name for record in reply.content.metric_records.values() for name in record}
        foreign = policy.outward.foreign(reply.content, metrics)
        if foreign:
            return _refuse(message, OutwardRefused(f"{', '.join(sorted(foreign))} may not leave this node"))
        return reply

    return look


def _summed(content: RecordDict) -> tuple[list[str], list[str]]:
    """Return the names of the records and of the metrics that a secure session sums."""
    layout, head = content.get(SECURE + ".layout"), content.get(SECURE)
    if not isinstance(layout, ConfigRecord) or not isinstance(head, ConfigRecord):
        return [], []
    names = layout.get("metric-names")
    metrics = [str(name) for name in names] if isinstance(names, list) else []
    if "max-weight" in layout:
        metrics.append(str(head.get("weight-key")))
    return [str(head.get("arrays-key"))] if layout.get("dimension") else [], metrics


class OutwardRefused(PlanRefused):
    """A reply holds a record or a metric whose name the node's policy does not let out."""


def _inward(policy: NodePolicy) -> Mod:
    """Refuse what would leave beside the update that is clipped and noised, or under a name that always may.

    What is bounded is one ArrayRecord; the protocols' names, which the policy's patterns do not judge, are not the
    app's but for an update's mark and its packed form.
    """

    def look(message: Message, context: Context, call_next: CallNext) -> Message:
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        content = reply.content
        foreign = {name for name in content if name.startswith(RESERVED)} - {UPDATE, PACKED, HOW}
        if UPDATE in content and content[UPDATE] != mark_update():
            foreign.add(UPDATE)
        bounded = carries_update(message.metadata.message_type) and (
            policy.mods.clip is not None or kind_of_plan(message) != "none"
        )
        if bounded and len(content.array_records) > 1:
            foreign |= set(content.array_records) - {"arrays"}
        if foreign:
            return _refuse(message, OutwardRefused(f"the app's {', '.join(sorted(foreign))} may not leave this node"))
        return reply

    return look


class ProtocolRefused(PlanRefused):
    """A secure-aggregation protocol that the node's policy does not list."""


def _masking(policy: NodePolicy | None) -> Mod:
    """Mask here what is asked for as a masked sum; the app's own `secure_aggregation` then stands aside.

    Without `required`, a message that does not ask for a sum goes to the app, whose own mod may still refuse it.
    """
    mod = secure_aggregation(_floors(policy))
    required = policy is not None and policy.secure_aggregation.required

    def mask(message: Message, context: Context, call_next: CallNext) -> Message:
        described = message.content.get(SECURE + ".protocol")
        if policy is not None and isinstance(described, ConfigRecord):
            name = described.get("name")
            if name not in (*policy.secure_aggregation.protocols, BEACON):  # a beacon opens nothing
                return _refuse(message, ProtocolRefused(f"protocol {name!r} is not in the node's policy"))
        if required or SECURE in message.content:
            return mod(message, context, call_next)
        return call_next(message, context)

    return mask


def _floors(policy: NodePolicy | None) -> Policy:
    if policy is None:
        return Policy()
    asked = policy.secure_aggregation
    return Policy(
        min_cohort=asked.min_cohort,
        min_threshold=asked.min_threshold,
        min_neighbours=asked.min_neighbours,
        min_bits=asked.min_bits,
        require_active=asked.require_active,
        corrupt=asked.corrupt,
        weight_key=asked.weight_key,
        min_survivors=asked.min_survivors,
        max_dimension=asked.max_dimension,
        grouped=asked.grouped,
    )


def _plans(policy: NodePolicy) -> Mod:
    """Follow only the plans of the policy; without a plan, only where the policy has "none" or noises by itself.

    An evaluation never has a plan. It and a query without one also pass where the policy lists them as unaccounted.
    """
    allowed, free = set(policy.privacy.plans), set(policy.privacy.unaccounted)
    noised = allowed | ({"none"} if policy.mods.local_noise_multiplier is not None and "local" in allowed else set())

    def judge(message: Message, context: Context, call_next: CallNext) -> Message:
        asked = message.metadata.message_type
        try:
            kind = kind_of_plan(message)
            if kind == "none" and asked.partition(".")[0] in free:
                return call_next(message, context)
            if kind not in (noised if carries_update(asked) else allowed & {"none"}):
                raise PlanRefused(f"{asked}: plan {kind!r} is not among {', '.join(policy.privacy.plans)}")
        except PlanRefused as cause:
            return _refuse(message, cause)
        return call_next(message, context)

    return judge


def _budgets(policy: NodePolicy, ledgers: Path | None, record: Record | None) -> list[Mod]:
    """Return the mods that count, for the period and for the run; where nothing is limited, the turns are all."""
    privacy, own = policy.privacy, policy.mods.local_noise_multiplier
    if not privacy.limited:
        return [_turns(privacy.min_separation)]
    if ledgers is None:
        raise ValueError("ledgers: a policy that limits epsilon needs a folder for the node's ledgers")

    def period(message: Message) -> Path:
        number = int(time.time() // (privacy.period_days * _DAY))
        return ledgers / f"period-{privacy.period_days}d-{number}"

    def run(message: Message) -> Path:
        return ledgers / f"run-{message.metadata.run_id}"

    def note(entry: Entry) -> None:
        if record is not None:
            record("charged", run=int(entry.run), round=entry.round, spent=entry.spent, entry=entry.hash)

    limits = ((privacy.max_epsilon_per_period, period), (privacy.max_epsilon_per_run, run))

    @_once
    def made() -> list[Mod]:
        from privfed.mods import privacy_budget
        from privfed.privacy.events import Gaussian

        return [
            privacy_budget(
                limit,
                privacy.delta,
                relation=privacy.relation,
                observer=privacy.observer,
                ledgers=folder,
                min_separation=privacy.min_separation if folder is run or privacy.max_epsilon_per_run is None else 1,
                unaccounted=privacy.unaccounted,
                without_plan=Gaussian(own) if own is not None else None,
                on_charge=note,
            )
            for limit, folder in limits
            if limit is not None
        ]

    def count(message: Message, context: Context, call_next: CallNext) -> Message:
        return wrap(made(), call_next)(message, context)

    return [count]


def _turns(least: int) -> Mod:
    """Keep the node's turns, the policy's and the plan's, where no ledger does."""

    def keep(message: Message, context: Context, call_next: CallNext) -> Message:
        if least == 1 and PLAN not in message.content:
            return call_next(message, context)
        from privfed.mods.budget import separation

        return separation(least)(message, context, call_next)

    return keep


def _noise(policy: NodePolicy) -> Mod:
    """Add the noise that is the node's to add: its share of a distributed plan, or its own."""
    privacy, mods = policy.privacy, policy.mods

    @_once
    def share() -> Mod:
        from privfed.distributed import PlanLimits
        from privfed.mods import distributed_dp

        corrupt = policy.secure_aggregation.corrupt
        return distributed_dp(PlanLimits(min_nodes=max(2, privacy.min_cohort), corrupt=corrupt, delta=privacy.delta))

    @_once
    def own() -> Mod | None:
        if mods.clip is None or mods.local_noise_multiplier is None:
            return None
        from privfed.mods import local_dp

        return local_dp(mods.clip, noise_multiplier=mods.local_noise_multiplier, delta=privacy.delta)

    def add(message: Message, context: Context, call_next: CallNext) -> Message:
        if not carries_update(message.metadata.message_type):
            return call_next(message, context)
        kind = kind_of_plan(message)
        if kind == "distributed":
            return share()(message, context, call_next)
        mod = own() if kind == "none" else None
        return mod(message, context, call_next) if mod is not None else call_next(message, context)

    return add


def _clipping(policy: NodePolicy) -> Mod:
    """Clip to the policy's bound and the plan's, where there is one."""
    bound = policy.mods.clip
    mod = clip(bound)

    def cut(message: Message, context: Context, call_next: CallNext) -> Message:
        # A distributed plan clips by itself, in the lattice it rounds to; the policy's bound still applies before.
        carries = carries_update(message.metadata.message_type)
        asked = carries and (bound is not None or kind_of_plan(message) == "central")
        return mod(message, context, call_next) if asked else call_next(message, context)

    return cut
