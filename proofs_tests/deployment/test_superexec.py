"""A superexec and its node: who may connect, what is started, and what happens when either goes."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from privfed import ConfigRecord, Context, Message, RecordDict
from privfed.runtime import superexec
from privfed.runtime.app_process import NobodyLaunches, Place
from privfed.runtime.confinement import Limits
from privfed.runtime.launcher import ProcessLauncher
from privfed.runtime.superexec import ExecAbsent, ExecError, ExecHost, SuperExec
from proofs_tests.deployment import odd_app
from proofs_tests.deployment.node_process import alive
from proofs_tests.deployment.waiting import eventually


class Pair:
    """The node's side, and a superexec in a thread."""

    def __init__(self, folder: Path, limits: Limits | None = None, cap: Limits | None = None) -> None:
        limits = limits or Limits(writable=(str(folder),))
        self.host = ExecHost(folder / "exec.sock", limits)
        given = self.host.spawn, self.host.prepare, self.host.close, self.host.waits_for
        self.launcher = ProcessLauncher(folder / "work", limits, *given)
        self.cap = cap
        self.faults: list[str] = []
        self.connect()

    def connect(self) -> None:
        self.superexec = SuperExec(self.host.path, self.host.token_file.read_text(), self.cap)
        threading.Thread(target=self._run, args=(self.superexec,), daemon=True).start()

    def _run(self, one: SuperExec) -> None:
        try:
            one.run()
        except ExecError as fault:
            self.faults.append(str(fault))


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path)
    yield made
    made.launcher.close()
    eventually(lambda: made.faults)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return odd_app.write(tmp_path_factory.mktemp("apps") / "odd")


def ask(kind: str = "train") -> Message:
    return Message(RecordDict({"q": ConfigRecord({"n": 1})}), 1, kind)


def pid_of(reply: Message) -> int:
    return int(str(reply.content.metric_records["metrics"]["pid"]))


