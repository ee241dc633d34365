"""Apps in this process and in their own: the same answers, and an app that misbehaves harms nobody but itself."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from privfed import ArrayRecord, ClientApp, ConfigRecord, Context, LocalGrid, Message, RecordDict, RunFailed, failpoint
from privfed.errors import AppError, QuorumError, RunStopped
from privfed.grid import Grid, MemoryRecorder
from privfed.protocols.session import Identity, Policy
from privfed.runtime import grid_host, launcher, remote_grid
from privfed.runtime.confinement import Limits, confine
from privfed.runtime.launcher import MAX_TRIES, InlineLauncher, ProcessLauncher, Worker
from proofs_tests.deployment import odd_app

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return odd_app.write(tmp_path_factory.mktemp("apps") / "odd")


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessLauncher]:
    work = tmp_path_factory.mktemp("work")
    made = ProcessLauncher(work, Limits(writable=(str(work),)))
    yield made
    made.close()


@pytest.fixture(scope="module")
def shared(processes: ProcessLauncher, app: Path, tmp_path_factory: pytest.TempPathFactory) -> Worker:
    return processes.client(app, tmp_path_factory.mktemp("log") / "log.txt")


def ask(kind: str = "train", **config: int) -> Message:
    return Message(RecordDict({"q": ConfigRecord(dict(config))}), 1, kind)


def told(reply: Message) -> dict[str, object]:
    return dict(reply.content.config_records["told"])


def gone(pid: int) -> bool:
    """Wait for a process to be gone, or a zombie that its parent has not read."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


def test_both_ways_give_the_same_answers_and_states(processes: ProcessLauncher, app: Path, tmp_path: Path) -> None:
    states = []
    for way in (InlineLauncher(), processes):
        worker, context = way.client(app, tmp_path / "log.txt"), Context(run_id=5, node_id=1)
        for number in (1, 2, 3):
            reply = worker.execute(ask(), context, 30)
            assert reply.content.array_records["arrays"]["0"].view().tolist() == [number] * 4
            assert reply.metadata.src_node_id == 1
        states.append((context.state, context.mod_states))
        worker.close()
    assert states[0] == states[1]
    assert states[0][0].config_records["n"]["seen"] == 3
    assert list(states[0][1]) == ["own"]


def test_a_worker_is_warm_between_messages(shared: Worker) -> None:
    context = Context(node_id=1)
    pids = {shared.execute(ask(), context).content.metric_records["metrics"]["pid"] for _ in range(3)}
    assert len(pids) == 1
    assert os.getpid() not in pids


