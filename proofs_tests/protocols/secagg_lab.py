"""Honest nodes of secure aggregation, and a server whose messages a test rewrites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from privfed.protocols import SecAgg, keys
from privfed.protocols.codec import Reader, decode, node_list
from privfed.protocols.errors import RemoteError
from privfed.protocols.secagg import messages
from privfed.protocols.secagg.client import SecAggClient
from privfed.protocols.secagg.server import SecAggServer
from privfed.protocols.session import Identity, Policy, Protocol, Session

NODES = (1, 2, 3, 4, 5)
VECTOR = np.arange(6, dtype=np.uint32)
ACTIVE = SecAgg(threshold=4, mode="active", corrupt=0.2)
PASSIVE = SecAgg(threshold=3)


class Lab:
    """Honest nodes and a server whose messages a test rewrites."""

    def __init__(self, protocol: Protocol = ACTIVE, *, policy: Policy = Policy(), **changes: Any) -> None:
        self.session = replace(Session(1, 5, "train", NODES, 6, 32, b"m" * 32), **changes)
        self.protocol = protocol
        signing = {node: bytes([node]) * 32 for node in NODES}
        self.roster = {node: keys.signing_public(key) for node, key in signing.items()}
        self.identities = {node: Identity(node, signing[node], self.roster) for node in NODES}
        server = protocol.server(self.session)
        assert isinstance(server, SecAggServer)
        self.server = server
        self.clients: dict[int, SecAggClient] = {}
        for node in NODES:
            client = protocol.client(node, identity=self.identities[node], policy=policy)
            assert isinstance(client, SecAggClient)
            self.clients[node] = client
        self.kept = dict.fromkeys(NODES, b"")
        self.requests: dict[int, bytes] = {}

    def step(self, node: int, request: bytes) -> bytes:
        self.kept[node], reply = self.clients[node].step(self.kept[node], request, lambda: VECTOR)
        return bytes(reply)

    def until(self, stage: str, gone: tuple[int, ...] = ()) -> Lab:
        """Run honestly up to the requests of a stage. gone: nodes that vanish before masking."""
        while self.server.stage != stage:
            now = self.server.stage
            for node, request in self.server.outbound().items():
                if now in ("advertise", "share") or node not in gone:
                    self.server.receive(node, self.step(node, bytes(request)))
            self.server.close()
        self.requests = {node: bytes(request) for node, request in self.server.outbound().items()}
        return self


def aborts(lab: Lab, node: int, request: bytes, deviation: str) -> None:
    before = lab.kept[node]
    with pytest.raises(RemoteError) as fault:
        lab.step(node, request)
    assert fault.value.deviation == deviation
    assert fault.value.culprits
    assert lab.kept[node] == before, "an abort keeps nothing"


def confirmations(lab: Lab, change: Callable[[dict[int, bytes]], object]) -> bytes:
    def read(reader: Reader) -> tuple[bytes, dict[int, bytes]]:
        reader.take(33)
        return node_list(reader.nodes()), messages.read_signatures(reader)

    survivors, signatures = decode(lab.requests[1], read)
    change(signatures)
    return lab.requests[1][:33] + survivors + messages.encode_signatures(signatures)
