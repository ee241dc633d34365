"""Ten thousand hostile frames at every listener of real processes; a million with the long tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from proofs_tests.deployment.hostile_wire import Seen, campaign

GROWTH_KIB = 64 << 10
PATIENCE = 5.0
"""Seconds within which a user is answered meanwhile, on a machine that does other things too."""


def judged(seen: Seen, output: list[str], frames: int) -> None:
    assert sum(seen.frames.values()) >= frames
    assert all(count > frames // 50 for count in seen.frames.values()), "every kind of frame was sent"
    assert seen.growth_kib <= GROWTH_KIB, seen.summary()
    assert seen.failed == 0 and max(seen.probes) < PATIENCE, seen.summary()
    for text in output:
        assert "Traceback" not in text
        assert "a request failed" not in text
        assert len(text) < 1 << 20, "a stranger does not fill the log"


def test_ten_thousand_hostile_frames_change_nothing(tmp_path: Path) -> None:
    judged(*campaign(tmp_path, 10_000, 1), 10_000)


@pytest.mark.long
def test_a_million_hostile_frames_change_nothing(tmp_path: Path) -> None:
    judged(*campaign(tmp_path, 1_000_000, 2), 1_000_000)
