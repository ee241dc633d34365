"""A SuperLink without a network: a Link in this process, and what a node sees of it."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable
from pathlib import Path

from privfed.context import UserConfig
from privfed.message import Message
from privfed.runtime.bundle import build
from privfed.runtime.fleet import RunGrant, Task
from privfed.runtime.handshake import NetworkError
from privfed.runtime.link import Link
from privfed.runtime.store import Lease

RUN = 7


class PaperLink:
    """One run of one app over nodes 1 to n; hands each node its own leases."""

    def __init__(
        self, app: Path, nodes: int, run_config: UserConfig | None = None, seed: int | None = 1, lease: float = 3600.0
    ) -> None:
        self.link = Link(lease_seconds=lease)
        self.archive = build(app)
        ids = tuple(range(1, nodes + 1))
        digest = hashlib.sha256(self.archive).hexdigest()
        self.grant = RunGrant(RUN, "paper", digest, run_config or {}, seed, ids)
        self.link.create_run(RUN, ids)
        self.link.set_run_state(RUN, "running")
        self.inbox: dict[int, queue.SimpleQueue[Task]] = {node: queue.SimpleQueue() for node in ids}
        self.leases: dict[str, Lease] = {}
        self.counted: dict[str, bool] = {}
        self.answers: list[tuple[str, Message]] = []
        self.lock = threading.Lock()
        self.closed = threading.Event()
        threading.Thread(target=self._deal, daemon=True).start()

    def _deal(self) -> None:
        while not self.closed.is_set():
            lease = self.link.lease(0.1)
            if lease is not None:
                with self.lock:
                    self.leases[lease.token] = lease
                task = Task(lease.token, lease.message, lease.expires_at)
                self.inbox[lease.message.metadata.dst_node_id].put(task)

    def reply(self, token: str, reply: Message) -> bool:
        with self.lock:
            if token not in self.counted:
                self.counted[token] = self.link.complete(self.leases[token], reply, None)
                self.answers.append((token, reply))
            return self.counted[token]

    def close(self) -> None:
        self.closed.set()
        self.link.close()


class PaperFleet:
    """The FleetClient of one node. offline: set it to lose the connection. told: what the node hears of a run."""

    def __init__(self, paper: PaperLink, node_id: int) -> None:
        self.paper = paper
        self.node_id = node_id
        self.inbox = paper.inbox[node_id]
        self.offline = threading.Event()
        self.closed = threading.Event()
        self.over: list[int] = []
        self.waits = [""]
        self.refuse: Callable[[Message], bool] = lambda reply: False
        self.told: Callable[[RunGrant], RunGrant] = lambda grant: grant

    def receive(self, timeout: float | None = None) -> Task | None:
        try:
            return self.inbox.get(timeout=min(timeout or 1.0, 0.05))
        except queue.Empty:
            return None

    def reply(self, token: str, reply: Message) -> bool:
        while self.offline.is_set():
            if self.closed.wait(0.01):
                raise NetworkError("closed")
        if self.refuse(reply):
            return False
        return self.paper.reply(token, reply)

    def run(self, run_id: int) -> RunGrant:
        assert run_id == RUN
        return self.told(self.paper.grant)

    def bundle(self, digest: str) -> bytes:
        assert digest == self.paper.grant.bundle
        return self.paper.archive

    def ended(self) -> list[int]:
        over, self.over = self.over, []
        return over

    def report_wait(self, reason: str) -> None:
        if self.waits[-1] != reason:
            self.waits.append(reason)

    def close(self) -> None:
        self.closed.set()
