"""A protocol as a stage drives it: its server made another way, or asking only the nodes that are there."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass

from privfed.protocols.session import (
    Buffer,
    Client,
    Identity,
    Policy,
    Protocol,
    Random,
    RingSum,
    Server,
    Session,
    os_random,
)
from privfed.strategies.session import input_stage


class PresentServer:
    """A server that asks only nodes that are there: the others count as dropped out, and nobody waits for them."""

    def __init__(self, server: Server, present: Set[int]) -> None:
        self._server, self._present = server, present

    @property
    def stage(self) -> str:
        return self._server.stage

    @property
    def result(self) -> RingSum | None:
        return self._server.result

    def outbound(self) -> dict[int, Buffer]:
        return {node: request for node, request in self._server.outbound().items() if node in self._present}

    def receive(self, node: int, reply: Buffer) -> None:
        self._server.receive(node, reply)

    def close(self) -> None:
        self._server.close()


@dataclass(frozen=True)
class Endpoint:
    """A protocol whose server `make` makes."""

    protocol: Protocol
    make: Callable[[Session], Server]

    @property
    def stages(self) -> tuple[str, ...]:
        return self.protocol.stages

    @property
    def input_stage(self) -> str | None:
        return input_stage(self.protocol)

    def server(self, session: Session, *, random: Random = os_random) -> Server:
        return self.make(session)

    def client(
        self,
        node: int,
        *,
        identity: Identity | None = None,
        policy: Policy = Policy(),
        random: Random = os_random,
    ) -> Client:
        return self.protocol.client(node, identity=identity, policy=policy, random=random)
