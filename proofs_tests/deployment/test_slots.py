"""What a node is done with is given back, however it ended: it goes on being asked, and nothing piles up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from privfed import ArrayRecord, ConfigRecord, Message, RecordDict
from privfed.runtime.fleet import FleetClient, Task
from proofs_tests.deployment.local_link import LocalLink
from proofs_tests.deployment.waiting import eventually

RUN = 7
TIMES = 6
"""More than the tasks that a node takes at a time."""


@pytest.fixture
def link(tmp_path: Path) -> Iterator[LocalLink]:
    with LocalLink(tmp_path / "home") as link:
        link.link.link.create_run(RUN, [1])
        link.link.link.set_run_state(RUN, "running")
        yield link


@pytest.fixture
def node(link: LocalLink) -> Iterator[FleetClient]:
    client = FleetClient(link.fleet, None, 1)
    yield client
    client.close()


def push(link: LocalLink, number: int) -> list[str]:
    """Ask node 1 something with a large array that nothing before it had."""
    model = ArrayRecord([np.full(2_000_000, number, np.float32)])
    return link.link.link.push(RUN, [Message(RecordDict({"a": model}), 1, "train")])


def received(node: FleetClient) -> Task:
    task = node.receive(20)
    assert task is not None, "the node is not asked any more"
    return task


def answer(task: Task) -> Message:
    return Message(RecordDict({"c": ConfigRecord({"n": 1})}), reply_to=task.message)


def kept(link: LocalLink) -> int:
    """Return how many large buffers the SuperLink keeps for nodes that may fetch them."""
    return len(link.link.dispatcher.outbox._buffers)


def is_empty(link: LocalLink) -> bool:
    return not kept(link) and not any(one.out for one in link.link.dispatcher.sessions.values())


def test_a_node_whose_replies_come_too_late_is_asked_again(link: LocalLink, node: FleetClient) -> None:
    for number in range(TIMES):
        ids = push(link, number)
        task = received(node)
        link.link.link.forget(RUN, ids)
        assert not node.reply(task.token, answer(task))
    eventually(lambda: is_empty(link), 20)


def test_a_node_that_worked_while_its_run_began_anew_is_asked_again(link: LocalLink, node: FleetClient) -> None:
    for number in range(TIMES):
        push(link, number)
        task = received(node)
        link.link.link.set_run_state(RUN, "stopped", "the ServerApp is started again")
        link.link.link.set_run_state(RUN, "running")
        assert not node.reply(task.token, answer(task))
    eventually(lambda: is_empty(link), 20)


def test_a_reply_whose_verdict_was_lost_frees_the_node_when_it_is_sent_again(
    link: LocalLink, node: FleetClient
) -> None:
    for number in range(TIMES):
        push(link, number)
        task = received(node)
        assert link.link.link.count(task.token, RUN, answer(task))  # and nobody is told
        assert node.reply(task.token, answer(task))
    eventually(lambda: is_empty(link), 20)


def test_a_node_that_goes_and_comes_back_leaves_no_buffers(link: LocalLink) -> None:
    for number in range(3):
        client = FleetClient(link.fleet, None, 1)
        push(link, number)
        received(client)
        client.close()
        eventually(lambda: not link.link.dispatcher.sessions, 20)
        link.link.link.set_run_state(RUN, "stopped", "the ServerApp is started again")
        link.link.link.set_run_state(RUN, "running")
    client = FleetClient(link.fleet, None, 1)
    eventually(lambda: link.link.dispatcher.sessions, 20)
    eventually(lambda: is_empty(link), 20)
    client.close()


def test_a_run_that_ends_takes_along_what_was_kept_for_nodes_that_went(link: LocalLink, node: FleetClient) -> None:
    push(link, 1)
    received(node)
    assert kept(link) == 1
    node.close()
    eventually(lambda: not link.link.dispatcher.sessions, 20)
    link.link.link.set_run_state(RUN, "stopped", "as asked")
    link.link.link.on_end(RUN)  # as whoever carries a run on says
    eventually(lambda: not kept(link), 20)


def test_a_node_cannot_free_what_another_one_has(link: LocalLink, node: FleetClient) -> None:
    link.link.link.create_run(RUN + 1, [2])
    link.link.link.set_run_state(RUN + 1, "running")
    other = FleetClient(link.fleet, None, 2)
    push(link, 1)
    task = received(node)
    eventually(lambda: 2 in link.link.dispatcher.sessions, 20)
    link.link.link.set_run_state(RUN, "stopped", "the ServerApp is started again")
    assert not other.reply(task.token, answer(task))
    assert link.link.dispatcher.sessions[1].out == {task.token}
    other.close()
