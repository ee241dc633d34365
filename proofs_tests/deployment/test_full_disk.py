"""Disks that take nothing more, for real: files that may not grow, and a small file system that is full.

A process's file size limit (RLIMIT_FSIZE) can be lowered and raised from outside without privileges, so that is what
`make test` does: every write that would make a file longer fails in the kernel. The long test mounts a file system of a
few megabytes in a namespace of its own and fills it, so that writes fail with ENOSPC.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privfed import run_simulation
from privfed.runtime.app_folder import AppFolder
from privfed.runtime.audit_log import verify_log
from privfed.runtime.control import ControlClient, Submission
from privfed.runtime.disk import append, disk_fault
from privfed.runtime.federation import open_app
from privfed.runtime.handshake import NetworkError
from privfed.runtime.run_folder import ENDED, RunFolder
from proofs_tests.deployment.local_link import EXAMPLES
from proofs_tests.deployment.node_process import NodeProcess, nodes_in
from proofs_tests.deployment.small_node import fresh
from proofs_tests.deployment.superlink_process import SuperLinkProcess
from proofs_tests.deployment.waiting import eventually

ROUNDS = 25
UNLIMITED = resource.RLIM_INFINITY


def let_files_grow_to(pid: int, size: int) -> None:
    """Set the file size limit of a process that runs; it can be raised again."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, UNLIMITED))


def undisturbed(rounds: int) -> Any:
    app = AppFolder.open(EXAMPLES / "minimal")
    server, client = fresh(app.path)
    found = run_simulation(server, client, 2, run_config={**app.config, "num-rounds": rounds}, seed=1).checkpoint
    assert found is not None
    return found


def submit(control: ControlClient, rounds: int) -> str:
    asked = Submission(open_app(EXAMPLES / "minimal"), {"num-rounds": str(rounds)}, seed=1, nodes=2)
    return control.submit(asked).name


def lines_decode(run: RunFolder) -> bool:
    """Return whether no line of a run's files was cut short."""
    for name in ("events.jsonl", "operations.jsonl", "metrics.jsonl"):
        path = run.path / name
        for line in path.read_bytes().splitlines() if path.exists() else ():
            json.loads(line)
    return True


@pytest.mark.skipif(sys.platform != "linux", reason="another process's limits can be set on Linux alone")
def test_a_superlink_and_a_node_whose_files_may_not_grow_wait_and_go_on_to_the_same_bits(tmp_path: Path) -> None:
    link = SuperLinkProcess(tmp_path / "link")
    with link, nodes_in(tmp_path, [link.fleet] * 2) as nodes, ControlClient(link.control) as control:
        name = submit(control, ROUNDS)
        eventually(lambda: control.show(name).round > 2)
        let_files_grow_to(link.pid, 0)
        eventually(lambda: control.show(name).reason.startswith("waits for its storage: "), 10)
        assert control.show(name).state == "running"
        with pytest.raises(NetworkError, match=r"waits for its storage: files may not get larger"):
            submit(control, ROUNDS)
        let_files_grow_to(link.pid, UNLIMITED)
        reached = control.show(name).round
        eventually(lambda: control.show(name).round > reached)
        assert [row.name for row in control.runs()] == [name], "what was refused is not half there"
        let_files_grow_to(nodes[0].pid, 8192)
        eventually(lambda: "waits for the disk" in nodes[0].output, 10)
        eventually(lambda: control.show(name).reason.startswith("waits for replies of 1 nodes: 1 of 2 to train"), 10)
        let_files_grow_to(nodes[0].pid, UNLIMITED)
        eventually(lambda: control.show(name).state in ENDED, 60)
        assert (control.show(name).state, control.show(name).reason) == ("completed", "")
        run = RunFolder.open(link.home / "runs" / name)
        expected, found = undisturbed(ROUNDS), run.restore()
        assert found is not None and (found.arrays, found.metrics) == (expected.arrays, expected.metrics)
        assert lines_decode(run)
        assert [node.end() for node in nodes] == [0, 0]
        assert link.end() == 0
    assert verify_log(link.home / "audit.jsonl").cut == 0
    assert "Traceback" not in link.output + nodes[0].output


