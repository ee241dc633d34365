"""A SuperLink that starts no app itself: a superexec does, as the same user or as another one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from privfed.cli.main import cli
from privfed.cli.remote import connect
from privfed.runtime.control import ControlClient, Submission
from privfed.runtime.federation import open_app
from privfed.runtime.run_folder import ENDED, RunFolder
from proofs_tests.deployment.local_link import EXAMPLES, nodes_at
from proofs_tests.deployment.node_process import NodeProcess
from proofs_tests.deployment.superlink_process import SuperExecProcess, SuperLinkProcess
from proofs_tests.deployment.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]
LINK_USER, EXEC_USER, GROUP = 54_321, 54_322, 54_320
"""Of nobody; only root can be them."""


def children(pid: int) -> list[str]:
    """Return the command lines of a process's children."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found.append((path.parent / "cmdline").read_text().replace("\0", " "))
    return found


def submit(control: ControlClient, rounds: int) -> str:
    return control.submit(Submission(open_app(EXAMPLES / "minimal"), {"num-rounds": str(rounds)}, seed=1, nodes=2)).name


def test_a_run_waits_for_its_superexec_goes_on_without_the_one_that_died_and_can_be_stopped(tmp_path: Path) -> None:
    link = SuperLinkProcess(tmp_path / "link", "external")
    with link, nodes_at(link.fleet, 2), ControlClient(link.control) as control:
        name = submit(control, 100_000)
        place = tmp_path / "link" / "exec.sock"
        waits = f"waits for a superexec: none is connected to {place}"
        eventually(lambda: control.show(name).reason == waits)
        assert control.show(name).state == "pending"
        run = RunFolder.open(tmp_path / "link" / "runs" / name)
        with SuperExecProcess(tmp_path / "link", tmp_path / "exec.txt") as executor:
            eventually(lambda: control.show(name).round > 2)
            assert not [line for line in children(link.pid) if "privfed.runtime.worker" in line]
            assert [line for line in children(executor.process.pid) if "privfed.runtime.worker" in line]
        eventually(lambda: control.show(name).reason == waits)
        reached = control.show(name).round
        assert control.show(name).state == "running"
        with SuperExecProcess(tmp_path / "link", tmp_path / "exec.txt"):
            eventually(lambda: control.show(name).round > reached + 1)
        eventually(lambda: control.show(name).reason == waits)
        control.stop(name)
        eventually(lambda: control.show(name).state == "stopped")
        assert control.show(name).reason == f"stopped after round {run.recorded_status.round}, as asked"
        assert len(run.path.joinpath("attempts").read_text().split()) == 2, "waiting is no attempt"
        assert link.end() == 0
        assert not place.exists()


class Users:
    """A SuperLink's user and a superexec's, a group of both, and a folder each can reach."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.python = folder, sys.executable
        folder.chmod(0o755)
        self.home = folder / "home"
        self.home.mkdir(mode=0o700)
        os.chown(self.home, LINK_USER, LINK_USER)
        self.link = self._as(LINK_USER)
        self.superexec = self._as(EXEC_USER)

    def _as(self, user: int) -> dict[str, Any]:
        env = {**os.environ, "HOME": "/", "PYTHONDONTWRITEBYTECODE": "1"}
        return {"user": user, "group": user, "extra_groups": [GROUP], "env": env, "cwd": "/", "umask": 0o077}

    def make_python(self) -> str:
        """Return a Python that these users can run with this one's packages; nothing when there is none."""
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        place = self.folder / "python"
        for base in (os.path.realpath(sys.executable), f"/usr/bin/python{version}"):
            if not Path(base).exists():
                continue
            made = subprocess.run([base, "-m", "venv", "--without-pip", "--clear", str(place)], check=False)
            if made.returncode == 0:
                packages = place / "lib" / f"python{version}" / "site-packages"
                (packages / "here.pth").write_text(
                    "\n".join(str(Path(one).resolve()) for one in (ROOT, *sys.path) if one)
                )
                python = str(place / "bin" / "python")
                command = [python, "-m", "privfed.cli.main", "--version"]
                with contextlib.suppress(PermissionError):
                    if subprocess.run(command, check=False, capture_output=True, **self.superexec).returncode == 0:
                        return python
        return ""


@pytest.fixture
def users() -> Iterator[Users]:
    if os.geteuid() != 0:
        pytest.skip("only root can be two other users")
    folder = Path(tempfile.mkdtemp(prefix="privfed-users-"))
    try:
        found = Users(folder)
        found.python = found.make_python()
        if not found.python:
            pytest.skip("other users cannot read this checkout or its environment")
        yield found
    finally:
        shutil.rmtree(folder)


def modes(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return owner, group and mode of what is in a folder."""
    found = {path.name: path.lstat() for path in folder.iterdir()}
    return {name: (one.st_uid, one.st_gid, stat.S_IMODE(one.st_mode)) for name, one in found.items()}


@pytest.mark.long
def test_server_apps_of_another_user_add_their_ledger_to_the_run_and_can_take_nothing_away(users: Users) -> None:
    words = ["superlink", "--insecure", "--home", str(users.home), "--fleet", "127.0.0.1:0", "--control", "127.0.0.1:0"]
    words += ["--isolation", "external", "--exec-group", str(GROUP)]
    with (users.folder / "link.txt").open("ab") as log:
        link = subprocess.Popen([users.python, "-m", "privfed.cli.main", *words], stdout=log, stderr=log, **users.link)
    try:
        eventually((users.home / "addresses.json").exists, 30)
        addresses = json.loads((users.home / "addresses.json").read_text())
        with SuperExecProcess(users.home, users.folder / "exec.txt", users.python, **users.superexec):
            options = ["--isolation", "inline"]
            nodes = [
                NodeProcess(users.folder / str(one), addresses["fleet"], one, [*options, "--node-config", f"x={one}"])
                for one in (1, 2)
            ]
            with nodes[0], nodes[1], connect(addresses["control"], None) as control:
                settings = {"num-rounds": "2", "local-steps": "2", "baselines": "false"}
                asked = Submission(open_app(EXAMPLES / "quickstart"), settings, seed=1, nodes=2)
                name = control.submit(asked).name
                eventually(lambda: control.show(name).state in ENDED, 90)
                assert (control.show(name).state, control.show(name).round) == ("completed", 2), control.show(name)
                out = users.folder / "result"
                words = ["fetch", name, "--superlink", addresses["control"], "-o", str(out)]
                told = CliRunner().invoke(cli, words)
                assert told.exit_code == 0, told.output
                assert (out / "privacy_ledger.jsonl").read_bytes()
        run = users.home / "runs" / name
        found = modes(run)
        assert found["privacy_ledger.jsonl"] == (EXEC_USER, GROUP, 0o640), "the app's own, that the SuperLink reads"
        assert found["status.json"][0] == LINK_USER and found["status.json"][2] == 0o600
        assert stat.S_IMODE(run.stat().st_mode) == 0o1770, "sticky: what is not the app's own stays"
        kept = modes(users.home)
        assert {kept[one][2] for one in ("link.db", "audit.key", "bundles")} <= {0o600, 0o700}
        thief = f"import os; os.rename({str(run / 'status.json')!r}, {str(run / 'x')!r})"
        tried = subprocess.run([users.python, "-c", thief], check=False, capture_output=True, **users.superexec)
        assert b"PermissionError" in tried.stderr
    finally:
        link.terminate()
        assert link.wait(20) == 0
