"""The groups of a run, drawn by a beacon, and which of them an exchange asks."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable

from privfed.protocols.beacon import Beacon, Groups
from privfed.strategies.drawing import Drawing
from privfed.strategies.exchange import Exchange


class Grouping:
    """Draw groups when a run first needs them, and hand out the same ones from then on.

    number: gives session numbers, which rise.
    """

    def __init__(self, group_size: int, number: Callable[[], int], stage_timeout: float) -> None:
        self._drawing = Drawing(Beacon(group_size), "groups", number, stage_timeout)
        self._key = secrets.token_bytes(16)

    @property
    def groups(self) -> Groups:
        """The groups of the run; empty before its first exchange."""
        return self._drawing.outcome.groups

    def of(self, exchange: Exchange) -> Groups:
        """Return the groups of the exchange's run. Raises QuorumError, RunFailed when there are none."""
        return self._drawing.of(exchange).groups

    def asked(self, exchange: Exchange) -> dict[int, tuple[int, ...]]:
        """Return the groups of this exchange by number: all of them, or as many as its sample of nodes fills.

        A group is asked whole, since its members refuse a session over a part of it.
        """
        groups, wanted = self.of(exchange), set(exchange.nodes)
        members = {node: index for index, group in enumerate(groups) for node in group}
        there = set(exchange.grid.get_node_ids()) & set(members)
        count = max(1, round(len(groups) * len(wanted & there) / max(1, len(there))))
        key = self._key if exchange.grid.seed is None else str(exchange.grid.seed).encode()
        label = key + f"/{exchange.kind}/{exchange.round}/".encode()
        order = sorted(wanted & there, key=lambda node: hashlib.sha256(label + str(node).encode()).digest())
        chosen = sorted(list(dict.fromkeys(members[node] for node in order))[:count])
        return {index: groups[index] for index in chosen}
