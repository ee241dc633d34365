"""The Link: where a server app and its nodes meet. It carries opaque messages and knows no strategy or mod."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from privfed.grid import Grid, MemoryRecorder, Recorder
from privfed.message import Message
from privfed.runtime.store import Lease, MemoryStore, NodeState, RunInfo, Store

LEASE_SECONDS = 3600.0
_SWEEP_SECONDS = 0.25


@dataclass(slots=True)
class Traffic:
    """Messages and array bytes of a run. down: to nodes. up: replies."""

    messages_down: int = 0
    messages_up: int = 0
    bytes_down: int = 0
    bytes_up: int = 0


@dataclass(slots=True)
class _Room:
    """Where those who wait for replies of one run are woken."""

    arrived: threading.Condition
    traffic: Traffic = field(default_factory=Traffic)


class Link:
    """Runs, nodes, tasks and replies over a Store, with waiting that does not poll.

    store: where everything lives. clock: seconds since the epoch. lease_seconds: how long a worker may take.
    """

    def __init__(
        self,
        store: Store | None = None,
        *,
        clock: Callable[[], float] = time.time,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self.store: Store = store if store is not None else MemoryStore()
        self._clock = clock
        self._lease_seconds = lease_seconds
        self._lock = threading.RLock()
        self._work = threading.Condition(self._lock)
        self._rooms: dict[int, _Room] = {}
        self._swept = 0.0
        self._closed = False

    def create_run(self, run_id: int, nodes: Sequence[int]) -> None:
        """Register a run over these nodes."""
        with self._lock:
            self.store.create_run(run_id, nodes)

    def set_run_state(self, run_id: int, state: str, reason: str = "") -> None:
        """Move a run to another state. Raises StoreError when it cannot follow the current one."""
        with self._lock:
            self.store.set_run_state(run_id, state, reason)

    def run(self, run_id: int) -> RunInfo:
        """Return where a run stands."""
        with self._lock:
            return self.store.run(run_id)

    def nodes(self, run_id: int) -> Sequence[int]:
        """Return the nodes of a run, ascending."""
        with self._lock:
            return self.store.nodes(run_id)

    def traffic(self, run_id: int) -> Traffic:
        """Return what a run has sent so far."""
        with self._lock:
            return self._room(run_id).traffic

    def _room(self, run_id: int) -> _Room:
        if run_id not in self._rooms:
            self._rooms[run_id] = _Room(threading.Condition(self._lock))
        return self._rooms[run_id]

    def push(self, run_id: int, messages: Iterable[Message]) -> list[str]:
        """Queue instructions; returns their ids."""
        stamped = [message.with_metadata(run_id=run_id) for message in messages]
        with self._lock:
            room = self._room(run_id)
            room.traffic.messages_down += len(stamped)
            room.traffic.bytes_down += sum(_bytes(message) for message in stamped)
            answered = self.store.push(run_id, stamped)
            self._work.notify(len(stamped))
            if answered:
                room.arrived.notify_all()
        return [message.metadata.message_id for message in stamped]

    def lease(self, timeout: float | None = None) -> Lease | None:
        """Wait for a task and take it; None on timeout or when the Link is closed. Several workers may call it."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._work:
            while not self._closed:
                self._sweep()
                lease = self.store.lease(self._clock(), self._lease_seconds)
                if lease is not None:
                    return lease
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return None
                # Woken by work; at the latest when something may have expired.
                self._work.wait(1.0 if left is None else min(left, 1.0))
        return None

    def complete(self, lease: Lease, reply: Message, state: NodeState | None) -> bool:
        """Finish a leased task; False when the lease was lost, and then nothing has changed."""
        with self._lock:
            run_id = lease.message.metadata.run_id
            accepted = self.store.complete(lease.token, reply, state) is not None
            room = self._room(run_id)
            if accepted:
                room.traffic.messages_up += 1
                room.traffic.bytes_up += _bytes(reply)
                room.arrived.notify_all()
            self._work.notify()
        return accepted

    def pull(self, run_id: int, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to these instructions, each once."""
        with self._lock:
            return self.store.pull(run_id, message_ids)

    def wait(self, run_id: int, message_ids: Iterable[str], timeout: float | None) -> bool:
        """Block until a reply to one of these can be pulled; False on timeout."""
        ids = message_ids if isinstance(message_ids, dict | set | frozenset) else set(message_ids)
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            room = self._room(run_id)
            while not self.store.arrived(run_id, ids):
                self._sweep()
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return self.store.arrived(run_id, ids)
                room.arrived.wait(1.0 if left is None else min(left, 1.0))
            return True

    def forget(self, run_id: int, message_ids: Iterable[str]) -> None:
        """Withdraw instructions nobody waits for."""
        with self._lock:
            self.store.forget(run_id, message_ids)

    def _sweep(self) -> None:
        now = self._clock()
        if abs(now - self._swept) < _SWEEP_SECONDS:
            return
        self._swept = now
        if self.store.expire(now):
            for room in self._rooms.values():
                room.arrived.notify_all()
        self._work.notify()

    def close(self) -> None:
        """Wake and release all workers."""
        with self._lock:
            self._closed = True
            self._work.notify_all()


def _bytes(message: Message) -> int:
    if message.has_error():
        return 0
    return sum(array.nbytes for record in message.content.array_records.values() for array in record.values())


class LinkGrid(Grid):
    """The Grid of one run over a Link in this process."""

    def __init__(self, link: Link, run_id: int, recorder: Recorder | None = None, seed: int | None = None) -> None:
        self._link = link
        self.run_id = run_id
        self.recorder = recorder if recorder is not None else MemoryRecorder()
        self.seed = seed

    def get_node_ids(self) -> Sequence[int]:
        return self._link.nodes(self.run_id)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return self._link.push(self.run_id, messages)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return self._link.pull(self.run_id, message_ids)

    def wait(self, message_ids: Iterable[str], timeout: float | None) -> bool:
        return self._link.wait(self.run_id, message_ids, timeout)

    def forget(self, message_ids: Iterable[str]) -> None:
        self._link.forget(self.run_id, message_ids)
