"""The Link of a SuperLink: tasks go to nodes that are connected, and somebody is told when there are any."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from privfed.message import Message
from privfed.runtime.link import Link
from privfed.runtime.patience import storage_fault
from privfed.runtime.store import Holder, Lease, Store

BATCH = 32
SILENT_SECONDS = 10.0
"""For so long a transaction may be under way before users are told that the database does not answer."""


def steady_clock() -> Callable[[], float]:
    """Return a clock that begins with the system's time, and goes on evenly when somebody sets that."""
    began, start = time.time(), time.monotonic()
    return lambda: began + time.monotonic() - start


@dataclass(slots=True, eq=False)
class _Arrived:
    """A reply that waits to be taken. counted, fault: what came of it, when it is done."""

    token: str
    run_id: int
    reply: Message
    done: bool = False
    counted: bool = False
    fault: Exception | None = None


@dataclass(slots=True)
class Awaited:
    """What a run has asked and not been answered: message id -> node. asked: messages since nothing was out.

    kind, group: of the last of them: its type, and its round as a rule.
    """

    out: dict[str, int] = field(default_factory=dict)
    asked: int = 0
    kind: str = ""
    group: str = ""

    def add(self, messages: Sequence[Message]) -> None:
        """Note what is asked."""
        self.asked = len(messages) + (self.asked if self.out else 0)
        for message in messages:
            data = message.metadata
            self.out[data.message_id] = data.dst_node_id
            self.kind, self.group = data.message_type, data.group_id


class FederationLink(Link):
    """A Link whose workers are nodes on the network. A lease lasts as long as its message: a node that comes back
    says what it still holds.

    busy_seconds: says for how long the store is at one transaction.
    on_work: told of nodes there may be work for. on_end: told of a run that ended. Both in any thread.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(store, clock=steady_clock(), lease_seconds=math.inf)
        self.on_work: Callable[[Iterable[int]], None] = lambda nodes: None
        self.on_end: Callable[[int], None] = lambda run_id: None
        self._asked: dict[int, Awaited] = {}
        self._awaiting = threading.Lock()  # its own: who asks what is waited for does not wait for the store
        self._troubles: dict[str, str] = {}
        self.busy_seconds: Callable[[], float] = lambda: 0.0
        self._arrived: deque[_Arrived] = deque()

    def push(self, run_id: int, messages: Iterable[Message]) -> list[str]:
        """Queue instructions and wake whoever hands them out."""
        # By this clock alone, whatever that of the app's process says.
        given = [message.with_metadata(created_at=self._clock()) for message in messages]
        ids = super().push(run_id, given)
        with self._awaiting:
            self._asked.setdefault(run_id, Awaited()).add(given)
        self.on_work(message.metadata.dst_node_id for message in given)
        return ids

    def pull(self, run_id: int, message_ids: Iterable[str]) -> list[Message]:
        """Return replies; what was asked is then answered."""
        replies = super().pull(run_id, message_ids)
        with self._awaiting:
            awaited = self._asked.get(run_id)
            if awaited is not None:
                for reply in replies:
                    awaited.out.pop(reply.metadata.reply_to_message_id, None)
        return replies

    def forget(self, run_id: int, message_ids: Iterable[str]) -> None:
        """Withdraw instructions."""
        given = list(message_ids)
        super().forget(run_id, given)
        with self._awaiting:
            awaited = self._asked.get(run_id)
            if awaited is not None:
                for message_id in given:
                    awaited.out.pop(message_id, None)

    def set_run_state(self, run_id: int, state: str, reason: str = "") -> None:
        """Move a run to another state."""
        super().set_run_state(run_id, state, reason)
        if state != "running":
            with self._awaiting:
                self._asked.pop(run_id, None)

    def waits_for(self, run_id: int) -> Awaited:
        """Return what a run waits for."""
        with self._awaiting:
            found = self._asked.get(run_id, Awaited())
            return replace(found, out=dict(found.out))

    @property
    def trouble(self) -> str:
        """What is wrong with the storage that tasks and replies go through, in words; nothing while it works."""
        if (seconds := self.busy_seconds()) >= SILENT_SECONDS:
            return f"the database does not answer, for {seconds:.0f} s now"
        return next(iter(list(self._troubles.values())), "")

    @contextlib.contextmanager
    def _noting(self, what: str) -> Iterator[None]:
        """Note when the storage refuses something, and when it takes it again."""
        try:
            yield
        except Exception as fault:
            if text := storage_fault(fault):
                self._troubles[what] = text
            raise
        self._troubles.pop(what, None)

    def lease_for(self, nodes: Collection[int]) -> Sequence[Lease]:
        """Take tasks for these nodes, at most one each and a few at a time."""
        with self._noting("lease"), self._lock:
            self._expire()
            return self.store.lease_many(self._clock(), self._lease_seconds, BATCH, nodes=nodes)

    def rejoin(self, node: int, holding: Collection[str]) -> dict[str, int]:
        """Free what a node had out, but for what it still holds; return the tokens it keeps, and their runs."""
        with self._lock:
            holders = {token: self.store.holder(token) for token in holding}
            kept = {
                token: holder.run_id
                for token, holder in holders.items()
                if holder is not None and holder.node_id == node and not holder.counted
            }
            self.store.release(node, kept)
        return kept

    def put_down(self, token: str, node: int) -> None:
        """Note that a node is done with a task whose reply nobody waits for any more."""
        with self._lock:
            self.store.put_down(token, node)

    def holder(self, token: str) -> Holder | None:
        """Return whose lease this is, or was when its reply counted."""
        with self._lock:
            return self.store.holder(token)

    def count(self, token: str, run_id: int, reply: Message) -> bool:
        """Take the reply to a leased task; True when it counts, now or earlier.

        Replies that come while others are taken are taken together, after those: one commit for all of them.
        """
        mine = _Arrived(token, run_id, reply)
        self._arrived.append(mine)
        with self._noting("count"), self._lock:
            if not mine.done:  # else whoever had the lock before took it along
                try:
                    self._expire()
                except Exception:
                    self._arrived.remove(mine)
                    raise
                self._count([self._arrived.popleft() for _ in range(len(self._arrived))])
            if mine.fault is not None:
                raise mine.fault
            return mine.counted

    def _count(self, some: Sequence[_Arrived]) -> None:
        """Take replies, together if the store takes them together, else one by one."""
        try:
            taken = self.store.complete_many([(one.token, one.reply, None) for one in some])
            self._note(some, taken)
        except Exception as fault:  # noqa: BLE001 - raised to whom it belongs
            if len(some) > 1:
                for one in some:
                    self._count([one])
            else:
                some[0].fault, some[0].done = fault, True

    def _note(self, some: Sequence[_Arrived], taken: Sequence[str | None]) -> None:
        """Note which replies were taken, now or before."""
        for one, message_id in zip(some, taken, strict=True):
            if message_id is None:
                holder = self.store.holder(one.token)
                one.counted = holder is not None and holder.counted
            else:
                one.counted = True
                self._arrival(one.run_id).notify_all()
            one.done = True
