"""A charge is durable before it is acknowledged, never lost, never doubled, and refused before it is too much."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.privacy import ledger as module
from privfed.privacy.accountant import Accountant
from privfed.privacy.calibration import calibrate
from privfed.privacy.events import Gaussian, PoissonSampled
from privfed.privacy.filters import Budget, BudgetExceeded
from privfed.privacy.ledger import Entry, Ledger, LedgerBusy, LedgerCorrupt, LedgerError, Terms

EVENT = Gaussian(noise_multiplier=10.0)
TERMS = Terms(owner="node 1", budget=Budget(epsilon=3.0, delta=1e-6))


def mark(text: object) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()


def charge(book: Ledger, number: int, **more: object) -> Entry:
    arguments = {"run": "a", "round": number, "transcript": mark(number), **more}
    return book.charge(EVENT, **arguments)  # type: ignore[arg-type]  # the tests vary single arguments


def epsilon_of(rounds: int) -> float:
    accountant = Accountant(unit="client", relation="add_remove", observer="output")
    accountant.step(EVENT, count=rounds)
    return accountant.epsilon(1e-6).upper


# --- spending ---------------------------------------------------------------------------------------------------


def test_spending_is_what_the_accountant_says() -> None:
    book = Ledger.create(None, TERMS)
    for number in range(5):
        entry = charge(book, number)
        assert entry.spent == pytest.approx(epsilon_of(number + 1), rel=1e-9)
        assert book.spent == entry.spent
    assert book.measure == "epsilon"
    assert book.limit == 3.0


def test_the_round_that_would_exceed_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "l", TERMS) as book:
        for number in range(1000):
            try:
                charge(book, number)
            except BudgetExceeded:
                break
        before = (tmp_path / "l").read_bytes()
        assert number > 5
        assert refusal_fields(book, number) == (book.spent, 3.0)
        assert book.spent <= 3.0 < epsilon_of(number + 1)
        assert (tmp_path / "l").read_bytes() == before
        assert len(book.entries) == number
        small = book.charge(Gaussian(1e6), run="a", round=number, transcript=mark("small"))  # what still fits is taken
        assert small.spent <= 3.0


def refusal_fields(book: Ledger, number: int) -> tuple[float, float]:
    with pytest.raises(BudgetExceeded, match="budget of node 1 exceeded") as caught:
        charge(book, number)
    assert caught.value.after > caught.value.limit
    return caught.value.spent, caught.value.limit


def test_a_calibrated_plan_runs_to_its_last_round() -> None:
    """Noise calibrated to the budget is not refused by a wider bracket, and one round more is."""
    z = calibrate(lambda z: PoissonSampled(0.1, Gaussian(z)), count=20, epsilon=3.0, delta=1e-6)
    book, event = Ledger.create(None, TERMS), PoissonSampled(0.1, Gaussian(z))
    book.charge(event, run="a", round=0, transcript=mark(0), count=19)
    book.charge(event, run="a", round=19, transcript=mark(19))
    with pytest.raises(BudgetExceeded):
        book.charge(event, run="a", round=20, transcript=mark(20))
    assert 2.99 < book.spent <= 3.0


def test_the_same_charge_is_made_once() -> None:
    book = Ledger.create(None, TERMS)
    first = charge(book, 0)
    assert charge(book, 0) == first
    assert len(book.entries) == 1
    for more in ({"attempt": 1}, {"transcript": mark("other cohort")}, {"run": "b"}, {"round": 1}):
        charge(book, 0, **more)
    assert len(book.entries) == 5
    assert book.spent == pytest.approx(epsilon_of(5), rel=1e-9)


def test_the_same_key_for_something_else_is_refused() -> None:
    book = Ledger.create(None, TERMS)
    charge(book, 0)
    with pytest.raises(ValueError, match=r"^event:"):
        book.charge(Gaussian(20.0), run="a", round=0, transcript=mark(0))
    with pytest.raises(ValueError, match=r"^event:"):
        charge(book, 0, count=2)
    assert len(book.entries) == 1


def test_an_infinite_budget_only_records() -> None:
    book = Ledger.create(None, Terms(owner="x", budget=Budget(epsilon=math.inf, delta=1e-6)))
    book.charge(Gaussian(0.0), run="a", round=0, transcript=mark(0))
    assert book.spent == math.inf
    assert book.replay().agrees


def test_no_noise_exceeds_any_finite_budget() -> None:
    book = Ledger.create(None, TERMS)
    with pytest.raises(BudgetExceeded):
        book.charge(Gaussian(0.0), run="a", round=0, transcript=mark(0))


def test_runs_and_periods_can_be_read_apart() -> None:
    book = Ledger.create(None, TERMS)
    for number in range(4):
        charge(book, number, run="a" if number < 3 else "b", period="may" if number < 1 else "june")
    assert book.spent_where(lambda entry: entry.run == "a") == pytest.approx(epsilon_of(3), rel=1e-9)
    assert book.spent_where(lambda entry: entry.period == "may") == pytest.approx(epsilon_of(1), rel=1e-9)
    assert book.spent_where(lambda entry: False) == 0


@pytest.mark.parametrize(
    ("budget", "measure"),
    [
        (Budget(3.0, 1e-6, "zcdp"), "rho"),
        (Budget(3.0, 1e-6, "renyi", 12.0), "divergence"),
        (Budget(3.0, 1e-6, "gdp"), "mu^2"),
    ],
)
def test_filters_keep_the_budget_too(budget: Budget, measure: str, tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "l", Terms(owner="x", budget=budget)) as book, pytest.raises(BudgetExceeded):
        for number in range(1000):
            charge(book, number)
    again = Ledger.read(tmp_path / "l")
    assert again.measure == measure
    assert 0 < again.spent <= again.limit
    assert again.replay().agrees
    assert epsilon_of(len(again.entries)) <= 3.0


# --- files ------------------------------------------------------------------------------------------------------


def filled(path: Path, rounds: int) -> list[Entry]:
    with Ledger.create(path, TERMS) as book:
        for number in range(rounds):
            charge(book, number, attempt=number % 2, period="may")
        return list(book.entries)


def test_reopening_gives_the_same_ledger(tmp_path: Path) -> None:
    entries = filled(tmp_path / "l", 6)
    for book in (Ledger.read(tmp_path / "l"), Ledger.open(tmp_path / "l")):
        assert list(book.entries) == entries
        assert book.terms == TERMS
        assert not book.torn
        replay = book.replay()
        assert replay.agrees
        assert abs(replay.recomputed - replay.stored) <= 1e-9 * replay.stored
        book.close()


def test_terms_survive_the_file(tmp_path: Path) -> None:
    terms = Terms("n", Budget(math.inf, 1e-7, "renyi", 8.0), "record", "replace_one", "server")
    Ledger.create(tmp_path / "l", terms).close()
    assert Ledger.read(tmp_path / "l").terms == terms


def test_a_ledger_is_never_started_over(tmp_path: Path) -> None:
    filled(tmp_path / "l", 2)
    with pytest.raises(FileExistsError):
        Ledger.create(tmp_path / "l", TERMS)
    assert len(Ledger.read(tmp_path / "l").entries) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["l"]


def test_a_node_resumes_its_ledger_under_the_same_terms_only(tmp_path: Path) -> None:
    with Ledger.resume(tmp_path / "l", TERMS) as book:
        charge(book, 0)
    with Ledger.resume(tmp_path / "l", TERMS) as book:
        assert len(book.entries) == 1
    looser = Terms(owner="node 1", budget=Budget(epsilon=30.0, delta=1e-6))
    with pytest.raises(LedgerError, match="started under"):
        Ledger.resume(tmp_path / "l", looser)
    Ledger.open(tmp_path / "l").close()  # the refusal left no lock behind


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    filled(tmp_path / "l", 1)
    with Ledger.open(tmp_path / "l"):
        with pytest.raises(LedgerBusy):
            Ledger.open(tmp_path / "l")
        assert len(Ledger.read(tmp_path / "l").entries) == 1
    Ledger.open(tmp_path / "l").close()


def test_closed_and_read_only_ledgers_refuse_charges(tmp_path: Path) -> None:
    filled(tmp_path / "l", 1)
    opened = Ledger.open(tmp_path / "l")
    opened.close()
    for book in (opened, Ledger.read(tmp_path / "l")):
        with pytest.raises(LedgerError, match="closed or open for reading"):
            charge(book, 7)


def test_a_charge_is_synced_before_it_is_acknowledged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole line is in the file when fsync is called, and fsync is called before `charge` returns."""
    book = Ledger.create(tmp_path / "l", TERMS)
    seen: list[bytes] = []
    real = os.fsync

    def watching(handle: int) -> None:
        real(handle)
        seen.append((tmp_path / "l").read_bytes())

    monkeypatch.setattr(module.os, "fsync", watching)
    entry = charge(book, 0)
    assert len(seen) == 1
    assert seen[0].endswith(b"\n")
    assert entry.hash.encode() in seen[0]
    book.close()


