"""The store of one process: messages and states are kept by reference, nothing is serialised or hashed."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from privfed.message import Message
from privfed.runtime.store import (
    Holder,
    Lease,
    NodeState,
    RunInfo,
    StoreError,
    check_running,
    check_transition,
    expired_reply,
    unknown_node_reply,
)

_Key = tuple[int, int]
_SPARE_DEADLINES = 1024


@dataclass(slots=True)
class _Run:
    info: RunInfo
    nodes: Sequence[int]
    members: frozenset[int] | range
    replies: dict[str, Message] = field(default_factory=dict)
    states: dict[int, NodeState] = field(default_factory=dict)
    tasks: set[str] = field(default_factory=set)
    counted: dict[str, Holder] = field(default_factory=dict)


@dataclass(slots=True)
class _Task:
    """A task that has no answer yet. token: of its lease, while it is out."""

    key: _Key
    message: Message
    token: str | None = None


class MemoryStore:
    """A store in this process; not safe for threads by itself, the Link holds a lock.

    A node is either idle, in `_ready` (it has queued tasks and none out), or in `_busy` (a task of it is out).
    Withdrawn tasks leave `_tasks` at once and queues lazily, so that every operation is O(1) in the number of tasks.
    """

    def __init__(self) -> None:
        self._runs: dict[int, _Run] = {}
        self._tasks: dict[str, _Task] = {}
        self._queues: dict[_Key, deque[str]] = {}
        self._ready: deque[_Key] = deque()
        self._leases: dict[str, tuple[Lease, _Key]] = {}
        self._busy: dict[_Key, str] = {}
        self._overdue: list[tuple[float, str]] = []
        self._lapsing: list[tuple[float, str]] = []
        self._tokens = itertools.count(1)
        self._counted: dict[str, Holder] = {}

    def create_run(self, run_id: int, nodes: Sequence[int]) -> None:
        if run_id in self._runs:
            raise StoreError(f"run {run_id} exists already")
        members = nodes if isinstance(nodes, range) else frozenset(nodes)
        self._runs[run_id] = _Run(RunInfo(run_id, "pending"), nodes, members)

    def _run(self, run_id: int) -> _Run:
        if run_id not in self._runs:
            raise StoreError(f"there is no run {run_id}")
        return self._runs[run_id]

    def run(self, run_id: int) -> RunInfo:
        return self._run(run_id).info

    def runs(self) -> list[RunInfo]:
        return [run.info for _, run in sorted(self._runs.items())]

    def set_run_state(self, run_id: int, state: str, reason: str = "") -> None:
        run = self._run(run_id)
        check_transition(run.info.state, state)
        run.info = RunInfo(run_id, state, reason)
        if state != "running":
            for message_id in run.tasks:
                task = self._tasks.pop(message_id)
                if task.token is not None:
                    self._end_lease(task.token)
            run.tasks.clear()
            run.replies.clear()
        if state == "completed":
            for token in run.counted:
                self._counted.pop(token, None)
            run.counted.clear()

    def nodes(self, run_id: int) -> Sequence[int]:
        return self._run(run_id).nodes

    def push(self, run_id: int, messages: Iterable[Message]) -> list[str]:
        run = self._run(run_id)
        check_running(run.info)
        answered = []
        for message in messages:
            data = message.metadata
            message_id, key = data.message_id, (run_id, data.dst_node_id)
            if message_id in self._tasks or message_id in run.replies:
                raise StoreError(f"the message {message_id} was pushed already")
            if data.dst_node_id not in run.members:
                run.replies[message_id] = unknown_node_reply(message)
                answered.append(message_id)
                continue
            self._tasks[message_id] = _Task(key, message)
            run.tasks.add(message_id)
            self._enqueue(key, message_id)
            heapq.heappush(self._overdue, (data.expires_at, message_id))
        return answered

    def _enqueue(self, key: _Key, message_id: str, *, first: bool = False) -> None:
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = deque()
            if key not in self._busy:
                self._ready.append(key)
        if first:
            queue.appendleft(message_id)
        else:
            queue.append(message_id)

    def lease(
        self, now: float, seconds: float, run_id: int | None = None, nodes: Collection[int] | None = None
    ) -> Lease | None:
        for _ in range(len(self._ready)):
            key = self._ready.popleft()
            asked = run_id in (None, key[0]) and (nodes is None or key[1] in nodes)
            task = self._next_task(key, now) if asked else None
            if task is None:
                if key in self._queues:
                    self._ready.append(key)
                continue
            token = str(next(self._tokens))
            lease = Lease(token, task.message, self.state(*key).copy(), now + seconds)
            task.token = token
            self._leases[token] = (lease, key)
            self._busy[key] = token
            heapq.heappush(self._lapsing, (lease.expires_at, token))
            return lease
        return None

    def lease_many(
        self, now: float, seconds: float, count: int, run_id: int | None = None, nodes: Collection[int] | None = None
    ) -> list[Lease]:
        found: list[Lease] = []
        while len(found) < count and (lease := self.lease(now, seconds, run_id, nodes)) is not None:
            found.append(lease)
        return found

    def _next_task(self, key: _Key, now: float) -> _Task | None:
        """Take the first task in a node's queue that is alive and not overdue; forget an empty queue."""
        queue = self._queues[key]
        while queue and queue[0] not in self._tasks:
            queue.popleft()
        found = None
        for position, message_id in enumerate(queue):
            task = self._tasks.get(message_id)
            if task is not None and task.message.metadata.expires_at > now:
                found = task
                del queue[position]
                break
        if not queue:
            del self._queues[key]
        return found

    def _end_lease(self, token: str) -> None:
        """Close a lease and make its node ready for its next task."""
        _, key = self._leases.pop(token)
        self._busy.pop(key)
        if key in self._queues:
            self._ready.append(key)

    def complete(self, token: str, reply: Message, state: NodeState | None) -> str | None:
        entry = self._leases.get(token)
        if entry is None:
            return None
        lease, key = entry
        message_id = lease.message.metadata.message_id
        withdrawn = self._is_withdrawn(token)
        self._end_lease(token)
        if withdrawn:
            return None
        run = self._runs[key[0]]
        if state is not None:
            run.states[key[1]] = state
        self._answer(message_id, reply)
        run.counted[token] = self._counted[token] = Holder(*key, message_id, True)
        return message_id

    def complete_many(self, done: Sequence[tuple[str, Message, NodeState | None]]) -> list[str | None]:
        return [self.complete(*one) for one in done]

    def holder(self, token: str) -> Holder | None:
        entry = self._leases.get(token)
        if entry is None:
            return self._counted.get(token)
        lease, key = entry
        return None if self._is_withdrawn(token) else Holder(*key, lease.message.metadata.message_id, False)

    def _is_withdrawn(self, token: str) -> bool:
        """Return whether a task was withdrawn while it was out; another one may have its message's id since."""
        task = self._tasks.get(self._leases[token][0].message.metadata.message_id)
        return task is None or task.token != token

    def put_down(self, token: str, node_id: int) -> bool:
        entry = self._leases.get(token)
        if entry is None or entry[1][1] != node_id or not self._is_withdrawn(token):
            return False
        self._end_lease(token)
        return True

    def release(self, node_id: int, holding: Collection[str] = ()) -> int:
        out = [token for token, (_, key) in self._leases.items() if key[1] == node_id and token not in holding]
        for token in out:
            self._requeue(token)
        return len(out)

    def _answer(self, message_id: str, reply: Message) -> None:
        task = self._tasks.pop(message_id)
        run = self._runs[task.key[0]]
        run.tasks.discard(message_id)
        run.replies[message_id] = reply

    def pull(self, run_id: int, message_ids: Iterable[str]) -> list[Message]:
        replies = self._run(run_id).replies
        return [replies.pop(message_id) for message_id in _common(message_ids, replies)]

    def arrived(self, run_id: int, message_ids: Iterable[str]) -> bool:
        return any(True for _ in _common(message_ids, self._run(run_id).replies))

    def forget(self, run_id: int, message_ids: Iterable[str]) -> None:
        run = self._run(run_id)
        for message_id in message_ids:
            run.replies.pop(message_id, None)
            if message_id in run.tasks:
                run.tasks.discard(message_id)
                del self._tasks[message_id]

    def expire(self, now: float) -> list[str]:
        while self._lapsing and self._lapsing[0][0] <= now:
            _, token = heapq.heappop(self._lapsing)
            if token in self._leases:
                self._requeue(token)
        answered = []
        while self._overdue and self._overdue[0][0] <= now:
            _, message_id = heapq.heappop(self._overdue)
            task = self._tasks.get(message_id)
            if task is None:
                continue
            self._answer(message_id, expired_reply(task.message))
            if task.token is not None:
                self._end_lease(task.token)
            answered.append(message_id)
        self._compact()
        return answered

    def next_deadline(self) -> float:
        return min(heap[0][0] if heap else math.inf for heap in (self._overdue, self._lapsing))

    def _requeue(self, token: str) -> None:
        lease, key = self._leases[token]
        message_id = lease.message.metadata.message_id
        task = self._tasks.get(message_id)
        if task is not None:
            task.token = None
            self._enqueue(key, message_id, first=True)
        self._end_lease(token)

    def _compact(self) -> None:
        """Drop the deadlines of tasks and leases that are over, once they are the greater part."""
        if len(self._overdue) > 2 * len(self._tasks) + _SPARE_DEADLINES:
            self._overdue = [entry for entry in self._overdue if entry[1] in self._tasks]
            heapq.heapify(self._overdue)
        if len(self._lapsing) > 2 * len(self._leases) + _SPARE_DEADLINES:
            self._lapsing = [entry for entry in self._lapsing if entry[1] in self._leases]
            heapq.heapify(self._lapsing)

    def state(self, run_id: int, node_id: int) -> NodeState:
        return self._run(run_id).states.get(node_id) or NodeState()

    def states(self, run_id: int) -> Mapping[int, NodeState]:
        states = self._run(run_id).states
        return {node: states[node] for node in sorted(states) if not states[node].is_empty()}

    def put_states(self, run_id: int, states: Mapping[int, NodeState]) -> None:
        run = self._run(run_id)
        for node, state in states.items():
            if node not in run.members:
                raise StoreError(f"run {run_id} has no node {node}")
            run.states[node] = state


def _common(message_ids: Iterable[str], replies: Mapping[str, Message]) -> Iterable[str]:
    """Return the ids that have a reply, in the order given, or of arrival when few of many have one."""
    if isinstance(message_ids, dict | set | frozenset) and len(replies) < len(message_ids):
        return [message_id for message_id in replies if message_id in message_ids]
    return [message_id for message_id in dict.fromkeys(message_ids) if message_id in replies]
