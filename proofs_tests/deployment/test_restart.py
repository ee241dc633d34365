"""A SuperLink that is killed: the same run goes on, and ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from privfed import run_simulation
from privfed.cli.remote import follow
from privfed.grid import Checkpoint
from privfed.runtime.app_folder import AppFolder
from privfed.runtime.control import ControlClient, Submission
from privfed.runtime.federation import open_app
from privfed.runtime.handshake import NetworkError
from privfed.runtime.run_folder import RunFolder
from privfed.runtime.superlink import SuperLinkError
from proofs_tests.deployment.local_link import EXAMPLES, LocalLink, nodes_at
from proofs_tests.deployment.small_node import fresh
from proofs_tests.deployment.superlink_process import SuperLinkProcess
from proofs_tests.deployment.waiting import eventually

RECOVERY_SECONDS = 10.0


def undisturbed(rounds: int) -> Checkpoint:
    app = AppFolder.open(EXAMPLES / "minimal")
    server, client = fresh(app.path)
    found = run_simulation(server, client, 2, run_config={**app.config, "num-rounds": rounds}, seed=3).checkpoint
    assert found is not None
    return found


def killed_often(home: Path, rounds: int, kills: int, isolation: str, rng: random.Random) -> list[float]:
    """Run an app over two nodes, killing the SuperLink; return the seconds until each next committed round."""
    recoveries = []
    with SuperLinkProcess(home, isolation) as link, nodes_at(link.fleet, 2) as nodes:
        with ControlClient(link.control) as control:
            asked = Submission(open_app(EXAMPLES / "minimal"), {"num-rounds": str(rounds)}, seed=3, nodes=2)
            name = control.submit(asked).name
        folder = RunFolder.open(home / "runs" / name)
        run_id = folder.config["run-id"]
        for kill in range(1, kills + 1):
            goal = rounds * kill // (kills + 2)
            eventually(lambda goal=goal: folder.recorded_status.round >= goal, 60)
            time.sleep(rng.random() * 0.1)
            link.kill()
            reached = folder.recorded_status.round
            assert folder.recorded_status.state == "running"
            link.start()
            began = time.monotonic()
            eventually(lambda reached=reached: folder.recorded_status.round > reached, RECOVERY_SECONDS)
            recoveries.append(time.monotonic() - began)
        events: list[str] = []
        with ControlClient(link.control) as control:
            assert follow(control, name, lambda event, fields: events.append(event)) == ("completed", "")
            assert [row.name for row in control.runs()] == [name]
        assert folder.config["run-id"] == run_id
        found, expected = folder.restore(), undisturbed(rounds)
        assert found is not None and found.arrays == expected.arrays and found.metrics == expected.metrics
        assert events.count("ended") == 1
        # Every round was committed once, and told of after that: a kill in between leaves it untold.
        assert events.count("round-end") in range(rounds - kills, rounds + 1)
        counted = sum(node.counted.count(True) for node in nodes)
        assert 2 * rounds <= counted <= 2 * (rounds + kills)
    return recoveries


def test_a_superlink_killed_in_mid_run_goes_on_with_the_same_run(tmp_path: Path) -> None:
    recoveries = killed_often(tmp_path / "home", 30, 1, "inline", random.Random(1))
    assert max(recoveries) < RECOVERY_SECONDS


@pytest.mark.long
@pytest.mark.parametrize("isolation", ["inline", "subprocess"])
def test_a_superlink_killed_again_and_again_loses_nothing(tmp_path: Path, isolation: str) -> None:
    recoveries = killed_often(tmp_path / "home", 400, 15, isolation, random.Random(2))
    assert sorted(recoveries)[int(0.95 * len(recoveries))] < RECOVERY_SECONDS


def kill_workers(link: SuperLinkProcess) -> None:
    """Kill the processes of server apps."""
    tasks = Path(f"/proc/{link.pid}/task").iterdir()
    for worker in [one for task in tasks for one in (task / "children").read_text().split()]:
        os.kill(int(worker), signal.SIGKILL)


def test_a_server_app_that_is_killed_is_started_again_where_it_was(tmp_path: Path) -> None:
    rounds = 80
    with SuperLinkProcess(tmp_path / "home", "subprocess") as link, nodes_at(link.fleet, 2):
        with ControlClient(link.control) as control:
            asked = Submission(open_app(EXAMPLES / "minimal"), {"num-rounds": str(rounds)}, seed=3, nodes=2)
            name = control.submit(asked).name
            eventually(lambda: control.show(name).round > 3)
            kill_workers(link)
            reached = control.show(name).round
            eventually(lambda: control.show(name).round > reached + 1, RECOVERY_SECONDS)
            eventually(lambda: control.show(name).state == "completed", 60)
        folder = RunFolder.open(tmp_path / "home" / "runs" / name)
        assert "restarted: the process of the ServerApp ended" in (folder.path / "log.txt").read_text()
        found, expected = folder.restore(), undisturbed(rounds)
        assert found is not None and found.arrays == expected.arrays and found.metrics == expected.metrics


@pytest.mark.parametrize("killed", ["superlink", "server app"])
def test_a_stop_that_was_asked_for_before_a_crash_is_not_forgotten(tmp_path: Path, killed: str) -> None:
    with SuperLinkProcess(tmp_path / "home", "subprocess") as link, ControlClient(link.control) as control:
        with nodes_at(link.fleet, 2):
            asked = Submission(open_app(EXAMPLES / "minimal"), {"num-rounds": "100000"}, seed=3, nodes=2)
            folder = RunFolder.open(tmp_path / "home" / "runs" / control.submit(asked).name)
            eventually(lambda: folder.recorded_status.round > 3)
        eventually(lambda: not any(row.connected for row in control.nodes()))
        control.stop(folder.name)  # no round ends any more, so it stops only when it goes on
        if killed == "superlink":
            link.kill()
            link.start()
        else:
            kill_workers(link)
        eventually(lambda: folder.recorded_status.state == "stopped", RECOVERY_SECONDS)
        status, found = folder.recorded_status, folder.restore()
        assert found is not None and status.round == found.round
        assert status.reason == f"stopped after round {found.round}, as asked"


def test_one_that_is_told_to_end_lets_go_of_its_runs_and_takes_them_up_again(tmp_path: Path) -> None:
    with LocalLink(tmp_path) as link, nodes_at(link.fleet, 2):
        with ControlClient(link.control) as control:
            name = link.submit(EXAMPLES / "minimal", 2, num_rounds=100_000)
            eventually(lambda: control.show(name).round > 2)
        link.end()
        reached = link.folder(name).recorded_status
        assert reached.state == "running"
        with LocalLink(tmp_path, fleet=link.fleet, control=link.control), ControlClient(link.control) as control:
            eventually(lambda: control.show(name).round > reached.round)
            assert control.stop(name).name == name
            eventually(lambda: control.show(name).state == "stopped")


def test_a_failed_run_can_be_resumed_and_an_ended_one_cannot_be_stopped(tmp_path: Path) -> None:
    with LocalLink(tmp_path) as link, nodes_at(link.fleet, 2), ControlClient(link.control) as control:
        name = link.submit(EXAMPLES / "minimal", 2, num_rounds=100_000)
        eventually(lambda: control.show(name).round > 2)
        control.stop(name)
        assert link.wait(name).state == "stopped"
        reached = control.show(name).round
        assert control.resume(name).name == name
        eventually(lambda: control.show(name).round > reached)
        with pytest.raises(NetworkError, match="is running: only a failed or stopped run can be resumed"):
            control.resume(name)
        control.stop(name)
        assert link.wait(name).state == "stopped"


def test_two_superlinks_do_not_share_a_home(tmp_path: Path) -> None:
    with LocalLink(tmp_path), pytest.raises(SuperLinkError, match="another SuperLink uses"), LocalLink(tmp_path):
        pass
