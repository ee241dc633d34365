"""A federation over sockets: what a simulation computes, to the bit."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path

import pytest

from privfed import run_simulation
from privfed.runtime.app_folder import AppFolder
from privfed.runtime.control import ControlClient
from privfed.runtime.handshake import NetworkError
from proofs_tests.deployment.local_link import EXAMPLES, LocalLink, nodes_at
from proofs_tests.deployment.small_node import fresh
from proofs_tests.deployment.waiting import eventually

ROUNDS = 3


def test_a_run_over_sockets_is_bit_for_bit_the_simulation(tmp_path: Path) -> None:
    app = AppFolder.open(EXAMPLES / "minimal")
    server, client = fresh(app.path)
    config = {**app.config, "num-rounds": ROUNDS}
    expected = run_simulation(server, client, 2, run_config=config, seed=7, run_dir=None)
    with LocalLink(tmp_path) as link, nodes_at(link.fleet, 2) as nodes:
        name = link.submit(EXAMPLES / "minimal", 2, seed=7, num_rounds=ROUNDS)
        end = link.wait(name)
        assert (end.state, end.reason) == ("completed", "")
        found = link.folder(name).restore()
        assert found is not None and expected.checkpoint is not None
        assert found.arrays == expected.arrays
        assert [dict(one) for one in found.metrics] == [dict(one) for one in expected.rounds]
        assert sum(len(node.counted) for node in nodes) == 2 * ROUNDS
        assert all(counted for node in nodes for counted in node.counted)
        eventually(lambda: [node.client.ended() for node in nodes] != [[], []])


def test_a_run_says_what_it_waits_for_and_can_be_stopped_before_it_begins(tmp_path: Path) -> None:
    with LocalLink(tmp_path) as link, nodes_at(link.fleet, 1), ControlClient(link.control) as control:
        eventually(lambda: [row.connected for row in control.nodes()] == [True])
        name = link.submit(EXAMPLES / "minimal", 2)
        eventually(lambda: control.show(name).reason == "waits for nodes: 1 of 2 are connected")
        assert control.show(name).state == "pending"
        control.stop(name)
        end = link.wait(name)
        assert (end.state, end.reason) == ("stopped", "stopped before it began, as asked")
        with pytest.raises(NetworkError, match="is stopped already"):
            control.stop(name)


def test_a_running_run_names_the_nodes_that_are_gone(tmp_path: Path) -> None:
    with LocalLink(tmp_path) as link, ControlClient(link.control) as control:
        with nodes_at(link.fleet, 2):
            name = link.submit(EXAMPLES / "minimal", 2, num_rounds=10_000)
            eventually(lambda: control.show(name).round > 1)
        some = r"waits for replies of (\d) nodes, \1 of them not connected \((1|2|1, 2)\)"
        gone = re.compile(some + r": [01] of 2 to train of round \d+ have come")
        eventually(lambda: gone.fullmatch(control.show(name).reason))
        with nodes_at(link.fleet, 2):
            before = control.show(name).round
            eventually(lambda: control.show(name).round > before)
            control.stop(name)
            assert link.wait(name).state == "stopped"


def test_a_revoked_node_is_served_no_more_until_it_is_approved_again(tmp_path: Path) -> None:
    with LocalLink(tmp_path) as link, nodes_at(link.fleet, 1) as nodes, ControlClient(link.control) as control:
        eventually(lambda: [row.connected for row in control.nodes()] == [True])
        control.revoke(1)
        eventually(lambda: "node 1 was revoked by the operator" in nodes[0].statuses)
        assert [(row.state, row.connected) for row in control.nodes()] == [("revoked", False)]
        control.approve(1)
        eventually(lambda: [row.connected for row in control.nodes()] == [True])
        with pytest.raises(NetworkError, match="there is no node 9"):
            control.approve(9)


def test_the_monitor_tells_health_and_metrics(tmp_path: Path) -> None:
    with LocalLink(tmp_path) as link, nodes_at(link.fleet, 1), ControlClient(link.control) as control:
        eventually(lambda: [row.connected for row in control.nodes()] == [True])
        where = f"http://{link.link.addresses['monitor']}"
        assert urllib.request.urlopen(where + "/healthz").read() == b"ok\n"
        metrics = urllib.request.urlopen(where + "/metrics").read().decode()
        assert "privfed_nodes_connected 1.0" in metrics
        assert json.loads((tmp_path / "addresses.json").read_text()) == link.link.addresses
