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
BANNED_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
BANNED_NAMES = re.compile(r"(^|_)(utils?|common|helpers?|base|manager)(_|$)")


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_keeps_the_house_rules(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 450, "a file fits a sitting"
    for function in functions(path):
        assert (function.end_lineno or 0) - function.lineno < 60, f"{function.name} fits a screen"
    assert not BANNED_NAMES.search(path.stem), "the name says nothing"
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not BANNED_MODULES & {name.split(".")[0] for name in names}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec", "compile"}


def test_imports_go_down_the_floors() -> None:
    command = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([str(command)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
