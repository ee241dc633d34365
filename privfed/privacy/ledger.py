"""The ledger of one run or one node: a charge is durable before anything is released, and never forgotten.

A ledger is a file of JSON lines: a header that fixes whose budget it is and in which terms, then one line per charge.
Each line carries the hash of the line before, so an edit anywhere shows; `head` commits to the whole file and can
be kept elsewhere against truncation. A charge returns only after its line has been fsynced. Killing the process at
any point leaves either the whole line (the charge counts, whether or not it was acknowledged) or a part of a line that
was never acknowledged (it is cut off when the ledger is opened for writing). Charging again under the same
(run, round, attempt, transcript) returns the first entry; a new attempt or transcript is a new charge.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from privfed.privacy import argument
from privfed.privacy.events import Event, event_from_json
from privfed.privacy.filters import Budget, BudgetExceeded, Meter

KIND = "privfed-privacy-ledger"
VERSION = 1
REPLAY_TOLERANCE = 1e-9
Key = tuple[str, int, int, str]


class LedgerError(Exception):
    """A ledger cannot be used as it is; the text says which line, why, and what to do."""


class LedgerCorrupt(LedgerError):
    """A complete line is not what was written: edited, reordered or damaged."""


class LedgerBusy(LedgerError):
    """Another process has the ledger open for writing."""


def _encode(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _seal(fields: dict[str, Any]) -> tuple[bytes, str]:
    """Return the line for these fields, newline included, and its hash."""
    digest = hashlib.sha256(_encode(fields)).hexdigest()
    return _encode({**fields, "hash": digest}) + b"\n", digest


def _unseal(line: bytes, number: int) -> dict[str, Any]:
    """Decode one complete line; LedgerCorrupt unless it is canonical and hashes to what it says."""
    try:
        fields = json.loads(line)
        digest = fields.pop("hash")
        sealed, computed = _seal(fields)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as cause:
        raise LedgerCorrupt(f"line {number}: not a ledger line; restore the file from a copy") from cause
    if sealed[:-1] != line or computed != digest:
        raise LedgerCorrupt(f"line {number}: its hash does not match; it was edited or damaged, restore a copy")
    return {**fields, "hash": digest}


def _number(value: float) -> float | str:
    """Write infinity as text: JSON has no such number."""
    return value if math.isfinite(value) else "inf"


@dataclass(frozen=True, slots=True)
class Entry:
    """Hold one charge as stored. `spent` is the meter's reading after it: the amount that governs ever after."""

    sequence: int
    run: str
    round: int
    attempt: int
    transcript: str
    period: str
    event: Event
    count: int
    spent: float
    hash: str

    @property
    def key(self) -> Key:
        """What makes a charge the same charge."""
        return self.run, self.round, self.attempt, self.transcript

    def fields(self, previous: str) -> dict[str, Any]:
        """Return the JSON fields of this entry after the line hashed `previous`."""
        return {
            "attempt": self.attempt,
            "count": self.count,
            "event": json.loads(self.event.to_json()),
            "period": self.period,
            "previous": previous,
            "round": self.round,
            "run": self.run,
            "sequence": self.sequence,
            "spent": _number(self.spent),
            "transcript": self.transcript,
        }


def _entry(fields: dict[str, Any], number: int, previous: str) -> Entry:
    if fields.get("previous") != previous or fields.get("sequence") != number - 1:
        raise LedgerCorrupt(f"line {number}: does not follow line {number - 1}; lines were removed or reordered")
    try:
        event = event_from_json(json.dumps(fields["event"]))
        key = fields["run"], fields["round"], fields["attempt"], fields["transcript"]
        _check(*key, fields["count"], fields["period"])
        spent = argument.number("spent", float(fields["spent"]), 0)
        return Entry(fields["sequence"], *key, fields["period"], event, fields["count"], spent, fields["hash"])
    except (KeyError, TypeError, ValueError) as cause:
        raise LedgerCorrupt(
            f"line {number}: lacks a field, or one has no value that a charge writes: {cause}"
        ) from cause


