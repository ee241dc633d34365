"""A SuperLink killed before and after every commit of taking turns: the next one has a newer term, and all files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from privfed import failpoint

STEPS = [step for step in failpoint.STEPS["superlink"] if step.startswith("term")]
FILES = {"privacy_ledger.jsonl": "charged\n", "sessions/one.journal": "kept\n", "format": "1"}


@pytest.mark.postgres
def test_a_term_is_taken_once_whenever_its_taker_dies(tmp_path: Path) -> None:
    from proofs_tests.runtime.postgres import server

    moments = [f"{when}-{step}" for step in STEPS for when in ("before", "after")]
    # The row is laid once in the life of a database; all others share one, where terms go on.
    cases = [(moment, server().database(), tmp_path / moment) for moment in moments if "row" in moment]
    url = server().database()
    cases += [(moment, url, tmp_path / "all") for moment in moments if "row" not in moment]
    for folder in {folder for _, _, folder in cases}:
        for name, text in FILES.items():
            path = folder / "term-0000000000" / "runs" / "r" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    (tmp_path / "points").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "proofs_tests.deployment.tenure_nursery"],
        input=json.dumps([[moment, url, str(folder)] for moment, url, folder in cases]),
        env={**os.environ, failpoint.VARIABLE: str(tmp_path / "points")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    terms: dict[Path, int] = {}
    for line, (moment, _, folder) in zip(map(json.loads, done.stdout.splitlines()), cases, strict=True):
        assert line["moment"] == moment and line["struck"] and line["died"] == signal.SIGKILL, (line, done.stderr)
        assert line["lived"] == 0, (line, done.stderr)
        # Whoever dies before its term is committed has had none.
        none = moment in ("before-term-row", "after-term-row", "before-term-sessions", "after-term-sessions")
        began = 0 if none or moment == "before-term" else 1
        assert line["term"] == terms.get(folder, 0) + began + 1, moment
        assert (line["owner"], json.loads(line["addresses"])) == ("successor", {"fleet": "successor"})
        terms[folder] = line["term"]
    for folder, term in terms.items():
        (found,) = folder.glob("term-*")
        assert found.name == f"term-{term:010d}"
        for name, text in FILES.items():
            assert (found / "runs" / "r" / name).read_text() == text
