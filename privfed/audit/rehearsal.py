"""A whole session of a protocol in this process, every message on record and every step repeatable."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from privfed.protocols.beacon import Beacon
from privfed.protocols.loop import draw
from privfed.protocols.session import Buffer, Client, Identity, Policy, Protocol, Random, RingSum, Session

Vector = NDArray[np.uint64]


def stream(label: str) -> Random:
    """Deterministic random bytes, for checks only; each label has its own."""
    drawn = 0

    def random(size: int) -> bytes:
        nonlocal drawn
        drawn += 1
        return hashlib.shake_256(f"privfed rehearsal\0{label}\0{drawn}".encode()).digest(size)

    return random


def identities(nodes: tuple[int, ...], impostor: int = 0) -> dict[int, Identity]:
    """An identity per node over one roster; the impostor's key is on no roster but its own."""
    secrets = {node: stream(f"identity {node}")(32) for node in nodes}
    roster = {node: _public(secret) for node, secret in secrets.items()}
    known = {node: Identity(node, secret, roster) for node, secret in secrets.items()}
    if impostor:
        forged = stream("impostor")(32)
        known[impostor] = Identity(impostor, forged, {**roster, impostor: _public(forged)})
    return known


def _public(secret: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


@dataclass(frozen=True, slots=True)
class Stage:
    """One reply on its way to the server. earlier: the node's reply at the stage before. receive: hand one in."""

    name: str
    node: int
    reply: bytes
    earlier: bytes | None
    _receive: Callable[[int, Buffer], None] = field(repr=False)

    def receive(self, reply: bytes, node: int = 0) -> None:
        self._receive(node or self.node, reply)


Hook = Callable[[Stage], None]


@dataclass(frozen=True)
class Role:
    """One step of one node as it happened: kept state, request and what it kept afterwards."""

    lab: Rehearsal
    node: int
    stage: int
    kept: bytes
    request: bytes
    kept_after: bytes = b""
    vector: Vector | None = None

    @property
    def name(self) -> str:
        return self.lab.protocol.stages[self.stage]

    def step(self, request: bytes, vector: Vector | None = None) -> bytes:
        """Answer this request in place of the one that came."""
        return self._answer(self.kept, request, vector)

    def after(self, request: bytes) -> bytes:
        """Answer this request once the step has been taken."""
        return self._answer(self.kept_after, request, None)

    def _answer(self, kept: bytes, request: bytes, vector: Vector | None) -> bytes:
        given = self.vector if vector is None else vector

        def source() -> Vector:
            return np.zeros(self.lab.dimension, dtype=np.uint64) if given is None else given.copy()

        client = self.lab.client(self.node, label="retold")
        return bytes(client.step(kept, request, source)[1])


@dataclass
class Run:
    """What happened in one session. requests, replies, kept: one dict per stage; kept: before and after."""

    lab: Rehearsal
    inputs: dict[int, Vector]
    names: list[str] = field(default_factory=list)
    requests: list[dict[int, bytes]] = field(default_factory=list)
    replies: list[dict[int, bytes]] = field(default_factory=list)
    kept: list[dict[int, tuple[bytes, bytes]]] = field(default_factory=list)
    source_calls: dict[int, int] = field(default_factory=dict)
    source_stage: dict[int, int] = field(default_factory=dict)
    early_result: str = ""
    result: RingSum | None = None

    @property
    def delivered(self) -> frozenset[int]:
        """Nodes whose input reached the server."""
        return frozenset(n for n, stage in self.source_stage.items() if n in self.replies[stage])

    def sum_is_right(self) -> bool:
        """Whether the result is the sum of the survivors' inputs in the ring."""
        if self.result is None:
            return False
        total = np.zeros(self.lab.dimension, dtype=np.uint64)
        for node in self.result.survivors:
            total += self.inputs[node]
        total &= np.uint64((1 << self.lab.bits) - 1)
        return self.result.total.dtype == np.uint64 and np.array_equal(self.result.total, total)

    def transcript(self) -> tuple[list[dict[int, bytes]], list[dict[int, bytes]]]:
        return self.requests, self.replies

    def roles(self) -> Iterator[Role]:
        """Every step that was taken, stage by stage."""
        for stage, kept in enumerate(self.kept):
            for node, (before, after) in kept.items():
                request = self.requests[stage][node]
                yield Role(self.lab, node, stage, before, request, after, self.inputs[node])


@dataclass(frozen=True)
class Rehearsal:
    """The circumstances of a session: who, how long a vector, which ring, with identities or not.

    counter: number of sessions driven so far, shared by the copies that `dataclasses.replace` makes.
    """

    protocol: Protocol
    dimension: int = 5
    nodes: tuple[int, ...] = ()
    bits: int = 16
    active: bool = False
    policy: Policy = field(default_factory=Policy)
    counter: list[int] = field(default_factory=lambda: [0])

    def session(self, round_offset: int = 0) -> Session:
        binding = hashlib.sha256(b"model and configuration").digest()
        return Session(1, 1 + round_offset, "train", tuple(sorted(self.nodes)), self.dimension, self.bits, binding)

    def inputs(self, kind: str) -> dict[int, Vector]:
        """kind: random, zero or largest."""
        largest = np.uint64((1 << self.bits) - 1)
        if kind == "random":
            return {
                node: np.frombuffer(stream(f"input {node}")(8 * self.dimension), dtype="<u8") & largest
                for node in self.nodes
            }
        fill = np.uint64(0) if kind == "zero" else largest
        return {node: np.full(self.dimension, fill, dtype=np.uint64) for node in self.nodes}

    def agreed(self) -> Rehearsal:
        """Return the rehearsal with what the protocol's beacon draws, if it has one: all nodes saw it drawn."""
        beacon: Beacon | None = getattr(self.protocol, "beacon", None)
        if beacon is None:
            return self
        known = identities(self.nodes)
        clients = {node: beacon.client(node, identity=known[node], random=stream(f"draw {node}")) for node in known}
        drawn, _ = draw(beacon, self.session(), clients, set(), {}, {})
        bare: Any = self.protocol  # the contract of a protocol that has a beacon
        return replace(self, protocol=bare.with_drawn(drawn), policy=replace(self.policy, committee=drawn))

    def client(self, node: int, label: str, impostor: int = 0) -> Client:
        known = identities(self.nodes, impostor) if self.active else {}
        return self.protocol.client(
            node, identity=known.get(node), policy=self.policy, random=stream(f"{label} {node}")
        )

    def run(
        self,
        *,
        inputs: Mapping[int, Vector] | None = None,
        vanish: Mapping[int, int] | None = None,
        label: str = "one",
        round_offset: int = 0,
        impostor: int = 0,
        before_reply: Hook | None = None,
        after_reply: Hook | None = None,
    ) -> Run:
        """Drive one session to its end; errors of either role pass through.

        vanish: node -> index of the stage before which it is gone. Hooks see each reply before and after it is
        handed to the server.
        """
        agreed = self.agreed()
        if agreed is not self:
            return agreed.run(
                inputs=inputs,
                vanish=vanish,
                label=label,
                round_offset=round_offset,
                impostor=impostor,
                before_reply=before_reply,
                after_reply=after_reply,
            )
        self.counter[0] += 1
        run = Run(self, dict(inputs if inputs is not None else self.inputs("random")))
        server = self.protocol.server(self.session(round_offset), random=stream(f"{label} server"))
        clients = {node: self.client(node, label, impostor) for node in self.nodes}
        gone = vanish or {}
        while server.stage:
            index = len(run.names)
            if index == len(self.protocol.stages):
                raise RuntimeError(f"stage {server.stage!r} follows the last of {self.protocol.stages}")
            run.names.append(server.stage)
            run.requests.append({node: bytes(request) for node, request in server.outbound().items()})
            run.replies.append({})
            run.kept.append({})
            for node, request in run.requests[index].items():
                if gone.get(node, index + 1) <= index:
                    continue
                reply = self._step(run, clients[node], index, node, request)
                earlier = run.replies[index - 1].get(node) if index else None
                stage = Stage(server.stage, node, reply, earlier, server.receive)
                if before_reply is not None:
                    before_reply(stage)
                server.receive(node, reply)
                run.replies[index][node] = reply
                if after_reply is not None:
                    after_reply(stage)
            server.close()
            if server.stage and server.result is not None:
                run.early_result = server.stage
        run.result = server.result
        return run

    def _step(self, run: Run, client: Client, index: int, node: int, request: bytes) -> bytes:
        kept = run.kept[index - 1][node][1] if index else b""

        def source() -> Vector:
            run.source_calls[node] = run.source_calls.get(node, 0) + 1
            run.source_stage[node] = index
            return run.inputs[node].copy()

        after, reply = client.step(kept, request, source)
        run.kept[index][node] = (kept, bytes(after))
        return bytes(reply)
