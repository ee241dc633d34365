"""The audit log: whatever is done to a file of it shows."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.runtime.audit_log import AuditError, AuditLog, Verified, verify_log
from privfed.runtime.federation_run import round_facts
from proofs_tests.deployment.local_link import EXAMPLES, LocalLink, nodes_at

KEY = bytes(range(32))


def written(path: Path, lines: int = 5) -> Verified:
    with AuditLog(path, KEY) as log:
        for number in range(lines):
            log.record("run-started", run=number, app="toy", nodes=[1, 2, 3])
    return verify_log(path)


def test_a_log_holds_what_was_recorded(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    found = written(path)
    assert (found.lines, found.cut) == (6, 0)
    again = written(path)
    assert again.lines == 11
    assert path.stat().st_mode & 0o777 == 0o600
    assert verify_log(path, key=again.key) == again
    with pytest.raises(AuditError, match="not signed by"):
        verify_log(path, key="00" * 31 + "01")
    with pytest.raises(AuditError, match="not signed by"):
        AuditLog(path, bytes(32))


_LOG = b""


def _log(folder: Path) -> bytes:
    global _LOG
    if not _LOG:
        written(folder / "made.jsonl", 3)
        _LOG = (folder / "made.jsonl").read_bytes()
    return _LOG


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_flipped_byte_shows(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp()
    raw = _log(folder)
    # Lengths vary with the clock's digits, so a place is drawn as a fraction.
    at = int(data.draw(st.floats(0, 1, exclude_max=True)) * (len(raw) - 1))
    changed = bytearray(raw)
    changed[at] ^= data.draw(st.integers(1, 255))
    path = folder / f"flip-{secrets.token_hex(4)}.jsonl"
    path.write_bytes(bytes(changed))
    try:
        with pytest.raises(AuditError):
            verify_log(path)
    finally:
        path.unlink()


def test_one_that_is_opened_again_is_checked_but_for_the_signatures_that_the_last_one_covers(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    written(path)
    raw = path.read_bytes()
    *early, last = raw.splitlines(keepends=True)
    covered, start = set[int](), 0
    for line in early:
        first = start + line.index(b'"signature":"') + len(b'"signature":"')
        covered |= set(range(first, first + 128))
        start += len(line)
    assert len(covered) == 128 * len(early) and last
    for at in range(0, len(raw) - 1, 7):  # without its newline the last line is one that was not finished
        path.write_bytes(raw[:at] + bytes((raw[at] ^ 1,)) + raw[at + 1 :])
        if at in covered:
            AuditLog(path, KEY).close()
        else:
            with pytest.raises(AuditError):
                AuditLog(path, KEY)
        if at % 49 == 0:
            with pytest.raises(AuditError):
                verify_log(path)
    path.write_bytes(raw)
    with pytest.raises(AuditError, match="not signed by"):
        AuditLog(path, bytes(32))


def test_lines_taken_out_put_in_or_moved_show(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    written(path)
    lines = path.read_bytes().splitlines(keepends=True)
    for name, changed in {
        "out": lines[:2] + lines[3:],
        "in": [*lines[:3], lines[2], *lines[3:]],
        "moved": [lines[0], lines[2], lines[1], *lines[3:]],
        "head": lines[1:],
    }.items():
        path.write_bytes(b"".join(changed))
        with pytest.raises(AuditError, match=r"follow|public key"):
            verify_log(path)
        assert name


def test_a_cut_tail_shows_against_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with AuditLog(path, KEY) as log:
        log.record("a")
        early = log.checkpoint()
        log.record("b")
        late = log.checkpoint()
    assert verify_log(path, checkpoint=early).lines == verify_log(path, checkpoint=late).lines == 3
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]))
    assert verify_log(path).lines == 2  # a cut at a line's end cannot show without one
    assert verify_log(path, checkpoint=early).lines == 2
    with pytest.raises(AuditError, match="tail was cut"):
        verify_log(path, checkpoint=late)
    with pytest.raises(AuditError, match="checkpoint"):
        verify_log(path, checkpoint=late.replace(b'"number":2', b'"number":1'))


def test_a_log_forged_as_a_whole_is_another_keys(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    found = written(path)
    path.unlink()
    with AuditLog(path, bytes(32)) as log:
        log.record("a")
    assert verify_log(path).key != found.key
    with pytest.raises(AuditError, match="not signed by"):
        verify_log(path, key=found.key)


def test_what_does_not_belong_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with AuditLog(path, KEY) as log:
        before = path.read_bytes()
        for bad in (
            {"x": "y" * 3_000},
            {"x": b"bytes"},
            {"x": float("nan")},
            {"x": {"a": 1}},
            {"x": list(range(2_000))},
        ):
            with pytest.raises(ValueError, match="field"):
                log.record("a", **bad)  # type: ignore[arg-type]  # what is under test
        with pytest.raises(ValueError, match="event"):
            log.record("No spaces")
        assert path.read_bytes() == before


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with AuditLog(tmp_path / "audit.jsonl", KEY), pytest.raises(AuditError, match="another process"):
        AuditLog(tmp_path / "audit.jsonl", KEY)


_WRITER = """
import sys
from pathlib import Path
from privfed.runtime.audit_log import AuditLog
log = AuditLog(Path(sys.argv[1]), bytes(range(32)))
number = 0
while True:
    log.record("tick", number=number)
    print(number, flush=True)
    number += 1
