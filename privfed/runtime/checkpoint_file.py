"""Checkpoints on disk: a committed round, and what the nodes kept when it was committed.

checkpoint file = b"PFC2" zeros(28) sha256(envelope)(32) frame      the envelope names the hashes of all arrays
                | b"PFC1" zeros(28) sha256(frame)(32) frame         as they were written before, and are still read
round-00003.pfw          model, strategy state and metrics; names the hash of the node states that belong to it
round-00003.states.pfw   what nodes (and under id 0 the server app) keep; written first, absent when empty
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privfed import wire
from privfed.errors import PrivfedError, WireError
from privfed.grid import Checkpoint
from privfed.mapped import pieces, read_file
from privfed.record import ConfigRecord, ConfigValue, Record, RecordDict
from privfed.runtime.disk import sync_folder, write_atomically
from privfed.runtime.store import NodeState, pack_states, unpack_states

MAGIC, MAGIC_1 = b"PFC2", b"PFC1"
_HEAD = 64


class RunFolderError(PrivfedError):
    """A run folder that is missing, broken, in use, or of another format."""


@dataclass(frozen=True, slots=True)
class Keep:
    """Which checkpoints to keep. last: this many of the newest. best: also the one with the best value of this metric.

    The newest is always kept. A metric whose name ends in "loss" is better when lower.
    """

    last: int = 3
    best: str = ""

    @classmethod
    def parse(cls, text: str) -> Keep:
        """Read "last:3", "last:3,best" or "last:3,best:accuracy"."""
        last, best = 3, ""
        for part in filter(None, text.split(",")):
            name, _, value = part.partition(":")
            if name == "last" and value.isdecimal() and int(value) >= 1:
                last = int(value)
            elif name == "best":
                best = value or "accuracy"
            else:
                raise PrivfedError(f"--keep {text!r}: write last:N, best or best:METRIC, joined by commas")
        return cls(last, best)

    def choose(self, rounds: list[int], metrics: tuple[Mapping[str, object], ...]) -> set[int]:
        """Return the rounds to keep, of those that have a checkpoint (ascending)."""
        kept = set(rounds[-self.last :])
        numbers: dict[int, float] = {}
        for number in rounds:
            value = find_metric(metrics[number - 1], self.best) if 0 < number <= len(metrics) else None
            if isinstance(value, int | float) and value == value:
                numbers[number] = value
        if self.best and numbers:
            best = min if self.best.endswith("loss") else max
            kept.add(best(numbers, key=lambda number: numbers[number]))
        return kept


def find_metric(metrics: Mapping[str, object], name: str) -> object:
    """Return the value of a metric by name, looking into nested tables; None when it is not there."""
    if name in metrics:
        return metrics[name]
    for value in metrics.values():
        if isinstance(value, Mapping) and (found := find_metric(value, name)) is not None:
            return found
    return None


class CheckpointFolder:
    """The checkpoints of one run."""

    def __init__(self, path: Path, keep: Keep) -> None:
        self.path = path
        self.keep = keep

    def rounds(self) -> list[int]:
        """Return the rounds that have a checkpoint, ascending."""
        names = (path.name.removeprefix("round-").removesuffix(".pfw") for path in self.path.glob("round-*.pfw"))
        return sorted(int(name) for name in names if name.isdecimal())

    def file(self, number: int) -> Path:
        """Return where the checkpoint of a round lives."""
        return self.path / f"round-{number:05d}.pfw"

    def states_file(self, number: int) -> Path:
        """Return where the node states of a round live."""
        return self.path / f"round-{number:05d}.states.pfw"

    def write(self, checkpoint: Checkpoint, states: Mapping[int, NodeState]) -> None:
        """Commit a round: durable when this returns, and whole or absent whenever it is interrupted."""
        digest = _write(self.states_file(checkpoint.round), pack_states(states)) if states else b""
        metrics = _dump_json(checkpoint.metrics)
        meta: dict[str, ConfigValue] = {"round": checkpoint.round, "metrics": metrics, "states": digest}
        content: dict[str, Record] = {"checkpoint": ConfigRecord(meta), "arrays": checkpoint.arrays}
        content |= {f"state.{name}": record for name, record in checkpoint.state.items()}
        _write(self.file(checkpoint.round), RecordDict(content))
        self._prune(checkpoint)

    def _prune(self, checkpoint: Checkpoint) -> None:
        rounds = self.rounds()
        kept = self.keep.choose(rounds, checkpoint.metrics)
        for number in rounds:
            if number not in kept:
                self.file(number).unlink()
                self.states_file(number).unlink(missing_ok=True)
        for stray in self.path.glob(".*.tmp"):  # left by a crash
            stray.unlink(missing_ok=True)
        sync_folder(self.path)

    def read(self) -> tuple[Checkpoint, dict[int, NodeState]] | None:
        """Return the newest checkpoint and its node states. Raises RunFolderError naming the file that is damaged."""
        rounds = self.rounds()
        if not rounds:
            return None
        path = self.file(rounds[-1])
        older = f"delete it to go on from round {rounds[-2]}" if len(rounds) > 1 else "no older one is left"
        try:
            checkpoint, states_digest = _read_checkpoint(path)
            path = self.states_file(checkpoint.round)
            return checkpoint, unpack_states(_read(path, states_digest)) if states_digest else {}
        except (OSError, ValueError, WireError) as fault:
            raise RunFolderError(f"the checkpoint {path} is damaged ({fault}): {older}") from None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint file. Raises RunFolderError naming the file."""
    try:
        return _read_checkpoint(path)[0]
    except (OSError, WireError) as fault:
        raise RunFolderError(f"the checkpoint {path} is damaged ({fault})") from None


