"""What a federation remembers: runs, nodes, tasks, replies, and the state of every node.

A task is one instruction to one node. It is *queued*, then *leased* to one worker at a time, then *done* by exactly
one reply; tasks of one node are handed out one at a time, in the order they were pushed, since they share its state. A
lease that is not finished in time goes back to the queue, and whoever held it can no longer finish it. An instruction
past its time to live is answered with an error instead of being handed out.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from privfed.errors import PrivfedError
from privfed.message import Error, ErrorCode, Message
from privfed.record import RecordDict

RUN_STATES = ("pending", "running", "completed", "failed", "stopped")
_NEXT = {
    "pending": {"running", "failed", "stopped"},
    "running": {"completed", "failed", "stopped"},
    "completed": set(),
    "failed": {"running"},
    "stopped": {"running"},
}
"""Allowed changes of a run's state; a failed or stopped run may be resumed."""


class StoreError(PrivfedError):
    """A change the store refuses: an unknown run or node, or a state that cannot follow the current one."""


@dataclass(frozen=True, slots=True)
class NodeState:
    """What a node keeps between two tasks of a run: the app's records, and each mod's."""

    app: RecordDict = field(default_factory=RecordDict)
    mods: dict[str, RecordDict] = field(default_factory=dict)

    def copy(self) -> NodeState:
        """Copy records, share arrays: a handler that fails must not have changed anything."""
        return NodeState(self.app.copy(), {name: state.copy() for name, state in self.mods.items()})


@dataclass(frozen=True, slots=True)
class Lease:
    """One task handed to one worker until `expires_at` (seconds since the epoch)."""

    token: str
    message: Message
    state: NodeState
    expires_at: float


@dataclass(frozen=True, slots=True)
class RunInfo:
    """A run and where it stands."""

    run_id: int
    state: str
    reason: str = ""


