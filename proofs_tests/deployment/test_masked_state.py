"""An app that keeps state, under secure aggregation, with a server that dies anywhere in a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from privfed import run_simulation
from privfed.runtime.app_folder import AppFolder
from privfed.runtime.run_folder import ENDED
from proofs_tests.deployment.kill_campaign import RANDOMNESS
from proofs_tests.deployment.kill_federation import Federation
from proofs_tests.deployment.small_node import fresh
from proofs_tests.deployment.stateful_app import write_app
from proofs_tests.deployment.waiting import eventually

STAGE, ROUND = 3, 12
"""Answers of a stage, and of a round, of three nodes."""
SEED = 9


@pytest.mark.parametrize(
    ("moment", "count"),
    [
        ("before-complete", ROUND + 2 * STAGE + 2),  # an input that was sent and not counted: the node answers again
        ("after-complete", ROUND + 3 * STAGE),  # all inputs are in the journal, and nobody is asked for one again
        ("before-round", 3),  # the session is over, and its round is not committed
    ],
)
def test_what_an_app_kept_goes_with_its_masked_input(moment: str, count: int, tmp_path: Path) -> None:
    rounds = 5
    app = write_app(tmp_path / "app", "masked")
    with Federation(tmp_path / "f", RANDOMNESS) as federation:
        (federation.points / f"superlink.{moment}").write_text(str(count))
        run = federation.submit(app, SEED, rounds)
        eventually(federation.link.is_dead, 90, federation.link)
        assert run.recorded_status.round == 1, "it died in the second round"
        federation.start_link()
        eventually(lambda: run.recorded_status.state in ENDED, 120, federation.link)
        found = run.restore()
        assert (run.path / "attempts").read_text() == "0 1"
    server, _ = fresh(app)
    _, client = fresh(app)
    config = {**AppFolder.open(app).config, "num-rounds": rounds}
    expected = run_simulation(server, client, 3, run_config=config, seed=SEED, insecure_test_randomness=RANDOMNESS)
    assert found == expected.checkpoint
