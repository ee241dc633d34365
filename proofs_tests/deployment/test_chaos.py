"""Real processes, killed at random: the model is the one of an undisturbed simulation, to the bit."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from privfed import run_simulation
from privfed.runtime.app_folder import AppFolder
from privfed.runtime.control import ControlClient, Submission
from privfed.runtime.federation import open_app
from privfed.runtime.run_folder import RunFolder
from proofs_tests.deployment.local_link import eventually
from proofs_tests.deployment.small_node import fresh
from proofs_tests.deployment.superlink_process import SuperLinkProcess

APP = """
import numpy as np
from privfed import ArrayRecord, ClientApp, MetricRecord, Message, RecordDict, ServerApp
from privfed.strategies import FedAvg

client, server = ClientApp(), ServerApp()

@client.train()
def train(message, context):
    # What a node did before weighs in: a round answered twice, or from the wrong state, shows in the model.
    kept = context.state.get("kept", ArrayRecord([np.zeros(3)])).to_numpy_ndarrays()[0]
    (weight,) = message.content["arrays"].to_numpy_ndarrays()
    kept = kept * 0.5 + weight + context.rng("train").random(3)
    context.state["kept"] = ArrayRecord([kept])
    arrays = ArrayRecord([weight + 0.1 * kept + context.node_config["partition-id"]])
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

@server.main()
def main(grid, context):
    strategy = FedAvg(fraction_evaluate=0.0)
    strategy.start(grid, ArrayRecord([np.zeros(3)]), num_rounds=context.run_config["num-rounds"])
"""
MANIFEST = """
[project]
name = "stateful"
[tool.privfed.app.components]
serverapp = "stateful_app:server"
clientapp = "stateful_app:client"
[tool.privfed.app.config]
num-rounds = 3
"""
SEED = 11


class NodeProcess:
    """`privfed supernode --insecure` in a folder of its own."""

    def __init__(self, folder: Path, address: str, node: int, count: int) -> None:
        self.folder = folder / f"node-{node}"
        self.folder.mkdir(exist_ok=True)
        words = ["supernode", "--insecure", "--superlink", address, "--node-id", str(node), "--isolation", "inline"]
        words += ["--data", str(self.folder / "data"), "--drain-seconds", "1"]
        for name, value in (("partition-id", node - 1), ("num-partitions", count)):
            words += ["--node-config", f"{name}={value}"]
        self._command = [sys.executable, "-m", "privfed.cli.main", *words]
        self.start()

    def start(self) -> None:
        with (self.folder / "output.txt").open("ab") as output:
            self._process = subprocess.Popen(self._command, stdout=output, stderr=output, start_new_session=True)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    @property
    def output(self) -> str:
        return (self.folder / "output.txt").read_text()


def disturbed(folder: Path, rounds: int, victims: list[str], rng: random.Random) -> list[float]:
    """Run an app, killing one victim after the other; return the seconds from each restart to the next round."""
    app = folder / "app"
    app.mkdir()
    (app / "stateful_app.py").write_text(APP)
    (app / "pyproject.toml").write_text(MANIFEST)
    recoveries = []
    with SuperLinkProcess(folder / "home") as link:
        nodes = {f"node-{node}": NodeProcess(folder, link.fleet, node, 2) for node in (1, 2)}
        try:
            with ControlClient(link.control) as control:
                asked = Submission(open_app(app), {"num-rounds": str(rounds)}, seed=SEED, nodes=2)
                run = RunFolder.open(folder / "home" / "runs" / control.submit(asked).name)
            for number, name in enumerate(victims, 1):
                goal = rounds * number // (len(victims) + 2)
                eventually(lambda goal=goal: run.recorded_status.round >= goal, 90)
                time.sleep(rng.random() * 0.2)
                victim = link if name == "link" else nodes[name]
                victim.kill()
                reached = run.recorded_status.round
                victim.start()
                began = time.monotonic()
                eventually(lambda reached=reached: run.recorded_status.round > reached, 30)
                recoveries.append(time.monotonic() - began)
            eventually(lambda: run.recorded_status.state == "completed", 120)
        finally:
            for node in nodes.values():
                node.kill()
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
