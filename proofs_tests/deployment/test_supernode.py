"""A node against a SuperLink on paper: nothing lost, nothing twice, nothing of the node's in an app's hands."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from privfed import ConfigRecord, Context, Message, RecordDict, failpoint, run_simulation
from privfed.apps import CallNext
from privfed.cli.node_mod import node_wrap
from privfed.context import shared_settings
from privfed.runtime import node_blob
from privfed.runtime.app_folder import AppFolder
from privfed.runtime.confinement import Limits
from privfed.runtime.identity import SimulatedIdentities
from privfed.runtime.launcher import InlineLauncher, Launcher, ProcessLauncher
from privfed.runtime.link import LinkGrid
from privfed.runtime.node_store import NodeStore
from privfed.runtime.policy import NodePolicy, PolicyRefusal, SecureAggregation
from privfed.runtime.supernode import NodeOptions, SuperNode
from proofs_tests.deployment import odd_app
from proofs_tests.deployment.paper_fleet import RUN, PaperFleet, PaperLink

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
STEPS = ("before-begin", "before-commit", "after-commit", "before-send", "after-send", "after-settle")


class Killed(BaseException):
    """Ends the thread of a run at a failpoint, as SIGKILL would, with nothing tidied up."""


class Place:
    """One node on the disk, whose process may come and go."""

    def __init__(
        self, paper: PaperLink, node_id: int, folder: Path, way: Callable[[], Launcher] = InlineLauncher
    ) -> None:
        self.paper, self.node_id, self.folder, self.way = paper, node_id, folder, way
        self.fleet = PaperFleet(paper, node_id)

    def start(self, **options: object) -> SuperNode:
        self.fleet = PaperFleet(self.paper, self.node_id)
        store = NodeStore(self.folder / "state")
        self.node = SuperNode(self.fleet, store, self.way(), self.folder, NodeOptions(drain_seconds=5, **options))  # type: ignore[arg-type]  # a test's
        self.thread = threading.Thread(target=self.node.run, daemon=True)
        self.thread.start()
        return self.node

    def stop(self) -> None:
        self.node.stop()
        self.thread.join(20)
        assert not self.thread.is_alive()
        self.node.store.close()


@contextlib.contextmanager
def running(*places: Place, **options: object) -> Iterator[None]:
    for place in places:
        place.start(**options)
    try:
        yield
    finally:
        for place in places:
            place.stop()


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return odd_app.write(tmp_path_factory.mktemp("apps") / "odd")


@pytest.fixture
def processes(tmp_path: Path) -> Callable[[], Launcher]:
    return lambda: ProcessLauncher(tmp_path / "work", Limits(writable=(str(tmp_path),)))


def grid_of(paper: PaperLink) -> LinkGrid:
    grant = paper.grant
    shared = shared_settings(grant.run_config, grant.seed, grant.bundle, grant.nodes)
    return LinkGrid(paper.link, RUN, seed=grant.seed, shared=shared)


def ask(grid: LinkGrid, kind: str = "train") -> list[Message]:
    return [Message(RecordDict({"q": ConfigRecord({"n": 1})}), node, kind) for node in grid.get_node_ids()]


def exchange(paper: PaperLink, kind: str = "train", timeout: float = 20) -> list[Message]:
    grid = grid_of(paper)
    return grid.send_and_receive(ask(grid, kind), timeout=timeout)


def seen(reply: Message) -> int:
    return int(str(reply.content.metric_records["metrics"]["seen"]))


@pytest.mark.parametrize("isolation", ["inline", "subprocess"])
def test_an_example_gives_the_bits_of_the_simulation(
    isolation: str, tmp_path: Path, processes: Callable[[], Launcher]
) -> None:
    folder = AppFolder.open(EXAMPLES / "minimal")
    way: Callable[[], Launcher] = InlineLauncher if isolation == "inline" else processes
    config = {"num-rounds": 4}
    paper = PaperLink(folder.path, 2, config)  # type: ignore[arg-type]  # a UserConfig
    grid = grid_of(paper)
    with running(*(Place(paper, node, tmp_path / str(node), way) for node in (1, 2))):
        way().serve(folder.path, grid, Context(run_config=dict(config), seed=1), tmp_path / "server.txt")
    expected = run_simulation(*folder.load(), 2, run_config=config, seed=1)
    found = grid.recorder.restore()
    assert found is not None
    assert found.arrays == expected.arrays
    if isolation == "subprocess":
        assert "weight" in (tmp_path / "server.txt").read_text()
    paper.close()


def test_apps_mask_in_the_node_and_run_unchanged(tmp_path: Path, processes: Callable[[], Launcher]) -> None:
    """The app lists secure_aggregation itself; the node does it, and what it keeps is not in the app's process."""
    paper = PaperLink(EXAMPLES / "quickstart", 3, {})
    config = {**AppFolder.open(EXAMPLES / "quickstart").config, "num-rounds": 2, "local-steps": 2, "baselines": False}
    paper.grant = type(paper.grant)(RUN, "paper", paper.grant.bundle, config, 1, paper.grant.nodes)
    grid = grid_of(paper)
    places = [Place(paper, node, tmp_path / str(node), processes) for node in (1, 2, 3)]
    with running(*places, wrap=node_wrap(None)):
        processes().serve(EXAMPLES / "quickstart", grid, Context(run_config=config, seed=1), tmp_path / "server.txt")
    found = grid.recorder.restore()
    assert found is not None
    assert found.round == 2
    assert np.abs(found.arrays["0"].view()).max() > 0
    store = NodeStore(tmp_path / "1" / "state")
    with store._lock, store._blobs.transaction() as database:
        app, mods = database.execute("SELECT app, mods FROM nodes").fetchone()
        assert "secure_aggregation" in "".join(store._blobs.records(mods))
        assert app is None, "the app of this example keeps nothing, and the node's mod keeps nothing there"
    store.close()
    paper.close()


