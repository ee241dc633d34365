"""Two SuperLinks on one PostgreSQL serve one federation: either may die, hang, or lose its database, at any moment."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from privfed import ArrayRecord, Message, RecordDict, run_simulation
from privfed.cli.remote import follow
from privfed.privacy.ledger import Ledger
from privfed.runtime.control import ControlClient, Submission
from privfed.runtime.database import open_database
from privfed.runtime.federation import open_app
from privfed.runtime.tenure import LOST, Tenure, TenureError
from privfed.runtime.term_folder import take_folder
from proofs_tests.deployment.hostile_wire import Seen, bytes_at, calls, noise, probing
from proofs_tests.deployment.local_link import EXAMPLES, nodes_at
from proofs_tests.deployment.node_process import nodes_in
from proofs_tests.deployment.pair import Pair
from proofs_tests.deployment.small_node import fresh
from proofs_tests.deployment.stateful_app import write_app
from proofs_tests.deployment.superlink_process import SuperExecProcess
from proofs_tests.deployment.waiting import eventually
from proofs_tests.runtime.postgres import Postgres

RECOVERY_SECONDS = 20.0
"""To the next committed round: the lease, the start, and the time of a loaded machine."""


@cache
def killed_server() -> Postgres:
    """Return a server of these tests' own: one that is killed reads every database of its again before it answers."""
    return Postgres()


def database() -> str:
    return killed_server().database()


def through(
    folder: Path, rounds: int, blows: list[Callable[[Pair], None]], kind: str = "plain", isolation: str = "inline"
) -> tuple[list[float], Path]:
    """Run a stateful app over two nodes while the SuperLinks suffer; see that nothing shows. Return the recoveries.

    Each node prefers another SuperLink, and the run is submitted to the one that passes calls on. isolation: of both;
    with "external" each has a superexec of its own.
    """
    app = write_app(folder / "app", kind)
    recoveries = []
    with ExitStack() as stack:
        pair = stack.enter_context(Pair(folder, database(), isolation))
        for home in (pair.active.home, pair.other.home) if isolation == "external" else ():
            stack.enter_context(SuperExecProcess(home, home / "exec.txt"))
        stack.enter_context(nodes_in(folder, pair.fleets))
        with ControlClient(pair.other.control) as control:
            settings = {"num-rounds": str(rounds)}
            name = control.submit(Submission(open_app(app), settings, seed=3, nodes=2)).name
        eventually(lambda: pair.other.metric("connections_passed_on") >= 1, 60)
        identity = pair.run(name).config["run-id"]
        for number, blow in enumerate(blows, 1):
            goal = rounds * number // (len(blows) + 2)
            eventually(lambda goal=goal: pair.round(name) >= goal, 90)
            blow(pair)
            reached, began = pair.round(name), time.monotonic()
            eventually(lambda reached=reached: pair.round(name) > reached, RECOVERY_SECONDS)
            recoveries.append(time.monotonic() - began)
        with ControlClient(pair.controls[1]) as control:
            assert follow(control, name, lambda event, fields: None) == ("completed", "")
            assert [row.name for row in control.runs()] == [name]
        run = pair.run(name)
        found = run.restore()
        assert found is not None and found.round == rounds and run.config["run-id"] == identity
        if kind == "plain":  # what a node keeps weighs in: a reply counted twice, or none, would show
            server, client = fresh(app)
            expected = run_simulation(server, client, 2, run_config={"num-rounds": rounds}, seed=3).checkpoint
            assert expected is not None
            assert found.arrays == expected.arrays and found.metrics == expected.metrics
    return recoveries, run.path


def kill_the_active(pair: Pair) -> None:
    """The other takes over; started again at once, the one that was killed might have been the sooner of the two."""
    pair.active.signal(signal.SIGKILL)
    pair.await_service(pair.other)
    pair.change()
    pair.other.start()


def kill_the_other(pair: Pair) -> None:
    """The one that passes calls on; whoever was connected to it goes to the one that serves."""
    pair.other.signal(signal.SIGKILL)
    pair.other.start()


