"""An answer that the SuperLink did not take is sent again until it is, whatever is answered meanwhile."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from privfed import Message
from privfed.runtime import supernode
from privfed.runtime.handshake import NetworkError
from privfed.runtime.node_store import NodeStore, NodeStoreError
from proofs_tests.deployment import odd_app
from proofs_tests.deployment.paper_fleet import PaperFleet, PaperLink
from proofs_tests.deployment.paper_node import Place, ask, exchange, grid_of, running, seen


@pytest.mark.parametrize("withdrawn", [False, True])
def test_an_answer_that_was_refused_five_times_is_handed_in_later(
    withdrawn: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lay in the outbox until the node's next start, and the node was asked nothing more of this run.

    Of one that nobody waits for any more the node learns so before it does the next task: the app's state goes back.
    """
    monkeypatch.setattr(supernode, "_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(supernode, "_OWED_SECONDS", 0.05)
    paper = PaperLink(odd_app.write(tmp_path / "app"), 1)
    refused, refusing = threading.Semaphore(0), threading.Event()
    refusing.set()
    before = PaperFleet.reply

    def reply(self: PaperFleet, token: str, reply: Message) -> bool:
        if refusing.is_set():
            refused.release()
            raise NetworkError("not now")
        return before(self, token, reply)

    monkeypatch.setattr(PaperFleet, "reply", reply)
    with running(Place(paper, 1, tmp_path / "node")):
        grid = grid_of(paper)
        ids = grid.push_messages(ask(grid))
        for _ in range(5):
            assert refused.acquire(timeout=20)
        if withdrawn:
            grid.forget(ids)
        refusing.clear()
        if not withdrawn:
            assert grid.wait(ids, 20)
            assert [seen(reply) for reply in grid.pull_messages(ids)] == [1]
        assert [seen(reply) for reply in exchange(paper)] == [1 if withdrawn else 2]
    store = NodeStore(tmp_path / "node" / "state")
    assert store.unsent() == []
    store.close()
    paper.close()


def test_a_refusal_that_is_not_taken_is_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What kept the node from answering is told, however long that takes: the SuperLink waited for it until its end."""
    monkeypatch.setattr(supernode, "_OWED_SECONDS", 0.05)
    paper = PaperLink(odd_app.write(tmp_path / "app"), 1)
    before, tries = PaperFleet.reply, [0]

    def reply(self: PaperFleet, token: str, reply: Message) -> bool:
        tries[0] += 1
        if tries[0] <= 3:
            raise NetworkError("not now")
        return before(self, token, reply)

    def begin(*given: object) -> Message:
        raise NodeStoreError("the node's store is damaged")

    monkeypatch.setattr(PaperFleet, "reply", reply)
    monkeypatch.setattr(NodeStore, "begin", begin)
    with running(Place(paper, 1, tmp_path / "node")):
        (told,) = exchange(paper)
    assert (told.error.code, told.error.reason, tries[0]) == (8, "NodeStoreError", 4)
    paper.close()
