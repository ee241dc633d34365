"""Packets to and from an app's process: they come back as they were, and nothing else is taken for one."""

from __future__ import annotations

import math
import resource
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from privfed.runtime import channel as module
from privfed.runtime.channel import Channel, ChannelClosed, ChannelError, Packet

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(exclude_categories=["Cs"]))
)
HEADS = st.dictionaries(st.text("abc", max_size=3), st.one_of(SCALARS, st.lists(SCALARS, max_size=3)), max_size=4)
FRAME = struct.Struct(">4sIII")


@pytest.fixture
def pair() -> Iterator[tuple[Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    yield Channel(ours, limit=1 << 20), theirs
    ours.close()
    theirs.close()


def through(packet: Packet) -> Packet:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender = threading.Thread(target=Channel(ours).send, args=(packet,))
        sender.start()
        received = Channel(theirs).receive()
        sender.join()
        return received


def same(left: Any, right: Any) -> bool:
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float) and math.isnan(left):
        return isinstance(right, float) and math.isnan(right)
    return type(left) is type(right) and left == right


@settings(max_examples=60, deadline=None)
@given(HEADS)
def test_a_head_comes_back_as_it_was(head: dict[str, Any]) -> None:
    received = through(Packet(head)).head
    assert received.keys() == head.keys()
    assert all(same(head[key], received[key]) for key in head)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 70_000), max_size=4))
def test_messages_come_back_and_shared_arrays_travel_once(sizes: list[int]) -> None:
    shared = ArrayRecord({"w": Array(np.arange(20_000, dtype=np.float32))})
    own = [ArrayRecord({"x": Array(np.full(size, 3, np.uint8))}) for size in sizes]
    sent = [Message(RecordDict({"s": shared, "o": one}), 1 + at, "train") for at, one in enumerate(own)]
    ours, theirs = socket.socketpair()
    counted = [0]

    class Counting(socket.socket):
        def sendall(self, data: Any, flags: int = 0) -> None:
            counted[0] += len(data)
            super().sendall(data, flags)

    with theirs, Counting(fileno=ours.detach()) as counting:
        sender = threading.Thread(target=Channel(counting).send, args=(Packet({}, sent),))
        sender.start()
        packet = Channel(theirs).receive()
        sender.join()
    received = [packet.message(place) for place in range(len(sent))]
    assert [one.content for one in received] == [one.content for one in sent]
    assert [one.metadata for one in received] == [one.metadata for one in sent]
    assert counted[0] < (80_000 if sent else 0) + sum(sizes) + 600 * len(sent) + 100


def test_records_keep_their_exact_values() -> None:
    record = ConfigRecord({"big": 1 << 90, "nan": float("nan"), "bytes": b"\0\xff", "yes": True})
    back = through(Packet({}, [RecordDict({"c": record})])).records(0).config_records["c"]
    assert same(back["nan"], float("nan"))
    assert {key: value for key, value in back.items() if key != "nan"} == {
        key: value for key, value in record.items() if key != "nan"
    }


def test_the_wrong_part_is_named() -> None:
    packet = Packet({}, [RecordDict()])
    with pytest.raises(ChannelError, match="part 0 of a packet is no message"):
        packet.message(0)
    with pytest.raises(ChannelError, match="part 1 of a packet is no records"):
        packet.records(1)


def test_the_end_between_packets_is_told_from_one_inside(pair: tuple[Channel, socket.socket]) -> None:
    channel, peer = pair
    Channel(peer).send(Packet({"a": 1}))
    peer.sendall(FRAME.pack(b"PFP1", 5, 0, 0) + b"{}")
    peer.shutdown(socket.SHUT_WR)
    assert channel.receive().head == {"a": 1}
    with pytest.raises(ChannelError, match="ends in a packet"):
        channel.receive()
    with pytest.raises(ChannelClosed):
        channel.receive()


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        FRAME.pack(b"PFP1", module.MAX_HEAD + 1, 0, 0),
        FRAME.pack(b"PFP1", 2, module.MAX_VALUES + 1, 0) + b"{}",
        FRAME.pack(b"PFP1", 2, 0, 0) + b"[]",
        FRAME.pack(b"PFP1", 2, 0, 0) + b"\xff\xff",
        FRAME.pack(b"PFP1", 30_000, 0, 0) + b"[" * 30_000,
        FRAME.pack(b"PFP1", 2, 1, 0) + b"{}" + struct.pack(">Q", 1 << 40),
        FRAME.pack(b"PFP1", 2, 1, 0) + b"{}" + struct.pack(">Q", 3) + b"abc",
        FRAME.pack(b"PFP1", 2, 0, 1) + b"{}" + bytes(32) + struct.pack(">Q", 1 << 63),
    ],
)
def test_what_is_no_packet_is_refused(pair: tuple[Channel, socket.socket], sent: bytes) -> None:
    channel, peer = pair
    peer.sendall(sent)
    peer.shutdown(socket.SHUT_WR)
    with pytest.raises(ChannelError):
        channel.receive()


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 400), st.integers(0, 255))
def test_flipped_and_random_bytes_raise_one_error(noise: bytes, at: int, byte: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        Channel(theirs).send(Packet({"op": "x"}, [Message(RecordDict({"c": ConfigRecord({"a": 1})}), 1, "train")]))
        good = ours.recv(1 << 16)
        bad = bytearray(good)
        bad[at % len(good)] ^= byte
        theirs.sendall(bytes(bad) + noise)
        theirs.shutdown(socket.SHUT_WR)
        channel = Channel(ours)
        try:
            for _ in range(50):
                channel.receive()
        except ChannelError:
            return
        raise AssertionError("a stream of at most two packets ended without an error")


def test_memory_grows_with_what_arrives_and_not_with_what_is_announced(pair: tuple[Channel, socket.socket]) -> None:
    _, peer = pair
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(FRAME.pack(b"PFP1", 2, 1, 0) + b"{}" + struct.pack(">Q", 1 << 33) + bytes(1000))
        theirs.shutdown(socket.SHUT_WR)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ChannelError):
            Channel(ours).receive()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, "in KiB; 8 GiB were announced"
    peer.close()
