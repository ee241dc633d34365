"""Real processes, killed at random: the model is the one of an undisturbed simulation, to the bit."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from privfed import run_simulation
from privfed.runtime.app_folder import AppFolder
from privfed.runtime.control import ControlClient, Submission
from privfed.runtime.federation import open_app
from privfed.runtime.run_folder import RunFolder
from proofs_tests.deployment.node_process import nodes_in
from proofs_tests.deployment.small_node import fresh
from proofs_tests.deployment.stateful_app import write_app
from proofs_tests.deployment.superlink_process import SuperLinkProcess
from proofs_tests.deployment.waiting import eventually

SEED = 11


def disturbed(folder: Path, rounds: int, victims: list[str], rng: random.Random) -> list[float]:
    """Run an app, killing one victim after the other; return the seconds from each restart to the next round."""
    app = write_app(folder / "app")
    recoveries = []
    with SuperLinkProcess(folder / "home") as link:
        with nodes_in(folder, [link.fleet] * 2) as nodes:
            with ControlClient(link.control) as control:
                asked = Submission(open_app(app), {"num-rounds": str(rounds)}, seed=SEED, nodes=2)
                run = RunFolder.open(folder / "home" / "runs" / control.submit(asked).name)
            for number, name in enumerate(victims, 1):
                goal = rounds * number // (len(victims) + 2)
                eventually(lambda goal=goal: run.recorded_status.round >= goal, 90)
                time.sleep(rng.random() * 0.2)
                victim = link if name == "link" else nodes[int(name.removeprefix("node-")) - 1]
                victim.kill()
                reached = run.recorded_status.round
                victim.start()
                began = time.monotonic()
                eventually(lambda reached=reached: run.recorded_status.round > reached, 30)
                recoveries.append(time.monotonic() - began)
            eventually(lambda: run.recorded_status.state == "completed", 120)
        _, client = fresh(app)
        server, _ = fresh(app)
        config = {**AppFolder.open(app).config, "num-rounds": rounds}
        expected = run_simulation(server, client, 2, run_config=config, seed=SEED).checkpoint
        found = run.restore()
        assert found is not None and expected is not None
        assert found.arrays == expected.arrays
        assert found.metrics == expected.metrics
    return recoveries


def test_any_of_the_processes_may_be_killed(tmp_path: Path) -> None:
    recoveries = disturbed(tmp_path, 40, ["node-1", "link"], random.Random(1))
    assert max(recoveries) < 20


@pytest.mark.long
def test_killing_again_and_again_changes_nothing(tmp_path: Path) -> None:
    rng = random.Random(2)
    victims = [rng.choice(["link", "node-1", "node-2"]) for _ in range(20)]
    recoveries = sorted(disturbed(tmp_path, 400, victims, rng))
    assert recoveries[int(0.95 * len(recoveries))] < 10
