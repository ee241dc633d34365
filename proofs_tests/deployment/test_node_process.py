"""Real processes: nodes that are killed, apps run by a superexec, and what a node costs while it waits."""

from __future__ import annotations

import grp
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from privfed.grid import Checkpoint
from privfed.runtime.control import ControlClient, RunRow, Submission
from privfed.runtime.federation import open_app
from privfed.runtime.run_folder import ENDED, RunFolder
from proofs_tests.deployment import odd_app
from proofs_tests.deployment.node_process import NodeProcess, alive
from proofs_tests.deployment.superlink_process import SuperExecProcess, SuperLinkProcess
from proofs_tests.deployment.waiting import eventually

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def submit(link: SuperLinkProcess, app: Path, nodes: int, **settings: object) -> str:
    with ControlClient(link.control) as control:
        texts = {name.replace("_", "-"): str(value) for name, value in settings.items()}
        return control.submit(Submission(open_app(app), texts, seed=1, nodes=nodes)).name


def ended(link: SuperLinkProcess, name: str, seconds: float = 60) -> RunRow:
    with ControlClient(link.control) as control:
        eventually(lambda: control.show(name).state in ENDED, seconds)
        return control.show(name)


def outcome(link: SuperLinkProcess, name: str) -> Checkpoint:
    found = RunFolder.open(link.home / "runs" / name).restore()
    assert found is not None
    return found


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return odd_app.write(tmp_path_factory.mktemp("apps") / "odd")


def journal_of(folder: Path) -> list[str]:
    path = folder.with_name(f"{folder.name}-writable") / "journal"
    return path.read_text().split() if path.exists() else []


def settings_of(folder: Path, seconds: float = 0.0) -> list[str]:
    own = folder.with_name(f"{folder.name}-writable")
    told = ["--node-config", f"journal={own / 'journal'}", "--node-config", f"seconds={seconds}"]
    return ["--app-writable", str(own), *told]


def test_a_node_killed_in_a_task_goes_on_and_the_run_is_as_if_nothing_was(app: Path, tmp_path: Path) -> None:
    """kill -9 while the app runs: its process goes with it, the task is done again, and no count has a gap."""
    with SuperLinkProcess(tmp_path / "link", "subprocess") as link:
        first = NodeProcess(tmp_path / "1", link.fleet, 1, settings_of(tmp_path / "1", 0.8))
        second = NodeProcess(tmp_path / "2", link.fleet, 2, settings_of(tmp_path / "2"))
        with first, second:
            name = submit(link, app, 2, rounds=3)
            eventually(lambda: len(journal_of(first.folder)) == 2)
            (worker,) = first.workers()
            first.kill()
            eventually(lambda: not alive(worker))
            first.start()
            end = ended(link, name)
            assert (end.state, end.round) == ("completed", 3), (end.reason, first.output, second.output)
            # Each node counts its messages: 1 + 2 + 3, twice, in arrays of four.
            assert float(outcome(link, name).arrays["0"].view().sum()) == 2 * 6 * 4
            assert len(journal_of(first.folder)) == 4, "the task that was cut off, and no other, ran twice"
            assert len(set(journal_of(first.folder))) == 3
            eventually(lambda: not first.workers())
            assert [first.end(), second.end(), link.end()] == [0, 0, 0]
            assert "network: " in first.output


def test_a_kill_at_every_step_of_a_task_counts_every_answer_once(app: Path, tmp_path: Path) -> None:
    steps = ("before-begin", "before-commit", "after-commit", "before-send", "after-send", "after-settle")
    rounds = 2 * len(steps) + 2
    with SuperLinkProcess(tmp_path / "link", "subprocess") as link:
        node = NodeProcess(tmp_path / "1", link.fleet, 1, settings_of(tmp_path / "1"))
        name = submit(link, app, 1, rounds=rounds)
        with ControlClient(link.control) as control:
            for step in steps:
                node.arm(f"node.{step}")
                node.start()
                assert node.process.wait(60) == -signal.SIGKILL, node.output
                assert control.show(name).state == "running"
        node.start()
        end = ended(link, name)
        assert (end.state, end.round) == ("completed", rounds), (end.reason, node.output)
        assert float(outcome(link, name).arrays["0"].view().sum()) == 4 * rounds * (rounds + 1) / 2
        ran = journal_of(node.folder)
        assert len(set(ran)) == rounds
        assert len(ran) == rounds + 1, "only what was cut off before its commit ran twice"
        assert node.end() == 0


def test_examples_run_unchanged_on_nodes_and_what_masks_stays_in_them(tmp_path: Path) -> None:
    link = SuperLinkProcess(tmp_path / "link", "subprocess")
    with (
        link,
        NodeProcess(tmp_path / "1", link.fleet, 1) as first,
        NodeProcess(tmp_path / "2", link.fleet, 2) as second,
    ):
        name = submit(link, EXAMPLES / "quickstart", 2, num_rounds=2, local_steps=2, baselines="false")
        end = ended(link, name)
        assert (end.state, end.round) == ("completed", 2), (end.reason, first.output, second.output)
        assert outcome(link, name).arrays["0"].view().any()


