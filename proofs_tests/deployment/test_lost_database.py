"""A database that is locked by somebody else, or gone: runs say so, and go on to the same bits when it is back."""

from __future__ import annotations

import os
import signal
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
def test_a_postgresql_that_says_nothing_is_named_and_nobody_who_asks_waits_for_it(tmp_path: Path) -> None:
    """It raised nothing: users waited for a minute, and were told of a stream that was removed."""
    from proofs_tests.runtime.postgres import Postgres

    server = Postgres()
    link = SuperLinkProcess(tmp_path / "link", options=["--database", server.database()])
    silent = "waits for its storage: the database does not answer, for "
    try:
        with link, nodes_at(link.fleet, 12) as nodes, ControlClient(link.control) as control:
            eventually(lambda: sum(row.connected for row in control.nodes()) == len(nodes))
            name = submit(control, 100_000)
            eventually(lambda: control.show(name).round > 1)
            with server.frozen():
                eventually(lambda: control.show(name).reason.startswith(silent), 40)
                assert [row.state for row in control.runs()] == ["running"]
                assert len(list(control.nodes())) == len(nodes)
                reached = control.show(name).round
            eventually(lambda: control.show(name).round > reached + 2, 60)
            found = RunFolder.open(link.home / "runs" / name).restore()
            assert found is not None
            assert all(row["train-replies"]["valid"] == len(nodes) for row in found.metrics), "nothing was lost"
            with server.frozen():
                eventually(lambda: control.show(name).reason.startswith(silent), 40)
                os.kill(link.pid, signal.SIGTERM)
                eventually(lambda: "ending; runs go on" in link.output)
                assert link.end() == -signal.SIGTERM, "it waits for the database, and whoever asks again does not"
        assert "Traceback" not in link.output
    finally:
        server.remove()


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