def _read_checkpoint(path: Path) -> tuple[Checkpoint, bytes]:
    records = _read(path)
    try:
        meta, arrays = records.config_records["checkpoint"], records.array_records["arrays"]
        number, metrics, digest = meta["round"], meta["metrics"], meta["states"]
    except KeyError as missing:
        raise WireError(f"it has no {missing}") from None
    if type(number) is not int or type(metrics) is not str or type(digest) is not bytes:
        raise WireError("its description has values of other types")
    state = {name.removeprefix("state."): record for name, record in records.items() if name.startswith("state.")}
    return Checkpoint(number, arrays, RecordDict(state), _load_rounds(metrics)), digest


def _load_rounds(text: str) -> tuple[Mapping[str, object], ...]:
    try:
        return tuple(dict(metrics) for metrics in json.loads(text))
    except (ValueError, TypeError) as fault:
        raise WireError(f"its metrics cannot be read: {fault}") from None


def _dump_json(value: object) -> str:
    """Write metrics so that floats, infinities and NaN included, come back as they were."""
    return json.dumps(value, default=_plain)


def _plain(value: Any) -> object:
    """Turn what JSON does not know into what it does: numpy scalars, and read-only mappings."""
    return value.item() if hasattr(value, "item") else dict(value)


def _write(path: Path, records: RecordDict) -> bytes:
    parts = wire.parts(records)
    digest = hashlib.sha256(parts[wire.ENVELOPE]).digest()
    write_atomically(path, [_head(MAGIC, digest), *parts])
    return digest


def _head(magic: bytes, digest: bytes) -> bytes:
    return magic + bytes(_HEAD - len(magic) - len(digest)) + digest


def _read(path: Path, expected: bytes | None = None) -> RecordDict:
    data = read_file(path)
    head, frame = bytes(data[:_HEAD]), data[_HEAD:]
    state = hashlib.sha256()
    magic = MAGIC_1 if head.startswith(MAGIC_1) else MAGIC
    for piece in pieces(frame if magic == MAGIC_1 else wire.envelope_of(frame)):
        state.update(piece)
    digest = state.digest()
    if head != _head(magic, digest):
        raise WireError("its hash does not match its content")
    if expected is not None and digest != expected:
        raise WireError("it belongs to another checkpoint")
    records = wire.loads(frame)
    if not isinstance(records, RecordDict):
        raise WireError("it holds a message, not records")
    return records
