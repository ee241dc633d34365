"""Peers that stand still or vanish without a word: given up in bounded time, named meanwhile, and taken back."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from privfed import run_simulation
from privfed.runtime import handshake
from privfed.runtime.app_folder import AppFolder
from privfed.runtime.control import ControlClient, Follow
from privfed.runtime.frame import pack
from proofs_tests.deployment.hostile_wire import ACK, DATA, PREFACE, SETTINGS, Wire, h2, message, request
from proofs_tests.deployment.local_link import EXAMPLES, LocalLink, nodes_at
from proofs_tests.deployment.proxy import StallingProxy
from proofs_tests.deployment.small_node import SmallNode, fresh
from proofs_tests.deployment.waiting import eventually

ROUNDS = 15
SECONDS = 3


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have both sides ask after seconds of silence, in place of a minute, and give up soon after."""
    waits = [name for name, _ in handshake._TRANSFER if "keepalive" in name or "ping_timeout" in name]
    assert len(waits) == 3
    brief = [(name, SECONDS * 1000 if name in waits else value) for name, value in handshake._TRANSFER]
    monkeypatch.setattr(handshake, "_TRANSFER", brief)


def undisturbed() -> Any:
    app = AppFolder.open(EXAMPLES / "minimal")
    server, client = fresh(app.path)
    return run_simulation(server, client, 2, run_config={**app.config, "num-rounds": ROUNDS}, seed=1).checkpoint


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize(
    ("upwards", "downwards"),
    [
        (True, True),
        pytest.param(True, False, marks=pytest.mark.long),
        pytest.param(False, True, marks=pytest.mark.long),
    ],
)
def test_a_node_whose_connection_falls_silent_is_named_and_comes_back(
    tmp_path: Path, upwards: bool, downwards: bool
) -> None:
    with LocalLink(tmp_path) as link, ControlClient(link.control) as control:
        proxy, going = StallingProxy(link.fleet), threading.Event()
        going.set()
        nodes = [SmallNode(address, one, 2) for one, address in ((1, link.fleet), (2, proxy.address))]
        threads = [threading.Thread(target=node.run, args=(going.is_set,), daemon=True) for node in nodes]
        for thread in threads:
            thread.start()
        name = link.submit(EXAMPLES / "minimal", 2, num_rounds=ROUNDS)
        eventually(lambda: control.show(name).round > 2)
        before = proxy.connections
        proxy.stall(upwards=upwards, downwards=downwards)
        eventually(lambda: "waits for replies of 1 nodes" in control.show(name).reason)
        eventually(lambda: proxy.connections > before, 15 * SECONDS)
        assert link.wait(name, 60).state == "completed"
        assert link.folder(name).restore() == undisturbed()
        going.clear()
        for node, thread in zip(nodes, threads, strict=True):
            node.client.close()
            thread.join(10)
            node.close()
        proxy.close()


@pytest.mark.usefixtures("brief")
def test_a_node_that_vanishes_without_a_word_is_not_connected_in_bounded_time(tmp_path: Path) -> None:
    with LocalLink(tmp_path) as link, ControlClient(link.control) as control:
        proxy = StallingProxy(link.fleet)
        node = SmallNode(proxy.address, 1, 1)
        eventually(lambda: [row.connected for row in control.nodes()] == [True])
        proxy.refuse()
        proxy.stall()
        eventually(lambda: [row.connected for row in control.nodes()] == [False], 10 * SECONDS)
        name = link.submit(EXAMPLES / "minimal", 1)
        eventually(lambda: control.show(name).reason == "waits for nodes: 0 of 1 are connected")
        node.client.close()
        node.close()
        proxy.close()


def test_users_who_read_nothing_of_what_they_asked_for_cost_a_little_and_stop_nobody(tmp_path: Path) -> None:
    with LocalLink(tmp_path) as link, nodes_at(link.fleet, 2):
        name = link.submit(EXAMPLES / "minimal", 2, num_rounds=ROUNDS)
        wires = [Wire(link.control) for _ in range(20)]
        follow = pack(Follow(name=name, what="log", offset=0, follow=True))
        told = [("privfed-protocol", "1-2"), ("privfed-release", "0.1.0")]
        for wire in wires:
            wire.send(PREFACE + h2(SETTINGS, 0, 0) + h2(SETTINGS, ACK, 0))
            for stream in (1, 3, 5, 7):
                wire.send(request("Control", "Follow", stream, told) + h2(DATA, 1, stream, message(follow)))
        assert link.wait(name, 60).state == "completed"
        assert link.folder(name).restore() == undisturbed()
        for wire in wires:
            wire.close()
