"""What keeps a node from a task is told to the SuperLink, and told by it: nobody waits without knowing for what."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from privfed import ErrorCode, Message
from privfed.runtime import fleet, fleet_service
from privfed.runtime.control import ControlClient
from privfed.runtime.fleet import FleetClient
from privfed.runtime.frame import Offer
from proofs_tests.deployment.local_link import LocalLink
from proofs_tests.deployment.test_transfer import received, write_app
from proofs_tests.deployment.waiting import eventually


@pytest.fixture
def link(tmp_path: Path) -> Iterator[LocalLink]:
    write_app(tmp_path / "app")
    with LocalLink(tmp_path / "home") as link:
        yield link


@pytest.mark.parametrize("times", [2, 3])
def test_a_task_that_cannot_be_completed_is_tried_again_and_then_an_error(
    times: int, link: LocalLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unexpected fault ended the thread without a word, and the run waited for the node until the task's end."""
    monkeypatch.setattr(fleet, "_FIRST_PAUSE", 0.01)
    clients = [FleetClient(link.fleet, None, node) for node in (1, 2)]
    before, tries = clients[0]._complete, [0]

    def complete(offer: Offer) -> None:
        tries[0] += 1
        if tries[0] <= times:
            raise RuntimeError("a fault of this program")
        before(offer)

    monkeypatch.setattr(clients[0], "_complete", complete)
    name = link.submit(tmp_path / "app", 2)
    task = received(clients[1])
    assert clients[1].reply(task.token, Message(task.message.content, reply_to=task.message))
    if times == 2:
        task = received(clients[0])
        assert clients[0].reply(task.token, Message(task.message.content, reply_to=task.message))
    else:
        told = f"Error(code={ErrorCode.MESSAGE_UNAVAILABLE}, reason='RuntimeError')"
        assert link.wait(name).reason.endswith(told)
        assert tries[0] == 3
        eventually(lambda: clients[0]._held == clients[0]._fetching == set())
    for client in clients:
        client.close()


def test_what_a_node_waits_for_is_told_to_users_until_it_goes_on(link: LocalLink, tmp_path: Path) -> None:
    clients = [FleetClient(link.fleet, None, node) for node in (1, 2)]
    name = link.submit(tmp_path / "app", 2)
    with ControlClient(link.control) as control:

        def told() -> str:
            return control.show(name).reason.partition(": ")[0]

        eventually(lambda: told() == "waits for replies of 2 nodes")
        clients[0].report_wait("a superexec")
        eventually(lambda: told() == "waits for replies of 2 nodes, 1 of them for a superexec (1)")
        clients[0]._hangup()  # it says so again on its next connection
        eventually(lambda: "not connected" in told() or "superexec" in told())
        clients[1].report_wait("a superexec")
        eventually(lambda: told() == "waits for replies of 2 nodes, 2 of them for a superexec (1, 2)")
        clients[0].report_wait("\x1b[31m\nüx" + "y" * 1000)
        eventually(lambda: "for [31mx" + "y" * 95 + " (1)" in told())  # and no more than a line of what can be read
        for client in clients:
            client.report_wait("")
        eventually(lambda: told() == "waits for replies of 2 nodes")
    for client in clients:
        client.close()


def test_a_superlink_of_the_release_before_does_not_listen_and_serves_all_the_same(
    link: LocalLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def deaf(*given: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(fleet_service, "_hear", deaf)
    clients = [FleetClient(link.fleet, None, node) for node in (1, 2)]
    name = link.submit(tmp_path / "app", 2)
    for _ in range(2):
        for client in clients:
            task = received(client)
            for number in range(100):
                client.report_wait(f"number {number}")
            assert client.reply(task.token, Message(task.message.content, reply_to=task.message))
    assert link.wait(name).state == "completed"
    for client in clients:
        client.close()
