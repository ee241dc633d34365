"""Eight processes at one queue: no task is handed out or counted twice, and none is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from proofs_tests.runtime.claim_campaign import claim

DATABASES = ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)]


def claimed_once(folder: Path, database: str, claims: int, workers: int) -> None:
    url = None
    if database == "postgres":
        from proofs_tests.runtime.postgres import server

        url = server().database()
    found = claim(folder, url, claims, workers)
    assert (found.claimed, found.answered) == (claims, claims), found.summary()
    assert (found.twice, found.missing) == (0, 0), found.summary()
    assert min(found.by) > 0, "one of the workers had nothing to do: it did not compete"


@pytest.mark.parametrize("database", DATABASES)
def test_what_four_processes_claim_is_handed_out_once(tmp_path: Path, database: str) -> None:
    claimed_once(tmp_path, database, 600, 4)


@pytest.mark.long
@pytest.mark.parametrize("database", DATABASES)
def test_a_million_claims_by_eight_processes_are_handed_out_once(tmp_path: Path, database: str) -> None:
    claimed_once(tmp_path, database, 1_000_000, 8)
