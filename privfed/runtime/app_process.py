"""Starting a process for an app on this machine, and ending it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from privfed.errors import PrivfedError
from privfed.failpoint import VARIABLE
from privfed.runtime.channel import Channel
from privfed.runtime.confinement import Limits, environment

EXIT_SECONDS = 2.0


class LaunchLost(PrivfedError):
    """Whoever starts processes went away before it said what became of one: ask again."""


class NobodyLaunches(PrivfedError):
    """Whoever starts processes is not there yet: wait for it."""


class AppProcess(Protocol):
    """A process that runs `privfed.runtime.worker`, and the channel to it."""

    @property
    def channel(self) -> Channel: ...

    def kill(self) -> None:
        """End it and all it has started, now."""
        ...

    def fate(self) -> str:
        """Wait a moment for a process that is gone, and return how it ended."""
        ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker lives. home: its own folder. log: the file its output goes to the end of.

    shown: what it must see of folders that are hidden. writable: what it may change, beside its home.
    """

    home: Path
    log: Path
    shown: tuple[Path, ...] = ()
    writable: tuple[Path, ...] = ()


Spawn = Callable[[Place], AppProcess]
"""Start a worker."""


def start_process(home: Path, log: int, limits: Limits) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a worker in a session of its own; return it and this side's socket. log: where its output goes."""
    points = os.environ.get(VARIABLE)
    if points and Path(points).is_dir():  # of a test, which ends processes at failpoints: they take its files away
        limits = limits.showing((), (Path(points),))
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-P", "-m", "privfed.runtime.worker", str(theirs.fileno())]
        try:
            process = subprocess.Popen(
                command,
                cwd=home,
                env=environment(home),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it is gone: the channel says so, and how is told
        ours.sendall(json.dumps(limits.to_head()).encode() + b"\n")
    return process, ours


def end_process(process: subprocess.Popen[bytes]) -> None:
    """Kill the process group of a worker and wait for the worker."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def tell_fate(code: int | None) -> str:
    """Return an exit status in words."""
    if code is None:
        return "it closed its channel"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return f"exit status {code}"


@dataclass(eq=False)
class LocalProcess:
    """A worker that is a child of this process."""

    process: subprocess.Popen[bytes]
    channel: Channel
    _killed: bool = field(default=False, repr=False)

    def kill(self) -> None:
        self._killed = True
        self.channel.close()
        end_process(self.process)

    def fate(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(EXIT_SECONDS)
        return "killed by its launcher" if self._killed else tell_fate(self.process.poll())


def spawn_local(limits: Limits) -> Spawn:
    """Return a Spawn that makes children of this process."""

    def spawn(place: Place) -> LocalProcess:
        with place.log.open("ab") as output:
            own = limits.showing(place.shown, place.writable)
            process, stream = start_process(place.home, output.fileno(), own)
        return LocalProcess(process, Channel(stream, limits.packet, place.home.parent))

    return spawn
