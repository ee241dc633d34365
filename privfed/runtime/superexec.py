"""SuperExec: starts and ends the processes of apps for a node or a server that must not start them itself.

The node listens on a Unix socket (mode 0600) beside a file with a token. `privfed superexec` connects, proves that it
can read the file, and then starts a worker for each request. What it hands back is the worker's own socket, passed as
a descriptor, so nothing that an app is sent or answers goes through it. It may run as another user, of a group that the
node is in too: that user then owns the apps' processes and can read nothing of the node's but the apps. The group is
given the socket (0660), the token (0640), the apps' code to read, each process's own folder, and the folder of a run to
whose server app it belongs: sticky, so that an app can add files of its own there and take away nobody else's. What it
adds, the superexec lets the group read, within `SHARE_SECONDS`.

A request or an answer is one datagram of JSON on a connection of kind SOCK_SEQPACKET:
    -> {"token", "version"}      <- {"ok"}
    <- {"op": "launch", "id", "home", "limits"} with the log's descriptor
    -> {"op": "launched", "id", "process"} with the worker's socket,  or {"op": "failed", "id", "text"}
    <- {"op": "kill", "id"}      -> {"op": "ended", "id", "code"}
"""

from __future__ import annotations

import contextlib
import hmac
import itertools
import json
import logging
import os
import queue
import secrets
import shutil
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from privfed.errors import PrivfedError
from privfed.failpoint import around
from privfed.runtime.app_process import LaunchLost, NobodyLaunches, Place, end_process, start_process, tell_fate
from privfed.runtime.channel import Channel
from privfed.runtime.confinement import Limits

VERSION = 1
MAX_DATAGRAM = 1 << 16
HELLO_SECONDS = 10.0
MAX_GREETINGS = 64
"""Connections that may be greeting at a time; more are closed at once."""
LAUNCH_SECONDS = 60.0
EXIT_SECONDS = 2.0
SHARE_SECONDS = 1.0
SHARED = 0o1770
REPEAT_SECONDS, MAX_REASONS = 60.0, 10
"""Who is turned away is told about once in so long for a reason, and for so many reasons."""
logger = logging.getLogger("privfed.exec")


class ExecError(PrivfedError):
    """There is no superexec, it does not start a process, or its other side is not who it should be."""


class ExecGone(ExecError, LaunchLost):
    """The superexec went away while it was to start a process."""


class ExecAbsent(ExecError, NobodyLaunches):
    """No superexec is connected."""


def _say(connection: socket.socket, told: Mapping[str, Any], descriptors: tuple[int, ...] = ()) -> None:
    socket.send_fds(connection, [json.dumps(told).encode()], list(descriptors))


