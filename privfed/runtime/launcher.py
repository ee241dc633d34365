"""How the code of apps is run: one seam for a thread of this process, a child process, and a superexec elsewhere.

inline       in this process: for tests, and where the node's owner and the app's author are one
subprocess   a child that is confined, restarted when it dies, and killed when it takes too long
external     the same process, started by a `privfed superexec` that another user or container runs
"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from privfed.apps import CallNext
from privfed.context import Context
from privfed.errors import AppError, PrivfedError, RunFailed
from privfed.grid import Grid
from privfed.message import Error, ErrorCode, Message
from privfed.runtime.app_folder import AppFolder
from privfed.runtime.app_process import AppProcess, LaunchLost, NobodyLaunches, Place, Spawn, spawn_local
from privfed.runtime.capsule import pack_context, take_state
from privfed.runtime.channel import Channel, ChannelClosed, ChannelError, Packet
from privfed.runtime.confinement import Limits
from privfed.runtime.disk import disk_fault
from privfed.runtime.grid_host import GridHost

ISOLATIONS = ("inline", "subprocess", "external")
START_SECONDS = 120.0
LOOK_SECONDS = 0.1
"""Between two looks at whether there is somebody to start a process."""
MAX_TRIES = 3
"""Processes of a client app that may die over one message they had taken before that is told as the app's failure."""
MAX_LOSSES = 10
"""Processes that may end before they had taken the message: while they start or load the app, or while they were idle.
That is seldom the app's doing, so there are more of them, with pauses."""
FIRST_PAUSE, MAX_PAUSE = 0.1, 2.0
"""Seconds between the second such process and the third, which double; the first is replaced at once."""
logger = logging.getLogger("privfed.launcher")


Wanted = Callable[[], bool]
"""Says whether an answer is still waited for."""


class WorkerDied(PrivfedError):
    """An app's process ended while it was at work."""


class Worker(Protocol):
    """A client app that is loaded, for one run on one node."""

    def execute(
        self, message: Message, context: Context, timeout: float | None = None, wanted: Wanted = lambda: True
    ) -> Message:
        """Run the app; on success the context holds its new state. Seconds of `timeout` end an app's process.

        Raises nothing for what an app does: its failure, its death and its delay are errors in the reply. Raises
        OSError when the disk refuses what its process needs; NobodyLaunches when it is not `wanted` any more while it
        waits for whoever starts processes. That wait ends with `timeout`, as an error in the reply.
        """
        ...

    def close(self) -> None:
        """End it."""
        ...


class Launcher(Protocol):
    """Runs the two sides of an app from its folder."""

    def client(self, app_dir: Path, log: Path) -> Worker:
        """Return a worker of the client app. log: the file its output goes to. The app loads when it is first used."""
        ...

    def serve(self, app_dir: Path, grid: Grid, context: Context, log: Path) -> object:
        """Run the server app to its end and return its result, the context then holds its state.

        Raises RunFailed with the reason; RunStopped when the run was asked to stop; LaunchLost or NobodyLaunches
        when it was not started.
        """
        ...

    def waits_for(self) -> str:
        """Say what must be there before an app can be started, and is not; nothing when all is."""
        ...

    def close(self) -> None:
        """End what still runs."""
        ...


class InlineLauncher:
    """Runs apps in this process: no confinement, no timeouts, and output goes where this process's goes."""

    def client(self, app_dir: Path, log: Path) -> Worker:
        del log
        return _InlineWorker(app_dir)

    def serve(self, app_dir: Path, grid: Grid, context: Context, log: Path) -> object:
        del log
        return AppFolder.open(app_dir).load_server()(grid, context)

    def waits_for(self) -> str:
        return ""

    def close(self) -> None: ...


class _InlineWorker:
    def __init__(self, app_dir: Path) -> None:
        self._folder = app_dir
        self._app: CallNext | None = None

    def execute(
        self, message: Message, context: Context, timeout: float | None = None, wanted: Wanted = lambda: True
    ) -> Message:
        del timeout, wanted
        try:
            if self._app is None:
                self._app = AppFolder.open(self._folder).load_client()
        except AppError as fault:
            logger.error("%s cannot be loaded: %s", self._folder, fault)
            return _refusal(message, ErrorCode.LOAD_CLIENT_APP_EXCEPTION, type(fault.__cause__ or fault).__name__)
        return self._app(message, context)

    def close(self) -> None: ...


