"""What a node is told to do: its tasks, and the runs they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from privfed.context import UserConfigValue
from privfed.message import Message


@dataclass(frozen=True, slots=True)
class Task:
    """One instruction to this node. expires_at: seconds since the epoch, after which no reply counts.

    began: the last committed round when each attempt of the run began, in order; a run is attempted again after its
    server app died. commit: the last committed round when the task was handed out. State that the node kept since an
    attempt began that it had not seen belongs to a round that is done again: the node goes on from the state before.
    """

    token: str
    message: Message
    expires_at: float
    began: tuple[int, ...] = (0,)
    commit: int = 0

    @property
    def attempt(self) -> int:
        """How often the run was started."""
        return len(self.began)


@dataclass(frozen=True, slots=True)
class RunGrant:
    """A run this node takes part in. bundle: SHA-256 (hex) of the app's archive. nodes: all nodes of the run."""

    run_id: int
    name: str
    bundle: str
    run_config: Mapping[str, UserConfigValue]
    seed: int | None
    nodes: tuple[int, ...]


class Fleet(Protocol):
    """What a node uses of `privfed.runtime.fleet.FleetClient`."""

    @property
    def node_id(self) -> int: ...
    def receive(self, timeout: float | None = None) -> Task | None: ...
    def reply(self, token: str, reply: Message) -> bool: ...
    def run(self, run_id: int) -> RunGrant: ...
    def bundle(self, digest: str) -> bytes: ...
    def ended(self) -> list[int]: ...
    def report_wait(self, reason: str) -> None: ...
    def close(self) -> None: ...
