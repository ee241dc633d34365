"""Hands tasks to connected nodes as soon as there are any; nobody polls.

Everything here runs in the event loop, but for what touches the store, which runs in a few threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import functools
import logging
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TypeVar

from privfed.errors import PrivfedError
from privfed.runtime.federation_link import FederationLink
from privfed.runtime.frame import Buffer, Down, Ended, Offer, parcel
from privfed.runtime.patience import storage_fault
from privfed.runtime.store import Lease

T = TypeVar("T")
log = logging.getLogger("privfed.superlink")
MAX_SLOTS = 64
_RETRY_SECONDS = 1.0


@dataclass(eq=False, slots=True)
class Session:
    """A connected node. queue: frames to push, None to hang up. out: tokens of the tasks it has.

    serials: of its certificate, and of the SuperLink's that passes it on, if one does. expires: of the former.
    waits_for: what its tasks wait for there, as it says; nothing while they go on.
    """

    node_id: int
    name: str
    slots: int
    serials: tuple[int, ...] = ()
    queue: asyncio.Queue[Down | None] = field(default_factory=asyncio.Queue)
    out: set[str] = field(default_factory=set)
    expires: datetime.datetime | None = None
    waits_for: str = ""


@dataclass(frozen=True, slots=True)
class _Given:
    """A task that a node has: for which run, and with which large buffers."""

    node: int
    run_id: int
    digests: frozenset[bytes]


class Outbox:
    """The tasks that are out, and their large buffers: each once, whoever gets it, and who may fetch it."""

    def __init__(self) -> None:
        self._buffers: dict[bytes, Buffer] = {}
        self._uses: dict[bytes, int] = {}
        self._tasks: dict[str, _Given] = {}
        self._of_node: dict[int, set[str]] = {}
        self._of_run: dict[int, set[str]] = {}

    def put(self, token: str, node: int, run_id: int, buffers: dict[bytes, Buffer]) -> None:
        """Keep a task and its buffers until it is over."""
        self._tasks[token] = _Given(node, run_id, frozenset(buffers))
        self._of_node.setdefault(node, set()).add(token)
        self._of_run.setdefault(run_id, set()).add(token)
        for digest, buffer in buffers.items():
            self._buffers.setdefault(digest, buffer)
            self._uses[digest] = self._uses.get(digest, 0) + 1

    def remove(self, token: str) -> None:
        """Forget a task, if it is there."""
        given = self._tasks.pop(token, None)
        if given is None:
            return
        for index, key in ((self._of_node, given.node), (self._of_run, given.run_id)):
            index[key].discard(token)
            if not index[key]:
                del index[key]
        for digest in given.digests:
            self._uses[digest] -= 1
            if not self._uses[digest]:
                del self._uses[digest], self._buffers[digest]

    def owner(self, token: str) -> int | None:
        """Return the node that has a task."""
        given = self._tasks.get(token)
        return None if given is None else given.node

    def of_node(self, node: int) -> set[str]:
        """Return what a node has."""
        return set(self._of_node.get(node, ()))

    def of_run(self, run_id: int) -> set[str]:
        """Return what is out of a run."""
        return set(self._of_run.get(run_id, ()))

    def find(self, node: int, digest: bytes) -> Buffer | None:
        """Return a buffer that this node was sent."""
        sent = any(digest in self._tasks[token].digests for token in self._of_node.get(node, ()))
        return self._buffers.get(digest) if sent else None

    def of_task(self, token: str) -> dict[bytes, Buffer]:
        """Return the buffers of a task."""
        given = self._tasks.get(token)
        return {digest: self._buffers[digest] for digest in given.digests} if given is not None else {}


class Dispatcher:
    """Knows who is connected, and offers each node what is for it, `slots` tasks at a time.

    progress: returns the last committed round of a run when each attempt began, and now. changed: called when a node
    comes or goes.
    """

    def __init__(
        self,
        link: FederationLink,
        threads: Executor,
        progress: Callable[[int], tuple[tuple[int, ...], int]],
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.link = link
        self.outbox = Outbox()
        self.sessions: dict[int, Session] = {}
        self._threads = threads
        self._progress = progress
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._awake = asyncio.Event()
        self._due: set[int] = set()
        link.on_work = self.wake
        link.on_end = self.announce_end

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run something that blocks."""
        return await self._loop.run_in_executor(self._threads, work)

    def wake(self, nodes: Iterable[int]) -> None:
        """Say that there may be work for these nodes; from any thread."""
        self._call_soon(self._mark, list(nodes))

    def _mark(self, nodes: Collection[int]) -> None:
        self._due.update(nodes)
        self._awake.set()

    def announce_end(self, run_id: int) -> None:
        """Tell every connected node that a run ended, and forget what is out of it; from any thread."""
        self._call_soon(self._end, run_id)

    def _end(self, run_id: int) -> None:
        self.tell_all(Ended(run_id=run_id))
        for token in self.outbox.of_run(run_id):
            owner = self.outbox.owner(token)
            assert owner is not None
            self.finished(owner, token)  # a node that hears of the end puts its task down

    def _call_soon(self, act: Callable[..., None], *given: object) -> None:
        """Have the loop do something, from any thread; one that was closed has nobody left to tell."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(act, *given)

    def hang_up_all(self) -> None:
        """Disconnect every node."""
        for session in self.sessions.values():
            session.queue.put_nowait(None)

    def tell_all(self, frame: Down) -> None:
        """Push a frame to every connected node."""
        for session in self.sessions.values():
            session.queue.put_nowait(frame)

    async def join(self, session: Session, holding: Collection[str]) -> None:
        """Take a node in, in place of an older connection of it; what it had out and does not hold is free again."""
        before = self.sessions.get(session.node_id)
        if before is not None:
            before.queue.put_nowait(None)
        self.sessions[session.node_id] = session
        kept = await self.in_thread(lambda: self.link.rejoin(session.node_id, holding))
        session.out.update(kept)
        for token in self.outbox.of_node(session.node_id) - kept.keys():
            self.outbox.remove(token)
        for token, run_id in kept.items():  # it was given them before this process began
            if self.outbox.owner(token) is None:
                self.outbox.put(token, session.node_id, run_id, {})
        self._mark([session.node_id])
        self._changed()

    def leave(self, session: Session) -> None:
        """Note that a node is gone; its tasks wait for it to come back."""
        if self.sessions.get(session.node_id) is session:
            del self.sessions[session.node_id]
            self._changed()

    def hang_up(self, node: int) -> None:
        """Disconnect a node; from any thread."""

        def tell() -> None:
            session = self.sessions.get(node)
            if session is not None:
                session.queue.put_nowait(None)

        self._call_soon(tell)

    def finished(self, node: int, token: str) -> None:
        """Note that a node is done with a task, whatever became of its reply: it has room for another one."""
        if self.outbox.owner(token) == node:  # a token that comes from a node may be another's
            self.outbox.remove(token)
        session = self.sessions.get(node)
        if session is not None:
            session.out.discard(token)
        self._mark([node])

    async def run(self) -> None:
        """Offer tasks until cancelled."""
        told = ""
        while True:
            await self._awake.wait()
            self._awake.clear()
            try:
                await self._offer_all()
                told = ""
            except Exception as fault:
                text = storage_fault(fault) or (str(fault) if isinstance(fault, PrivfedError) else "")
                if not text:
                    log.exception("tasks are not handed out; trying again")
                elif text != told:
                    log.warning("tasks are not handed out: %s", text)
                told = text
                self._loop.call_later(_RETRY_SECONDS, self._mark, list(self.sessions))

    async def _offer_all(self) -> None:
        due, self._due = self._due, set()
        while True:
            free = {node: one for node in due if (one := self.sessions.get(node)) and len(one.out) < one.slots}
            if not free:
                return
            leases = await self.in_thread(functools.partial(self.link.lease_for, free.keys()))
            if not leases:
                return
            for lease in leases:
                await self._offer(lease, free[lease.message.metadata.dst_node_id])

    async def _offer(self, lease: Lease, session: Session) -> None:
        data = lease.message.metadata
        sealed, outside = await self.in_thread(lambda: parcel(lease.message))
        current = self.sessions.get(data.dst_node_id)
        if current is not session:  # it went, or came back: then its return has freed this lease, or came before it
            lost = current is None or await self.in_thread(lambda: self.link.holder(lease.token)) is None
            if lost or current is None:
                return
            session = current
        self.outbox.put(lease.token, session.node_id, data.run_id, outside)
        session.out.add(lease.token)
        began, commit = self._progress(data.run_id)
        session.queue.put_nowait(
            Offer(token=lease.token, expires_at=data.expires_at, began=began, commit=commit, parcel=sealed)
        )
