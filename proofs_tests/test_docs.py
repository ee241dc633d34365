"""The documents are true to the tree: every cited work is listed, every named file exists, nothing points outside."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
TAG = re.compile(r"(?<![A-Za-z0-9])([A-Z][A-Za-z]*(?:\+)?\d{2}|RFC\d{4}|Loader00|Peikert10)(?![A-Za-z0-9])")


def cited() -> dict[str, str]:
    """Tags in square brackets in docstrings, comments and documents, with one place each."""
    found: dict[str, str] = {}
    tops = ("protocols", "mods", "strategies", "privfed/privacy", "privfed/attacks", "privfed/audit")
    paths = [path for top in tops for path in (ROOT / top).rglob("*.py")]
    for path in [*paths, *DOCS]:
        for group in re.findall(r"\[([A-Z][^\]\[\n]{3,60})\]", path.read_text(encoding="utf-8")):
            for tag in TAG.findall(group):
                found.setdefault(tag, str(path.relative_to(ROOT)))
    return found


def test_every_cited_work_is_listed() -> None:
    listed = set(re.findall(r"^\| ([A-Za-z0-9+]+) \|", (ROOT / "docs" / "references.md").read_text(), re.M))
    missing = {tag: place for tag, place in cited().items() if tag not in listed}
    assert not missing
    assert len(cited()) > 30, "the pattern finds the citations"


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_files_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name in re.findall(
        r"`((?:docs|examples|benchmarks|proofs_tests|protocols|mods|strategies|privfed)/[\w./-]*)`", text
    ):
        assert (ROOT / name).exists(), f"{path.name} names {name}"
    for name in re.findall(r"\]\(((?!https?:|#)[^)]+)\)", text):
        assert (path.parent / name.split("#")[0]).exists(), f"{path.name} links to {name}"


def test_nothing_tracked_names_a_path_outside() -> None:
    pattern = r"/(work|root|farm|tmp/peers)/|\.library"
    found = subprocess.run(
        ["git", "grep", "-nIE", pattern, "--", ".", ":!proofs_tests/test_docs.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    assert found == ""