class ProcessLauncher:
    """Runs apps in processes of their own.

    homes: a folder for their own folders. spawn: starts one; None: as a child of this process. prepare: called with
    each app's folder before its process starts. closing: called last. waiting: says what `spawn` would wait for.
    """

    def __init__(
        self,
        homes: Path,
        limits: Limits | None = None,
        spawn: Spawn | None = None,
        prepare: Callable[[Path], None] = lambda folder: None,
        closing: Callable[[], None] = lambda: None,
        waiting: Callable[[], str] = lambda: "",
    ) -> None:
        self._homes = homes
        homes.mkdir(mode=0o700, parents=True, exist_ok=True)
        for stray in homes.glob("app-*"):  # left by a crash
            shutil.rmtree(stray, ignore_errors=True)
        self._spawn = spawn if spawn is not None else spawn_local(limits or Limits())
        self._prepare = prepare
        self._closing = closing
        self._waiting = waiting
        self._open: set[AppProcess] = set()
        self._closed = False
        self._lock = threading.Lock()

    def client(self, app_dir: Path, log: Path) -> Worker:
        head = {"role": "client", "app": str(app_dir.resolve())}
        return _ProcessWorker(lambda: self._start(head, log), self._waiting)

    def serve(self, app_dir: Path, grid: Grid, context: Context, log: Path) -> object:
        process: _Running | None = None
        try:
            head = {"role": "server", "app": str(app_dir.resolve())}
            process = self._start(head, log, lambda channel: GridHost(channel, grid, context), context)
            assert process.host is not None
            return process.host.serve()
        except ChannelError as fault:
            fate = process.fate() if process is not None else str(fault)
            raise RunFailed(f"the process of the ServerApp ended without a result: {fate}; see {log}") from None
        finally:
            if process is not None:
                process.kill()
                if process.host is not None:
                    process.host.settle()

    def _start(
        self,
        head: dict[str, Any],
        log: Path,
        host: Callable[[Channel], GridHost] | None = None,
        context: Context | None = None,
    ) -> _Running:
        self._prepare(Path(head["app"]))
        home = Path(tempfile.mkdtemp(prefix="app-", dir=self._homes))
        try:
            # A server app keeps its ledger and the journals of its sessions in the folder of its run.
            writable = (log.parent,) if host is not None else ()
            process = self._spawn(Place(home, log, (Path(head["app"]),), writable))
        except BaseException:
            shutil.rmtree(home, ignore_errors=True)
            raise
        running = _Running(process, home, self._forget, host)
        with self._lock:
            self._open.add(process)
            closed = self._closed
        try:
            if closed:
                raise AppError("no process is started any more: this launcher was closed")
            told = running.host.head() if running.host is not None else {}
            process.channel.send(pack_context({**head, **told, "op": "start"}, context or Context()))
            answer = running.receive(START_SECONDS)
            if answer.head.get("op") != "confined":
                raise AppError(f"the app's process did not start: {answer.head.get('text')}")
            logger.info("process %s for %s: %s", answer.head.get("process"), head["app"], answer.head.get("text"))
        except BaseException:
            running.kill()
            raise
        return running

    def waits_for(self) -> str:
        return self._waiting()

    def _forget(self, process: AppProcess) -> None:
        with self._lock:
            self._open.discard(process)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            still = list(self._open)
        for process in still:
            process.kill()
        self._closing()


class _Running:
    """An app's process, its own folder, and its Grid if it is a server app."""

    def __init__(
        self,
        process: AppProcess,
        home: Path,
        ended: Callable[[AppProcess], None],
        host: Callable[[Channel], GridHost] | None = None,
    ) -> None:
        self.channel = process.channel
        self.fate = process.fate
        self.host = host(process.channel) if host is not None else None
        self._process, self._home, self._ended = process, home, ended

    def receive(self, timeout: float | None) -> Packet:
        """Wait for a packet. Raises TimeoutError after so many seconds, and then the process is dead."""
        late = threading.Event()

        def end() -> None:
            late.set()
            self._process.kill()

        clock = threading.Timer(timeout, end) if timeout is not None else None
        if clock is not None:
            clock.daemon = True
            clock.start()
        try:
            return self.channel.receive()
        except ChannelError:
            if late.is_set():
                raise TimeoutError(f"no answer within {timeout:g} s") from None
            raise
        finally:
            if clock is not None:
                clock.cancel()

    def kill(self) -> None:
        """End the process and remove its folder."""
        self._process.kill()
        self._ended(self._process)
        shutil.rmtree(self._home, ignore_errors=True)


