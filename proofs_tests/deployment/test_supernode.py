"""A node against a SuperLink on paper: nothing lost, nothing twice, nothing of the node's in an app's hands."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from privfed import ConfigRecord, Context, Message, RecordDict, failpoint
from privfed.apps import CallNext
from privfed.runtime import node_blob
from privfed.runtime.launcher import Launcher
from privfed.runtime.node_store import NodeStore
from privfed.runtime.policy import PolicyRefusal
from privfed.runtime.supernode import NodeOptions
from proofs_tests.deployment import odd_app
from proofs_tests.deployment.paper_fleet import RUN, PaperLink
from proofs_tests.deployment.paper_node import Place, ask, confined, exchange, grid_of, running, seen
from proofs_tests.deployment.waiting import eventually

STEPS = ("before-begin", "before-commit", "after-commit", "before-send", "after-send", "after-settle")


class Killed(BaseException):
    """Ends the thread of a run at a failpoint, as SIGKILL would, with nothing tidied up."""


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return odd_app.write(tmp_path_factory.mktemp("apps") / "odd")


@pytest.fixture
def processes(tmp_path: Path) -> Callable[[], Launcher]:
    return confined(tmp_path)


def test_state_lives_on_the_nodes_disk(app: Path, tmp_path: Path) -> None:
    paper = PaperLink(app, 2)
    places = [Place(paper, node, tmp_path / str(node)) for node in (1, 2)]
    for number in (1, 2, 3):
        with running(*places):
            assert [seen(reply) for reply in exchange(paper)] == [number] * 2
    paper.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_any_step_loses_nothing_and_runs_nothing_twice(step: str, app: Path, tmp_path: Path) -> None:
    """Kill at the second message, start again, go on: every message is answered once, and the count has no gap."""
    paper = PaperLink(app, 1, lease=0.5)
    journal = tmp_path / "journal"
    place = Place(paper, 1, tmp_path / "node")
    reached: list[str] = []

    def point(name: str) -> None:
        if name == step:
            reached.append(name)
            if len(reached) == 2:
                raise Killed

    config = {"journal": str(journal)}
    failpoint.install(point)
    place.start(node_config=config)
    replies = exchange(paper)
    grid = grid_of(paper)
    (message_id,) = grid.push_messages(ask(grid))
    deadline = time.monotonic() + 10
    while len(reached) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    failpoint.install(None)
    place.stop()
    place.start(node_config=config)
    assert grid.wait([message_id], 20)
    replies += grid.pull_messages([message_id])
    replies += exchange(paper)
    place.stop()
    assert [seen(reply) for reply in replies] == [1, 2, 3]
    ran = journal.read_text().split()
    before_commit = step == "before-commit"
    assert len(ran) == 3 + before_commit, "only what was not committed runs again"
    assert len(set(ran)) == 3
    assert sum(paper.counted.values()) == 3
    paper.close()


def test_a_node_offline_keeps_its_answer_and_the_next_process_sends_it(app: Path, tmp_path: Path) -> None:
    paper = PaperLink(app, 1)
    place = Place(paper, 1, tmp_path / "node")
    place.start()
    place.fleet.offline.set()
    grid = grid_of(paper)
    ids = grid.push_messages(ask(grid))
    deadline = time.monotonic() + 10
    while not place.node.store.unsent() and time.monotonic() < deadline:
        time.sleep(0.01)
    place.node.options = NodeOptions(drain_seconds=0.1)
    place.stop()
    assert not grid.wait(ids, 0.1)
    place.start()
    assert grid.wait(ids, 10)
    assert seen(grid.pull_messages(ids)[0]) == 1
    place.stop()
    store = NodeStore(tmp_path / "node" / "state")
    assert store.unsent() == []
    store.close()
    paper.close()


def test_a_reply_that_came_too_late_takes_the_apps_state_with_it(app: Path, tmp_path: Path) -> None:
    paper = PaperLink(app, 1)
    place = Place(paper, 1, tmp_path / "node")
    with running(place):
        assert [seen(reply) for reply in exchange(paper)] == [1]
        place.fleet.refuse = lambda reply: True
        assert exchange(paper, timeout=1.0) == []
        place.fleet.refuse = lambda reply: False
        paper.link.complete(next(reversed(paper.leases.values())), Message(RecordDict(), reply_to=last(paper)), None)
        assert [seen(reply) for reply in exchange(paper)] == [2]
    paper.close()


def last(paper: PaperLink) -> Message:
    return next(reversed(paper.leases.values())).message


def test_a_full_disk_holds_the_answer_back_until_there_is_room(
    app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    paper = PaperLink(app, 1)
    full = threading.Event()
    full.set()
    before = node_blob.BlobDatabase.put

    def put(self: node_blob.BlobDatabase, value: Message | RecordDict) -> int:
        if full.is_set():
            raise OSError(28, "No space left on device")
        return before(self, value)

    monkeypatch.setattr(node_blob.BlobDatabase, "put", put)
    monkeypatch.setattr("privfed.runtime.supernode._PAUSE_SECONDS", 0.05)
    place = Place(paper, 1, tmp_path / "node")
    with running(place):
        grid = grid_of(paper)
        ids = grid.push_messages(ask(grid))
        assert not grid.wait(ids, 0.5)
        assert "waits for the disk: the disk is full" in caplog.text
        eventually(lambda: place.fleet.waits[-1] == "the node's disk")
        full.clear()
        assert grid.wait(ids, 10)
        assert seen(grid.pull_messages(ids)[0]) == 1
        assert [seen(reply) for reply in exchange(paper)] == [2]
        eventually(lambda: not place.fleet.waits[-1])
    paper.close()


def test_what_may_not_run_is_refused_by_its_class_alone(app: Path, tmp_path: Path) -> None:
    paper = PaperLink(app, 1)

    def approve(grant: object, bundle: object) -> None:
        raise PolicyRefusal("nobody approved this")

    with running(Place(paper, 1, tmp_path / "1"), approve=approve):
        (reply,) = exchange(paper)
    assert (reply.error.code, reply.error.reason) == (8, "PolicyRefusal")
    paper.archive = paper.archive[:-30]
    with running(Place(paper, 1, tmp_path / "2")):
        (reply,) = exchange(paper)
    assert (reply.error.code, reply.error.reason) == (1, "BundleError")
    paper.close()


def test_a_message_for_another_node_is_refused(app: Path, tmp_path: Path) -> None:
    paper = PaperLink(app, 1)
    place = Place(paper, 1, tmp_path / "node")
    with running(place):
        place.fleet.node_id = 5
        (reply,) = exchange(paper)
    assert (reply.error.code, reply.error.reason) == (8, "WrongNode")
    paper.close()


def test_an_apps_errors_are_counted_and_change_nothing(app: Path, tmp_path: Path) -> None:
    paper = PaperLink(app, 1)
    with running(Place(paper, 1, tmp_path / "node")):
        assert [seen(reply) for reply in exchange(paper)] == [1]
        (reply,) = exchange(paper, "query.fail")
        assert (reply.error.code, reply.error.reason) == (2, "SecretError")
        (reply,) = exchange(paper, "query.forge")
        assert reply.error.code == 7
        assert [seen(reply) for reply in exchange(paper)] == [2]
    paper.close()


def test_a_task_that_takes_too_long_is_an_error_and_the_node_goes_on(
    app: Path, tmp_path: Path, processes: Callable[[], Launcher]
) -> None:
    paper = PaperLink(app, 1)
    config = {"pids": str(tmp_path / "pids")}
    with running(Place(paper, 1, tmp_path / "node", processes), task_seconds=1.5, node_config=config):
        assert [seen(reply) for reply in exchange(paper)] == [1]
        (reply,) = exchange(paper, "query.sleep")
        assert (reply.error.code, reply.error.reason) == (2, "TimeoutError")
        assert [seen(reply) for reply in exchange(paper)] == [2]
    with running(Place(paper, 1, tmp_path / "node", processes), node_config=config):
        (reply,) = exchange(paper, "query.die")
        assert (reply.error.code, reply.error.reason) == (2, "WorkerDied")
        assert [seen(reply) for reply in exchange(paper)] == [3]
    paper.close()


def test_stopping_lets_a_task_finish_or_gives_its_lease_back(
    app: Path, tmp_path: Path, processes: Callable[[], Launcher]
) -> None:
    paper = PaperLink(app, 1)
    place = Place(paper, 1, tmp_path / "node", processes)
    place.start(node_config={"journal": str(tmp_path / "journal"), "seconds": 1.0})
    grid = grid_of(paper)
    ids = grid.push_messages(ask(grid))
    wait_for(tmp_path / "journal")
    place.stop()
    assert grid.wait(ids, 0)
    assert seen(grid.pull_messages(ids)[0]) == 1
    # One that takes longer than the node waits is cut off: not answered, not even with an error.
    (tmp_path / "journal").unlink()
    place.start(node_config={"journal": str(tmp_path / "journal"), "seconds": 60.0})
    place.node.options = NodeOptions(
        drain_seconds=0.2, node_config={"journal": str(tmp_path / "journal"), "seconds": 60.0}
    )
    ids = grid.push_messages(ask(grid))
    wait_for(tmp_path / "journal")
    started = time.monotonic()
    place.stop()
    assert time.monotonic() - started < 5
    assert not grid.wait(ids, 0.1)
    paper.close()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 15
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.exists()


def test_an_ended_run_loses_its_worker_at_once_and_its_state_later(
    app: Path, tmp_path: Path, processes: Callable[[], Launcher], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "privfed")
    paper = PaperLink(app, 1)
    place = Place(paper, 1, tmp_path / "node", processes)
    with running(place):
        exchange(paper)
        place.fleet.over.append(RUN)
        deadline = time.monotonic() + 10
        while list((tmp_path / "work").iterdir()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert list((tmp_path / "work").iterdir()) == []
        assert place.node.store.runs() == []
        assert [seen(reply) for reply in exchange(paper)] == [2], "a resumed run finds its state"
        place.fleet.over.append(RUN)
    with running(place, keep_seconds=-1.0):
        deadline = time.monotonic() + 10
        while "forgot what was kept" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.02)
        (reply,) = exchange(paper)
        assert reply.has_error(), "a run that was forgotten does not live twice"
        assert "StateGone" in reply.error.reason
    paper.close()


def test_an_idle_worker_is_ended_and_started_again(
    app: Path, tmp_path: Path, processes: Callable[[], Launcher]
) -> None:
    paper = PaperLink(app, 1)
    with running(Place(paper, 1, tmp_path / "node", processes), idle_seconds=0.2):
        (first,) = exchange(paper)
        deadline = time.monotonic() + 10
        while list((tmp_path / "work").iterdir()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert list((tmp_path / "work").iterdir()) == []
        (second,) = exchange(paper)
    assert (seen(first), seen(second)) == (1, 2)
    paper.close()


def test_nodes_know_their_place_and_their_own_settings_come_first(tmp_path: Path) -> None:
    client = odd_app.CLIENT.replace(
        '@app.query("print")\ndef say(message, context):',
        '@app.query("print")\ndef say(message, context):\n    return told(message, **context.node_config)',
    )
    paper = PaperLink(odd_app.write(tmp_path / "app", client=client), 3)
    places = [Place(paper, node, tmp_path / str(node)) for node in (1, 2, 3)]
    with running(*places, node_config={"num-partitions": 9, "path": "/data"}):
        replies = exchange(paper, "query.print")
    told = {reply.metadata.src_node_id: dict(reply.content.config_records["told"]) for reply in replies}
    assert told[2] == {"partition-id": 1, "num-partitions": 9, "path": "/data"}
    paper.close()


def test_a_failing_node_mod_sends_nothing_of_the_apps_reply(app: Path, tmp_path: Path) -> None:
    def wrap(call_next: CallNext) -> CallNext:
        def mod(message: Message, context: Context) -> Message:
            call_next(message, context)
            context.mod_state("ledger")["n"] = ConfigRecord({"spent": 1})
            raise PermissionError("epsilon")

        return mod

    paper = PaperLink(app, 1)
    with running(Place(paper, 1, tmp_path / "node"), wrap=wrap):
        (reply,) = exchange(paper)
    assert (reply.error.code, reply.error.reason) == (2, "PermissionError")
    paper.close()
