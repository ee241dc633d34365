"""A run on disk: private, atomic at every point a crash can hit, exact when it is read back."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed import Array, ArrayRecord, ConfigRecord, RecordDict
from privfed.errors import PrivfedError, RunStopped
from privfed.grid import Checkpoint
from privfed.runtime import disk, run_folder
from privfed.runtime.checkpoint_file import CheckpointFolder
from privfed.runtime.run_folder import Keep, RunFolder, RunFolderError, Status, find_run, list_runs, load_checkpoint
from privfed.runtime.store import NodeState


def checkpoint(number: int, **metrics: object) -> Checkpoint:
    rounds = tuple({"round": one, **metrics} for one in range(1, number + 1))
    arrays = ArrayRecord({"w": Array(np.full(4, number, np.float32)), "b": Array(np.float64(number).reshape(()))})
    return Checkpoint(number, arrays, RecordDict({"momentum": ConfigRecord({"beta": 0.9})}), rounds)


def node_states(number: int) -> dict[int, NodeState]:
    kept = RecordDict({"v": ArrayRecord([np.full(3, number)])})
    return {
        0: NodeState(kept),
        7: NodeState(RecordDict(), {"clip/1": RecordDict({"a:b": ConfigRecord({"n": number})})}),
    }


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for the disk: no test here cuts the power."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", {"nodes": 3, "seed": 1})


def test_a_new_folder_is_private_and_says_what_was_asked(folder: RunFolder) -> None:
    for path in (folder.path, folder.path / "checkpoints"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert (folder.path / "format").read_text() == "1"
    assert folder.config == {"nodes": 3, "seed": 1}
    versions = json.loads((folder.path / "versions.json").read_text())
    assert {"python", "privfed", "numpy", "scipy", "cryptography"} <= set(versions)
    assert folder.status.state == "pending"
    with pytest.raises(RunFolderError, match="not empty"):
        RunFolder.create(folder.path, {})


def test_a_round_comes_back_bit_for_bit(folder: RunFolder) -> None:
    given_rounds = checkpoint(2, loss=0.1 + 0.2, epsilon=float("inf"), nested={"a": [1, 2.5, "x"]}, whole=3)
    folder.begin(lambda: node_states(2))
    folder.commit(given_rounds)
    found = folder.restore()
    assert found == given_rounds
    folder.end("failed", "power cut")
    again = RunFolder.open(folder.path)
    assert again.begin() == node_states(2)
    assert again.restore() == given_rounds
    assert again.rounds[1]["epsilon"] == "inf"
    assert again.rounds[1]["loss"] == 0.1 + 0.2
    again.end("completed")


@settings(max_examples=50)
@given(st.lists(st.floats(), max_size=4))
def test_metrics_keep_every_float(values: list[float]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as path:
        store = CheckpointFolder(Path(path), Keep())
        store.write(Checkpoint(1, ArrayRecord(), metrics=({"values": values},)), {})
        found = store.read()
    assert found is not None
    assert repr(found[0].metrics[0]["values"]) == repr(values)


CrashPoint = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.parametrize("calls", range(12))
def test_a_crash_at_any_write_leaves_the_old_round_or_the_new(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    folder.begin(lambda: node_states(1))
    folder.commit(checkpoint(1))
    folder._snapshot = lambda: node_states(2)
    left = calls
    real = {name: getattr(os, name) for name in ("fsync", "replace")}

    def crashing(name: str) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return real[name](*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "fsync", crashing("fsync"))
        patch.setattr(Path, "replace", lambda self, target: crashing("replace")(self, target))
        try:
            folder.commit(checkpoint(2))
            finished = True
        except KeyboardInterrupt:
            finished = False
    folder.end("stopped", "interrupted")
    again = RunFolder.open(folder.path)
    states = again.begin()
    found = again.restore()
    assert found is not None
    assert found in (checkpoint(1), checkpoint(2))
    assert states == node_states(found.round)
    assert len(again.rounds) == found.round
    assert finished <= (found.round == 2)
    again.commit(checkpoint(3))
    assert not list(folder.path.rglob("*.tmp"))
    again.end("completed")


def test_the_crash_test_reaches_from_the_first_write_to_the_last(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.begin(lambda: node_states(1))
    counted = 0
    real = os.fsync

    def fsync(file: int) -> None:
        nonlocal counted
        counted += 1
        real(file)

    monkeypatch.setattr(disk.os, "fsync", fsync)
    folder.commit(checkpoint(1))
    folder.end("completed")
    # States, checkpoint, metrics, status: a file and a folder each; the folder once more after pruning.
    assert counted == 11


@pytest.mark.parametrize("part", ["round-00002.pfw", "round-00002.states.pfw"])
@pytest.mark.parametrize("place", [0, 10, 40, 70, -1])
def test_a_damaged_checkpoint_is_named_and_says_where_to_go_on(folder: RunFolder, part: str, place: int) -> None:
    folder.begin(lambda: node_states(1))
    folder.commit(checkpoint(1))
    folder.commit(checkpoint(2))
    folder.end("failed")
    path = folder.path / "checkpoints" / part
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunFolderError, match=rf"{part} is damaged.*delete it to go on from round 1"):
        folder.begin()
    (folder.path / "checkpoints" / "round-00002.pfw").unlink()
    assert folder.begin() == node_states(1)
    assert folder.restore() == checkpoint(1)
    assert len(folder.rounds) == 1
    folder.end("stopped")


def test_a_checkpoint_of_the_older_format_is_read_and_its_damage_is_seen(folder: RunFolder) -> None:
    folder.begin()
    folder.commit(checkpoint(1))
    path = folder.path / "checkpoints" / "round-00001.pfw"
    frame = path.read_bytes()[64:]
    older = b"PFC1" + bytes(28) + hashlib.sha256(frame).digest() + frame
    path.write_bytes(older)
    assert folder.restore() == checkpoint(1)
    for place in range(0, len(older), 7):
        path.write_bytes(older[:place] + bytes((older[place] ^ 1,)) + older[place + 1 :])
        with pytest.raises(RunFolderError, match="damaged"):
            folder.restore()
    folder.end("failed")


def test_every_byte_of_a_checkpoint_counts(folder: RunFolder) -> None:
    folder.begin()
    folder.commit(checkpoint(1))
    path = folder.path / "checkpoints" / "round-00001.pfw"
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes((whole[place] ^ 1,)) + whole[place + 1 :])
        with pytest.raises(RunFolderError, match="damaged"):
            folder.restore()
    folder.end("failed")


def test_a_missing_or_exchanged_states_file_is_damage(folder: RunFolder) -> None:
    folder.begin(lambda: node_states(1))
    folder.commit(checkpoint(1))
    folder._snapshot = lambda: node_states(2)
    folder.commit(checkpoint(2))
    store = CheckpointFolder(folder.path / "checkpoints", Keep())
    store.states_file(2).write_bytes(store.states_file(1).read_bytes())
    with pytest.raises(RunFolderError, match="belongs to another checkpoint"):
        folder.restore()
    store.states_file(2).unlink()
    with pytest.raises(RunFolderError, match="damaged"):
        folder.restore()
    with pytest.raises(RunFolderError, match="damaged"):
        load_checkpoint(store.states_file(1))
    folder.end("failed")


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        ("last:1", [6]),
        ("last:3", [4, 5, 6]),
        ("last:2,best", [2, 5, 6]),
        ("last:1,best:loss", [3, 6]),
        ("best:unknown", [4, 5, 6]),
        ("", [4, 5, 6]),
    ],
)
def test_old_checkpoints_go_and_the_best_stays(tmp_path: Path, keep: str, left: list[int]) -> None:
    folder = RunFolder.create(tmp_path / "run", {}, keep=Keep.parse(keep))
    folder.begin(lambda: node_states(1))
    accuracy, loss = [0.1, 0.9, 0.5, float("nan"), 0.6, 0.7], [3.0, 2.0, 1.0, 4.0, float("nan"), 2.0]
    rounds = [{"evaluate": {"accuracy": a, "loss": b}} for a, b in zip(accuracy, loss, strict=True)]
    for number in range(1, 7):
        folder.commit(Checkpoint(number, ArrayRecord(), metrics=tuple(rounds[:number])))
    store = CheckpointFolder(folder.path / "checkpoints", Keep())
    assert store.rounds() == left
    assert sorted(path.name for path in store.path.glob("*.states.pfw")) == [store.states_file(n).name for n in left]
    folder.end("completed")


@pytest.mark.parametrize("text", ["last:0", "last:x", "first:3", "last", "last:-1", "last:²"])
def test_a_bad_keep_says_how_to_write_it(text: str) -> None:
    with pytest.raises(PrivfedError, match="write last:N"):
        Keep.parse(text)


def test_a_stop_request_stops_after_the_commit_and_not_the_next_run(folder: RunFolder) -> None:
    folder.begin()
    folder.request_stop()
    with pytest.raises(RunStopped, match="after round 1"):
        folder.commit(checkpoint(1))
    assert folder.restore() == checkpoint(1)
    folder.end("stopped", "as asked")
    folder.begin()
    folder.commit(checkpoint(2))
    folder.end("completed")


def test_one_process_runs_a_folder(folder: RunFolder) -> None:
    folder.begin()
    second = RunFolder.open(folder.path)
    with pytest.raises(RunFolderError, match="another process runs"):
        second.begin()
    folder.end("stopped")
    second.begin()
    second.end("completed")
    with pytest.raises(RunFolderError, match="is completed"):
        second.begin()


def test_a_run_whose_process_is_gone_has_failed(folder: RunFolder) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait(30)
    folder.set_status(Status("running", process=gone.pid))
    assert (folder.status.state, "resume" in folder.status.reason) == ("failed", True)
    folder.set_status(Status("running", process=os.getpid()))
    assert folder.status.state == "running"


def test_events_go_to_the_log_and_the_sampling_to_its_file(folder: RunFolder) -> None:
    heard: list[str] = []
    folder.listener = lambda event, fields: heard.append(event)
    folder.report("sampling", kind="poisson", rate=0.1)
    folder.report("round-start", round=1, value=float("nan"))
    assert json.loads((folder.path / "sampling.json").read_text()) == {"kind": "poisson", "rate": 0.1}
    lines = (folder.path / "log.txt").read_text().splitlines()
    assert lines[1].split(" ", 1)[1] == 'round-start round=1 value="nan"'
    assert heard == ["sampling", "round-start"]


def test_runs_are_listed_and_found_by_name_beginning_or_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIVFED_HOME", str(tmp_path / "home"))
    assert list_runs() == []
    first = RunFolder.create(None, {"n": 1})
    assert first.path.parent == tmp_path / "home" / "runs"
    (tmp_path / "home" / "runs" / "stray").mkdir()
    second = RunFolder.create(tmp_path / "home" / "runs" / "zz-second", {"n": 2})
    assert [one.config["n"] for one in list_runs()] == [1, 2]
    assert find_run("zz") == second.path
    assert find_run(str(first.path)) == first.path
    with pytest.raises(RunFolderError, match="no run 'nothing'"):
        find_run("nothing")
    with pytest.raises(RunFolderError, match="beginning of 2 runs"):
        find_run("")


def test_the_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PRIVFED_HOME", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert run_folder.home() == tmp_path / "privfed"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    assert run_folder.home() == tmp_path / "user" / ".local" / "share" / "privfed"


def test_what_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no run folder"):
        RunFolder.open(tmp_path)
    (tmp_path / "format").write_text("2")
    with pytest.raises(RunFolderError, match="has format 2"):
        RunFolder.open(tmp_path)