"""


def test_a_kill_loses_no_acknowledged_line(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            told = [writer.stdout.readline() for _ in range(20)]
            os.kill(writer.pid, signal.SIGKILL)
            told += writer.stdout.readlines()
        acknowledged = int([line for line in told if line.endswith(b"\n")][-1])
        lines = path.read_bytes().splitlines()
        ticks = [line for line in lines if b'"tick"' in line]
        assert f'"number":{acknowledged}'.encode() in b"".join(ticks[-2:])
        with AuditLog(path, KEY):
            pass
        assert verify_log(path).cut == 0


def test_an_unfinished_line_is_cut_and_said(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    written(path)
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[-1][:40])
    assert verify_log(path).cut == 40
    with AuditLog(path, KEY) as log:
        log.record("after")
    assert path.read_bytes().startswith(whole)
    assert b'"tail-cut"' in path.read_bytes()
    assert verify_log(path).lines == 8


def test_a_log_that_was_closed_writes_into_no_other_file(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", KEY)
    log.close()
    with (tmp_path / "other").open("wb") as other:  # it may get the number that the log's file had
        with pytest.raises(OSError, match="Bad file descriptor"):
            log.record("late")
        log.close()
        other.write(b"x")
    assert (tmp_path / "other").read_bytes() == b"x"
    assert verify_log(tmp_path / "audit.jsonl").lines == 1


def test_a_superlink_notes_each_round_its_cohort_and_its_charge(tmp_path: Path) -> None:
    with LocalLink(tmp_path) as link, nodes_at(link.fleet, 2):
        name = link.submit(EXAMPLES / "minimal", 2, num_rounds=3)
        assert link.wait(name).state == "completed"
    lines = [msgspec.json.decode(line) for line in (tmp_path / "audit.jsonl").read_bytes().splitlines()]
    rounds = [line["fields"] for line in lines if line["event"] == "round-committed"]
    assert rounds[0] == {"run": name, "round": 0}, "the model that it begins with"
    asked = {"train-nodes": 2, "train-valid": 2}
    assert rounds[1:] == [{"run": name, "round": number, **asked} for number in (1, 2, 3)]
    assert verify_log(tmp_path / "audit.jsonl").lines == len(lines)


NUMBERS = st.integers() | st.floats() | st.booleans() | st.text(max_size=4) | st.none() | st.lists(st.integers())
REPLIES = st.dictionaries(st.sampled_from(["nodes", "valid", "excluded"]), NUMBERS)
CHARGES = st.dictionaries(st.sampled_from(["epsilon", "delta", "cohort", "noise-multiplier", "clip"]), NUMBERS)


@settings(max_examples=200, deadline=None)
@given(train=REPLIES | NUMBERS, privacy=CHARGES | NUMBERS)
def test_whatever_an_app_tells_of_a_round_fits_a_line(
    tmp_path_factory: pytest.TempPathFactory, train: object, privacy: object
) -> None:
    told = round_facts({"train-replies": train, "privacy": privacy, "train": {"loss": 1.0}})
    assert set(told) <= {"train-nodes", "train-valid", *(f"plan-{name}" for name in PLAN)}, "nothing else of the app's"
    path = tmp_path_factory.mktemp("told") / "audit.jsonl"
    with AuditLog(path, KEY) as log:
        log.record("round-committed", run="r", round=1, **told)
    assert verify_log(path).lines == 2


PLAN = ("epsilon", "delta", "noise-multiplier", "cohort")
