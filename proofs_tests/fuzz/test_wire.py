"""Any bytes: a value or WireError, nothing else; and a value that was read has exactly the bytes it was read from."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict, wire
from privfed.errors import WireError
from proofs_tests.words import wire_value

MUTANTS = 10_000
MUTANTS_LONG = 1_000_000


def seeds() -> list[bytes]:
    """Return frames that between them use every part of the format."""
    arrays = ArrayRecord(
        {
            "w": Array(np.arange(6, dtype=np.float32).reshape(2, 3)),
            "empty": Array(np.zeros((0, 3), np.int8)),
            "scalar": Array(np.float64(1.5)),
            "flags": Array(np.array([True, False])),
            "half": Array.from_float32_as_bfloat16(np.array([1.0], np.float32)),
        }
    )
    config = ConfigRecord({"i": 1, "big": 1 << 70, "f": 0.5, "t": True, "s": "text", "b": b"raw", "l": [1, 2], "e": []})
    content = RecordDict({"arrays": arrays, "config": config, "metrics": MetricRecord({"loss": float("nan")})})
    question = Message(content, 7, "train.warm_up", group_id="g")
    values = [content, question, Message(Error(3, "why"), reply_to=question), Message(Error(0), reply_to=question)]
    return [wire.dumps(value) for value in [*values, RecordDict()]]


def mutate(frame: bytes, random_source: random.Random) -> bytes:
    """Return the frame with a few bytes flipped, set, cut, repeated, or with a length field made extreme."""
    data = bytearray(frame)
    for _ in range(random_source.choice((1, 1, 1, 2, 3, 8))):
        at = random_source.randrange(len(data) + 1)
        kind = random_source.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << random_source.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = random_source.choice((0, 1, 0x7F, 0x80, 0xFF, random_source.randrange(256)))
        elif kind == 2:
            del data[at : at + random_source.choice((1, 4, 8, 64))]
        elif kind == 3:
            data[at:at] = data[at : at + random_source.choice((1, 4, 8, 64))]
        elif kind == 4:
            data[at:at] = random_source.randbytes(random_source.choice((1, 4, 8)))
        else:
            data[at : at + 4] = random_source.choice((b"\xff\xff\xff\xff", bytes(4), b"\x7f\xff\xff\xff"))
    return bytes(data)


def check(frame: bytes) -> bool:
    """Read a frame; return whether it held a value."""
    try:
        value = wire.loads(frame)
    except WireError:
        return False
    assert wire.dumps(value) == frame
    return True


def run(mutants: int) -> int:
    random_source = random.Random(20261124)
    frames = seeds()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return sum(check(mutate(random_source.choice(frames), random_source)) for _ in range(mutants))


def test_the_seeds_are_values() -> None:
    assert all(check(frame) for frame in seeds())


def test_mutated_frames_are_values_or_wire_errors() -> None:
    accepted = run(MUTANTS)
    # Metadata and texts may change into others that are valid; what has a hash or a length may not.
    assert 0 < accepted < MUTANTS


@pytest.mark.long
def test_a_million_mutated_frames_are_values_or_wire_errors() -> None:
    assert 0 < run(MUTANTS_LONG) < MUTANTS_LONG


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_or_a_wire_error(data: bytes) -> None:
    check(data)
    check(wire.MAGIC + data)
    check(wire.MAGIC + len(data).to_bytes(8, "big") + data)


@settings(max_examples=200)
@given(wire_value.values, st.integers(0, 1 << 30), st.integers(0, 255))
def test_one_changed_byte_never_reads_as_the_same_value(value: Message | RecordDict, place: int, byte: int) -> None:
    frame = bytearray(wire.dumps(value))
    place %= len(frame)
    if frame[place] == byte:
        return
    frame[place] = byte
    try:
        changed = wire.loads(bytes(frame))
    except WireError:
        return
    assert not wire_value.same(changed, value)