class Store(Protocol):
    """The memory of a Link. Every method is one transaction; `now` is seconds since the epoch."""

    def create_run(self, run_id: int, nodes: Sequence[int]) -> None: ...

    def run(self, run_id: int) -> RunInfo: ...

    def runs(self) -> list[RunInfo]: ...

    def set_run_state(self, run_id: int, state: str, reason: str = "") -> None: ...

    def nodes(self, run_id: int) -> Sequence[int]: ...

    def push(self, run_id: int, messages: Iterable[Message]) -> list[str]:
        """Queue instructions; one to an unknown node is answered at once. Returns the ids answered that way."""
        ...

    def lease(self, now: float, seconds: float, run_id: int | None = None) -> Lease | None:
        """Hand out the oldest task whose node has no other task out; None when there is none."""
        ...

    def complete(self, token: str, reply: Message, state: NodeState | None) -> str | None:
        """Finish a leased task: reply and state (None: unchanged) are committed together.

        Returns the instruction's id, or None when the lease is not valid any more; nothing is changed then.
        """
        ...

    def pull(self, run_id: int, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to these instructions, each once."""
        ...

    def arrived(self, run_id: int, message_ids: Iterable[str]) -> bool:
        """Return whether a reply to one of these instructions can be pulled."""
        ...

    def forget(self, run_id: int, message_ids: Iterable[str]) -> None:
        """Withdraw instructions: not handed out any more, replies dropped."""
        ...

    def expire(self, now: float) -> list[str]:
        """Requeue overdue leases, answer overdue instructions with an error; return the ids answered."""
        ...

    def state(self, run_id: int, node_id: int) -> NodeState: ...


def check_transition(before: str, after: str) -> None:
    """Raise StoreError unless a run in state `before` may go to `after`."""
    if after not in RUN_STATES:
        raise StoreError(f"{after!r} is no run state: use one of {', '.join(RUN_STATES)}")
    if after not in _NEXT[before]:
        raise StoreError(f"a {before} run cannot become {after}")


def expired_reply(message: Message) -> Message:
    """Return the answer to an instruction that was not delivered in time."""
    return Message(Error(ErrorCode.MESSAGE_UNAVAILABLE, "expired"), reply_to=message)


def unknown_node_reply(message: Message) -> Message:
    """Return the answer to an instruction for a node that is not in the run."""
    return Message(Error(ErrorCode.NODE_UNAVAILABLE, "unknown node"), reply_to=message)


@dataclass(slots=True)
class _Run:
    info: RunInfo
    nodes: Sequence[int]
    members: frozenset[int] | range
    replies: dict[str, Message] = field(default_factory=dict)
    states: dict[int, NodeState] = field(default_factory=dict)


_Key = tuple[int, int]


class MemoryStore:
    """A store in this process. Messages and states are kept by reference: nothing is serialised or hashed."""

    def __init__(self) -> None:
        self._runs: dict[int, _Run] = {}
        self._queues: dict[_Key, deque[Message]] = {}
        self._ready: deque[_Key] = deque()
        self._leases: dict[str, Lease] = {}
        self._busy: dict[_Key, str] = {}
        self._waiting: dict[str, _Key] = {}

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

    def nodes(self, run_id: int) -> Sequence[int]:
        return self._run(run_id).nodes

    def push(self, run_id: int, messages: Iterable[Message]) -> list[str]:
        run = self._run(run_id)
        answered = []
        for message in messages:
            message_id, node = message.metadata.message_id, message.metadata.dst_node_id
            if message_id in self._waiting or message_id in run.replies:
                raise StoreError(f"the message {message_id} was pushed already")
            if node not in run.members:
                run.replies[message_id] = unknown_node_reply(message)
                answered.append(message_id)
                continue
            key = (run_id, node)
            queue = self._queues.setdefault(key, deque())
            if not queue and key not in self._busy:
                self._ready.append(key)
            queue.append(message)
            self._waiting[message_id] = key
        return answered

    def lease(self, now: float, seconds: float, run_id: int | None = None) -> Lease | None:
        for _ in range(len(self._ready)):
            key = self._ready.popleft()
            if run_id is not None and key[0] != run_id:
                self._ready.append(key)
                continue
            queue = self._queues[key]
            message = queue.popleft()
            token = secrets.token_hex(16)
            lease = Lease(token, message, self.state(*key).copy(), now + seconds)
            self._leases[token] = lease
            self._busy[key] = token
            return lease
        return None

    def _release(self, key: _Key) -> None:
        self._busy.pop(key, None)
        if self._queues.get(key):
            self._ready.append(key)
        else:
            self._queues.pop(key, None)

    def complete(self, token: str, reply: Message, state: NodeState | None) -> str | None:
        lease = self._leases.pop(token, None)
        if lease is None:
            return None
        message_id = lease.message.metadata.message_id
        key = self._waiting.pop(message_id, None)
        run_key = (lease.message.metadata.run_id, lease.message.metadata.dst_node_id)
        self._release(run_key)
        if key is None:  # withdrawn while it ran
            return None
        run = self._runs[key[0]]
        if state is not None:
            run.states[key[1]] = state
        run.replies[message_id] = reply
        return message_id

    def pull(self, run_id: int, message_ids: Iterable[str]) -> list[Message]:
        replies = self._run(run_id).replies
        if isinstance(message_ids, dict | set | frozenset) and len(replies) < len(message_ids):
            message_ids = [message_id for message_id in replies if message_id in message_ids]
        return [replies.pop(message_id) for message_id in list(message_ids) if message_id in replies]

    def arrived(self, run_id: int, message_ids: Iterable[str]) -> bool:
        replies = self._run(run_id).replies
        if isinstance(message_ids, dict | set | frozenset) and len(replies) < len(message_ids):
            return any(message_id in message_ids for message_id in replies)
        return any(message_id in replies for message_id in message_ids)

    def forget(self, run_id: int, message_ids: Iterable[str]) -> None:
        run = self._run(run_id)
        for message_id in message_ids:
            run.replies.pop(message_id, None)
            key = self._waiting.pop(message_id, None)
            queue = self._queues.get(key) if key is not None else None
            if key is not None and queue:
                kept = deque(message for message in queue if message.metadata.message_id != message_id)
                self._queues[key] = kept
                if not kept and key in self._ready:
                    self._ready.remove(key)
                    del self._queues[key]

    def expire(self, now: float) -> list[str]:
        for token, lease in list(self._leases.items()):
            if lease.expires_at <= now:
                del self._leases[token]
                key = (lease.message.metadata.run_id, lease.message.metadata.dst_node_id)
                if lease.message.metadata.message_id in self._waiting:
                    self._queues.setdefault(key, deque()).appendleft(lease.message)
                self._release(key)
        answered = []
        for key, queue in list(self._queues.items()):
            overdue = [message for message in queue if message.metadata.expires_at <= now]
            for message in overdue:
                message_id = message.metadata.message_id
                queue.remove(message)
                self._waiting.pop(message_id, None)
                self._runs[key[0]].replies[message_id] = expired_reply(message)
                answered.append(message_id)
            if overdue and not queue:
                if key in self._ready:
                    self._ready.remove(key)
                del self._queues[key]
        return answered

    def state(self, run_id: int, node_id: int) -> NodeState:
        return self._run(run_id).states.get(node_id) or NodeState()
