"""What a run does while its storage refuses: it waits, says so, and goes on where it was. Nothing is lost or redone."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import sqlalchemy.exc

from privfed.errors import RunStopped
from privfed.grid import Checkpoint, Grid, Recorder
from privfed.message import Message
from privfed.runtime.array_store import ArrayStoreError
from privfed.runtime.disk import disk_fault

log = logging.getLogger("privfed.superlink")
T = TypeVar("T")
FIRST_PAUSE, MAX_PAUSE = 0.25, 5.0


def storage_fault(fault: BaseException) -> str:
    """Say what is wrong with the storage, if that is what the fault is about; else nothing."""
    if isinstance(fault, ArrayStoreError):
        return str(fault.strerror)
    if isinstance(fault, sqlalchemy.exc.OperationalError | sqlalchemy.exc.InterfaceError):
        return f"the database fails: {str(fault.orig).splitlines()[0][:200]}"
    return disk_fault(fault)


class GivenUp(Exception):
    """Nobody wants the work done any more."""


class Patience:
    """Does something until the storage takes it. trouble: what it waits for, in words, or nothing."""

    def __init__(self, name: str, ended: threading.Event) -> None:
        self.trouble = ""
        self._name = name
        self._ended = ended

    def __call__(self, work: Callable[[], T]) -> T:
        """Return what `work` returns; while it fails for the storage's sake, wait. Raises GivenUp when ended."""
        pause = FIRST_PAUSE
        while True:
            try:
                result = work()
            except Exception as fault:
                text = storage_fault(fault)
                if not text:
                    raise
                if text != self.trouble:
                    log.warning("run %s waits for its storage: %s", self._name, text)
                self.trouble = text
                if self._ended.wait(pause):
                    raise GivenUp from None
                pause = min(MAX_PAUSE, 2 * pause)
                continue
            if self.trouble:
                log.info("run %s goes on: its storage works again", self._name)
                self.trouble = ""
            return result


class PatientRecorder:
    """A recorder that waits for its disk; knows the last committed round. committed: told of each that is."""

    def __init__(
        self,
        recorder: Recorder,
        patience: Patience,
        commit: int,
        committed: Callable[[Checkpoint], None] = lambda checkpoint: None,
    ) -> None:
        self._recorder = recorder
        self._committed = committed
        self._patience = patience
        self.last = commit
        self.ledger_path: Path | None = recorder.ledger_path
        self.insecure_test_randomness: int | None = recorder.insecure_test_randomness

    def journal_path(self, name: str) -> Path | None:
        return self._recorder.journal_path(name)

    def restore(self) -> Checkpoint | None:
        return self._patience(self._recorder.restore)

    def commit(self, checkpoint: Checkpoint) -> None:
        try:
            self._patience(lambda: self._recorder.commit(checkpoint))
        except RunStopped:
            self._note(checkpoint)  # it is committed all the same
            raise
        self._note(checkpoint)

    def _note(self, checkpoint: Checkpoint) -> None:
        self.last = checkpoint.round
        self._patience(lambda: self._committed(checkpoint))

    def report(self, event: str, **fields: object) -> None:
        self._recorder.report(event, **fields)  # it waits for each of its files by itself


class PatientGrid(Grid):
    """A Grid that waits for its storage; each call is one transaction, so doing it again does it once."""

    def __init__(self, grid: Grid, recorder: PatientRecorder, patience: Patience) -> None:
        self._grid = grid
        self._patience = patience
        self.recorder = recorder
        self.run_id = grid.run_id
        self.seed = grid.seed
        self.shared = grid.shared

    def get_node_ids(self) -> Sequence[int]:
        return self._patience(self._grid.get_node_ids)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        given = list(messages)
        return self._patience(lambda: self._grid.push_messages(given))

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        ids = message_ids if isinstance(message_ids, dict | set | frozenset) else list(message_ids)
        return self._patience(lambda: self._grid.pull_messages(ids))

    def wait(self, message_ids: Iterable[str], timeout: float | None) -> bool:
        ids = message_ids if isinstance(message_ids, dict | set | frozenset) else list(message_ids)
        return self._patience(lambda: self._grid.wait(ids, timeout))

    def forget(self, message_ids: Iterable[str]) -> None:
        ids = list(message_ids)
        self._patience(lambda: self._grid.forget(ids))
