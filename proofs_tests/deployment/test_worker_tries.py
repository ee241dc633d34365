"""Which ends of a client app's process are the app's failure, and which are no news of it: those are tried again."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from privfed import Context, Message, failpoint
from privfed.runtime import app_process, launcher
from privfed.runtime.confinement import Limits
from privfed.runtime.launcher import MAX_LOSSES, MAX_TRIES, ProcessLauncher, Worker
from proofs_tests.deployment import odd_app
from proofs_tests.deployment.test_launcher import ask

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    """A worker that is warm, and whose processes end at the failpoints in `tmp_path`."""
    monkeypatch.setattr(launcher, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv(failpoint.VARIABLE, str(tmp_path))
    made = ProcessLauncher(tmp_path / "work", Limits(writable=(str(tmp_path),)))
    yield made.client(odd_app.write(tmp_path / "odd"), tmp_path / "log.txt")
    made.close()


@contextmanager
def armed(worker: Worker, path: Path, times: int) -> Iterator[None]:
    """Have the worker's processes end at a failpoint so many times, one after the other."""
    start, left = worker._start, times - 1  # type: ignore[attr-defined]  # each process must find it armed, or not

    def arm_and_start() -> object:
        nonlocal left
        if left and not path.exists():
            path.touch()
            left -= 1
        return start()

    path.touch()
    worker._start = arm_and_start  # type: ignore[attr-defined]  # as above
    yield
    worker._start = start  # type: ignore[attr-defined]  # as above
    assert not left and not path.exists(), "it was struck as often as was asked"


def pid_of(reply: Message) -> int:
    return int(str(reply.content.metric_records["metrics"]["pid"]))


def unread(worker: Worker, context: Context) -> Message:
    """Ask a warm process that does not read, and kill it with the message in its socket."""
    pid = pid_of(worker.execute(ask(), context))
    os.kill(pid, signal.SIGSTOP)
    sent = threading.Event()
    running = worker._running  # type: ignore[attr-defined]  # the moment after the send cannot be seen from outside
    send = running.channel.send

    def told(*values: object) -> None:
        send(*values)
        sent.set()

    running.channel.send = told
    killer = threading.Thread(target=lambda: (sent.wait(60), os.kill(pid, signal.SIGKILL)))
    killer.start()
    try:
        return worker.execute(ask(), context)
    finally:
        killer.join()


def test_processes_that_end_while_they_load_are_replaced_more_often_than_an_app_may_die(
    worker: Worker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with armed(worker, tmp_path / "client-app.before-ready", MAX_TRIES + 1):
        assert worker.execute(ask(), Context(node_id=1)).has_content()
    assert caplog.text.count("killed by SIGKILL") == MAX_TRIES + 1


def test_a_message_that_lay_unread_is_no_death_of_the_app(
    worker: Worker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An idle process is killed, one dies before it takes the message, and two over it: three may."""
    context = Context(node_id=1)
    assert unread(worker, context).has_content()
    assert caplog.text.count("killed by SIGKILL") == 1
    with (
        armed(worker, tmp_path / "client-app.before-taken", 1),
        armed(worker, tmp_path / "client-app.after-taken", MAX_TRIES - 1),
    ):
        reply = worker.execute(ask(), context)
    assert reply.content.metric_records["metrics"]["seen"] == 3, "what the dead did to the state is gone with them"
    assert caplog.text.count("killed by SIGKILL") == 1 + MAX_TRIES


def test_an_app_that_dies_over_every_message_fails_after_so_many_tries(
    worker: Worker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with armed(worker, tmp_path / "client-app.after-taken", MAX_TRIES):
        reply = worker.execute(ask(), Context(node_id=1))
    assert (reply.error.code, reply.error.reason) == (2, "WorkerDied")
    assert caplog.text.count("killed by SIGKILL") == MAX_TRIES
    assert worker.execute(ask(), Context(node_id=1)).has_content()


def test_an_app_whose_processes_never_load_fails_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(launcher, "FIRST_PAUSE", 0.01)
    folder = odd_app.write(tmp_path / "odd", client="import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    made = ProcessLauncher(tmp_path / "work")
    worker = made.client(folder, tmp_path / "log.txt")
    reply = worker.execute(ask(), Context(node_id=1))
    assert (reply.error.code, reply.error.reason) == (2, "WorkerDied")
    assert caplog.text.count("killed by SIGKILL") == MAX_LOSSES
    made.close()


def test_the_time_of_the_task_ends_the_tries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "MAX_LOSSES", 1 << 30)
    folder = odd_app.write(tmp_path / "odd", client="import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    made = ProcessLauncher(tmp_path / "work")
    reply = made.client(folder, tmp_path / "log.txt").execute(ask(), Context(node_id=1), 2.0)
    assert reply.has_error()
    made.close()


def test_a_process_killed_before_it_was_told_its_limits_is_one_that_ended(tmp_path: Path) -> None:
    """Whoever starts it is not in error for that: the channel says that it is gone, and its fate how."""
    spawn = app_process.spawn_local(Limits())
    killed = []

    class Popen(app_process.subprocess.Popen):  # type: ignore[type-arg]  # of bytes
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)  # type: ignore[call-overload]  # as it was called
            self.kill()
            self.wait()
            killed.append(self.pid)

    place = app_process.Place(tmp_path, tmp_path / "log.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app_process.subprocess, "Popen", Popen)
        process = spawn(place)
    assert process.fate() == "killed by SIGKILL"
    with pytest.raises(launcher.ChannelClosed):
        process.channel.receive()
    process.kill()
    assert killed
