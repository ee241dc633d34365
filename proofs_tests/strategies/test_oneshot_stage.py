"""The one-shot protocol under SecureStage with nothing but a threshold set: any small cohort, a model of 100k."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from privfed import mods
from privfed.apps import ClientApp, ServerApp
from privfed.array import Array
from privfed.context import Context
from privfed.errors import RunFailed
from privfed.message import Message
from privfed.protocols import OneShot
from privfed.protocols.oneshot import draw_committee
from privfed.protocols.session import Policy
from privfed.record import ArrayRecord, MetricRecord, RecordDict
from privfed.runtime.simulation import RunResult, run_simulation
from privfed.strategies import FedAvg, SecureStage

SIZE = 100_000
MODEL = ArrayRecord({"w": Array(np.zeros(SIZE, np.float32))})


def client_app(**arguments: Any) -> ClientApp:
    app = ClientApp(mods=[mods.secure_aggregation(**arguments)])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        moved = message.content.array_records["arrays"].map(lambda v: v + v.dtype.type(context.node_id / 16))
        metrics = MetricRecord({"num-examples": 1})
        content = RecordDict({"arrays": moved})
        content["metrics"] = metrics
        return Message(content, reply_to=message)

    return app


def simulate(nodes: int, protocol: OneShot, app: ClientApp | None = None, **arguments: Any) -> RunResult:
    server = ServerApp()

    @server.main()
    def main(grid: Any, context: Context) -> None:
        stage = SecureStage(protocol, max_weight=1, **arguments)
        FedAvg(fraction_evaluate=0, min_train_nodes=2, stage=stage).start(grid, MODEL, 1)

    return run_simulation(server, app or client_app(), nodes, seed=1)


def check(result: RunResult, nodes: int, step: float) -> None:
    assert result.arrays is not None
    wanted = sum(range(1, nodes + 1)) / nodes / 16
    np.testing.assert_allclose(result.arrays["w"].view(), np.full(SIZE, wanted, np.float32), atol=step)


@pytest.mark.parametrize(
    ("nodes", "threshold"), [(2, None), (2, 2), (3, 0.67), (3, "majority"), (4, None), (9, "majority"), (30, 0.67)]
)
def test_a_threshold_is_all_it_takes(nodes: int, threshold: Any) -> None:
    """In the ring of 32 bits that SecureStage has by default: one entry a coefficient, 6.75 bytes of it."""
    count = nodes // 2 + 1 if threshold == "majority" else threshold
    result = simulate(nodes, OneShot(threshold=count))
    check(result, nodes, 1e-4)
    boxes = 5400 * (nodes - 1)
    assert result.traffic.bytes_up <= nodes * (6.9 * SIZE + boxes + 25_000)


@pytest.mark.parametrize("nodes", [2, 30])
def test_bounded_sums_travel_at_half_the_size(nodes: int) -> None:
    """The stage's layout keeps every signed sum in the ring, which is what `bounded` promises: 2 x 21 bits fit."""
    result = simulate(nodes, OneShot(bounded=True), bits=21)
    check(result, nodes, 8 / (2**20 // nodes))  # one step of the grid
    boxes = 5400 * (nodes - 1)
    assert result.traffic.bytes_up <= nodes * (3.5 * SIZE + boxes + 25_000)


def test_a_number_has_a_committee_drawn() -> None:
    """A box for each of 8 members, not for each of 30 nodes, is what a node pays; one argument says so."""
    result = simulate(30, OneShot(threshold=6, committee=8))
    check(result, 30, 1e-4)
    assert result.traffic.bytes_up <= 30 * (6.9 * SIZE + 8 * 5400 + 25_000)


def test_a_committee_drawn_from_the_roster_and_pinned_on_the_nodes() -> None:
    """The seed is nobody's choice; a server that names other members gets nothing."""
    drawn = draw_committee(range(1, 31), 8, b"s" * 32)
    own = OneShot(threshold=6, committee=drawn, corrupt=3)
    app = client_app(protocols={"OneShot": own}, policy=Policy(min_neighbours=7))
    check(simulate(30, own, app), 30, 1e-4)
    other = OneShot(threshold=6, committee=tuple(range(1, 9)), corrupt=3)
    with pytest.raises(RunFailed, match="RemoteError"):
        simulate(30, other, app)


def test_a_server_may_pick_a_committee_only_if_it_is_safe_whoever_is_on_it() -> None:
    """Policy(corrupt=0.2) of 30 nodes: 6 may be corrupt, and all of them on the committee; 2t > m + 6."""
    app = client_app(policy=Policy(corrupt=0.2))
    check(simulate(30, OneShot(threshold=10, committee=tuple(range(1, 13)), corrupt=6), app), 30, 1e-4)
    with pytest.raises(RunFailed, match="RemoteError"):
        simulate(30, OneShot(threshold=7, committee=tuple(range(1, 9)), corrupt=5), app)
    with pytest.raises(RunFailed, match="cannot run"):
        simulate(30, OneShot(threshold=6, committee=(1, 2, 3, 4, 5, 6), corrupt=6), app)
