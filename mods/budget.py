"""A node's own privacy budget: the node counts what its replies cost it, and refuses before it is overspent."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from privfed.apps import CallNext, Mod
from privfed.context import Context
from privfed.errors import PlanRefused
from privfed.failpoint import around
from privfed.message import Error, ErrorCode, Message
from privfed.plan import CENTRAL
from privfed.privacy.events import Central, Event, MatrixGaussian, PureDP, event_from_json
from privfed.privacy.filters import Budget, BudgetExceeded
from privfed.privacy.ledger import Entry, Ledger, LedgerError, Terms
from privfed.record import ConfigRecord
from privfed.update import PLAN, carries_update

log = logging.getLogger("privfed.mods")

STATE = "privacy_budget"
_NOTHING = PureDP(0.0)
_BEFORE = "before"
Folder = Callable[[Message], Path]


def privacy_budget(
    epsilon: float,
    delta: float = 1e-5,
    *,
    relation: str = "zero_out",
    observer: str = "server",
    ledgers: Path | str | Folder | None = None,
    min_separation: int = 1,
    unaccounted: Collection[str] = (),
    without_plan: Event | None = None,
    on_charge: Callable[[Entry], None] = lambda entry: None,
) -> Mod:
    """Answer only under a privacy plan, and only while all answers cost at most epsilon at delta.

    The node charges every update and every answer to a query, before it leaves, as an event of the plan in the message,
    for unit client.
    observer="server": against the server too, so only noise that nodes add counts, and central plans cost infinity;
    "output": against those who see what the server releases, taking the server's word for its noise and sampling.
    epsilon may be infinite: spending is recorded then, and not limited.
    ledgers: a folder with one ledger a node, which goes on from run to run, or a function from the message to it;
    None: the budget is this run's, kept in the node's context.
    min_separation: rounds from one participation to the next, at least (for matrix mechanisms).
    unaccounted: kinds of messages ("evaluate", "query") answered although their replies carry no noise, where they have
    no plan; they are refused by default.
    without_plan: what a reply costs where the message has no plan, because the node noises it itself (`local_dp`).
    on_charge: told of every charge when it is durable, before the reply leaves.

    Put it outside of what makes the update private and inside `secure_aggregation`. What is refused is refused before
    the app is asked: `BudgetExceeded` or `PlanRefused` is all that the server is told.
    """
    if min_separation < 1:
        raise ValueError(f"min_separation must be >= 1, got {min_separation}")
    unknown = sorted(set(unaccounted) - {"evaluate", "query"})
    if unknown:
        raise ValueError(f"unaccounted may hold evaluate and query, got {', '.join(unknown)}")
    terms = Terms("", Budget(epsilon, delta), "client", relation, observer)
    terms.meter()  # refuses a wrong relation now and not in a run
    purse = _Purse(terms, ledgers, min_separation, without_plan)

    def count(message: Message, context: Context, call_next: CallNext) -> Message:
        kind = message.metadata.message_type.partition(".")[0]
        if kind in unaccounted and PLAN not in message.content:
            return call_next(message, context)
        try:
            event = purse.admit(message, context)
            reply = call_next(message, context)
            if not reply.has_error():
                on_charge(purse.charge(event, message, context))
            return reply
        except (PlanRefused, BudgetExceeded, LedgerError, ValueError) as cause:
            log.warning("node %d refuses: %s", context.node_id, cause)
            return Message(Error(ErrorCode.POLICY_REFUSED, type(cause).__name__), reply_to=message)

    return count


def separation(least: int = 1) -> Mod:
    """Answer training only `least` rounds after this node's last answer in the run, or as many as the plan asks.

    `privacy_budget` does the same; this is for a node that counts nothing. A refusal is `PlanRefused`.
    """
    if least < 1:
        raise ValueError(f"least must be >= 1, got {least}")

    def keep(message: Message, context: Context, call_next: CallNext) -> Message:
        try:
            _check_separation(message, context, least)
        except PlanRefused as cause:
            log.warning("node %d refuses: %s", context.node_id, cause)
            return Message(Error(ErrorCode.POLICY_REFUSED, type(cause).__name__), reply_to=message)
        reply = call_next(message, context)
        if is_training(message) and not reply.has_error():
            context.mod_state(STATE)["last"] = ConfigRecord({"round": _round(message)})
        return reply

    return keep


class _Purse:
    """What a node may spend, and where it is written down."""

    def __init__(
        self, terms: Terms, ledgers: Path | str | Folder | None, separation: int, without_plan: Event | None
    ) -> None:
        self._terms, self._ledgers, self._separation = terms, ledgers, separation
        self._without_plan = without_plan
        self._lock = threading.Lock()

    def admit(self, message: Message, context: Context) -> Event:
        """Return what a reply will cost. Raises PlanRefused or BudgetExceeded when it may not be made."""
        kind = message.metadata.message_type
        if not carries_update(kind):
            raise PlanRefused(f"a {kind} reply has no noise and no price: this node answers none")
        event = self._without_plan
        if event is None or PLAN in message.content:
            event = event_of(message, self._terms.observer)
        _check_separation(message, context, self._separation)
        with self._lock, contextlib.closing(self._open(message, context)) as ledger:
            if _is_paid(event, message, context, ledger):
                return _NOTHING
            after = ledger.preview(event)
            if not after <= ledger.limit:
                raise BudgetExceeded(ledger.terms.owner, ledger.spent, after, ledger.limit, ledger.measure)
        return event

    def charge(self, event: Event, message: Message, context: Context) -> Entry:
        """Charge a reply that is about to leave; on disk it is durable when this returns."""
        # A reply made again carries fresh noise, and is charged again.
        transcript = hashlib.sha256(message.metadata.message_id.encode() + os.urandom(32)).hexdigest()
        run, number = str(message.metadata.run_id), _round(message)
        with self._lock, contextlib.closing(self._open(message, context)) as ledger, around("charge"):
            entry = ledger.charge(event, run=run, round=number, transcript=transcript)
        state = context.mod_state(STATE)
        if is_training(message):
            state["last"] = ConfigRecord({"round": number})
        if self._ledgers is None:
            kept = state.get("spent")
            counts = dict(kept) if isinstance(kept, ConfigRecord) else {}
            text = event.to_json()
            counts[text] = int(str(counts.get(text, 0))) + 1
            state["spent"] = ConfigRecord(counts)
        return entry

    def _open(self, message: Message, context: Context) -> Ledger:
        terms = replace(self._terms, owner=f"node {context.node_id}")
        if self._ledgers is not None:
            folder = Path(self._ledgers(message) if callable(self._ledgers) else self._ledgers)
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            return Ledger.resume(folder / f"node-{context.node_id}.jsonl", terms)
        ledger = Ledger.create(None, terms)
        kept = context.mod_state(STATE).get("spent")
        for number, (text, count) in enumerate(kept.items() if isinstance(kept, ConfigRecord) else ()):
            ledger.charge(event_from_json(text), run=_BEFORE, round=number, transcript="00" * 32, count=int(str(count)))
        return ledger


def _is_paid(event: Event, message: Message, context: Context, ledger: Ledger) -> bool:
    """Return whether the event is the price of a whole run of correlated noise, and this run has paid it.

    No other event is, whatever the message says. A round that is asked again has a release of its own, and pays anew.
    """
    plan = message.content.get(PLAN)
    if not isinstance(plan, ConfigRecord) or plan.get("once") is not True or not is_training(message):
        return False
    if not (isinstance(event, Central) and isinstance(event.inner, MatrixGaussian)):
        return False
    last = context.mod_state(STATE).get("last")
    if isinstance(last, ConfigRecord) and _round(message) <= int(str(last["round"])):
        return False
    runs = {str(message.metadata.run_id), _BEFORE}
    return any(entry.event == event and entry.run in runs for entry in ledger.entries)


def is_training(message: Message) -> bool:
    """Return whether a round of training is asked for; queries have no rounds."""
    return message.metadata.message_type.partition(".")[0] == "train"


def event_of(message: Message, observer: str) -> Event:
    """Return what answering a message costs the node. Raises PlanRefused when that is infinite or unknown."""
    plan = message.content.get(PLAN)
    if not isinstance(plan, ConfigRecord):
        raise PlanRefused("the message has no privacy plan: its reply would cost an infinite epsilon")
    if plan.get("mechanism") == CENTRAL:
        if observer == "server":
            raise PlanRefused("the server adds the plan's noise itself: against the server it protects nothing")
        if plan.get("insecure") is not False:
            raise PlanRefused("the run's noise is a test's and protects nothing")
        text = plan.get("event")
        if not isinstance(text, str):
            raise PlanRefused("the plan does not say what a round costs")
        try:
            return event_from_json(text)
        except ValueError as cause:
            raise PlanRefused(f"the plan's event is none: {cause}") from cause
    from privfed.distributed import Instruction

    instruction = Instruction.from_config(plan)
    if instruction.insecure:
        raise PlanRefused("the run's noise is a test's and protects nothing")
    return instruction.parameters.event


def _round(message: Message) -> int:
    text = message.metadata.group_id
    return int(text) if text.isdecimal() and len(text) < 19 else 0


def _check_separation(message: Message, context: Context, least: int) -> None:
    plan = message.content.get(PLAN)
    asked = plan.get("separation", 1) if isinstance(plan, ConfigRecord) else 1
    if type(asked) is not int or asked < 1:
        raise PlanRefused(f"the plan's separation is {asked!r}, not a whole number >= 1")
    if not is_training(message):
        return
    least = max(least, asked)
    last = context.mod_state(STATE).get("last")
    if least == 1 or not isinstance(last, ConfigRecord):
        return
    before, now = int(str(last["round"])), _round(message)
    if now - before < least:
        raise PlanRefused(
            f"round {now} comes {now - before} after this node's last, {before}: at least {least} are due"
        )
