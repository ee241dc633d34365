"""The house rules that a linter does not check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = sorted(
    path
    for top in ("privfed", "protocols", "mods", "strategies")
    for path in (ROOT / top).rglob("*.py")
    if not any((ROOT / "privfed" / link) in path.parents for link in ("protocols", "mods", "strategies"))
)
BESIDE = sorted(path for top in ("proofs_tests", "benchmarks", "examples") for path in (ROOT / top).rglob("*.py"))
BANNED_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
BANNED_NAMES = re.compile(r"(^|_)(utils?|common|helpers?|base|manager)(_|$)")
IGNORED = re.compile(r"# *(type: *ignore|noqa)")
WITH_REASON = re.compile(r"# (?:type: ignore\[[a-z-]+(, ?[a-z-]+)*\]  # |noqa: [A-Z]+\d+ - )\w")


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", CODE + BESIDE, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_keeps_the_house_rules(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 450, "a file fits a sitting"
    for function in functions(path):
        assert (function.end_lineno or 0) - function.lineno < 60, f"{function.name} fits a screen"
    assert not BANNED_NAMES.search(path.stem), "the name says nothing"
    for number, line in enumerate(lines, 1):
        assert not IGNORED.search(line) or WITH_REASON.search(line), f"line {number} says why something is ignored"


@pytest.mark.parametrize(
    "ignored", ["type: ignore", "type:ignore[misc]", "type: ignore[misc]  #", "noqa", "noqa: E501"]
)
def test_an_ignore_comment_without_a_reason_is_found(ignored: str) -> None:
    line = f"total = first + second  # {ignored}"
    assert IGNORED.search(line) and not WITH_REASON.search(line)


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_unpickles_and_evaluates_nothing(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not BANNED_MODULES & {name.split(".")[0] for name in names}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec", "compile"}


def test_imports_go_down_the_floors() -> None:
    command = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([str(command)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
