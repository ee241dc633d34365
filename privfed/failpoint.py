"""Failpoints: named moments, just before and just after every commit and send, at which a test ends the process.

A process with PRIVFED_FAILPOINTS=FOLDER in its environment ends itself with SIGKILL when it reaches a moment for which
that folder holds a file ROLE.MOMENT, "superlink.before-push" for one; the number in the file, if any, says at which
time of being reached. The file is removed first, so a process that is started again goes on, and a test sees what was
struck. Without the variable, as everywhere but in tests, a failpoint is one comparison and does nothing.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

VARIABLE = "PRIVFED_FAILPOINTS"
STEPS: dict[str, tuple[str, ...]] = {
    "superlink": (
        # commits
        *("create-run", "run-state", "push", "lease", "complete", "pull", "forget", "put-down", "release", "expire"),
        *("file", "round", "audit-line", "event"),
        # whose turn it is
        *("term-row", "term-sessions", "term", "term-renewal", "term-end", "term-folder", "term-copy"),
        # sends
        *("offer", "chunk", "kept", "roster", "piece", "grid-answer", "relay"),
        *("result-part", "answer", "upload", "run", "submit", "resume", "stop"),
        *("show", "runs", "nodes", "node", "roster-taken", "results"),
    ),
    "node": (
        *("begin", "commit", "settle", "end", "evict", "file", "audit-line", "charge"),
        *("hello", "stalled", "query", "send", "upload", "download"),
    ),
    "superexec": ("hello", "start", "launched", "ended", "failed"),
    "server-app": ("call", "result", "journal", "charge"),
    "client-app": ("ready", "taken", "reply"),
}
"""What each kind of process commits and sends; each has a moment before-STEP and one after-STEP."""

_strike: Callable[[str], None] | None = None


def reach(moment: str) -> None:
    """Pass a moment; the process ends here if a test asked for that."""
    if _strike is not None:
        _strike(moment)


class around:
    """A commit or a send: passes before-STEP at its beginning, and after-STEP when it did not fail."""

    __slots__ = ("_step",)

    def __init__(self, step: str) -> None:
        self._step = step

    def __enter__(self) -> None:
        if _strike is not None:
            _strike(f"before-{self._step}")

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        if _strike is not None and kind is None:
            _strike(f"after-{self._step}")


def install(strike: Callable[[str], None] | None) -> None:
    """Have a function called with every moment that is passed; None ends that."""
    global _strike
    _strike = strike


def take_up(role: str) -> bool:
    """Heed the environment, as a process of this role; return whether it asks for failpoints."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        return False
    install(_killer(Path(folder), role))
    logging.getLogger("privfed").warning("TEST: %s is set, and this process ends where it says", VARIABLE)
    return True


def _killer(folder: Path, role: str) -> Callable[[str], None]:
    lock = threading.Lock()

    def strike(moment: str) -> None:
        path = folder / f"{role}.{moment}"
        if not path.exists():
            return
        with lock:
            try:
                with path.open("r+") as file:  # one that a test takes away meanwhile is not made again
                    left = int(file.read() or "1")
                    if left > 1:
                        file.seek(0)
                        file.truncate()
                        file.write(str(left - 1))
                        return
                path.unlink()
            except (OSError, ValueError):  # another process was struck first
                return
            os.kill(os.getpid(), signal.SIGKILL)

    return strike
