"""The groups of a run: drawn once by a beacon over the nodes that are there, and kept by the nodes themselves."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import replace
from weakref import ref

from privfed.errors import QuorumError, RunFailed
from privfed.grid import Grid
from privfed.protocols import codec
from privfed.protocols.beacon import ATTEMPTS, Beacon, BeaconServer, Groups
from privfed.protocols.errors import DecodeError, ProtocolError, TooFewSurvivors
from privfed.protocols.session import Session
from privfed.record import ConfigRecord, RecordDict
from privfed.ring import Layout, bind
from privfed.strategies.exchange import Exchange
from privfed.strategies.journal import journal_path, write_durably
from privfed.strategies.session import SessionDrive, run_stage

_NONE = RecordDict()
GROUPS = "groups"
"""Name of the file of a run's groups."""


def _read_groups(reader: codec.Reader) -> tuple[int, Groups]:
    run, count = reader.number(8), reader.number(4)
    return run, tuple(reader.nodes() for _ in range(count))


class Grouping:
    """Draw groups when a run first needs them, and hand out the same ones from then on.

    number: gives session numbers, which rise.
    """

    def __init__(self, group_size: int, number: Callable[[], int], stage_timeout: float) -> None:
        self._beacon = Beacon(group_size)
        self._number = number
        self._timeout = stage_timeout
        self._grid: ref[Grid] | None = None
        self._key = secrets.token_bytes(16)
        self.groups: Groups = ()

    def of(self, exchange: Exchange) -> Groups:
        """Return the groups of the exchange's run. Raises QuorumError, RunFailed when there are none."""
        if self._grid is None or self._grid() is not exchange.grid:
            self.groups = self._known(exchange) or self._draw(exchange)
            self._grid = ref(exchange.grid)
            sizes = [len(group) for group in self.groups]
            exchange.grid.recorder.report("groups", round=exchange.round, groups=len(sizes), smallest=min(sizes))
        return self.groups

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

    def _known(self, exchange: Exchange) -> Groups:
        """Return the groups that this run drew before its server crashed: another beacon would end open sessions."""
        path = journal_path(exchange, GROUPS)
        if path is None or not path.exists():
            return ()
        try:
            run, groups = codec.decode(path.read_bytes(), _read_groups)
        except DecodeError as cause:
            raise RunFailed(f"{path} is damaged: {cause}; nodes keep their groups, delete it to ask them") from cause
        return groups if run == exchange.grid.run_id else ()

    def _keep(self, exchange: Exchange, groups: Groups) -> Groups:
        path = journal_path(exchange, GROUPS)
        if path is not None:
            parts = [codec.u64(exchange.grid.run_id), codec.u32(len(groups)), *map(codec.node_list, groups)]
            write_durably(path, b"".join(parts))
        return groups

    def _draw(self, exchange: Exchange) -> Groups:
        nodes, where = tuple(exchange.grid.get_node_ids()), f"{exchange.kind} round {exchange.round}"
        last: TooFewSurvivors | None = None
        for _ in range(ATTEMPTS):
            drive, server = self._open(exchange, nodes)
            try:
                while server.stage:
                    run_stage(exchange, dict.fromkeys(nodes, drive), 0, self._timeout)
                    drive.close()
                return self._keep(exchange, server.groups)
            except TooFewSurvivors as cause:
                last, silent = cause, set(server.silent)
                nodes = tuple(node for node in nodes if node not in silent)
                if cause.stage == "commit" or len(nodes) < 2:
                    break
            except ProtocolError as cause:
                raise RunFailed(f"{where}: no groups could be drawn: {cause}") from cause
        assert last is not None
        causes = "; ".join(f"{count} x {text}" for text, count in drive.outcome.causes().items())
        detail = f"{where}: no groups could be drawn, {last}" + (f": {causes}" if causes else "")
        raise QuorumError(last.have, last.threshold, detail) from last

    def _open(self, exchange: Exchange, nodes: tuple[int, ...]) -> tuple[SessionDrive, BeaconServer]:
        layout = Layout(32, max(2, len(nodes)), 0, 1.0, None, ())
        binding = bind(_NONE, layout, exchange.kind)
        session = Session(exchange.grid.run_id, self._number(), exchange.kind, nodes, layout.size, layout.bits, binding)
        description = ConfigRecord()
        description["name"], description["group_size"] = "Beacon", self._beacon.group_size
        quiet = replace(exchange, content=_NONE)
        drive = SessionDrive(quiet, self._beacon, session, layout, description)
        assert isinstance(drive.server, BeaconServer)
        return drive, drive.server
