"""How a node's side reaches the Link: the one seam between a simulation and a deployment."""

from __future__ import annotations

from typing import Protocol

from privfed.message import Message
from privfed.runtime.link import Link
from privfed.runtime.store import Lease, NodeState


class Transport(Protocol):
    """Receive tasks and hand back replies."""

    def receive(self, timeout: float | None) -> Lease | None:
        """Wait for a task (seconds; None: until closed). None on timeout or when closed."""
        ...

    def reply(self, lease: Lease, reply: Message, state: NodeState | None) -> bool:
        """Hand back the reply and the node's new state; False when the lease was lost."""
        ...


class MemoryTransport:
    """Messages by reference to a Link in this process: nothing is copied, serialised or hashed."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def receive(self, timeout: float | None) -> Lease | None:
        return self._link.lease(timeout)

    def reply(self, lease: Lease, reply: Message, state: NodeState | None) -> bool:
        return self._link.complete(lease, reply, state)