@given(st.lists(st.binary(min_size=1, max_size=30), max_size=8), st.integers(0, 60))
def test_a_line_is_in_a_file_whole_or_not_at_all(
    tmp_path_factory: pytest.TempPathFactory, lines: Any, room: int
) -> None:
    path, held = tmp_path_factory.mktemp("lines") / "file", b""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        for line in lines:
            try:
                append(path, line)
            except OSError as fault:
                assert disk_fault(fault) == "files may not get larger (ulimit -f)"
                assert len(held) + len(line) > room
            else:
                held += line
            assert path.read_bytes() == held
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_faults_of_the_disk_have_names_and_others_have_none() -> None:
    assert disk_fault(OSError(errno.ENOSPC, "x")) == "the disk is full"
    assert disk_fault(OSError(errno.EDQUOT, "x")) == "the disk quota is used up"
    assert not disk_fault(OSError("x")) and not disk_fault(ValueError(errno.ENOSPC))
    assert not disk_fault(FileNotFoundError(errno.ENOENT, "x"))


class SmallDisk:
    """Starts a command on a file system of its own of so many KiB at a folder, that can be filled from outside."""

    def __init__(self, folder: Path, kib: int) -> None:
        self.folder = folder
        folder.mkdir()
        own = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
        script = f'mount -t tmpfs -o size={kib}k none "{folder}" && exec "$@"'
        self.command = [*own, "sh", "-c", script, "sh"]
        self.process: subprocess.Popen[bytes] | None = None

    def can_be_had(self) -> bool:
        return subprocess.run([*self.command, "true"], check=False, capture_output=True).returncode == 0

    def start(self, words: list[str], log: Path, **env: str) -> None:
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*self.command, sys.executable, "-m", "privfed.cli.main", *words],
                stdout=output,
                stderr=output,
                env={**os.environ, **env},
            )

    def at(self, name: str) -> Path:
        """Return where something on it is seen from outside."""
        assert self.process is not None
        return Path(f"/proc/{self.process.pid}/root") / self.folder.relative_to("/") / name

    def fill(self) -> None:
        with contextlib.suppress(OSError), self.at("filler").open("ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def free(self) -> None:
        self.at("filler").unlink()

    def end(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(30)


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[dict[str, SmallDisk]]:
    made = {name: SmallDisk(tmp_path / f"disk-{name}", 16 << 10) for name in ("link", "node")}
    if not made["link"].can_be_had():
        pytest.skip("this system lets this user mount nothing: see the test with limits of file sizes")
    yield made
    for disk in made.values():
        if disk.process is not None and disk.process.poll() is None:
            disk.process.kill()
            disk.process.wait()


@pytest.mark.long
def test_full_file_systems_are_waited_out_in_every_part_of_a_secure_private_run(
    disks: dict[str, SmallDisk], tmp_path: Path
) -> None:
    """State, arrays, journals, ledger and audit log of a SuperLink, store and cache of a node: each on a full disk."""
    link, node = disks["link"], disks["node"]
    words = ["superlink", "--insecure", "--home", str(link.folder / "home")]
    words += ["--fleet", "127.0.0.1:0", "--control", "127.0.0.1:0"]
    link.start(words, tmp_path / "link.txt")
    eventually(lambda: link.at("home/addresses.json").exists(), 30)
    addresses = json.loads(link.at("home/addresses.json").read_text())
    words = ["supernode", "--insecure", "--node-id", "1", "--superlink", addresses["fleet"]]
    node.start([*words, "--data", str(node.folder / "data")], tmp_path / "node.txt")
    other = NodeProcess(tmp_path / "2", addresses["fleet"], 2)
    with other, ControlClient(addresses["control"]) as control:
        settings = {"num-rounds": "40", "local-steps": "2", "baselines": "false"}
        asked = Submission(open_app(EXAMPLES / "quickstart"), settings, seed=1, nodes=2)
        name = control.submit(asked).name
        for turn in range(4):
            reached = control.show(name).round
            eventually(lambda reached=reached: control.show(name).round > reached, 60)
            if turn % 2 == 0:
                link.fill()
                eventually(lambda: control.show(name).reason.startswith("waits for its storage: "), 30)
                assert control.show(name).state == "running", control.show(name)
                link.free()
            else:
                node.fill()
                eventually(lambda: "waits for the disk" in (tmp_path / "node.txt").read_text(), 30)
                node.free()
            reached = control.show(name).round
            eventually(lambda reached=reached: control.show(name).round > reached, 60)
        control.stop(name)
        eventually(lambda: control.show(name).state in ENDED, 60)
        end = control.show(name)
        assert end.state == "stopped", end
        run = RunFolder.open(link.at(f"home/runs/{name}"))
        assert lines_decode(run)
        spent = [json.loads(line) for line in run.ledger_path.read_bytes().splitlines()][1:]
        assert len(spent) >= end.round, "every round that was committed was charged"
        assert verify_log(link.at("home/audit.jsonl")).cut == 0
        assert verify_log(node.at("data/audit/audit.jsonl")).cut == 0
        assert "Traceback" not in (tmp_path / "link.txt").read_text()
        assert [node.end(), link.end()] == [0, 0]
