"""Frames and chunks: one value, one encoding; whatever else arrives is refused, and nothing else happens."""

from __future__ import annotations

import contextlib
import random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from privfed.errors import WireError
from privfed.runtime import frame
from privfed.runtime.frame import Answer, Hello, Offer, Parcel, Part, Progress, Verdict, Want, pack, parcel, unpack

digests = st.binary(min_size=32, max_size=32)
sizes = st.integers(0, frame.MAX_BLOB)
progress = st.builds(Progress, digest=digests, size=sizes)
verdicts = st.builds(Verdict, counted=st.booleans(), missing=st.lists(progress, max_size=4).map(tuple))
hellos = st.builds(
    Hello,
    slots=st.integers(0, 99),
    holding=st.lists(st.text(max_size=9), max_size=4).map(tuple),
    runs=st.lists(st.integers(0, 1 << 63), max_size=4).map(tuple),
)
inside = st.binary(min_size=1, max_size=40).flatmap(
    lambda data: st.builds(Part, digest=digests, size=st.just(len(data)), data=st.just(data))
)
outside = st.builds(Part, digest=digests, size=st.integers(1, frame.MAX_BLOB))
parts = st.one_of(inside, outside)
parcels = st.builds(Parcel, envelope=parts, parts=st.lists(parts, max_size=4).map(tuple))
answers = st.builds(Answer, token=st.text(max_size=40), parcel=parcels)
KINDS = (Verdict, Hello, Answer, Want, Progress, Offer)


def model(seed: int, *sizes: int) -> Message:
    rng = np.random.default_rng(seed)
    arrays = ArrayRecord({f"w{at}": Array(rng.random(size, np.float32)) for at, size in enumerate(sizes)})
    return Message(RecordDict({"arrays": arrays, "c": ConfigRecord({"round": 3})}), 7, "train")


def same(left: Message, right: Message) -> bool:
    return left.metadata == right.metadata and left.content == right.content


@given(st.one_of(verdicts, hellos, answers))
def test_a_frame_comes_back(value: frame.Frame) -> None:
    assert unpack(pack(value), type(value)) == value


@given(st.one_of(verdicts, hellos, answers), st.data())
def test_a_frame_has_one_encoding(value: frame.Frame, data: st.DataObject) -> None:
    raw = bytearray(pack(value))
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    try:
        other = unpack(bytes(raw), type(value))
    except WireError:
        return
    assert pack(other) == bytes(raw) != pack(value)


@given(st.binary(max_size=200), st.sampled_from(KINDS))
def test_any_bytes_are_a_frame_or_refused(raw: bytes, kind: type[frame.Frame]) -> None:
    with contextlib.suppress(WireError):
        assert pack(unpack(raw, kind)) == raw


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x93" * 5000,
        b"\xdd\xff\xff\xff\xff",
        b"\x92\xc6\xff\xff\xff\xff",
        msgspec.msgpack.encode([True, [], 5]),
        msgspec.msgpack.encode({"counted": True}),
        pack(Verdict(counted=True)) + b"\0",
        b"\x92\xc3\xdc\x00\x00",
        b"\0" * (frame.MAX_FRAME + 1),
    ],
)
def test_a_bad_frame_is_refused(raw: bytes) -> None:
    with pytest.raises(WireError):
        unpack(raw, Verdict)


def test_ten_thousand_mutations_of_real_frames_do_nothing_but_be_refused() -> None:
    rng = random.Random(5)
    sealed, _ = parcel(model(1, 10, 100_000))
    seeds = [pack(Answer(token="a" * 32, parcel=sealed))[:400], pack(Hello(slots=4, holding=("a",), runs=(1, 2)))]
    seeds.append(pack(Want(parts=(Progress(digest=bytes(32), size=5),))))
    for _ in range(10_000):
        raw = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        cut = bytes(raw[: rng.randrange(len(raw) + 1)])
        for kind in (Answer, Hello, Want):
            with contextlib.suppress(WireError):
                assert pack(unpack(cut, kind)) == cut
        with contextlib.suppress(WireError):
            frame.read_chunk(cut)


@given(st.integers(0, 99), st.lists(st.sampled_from([0, 1, 10, 200_000, 300_000]), max_size=4))
@settings(max_examples=30, deadline=None)
def test_a_message_survives_its_parcel_and_small_frames_carry_what_they_can(seed: int, lengths: list[int]) -> None:
    message = model(seed, *lengths)
    sealed, apart = parcel(message)
    assert len(pack(sealed)) <= frame.INLINE + 64 * (len(lengths) + 4)
    assert {part.digest for part in sealed.outside()} == set(apart)
    assert all(len(buffer) > 100_000 for buffer in apart.values())
    again = unpack(pack(sealed), Parcel)
    assert same(again.open({digest: bytes(buffer) for digest, buffer in apart.items()}), message)


def test_a_parcel_is_not_opened_with_other_bytes_than_it_names() -> None:
    message = model(1, 300_000)
    sealed, apart = parcel(message)
    ((digest, buffer),) = apart.items()
    wrong = bytearray(buffer)
    wrong[5] ^= 1
    with pytest.raises(WireError):
        sealed.open({})
    with pytest.raises(WireError):
        sealed.open({digest: bytes(wrong)})
    forged = Part(digest=bytes(32), size=sealed.envelope.size, data=sealed.envelope.data)
    with pytest.raises(WireError, match="envelope"):
        Parcel(envelope=forged, parts=sealed.parts).open(apart)


def test_an_envelope_too_large_for_a_frame_moves_in_chunks_too() -> None:
    message = Message(RecordDict({"c": ConfigRecord({"blob": bytes(3 << 20)})}), 7, "train")
    sealed, apart = parcel(message)
    assert sealed.outside() == [sealed.envelope] and len(pack(sealed)) < 200
    assert same(sealed.open(apart), message)


@given(st.integers(0, 5_000_000), st.integers(0, 5_000_000))
@settings(max_examples=30, deadline=None)
def test_chunks_go_on_from_any_byte(total: int, offset: int) -> None:
    offset = min(offset, total)
    data = np.random.default_rng(total).bytes(total)
    got = bytearray(data[:offset])
    for raw in frame.chunks(b"d" * 32, data, offset):
        digest, at, size, part = frame.read_chunk(raw)
        assert (digest, at, size) == (b"d" * 32, len(got), total)
        assert len(raw) <= frame.MAX_FRAME
        got += part
    assert bytes(got) == data


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        bytes(frame.HEAD),
        frame.chunk(bytes(32), 0, 5, bytes(6)),
        frame.chunk(bytes(32), 1 << 63, 5, bytes(1)),
        frame.chunk(bytes(32), 0, frame.MAX_BLOB + 1, bytes(1)),
        frame.chunk(bytes(32), 0, frame.MAX_CHUNK + 1, bytes(frame.MAX_CHUNK + 1)),
    ],
)
def test_a_bad_chunk_is_refused(raw: bytes) -> None:
    with pytest.raises(WireError):
        frame.read_chunk(raw)
