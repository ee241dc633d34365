"""A tiny protocol that satisfies the contract and hides nothing: two stages, "hello" and "mask"."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from privfed.protocols.errors import SERVER, DecodeError, RemoteError, TooFewSurvivors
from privfed.protocols.session import Buffer, Identity, Policy, Random, RingSum, Session, Source, os_random


class ToyClient:
    def __init__(self, node: int, policy: Policy) -> None:
        self.node, self.policy = node, policy

    def step(self, kept: bytes, request: Buffer, source: Source) -> tuple[bytes, Buffer]:
        asked = json.loads(bytes(request))
        if not kept:
            if asked["stage"] != "hello":
                raise RemoteError("out-of-order", (SERVER,))
            if self.policy.binding not in (None, bytes.fromhex(asked["binding"])):
                raise RemoteError("binding-differs", (SERVER,))
            if asked["round"] < self.policy.min_round:
                raise RemoteError("round-not-rising", (SERVER,))
            if len(asked["nodes"]) < self.policy.min_cohort:
                raise RemoteError("cohort-too-small", (SERVER,))
            return bytes(request), b"hello"
        if asked["stage"] != "mask":
            raise RemoteError("out-of-order", (SERVER,))
        return kept, source().astype("<u8").tobytes()


class ToyServer:
    def __init__(self, session: Session, threshold: int) -> None:
        self.session, self.threshold = session, threshold
        self.stage = "hello"
        self.result: RingSum | None = None
        self.asked = list(session.nodes)
        self.got: dict[int, Any] = {}

    def outbound(self) -> dict[int, Buffer]:
        facts = {"stage": self.stage, "round": self.session.round, "nodes": list(self.session.nodes)}
        request = json.dumps({**facts, "binding": self.session.binding.hex()}).encode()
        return dict.fromkeys(self.asked, request)

    def receive(self, node: int, reply: Buffer) -> None:
        if node not in self.asked:
            raise RemoteError("foreign-node", (node,))
        if self.stage == "mask":
            if len(bytes(reply)) != 8 * self.session.dimension:
                raise DecodeError("wrong size")
            self.got[node] = np.frombuffer(bytes(reply), "<u8")
        else:
            self.got[node] = bytes(reply)

    def close(self) -> None:
        if len(self.got) < self.threshold:
            raise TooFewSurvivors(len(self.got), self.threshold, self.stage)
        if self.stage == "hello":
            self.stage, self.asked, self.got = "mask", sorted(self.got), {}
            return
        total = np.zeros(self.session.dimension, np.uint64)
        for vector in self.got.values():
            total += vector
        if self.session.bits < 64:
            total &= np.uint64((1 << self.session.bits) - 1)
        self.result = RingSum(total, frozenset(self.got))
        self.stage = ""


@dataclass(frozen=True)
class Toy:
    threshold: int = 2
    stages: tuple[str, ...] = field(default=("hello", "mask"), init=False)

    def server(self, session: Session, *, random: Random = os_random) -> ToyServer:
        return ToyServer(session, self.threshold)

    def client(
        self,
        node: int,
        *,
        identity: Identity | None = None,
        policy: Policy = Policy(),
        random: Random = os_random,
    ) -> ToyClient:
        return ToyClient(node, policy)
