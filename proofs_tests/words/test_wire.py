"""The wire format: what goes in comes out, in one encoding, hashed and stored once, read without a copy."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings

from privfed import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict, wire
from privfed.errors import WireError
from proofs_tests.words import wire_value


@settings(max_examples=150)
@given(wire_value.values)
def test_a_value_comes_back_from_its_frame_and_has_one_encoding(value: Message | RecordDict) -> None:
    frame = wire.dumps(value)
    found = wire.loads(frame)
    assert wire_value.same(found, value)
    assert wire.dumps(found) == frame
    assert b"".join(wire.parts(value)) == frame


@settings(max_examples=100)
@given(wire_value.values)
def test_a_value_comes_back_from_its_envelope_and_buffers(value: Message | RecordDict) -> None:
    envelope, buffers = wire.encode(value)
    found = wire.decode(envelope, buffers)
    assert wire_value.same(found, value)
    again, same_buffers = wire.encode(found)
    assert again == envelope
    assert list(same_buffers) == list(buffers)


def model(size: int = 1000) -> ArrayRecord:
    return ArrayRecord({"w": Array(np.arange(size, dtype=np.float32)), "b": Array(np.float64(2.5))})


def test_one_model_sent_to_many_nodes_is_hashed_and_stored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = model()
    store: dict[bytes, wire.Buffer] = {}
    hashed = 0
    taken = Array.data.fget
    assert taken is not None

    def counted(array: Array) -> memoryview:
        nonlocal hashed
        hashed += array.nbytes if array._digest is None else 0
        return taken(array)

    monkeypatch.setattr(Array, "data", property(counted))
    for node in range(1, 101):
        _, buffers = wire.encode(Message(RecordDict({"arrays": arrays}), node, "train"))
        store.update(buffers)
    assert sum(len(buffer) for buffer in store.values()) == 4008
    assert hashed == 4008


def test_a_loaded_array_views_the_frame_at_a_multiple_of_64_bytes() -> None:
    frame = wire.dumps(RecordDict({"arrays": model()}))
    loaded = wire.loads(frame)
    assert isinstance(loaded, RecordDict)
    start = np.frombuffer(frame, np.uint8).__array_interface__["data"][0]
    for array in loaded.array_records["arrays"].values():
        offset = array.view().__array_interface__["data"][0] - start
        assert 0 < offset < len(frame)
        assert offset % 64 == 0
        assert not array.view().flags.writeable


def test_what_a_frame_in_changeable_memory_held_does_not_change_with_it() -> None:
    frame = bytearray(wire.dumps(RecordDict({"arrays": model()})))
    loaded = wire.loads(frame)
    frame[:] = bytes(len(frame))
    assert loaded == RecordDict({"arrays": model()})


def test_a_changed_buffer_is_refused_by_its_hash() -> None:
    envelope, buffers = wire.encode(RecordDict({"arrays": model()}))
    for digest, buffer in buffers.items():
        changed = bytearray(buffer)
        changed[0] ^= 1
        with pytest.raises(WireError, match="hash"):
            wire.decode(envelope, {**buffers, digest: bytes(changed)})
        with pytest.raises(WireError, match="missing"):
            wire.decode(envelope, {key: value for key, value in buffers.items() if key != digest})


def frame_of(envelope: bytes) -> bytes:
    return wire.MAGIC + struct.pack(">Q", len(envelope)) + envelope


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (b"", "magic"),
        (b"PFW2" + bytes(9), "magic"),
        (frame_of(b"\x01" + bytes(4))[:-1], "inside its envelope"),
        (frame_of(b""), "needed"),
        (frame_of(b"\x02"), "no envelope begins"),
        (frame_of(b"\x01" + bytes(4) + b"\x00"), "bytes follow"),
        (frame_of(b"\x01" + bytes(4)) + b"\x00", "bytes follow"),
        (frame_of(b"\x01\xff\xff\xff\xff"), "too short"),
    ],
)
def test_broken_frames_say_what_is_wrong(bad: bytes, why: str) -> None:
    with pytest.raises(WireError, match=why):
        wire.loads(bad)


def config_frame(*rows: bytes) -> bytes:
    record = b"\x02" + struct.pack(">I", len(rows)) + b"".join(rows)
    return frame_of(b"\x01" + struct.pack(">I", 1) + struct.pack(">I", 1) + b"c" + record)


def row(value: bytes, name: bytes = b"k") -> bytes:
    return struct.pack(">I", len(name)) + name + value


def test_the_frame_builder_of_these_tests_builds_good_frames() -> None:
    assert wire.loads(config_frame(row(b"\x00" + struct.pack(">q", 7)))) == RecordDict({"c": ConfigRecord({"k": 7})})


@pytest.mark.parametrize(
    "bad",
    [
        row(b"\x07" + struct.pack(">I", 1) + b"\x05"),  # a small integer in the long form
        row(b"\x07" + struct.pack(">I", 10) + bytes(1) + b"\x7f" + bytes(8)),  # a long integer with a spare byte
        row(b"\x01" + b"\x7f\xf8\x00\x00\x00\x00\x00\x01"),  # a NaN with a payload
        row(b"\x08"),  # no such kind
        row(b"\x06" + struct.pack(">I", 2) + b"\x02" + b"\x00" + bytes(8)),  # a list of two types
        row(b"\x06" + struct.pack(">I", 1) + b"\x06" + bytes(4)),  # a list of lists
        row(b"\x04" + struct.pack(">I", 1) + b"\xff"),  # a text that is not UTF-8
        row(b"\x02") + row(b"\x02"),  # one row announced, two there
    ],
)
def test_values_with_a_second_encoding_are_refused(bad: bytes) -> None:
    with pytest.raises(WireError):
        wire.loads(config_frame(bad))


def test_a_name_may_come_once() -> None:
    with pytest.raises(WireError, match="twice"):
        wire.loads(config_frame(row(b"\x02"), row(b"\x03")))


def test_padding_must_be_zero() -> None:
    frame = bytearray(wire.dumps(RecordDict({"a": ArrayRecord({"w": Array(np.arange(3.0))})})))
    end = 12 + int.from_bytes(frame[4:12], "big")
    assert end % 64
    frame[end] = 1
    with pytest.raises(WireError, match="padding"):
        wire.loads(bytes(frame))


def test_special_floats_and_signed_zeros_keep_their_bits() -> None:
    record = MetricRecord({"values": [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 5e-324]})
    found = wire.loads(wire.dumps(RecordDict({"m": record})))
    assert isinstance(found, RecordDict)
    values = found.metric_records["m"]["values"]
    assert isinstance(values, list)
    given_values = record["values"]
    assert isinstance(given_values, list)
    assert [struct.pack(">d", value) for value in values] == [struct.pack(">d", value) for value in given_values]


@pytest.mark.parametrize(
    "record",
    [ConfigRecord({"k": "x" * (wire.MAX_TEXT + 1)}), ConfigRecord({"k": 1 << (8 * wire.MAX_INTEGER)})],
    ids=["text", "integer"],
)
def test_what_a_decoder_would_refuse_is_not_encoded(record: ConfigRecord) -> None:
    with pytest.raises(ValueError, match="cannot travel"):
        wire.dumps(RecordDict({"c": record}))


def test_an_id_that_does_not_fit_is_named_as_such() -> None:
    with pytest.raises(ValueError, match="does not fit the wire"):
        wire.dumps(Message(RecordDict(), -1, "train"))
