"""A settled run of buffered aggregation, and buffers that a server rewrites before it shows them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from privfed.audit.rehearsal import identities, stream
from privfed.protocols.errors import RemoteError
from privfed.protocols.lightsecagg.buffer import BufferedServer, WeightedSum
from privfed.protocols.lightsecagg.buffered import BufferedNode, BufferTerms
from privfed.protocols.lightsecagg.exact import Words
from privfed.protocols.session import Buffer

TERMS = BufferTerms(
    run=7, nodes=(1, 2, 3, 4, 5), dimension=9, bits=32, threshold=4, privacy=1, weights=(8, 4, 2), goal=3,
    per_version=1,
)  # fmt: skip
BINDINGS = {version: bytes([version]) * 32 for version in range(40)}


@dataclass
class Run:
    """A settled run whose nodes keep their state here."""

    terms: BufferTerms = TERMS
    nodes: dict[int, BufferedNode] = field(default_factory=dict)
    kept: dict[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = identities(self.terms.nodes)
        self.server = BufferedServer(self.terms, roster=known[1].roster, random=stream("server"))
        for node, identity in known.items():
            self.nodes[node] = BufferedNode(self.terms, identity, random=stream(f"node {node}"))
            self.kept[node], message = self.nodes[node].join()
            self.server.join(node, message)
        self.roster = self.server.settle()
        for node in self.nodes:
            self.kept[node] = self.nodes[node].settle(self.kept[node], self.roster)

    def contribute(self, node: int, version: int, vector: Words | None = None) -> bytes:
        given = update(node, version) if vector is None else vector
        self.kept[node], message = self.nodes[node].contribute(self.kept[node], version, BINDINGS[version], given)
        self.server.contribute(node, message)
        return message

    def confirm(self, node: int, request: Buffer) -> None:
        self.kept[node], message = self.nodes[node].confirm(self.kept[node], request)
        self.server.confirmed(node, message)

    def open(self, node: int, request: Buffer) -> None:
        self.kept[node], message = self.nodes[node].open(self.kept[node], request)
        self.server.opened(node, message)

    def buffer(self, current: int, confirm: set[int] | None = None, open: set[int] | None = None) -> WeightedSum:
        for node, request in self.server.begin(current).items():
            if confirm is None or node in confirm:
                self.confirm(node, request)
        for node, request in self.server.ask().items():
            if open is None or node in open:
                self.open(node, request)
        return self.server.finish()


def update(node: int, version: int) -> Words:
    vector: Words = np.random.default_rng(100 * node + version).integers(0, 2**32, 9, dtype=np.uint32)
    return vector


def expected(members: dict[int, int], current: int) -> Words:
    total = np.zeros(9, dtype=np.uint64)
    for node, version in members.items():
        total += update(node, version).astype(np.uint64) * np.uint64(TERMS.weight(current, version))
    return total & np.uint64(2**32 - 1)


def filled(current: int = 2) -> tuple[Run, Buffer]:
    """A run with updates of nodes 1, 2, 3 at version 2, and the request to confirm them."""
    run = Run()
    for node in (1, 2, 3):
        run.contribute(node, 2)
    return run, run.server.begin(current)[5]


def refusal(run: Run, request: Buffer, node: int = 5, step: str = "confirm") -> str:
    with pytest.raises(RemoteError) as caught:
        getattr(run.nodes[node], step)(run.kept[node], request)
    assert 0 in caught.value.culprits
    return caught.value.deviation