@dataclass(frozen=True, slots=True)
class Terms:
    """Say whose budget a ledger keeps and in which terms every number in it is meant."""

    owner: str
    budget: Budget
    unit: str = "client"
    relation: str = "add_remove"
    observer: str = "output"

    def meter(self) -> Meter:
        """Return a fresh meter for these terms."""
        return self.budget.meter(unit=self.unit, relation=self.relation, observer=self.observer)

    def fields(self) -> dict[str, Any]:
        """Return the JSON fields of the header."""
        return {
            "budget": self.budget.fields(),
            "kind": KIND,
            "observer": self.observer,
            "owner": self.owner,
            "relation": self.relation,
            "unit": self.unit,
            "version": VERSION,
        }

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> Terms:
        """Read a header; LedgerCorrupt if it is not one, LedgerError if it is of another version."""
        if fields.get("kind") != KIND:
            raise LedgerCorrupt("line 1: not the header of a privacy ledger")
        if fields.get("version") != VERSION:
            raise LedgerError(f"line 1: version {fields.get('version')}, this library reads {VERSION}; upgrade it")
        try:
            budget = Budget.parse(fields["budget"])
            return cls(fields["owner"], budget, fields["unit"], fields["relation"], fields["observer"])
        except (KeyError, TypeError, ValueError) as cause:
            raise LedgerCorrupt("line 1: the header lacks its terms") from cause


@dataclass(frozen=True, slots=True)
class Replay:
    """Compare a ledger with what its events add up to now."""

    stored: float
    recomputed: float
    agrees: bool  # within 1e-9, relative


def _fsync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


