"""A node's own privacy budget: the node counts what its replies cost it, and refuses before it is overspent."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from privfed.apps import CallNext, Mod
from privfed.context import Context
from privfed.errors import PlanRefused
from privfed.message import Error, ErrorCode, Message
from privfed.plan import CENTRAL
from privfed.privacy.events import Event, event_from_json
from privfed.privacy.filters import Budget, BudgetExceeded
from privfed.privacy.ledger import Ledger, LedgerError, Terms
from privfed.record import ConfigRecord
from privfed.update import PLAN

log = logging.getLogger("privfed.mods")

STATE = "privacy_budget"
Charge = Callable[[Event, str, int, str], None]
"""Called with (event, run, round, transcript); returns when the charge is durable. Raises BudgetExceeded."""


def privacy_budget(
    epsilon: float,
    delta: float = 1e-5,
    *,
    relation: str = "zero_out",
    observer: str = "server",
    ledgers: Path | str | None = None,
    min_separation: int = 1,
    unaccounted: Collection[str] = (),
    charge: Charge | None = None,
) -> Mod:
    """Answer training messages only under a privacy plan, and only while all answers cost at most epsilon at delta.

    The node charges every update it makes, before it leaves, as an event of the plan in the message, for unit client.
    observer="server": against the server too, so only noise that nodes add counts, and central plans cost infinity;
    "output": against those who see what the server releases, taking the server's word for its noise and sampling.
    ledgers: a folder with one ledger a node, which goes on from run to run; None: the budget is this run's, kept in
    the node's context.
    min_separation: rounds from one participation to the next, at least (for matrix mechanisms).
    unaccounted: kinds of messages ("evaluate", "query") answered although their replies carry no noise; they are
    refused by default. charge: charges somewhere else instead; epsilon, delta and ledgers are then not used.

    Put it outside of what makes the update private and inside `secure_aggregation`. What is refused is refused before
    the app is asked: `BudgetExceeded` or `PlanRefused` is all that the server is told.
    """
    if min_separation < 1:
        raise ValueError(f"min_separation must be >= 1, got {min_separation}")
    unknown = sorted(set(unaccounted) - {"evaluate", "query"})
    if unknown:
        raise ValueError(f"unaccounted may hold evaluate and query, got {', '.join(unknown)}")
    budget = Budget(epsilon, delta)
    Terms("", budget, "client", relation, observer).meter()  # refuses a wrong relation now and not in a run
    lock = threading.Lock()

    def count(message: Message, context: Context, call_next: CallNext) -> Message:
        kind = message.metadata.message_type.partition(".")[0]
        if kind in unaccounted:
            return call_next(message, context)
        try:
            if kind != "train":
                raise PlanRefused(f"a {kind} reply has no noise and no price: this node answers none")
            event = event_of(message, observer)
            _check_separation(message, context, min_separation)
            terms = Terms(f"node {context.node_id}", budget, "client", relation, observer)
            with lock, _opened(ledgers, terms, context) as held:
                _check_room(held, event, charge)
            reply = call_next(message, context)
            if reply.has_error():
                return reply
            # A reply made again carries fresh noise and is charged again.
            transcript = hashlib.sha256(message.metadata.message_id.encode() + os.urandom(32)).hexdigest()
            place = str(message.metadata.run_id), _round(message), transcript
            with lock, _opened(ledgers, terms, context) as held:
                if charge is not None:
                    charge(event, *place)
                else:
                    held.charge(event, place[0], place[1], transcript)
            context.mod_state(STATE)["last"] = ConfigRecord({"round": place[1]})
            return reply
        except (PlanRefused, BudgetExceeded, LedgerError, ValueError) as cause:
            log.warning("node %d refuses: %s", context.node_id, cause)
            return Message(Error(ErrorCode.POLICY_REFUSED, type(cause).__name__), reply_to=message)

    return count


def event_of(message: Message, observer: str) -> Event:
    """Return what answering a training message costs the node. Raises PlanRefused when that is infinite or unknown."""
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
    last = context.mod_state(STATE).get("last")
    if least == 1 or not isinstance(last, ConfigRecord):
        return
    before, now = int(str(last["round"])), _round(message)
    if now - before < least:
        raise PlanRefused(
            f"round {now} comes {now - before} after this node's last, {before}: at least {least} are due"
        )


class _Held:
    """The spending so far, in a file or in the node's context."""

    def __init__(self, ledger: Ledger, context: Context | None) -> None:
        self._ledger, self._context = ledger, context

    def __enter__(self) -> _Held:
        return self

    def __exit__(self, *about: Any) -> None:
        self._ledger.close()

    def after(self, event: Event) -> tuple[float, float]:
        """Return (spent with the event, limit)."""
        return self._ledger.preview(event), self._ledger.limit

    def refuse(self, after: float) -> BudgetExceeded:
        held = self._ledger
        return BudgetExceeded(held.terms.owner, held.spent, after, held.limit, held.measure)

    def charge(self, event: Event, run: str, number: int, transcript: str) -> None:
        """Charge the event, durably where there is a file; in the context it is committed with the reply."""
        self._ledger.charge(event, run=run, round=number, transcript=transcript)
        if self._context is None:
            return
        state = self._context.mod_state(STATE)
        kept = state.get("spent")
        counts = dict(kept) if isinstance(kept, ConfigRecord) else {}
        text = event.to_json()
        counts[text] = int(str(counts.get(text, 0))) + 1
        state["spent"] = ConfigRecord(counts)


def _opened(folder: Path | str | None, terms: Terms, context: Context) -> _Held:
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True, mode=0o700)
        return _Held(Ledger.resume(Path(folder) / f"node-{context.node_id}.jsonl", terms), None)
    ledger = Ledger.create(None, terms)
    kept = context.mod_state(STATE).get("spent")
    for number, (text, count) in enumerate(kept.items() if isinstance(kept, ConfigRecord) else ()):
        ledger.charge(event_from_json(text), run="before", round=number, transcript="00" * 32, count=int(str(count)))
    return _Held(ledger, context)


def _check_room(held: _Held, event: Event, charge: Charge | None) -> None:
    if charge is not None:
        return
    after, limit = held.after(event)
    if not after <= limit:
        raise held.refuse(after)
