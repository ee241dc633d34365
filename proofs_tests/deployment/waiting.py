"""Waiting for what other processes and threads do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol


class Program(Protocol):
    """What runs beside a test and keeps what it says."""

    @property
    def output(self) -> str: ...


def eventually(check: Callable[[], object], seconds: float = 30.0, program: Program | None = None) -> None:
    """Wait until something holds. Raises AssertionError after so many seconds; program: whose output it then shows."""
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, f"it did not come about; {program.output if program else ''}"
        time.sleep(0.01)