def kill_at(moment: str) -> Callable[[Pair], None]:
    """Return a blow at a failpoint of taking turns: of the holder's, or of its successor's as it takes over."""

    def blow(pair: Pair) -> None:
        held = "renewal" in moment or "end" in moment
        victim = pair.active if held else pair.other
        eventually(pair.other.stands_by, 60)
        victim.die_at(moment)
        if "end" in moment:
            victim.signal(signal.SIGTERM)
        elif not held:
            pair.active.signal(signal.SIGKILL)
        victim.await_death()
        if not held:
            pair.other.start()
        pair.change()
        pair.other.start()
        await_one(pair)

    return blow


def await_one(pair: Pair) -> None:
    """Wait until one of both serves, and note which."""

    def serves() -> bool:
        if pair.other.serves() and not pair.active.serves():
            pair.change()
        return pair.active.serves()

    eventually(serves, 60)


def freeze_the_active(pair: Pair) -> None:
    """Stop it past its lease; the other takes over; then it wakes, may not go on, and ends."""
    frozen = pair.active
    frozen.signal(signal.SIGSTOP)
    pair.await_service(pair.other)
    pair.change()
    time.sleep(0.3)
    frozen.signal(signal.SIGCONT)
    assert frozen.process is not None and frozen.process.wait(10) == LOST
    assert "another SuperLink has taken over" in frozen.output
    frozen.start()


def kill_the_database(pair: Pair) -> None:
    killed_server().kill()
    time.sleep(0.5)
    killed_server().start()
    await_one(pair)
    for member in (pair.active, pair.other):
        if member.process is not None and member.process.poll() == LOST:
            member.start()


@pytest.mark.postgres
def test_either_may_be_killed_or_frozen_and_its_database_too(tmp_path: Path) -> None:
    blows = [kill_the_other, kill_the_active, freeze_the_active, kill_the_database]
    through(tmp_path, 60, blows)


@pytest.mark.postgres
def test_the_one_that_takes_over_has_its_apps_run_by_a_superexec_of_its_own(tmp_path: Path) -> None:
    _, run = through(tmp_path, 12, [kill_the_active], "private", "external")
    assert_charged(run, 12)
    launches = [(tmp_path / name / "exec.txt").read_text().count("started process") for name in ("a", "b")]
    assert all(launches), "first one's, then the other's"


@pytest.mark.postgres
def test_privacy_is_charged_for_every_round_that_was_released(tmp_path: Path) -> None:
    rounds = 30
    _, path = through(tmp_path, rounds, [freeze_the_active, kill_the_active], "private")
    assert_charged(path, rounds)


def assert_charged(run: Path, rounds: int) -> None:
    """See that every round was charged, and no more often than the run was started."""
    ledger = Ledger.read(run / "privacy_ledger.jsonl")
    charged = [entry.round for entry in ledger.entries]
    assert set(charged) == set(range(1, rounds + 1))
    attempts = len((run / "attempts").read_text().split())
    assert rounds <= len(charged) <= rounds + attempts


@pytest.mark.postgres
@pytest.mark.long
def test_killed_and_frozen_again_and_again(tmp_path: Path) -> None:
    rng = random.Random(5)
    kinds = [kill_the_active, kill_the_active, freeze_the_active, kill_the_other, kill_the_database]
    recoveries, _ = through(tmp_path, 400, [rng.choice(kinds) for _ in range(16)])
    assert len(recoveries) == 16


@pytest.mark.postgres
@pytest.mark.long
@pytest.mark.parametrize("private", [False, True], ids=["bits", "charges"])
def test_killed_at_every_moment_of_taking_turns(tmp_path: Path, private: bool) -> None:
    """With a run going on; `test_tenure_kills` sees what is left of the row and the folder at each."""
    # Only a run with a ledger or journals has anything that a successor copies.
    steps = ["term-sessions", "term", "term-folder", *(["term-copy"] if private else []), "term-renewal", "term-end"]
    blows = [kill_at(f"{when}-{step}") for step in steps for when in ("before", "after")]
    recoveries, path = through(tmp_path, 84, blows, "private" if private else "plain")
    assert len(recoveries) == len(blows)
    if private:
        assert_charged(path, 84)


