"""The quickstart on three nodes in real processes, under all that protects it: the bits of the simulation."""

from __future__ import annotations

from pathlib import Path

from privfed import run_simulation
from privfed.runtime.app_folder import AppFolder
from privfed.runtime.control import ControlClient, Submission
from privfed.runtime.federation import open_app
from privfed.runtime.run_folder import ENDED, RunFolder
from proofs_tests.deployment.kill_federation import Federation
from proofs_tests.deployment.local_link import EXAMPLES
from proofs_tests.deployment.small_node import fresh
from proofs_tests.deployment.waiting import eventually

ROUNDS, SEED, RANDOMNESS = 3, 7, 5


def test_the_quickstart_gives_the_bits_of_the_simulation(tmp_path: Path) -> None:
    """Mutual TLS, SQLite, secure aggregation and the plan's noise, which a test may seed; then epsilon is infinite."""
    app = EXAMPLES / "quickstart"
    place = tmp_path / "f"
    with Federation(place, RANDOMNESS) as federation, ControlClient(federation.control, federation.user) as control:
        settings = {"num-rounds": str(ROUNDS), "baselines": "false"}
        name = control.submit(Submission(open_app(app, federation.user), settings, seed=SEED, nodes=3)).name
        run = RunFolder.open(place / "home" / "runs" / name)
        eventually(lambda: run.recorded_status.state in ENDED, 120, federation.link)
        assert run.recorded_status.state == "completed", run.recorded_status
        assert "INSECURE TEST: the noise" in federation.link.output
        found = run.restore()
        assert found is not None
        stages = [one["stage"] for one in run.operations if one["event"] == "stage" and one["round"] == 1]
        assert stages == ["advertise", "share", "mask", "reveal"], "each round was a session of secure aggregation"
        assert (place / "home" / "link.db").exists()
    server, client = fresh(app)
    config = {**AppFolder.open(app).config, "num-rounds": ROUNDS, "baselines": False}

    def simulated(randomness: int) -> object:
        return run_simulation(
            server, client, 3, run_config=config, seed=SEED, insecure_test_randomness=randomness
        ).checkpoint

    assert found == simulated(RANDOMNESS)
    assert [one["privacy"]["epsilon"] for one in found.metrics] == [float("inf")] * ROUNDS  # type: ignore[index]  # of JSON
    assert found != simulated(RANDOMNESS + 1), "the plan's noise is in the model"
