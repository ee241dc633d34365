"""What a node says on its session: its greeting first, and then what its tasks wait for, whenever that changes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from privfed.failpoint import around
from privfed.runtime.frame import Hello, Stalled, pack


class Voice:
    """Speaks on one connection after the other. Threads may share it."""

    def __init__(self) -> None:
        self._reason = ""
        self._changed = threading.Condition()

    def report_wait(self, reason: str) -> None:
        """Say what tasks wait for; nothing when they go on."""
        with self._changed:
            if reason != self._reason:
                self._reason = reason
                self._changed.notify_all()

    def begin(self, hello: Callable[[], Hello]) -> tuple[Iterator[bytes], Callable[[], None]]:
        """Return what is said on a new connection, and what to call when that is over."""
        over = threading.Event()

        def end() -> None:
            with self._changed:
                over.set()
                self._changed.notify_all()

        def say() -> Iterator[bytes]:
            greeting = pack(hello())
            with around("hello"):
                yield greeting
            told = ""
            while True:
                with self._changed:
                    while self._reason == told and not over.is_set():
                        self._changed.wait()
                    if over.is_set():
                        return
                    told = self._reason
                with around("stalled"):
                    yield pack(Stalled(reason=told))

        return say(), end
