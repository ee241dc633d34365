"""`privfed ls` says what each run waits for, on this machine and of a SuperLink."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from privfed import ArrayRecord, ClientApp, Context, Grid, Message, MetricRecord, RecordDict, ServerApp, run_simulation
from privfed.cli.main import cli
from privfed.cli.remote import worth_telling
from privfed.errors import RunFailed
from privfed.mods import clip, secure_aggregation
from privfed.protocols import SecAgg
from privfed.runtime import federation_run
from privfed.runtime.certificate import Peer
from privfed.runtime.control import ControlClient
from privfed.runtime.dispatch import Session
from privfed.strategies import FedAvg, SecureStage
from proofs_tests.deployment.local_link import EXAMPLES, LocalLink, nodes_at
from proofs_tests.deployment.waiting import eventually

CODE = """
import numpy as np
from privfed import ArrayRecord, ClientApp, MetricRecord, Message, RecordDict, ServerApp
from privfed.strategies import FedAvg

client, server = ClientApp(), ServerApp()

@client.train()
def train(message, context):
    return Message(RecordDict(dict(message.content.items())), reply_to=message)

@server.main()
def main(grid, context):
    strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=3)
    strategy.start(grid, ArrayRecord([np.zeros(3)]), num_rounds=1, timeout=2.0)
"""
MANIFEST = """
[project]
name = "three"
[tool.privfed.app.components]
serverapp = "three_app:server"
clientapp = "three_app:client"
"""


def ls(*options: str) -> dict[str, str]:
    """Return what the runs wait for, by their state."""
    told = CliRunner().invoke(cli, ["ls", "--format", "json", *options])
    assert told.exit_code == 0, told.output
    return {row["state"]: row["reason"] for row in json.loads(told.stdout)}


def waiting_app() -> tuple[ServerApp, ClientApp, threading.Event]:
    """Return an app whose nodes answer when the event is set."""
    client, server, going = ClientApp(mods=[secure_aggregation(), clip(1.0)]), ServerApp(), threading.Event()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        del context
        going.wait(20)
        arrays = message.content["arrays"]
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        del context
        strategy = FedAvg(stage=SecureStage(SecAgg(threshold=2)), fraction_evaluate=0.0)
        strategy.start(grid, ArrayRecord([np.zeros(3)]), num_rounds=1)

    return server, client, going


def test_a_local_run_says_which_replies_it_waits_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIVFED_HOME", str(tmp_path))
    server, client, going = waiting_app()
    folder = tmp_path / "runs" / "one"
    run = threading.Thread(target=run_simulation, args=(server, client, 3), kwargs={"run_dir": folder, "threads": 3})
    run.start()
    eventually((folder / "status.json").exists)
    eventually(lambda: ls() == {"running": "waits for replies of nodes: 3 are out"}, 5)
    assert "asking round=1 kind=train stage=mask" in (folder / "log.txt").read_text()
    going.set()
    run.join()
    assert ls() == {"completed": ""}


def test_a_local_strategy_that_lacks_nodes_says_so_until_it_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRIVFED_HOME", str(tmp_path))
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        del context
        FedAvg(min_available_nodes=5).start(grid, ArrayRecord([np.zeros(3)]), num_rounds=1, timeout=1.0)

    seen: list[str] = []
    one = tmp_path / "runs" / "one"

    def fail() -> None:
        with pytest.raises(RunFailed):
            run_simulation(server, ClientApp(), 3, run_dir=one)

    run = threading.Thread(target=fail)
    run.start()
    eventually((one / "status.json").exists)
    eventually(lambda: seen.append(ls().get("running", "")) or bool(seen[-1]), 5)
    assert seen[-1] == "waits for nodes (min_available_nodes): has 3, needs 5"
    run.join()
    assert "3 nodes are connected, min_available_nodes=5 are needed" in ls()["failed"]


def test_a_strategy_that_lacks_nodes_says_so_at_the_superlink(tmp_path: Path) -> None:
    app = tmp_path / "app"
    app.mkdir()
    (app / "three_app.py").write_text(CODE)
    (app / "pyproject.toml").write_text(MANIFEST)
    with LocalLink(tmp_path / "home") as link, nodes_at(link.fleet, 2):
        link.submit(app, 2)
        told = "waits for nodes (min_available_nodes): has 2, needs 3"
        eventually(lambda: ls("--superlink", link.control) == {"running": told}, 5)
        eventually(lambda: "failed" in ls("--superlink", link.control), 10)
        assert "min_available_nodes=3 are needed" in ls("--superlink", link.control)["failed"]


def test_replies_are_counted_while_they_come(tmp_path: Path) -> None:
    with LocalLink(tmp_path) as link, ControlClient(link.control) as control:
        with nodes_at(link.fleet, 2):
            name = link.submit(EXAMPLES / "minimal", 2, num_rounds=100_000)
            eventually(lambda: control.show(name).round > 1)
        with nodes_at(link.fleet, 1):  # the other one does not come back
            told = "waits for replies of 1 nodes, 1 of them not connected (2): 1 of 2 to train of round "
            eventually(lambda: control.show(name).reason.startswith(told))
            assert worth_telling("running", control.show(name).reason)
        control.stop(name)
        with nodes_at(link.fleet, 2):
            assert link.wait(name).state == "stopped"
    assert not worth_telling("running", "waits for replies of 3 nodes: 1 of 4 to train of round 2 have come")


def test_nodes_that_come_one_by_one_are_told_to_who_asks_and_are_one_line_of_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "privfed.superlink")
    with LocalLink(tmp_path) as link, ControlClient(link.control) as control:
        name = link.submit(EXAMPLES / "minimal", 9)

        def said(run: str) -> int:
            return sum(f"run {run} waits for nodes: " in line for line in caplog.messages)

        for count in range(1, 4):
            eventually(lambda n=count - 1: control.show(name).reason == f"waits for nodes: {n} of 9 are connected")
            link.link.dispatcher.sessions[count] = Session(count, f"node {count}", 1)
            link.link.register.greet(Peer("node", f"n{count}", count))
            link.link.federation.nodes_changed()
        eventually(lambda: control.show(name).reason == "waits for nodes: 3 of 9 are connected")
        assert said(name) == 1
        monkeypatch.setattr(federation_run, "REPEAT_SECONDS", 0.0)
        other = link.submit(EXAMPLES / "minimal", 9)
        eventually(lambda: said(other) > 1)  # and again after a while
