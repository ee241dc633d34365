"""Which nodes a SuperLink serves: those the signed roster names or an operator approved, and nobody else."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import msgspec

from privfed.decoder import json_decoder
from privfed.errors import PrivfedError
from privfed.runtime.certificate import Peer
from privfed.runtime.credentials import Trust
from privfed.runtime.disk import write_atomically

MAX_NODES = 100_000
_REMEMBERED = 10_000


class RegisterError(PrivfedError):
    """A node that is not known, or cannot be approved."""


class Entry(msgspec.Struct, forbid_unknown_fields=True):
    """A node: "approved", "revoked" or "waiting". seen: seconds since the epoch."""

    node_id: int
    name: str
    state: str
    seen: float = 0.0


class NodeRegister:
    """What operators decided about nodes, in a file. Threads may share it.

    trust: the federation's; its roster approves the nodes it names. None: there are no certificates, so a name proves
    nothing, and every node that is not revoked is served.
    """

    def __init__(self, path: Path, trust: Trust | None) -> None:
        self._path = path
        self._trust = trust
        self._lock = threading.Lock()
        self._entries: dict[int, Entry] = {}
        if path.exists():
            entries = json_decoder(list[Entry]).decode(path.read_bytes())
            self._entries = {entry.node_id: entry for entry in entries}

    def _save(self) -> None:
        entries = [self._entries[node] for node in sorted(self._entries)]
        write_atomically(self._path, msgspec.json.format(msgspec.json.encode(entries)))

    def _rostered(self) -> dict[int, str]:
        if self._trust is None:
            return {}
        roster = self._trust.roster
        return {member.node: member.name for member in roster.nodes if not roster.is_revoked(int(member.serial, 16))}

    def greet(self, peer: Peer) -> str:
        """Note that a node is here; return why it is not served, or nothing."""
        node = peer.node_id
        assert node is not None
        with self._lock:
            entry = self._entries.get(node)
            if entry is None:
                known = sum(one.state == "waiting" for one in self._entries.values())
                if known >= _REMEMBERED or len(self._entries) >= MAX_NODES:
                    return "too many nodes wait for approval: ask the operator to look at `privfed node ls`"
                default = "approved" if self._trust is None or node in self._rostered() else "waiting"
                entry = self._entries[node] = Entry(node, peer.name, default)
                if default == "waiting":  # what the roster says need not be kept: it says so again
                    self._save()
            entry.seen = time.time()
            if entry.state == "waiting" and node in self._rostered():
                entry.state = "approved"
                self._save()
            if entry.state == "approved":
                return ""
            if entry.state == "revoked":
                return f"node {node} was revoked by the operator"
            return f"node {node} waits for approval: the operator runs `privfed node approve {node}`"

    def approve(self, node: int) -> None:
        """Serve a node from now on. Raises RegisterError when it never called."""
        self._set(node, "approved")

    def revoke(self, node: int) -> None:
        """Serve a node no more."""
        self._set(node, "revoked")

    def _set(self, node: int, state: str) -> None:
        with self._lock:
            entry = self._entries.get(node)
            if entry is None:
                name = self._rostered().get(node)
                if name is None:
                    raise RegisterError(f"there is no node {node}: see `privfed node ls`")
                entry = self._entries[node] = Entry(node, name, state)
            entry.state = state
            self._save()

    def approved(self) -> set[int]:
        """Return the nodes that are served, connected or not."""
        with self._lock:
            rostered = {node for node in self._rostered() if node not in self._entries}
            return rostered | {node for node, entry in self._entries.items() if entry.state == "approved"}

    def entries(self) -> list[Entry]:
        """Return all nodes known, by id."""
        with self._lock:
            missing = {node: Entry(node, name, "approved") for node, name in self._rostered().items()}
            found = missing | self._entries
            return [found[node] for node in sorted(found)]
