"""Every commit and every send has a moment before it and one after it, and production knows none of them."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from privfed import failpoint

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("privfed/runtime", "privfed/cli", "strategies", "mods")
# What commits or sends, as it is written in the source, and where no failpoint is wanted, with the reason.
PRIMITIVES = (
    *("os.fsync", "os.fdatasync", ".begin()", '"COMMIT"', ".charge("),
    *("socket.send_fds", "context.write", ".sendall", "metadata=self._greeting"),
)
EXEMPT = {
    ("privfed/runtime/disk.py", "_replace"): "inside write_atomically, which has it",
    ("privfed/runtime/disk.py", "sync_folder"): "a part of a commit that has it",
    ("strategies/journal.py", "_replace"): "inside write_durably, which has it",
    ("privfed/runtime/database.py", "alone"): "its callers name what they commit",
    ("privfed/runtime/database.py", "_migrate"): "done before anything is served",
    ("privfed/runtime/database.py", "_version"): "it only reads",
    ("privfed/runtime/channel.py", "_write"): "its callers name what they send",
    ("privfed/runtime/app_process.py", "start_process"): "the limits of a process that has done nothing yet",
    ("privfed/runtime/superexec.py", "_say"): "its callers name what they send",
    ("privfed/runtime/authority.py", "write_secret"): "`privfed keys`, which serves nobody",
    ("privfed/runtime/authority.py", "_log"): "`privfed keys`, which serves nobody",
    ("privfed/runtime/audit_log.py", "own_key"): "once, before the log has a line",
    ("privfed/runtime/fleet.py", "ask"): "inside _call, which has it",
    ("privfed/runtime/fleet.py", "_open"): "the greeting it sends is made inside, and has it",
    ("strategies/strategy.py", "_run_privately"): "Release.charge, which has it around the ledger",
    ("strategies/analytics.py", "_ask_privately"): "Release.charge, which has it around the ledger",
    ("strategies/secure.py", "_authorise"): "Release.charge, which has it around the ledger",
    ("mods/budget.py", "count"): "Purse.charge, which has it around the ledger",
    ("mods/budget.py", "_open"): "a ledger in memory, of a simulation",
}


def functions() -> Iterator[tuple[str, str, str]]:
    """Yield (file, function, source) of every function; what a function defines inside is not part of its source."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text()
            lines = text.splitlines()
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    own = set(range(node.lineno - 1, node.end_lineno or 0))
                    for one in ast.walk(node):
                        if one is not node and isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef):
                            own -= set(range(one.lineno - 1, one.end_lineno or 0))
                    body = "\n".join(lines[at] for at in sorted(own))
                    yield path.relative_to(ROOT).as_posix(), node.name, body


def steps_in_source() -> set[str]:
    """Return every step that the source names, in whatever way."""
    found = set()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if not (isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)):
                    continue
                name = ast.unparse(node.func).rpartition(".")
                named = name[2] in ("around", "transaction", "_transaction") or name[0] == "gate"
                if named and isinstance(node.args[0].value, str):
                    found.add(node.args[0].value)
    return found


def test_every_step_of_the_list_is_in_the_source_and_the_other_way_round() -> None:
    listed = {step for steps in failpoint.STEPS.values() for step in steps}
    assert steps_in_source() == listed


def test_every_commit_and_every_send_is_inside_a_failpoint() -> None:
    bare = {
        (path, name)
        for path, name, body in functions()
        if any(primitive in body for primitive in PRIMITIVES)
        and not any(word in body for word in ("around(", "reach("))
    }
    assert bare == set(EXEMPT), "put it between failpoints, or say here why it needs none"


def test_a_failpoint_ends_the_process_once_at_the_time_it_was_told(tmp_path: Path) -> None:
    code = (
        "from privfed import failpoint; failpoint.take_up('node')\n"
        "for n in range(5):\n    with failpoint.around('send'): print(n, flush=True)\n"
    )

    def run(**env: str) -> tuple[int, list[str]]:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, check=False
        )
        return done.returncode, done.stdout.split()

    (tmp_path / "node.after-send").write_text("3")
    (tmp_path / "superlink.before-send").touch()
    assert run() == (0, list("01234")), "without the variable nothing happens, whatever lies about"
    assert run(PRIVFED_FAILPOINTS=str(tmp_path)) == (-signal.SIGKILL, list("012"))
    assert run(PRIVFED_FAILPOINTS=str(tmp_path)) == (0, list("01234"))
    assert [path.name for path in tmp_path.iterdir()] == ["superlink.before-send"], "of another role: not its business"


def test_a_step_that_fails_does_not_reach_the_moment_after_it() -> None:
    passed: list[str] = []
    failpoint.install(passed.append)
    try:
        with pytest.raises(OSError, match="full"), failpoint.around("file"):
            raise OSError("full")
        with failpoint.around("push"):
            passed.append("-")
    finally:
        failpoint.install(None)
    assert passed == ["before-file", "before-push", "-", "after-push"]