class _ProcessWorker:
    """A client app's process; started when first needed and again after it died. waiting: what that would wait for."""

    def __init__(self, start: Callable[[], _Running], waiting: Callable[[], str]) -> None:
        self._start = start
        self._waiting = waiting
        self._running: _Running | None = None
        self._taken = False

    def execute(
        self, message: Message, context: Context, timeout: float | None = None, wanted: Wanted = lambda: True
    ) -> Message:
        """Run the app. What a process that died was asked is asked of another one: nothing of it has left the node."""
        ends = math.inf if timeout is None else time.monotonic() + timeout
        deaths = losses = 0
        while deaths < MAX_TRIES and losses < MAX_LOSSES:
            if losses > 1:
                time.sleep(max(0.0, min(FIRST_PAUSE * 2 ** (losses - 2), MAX_PAUSE, ends - time.monotonic())))
            if self._running is None and not self._await_launcher(ends, wanted):
                return _refusal(message, ErrorCode.LOAD_CLIENT_APP_EXCEPTION, NobodyLaunches.__name__)
            self._taken = False
            reply = self._try(message, context, ends)
            if reply is not None:
                return reply
            deaths, losses = deaths + self._taken, losses + (not self._taken)
        return _refusal(message, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, WorkerDied.__name__)

    def _await_launcher(self, ends: float, wanted: Wanted) -> bool:
        """Wait for whoever starts processes, and say so; return whether there is somebody. Raises NobodyLaunches."""
        told = ""
        while reason := self._waiting():
            if time.monotonic() >= ends:
                logger.error("the time of the task is over, and it still waits for %s", reason)
                return False
            if not wanted():
                raise NobodyLaunches(f"no answer is waited for any more: it waited for {reason}")
            if reason != told:
                told = reason
                logger.warning("the task waits for %s", reason)
            time.sleep(LOOK_SECONDS)
        if told:
            logger.info("the task goes on")
        return True

    def _try(self, message: Message, context: Context, ends: float) -> Message | None:
        """Return the answer of the app's process, started if there is none; None when it ended, `_taken` or not."""
        try:
            if self._running is None:
                self._running = self._start()
                ready = self._running.receive(START_SECONDS if ends == math.inf else _left(ends))
                if ready.head.get("op") != "ready":
                    self.close()
                    return _refusal(message, ErrorCode.LOAD_CLIENT_APP_EXCEPTION, ready.head.get("kind"))
            self._running.channel.send(pack_context({"op": "execute", "tell-taken": True}, context, message))
            packet = self._running.receive(_left(ends))
            # That it could be sent says nothing: it may lie unread in the socket of a process that is gone.
            if packet.head.get("op") == "taken":
                self._taken = True
                packet = self._running.receive(_left(ends))
            return self._reply(message, context, packet)
        except TimeoutError:
            logger.error("the app did not answer message %s within its time", message.metadata.message_id)
            self.close()
            return _refusal(message, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "TimeoutError")
        except (PrivfedError, OSError) as fault:
            if self._running is None:
                if disk_fault(fault):
                    raise
                logger.error("the app's process was not started: %s", fault)
                if isinstance(fault, ChannelClosed | LaunchLost | NobodyLaunches):
                    return None
                return _refusal(message, ErrorCode.LOAD_CLIENT_APP_EXCEPTION, type(fault).__name__)
            fate = self._running.fate()
            logger.error("the app's process failed: %s (%s)", fault, fate)
            self.close()
            if isinstance(fault, ChannelClosed):
                return None
            return _refusal(message, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, WorkerDied.__name__)

    def _reply(self, message: Message, context: Context, packet: Packet) -> Message:
        if packet.head.get("op") != "reply":
            return _refusal(message, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, packet.head.get("kind"))
        reply = packet.message(0)
        if reply.has_content():
            take_state(context, packet, 1)
        return reply

    def close(self) -> None:
        if self._running is not None:
            with contextlib.suppress(OSError):
                self._running.kill()
            self._running = None


def _left(ends: float) -> float | None:
    """Return the seconds until then; None when it never comes."""
    return None if ends == math.inf else max(0.0, ends - time.monotonic())


def _refusal(message: Message, code: int, kind: object) -> Message:
    name = kind if isinstance(kind, str) and kind.isidentifier() and len(kind) <= 80 else "Exception"
    return Message(Error(code, name), reply_to=message)
