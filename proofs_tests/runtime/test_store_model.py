"""Both stores against a model in a page: any order of pushes, leases, replies, withdrawals and time."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from privfed import Message, RecordDict
from privfed.runtime.sqlstore import SqlStore
from privfed.runtime.store import NodeState, Store
from proofs_tests.runtime.store_case import EPOCH, NAMES, RUN, STORES, instruction, running, state

NODES = 3


@dataclass
class Task:
    node: int
    expires_at: float
    status: str = "queued"  # queued, out, gone (withdrawn while out), done, over
    token: str = ""
    until: float = 0.0


@dataclass
class Model:
    tasks: dict[str, Task] = field(default_factory=dict)
    states: dict[int, NodeState] = field(default_factory=dict)

    def choices(self, now: float) -> set[str]:
        """Return the task of each free node that comes next."""
        busy = {task.node for task in self.tasks.values() if task.status in ("out", "gone")}
        found: dict[int, str] = {}
        for message_id, task in self.tasks.items():
            if task.status == "queued" and task.node not in busy and task.expires_at > now:
                found.setdefault(task.node, message_id)
        return set(found.values())


class StoreMachine(RuleBasedStateMachine):
    make: Callable[[Path], Store]

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp())
        self.store = running(type(self).make(self.path), NODES)
        self.model = Model()
        self.now = EPOCH
        self.tokens: list[tuple[str, Message]] = []
        self.marks = self.sent = 0

    def teardown(self) -> None:
        if isinstance(self.store, SqlStore):
            self.store.close()
        shutil.rmtree(self.path)

    @rule(sends=st.lists(st.tuples(st.integers(1, NODES + 1), st.sampled_from([5.0, 20.0])), min_size=1, max_size=3))
    def push(self, sends: list[tuple[int, float]]) -> None:
        sent = []
        for node, ttl in sends:
            self.sent += 1  # ids in order, so that a failing example can be replayed
            sent.append(instruction(node, ttl=ttl, at=self.now).with_metadata(message_id=f"m{self.sent:04}"))
        answered = self.store.push(RUN, sent)
        for message in sent:
            known = message.metadata.dst_node_id <= NODES
            assert (message.metadata.message_id in answered) != known
            task = Task(message.metadata.dst_node_id, message.metadata.expires_at, "queued" if known else "done")
            self.model.tasks[message.metadata.message_id] = task

    @rule(seconds=st.sampled_from([4.0, 30.0]))
    def lease(self, seconds: float) -> None:
        choices = self.model.choices(self.now)
        lease = self.store.lease(self.now, seconds)
        if lease is None:
            assert not choices
            return
        message_id = lease.message.metadata.message_id
        assert message_id in choices
        task = self.model.tasks[message_id]
        assert lease.state == self.model.states.get(task.node, NodeState())
        task.status, task.token, task.until = "out", lease.token, self.now + seconds
        self.tokens.append((lease.token, lease.message))

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), keeps=st.booleans())
    def complete(self, data: st.DataObject, keeps: bool) -> None:
        token, message = data.draw(st.sampled_from(self.tokens), "token")
        self.marks += 1
        new = state(self.marks) if keeps else None
        accepted = self.store.complete(token, Message(RecordDict(), reply_to=message), new)
        message_id = message.metadata.message_id
        task = self.model.tasks[message_id]
        valid = task.status == "out" and task.token == token
        assert accepted == (message_id if valid else None)
        if valid:
            task.status = "done"
            if new is not None:
                self.model.states[task.node] = new
        elif task.status == "gone" and task.token == token:
            task.status = "over"

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), node=st.integers(1, NODES))
    def put_down(self, data: st.DataObject, node: int) -> None:
        token, message = data.draw(st.sampled_from(self.tokens), "token")
        task = self.model.tasks[message.metadata.message_id]
        gone = task.status == "gone" and task.token == token and task.node == node
        assert self.store.put_down(token, node) == gone
        if gone:
            task.status = "over"

    @rule(seconds=st.sampled_from([1.0, 4.0, 10.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def expire(self) -> None:
        overdue = set()
        for message_id, task in self.model.tasks.items():
            if task.status in ("out", "gone") and task.until <= self.now:
                task.status = "queued" if task.status == "out" else "over"
            if task.status in ("queued", "out") and task.expires_at <= self.now:
                overdue.add(message_id)
                task.status = "done"
        answered = self.store.expire(self.now)
        assert len(answered) == len(set(answered))
        assert set(answered) == overdue

    def some(self, data: st.DataObject) -> list[str]:
        return data.draw(st.lists(st.sampled_from(sorted(self.model.tasks)), unique=True, max_size=4), "ids")

    @precondition(lambda self: self.model.tasks)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        chosen = self.some(data)
        self.store.forget(RUN, chosen)
        for message_id in chosen:
            task = self.model.tasks[message_id]
            task.status = {"out": "gone", "gone": "gone"}.get(task.status, "over")

    @precondition(lambda self: self.model.tasks)
    @rule(data=st.data())
    def pull(self, data: st.DataObject) -> None:
        chosen = self.some(data)
        ready = [message_id for message_id in chosen if self.model.tasks[message_id].status == "done"]
        assert self.store.arrived(RUN, chosen) == bool(ready)
        replies = self.store.pull(RUN, chosen)
        assert [reply.metadata.reply_to_message_id for reply in replies] == ready
        for message_id in ready:
            self.model.tasks[message_id].status = "over"

    @invariant()
    def states_agree(self) -> None:
        assert self.store.states(RUN) == self.model.states


@pytest.mark.parametrize("name", NAMES)
def test_a_store_behaves_like_the_model(name: str) -> None:
    machine = type(f"{name}Machine", (StoreMachine,), {"make": staticmethod(STORES[name])})
    examples = 150 if name == "memory" else 25
    limits = settings(max_examples=examples, stateful_step_count=30, deadline=None, derandomize=True)
    run_state_machine_as_test(machine, settings=settings(limits, suppress_health_check=list(HealthCheck)))
