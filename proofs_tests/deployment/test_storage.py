"""Storage that refuses: the run waits and says for what, and goes on when the cause is gone; nothing is redone."""

from __future__ import annotations

import errno
import random
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy.exc

from privfed import run_simulation
from privfed.runtime import disk, run_folder
from privfed.runtime.app_folder import AppFolder
from privfed.runtime.control import ControlClient
from privfed.runtime.patience import GivenUp, Patience, storage_fault
from privfed.runtime.store import Store
from proofs_tests.deployment.local_link import EXAMPLES, LocalLink, nodes_at
from proofs_tests.deployment.small_node import fresh
from proofs_tests.deployment.waiting import eventually

ROUNDS = 12


def full() -> sqlalchemy.exc.OperationalError:
    return sqlalchemy.exc.OperationalError("INSERT", {}, sqlite3.OperationalError("database or disk is full"))


class FaultyStore:
    """A store that refuses while told to, or every now and then."""

    def __init__(self, store: Store, share: float, rng: random.Random) -> None:
        self._store = store
        self._share = share
        self._rng = rng
        self.broken = False
        self.refusals = 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        def call(*given: object, **named: object) -> object:
            if self.broken or self._rng.random() < self._share:
                self.refusals += 1
                raise full()
            return method(*given, **named)

        return call


def expected_rounds() -> Any:
    app = AppFolder.open(EXAMPLES / "minimal")
    server, client = fresh(app.path)
    found = run_simulation(server, client, 2, run_config={**app.config, "num-rounds": ROUNDS}, seed=1).checkpoint
    assert found is not None
    return found


def test_a_run_waits_for_a_full_disk_says_so_and_goes_on(tmp_path: Path) -> None:
    with LocalLink(tmp_path) as link, nodes_at(link.fleet, 2), ControlClient(link.control) as control:
        store = FaultyStore(link.link.link.store, 0.0, random.Random(1))
        link.link.link.store = store  # type: ignore[assignment]  # it passes everything on
        name = link.submit(EXAMPLES / "minimal", 2, num_rounds=100_000)
        eventually(lambda: control.show(name).round > 2)
        store.broken = True
        reason = "waits for its storage: the database fails: database or disk is full"
        eventually(lambda: control.show(name).reason == reason, 5.0)
        assert control.show(name).state == "running"
        reached = control.show(name).round
        store.broken = False
        eventually(lambda: control.show(name).round > reached + 2)
        assert "waits for its storage" not in control.show(name).reason
        assert link.folder(name).path.joinpath("attempts").read_text() == "0"  # nothing was started again
        control.stop(name)
        assert link.wait(name).state == "stopped"


def test_storage_that_fails_now_and_then_changes_no_bit(tmp_path: Path) -> None:
    expected = expected_rounds()
    with LocalLink(tmp_path) as link, nodes_at(link.fleet, 2):
        store = FaultyStore(link.link.link.store, 0.03, random.Random(2))
        link.link.link.store = store  # type: ignore[assignment]  # it passes everything on
        name = link.submit(EXAMPLES / "minimal", 2, num_rounds=ROUNDS)
        end = link.wait(name, 60)
        assert (end.state, end.reason, end.round) == ("completed", "", ROUNDS)
        found = link.folder(name).restore()
        assert found is not None and found.arrays == expected.arrays and found.metrics == expected.metrics
        assert store.refusals >= 5


def test_a_run_folder_on_a_full_disk_waits_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, left = expected_rounds(), [4]
    write = disk.write_atomically

    def refuse(path: Path, data: Any) -> None:
        if path.name in ("status.json", "metrics.jsonl") and left[0] > 0 and path.parent.parent == tmp_path / "runs":
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    with LocalLink(tmp_path) as link:
        with nodes_at(link.fleet, 2):
            name = link.submit(EXAMPLES / "minimal", 2, num_rounds=ROUNDS)
            monkeypatch.setattr(run_folder, "write_atomically", refuse)
            assert link.wait(name, 60).state == "completed"
        found = link.folder(name).restore()
        assert found is not None and found.arrays == expected.arrays and found.metrics == expected.metrics
    assert left == [0]


def test_only_faults_of_the_storage_are_waited_out() -> None:
    patience = Patience("r", threading.Event())
    for fault in (ValueError("x"), OSError(errno.ENOENT, "gone"), PermissionError(errno.EACCES, "no")):
        assert not storage_fault(fault)
        with pytest.raises(type(fault)):
            patience(lambda fault=fault: _raise(fault))
    assert storage_fault(OSError(errno.ENOSPC, "full")) == "the disk is full"
    assert patience(lambda: 5) == 5 and patience.trouble == ""


def test_one_who_waits_is_let_go_when_the_run_ends() -> None:
    ended = threading.Event()
    patience = Patience("r", ended)
    threading.Timer(0.3, ended.set).start()
    with pytest.raises(GivenUp):
        patience(lambda: _raise(full()))
    assert patience.trouble == "the database fails: database or disk is full"


def _raise(fault: Exception) -> None:
    raise fault
