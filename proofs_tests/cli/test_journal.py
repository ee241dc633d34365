"""Logs of the long-lived processes: what a line says, in both forms, and what none ever says."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import logging, sys
from structlog.contextvars import bind_contextvars, bound_contextvars
from privfed.cli.journal import configure

configure(sys.argv[1])
log = logging.getLogger("privfed.node")
log.debug("not shown")
with bound_contextvars(run="20261128-1", node=3, task="abc"):
    log.warning("waits for %s", "the disk")
    with bound_contextvars(lease_token="t0ken-t0ken", Password="pa55word"):
        log.info("bound to a secret")
log.info("after")
def fail(private_key):
    raise ValueError("no such\\nthing")
try:
    fail("k3y-k3y")
except ValueError:
    log.exception("it failed")
"""


def lines(form: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, form], capture_output=True, text=True, check=True)
    assert not done.stdout
    return done.stderr.splitlines()


def test_machines_get_one_object_a_line() -> None:
    found = [json.loads(line) for line in lines("json")]
    assert [line["event"] for line in found] == ["waits for the disk", "bound to a secret", "after", "it failed"]
    first = found[0]
    assert {first[name] for name in ("run", "node", "task")} == {"20261128-1", 3, "abc"}
    assert (first["level"], first["logger"]) == ("warning", "privfed.node")
    assert first["time"].endswith("Z") and "T" in first["time"]
    assert not {"run", "node", "task"} & found[2].keys()
    assert "ValueError: no such\nthing" in found[3]["exception"]


def test_people_get_a_line_they_can_read() -> None:
    found = lines("text")
    first = next(line for line in found if "waits for the disk" in line)
    assert "warning" in first and "run=20261128-1" in first and "node=3" in first and "task=abc" in first
    assert "\x1b" not in "".join(found)  # no colours in a file
    assert "ValueError: no such" in "\n".join(found)


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_secret_and_no_local_variable_is_shown(form: str) -> None:
    text = "\n".join(lines(form))
    assert "t0ken" not in text and "pa55word" not in text and "***" in text
    assert "k3y-k3y" not in text  # source lines of a script given with -c are not shown, locals must not be
    assert "not shown" not in text


def test_the_core_install_needs_none_of_it() -> None:
    check = "import sys, privfed, privfed.runtime.simulation, privfed.cli.run; assert 'structlog' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
