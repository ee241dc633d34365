"""Large buffers between processes: in files without names, and in memory when the disk refuses, the same bytes."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from privfed import Array, ArrayRecord, Context, Message, RecordDict, wire
from privfed.grid import Checkpoint, LocalGrid
from privfed.mapped import file_of
from privfed.runtime.array_folder import ArrayFolder
from privfed.runtime.channel import Channel, ChannelError, Packet
from privfed.runtime.grid_host import GridHost
from privfed.runtime.remote_grid import Caller, RemoteGrid

MODEL = RecordDict(
    {
        "large": ArrayRecord({str(n): Array(np.full(300_001 + n, n, np.float32)) for n in range(3)}),
        "small": ArrayRecord({"s": Array(np.arange(5))}),
    }
)


def through(spool: Path | None, packets: int = 1) -> RecordDict:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender = threading.Thread(target=lambda: [Channel(ours).send(Packet({}, (MODEL,))) for _ in range(packets)])
        sender.start()
        receiver = Channel(theirs, spool=spool)
        received = [receiver.receive() for _ in range(packets)]
        sender.join()
        return received[-1].records(0)


def descriptors() -> int:
    """Return how many files this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def mapped(found: RecordDict) -> list[bool]:
    return [file_of(array.data) is not None for record in found.array_records.values() for array in record.values()]


def test_large_buffers_are_received_into_one_file_without_a_name(tmp_path: Path) -> None:
    before = descriptors()
    found = through(tmp_path)
    assert found == MODEL and mapped(found) == [True, True, True, False]
    assert len({id(file_of(array.data)) for array in found.array_records["large"].values()}) == 1
    assert not list(tmp_path.iterdir())
    # A model of many arrays takes one descriptor, and none once nobody reads it.
    assert descriptors() == before + 1
    del found
    assert descriptors() == before
    assert mapped(through(None)) == [False] * 4


@pytest.mark.parametrize("room", [0, 1000, 1 << 20, 1_500_000, 2_600_000])
def test_what_the_disk_has_no_room_for_is_received_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """A write is cut short where the room ends, and refused after it."""
    true_write = os.pwrite

    def write(descriptor: int, data: memoryview, at: int) -> int:
        if at >= room:
            raise OSError(28, "No space left on device")
        return true_write(descriptor, data[: room - at], at)

    monkeypatch.setattr("os.pwrite", write)
    found = through(tmp_path)
    assert found == MODEL
    assert sum(mapped(found)) == room // 1_200_100


def test_a_folder_that_is_gone_is_no_reason_to_fail(tmp_path: Path) -> None:
    found = through(tmp_path / "gone", packets=2)
    assert found == MODEL and not any(mapped(found))


def send_part(stream: socket.socket, size: int) -> None:
    """Send so many bytes of a packet, and close."""
    near, far = socket.socketpair()
    with near, far, stream:

        def send() -> None:
            with contextlib.suppress(ChannelError):
                Channel(near).send(Packet({}, (MODEL,)))

        sender = threading.Thread(target=send)
        sender.start()
        while size:
            data = far.recv(size)
            stream.sendall(data)
            size -= len(data)
        far.shutdown(socket.SHUT_RDWR)
        sender.join()


def test_a_stream_that_ends_in_a_spooled_buffer_is_refused_and_leaves_nothing_open(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    before = descriptors()

    cut = threading.Thread(target=send_part, args=(ours, 2_000_000))
    cut.start()
    with theirs, pytest.raises(ChannelError, match="the stream ends in a packet"):
        Channel(theirs, spool=tmp_path).receive()
    cut.join()
    assert descriptors() == before - 2


class KeepingGrid(LocalGrid):
    """A Grid that keeps what was pushed."""

    def __init__(self) -> None:
        super().__init__(None, 3)
        self.pushed: list[Message] = []

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self.pushed += messages
        return [message.metadata.message_id for message in self.pushed]


def test_a_model_that_is_there_is_not_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server app commits a model, then sends it to nodes in three packets: it travels once."""
    sent: list[int] = []
    true_write = Channel._write

    def write(self: Channel, parts: Iterator[bytes]) -> None:
        held = list(parts)
        sent.append(sum(map(len, held)))
        true_write(self, iter(held))

    monkeypatch.setattr(Channel, "_write", write)
    ours, theirs = socket.socketpair()
    grid = KeepingGrid()
    host = GridHost(Channel(theirs, spool=tmp_path), grid, Context())
    serving = threading.Thread(target=_serve, args=(host,))
    serving.start()
    channel = Channel(ours)
    caller = Caller(channel)
    inbox: queue.SimpleQueue[Packet] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(channel, inbox), daemon=True).start()
    threading.Thread(target=caller.dispatch, args=(inbox,), daemon=True).start()
    remote = RemoteGrid(caller, Context(), host.head())
    model, other = MODEL.array_records["large"], ArrayRecord([np.full(300_000, 9, np.float32)])
    remote.recorder.commit(Checkpoint(1, model))
    for node in (1, 2, 3):
        remote.push_messages([Message(RecordDict({"a": model}), node, "train")])
    size = model.count_bytes()
    assert size < sum(sent) < size + 100_000
    remote.push_messages([Message(RecordDict({"a": other}), 1, "train")])  # the commit's is still kept, a push's not
    remote.recorder.commit(Checkpoint(2, other))
    remote.push_messages([Message(RecordDict({"a": model, "b": other}), 1, "train")])
    assert 2 * size + other.count_bytes() < sum(sent) < 2 * size + other.count_bytes() + 200_000
    assert [message.content["a"] for message in grid.pushed] == [model] * 3 + [other, model]
    channel.close()
    serving.join(10)
    theirs.close()


def _serve(host: GridHost) -> None:
    with contextlib.suppress(ChannelError):
        host.serve()


def _listen(channel: Channel, inbox: queue.SimpleQueue[Packet]) -> None:
    with contextlib.suppress(ChannelError):
        while True:
            inbox.put(channel.receive())


def test_what_came_in_with_its_hash_is_stored_and_read_again_without_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = through(tmp_path).array_records["large"]
    folder, buffers = ArrayFolder(tmp_path / "arrays"), {array.digest: array.data for array in found.values()}
    envelope, _ = wire.encode(RecordDict({"large": found}))
    for digest, buffer in buffers.items():
        folder.write(digest, buffer)

    def compute(self: Array) -> bytes:
        raise AssertionError("hashed once more")

    with monkeypatch.context() as patch:
        patch.setattr(Array, "_compute_digest", compute)
        stored = {digest: folder.read(digest) for digest in buffers}
        assert wire.decode(envelope, stored) == RecordDict({"large": found})
        with pytest.raises(AssertionError, match="hashed once more"):  # another shape at the same place is not known
            _ = Array("float32", (1, 300_001), "raw", next(iter(stored.values()))).digest
    folder.remove(next(iter(buffers)))
    with pytest.raises(FileNotFoundError):
        ArrayFolder(tmp_path / "arrays").read(next(iter(buffers)))