def test_active_secure_aggregation_gives_the_bits_of_the_simulation_and_the_app_no_key(
    tmp_path: Path, processes: Callable[[], Launcher]
) -> None:
    app = odd_app.write(tmp_path / "app", client=odd_app.ACTIVE_CLIENT, server=odd_app.ACTIVE_SERVER)
    config = {"rounds": 2}
    paper = PaperLink(app, 3, config)  # type: ignore[arg-type]  # a UserConfig
    grid = grid_of(paper)
    places = [Place(paper, node, tmp_path / str(node), processes) for node in (1, 2, 3)]
    identify = SimulatedIdentities((1, 2, 3))
    with running(*places, wrap=node_wrap(None), identity=identify, node_config={"apart": True}):
        processes().serve(app, grid, Context(run_config=dict(config), seed=1), tmp_path / "server.txt")
    expected = run_simulation(*AppFolder.open(app).load(), 3, run_config=config, seed=1)
    found = grid.recorder.restore()
    assert found is not None
    assert found.arrays == expected.arrays
    assert np.abs(found.arrays["0"].view()).max() > 0
    paper.close()


def test_a_node_that_is_given_other_settings_than_the_rest_gives_nothing(tmp_path: Path) -> None:
    """A run configuration of its own would make one node stand out in the sum; so would another app or seed."""
    app = odd_app.write(tmp_path / "app", client=odd_app.ACTIVE_CLIENT, server=odd_app.ACTIVE_SERVER)
    config = {"rounds": 1}
    paper = PaperLink(app, 4, config)  # type: ignore[arg-type]  # a UserConfig
    grid = grid_of(paper)
    places = [Place(paper, node, tmp_path / str(node)) for node in (1, 2, 3, 4)]
    identify = SimulatedIdentities((1, 2, 3, 4))
    with running(*places, wrap=node_wrap(None), identity=identify):
        places[3].fleet.run = lambda run_id: replace(paper.grant, run_config={"rounds": 1, "local-epochs": 9})  # type: ignore[method-assign]
        InlineLauncher().serve(app, grid, Context(run_config=dict(config), seed=1), tmp_path / "server.txt")
    found = grid.recorder.restore()
    assert found is not None
    told = found.metrics[0]["train-replies"]
    assert told["valid"] == 3
    assert [(one["node"], one["cause"]) for one in told["excluded"]] == [
        (4, "stage mask: POLICY_REFUSED BindingMismatch")
    ]
    paper.close()


def test_a_node_whose_policy_is_weaker_than_the_apps_mod_says_so(tmp_path: Path) -> None:
    client = odd_app.CLIENT.replace(
        "app = ClientApp()",
        "from privfed.mods import secure_aggregation\nfrom privfed.protocols.session import Policy\n"
        "app = ClientApp(mods=[secure_aggregation(Policy(min_cohort=5))])",
    )
    paper = PaperLink(odd_app.write(tmp_path / "app", client=client), 1)
    with running(Place(paper, 1, tmp_path / "1"), wrap=node_wrap(None)):
        (reply,) = exchange(paper)
    assert (reply.error.code, reply.error.reason) == (8, "SecureAggregationRequired"), "the app's mod still refuses"
    policy = NodePolicy(secure_aggregation=SecureAggregation(required=True))
    with running(Place(paper, 1, tmp_path / "2"), wrap=node_wrap(policy)):
        (reply,) = exchange(paper)
    assert (reply.error.code, reply.error.reason) == (8, "SecureAggregationRequired"), "the node's does before it"
    paper.close()


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
        full.clear()
        assert grid.wait(ids, 10)
        assert seen(grid.pull_messages(ids)[0]) == 1
        assert [seen(reply) for reply in exchange(paper)] == [2]
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