def test_a_worker_of_a_superexec_answers_dies_and_comes_again(
    pair: Pair, app: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    worker, context = pair.launcher.client(app, tmp_path / "log.txt"), Context(node_id=1)
    first = worker.execute(ask(), context)
    assert worker.execute(ask("query.print"), context).has_content()
    assert "out loud" in (tmp_path / "log.txt").read_text()
    assert worker.execute(ask("query.die"), context).error.reason == "WorkerDied"
    assert "killed by SIGKILL" in caplog.text, "how it ended is known, though it is nobody's child here"
    again = worker.execute(ask(), context)
    assert pid_of(again) != pid_of(first)
    assert again.content.metric_records["metrics"]["seen"] == 2
    worker.close()
    assert not alive(pid_of(again)) or eventually(lambda: not alive(pid_of(again))) is None


def test_a_slow_app_is_killed_through_the_superexec(pair: Pair, app: Path, tmp_path: Path) -> None:
    worker = pair.launcher.client(app, tmp_path / "log.txt")
    context = Context(node_id=1, node_config={"pids": str(tmp_path / "pids")})
    assert worker.execute(ask(), Context(node_id=1)).has_content()
    assert worker.execute(ask("query.sleep"), context, 1.0).error.reason == "TimeoutError"
    for pid in (tmp_path / "pids").read_text().split():
        eventually(lambda pid=pid: not alive(int(pid)), 10)
    worker.close()


def test_a_launch_that_a_superexec_did_not_live_to_finish_is_asked_of_the_next(
    pair: Pair, app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = superexec.start_process

    def dies(*given: object) -> object:
        monkeypatch.setattr(superexec, "start_process", real)
        pair.superexec.close()
        threading.Timer(0.3, pair.connect).start()
        raise OSError("killed")

    monkeypatch.setattr(superexec, "start_process", dies)
    worker = pair.launcher.client(app, tmp_path / "log.txt")
    assert worker.execute(ask(), Context(node_id=1)).content.metric_records["metrics"]["seen"] == 1
    worker.close()


def test_workers_end_with_their_superexec_and_the_next_one_goes_on(
    pair: Pair, app: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "privfed.exec")
    worker, context = pair.launcher.client(app, tmp_path / "log.txt"), Context(node_id=1)
    pid = pid_of(worker.execute(ask(), context))
    pair.superexec.close()
    eventually(lambda: not alive(pid) and pair.faults, 10)
    eventually(lambda: "the superexec is gone" in caplog.text, 10)
    pair.connect()
    assert worker.execute(ask(), context).content.metric_records["metrics"]["seen"] == 2


@pytest.mark.parametrize(
    "hello",
    [
        json.dumps({"token": "x" * 64, "version": superexec.VERSION}),
        json.dumps({"version": superexec.VERSION}),
        json.dumps(["token"]),
        "\x00\xff",
        json.dumps({"token": "\ud800", "version": superexec.VERSION}),
        "[" * 60_000,
        '{"token": ' + "[" * 60_000,
    ],
)
def test_who_does_not_know_the_token_is_turned_away(pair: Pair, hello: str) -> None:
    eventually(lambda: pair.host._ready)
    before = pair.host._connection
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.settimeout(10)
        stranger.connect(str(pair.host.path))
        stranger.send(hello.encode())
        answer = stranger.recv(1 << 16)
        assert not answer or json.loads(answer)["ok"] is False
    assert pair.host._connection is before
    pair.superexec.close()
    eventually(lambda: not pair.host._ready)
    pair.connect()
    eventually(lambda: pair.host._ready)  # whoever came before, the one who knows the token is let in


def test_those_who_say_nothing_and_a_second_superexec_keep_nobody_out(pair: Pair) -> None:
    eventually(lambda: pair.host._ready)
    silent = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(40)]
    for one in silent:
        one.connect(str(pair.host.path))
    with pytest.raises(ExecError, match="another superexec is connected"):
        SuperExec(pair.host.path, pair.host._token).run()
    pair.superexec.close()
    eventually(lambda: not pair.host._ready)
    pair.connect()
    eventually(lambda: pair.host._ready)
    for one in silent:
        one.close()


def test_a_superexec_of_another_version_is_told_so(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.superexec.close()
    eventually(lambda: pair.faults)
    with pytest.raises(ExecError, match="turns this superexec away: wrong token"):
        SuperExec(pair.host.path, "wrong").run()
    token = pair.host.token_file.read_text()
    monkeypatch.setattr(
        superexec, "_say", lambda one, told, fds=(): one.send(json.dumps({**told, "version": 9}).encode())
    )
    with pytest.raises(ExecError, match="or not version 1"):
        SuperExec(pair.host.path, token).run()


def test_the_socket_and_the_token_are_their_owners_alone(pair: Pair) -> None:
    assert pair.host.path.stat().st_mode & 0o777 == 0o600
    assert pair.host.token_file.stat().st_mode & 0o777 == 0o600
    assert len(pair.host.token_file.read_text()) == 64


def test_a_task_waits_for_a_superexec_until_its_time_is_over_or_nobody_wants_it(
    app: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    host = ExecHost(tmp_path / "exec.sock", Limits())
    launcher = ProcessLauncher(tmp_path / "work", None, host.spawn, host.prepare, host.close, host.waits_for)
    worker = launcher.client(app, tmp_path / "log.txt")
    reply = worker.execute(ask(), Context(node_id=1), 0.2)
    assert (reply.error.code, reply.error.reason) == (1, "NobodyLaunches")
    waits = f"the task waits for a superexec: none is connected to {host.path}"
    assert caplog.messages.count(waits) == 1, "said, and said once"
    assert any("the time of the task is over" in text for text in caplog.messages)
    asked = iter([True, True, False])
    with pytest.raises(NobodyLaunches, match="no answer is waited for any more"):
        worker.execute(ask(), Context(node_id=1), 600.0, lambda: next(asked))
    with pytest.raises(ExecAbsent):  # whoever asks for a process does not wait: it could not be told to end
        host.spawn(Place(tmp_path, tmp_path / "log.txt"))
    launcher.close()
    assert not host.path.exists()
    assert not host.token_file.exists()
    assert list((tmp_path / "work").iterdir()) == []


def test_a_task_goes_on_when_its_superexec_is_back(pair: Pair, app: Path, tmp_path: Path) -> None:
    eventually(lambda: pair.host._ready)
    pair.superexec.close()
    eventually(lambda: not pair.host._ready)
    looks: list[None] = []

    def wanted() -> bool:
        looks.append(None)
        if len(looks) == 2:
            pair.connect()
        return True

    worker = pair.launcher.client(app, tmp_path / "log.txt")
    assert worker.execute(ask(), Context(node_id=1), 60.0, wanted).has_content()
    assert len(looks) >= 2
    worker.close()


def test_how_workers_ended_is_not_awaited_of_a_superexec_that_is_gone(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(superexec, "EXIT_SECONDS", 1e6)
    eventually(lambda: pair.host._ready)
    (tmp_path / "work" / "one").mkdir()
    worker = pair.host.spawn(Place(tmp_path / "work" / "one", tmp_path / "log.txt"))
    pair.superexec.close()
    assert worker.fate() in ("it closed its channel", "killed by SIGKILL")
    assert pair.host.waits_for(), "and then nobody asks the one that is gone for another one"
    worker.kill()


def test_a_worker_that_ends_while_its_node_takes_its_folder_away_is_told_of_all_the_same(
    pair: Pair, tmp_path: Path
) -> None:
    eventually(lambda: pair.host._ready)
    home = tmp_path / "work" / "one"
    home.mkdir()
    worker = pair.host.spawn(Place(home, tmp_path / "log.txt"))
    shutil.rmtree(home)
    worker.kill()
    assert worker.ended.wait(60)
    assert not pair.superexec._processes


def test_a_superexec_caps_what_a_node_asks_for(app: Path, tmp_path: Path) -> None:
    pair = Pair(tmp_path, Limits(files=500, network="on"), Limits(files=123, network="auto", memory=6 << 30))
    worker = pair.launcher.client(app, tmp_path / "log.txt")
    with socket.create_server(("127.0.0.1", 0)) as server:
        context = Context(node_id=1, node_config={"port": server.getsockname()[1]})
        seen = worker.execute(ask("query.look"), context).content.config_records["told"]
    assert (seen["files"], seen["memory"]) == (123, 6 << 30)
    pair.launcher.close()


def test_a_launch_that_fails_is_told_with_its_cause(pair: Pair, tmp_path: Path) -> None:
    eventually(lambda: pair.host._ready)
    with pytest.raises(ExecError, match="did not start a process: FileNotFoundError"):
        pair.host.spawn(Place(tmp_path / "nowhere", tmp_path / "log.txt"))
    assert list((tmp_path / "work").iterdir()) == []


def test_strangers_do_not_fill_the_log(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever they take turns in saying."""
    for number in range(60):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.settimeout(20)
            stranger.connect(str(pair.host.path))
            stranger.send(b"{" if number % 2 else json.dumps({"token": "x", "version": 1}).encode())
            while stranger.recv(1 << 16):  # what it is told, until it is hung up on
                pass
    assert 2 <= caplog.text.count("turned away") <= superexec.MAX_REASONS
