"""A server may crash after any record: the session it resumes ends in the same sum, with the same requests."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from privfed.protocols import LightSecAgg, OneShot, SecAgg, SecAggPlus, keys
from privfed.protocols.errors import LocalError, RemoteError
from privfed.protocols.journal import JournalServer, read_journal
from privfed.protocols.session import Client, Identity, Policy, Protocol, Session

NODES = (2, 3, 5, 8)
SESSION = Session(1, 7, "train", NODES, 5, 32, b"m" * 32)
INPUTS: dict[int, Any] = {node: np.arange(5, dtype=np.uint32) * node for node in NODES}
PROTOCOLS = [
    SecAgg(threshold=3),
    SecAgg(threshold=3, mode="active", corrupt=0.0),
    SecAggPlus(neighbours=2, threshold=2),
    LightSecAgg(threshold=3),
    OneShot(threshold=3),
]


class Crashed(Exception):
    """The server's process ended."""


class Disk:
    """A journal whose writer may crash: `left` more records are written, the next one in half."""

    def __init__(self, left: int) -> None:
        self.data = bytearray()
        self.left = left

    def append(self, record: object) -> None:
        raw = bytes(record)  # type: ignore[call-overload]  # bytes, as every record is
        if not self.left:
            self.data += raw[: len(raw) // 2]
            raise Crashed
        self.left -= 1
        self.data += raw


def parties(protocol: Protocol) -> dict[int, Client]:
    signing = {node: bytes([node]) * 32 for node in NODES}
    roster = {node: keys.signing_public(key) for node, key in signing.items()}
    return {
        node: protocol.client(node, identity=Identity(node, signing[node], roster), policy=Policy()) for node in NODES
    }


class Network:
    """Nodes that persist what they keep, as the contract demands, and answer a redelivery with the same bytes."""

    def __init__(self, protocol: Protocol) -> None:
        self.clients = parties(protocol)
        self.kept = dict.fromkeys(NODES, b"")
        self.gone = set() if isinstance(protocol, SecAggPlus) else {8}  # two neighbours are all there are
        self.answered: dict[tuple[int, bytes], bytes] = {}
        self.asked: dict[str, dict[int, bytes]] = {}

    def drive(self, server: JournalServer) -> None:
        """Run to the end or the crash. Every request seen twice must be the same."""
        while stage := server.stage:
            for node, request in server.outbound().items():
                raw = bytes(request)
                assert self.asked.setdefault(stage, {}).setdefault(node, raw) == raw
                if stage in ("reveal", "open") and node in self.gone:
                    continue
                if (node, raw) not in self.answered:
                    vector = INPUTS[node]
                    self.kept[node], reply = self.clients[node].step(self.kept[node], raw, partial(vector.copy))
                    self.answered[node, raw] = bytes(reply)
                try:
                    server.receive(node, self.answered[node, raw])
                except RemoteError as repeated:  # taken before the crash
                    assert repeated.deviation in ("unexpected-reply", "second-reply")
            server.close()


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=repr)
def test_a_session_ends_the_same_wherever_the_server_crashes(protocol: Protocol) -> None:
    whole = Disk(1000)
    Network(protocol).drive(JournalServer(protocol, SESSION, whole.append))
    records = len(read_journal(bytes(whole.data))[0])
    assert records > 3 * len(protocol.stages)
    for crash in range(1, records):
        disk, network = Disk(crash), Network(protocol)
        with pytest.raises(Crashed):
            network.drive(JournalServer(protocol, SESSION, disk.append))
        entries, size = read_journal(bytes(disk.data))
        assert len(entries) == crash
        assert size < len(disk.data)
        del disk.data[size:]
        disk.left = 1000
        server = JournalServer.resume(protocol, SESSION, bytes(disk.data), disk.append)
        network.drive(server)
        assert server.result is not None
        assert np.array_equal(server.result.total, np.arange(5) * sum(NODES))
        assert server.result.survivors == set(NODES)


def test_a_journal_of_something_else_is_refused() -> None:
    disk, protocol = Disk(1000), SecAgg(threshold=3)
    Network(protocol).drive(JournalServer(protocol, SESSION, disk.append))
    good = bytes(disk.data)
    done = JournalServer.resume(protocol, SESSION, good, disk.append)
    assert done.stage == ""
    assert done.result is not None
    for other, session, journal in (
        (SecAgg(threshold=4), SESSION, good),
        (protocol, replace(SESSION, binding=b"M" * 32), good),
        (protocol, SESSION, b""),
        (protocol, SESSION, good[:40] + bytes([good[40] ^ 1]) + good[41:]),
        (protocol, SESSION, good[-200:]),
    ):
        with pytest.raises(LocalError):
            JournalServer.resume(other, session, journal, disk.append)


def test_a_reply_that_is_refused_is_not_written_down() -> None:
    disk = Disk(1000)
    server = JournalServer(SecAgg(threshold=3), SESSION, disk.append)
    before = bytes(disk.data)
    with pytest.raises(RemoteError):
        server.receive(2, b"nonsense")
    assert bytes(disk.data) == before


def test_a_reply_is_taken_only_when_it_is_durable() -> None:
    """What the disk did not take is not acknowledged: receive raises."""
    disk, protocol = Disk(1), SecAgg(threshold=3)
    server, network = JournalServer(protocol, SESSION, disk.append), Network(protocol)
    request = bytes(server.outbound()[2])
    _, reply = network.clients[2].step(b"", request, lambda: INPUTS[2])
    with pytest.raises(Crashed):
        server.receive(2, reply)
