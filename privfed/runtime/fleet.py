"""The node's side of the network: one outbound connection to a SuperLink, which pushes tasks over it.

Whatever the network does, a caller sees tasks, replies that count exactly once, and time passing. The connection is
made again by itself, after a pause that doubles up to `MAX_PAUSE` and is scattered, so that a restarted SuperLink is
not met by all its nodes at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from privfed.context import UserConfigValue
from privfed.message import Message

if TYPE_CHECKING:
    import grpc

MAX_PAUSE = 15.0


class Credentials(Protocol):
    """How a node proves who it is, and checks the SuperLink (`privfed.runtime.credentials`)."""

    def channel_credentials(self) -> grpc.ChannelCredentials: ...


@dataclass(frozen=True, slots=True)
class Task:
    """One instruction to this node. expires_at: seconds since the epoch, after which no reply counts.

    attempt: rises by one whenever the run is resumed after a crash. commit: the last committed round when the task was
    handed out. State that the node kept under an earlier attempt and the same or a later commit belongs to a round
    that is done again: the node goes on from the state it had when `commit` was first seen.
    """

    token: str
    message: Message
    expires_at: float
    attempt: int = 1
    commit: int = 0


@dataclass(frozen=True, slots=True)
class RunGrant:
    """A run this node takes part in. bundle: SHA-256 (hex) of the app's archive. nodes: all nodes of the run."""

    run_id: int
    name: str
    bundle: str
    run_config: Mapping[str, UserConfigValue]
    seed: int | None
    nodes: tuple[int, ...]


@dataclass(slots=True)
class FleetOptions:
    """What a node tells its connection.

    slots: tasks it takes at a time. holding: tokens of tasks it received before a restart and will still answer; all
    others are handed out again. runs: runs it keeps workers or state for, to be told when they ended.
    on_status: told in one line what the connection does ("connected", "waiting for approval", ...).
    on_ended: told the id of each run that ended, from a thread of the client.
    cache: folder for what was downloaded; None keeps it in memory.
    """

    slots: int = 4
    holding: tuple[str, ...] = ()
    runs: tuple[int, ...] = ()
    on_status: Callable[[str], None] = field(default=lambda text: None)
    on_ended: Callable[[int], None] = field(default=lambda run_id: None)
    cache: str | None = None


class FleetClient:
    """A blocking facade over the connection.

    FleetClient(address, credentials, node_id, options): credentials None is an unencrypted connection, and node_id is
    then who the node says it is; with credentials the certificate says it, and node_id may be None.

    receive(timeout) -> Task | None: the next task pushed by the SuperLink; None after `timeout` seconds or when closed.
    reply(token, reply) -> bool: True when the reply counts, now or earlier; False when the lease was lost. Blocks
        while the SuperLink cannot be reached; the same reply may be sent again, after a restart too.
    run(run_id) -> RunGrant; bundle(digest) -> bytes, its hash checked.
    ended() -> list of the runs that ended since the last call.
    """