def test_only_the_class_of_an_error_leaves_and_the_state_stays(
    processes: ProcessLauncher, app: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log.txt"
    worker, context = processes.client(app, log), Context(node_id=1)
    worker.execute(ask(), context)
    before = context.state
    for kind, name in (("fail", "SecretError"), ("leave", "SystemExit"), ("mute", "TypeError")):
        reply = worker.execute(ask(f"query.{kind}"), context)
        assert (reply.error.code, reply.error.reason) == (2, name)
        assert context.state is before
    assert worker.execute(ask("query.nothing"), context).error.reason == "AppError"
    assert "patient 4711" in log.read_text()
    assert worker.execute(ask(), context).content.metric_records["metrics"]["seen"] == 2
    worker.close()


def test_output_goes_to_the_log(processes: ProcessLauncher, app: Path, tmp_path: Path) -> None:
    worker = processes.client(app, tmp_path / "log.txt")
    assert worker.execute(ask("query.print"), Context(node_id=1)).has_content()
    worker.close()
    assert {"out loud", "and louder"} <= set((tmp_path / "log.txt").read_text().splitlines())


def test_a_dead_worker_is_an_error_and_the_next_message_gets_a_new_one(
    processes: ProcessLauncher, app: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    worker, context = processes.client(app, tmp_path / "log.txt"), Context(node_id=1)
    first = worker.execute(ask(), context).content.metric_records["metrics"]["pid"]
    reply = worker.execute(ask("query.die"), context)
    assert (reply.error.code, reply.error.reason) == (2, "WorkerDied")
    assert caplog.text.count("SIGKILL") == MAX_TRIES
    again = worker.execute(ask(), context).content.metric_records["metrics"]
    assert again["pid"] != first
    assert again["seen"] == 2
    worker.close()


@pytest.mark.parametrize("moment", ["before-ready", "after-reply"])
def test_a_confined_worker_ends_at_a_failpoint_and_its_message_is_answered_once(
    processes: ProcessLauncher,
    app: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    moment: str,
) -> None:
    monkeypatch.setenv(failpoint.VARIABLE, str(tmp_path))
    (tmp_path / f"client-app.{moment}").touch()
    worker, context = processes.client(app, tmp_path / "log.txt"), Context(node_id=1)
    for seen in (1, 2):
        assert worker.execute(ask(), context).content.metric_records["metrics"]["seen"] == seen
    assert not (tmp_path / f"client-app.{moment}").exists()
    assert caplog.text.count("killed by SIGKILL") == 1
    worker.close()


def test_a_slow_app_is_killed_with_all_it_started(app: Path, tmp_path: Path) -> None:
    worker = ProcessLauncher(tmp_path / "work", Limits(writable=(str(tmp_path),))).client(app, tmp_path / "log.txt")
    context = Context(node_id=1, node_config={"pids": str(tmp_path / "pids")})
    assert worker.execute(ask(), Context(node_id=1)).has_content()
    started = time.monotonic()
    reply = worker.execute(ask("query.sleep"), context, 1.0)
    assert (reply.error.code, reply.error.reason) == (2, "TimeoutError")
    assert time.monotonic() - started < 5
    assert all(gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())
    assert worker.execute(ask(), Context(node_id=1)).has_content()
    worker.close()


def test_closing_leaves_no_process_and_no_folder(app: Path, tmp_path: Path) -> None:
    made = ProcessLauncher(tmp_path / "work")
    worker = made.client(app, tmp_path / "log.txt")
    reply = worker.execute(ask("query.look"), Context(node_id=1))
    folder = Path(str(told(reply)["folder"]))
    assert folder.parent == tmp_path / "work"
    assert told(reply)["home"] == str(folder)
    pid = int(str(worker.execute(ask(), Context(node_id=1)).content.metric_records["metrics"]["pid"]))
    made.close()
    worker.close()
    assert gone(pid)
    assert list((tmp_path / "work").iterdir()) == []
    (tmp_path / "work" / "app-stray").mkdir()
    ProcessLauncher(tmp_path / "work").close()
    assert list((tmp_path / "work").iterdir()) == []


def test_an_app_that_cannot_be_imported_is_a_load_error(processes: ProcessLauncher, tmp_path: Path) -> None:
    for at, code in enumerate(["import nothing_there", "app = 5", "raise SystemExit"]):
        folder = odd_app.write(tmp_path / f"broken{at}", client=code)
        expected = ("ModuleNotFoundError", "AppError", "SystemExit")[at]
        worker = processes.client(folder, tmp_path / "log.txt")
        for _ in range(2):
            reply = worker.execute(ask(), Context(node_id=1))
            assert (reply.error.code, reply.error.reason) == (1, expected)
        worker.close()


def test_two_apps_with_a_module_of_one_name_do_not_run_in_one_process(tmp_path: Path) -> None:
    for at, code in enumerate([odd_app.CLIENT, odd_app.CLIENT, odd_app.CLIENT + "# another"]):
        folder = odd_app.write(tmp_path / str(at), client=code, name="twice")
        reply = InlineLauncher().client(folder, tmp_path).execute(ask(), Context(node_id=1))
        assert reply.has_content() == (at < 2)
    assert (reply.error.code, reply.error.reason) == (1, "AppError")


def test_a_node_needs_nothing_that_only_the_server_needs(processes: ProcessLauncher, tmp_path: Path) -> None:
    folder = odd_app.write(tmp_path / "app", server="import nothing_there")
    worker = processes.client(folder, tmp_path / "log.txt")
    assert worker.execute(ask(), Context(node_id=1)).has_content()
    worker.close()


def test_an_app_sees_neither_keys_nor_environment_nor_network(
    app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "keys"
    keys.mkdir()
    (keys / "identity.key").write_bytes(bytes(32))
    monkeypatch.setenv("PRIVFED_HOME", "/secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    limits = Limits(hidden=(str(keys),), files=200, memory=8 << 30)
    made = ProcessLauncher(tmp_path / "work", limits)
    worker = made.client(app, tmp_path / "log.txt")
    with socket.create_server(("127.0.0.1", 0)) as server:
        context = Context(
            node_id=1,
            node_config={"hidden": str(keys), "port": server.getsockname()[1], "parent": os.getpid()},
            mod_states={"own": RecordDict({"c": ConfigRecord({"a": 1})})},
            identify=lambda: Identity(1, bytes(32), {}),
        )
        seen = told(worker.execute(ask("query.look"), context))
    made.close()
    assert not {name for name in str(seen["environment"]).split(",") if "PRIVFED" in name or "AWS" in name}
    assert (seen["core"], seen["files"], seen["memory"], seen["session"]) == (0, 200, 8 << 30, True)
    assert seen["identity"] is False
    assert int(str(seen["descriptors"])) <= 6, "three streams, the channel, and the listing itself"
    if confined():
        assert seen["seen"] in ("PermissionError", "")
        assert seen["network"] != "reached"
        assert seen["traced"] == "PermissionError"


def confined() -> bool:
    """Whether this system gives processes namespaces; where it does not, the log says so (tested below)."""
    pid = os.fork()
    if pid == 0:  # pragma: no cover - another process
        try:
            os._exit(0 if "network: isolated" in confine(Limits()) else 1)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def test_what_cannot_be_had_is_said_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from privfed.runtime import confinement

    monkeypatch.setattr(confinement, "_go_apart", lambda limits: ("no namespaces here", ""))
    monkeypatch.setattr(confinement, "_lower", lambda what, value: None)
    monkeypatch.setattr(confinement.os, "umask", lambda mask: 0)
    text = confine(Limits())
    assert "network: not isolated: no namespaces here" in text
    assert "folders: not hidden: no namespaces here" in text
    assert "network: not isolated: allowed" in confine(Limits(network="on"))
    with pytest.raises(AppError, match="cannot be taken from an app here"):
        confine(Limits(network="off"))


def test_memory_and_packets_are_bounded(app: Path, tmp_path: Path) -> None:
    made = ProcessLauncher(tmp_path / "work", Limits(memory=1 << 30, packet=1 << 20))
    worker = made.client(app, tmp_path / "log.txt")
    assert worker.execute(ask("query.grow"), Context(node_id=1)).error.reason in ("MemoryError", "_ArrayMemoryError")
    assert worker.execute(ask("query.flood"), Context(node_id=1)).error.reason == "WorkerDied"
    assert worker.execute(ask(), Context(node_id=1)).has_content()
    made.close()


def test_processor_time_is_bounded(app: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = ProcessLauncher(tmp_path / "work", Limits(cpu=2))
    worker = made.client(app, tmp_path / "log.txt")
    assert worker.execute(ask("query.spin"), Context(node_id=1), 60).error.reason == "WorkerDied"
    assert "killed by SIG" in caplog.text
    made.close()


def test_limits_are_checked() -> None:
    for wrong in ({"network": "maybe"}, {"files": 0}, {"memory": -1}, {"cpu": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Limits(**wrong)  # type: ignore[arg-type]  # the point
    cap, asked = Limits(memory=10, network="auto", hidden=("/a",)), Limits(cpu=3, files=5, network="on", hidden=("/b",))
    assert cap.within(asked) == Limits(memory=10, cpu=3, files=5, network="auto", hidden=("/a", "/b"))
    assert Limits.from_head(json.loads(json.dumps(asked.to_head()))) == asked


def test_the_policy_of_a_nodes_mask_reaches_the_app(app: Path, tmp_path: Path, processes: ProcessLauncher) -> None:
    client = (
        "from privfed import ClientApp, ConfigRecord, Message, RecordDict\n"
        "app = ClientApp()\n"
        "@app.train()\n"
        "def train(message, context):\n"
        "    return Message(RecordDict({'told': ConfigRecord({'masked': repr(context.masked)})}), reply_to=message)\n"
    )
    worker = processes.client(odd_app.write(tmp_path / "app", client=client), tmp_path / "log.txt")
    for policy in (None, Policy(min_cohort=7, binding=bytes(range(32)), corrupt=0.25)):
        assert told(worker.execute(ask(), Context(node_id=1, masked=policy)))["masked"] == repr(policy)
    worker.close()


def local(worker: Worker, nodes: int = 2) -> Grid:
    return LocalGrid(lambda message, context: worker.execute(message, context, 30), nodes, seed=3)


def serve(way: launcher.Launcher, app: Path, grid: Grid, folder: Path, **config: int | str) -> tuple[object, Context]:
    context = Context(run_id=9, seed=3, run_config={"rounds": 1, **config})
    return way.serve(app, grid, context, folder / "server.txt"), context


def test_a_server_app_does_the_same_both_ways(processes: ProcessLauncher, app: Path, tmp_path: Path) -> None:
    ends = []
    for way in (InlineLauncher(), processes):
        worker = way.client(app, tmp_path / "log.txt")
        grid = local(worker)
        result, context = serve(way, app, grid, tmp_path, rounds=3)
        checkpoint = grid.recorder.restore()
        assert checkpoint is not None
        events = grid.recorder.events if isinstance(grid.recorder, MemoryRecorder) else []
        ends.append((result, context.state, checkpoint, events))
        worker.close()
    assert ends[0] == ends[1]
    assert ends[0][0] == {"rounds": 3, "total": 48.0}
    assert ends[0][2].metrics[2] == {"round": 3, "epsilon": float("inf"), "seen": {"valid": 2}}


def test_a_server_app_goes_on_from_the_last_commit_after_its_process_died(
    processes: ProcessLauncher, app: Path, tmp_path: Path
) -> None:
    worker = processes.client(app, tmp_path / "log.txt")
    grid = local(worker)
    serve(processes, app, grid, tmp_path, rounds=2)
    with pytest.raises(RunFailed, match=r"ended without a result: killed by SIGKILL; see .*server\.txt"):
        serve(processes, app, grid, tmp_path, what="dies")
    assert serve(processes, app, grid, tmp_path, rounds=3)[0] == {"rounds": 3, "total": 48.0}
    worker.close()


def test_how_a_server_app_ends_is_told(processes: ProcessLauncher, app: Path, tmp_path: Path) -> None:
    grid = LocalGrid(ClientApp(), 2)

    def end(what: str) -> object:
        return serve(processes, app, grid, tmp_path, what=what)[0]

    assert end("plain") == [1, 2.5, "x", None, {"inf": float("inf")}]
    assert end("odd") is None
    assert "no plain data" in (tmp_path / "server.txt").read_text()
    with pytest.raises(RunFailed, match=r"^round 2 had no replies$"):
        end("fails")
    with pytest.raises(RunFailed, match="1 valid replies, 3 are needed: of 5 nodes"):
        end("quorum")
    with pytest.raises(RunFailed, match="the ServerApp raised KeyError: 'weights'"):
        end("breaks")
    with pytest.raises(RunFailed, match="the ServerApp raised SystemExit: 3"):
        end("leaves")
    with pytest.raises(RunStopped, match=r"^stopped after round 1, as asked$"):
        end("stops")
    assert issubclass(QuorumError, RunFailed)
    broken = odd_app.write(tmp_path / "broken", server="import nothing_there")
    with pytest.raises(RunFailed, match="nothing_there"):
        serve(processes, broken, grid, tmp_path)


def test_a_stop_that_was_asked_for_ends_the_run_after_its_commit(
    processes: ProcessLauncher, app: Path, tmp_path: Path
) -> None:
    class Stopping(MemoryRecorder):
        def commit(self, checkpoint: object) -> None:
            super().commit(checkpoint)  # type: ignore[arg-type]  # a Checkpoint
            raise RunStopped("stopped after round 1, as asked")

    worker = processes.client(app, tmp_path / "log.txt")
    grid = LocalGrid(lambda message, context: worker.execute(message, context), 1, recorder=Stopping())
    with pytest.raises(RunStopped, match="stopped after round 1, as asked"):
        serve(processes, app, grid, tmp_path, rounds=3)
    found = grid.recorder.restore()
    assert found is not None
    assert found.round == 1
    worker.close()


class Silent(LocalGrid):
    """Nobody answers; refuses a message that comes twice."""

    def push_messages(self, messages: object) -> list[str]:
        ids = [one.metadata.message_id for one in messages]  # type: ignore[attr-defined]  # messages
        if len(set(ids)) < len(ids):
            raise ValueError("pushed twice")
        return ids

    def wait(self, message_ids: object, timeout: float | None) -> bool:
        time.sleep(min(timeout or 0, 5))
        return False


def test_waiting_ends_in_time_and_errors_keep_their_class(
    processes: ProcessLauncher, app: Path, tmp_path: Path
) -> None:
    grid = Silent(ClientApp(), 2)
    assert serve(processes, app, grid, tmp_path, what="waits")[0] == [False, True]
    assert serve(processes, app, grid, tmp_path, what="misuses")[0] == ["ValueError", "pushed twice"]


def test_a_server_app_is_told_its_run_and_no_secrets(
    processes: ProcessLauncher, app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRIVFED_TOKEN", "secret")
    recorder = MemoryRecorder(insecure_test_randomness=11)
    recorder.ledger_path = tmp_path / "ledger.jsonl"
    grid = LocalGrid(ClientApp(), 3, recorder=recorder, seed=1 << 70)
    grid.run_id = (1 << 64) - 1
    found = serve(processes, app, grid, tmp_path, what="facts")[0]
    assert isinstance(found, list)
    assert found[:6] == [(1 << 64) - 1, 1 << 70, 3, str(recorder.ledger_path), 11, [1, 2, 3]]
    assert "PRIVFED_TOKEN" not in found[6]


def test_large_rounds_travel_in_several_packets(
    processes: ProcessLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many replies, more than one packet holds; each arrives once."""
    monkeypatch.setattr(grid_host, "PULL_BYTES", 100)
    monkeypatch.setattr(remote_grid, "PUSH_BYTES", 100)
    seen: list[int] = []

    def client(message: Message, context: Context) -> Message:
        seen.append(context.node_id)
        return Message(RecordDict({"arrays": ArrayRecord([np.full(4, 1, np.float32)])}), reply_to=message)

    folder = odd_app.write(tmp_path / "app")
    grid = LocalGrid(client, 40)
    assert serve(processes, folder, grid, tmp_path)[0] == {"rounds": 1, "total": 160.0}
    assert sorted(seen) == list(range(1, 41))
