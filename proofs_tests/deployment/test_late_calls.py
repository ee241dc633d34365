"""What a ServerApp asked for just before its process died is done before the run goes on, or not at all."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from privfed import ClientApp, Context, LocalGrid, Message, RunFailed
from privfed.grid import Checkpoint, MemoryRecorder
from privfed.runtime.launcher import ProcessLauncher
from proofs_tests.deployment import odd_app

LATE_SECONDS = 0.5


class Deadly(LocalGrid):
    """Kills the process that calls, and takes its time over the call."""

    def __init__(self) -> None:
        super().__init__(ClientApp(), 2, recorder=DeadlyRecorder())
        self.done: list[str] = []

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        given = list(messages)
        kill(given[0].content.config_records["q"]["process"])
        self.done.append("push")
        return [one.metadata.message_id for one in given]


class DeadlyRecorder(MemoryRecorder):
    def commit(self, checkpoint: Checkpoint) -> None:
        kill(checkpoint.state.config_records["s"]["process"])
        super().commit(checkpoint)


def kill(process: object) -> None:
    assert isinstance(process, int)
    os.kill(process, signal.SIGKILL)
    time.sleep(LATE_SECONDS)


@pytest.mark.parametrize("call", ["push", "commit"])
def test_a_call_of_a_process_that_died_is_over_before_the_run_goes_on(tmp_path: Path, call: str) -> None:
    app, grid = odd_app.write(tmp_path / "app"), Deadly()
    launcher = ProcessLauncher(tmp_path)
    context = Context(run_id=9, seed=3, run_config={"what": "dies_in_a_call", "call": call})
    try:
        with pytest.raises(RunFailed, match="ended without a result"):
            launcher.serve(app, grid, context, tmp_path / "server.txt")
    finally:
        launcher.close()
    found = grid.recorder.restore()
    assert (grid.done, found is not None) == ((["push"], False) if call == "push" else ([], True))
