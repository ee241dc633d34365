"""Eight processes at one queue: no task is handed out or counted twice, and none is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from proofs_tests.runtime.claim_campaign import AT_ONCE, claim

DATABASES = ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)]


def claimed_once(folder: Path, database: str, claims: int, workers: int, at_once: int = AT_ONCE) -> None:
    url = None
    if database == "postgres":
        from proofs_tests.runtime.postgres import server

        url = server().database()
    found = claim(folder, url, claims, workers, at_once=at_once)
    assert (found.claimed, found.answered, found.counted) == (claims, claims, claims), found.summary()
    assert (found.twice, found.missing) == (0, 0), found.summary()
    assert sum(mine > 0 for mine in found.by) > 1, "nobody competed"


@pytest.mark.parametrize("database", DATABASES)
def test_what_four_processes_claim_is_handed_out_once(tmp_path: Path, database: str) -> None:
    claimed_once(tmp_path, database, 1_200, 4, at_once=3)


@pytest.mark.long
@pytest.mark.parametrize("database", DATABASES)
def test_a_million_claims_by_eight_processes_are_handed_out_once(tmp_path: Path, database: str) -> None:
    claimed_once(tmp_path, database, 1_000_000, 8)
