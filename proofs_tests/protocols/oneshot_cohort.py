"""A cohort of one-shot nodes and their server in one process, step by step, with a hand on every message."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from privfed.protocols import keys
from privfed.protocols.errors import RemoteError
from privfed.protocols.keys import signing_public
from privfed.protocols.oneshot import OneShot, committee, sealing
from privfed.protocols.oneshot.messages import Bundle
from privfed.protocols.session import Buffer, Drawn, Identity, Policy, Random, RingSum, Session

Words = NDArray[np.uint64]


def seeded(label: str) -> Random:
    """A reproducible source of bytes, for vectors and for comparing runs."""
    state = hashlib.shake_256(label.encode())
    used = 0

    def read(size: int) -> bytes:
        nonlocal used
        used += size
        return state.digest(used)[-size:]

    return read


def secret_key(node: int) -> bytes:
    return hashlib.sha256(b"identity of node %d" % node).digest()


def roster_of(nodes: Collection[int]) -> dict[int, bytes]:
    return {node: signing_public(secret_key(node)) for node in nodes}


class Cohort:
    """Nodes 1..n (or `nodes`) that all run `protocol`; `seed` makes every random byte reproducible.

    Where a beacon drew the committee (`protocol.committee` is a `Drawn`), every party saw it drawn and is set up with
    the number of members alone; members may be other nodes than those of the session.
    """

    def __init__(
        self,
        n: int,
        protocol: OneShot,
        *,
        dimension: int = 5,
        bits: int = 20,
        policy: Policy = Policy(),
        seed: str | None = None,
        **facts: Any,
    ) -> None:
        session = Session(7, 3, "train", tuple(range(1, n + 1)), dimension, bits, bytes(range(32)))
        self.session = replace(session, **facts)
        self.protocol = protocol
        self.policy = policy
        drawn, own = protocol.committee, protocol
        if isinstance(drawn, Drawn):
            own, self.policy = replace(protocol, committee=len(drawn.members)), replace(policy, committee=drawn)
        self.parties = sorted({*self.session.nodes, *(drawn.members if isinstance(drawn, Drawn) else ())})
        self.roster = roster_of(self.parties)
        self.identities = {node: Identity(node, secret_key(node), self.roster) for node in self.parties}
        randoms = {node: {"random": seeded(f"{seed} {node}")} if seed else {} for node in self.parties}
        self.clients = {
            node: own.client(node, identity=self.identities[node], policy=self.policy, **randoms[node])
            for node in self.parties
        }
        self.server = protocol.server(self.session)
        self.kept: dict[int, bytes] = dict.fromkeys(self.parties, b"")
        generator = np.random.default_rng(n * 1000 + dimension)
        self.inputs = {
            node: generator.integers(0, 1 << bits, dimension, dtype=np.uint64) for node in self.session.nodes
        }

    def expected(self, nodes: Collection[int]) -> Words:
        total = sum((self.inputs[node] for node in nodes), start=np.zeros(self.session.dimension, dtype=np.uint64))
        return np.asarray(total & np.uint64((1 << self.session.bits) - 1))

    def answer(self, node: int, request: Buffer) -> bytes:
        """One step of an honest node."""
        self.kept[node], reply = self.clients[node].step(self.kept[node], request, lambda: self.inputs[node])
        return bytes(reply)

    def stage(
        self,
        *,
        gone: Collection[int] = (),
        request: Callable[[int, bytes], bytes] = lambda node, request: request,
        reply: Callable[[int, bytes], bytes] = lambda node, reply: reply,
    ) -> dict[int, tuple[bytes, bytes]]:
        """Run the open stage up to its close, without the nodes in `gone`; the hooks may change what is said."""
        said = {}
        for node, asked in self.server.outbound().items():
            if node not in gone:
                heard = request(node, bytes(asked))
                said[node] = heard, reply(node, self.answer(node, heard))
                self.server.receive(node, said[node][1])
        return said

    def run(self, dropped: Mapping[str, Collection[int]] = {}) -> RingSum:
        """Run every stage; nodes in dropped[stage] vanish before it."""
        gone: set[int] = set()
        while self.server.stage:
            gone |= set(dropped.get(self.server.stage, ()))
            self.stage(gone=gone)
            self.server.close()
        assert self.server.result is not None
        return self.server.result

    def until(self, stage: str) -> Cohort:
        """Run honestly up to this stage."""
        while self.server.stage != stage:
            self.stage()
            self.server.close()
        return self


def refuses(deviation: str, culprits: set[int], act: Callable[[], object]) -> None:
    with pytest.raises(RemoteError) as raised:
        act()
    assert raised.value.deviation == deviation
    assert set(raised.value.culprits) == culprits


def bundle(change: Callable[[Bundle], Bundle]) -> Callable[[bytes], bytes]:
    return lambda request: change(Bundle.decode(request, 1)).encode()


def malicious_box(cohort: Cohort, share: bytes, public_key: bytes | None = None) -> Callable[[Bundle], Bundle]:
    """What node 2 could send node 1 in earnest: its own signature, a box that opens."""
    identity, digest = cohort.identities[2], cohort.protocol.agree(cohort.session).digest
    secret = keys.digest(b"session key of node 2")
    header = committee.sign_header(digest, identity, public_key or keys.exchange_public(secret))
    box = sealing.seal_box(secret, digest, identity, 1, share)

    def change(honest: Bundle) -> Bundle:
        return Bundle(
            honest.survivors,
            (honest.headers[0], header, *honest.headers[2:]),
            (honest.boxes[0], box, *honest.boxes[2:]),
        )

    return change