def test_after_a_failed_sync_nothing_more_is_charged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = Ledger.create(tmp_path / "l", TERMS)

    def failing(handle: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fsync", failing)
        with pytest.raises(OSError, match="Input/output"):
            charge(book, 0)
    with pytest.raises(LedgerError):
        charge(book, 1)
    with Ledger.open(tmp_path / "l") as again:  # the line may have reached the disk: then it counts
        assert len(again.entries) == 1
        assert charge(again, 0) == again.entries[0]


def test_after_an_interrupted_charge_only_the_file_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the line is synced: the ledger closes, since a second line in its place would spoil the chain."""
    book = Ledger.create(tmp_path / "l", TERMS)
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fsync", lambda handle: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            charge(book, 0)
    with pytest.raises(LedgerError):
        charge(book, 1)
    with Ledger.open(tmp_path / "l") as again:
        assert charge(again, 0) == again.entries[0]
        assert charge(again, 1).sequence == 2
    assert len(Ledger.read(tmp_path / "l").entries) == 2


HOSTILE: list[tuple[int, dict[str, object]]] = [
    (1, {"relation": "any"}),
    (1, {"observer": 3}),
    (1, {"unit": ""}),
    (1, {"budget": {"delta": 2, "epsilon": 1.0, "filter": "zcdp", "order": None}}),
    (1, {"budget": None}),
    (2, {"count": -1}),
    (2, {"count": "many"}),
    (2, {"round": None}),
    (2, {"run": {}}),
    (2, {"transcript": 5}),
    (2, {"spent": -3.0}),
    (2, {"spent": "nan"}),
    (2, {"spent": []}),
    (2, {"event": []}),
    (2, {"event": {"event": "RandomizedResponse", "noise": 0.5, "categories": 2}}),
]


@pytest.mark.parametrize(("number", "fields"), HOSTILE)
def test_well_hashed_nonsense_is_named_by_its_line(tmp_path: Path, number: int, fields: dict[str, object]) -> None:
    filled(tmp_path / "l", 1)
    lines = [json.loads(line) for line in (tmp_path / "l").read_bytes().splitlines()]
    lines[number - 1].update(fields)
    written, previous = b"", None
    for line in lines:
        del line["hash"]
        sealed, digest = module._seal(line if previous is None else {**line, "previous": previous})
        written, previous = written + sealed, digest
    (tmp_path / "l").write_bytes(written)
    for look in (Ledger.open, Ledger.read):
        with pytest.raises(LedgerCorrupt, match=f"^line {number}: "):
            look(tmp_path / "l")


def test_every_torn_file_opens_without_losing_an_acknowledged_charge(tmp_path: Path) -> None:
    """Cut after any byte of the last line (and some before): whole lines count, and charging goes on from there."""
    filled(tmp_path / "l", 3)
    data = (tmp_path / "l").read_bytes()
    header = data.index(b"\n") + 1
    last = data.rindex(b"\n", 0, -1)
    for cut in [*range(header, last, 23), *range(last, len(data) + 1)]:
        torn = tmp_path / "torn"
        torn.write_bytes(data[:cut])
        whole = data[:cut].count(b"\n") - 1
        looked = Ledger.read(torn)
        assert (len(looked.entries), looked.torn) == (whole, data[cut - 1 : cut] != b"\n")
        if cut % 97 == 0:
            with Ledger.open(torn) as book:
                assert len(book.entries) == whole
                for number in range(3):
                    charge(book, number, attempt=number % 2, period="may")
            assert torn.read_bytes() == data


def test_a_file_without_its_header_is_refused(tmp_path: Path) -> None:
    filled(tmp_path / "l", 1)
    data = (tmp_path / "l").read_bytes()
    for cut in (0, 10, data.index(b"\n")):
        (tmp_path / "cut").write_bytes(data[:cut])
        with pytest.raises(LedgerCorrupt, match="line 1"):
            Ledger.open(tmp_path / "cut")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("edit")


@pytest.fixture(scope="module")
def two_charges(folder: Path) -> bytes:
    filled(folder / "whole", 2)
    return (folder / "whole").read_bytes()


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_changed_byte_is_noticed(two_charges: bytes, folder: Path, data: st.DataObject) -> None:
    content = bytearray(two_charges)
    place = data.draw(st.integers(0, len(content) - 2))  # the last newline is a torn line's business
    content[place] ^= data.draw(st.integers(1, 255))
    (folder / "l").write_bytes(content)
    with pytest.raises(LedgerError):
        Ledger.read(folder / "l")


def test_removed_swapped_and_repeated_lines_are_noticed(tmp_path: Path) -> None:
    filled(tmp_path / "l", 3)
    lines = (tmp_path / "l").read_bytes().splitlines(keepends=True)
    for order in ([0, 2, 3], [0, 1, 3], [0, 2, 1, 3], [0, 1, 1, 2, 3], [1, 2, 3], [0, 1, 2, 3, 3]):
        (tmp_path / "x").write_bytes(b"".join(lines[i] for i in order))
        with pytest.raises(LedgerCorrupt):
            Ledger.read(tmp_path / "x")


def test_a_shortened_ledger_has_another_head(tmp_path: Path) -> None:
    filled(tmp_path / "l", 3)
    head = Ledger.read(tmp_path / "l").head
    lines = (tmp_path / "l").read_bytes().splitlines(keepends=True)
    (tmp_path / "l").write_bytes(b"".join(lines[:-1]))
    assert Ledger.read(tmp_path / "l").head != head


def rewritten(path: Path, spent: float) -> None:
    """Write the ledger again with another stored amount and a chain that fits it."""
    lines = path.read_bytes().splitlines()
    fields = json.loads(lines[-1])
    del fields["hash"]
    line, _ = module._seal({**fields, "spent": spent})
    path.write_bytes(b"".join(one + b"\n" for one in lines[:-1]) + line)


def test_the_stored_amount_governs(tmp_path: Path) -> None:
    """A ledger written by a looser library keeps what it charged; replay says that the two differ."""
    filled(tmp_path / "l", 3)
    rewritten(tmp_path / "l", 2.5)
    with Ledger.open(tmp_path / "l") as book:
        assert book.spent == 2.5
        assert not book.replay().agrees
        assert charge(book, 3, attempt=1).spent >= 2.5


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"run": ""}, "run"),
        ({"run": 7}, "run"),
        ({"attempt": "first"}, "attempt"),
        ({"attempt": 1.0}, "attempt"),
        ({"count": True}, "count"),
        ({"count": 1.5}, "count"),
        ({"period": None}, "period"),
        ({"transcript": None}, "transcript"),
        ({"transcript": b"0" * 64}, "transcript"),
        ({"round": -1}, "round"),
        ({"attempt": -1}, "attempt"),
        ({"count": 0}, "count"),
        ({"transcript": "xyz"}, "transcript"),
        ({"transcript": "00"}, "transcript"),
        ({"transcript": "AB" * 32}, "transcript"),
    ],
)
def test_bad_charges_are_named(arguments: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}:"):
        charge(Ledger.create(None, TERMS), 0, **arguments)


# --- kill -9 ----------------------------------------------------------------------------------------------------


def test_killing_the_writer_never_loses_an_acknowledged_charge(tmp_path: Path) -> None:
    """SIGKILL a writer at random moments, reopen, go on: acknowledged <= stored <= acknowledged + 1 each time."""
    path = tmp_path / "l"
    Ledger.create(path, Terms(owner="x", budget=Budget(100.0, 1e-6, "zcdp"))).close()
    moments = random.Random(7)
    stored = 0
    for _ in range(6):
        writer = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("ledger_writer.py")), str(path)], stdout=subprocess.PIPE
        )
        assert writer.stdout is not None
        assert writer.stdout.read(1) == b"r"
        waited = moments.randrange(1, 12)  # charges, not time: a busy machine must not make this an idle test
        assert len(writer.stdout.read(waited)) == waited
        time.sleep(moments.uniform(0.0, 0.01))
        writer.kill()
        acknowledged = waited + len(writer.stdout.read())
        writer.stdout.close()
        writer.wait()
        with Ledger.open(path) as book:
            assert stored + acknowledged <= len(book.entries) <= stored + acknowledged + 1
            stored = len(book.entries)
            assert [entry.round for entry in book.entries] == list(range(stored))
            assert book.replay().agrees
        assert path.read_bytes().endswith(b"\n")
    assert stored > 20
