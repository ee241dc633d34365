"""What every secure-aggregation protocol looks like from outside, and the loop that drives one in this process.

A protocol is a frozen set of parameters with two sans-I/O roles. One *stage* is one request from the server to each
node that is still in, and one reply from each node that is still there:

    server.outbound() -> {node: request}          client.step(kept, request, source) -> (kept', reply)
    server.receive(node, reply)  ... any order    RemoteError(culprits) leaves the state unchanged: exclude that node
    server.close()                                 ends the stage; TooFewSurvivors(have, threshold) ends the session

After the last `close`, `server.result` holds the sum in the ring. Requests and replies are bytes (or flat uint8 views
of big vectors, not copied); `kept` is bytes too, so that a node can persist it before it answers. Neither role reads a
clock, a socket or a global; randomness is an argument that defaults to the operating system. A server is a function of
its session, its randomness and the replies in the order they came, so `privfed.protocols.journal` can finish a session
of any protocol after the server crashed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol as TypingProtocol

import numpy as np
from numpy.typing import NDArray

from privfed.protocols.errors import SERVER, RemoteError

Buffer = bytes | bytearray | memoryview
Random = Callable[[int], bytes]
"""`random(n)` returns n uniform bytes; `os.urandom` unless a test says otherwise."""

Source = Callable[[], NDArray[np.uint64]]
"""Called once, at the stage that needs the input: returns the ring vector, uint32 or uint64 of length `dimension`,
entries below 2**bits. Lets a node train only after the key stages succeeded."""

os_random: Random = os.urandom


@dataclass(frozen=True, slots=True)
class Session:
    """The public facts on which all parties of one session must agree; `digest()` binds them into every key.

    nodes: ascending distinct ids > 0. dimension: entries of the vector. bits: the ring is Z_2^bits, 1..64.
    binding: 32 bytes, H(model, shared configuration), equal on every node or the masks do not cancel.
    round: rises with every session of a run; a client refuses one that does not. action: "train", "evaluate", ...
    """

    run: int
    round: int
    action: str
    nodes: tuple[int, ...]
    dimension: int
    bits: int
    binding: bytes = bytes(32)


@dataclass(frozen=True, slots=True)
class Identity:
    """A node's long-term Ed25519 key and the roster it trusts (node -> public key, 32 bytes), for active security."""

    node: int
    secret_key: bytes = field(repr=False)
    roster: Mapping[int, bytes] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Drawn:
    """A committee that a beacon drew: its members, ascending, and how many nodes they were drawn from."""

    members: tuple[int, ...]
    nodes: int


FACTS = ("run", "round", "action", "bits", "dimension")
"""What of a session a node can know without the server: fields of Session and of Policy."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What a node refuses, whatever the server asks. The defaults suit tests; deployments raise them.

    corrupt: share of a cohort that may collude with the server; parameters safe only against fewer are refused,
    whoever chose them. 0 trusts the parameters, which is right where they are the node's own.
    min_survivors: nodes that must be in a sum it helps to open, whatever the protocol's threshold counts.
    max_dimension: longest vector it makes room for; the default is 1 GiB of 32-bit entries.

    binding, run, round, action, bits, dimension: the only `Session` it joins, as the node knows it itself: from the
    model and configuration it was given, its own run, the message that carries the request, the vector it will send.
    None: any. `check_facts` holds a session to them.

    nodes: the only cohort it joins, its group when a beacon drew groups (`privfed.protocols.beacon`); None: any.
    grouped: it joins no session before a beacon gave it a group.
    committee: the only committee it shares a secret with, as it saw a beacon draw it; None: it saw none.
    weight_key: the only metric its update is weighed by, where updates are weighed; None: the one the server names,
    which could be 0 on all nodes but few (`mods.secure_aggregation` checks it).
    """

    min_cohort: int = 2
    min_threshold: int = 2
    min_neighbours: int = 1
    min_bits: int = 8
    require_active: bool = False
    min_round: int = 0
    binding: bytes | None = None
    corrupt: float = 0.0
    min_survivors: int = 2
    max_dimension: int = 1 << 28
    run: int | None = None
    round: int | None = None
    action: str | None = None
    bits: int | None = None
    dimension: int | None = None
    nodes: tuple[int, ...] | None = None
    grouped: bool = False
    committee: Drawn | None = None
    weight_key: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.corrupt < 1:
            raise ValueError(f"corrupt must be a share of the cohort in [0, 1), got {self.corrupt}")
        if self.max_dimension < 0:
            raise ValueError(f"max_dimension must be a number of entries, got {self.max_dimension}")

    def check_facts(self, session: Session) -> None:
        """Refuse a session that is not the one this node knows of.

        Every client calls it on the first request, before it computes or makes room for anything. Raises RemoteError:
        wrong-run, wrong-round, wrong-action, wrong-bits, wrong-dimension, dimension-too-large, inconsistent-model,
        wrong-group.
        """
        for name in FACTS:
            known, told = getattr(self, name), getattr(session, name)
            if known is not None and known != told:
                raise RemoteError(
                    f"wrong-{name}", (SERVER,), f"the session's {name} is {told!r}, this node's {known!r}"
                )
        if session.dimension > self.max_dimension:
            detail = f"{session.dimension} entries are asked for, this node's ceiling is {self.max_dimension}"
            raise RemoteError("dimension-too-large", (SERVER,), detail)
        if self.binding not in (None, session.binding):
            detail = "the session is bound to another model or configuration"
            raise RemoteError("inconsistent-model", (SERVER,), detail)
        if self.nodes not in (None, session.nodes):
            raise RemoteError("wrong-group", (SERVER,), "the session is not over the group the beacon gave this node")


@dataclass(frozen=True, slots=True)
class RingSum:
    """total: uint64[dimension], the sum mod 2**bits over `survivors`, the nodes whose input is in it."""

    total: NDArray[np.uint64]
    survivors: frozenset[int]


class Client(TypingProtocol):
    """One node's part in one session."""

    def step(self, kept: bytes, request: Buffer, source: Source) -> tuple[bytes, Buffer]:
        """Answer one request. `kept` is b"" before the first. Raises RemoteError when the request breaks a rule."""
        ...


class Server(TypingProtocol):
    """The server's part in one session."""

    @property
    def stage(self) -> str:
        """Name of the stage that is open; "" when done."""
        ...

    @property
    def result(self) -> RingSum | None: ...

    def outbound(self) -> dict[int, Buffer]:
        """Requests of the open stage, by node. Equal requests are the same object, so that they are sent once."""
        ...

    def receive(self, node: int, reply: Buffer) -> None: ...

    def close(self) -> None: ...


class Protocol(TypingProtocol):
    """Frozen parameters of a secure-aggregation protocol."""

    @property
    def stages(self) -> tuple[str, ...]: ...

    def server(self, session: Session, *, random: Random = os_random) -> Server: ...

    def client(
        self,
        node: int,
        *,
        identity: Identity | None = None,
        policy: Policy = Policy(),
        random: Random = os_random,
    ) -> Client: ...


def __getattr__(name: str) -> object:
    """`secure_sum` drives a session in this process; it needs every part of a protocol, so it loads on first use."""
    if name == "secure_sum":
        from privfed.protocols.loop import secure_sum

        return secure_sum
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