def _hear(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Return a datagram and its descriptors. Raises ExecError when the other side is gone or sends something else."""
    data, descriptors, flags, _ = socket.recv_fds(connection, MAX_DATAGRAM, 1)
    try:
        told = json.loads(data) if data and not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) else None
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        for one in descriptors:
            os.close(one)
        raise ExecError("the other side of the exec socket is gone" if not data else "a datagram does not decode")
    return told, descriptors


def _share(path: Path, group: int, mode: int) -> None:
    """Give a group access to a file or folder of this user."""
    try:
        os.chown(path, -1, group)
    except PermissionError:
        raise ExecError(f"{path} cannot be given to group {group}: this user must be a member of it") from None
    path.chmod(mode)


def _is_shared(folder: Path) -> bool:
    """Return whether an ExecHost gave a folder to its group to add files to."""
    return folder.is_dir() and stat.S_IMODE(folder.stat().st_mode) == SHARED


def _let_read(folder: Path) -> None:
    """Let the group of a folder read the files of this user in it; of files that are anybody else's nothing changes."""
    group = folder.stat().st_gid
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # a link, or gone
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                found = os.fstat(file)
                if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & stat.S_IRGRP:
                    os.fchown(file, -1, group)
                    os.fchmod(file, 0o640)
            finally:
                os.close(file)


@dataclass(eq=False)
class _Remote:
    """A worker that the superexec started."""

    number: int
    host: ExecHost
    channel: Channel
    ended: threading.Event = field(default_factory=threading.Event)
    code: int | None = None

    def kill(self) -> None:
        self.channel.close()  # the worker ends itself, and all it started, when its socket does
        self.host.tell({"op": "kill", "id": self.number})

    def fate(self) -> str:
        self.ended.wait(EXIT_SECONDS)
        return tell_fate(self.code)


class ExecHost:
    """The side of a node or a server: a socket for one superexec at a time, and a Spawn that asks it.

    path: the socket; the token is in a file beside it. group: id of the group that a superexec of another user shares
    with the node. A superexec that restarts connects again.
    """

    def __init__(self, path: Path, limits: Limits, group: int | None = None) -> None:
        self._group = group
        self.path = path.resolve()
        self.token_file = self.path.with_suffix(".token")
        self._limits = limits
        self._token = secrets.token_hex(32)
        self._numbers = itertools.count(1)
        self._waiting: dict[int, queue.SimpleQueue[Channel | str | ExecGone]] = {}
        self._running: dict[int, _Remote] = {}
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        self._ready = False
        self._closed = False
        self._greeting = threading.Semaphore(MAX_GREETINGS)
        self._told: set[str] = set()
        self._forget_at = 0.0
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._open()
        threading.Thread(target=self._accept, name="privfed-exec", daemon=True).start()

    def _open(self) -> None:
        mask = os.umask(0o177)
        try:
            self._listener.bind(str(self.path))
            self.token_file.unlink(missing_ok=True)
            self.token_file.write_text(self._token)
        finally:
            os.umask(mask)
        if self._group is not None:
            _share(self.path, self._group, 0o660)
            _share(self.token_file, self._group, 0o640)
            _share(self.path.parent, self._group, 0o710)
        self._listener.listen(4)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            # Each in its own thread, so that one who says nothing does not keep the others out.
            if not self._greeting.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._greet, args=(connection,), name="privfed-exec-peer", daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        """See who connects, and serve the one who knows the token."""
        try:
            connection.settimeout(HELLO_SECONDS)
            hello, descriptors = _hear(connection)
            for one in descriptors:
                os.close(one)
            same = hmac.compare_digest(str(hello.get("token")).encode(), self._token.encode())
            if not same or hello.get("version") != VERSION:
                _say(connection, {"ok": False, "text": f"wrong token, or not version {VERSION}"})
                raise ExecError("a superexec showed a wrong token or version")
            if not self._take_place(connection):
                _say(connection, {"ok": False, "text": "another superexec is connected"})
                raise ExecError("there is one already")
        except (OSError, ExecError, ValueError) as fault:
            self._warn(str(fault))
            connection.close()
            return
        finally:
            self._greeting.release()
        self._serve(connection)

    def _warn(self, text: str) -> None:
        """Say that somebody was turned away: each reason once a minute, and not many, or a stranger fills the log."""
        now = time.monotonic()
        if now >= self._forget_at:
            self._told, self._forget_at = set(), now + REPEAT_SECONDS
        if text not in self._told and len(self._told) < MAX_REASONS:
            self._told.add(text)
            logger.warning("a superexec was turned away: %s", text)

    def _take_place(self, connection: socket.socket) -> bool:
        """Make a connection the one that launches, if there is none."""
        with self._lock:
            if self._closed or self._connection is not None:
                return False
            self._connection = connection
        return True

    def _serve(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(None)
            _say(connection, {"ok": True})
            logger.info("a superexec is connected")
            with self._lock:
                self._ready = True
            while True:
                self._take(*_hear(connection))
        except (OSError, ExecError, KeyError, TypeError) as fault:
            logger.warning("the superexec is gone: %s", fault)
        finally:
            connection.close()
            with self._lock:
                self._connection, self._ready = None, False
                waiting, self._waiting = list(self._waiting.values()), {}
                running, self._running = list(self._running.values()), {}
            for one in waiting:
                one.put(ExecGone("the superexec went away while it was to start a process"))
            for remote in running:  # nobody is left to say how they ended
                remote.ended.set()

    def _take(self, told: dict[str, Any], descriptors: list[int]) -> None:
        number = told["id"]
        with self._lock:
            waiting = self._waiting.pop(number, None) if told["op"] != "ended" else None
            ended = self._running.pop(number, None) if told["op"] == "ended" else None
        if ended is not None:
            ended.code = told["code"]
            ended.ended.set()
        if told["op"] == "launched" and descriptors:
            channel = Channel(socket.socket(fileno=descriptors.pop()), self._limits.packet)
            if waiting is not None:
                waiting.put(channel)
            else:
                channel.close()
        elif waiting is not None:
            waiting.put(str(told.get("text", "it did not start")))
        for one in descriptors:
            os.close(one)

    def waits_for(self) -> str:
        """Say that no superexec is there, and where it is awaited; nothing when one is."""
        with self._lock:
            there = self._ready or self._closed
        return "" if there else f"a superexec: none is connected to {self.path}"

    def prepare(self, app: Path) -> None:
        """Let the group read an app's code."""
        if self._group is not None:
            for path in (app, *app.rglob("*")):
                _share(path, self._group, 0o750 if path.is_dir() else 0o640)
            for path in app.parents[:2]:
                _share(path, self._group, 0o710)

    def spawn(self, place: Place) -> _Remote:
        """Have a worker started. Raises ExecAbsent while there is no superexec, ExecError for what goes wrong."""
        home = place.home
        if self._group is not None:
            _share(home, self._group, 0o770)
            _share(home.parent, self._group, 0o710)
            for folder in place.writable:
                _share(folder, self._group, SHARED)
                _share(folder.parent, self._group, 0o710)
        answer: queue.SimpleQueue[Channel | str | ExecGone] = queue.SimpleQueue()
        number = next(self._numbers)
        with self._lock:
            if not self._ready:  # whoever asks waits: it knows for how long, and when it is to end
                raise ExecAbsent(f"no superexec is connected to {self.path}")
            self._waiting[number] = answer
        limits = self._limits.showing(place.shown, place.writable).to_head()
        request = {"op": "launch", "id": number, "home": str(home), "limits": limits}
        with place.log.open("ab") as output:
            self.tell(request, (output.fileno(),))
        try:
            got = answer.get(timeout=LAUNCH_SECONDS)
        except queue.Empty:
            got = f"no answer within {LAUNCH_SECONDS:g} s"
        if isinstance(got, ExecGone):
            raise got
        if isinstance(got, str):
            raise ExecError(f"the superexec did not start a process: {got}")
        got.spool = home.parent
        remote = _Remote(number, self, got)
        with self._lock:
            if self._connection is not None:
                self._running[number] = remote
            else:
                remote.ended.set()
        return remote

    def tell(self, request: Mapping[str, Any], descriptors: tuple[int, ...] = ()) -> None:
        """Send a request; one that cannot be sent is answered by the connection's end."""
        with self._lock:
            connection = self._connection
        if connection is not None:
            with contextlib.suppress(OSError):
                _say(connection, request, descriptors)

    def close(self) -> None:
        """Close the socket and remove it."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            self._closed = True
            connection = self._connection
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.path.unlink(missing_ok=True)
        self.token_file.unlink(missing_ok=True)


class SuperExec:
    """The other side: connects to a node or a server and runs workers for it, until the connection ends.

    cap: limits of its own that the node's requests cannot exceed.
    """

    def __init__(self, path: Path, token: str, cap: Limits | None = None) -> None:
        self._path = path
        self._token = token
        self._cap = cap or Limits()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def run(self) -> None:
        """Serve one connection. Raises ExecError when it is refused or ends."""
        try:
            self._run()
        finally:
            self.close()

    def _run(self) -> None:
        try:
            self._connection.connect(str(self._path))
            with around("hello"):
                _say(self._connection, {"token": self._token, "version": VERSION})
            answer, _ = _hear(self._connection)
        except OSError as fault:
            raise ExecError(f"{self._path}: {fault.strerror or fault}") from None
        if answer.get("ok") is not True:
            raise ExecError(f"{self._path} turns this superexec away: {answer.get('text')}")
        logger.info("connected to %s", self._path)
        try:
            while True:
                request, descriptors = _hear(self._connection)
                if request.get("op") == "launch" and descriptors:
                    self._launch(request, descriptors[0])
                elif request.get("op") == "kill":
                    self._kill(request["id"])
        except (OSError, KeyError, TypeError) as fault:
            raise ExecError(f"the connection to {self._path} ended: {fault}") from None

    def _launch(self, request: dict[str, Any], log: int) -> None:
        number = request["id"]
        try:
            limits = self._cap.within(Limits.from_head(request["limits"]))
            with around("start"):
                process, stream = start_process(Path(request["home"]), log, limits)
        except (OSError, ValueError, TypeError, KeyError) as fault:
            with around("failed"):
                _say(self._connection, {"op": "failed", "id": number, "text": f"{type(fault).__name__}: {fault}"})
            return
        finally:
            os.close(log)
        with self._lock:
            self._processes[number] = process
        with stream, around("launched"):
            _say(self._connection, {"op": "launched", "id": number, "process": process.pid}, (stream.fileno(),))
        logger.info("started process %d in %s", process.pid, request["home"])
        given = number, process, Path(request["home"]), [one for one in map(Path, limits.writable) if _is_shared(one)]
        threading.Thread(target=self._reap, args=given, daemon=True).start()

    def _reap(self, number: int, process: subprocess.Popen[bytes], home: Path, shared: list[Path]) -> None:
        code = None
        while code is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(SHARE_SECONDS if shared else None)
            for folder in shared:
                with contextlib.suppress(OSError):
                    _let_read(folder)
        with contextlib.suppress(OSError):  # the node removes the folder meanwhile
            for path in home.iterdir():  # it may not be able to remove what this user made
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        with self._lock:
            self._processes.pop(number, None)
        with contextlib.suppress(OSError), around("ended"):
            _say(self._connection, {"op": "ended", "id": number, "code": code})

    def _kill(self, number: int) -> None:
        with self._lock:
            process = self._processes.get(number)
        if process is not None:
            end_process(process)

    def close(self) -> None:
        """End the connection and every worker, in this order: nobody asks for another one in between."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        with self._lock:
            processes = list(self._processes.values())
        for process in processes:
            end_process(process)
        self._connection.close()
