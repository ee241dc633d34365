"""A database that is locked by somebody else, or gone: runs say so, and go on to the same bits when it is back."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from privfed.runtime import database
from privfed.runtime.control import ControlClient
from privfed.runtime.run_folder import ENDED, RunFolder
from proofs_tests.deployment.local_link import LocalLink, nodes_at
from proofs_tests.deployment.superlink_process import SuperLinkProcess
from proofs_tests.deployment.test_full_disk import submit, undisturbed
from proofs_tests.deployment.waiting import eventually

ROUNDS = 12
WAITS = "waits for its storage: the database fails: "


def same_bits(run: RunFolder) -> bool:
    expected, found = undisturbed(ROUNDS), run.restore()
    return found is not None and (found.arrays, found.metrics) == (expected.arrays, expected.metrics)


def test_a_sqlite_file_that_somebody_else_has_locked_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.5)
    with LocalLink(tmp_path) as link, nodes_at(link.fleet, 2), ControlClient(link.control) as control:
        name = submit(control, ROUNDS)
        eventually(lambda: control.show(name).round > 2)
        other = sqlite3.connect(tmp_path / "link.db", isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")  # a backup, or a person with a shell
        eventually(lambda: control.show(name).reason == WAITS + "database is locked", 10)
        assert control.show(name).state == "running"
        other.execute("ROLLBACK")
        other.close()
        assert link.wait(name, 60).state == "completed"
        assert same_bits(link.folder(name))


@pytest.mark.postgres
def test_a_postgresql_that_is_stopped_and_started_is_waited_for(tmp_path: Path) -> None:
    from proofs_tests.runtime.postgres import Postgres

    server = Postgres()
    link = SuperLinkProcess(tmp_path / "link", options=["--database", server.database()])
    try:
        with link, nodes_at(link.fleet, 2), ControlClient(link.control) as control:
            name = submit(control, ROUNDS)
            eventually(lambda: control.show(name).round > 2)
            server.kill()
            eventually(lambda: control.show(name).reason.startswith(WAITS), 20)
            assert control.show(name).state == "running"
            server.start()
            eventually(lambda: control.show(name).state in ENDED, 60)
            assert control.show(name).state == "completed"
            assert same_bits(RunFolder.open(link.home / "runs" / name))
            assert link.end() == 0
        assert "Traceback" not in link.output
    finally:
        server.remove()
