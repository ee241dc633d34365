"""The Link: where a server app and its nodes meet. It carries opaque messages and knows no strategy or mod."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from privfed.grid import Grid, MemoryRecorder, Recorder
from privfed.message import Message
from privfed.runtime.memory_store import MemoryStore
from privfed.runtime.store import Lease, NodeState, RunInfo, Store, StoreError

LEASE_SECONDS = 3600.0
MAX_WAIT = 1.0
"""Seconds after which a waiter looks again, in case another process wrote to the store."""


@dataclass(slots=True)
class Traffic:
    """Messages and array bytes of a run. down: to nodes. up: replies with content. errors: the others, by cause."""

    messages_down: int = 0
    messages_up: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    def count_reply(self, reply: Message) -> None:
        """Add a reply that was handed to the server app."""
        if reply.has_error():
            self.errors[f"error {reply.error.code} ({reply.error.reason})"] += 1
        else:
            self.messages_up += 1
            self.bytes_up += _array_bytes(reply)


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
        self._arrivals: dict[int, threading.Condition] = {}
        self._traffic: dict[int, Traffic] = {}
        self._closed = False

    def create_run(self, run_id: int, nodes: Sequence[int]) -> None:
        """Register a run over these nodes."""
        with self._lock:
            self.store.create_run(run_id, nodes)

    def set_run_state(self, run_id: int, state: str, reason: str = "") -> None:
        """Move a run to another state. Raises StoreError when it cannot follow the current one."""
        with self._lock:
            self.store.set_run_state(run_id, state, reason)
            self._arrival(run_id).notify_all()

    def run(self, run_id: int) -> RunInfo:
        """Return where a run stands."""
        with self._lock:
            return self.store.run(run_id)

    def nodes(self, run_id: int) -> Sequence[int]:
        """Return the nodes of a run, ascending."""
        with self._lock:
            return self.store.nodes(run_id)

    def states(self, run_id: int) -> Mapping[int, NodeState]:
        """Return what the nodes of a run keep, all at one moment."""
        with self._lock:
            return self.store.states(run_id)

    def put_states(self, run_id: int, states: Mapping[int, NodeState]) -> None:
        """Set what nodes keep, as a resumed run does."""
        with self._lock:
            self.store.put_states(run_id, states)

    def traffic(self, run_id: int) -> Traffic:
        """Return what a run has sent so far."""
        with self._lock:
            return self._traffic.setdefault(run_id, Traffic())

    def _arrival(self, run_id: int) -> threading.Condition:
        if run_id not in self._arrivals:
            self._arrivals[run_id] = threading.Condition(self._lock)
        return self._arrivals[run_id]

    def push(self, run_id: int, messages: Iterable[Message]) -> list[str]:
        """Queue instructions; returns their ids. Raises StoreError unless the run is running."""
        stamped = [message.with_metadata(run_id=run_id) for message in messages]
        with self._lock:
            answered = self.store.push(run_id, stamped)
            traffic = self.traffic(run_id)
            traffic.messages_down += len(stamped)
            traffic.bytes_down += sum(map(_array_bytes, stamped))
            self._work.notify(len(stamped))
            if answered:
                self._arrival(run_id).notify_all()
        return [message.metadata.message_id for message in stamped]

    def lease(self, timeout: float | None = None) -> Lease | None:
        """Wait for a task and take it; None on timeout or when the Link is closed. Several workers may call it."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        with self._work:
            while not self._closed:
                self._expire()
                lease = self.store.lease(self._clock(), self._lease_seconds)
                left = deadline - time.monotonic()
                if lease is not None or left <= 0:
                    return lease
                self._work.wait(self._patience(left))
        return None

    def complete(self, lease: Lease, reply: Message, state: NodeState | None) -> bool:
        """Finish a leased task; False when the lease was lost, and then nothing has changed."""
        with self._lock:
            self._expire()  # a reply that comes too late does not count, even when nobody has looked yet
            accepted = self.store.complete(lease.token, reply, state) is not None
            if accepted:
                self._arrival(lease.message.metadata.run_id).notify_all()
            self._work.notify()
        return accepted

    def pull(self, run_id: int, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to these instructions, each once."""
        with self._lock:
            replies = self.store.pull(run_id, message_ids)
            traffic = self.traffic(run_id)
            for reply in replies:
                traffic.count_reply(reply)
        return replies

    def wait(self, run_id: int, message_ids: Iterable[str], timeout: float | None) -> bool:
        """Block until a reply to one of these can be pulled; False on timeout.

        Raises StoreError when the run ends, or the Link is closed, and no reply can come any more.
        """
        ids = message_ids if isinstance(message_ids, dict | set | frozenset) else set(message_ids)
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        with self._lock:
            while not self.store.arrived(run_id, ids):
                if self._closed or self.store.run(run_id).state != "running":
                    raise StoreError(f"run {run_id} has ended: no reply can arrive any more")
                if self._expire():
                    continue
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._arrival(run_id).wait(self._patience(left))
            return True

    def forget(self, run_id: int, message_ids: Iterable[str]) -> None:
        """Withdraw instructions nobody waits for."""
        with self._lock:
            self.store.forget(run_id, message_ids)

    def _patience(self, left: float) -> float:
        """Return how long to wait for news: until something expires, and not for ever."""
        return min(left, max(0.0, self.store.next_deadline() - self._clock()), MAX_WAIT)

    def _expire(self) -> bool:
        answered = self.store.expire(self._clock())
        if answered:
            for arrival in self._arrivals.values():
                arrival.notify_all()
        return bool(answered)

    def close(self) -> None:
        """Wake and release all who wait."""
        with self._lock:
            self._closed = True
            self._work.notify_all()
            for arrival in self._arrivals.values():
                arrival.notify_all()


def _array_bytes(message: Message) -> int:
    if message.has_error():
        return 0
    return sum(array.nbytes for record in message.content.array_records.values() for array in record.values())


class LinkGrid(Grid):
    """The Grid of one run over a Link in this process."""

    def __init__(
        self,
        link: Link,
        run_id: int,
        recorder: Recorder | None = None,
        seed: int | None = None,
        shared: bytes = b"",
    ) -> None:
        self._link = link
        self.run_id = run_id
        self.recorder = recorder if recorder is not None else MemoryRecorder()
        self.seed = seed
        self.shared = shared

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
