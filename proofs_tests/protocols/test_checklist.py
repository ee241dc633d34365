"""The table of attacks in docs/secure-aggregation.md names tests that exist, and has all 23 rows."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
TABLE = (TESTS.parent / "docs" / "secure-aggregation.md").read_text(encoding="utf-8").splitlines()


def test_every_attack_has_a_check_and_tests_that_exist() -> None:
    known: dict[str, set[str]] = {}
    numbers = []
    for line in TABLE:
        row = re.match(r"\| (\d+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", line)
        if row is None:
            continue
        numbers.append(int(row[1]))
        named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", row[4])
        assert named, f"row {row[1]} names no test"
        for file, test in named:
            if file not in known:
                tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
                known[file] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert test in known[file], f"row {row[1]}: {file} has no {test}"
    assert numbers == list(range(1, 24))