class Ledger:
    """Charge events against a budget, durably, before what they pay for is released.

    Guarantees: after `charge` returned, every later opening of the file counts it, whatever was killed when; a
    charge beyond the budget raises BudgetExceeded and leaves file and meter as they were.
    Open with `Ledger.create`, `Ledger.open` or `Ledger.read`; without a path it lives in memory.
    """

    def __init__(self, terms: Terms, path: Path | None, handle: int | None) -> None:
        """Start empty; use the class methods instead."""
        self.terms = terms
        self.path = path
        self.torn = False
        self._handle = handle
        self._writable = path is None or handle is not None
        self._meter = terms.meter()
        self._entries: list[Entry] = []
        self._by_key: dict[Key, Entry] = {}
        self._spent = 0.0
        self.head = _seal(terms.fields())[1]

    @classmethod
    def create(cls, path: Path | str | None, terms: Terms) -> Ledger:
        """Start a ledger; a path that exists raises FileExistsError, so that no budget is started over by mistake."""
        if path is None:
            return cls(terms, None, None)
        place = Path(path)
        line, _ = _seal(terms.fields())
        draft = place.with_name(place.name + f".{os.getpid()}.new")
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            _write_all(handle, line)
            os.fsync(handle)
            os.link(draft, place)  # atomic, and fails if the ledger is already there
        finally:
            os.close(handle)
            draft.unlink()
        _fsync_directory(place.parent)
        return cls.open(place)

    @classmethod
    def open(cls, path: Path | str) -> Ledger:
        """Open for charging, alone; LedgerBusy if another process has it, LedgerCorrupt if a line was changed.

        A last line without its newline was never acknowledged and is cut off (`torn` says so).
        """
        place = Path(path)
        handle = os.open(place, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ledger, length, size = cls._load(place, handle)
            if length < size:
                os.ftruncate(handle, length)
            os.fsync(handle)  # lines found here count from now on, so they must not vanish
        except BlockingIOError as cause:
            os.close(handle)
            raise LedgerBusy(f"{place}: another process is charging this ledger; close it first") from cause
        except BaseException:
            os.close(handle)
            raise
        return ledger

    @classmethod
    def resume(cls, path: Path | str, terms: Terms) -> Ledger:
        """Open the ledger at `path`, or start it; LedgerError if it was started under other terms.

        Changing a budget means a new file: what was promised under the old one stays promised.
        """
        if not Path(path).exists():
            return cls.create(path, terms)
        ledger = cls.open(path)
        if ledger.terms != terms:
            ledger.close()
            raise LedgerError(f"{path}: was started under {ledger.terms}, not {terms}; move it away to start anew")
        return ledger

    @classmethod
    def read(cls, path: Path | str) -> Ledger:
        """Open for looking only: takes no lock, changes nothing, ignores a torn last line."""
        return cls._load(Path(path), None)[0]

    @classmethod
    def _load(cls, place: Path, handle: int | None) -> tuple[Ledger, int, int]:
        data = place.read_bytes()
        length = data.rfind(b"\n") + 1
        lines = data[:length].split(b"\n")[:-1]
        if not lines:
            raise LedgerCorrupt("line 1: missing; a ledger starts with its header")
        header = _unseal(lines[0], 1)
        terms = Terms.parse(header)
        try:
            ledger = cls(terms, place, handle)
        except (TypeError, ValueError) as cause:
            raise LedgerCorrupt(f"line 1: has terms that no ledger is kept in: {cause}") from cause
        if header["hash"] != ledger.head:
            raise LedgerCorrupt("line 1: the header has fields this version does not know")
        for number, line in enumerate(lines[1:], start=2):
            entry = _entry(_unseal(line, number), number, ledger.head)
            if entry.key in ledger._by_key:
                raise LedgerCorrupt(f"line {number}: charges again what an earlier line charged")
            try:
                ledger._meter.add(entry.event, entry.count)
            except ValueError as cause:
                raise LedgerCorrupt(f"line {number}: charges what these terms cannot account for: {cause}") from cause
            ledger._keep(entry)
        ledger.torn = length < len(data)
        return ledger, length, len(data)

    def _keep(self, entry: Entry) -> None:
        self._entries.append(entry)
        self._by_key[entry.key] = entry
        self._spent = entry.spent
        self.head = entry.hash

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All charges, oldest first."""
        return tuple(self._entries)

    @property
    def spent(self) -> float:
        """The stored reading after the last charge, in the measure of `limit`."""
        return self._spent

    @property
    def limit(self) -> float:
        """What may be spent: epsilon, or rho, a Renyi divergence or mu^2 under a filter."""
        return self._meter.limit

    @property
    def measure(self) -> str:
        """What `spent` and `limit` count."""
        return self._meter.measure

    def preview(self, event: Event, count: int = 1) -> float:
        """Return what would be spent after this charge; the stored amount never falls."""
        return max(self._spent, self._meter.preview(event, count))

    def charge(
        self,
        event: Event,
        *,
        run: str,
        round: int,
        transcript: str,
        attempt: int = 0,
        count: int = 1,
        period: str = "",
    ) -> Entry:
        """Charge `count` times the event; return once it is on disk. Only then may the release happen.

        `transcript` is a hash (hex) of what makes this release this one: cohort, keys, fresh noise. `period` is a
        label for reports by month or policy. Raises BudgetExceeded before anything is written, ValueError if
        the same key was charged for something else, LedgerError if the ledger is closed or read-only.
        """
        _check(run, round, attempt, transcript, count, period)
        known = self._by_key.get((run, round, attempt, transcript))
        if known is not None:
            if (known.event, known.count) != (event, count):
                raise ValueError(
                    f"event: run {run} round {round} attempt {attempt} was charged for {known.count} x {known.event}; "
                    "another release is another attempt or transcript"
                )
            return known
        if not self._writable:
            raise LedgerError("this ledger is closed or open for reading; use Ledger.open to charge it")
        after = self.preview(event, count)
        if not after <= self.limit:
            raise BudgetExceeded(self.terms.owner, self._spent, after, self.limit, self.measure)
        draft = Entry(len(self._entries) + 1, run, round, attempt, transcript, period, event, count, after, "")
        line, digest = _seal(draft.fields(self.head))
        entry = replace(draft, hash=digest)
        try:
            if self._handle is not None:
                _write_all(self._handle, line)
                os.fsync(self._handle)
            self._meter.add(event, count)
            self._keep(entry)
        except BaseException:
            # Failed or interrupted: what reached the disk is unknown, and reading it again is the only way to know.
            self.close()
            raise
        return entry

    def spent_where(self, chosen: Callable[[Entry], bool]) -> float:
        """Return what the chosen entries cost by themselves: one run, one period (as composed today)."""
        meter = self.terms.meter()
        for entry in self._entries:
            if chosen(entry):
                meter.add(entry.event, entry.count)
        return meter.spent

    def replay(self) -> Replay:
        """Add all events up again and compare with the stored reading, which governs either way."""
        again = self.spent_where(lambda entry: True)
        agrees = again == self._spent or abs(again - self._spent) <= REPLAY_TOLERANCE * max(1.0, abs(self._spent))
        return Replay(self._spent, again, agrees)

    def close(self) -> None:
        """Release the file; charging afterwards raises LedgerError."""
        self._writable = False
        if self._handle is not None:
            handle, self._handle = self._handle, None
            os.close(handle)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check(run: str, round: int, attempt: int, transcript: str, count: int, period: str) -> None:
    if not isinstance(run, str) or not run:
        raise ValueError(f"run: must be a text that tells the charges of one run from another's, not {run!r}")
    for name, value, least in (("round", round, 0), ("attempt", attempt, 0), ("count", count, 1)):
        argument.whole(name, value, least)
    if not isinstance(period, str):
        raise ValueError(f"period: must be a text, not {period!r}")
    try:
        size = len(bytes.fromhex(transcript))
    except (TypeError, ValueError):
        size = 0
    if size < 16 or transcript != transcript.lower():
        raise ValueError("transcript: must be a hash of at least 16 bytes in lower-case hex")