@pytest.mark.postgres
def test_a_hostile_network_gets_no_further_through_the_one_that_passes_on(tmp_path: Path) -> None:
    """Both stay well and small while the one that stands by gets frames, bytes, and what looks like our calls."""
    rng, seen = random.Random(7), Seen()
    with Pair(tmp_path, database()) as pair:
        pids = [member.process.pid for member in (pair.active, pair.other) if member.process is not None]
        with probing(pair.other.control, seen, pids):
            sent = 0
            while sent < 4_000:
                sent += calls(rng, "Fleet", pair.other.fleet) + calls(rng, "Control", pair.other.control)
                sent += noise(rng, pair.other.fleet) + bytes_at(rng, pair.other.control)
        assert seen.failed == 0 and seen.probes, seen.summary()
        assert seen.growth_kib <= 64 << 10, seen.summary()
        assert pair.other.metric("calls_passed_on_total") > len(seen.probes) + 20, "some of it was passed on"
        for member in (pair.active, pair.other):
            assert "Traceback" not in member.output and "a request failed" not in member.output, member.output


@pytest.mark.postgres
def test_a_term_that_is_over_commits_nothing(tmp_path: Path) -> None:
    from privfed.runtime.sqlstore import SqlStore

    url, told = database(), []
    first = Tenure(url, "first", 1.0, told.append)
    folder = take_folder(tmp_path / "shared", first.await_turn())
    store = SqlStore(folder, first.url, fence=first.fence)
    store.create_run(1, [1])
    (folder / "runs").mkdir()
    first._over.set()  # it renews no more, as one that is frozen
    frozen = open_database(first.url)
    blocked = frozen.connect()  # and it holds a transaction open
    first.fence(blocked)
    second = Tenure(url, "second", 1.0)
    began = time.monotonic()
    assert second.await_turn() == 2
    assert time.monotonic() - began < 10
    with pytest.raises(TenureError, match="this is term 2, not 1"):
        store.create_run(2, [1])
    assert told
    moved = take_folder(tmp_path / "shared", 2)
    with pytest.raises(FileNotFoundError):
        (folder / "runs" / "x").write_text("late")
    late = Message(RecordDict({"a": ArrayRecord([np.zeros(1 << 15)])}), 1, "train").with_metadata(run_id=1)
    with pytest.raises(TenureError, match="this is term 2, not 1"):
        store.push(1, [late])  # its array has nowhere to go, and that is not what is told
    with pytest.raises(TenureError, match="another SuperLink has taken over"):
        take_folder(tmp_path / "shared", 1)
    successor = SqlStore(moved, second.url, fence=second.fence)
    assert [run.run_id for run in successor.runs()] == [1]
    for one in (store, successor):
        one.close()
    blocked.invalidate()
    frozen.dispose()
    first.resign()  # of a term that is over: nobody is turned out by it
    second.resign()
    third = Tenure(url, "third", 60.0)
    assert third.await_turn() == 3  # at once: the second let go
    third.resign()


def test_only_postgresql_is_shared(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "privfed.cli.main", "superlink", "--insecure", "--home", str(tmp_path / "home")]
    done = subprocess.run([*command, "--shared", str(tmp_path / "s")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "--shared goes with --database" in done.stderr, done.stderr


def test_one_address_of_several_that_answers_is_found(tmp_path: Path) -> None:
    from proofs_tests.deployment.local_link import LocalLink
    from proofs_tests.deployment.test_page import free_ports

    dead = f"127.0.0.1:{free_ports(1)[0]}"
    with LocalLink(tmp_path) as link, nodes_at(f"{dead},{link.fleet}", 2):
        with ControlClient(f"{dead},{link.control}") as control:
            assert control.runs() == ()
        name = link.submit(EXAMPLES / "minimal", 2, num_rounds=2)
        assert link.wait(name).state == "completed"
