"""What a federation remembers: runs, nodes, tasks, replies, and the state of every node.

A task is one instruction to one node. It is *queued*, then *leased* to one worker at a time, then *done* by exactly
one reply; tasks of one node are handed out one at a time, in the order they were pushed, since they share its state. A
lease that is not finished in time goes back to the queue, and whoever held it can no longer finish it. An instruction
past its time to live is answered with an error, whether it was handed out or not. A run that ends takes its open tasks
with it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from privfed.errors import PrivfedError
from privfed.message import Error, ErrorCode, Message
from privfed.record import Record, RecordDict

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

    def is_empty(self) -> bool:
        """Return whether there is nothing to keep."""
        return not self.app and not any(self.mods.values())


@dataclass(frozen=True, slots=True)
class Lease:
    """One task handed to one worker until `expires_at` (seconds since the epoch)."""

    token: str
    message: Message
    state: NodeState
    expires_at: float


@dataclass(frozen=True, slots=True)
class Holder:
    """Whose lease a token is, or was. counted: its reply has been taken; else the lease is still open."""

    run_id: int
    node_id: int
    message_id: str
    counted: bool


@dataclass(frozen=True, slots=True)
class RunInfo:
    """A run and where it stands."""

    run_id: int
    state: str
    reason: str = ""


class Store(Protocol):
    """The memory of a Link. Every method is one transaction; `now` is seconds since the epoch.

    Errors: StoreError for an unknown run, a message id used twice, or a push to a run that is not running.
    """

    def create_run(self, run_id: int, nodes: Sequence[int]) -> None:
        """Register a run, pending, over these nodes (ascending)."""
        ...

    def run(self, run_id: int) -> RunInfo: ...

    def runs(self) -> list[RunInfo]:
        """Return all runs, by id."""
        ...

    def set_run_state(self, run_id: int, state: str, reason: str = "") -> None:
        """Change a run's state; when it ends, its tasks and its replies that nobody pulled are dropped.

        What was counted is forgotten when the run is completed: one that failed or stopped may go on.
        """
        ...

    def nodes(self, run_id: int) -> Sequence[int]: ...

    def push(self, run_id: int, messages: Iterable[Message]) -> list[str]:
        """Queue instructions; one to an unknown node is answered at once. Returns the ids answered that way."""
        ...

    def lease(
        self, now: float, seconds: float, run_id: int | None = None, nodes: Collection[int] | None = None
    ) -> Lease | None:
        """Hand out a task whose node has no other task out and that is not overdue; None when there is none.

        Tasks of one node come in the order they were pushed; nodes come in any order. nodes: only tasks of these.
        """
        ...

    def lease_many(
        self, now: float, seconds: float, count: int, run_id: int | None = None, nodes: Collection[int] | None = None
    ) -> list[Lease]:
        """Hand out at most `count` tasks as `lease` would, of as many nodes, in one transaction."""
        ...

    def holder(self, token: str) -> Holder | None:
        """Return whose lease this is or, until its run is completed, whose counted reply; None when it was lost.

        A run that is attempted again still knows what it counted: a node that did not hear so would undo what is in a
        committed round.
        """
        ...

    def release(self, node_id: int, holding: Collection[str] = ()) -> int:
        """Requeue the tasks this node has out, those of the tokens in `holding` excepted; return how many."""
        ...

    def put_down(self, token: str, node_id: int) -> bool:
        """End a task that was withdrawn while this node had it out; the node is free for its next one.

        Returns whether it was such a task; nothing is changed otherwise.
        """
        ...

    def complete(self, token: str, reply: Message, state: NodeState | None) -> str | None:
        """Finish a leased task: reply and state (None: unchanged) are committed together.

        Returns the instruction's id, or None when the lease is not valid any more; nothing is changed then.
        """
        ...

    def complete_many(self, done: Sequence[tuple[str, Message, NodeState | None]]) -> list[str | None]:
        """Finish leased tasks (token, reply, state) as `complete` would, all in one transaction."""
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

    def next_deadline(self) -> float:
        """Return when `expire` may have something to do next, or a time before that; infinity for never."""
        ...

    def state(self, run_id: int, node_id: int) -> NodeState:
        """Return what a node keeps; empty when it has kept nothing."""
        ...

    def states(self, run_id: int) -> Mapping[int, NodeState]:
        """Return what all nodes of a run keep, empty ones left out."""
        ...

    def put_states(self, run_id: int, states: Mapping[int, NodeState]) -> None:
        """Set what nodes keep, as a resumed run does."""
        ...


def check_transition(before: str, after: str) -> None:
    """Raise StoreError unless a run in state `before` may go to `after`."""
    if after not in RUN_STATES:
        raise StoreError(f"{after!r} is no run state: use one of {', '.join(RUN_STATES)}")
    if after not in _NEXT[before]:
        raise StoreError(f"a {before} run cannot become {after}")


def check_running(info: RunInfo) -> None:
    """Raise StoreError unless the run is running."""
    if info.state != "running":
        raise StoreError(f"run {info.run_id} is {info.state}: only a running run sends messages")


def expired_reply(message: Message) -> Message:
    """Return the answer to an instruction that was not answered in time."""
    return Message(Error(ErrorCode.MESSAGE_UNAVAILABLE, "expired"), reply_to=message)


def unknown_node_reply(message: Message) -> Message:
    """Return the answer to an instruction for a node that is not in the run."""
    return Message(Error(ErrorCode.NODE_UNAVAILABLE, "unknown node"), reply_to=message)


def pack_states(states: Mapping[int, NodeState]) -> RecordDict:
    """Put the states of nodes into one RecordDict; what is empty is left out."""
    packed: dict[str, Record] = {}
    for node, state in states.items():
        packed |= {json.dumps([node, key]): record for key, record in state.app.items()}
        for mod, kept in state.mods.items():
            packed |= {json.dumps([node, mod, key]): record for key, record in kept.items()}
    return RecordDict(packed)


def unpack_states(packed: RecordDict) -> dict[int, NodeState]:
    """Take apart what `pack_states` made. Raises ValueError for anything else."""
    states: dict[int, NodeState] = {}
    for name, record in packed.items():
        node, *mod, key = json.loads(name)
        state = states.setdefault(node, NodeState())
        target = state.mods.setdefault(mod[0], RecordDict()) if mod else state.app
        target[key] = record
    return states
