"""What nodes compute under a SuperLink on paper: the bits of the simulation, masked in the node if the app says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from privfed import Context, run_simulation
from privfed.cli.node_mod import node_wrap
from privfed.runtime.app_folder import AppFolder
from privfed.runtime.identity import SimulatedIdentities
from privfed.runtime.launcher import InlineLauncher, Launcher
from privfed.runtime.node_store import NodeStore
from privfed.runtime.policy import NodePolicy, SecureAggregation
from proofs_tests.deployment import odd_app
from proofs_tests.deployment.paper_fleet import RUN, PaperLink
from proofs_tests.deployment.paper_node import Place, confined, exchange, grid_of, running

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def processes(tmp_path: Path) -> Callable[[], Launcher]:
    return confined(tmp_path)


@pytest.mark.parametrize("isolation", ["inline", "subprocess"])
def test_an_example_gives_the_bits_of_the_simulation(
    isolation: str, tmp_path: Path, processes: Callable[[], Launcher]
) -> None:
    folder = AppFolder.open(EXAMPLES / "minimal")
    way: Callable[[], Launcher] = InlineLauncher if isolation == "inline" else processes
    config = {"num-rounds": 4}
    paper = PaperLink(folder.path, 2, config)  # type: ignore[arg-type]  # a UserConfig
    grid = grid_of(paper)
    with running(*(Place(paper, node, tmp_path / str(node), way) for node in (1, 2))):
        way().serve(folder.path, grid, Context(run_config=dict(config), seed=1), tmp_path / "server.txt")
    expected = run_simulation(*folder.load(), 2, run_config=config, seed=1)
    found = grid.recorder.restore()
    assert found is not None
    assert found.arrays == expected.arrays
    if isolation == "subprocess":
        assert "weight" in (tmp_path / "server.txt").read_text()
    paper.close()


def test_apps_mask_in_the_node_and_run_unchanged(tmp_path: Path, processes: Callable[[], Launcher]) -> None:
    """The app lists secure_aggregation itself; the node does it, and what it keeps is not in the app's process."""
    paper = PaperLink(EXAMPLES / "quickstart", 3, {})
    config = {**AppFolder.open(EXAMPLES / "quickstart").config, "num-rounds": 2, "local-steps": 2, "baselines": False}
    paper.grant = type(paper.grant)(RUN, "paper", paper.grant.bundle, config, 1, paper.grant.nodes)
    grid = grid_of(paper)
    places = [Place(paper, node, tmp_path / str(node), processes) for node in (1, 2, 3)]
    with running(*places, wrap=node_wrap(None)):
        processes().serve(EXAMPLES / "quickstart", grid, Context(run_config=config, seed=1), tmp_path / "server.txt")
    found = grid.recorder.restore()
    assert found is not None
    assert found.round == 2
    assert np.abs(found.arrays["0"].view()).max() > 0
    store = NodeStore(tmp_path / "1" / "state")
    with store._lock, store._blobs.transaction() as database:
        app, mods = database.execute("SELECT app, mods FROM nodes").fetchone()
        assert "secure_aggregation" in "".join(store._blobs.records(mods))
        assert app is None, "the app of this example keeps nothing, and the node's mod keeps nothing there"
    store.close()
    paper.close()


def test_active_secure_aggregation_gives_the_bits_of_the_simulation_and_the_app_no_key(
    tmp_path: Path, processes: Callable[[], Launcher]
) -> None:
    app = odd_app.write(tmp_path / "app", client=odd_app.ACTIVE_CLIENT, server=odd_app.ACTIVE_SERVER)
    config = {"rounds": 2}
    paper = PaperLink(app, 3, config)  # type: ignore[arg-type]  # a UserConfig
    grid = grid_of(paper)
    places = [Place(paper, node, tmp_path / str(node), processes) for node in (1, 2, 3)]
    identify = SimulatedIdentities((1, 2, 3))
    with running(*places, wrap=node_wrap(None), identity=identify, node_config={"apart": True}):
        processes().serve(app, grid, Context(run_config=dict(config), seed=1), tmp_path / "server.txt")
    expected = run_simulation(*AppFolder.open(app).load(), 3, run_config=config, seed=1)
    found = grid.recorder.restore()
    assert found is not None
    assert found.arrays == expected.arrays
    assert np.abs(found.arrays["0"].view()).max() > 0
    paper.close()


def test_a_node_that_is_given_other_settings_than_the_rest_gives_nothing(tmp_path: Path) -> None:
    """A run configuration of its own would make one node stand out in the sum; so would another app or seed."""
    app = odd_app.write(tmp_path / "app", client=odd_app.ACTIVE_CLIENT, server=odd_app.ACTIVE_SERVER)
    config = {"rounds": 1}
    paper = PaperLink(app, 4, config)  # type: ignore[arg-type]  # a UserConfig
    grid = grid_of(paper)
    places = [Place(paper, node, tmp_path / str(node)) for node in (1, 2, 3, 4)]
    identify = SimulatedIdentities((1, 2, 3, 4))
    with running(*places, wrap=node_wrap(None), identity=identify):
        places[3].fleet.told = lambda grant: replace(grant, run_config={"rounds": 1, "local-epochs": 9})
        InlineLauncher().serve(app, grid, Context(run_config=dict(config), seed=1), tmp_path / "server.txt")
    found = grid.recorder.restore()
    assert found is not None
    told = found.metrics[0]["train-replies"]
    assert told["valid"] == 3
    assert [(one["node"], one["cause"]) for one in told["excluded"]] == [
        (4, "stage mask: POLICY_REFUSED BindingMismatch")
    ]
    paper.close()


def test_a_node_whose_policy_is_weaker_than_the_apps_mod_says_so(tmp_path: Path) -> None:
    client = odd_app.CLIENT.replace(
        "app = ClientApp()",
        "from privfed.mods import secure_aggregation\nfrom privfed.protocols.session import Policy\n"
        "app = ClientApp(mods=[secure_aggregation(Policy(min_cohort=5))])",
    )
    paper = PaperLink(odd_app.write(tmp_path / "app", client=client), 1)
    with running(Place(paper, 1, tmp_path / "1"), wrap=node_wrap(None)):
        (reply,) = exchange(paper)
    assert (reply.error.code, reply.error.reason) == (8, "SecureAggregationRequired"), "the app's mod still refuses"
    policy = NodePolicy(secure_aggregation=SecureAggregation(required=True))
    with running(Place(paper, 1, tmp_path / "2"), wrap=node_wrap(policy)):
        (reply,) = exchange(paper)
    assert (reply.error.code, reply.error.reason) == (8, "SecureAggregationRequired"), "the node's does before it"
    paper.close()
