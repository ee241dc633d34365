"""What does not fit into a packet between a ServerApp and its Grid is an error that says so; nobody waits for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from privfed import ArrayRecord, ClientApp, Context, LocalGrid, RecordDict, RunFailed
from privfed.grid import Checkpoint, MemoryRecorder
from privfed.runtime.channel import MAX_HEAD
from privfed.runtime.launcher import ProcessLauncher
from proofs_tests.deployment import odd_app


def serve(folder: Path, what: str, recorder: MemoryRecorder | None = None) -> object:
    app, grid = odd_app.write(folder / "app"), LocalGrid(ClientApp(), 2, recorder=recorder)
    launcher = ProcessLauncher(folder)
    try:
        return launcher.serve(app, grid, Context(run_config={"what": what, "rounds": 1}), folder / "server.txt")
    finally:
        launcher.close()


def test_a_checkpoint_that_cannot_travel_fails_the_run_with_the_cause(tmp_path: Path) -> None:
    recorder = MemoryRecorder()
    recorder.commit(Checkpoint(1, ArrayRecord([np.zeros(2)]), RecordDict(), ({"text": "x" * MAX_HEAD},)))
    with pytest.raises(RunFailed, match=r"raised ValueError: the answer to 'restore': a head of \d+ bytes .*cannot"):
        serve(tmp_path, "rounds", recorder)


def test_a_result_that_cannot_travel_is_none(tmp_path: Path) -> None:
    assert serve(tmp_path, "huge") is None
    assert "what main returned" in (tmp_path / "server.txt").read_text()