def test_a_superexec_runs_the_apps_of_a_node_that_waits_for_it(app: Path, tmp_path: Path) -> None:
    """A node with nobody to run its apps is not counted on; one that loses its superexec in a run loses no task."""
    home = tmp_path / "1"
    with SuperLinkProcess(tmp_path / "link") as link, ControlClient(link.control) as control:
        group = grp.getgrgid(os.getgid()).gr_name
        options = [*settings_of(home), "--isolation", "external", "--exec-group", group]
        with NodeProcess(home, link.fleet, 1, options) as node:
            absent = f"a superexec: none is connected to {home / 'exec.sock'}"
            eventually(lambda: f"does not connect yet: it waits for {absent}" in node.output)
            name = submit(link, app, 1, rounds=100_000)
            eventually(lambda: control.show(name).reason == "waits for nodes: 0 of 1 are connected")
            with SuperExecProcess(home, tmp_path / "exec.txt"):
                eventually(lambda: control.show(name).round > 1)
                assert node.workers() == []
                modes = {path.name: path.stat().st_mode & 0o777 for path in home.glob("*")}
                assert (modes["exec.sock"], modes["exec.token"], modes["apps"]) == (0o660, 0o640, 0o710)
                assert (modes["state"], modes["audit"], modes["work"]) == (0o700, 0o700, 0o710)
            eventually(lambda: f"the task waits for {absent}" in node.output)
            reached = control.show(name).round
            with SuperExecProcess(home, tmp_path / "exec.txt"):
                eventually(lambda: control.show(name).round > reached + 1)
                control.stop(name)
                end = ended(link, name)
                assert (end.state, end.reason) == ("stopped", f"stopped after round {end.round}, as asked")
                total = float(outcome(link, name).arrays["0"].view().sum())
                assert total == 4 * end.round * (end.round + 1) / 2, "each task was answered once, and none failed"
                assert node.end() == 0
                eventually(lambda: "trying again" in (tmp_path / "exec.txt").read_text())


def test_a_node_that_waits_for_its_superexec_ends_at_once_when_asked(app: Path, tmp_path: Path) -> None:
    with SuperLinkProcess(tmp_path / "link") as link, ControlClient(link.control) as control:
        with NodeProcess(tmp_path / "1", link.fleet, 1, ["--isolation", "external"]) as node:
            eventually(lambda: "does not connect yet" in node.output)
            assert node.end() == 0
        with NodeProcess(tmp_path / "1", link.fleet, 1, ["--isolation", "external", "--drain-seconds", "9999"]) as node:
            with SuperExecProcess(tmp_path / "1", tmp_path / "exec.txt"):
                eventually(lambda: [row.connected for row in control.nodes()] == [True])
            name = submit(link, app, 1, rounds=1)
            eventually(lambda: "the task waits for a superexec" in node.output)
            told = "waits for replies of 1 nodes, 1 of them for a superexec (1): 0 of 1 to train"
            eventually(lambda: control.show(name).reason.startswith(told))
            assert node.end() == 0, "its task is put down, and taken up by the next one"
            node.start("--isolation", "inline")
            assert ended(link, name).state == "completed"


def test_a_waiting_node_is_small_and_knows_no_database_server(tmp_path: Path) -> None:
    with SuperLinkProcess(tmp_path / "link") as link, NodeProcess(tmp_path / "1", link.fleet, 1) as node:
        eventually(lambda: "connected" in node.output)
        assert node.resident_kib() <= 120 * 1024
        assert node.end() == 0
    code = (
        "import sys; import privfed.cli.supernode, privfed.runtime.supernode, privfed.runtime.fleet, "
        "privfed.runtime.superexec, privfed.cli.node_mod, privfed.runtime.node_store; "
        "sys.exit(bool({'sqlalchemy', 'alembic'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_wrong_use_is_told_in_one_line(tmp_path: Path) -> None:
    def say(*options: str) -> str:
        command = [sys.executable, "-m", "privfed.cli.main", "supernode", "--superlink", "127.0.0.1:1", *options]
        told = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert told.returncode == 2
        return told.stderr.splitlines()[-1]

    assert "give the node's --keys" in say()
    command = [sys.executable, "-m", "privfed.cli.main", "supernode", "--insecure", "--node-id", "1"]
    told = subprocess.run(
        [*command, "--superlink", "link.example.org:7810"], capture_output=True, text=True, check=False
    )
    assert told.returncode == 2
    assert "link.example.org:7810 is another machine" in told.stderr
    assert "needs --node-id" in say("--insecure")
    assert "exclude each other" in say("--insecure", "--keys", "k", "--node-id", "1")
    assert "go with --isolation external" in say("--insecure", "--node-id", "1", "--exec-socket", "x")
    assert "write --node-config key=value" in say("--insecure", "--node-id", "1", "--node-config", "x")


@pytest.mark.long
def test_many_kills_of_nodes_lose_nothing(app: Path, tmp_path: Path) -> None:
    """Kills of either node at sampled moments; the sum is that of a run that nobody disturbed."""
    chance, rounds = random.Random(5), 60
    with SuperLinkProcess(tmp_path / "link", "subprocess") as link:
        nodes = [NodeProcess(tmp_path / str(n), link.fleet, n, settings_of(tmp_path / str(n), 0.05)) for n in (1, 2)]
        for node in nodes:
            node.start()
        name = submit(link, app, 2, rounds=rounds)
        kills = 0
        with ControlClient(link.control) as control:
            while control.show(name).state not in ENDED and kills < 40:
                before = control.show(name).round
                with_time = 0.02 + chance.random() * 0.8
                signal.sigtimedwait([], with_time)
                victim = chance.choice(nodes)
                victim.kill()
                kills += 1
                victim.start()
                eventually(lambda before=before: control.show(name).round > before or control.show(name).state in ENDED)
        end = ended(link, name, 120)
        assert (end.state, end.round) == ("completed", rounds), end.reason
        assert float(outcome(link, name).arrays["0"].view().sum()) == 2 * 4 * rounds * (rounds + 1) / 2
        assert kills >= 20
        for node in nodes:
            assert node.end() == 0
