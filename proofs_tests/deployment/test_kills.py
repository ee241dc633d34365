"""Twenty kills of what a federation consists of, at failpoints and from outside; a thousand with the long tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from proofs_tests.deployment.kill_campaign import Tally, campaign

RECOVERY_SECONDS = 10.0


def judged(tally: Tally, kills: int, runs: int) -> None:
    assert not tally.faults, tally.summary()
    assert sum(tally.kills.values()) >= kills
    assert sum(tally.runs.values()) == runs


def test_twenty_kills_lose_nothing_and_count_nothing_twice(tmp_path: Path) -> None:
    # Five at a time: most meet a federation that recovers, and starting its processes is what takes the time.
    judged(campaign(tmp_path, 20, 2, 3, ("seeded", "charged"), together=5), 20, 2)


@pytest.mark.long
def test_a_thousand_kills_lose_nothing_and_count_nothing_twice(tmp_path: Path) -> None:
    tally = campaign(tmp_path, 1000, 51, 1)
    judged(tally, 1000, 51)
    found = sorted(tally.recoveries)
    assert found[int(0.95 * (len(found) - 1))] <= RECOVERY_SECONDS, tally.summary()
