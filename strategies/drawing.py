"""What a beacon draws for a run, groups or a committee: once, over the nodes that are there, and kept from then on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from weakref import ref

from privfed.errors import QuorumError, RunFailed
from privfed.grid import Grid
from privfed.protocols import codec
from privfed.protocols.beacon import ATTEMPTS, Beacon, BeaconServer, Groups
from privfed.protocols.errors import DecodeError, ProtocolError, TooFewSurvivors
from privfed.protocols.journal import JournalServer
from privfed.protocols.session import Drawn, Session
from privfed.record import ConfigRecord, RecordDict
from privfed.ring import Layout, bind
from privfed.strategies.endpoint import Endpoint
from privfed.strategies.exchange import Exchange
from privfed.strategies.journal import SessionJournal, journal_path, write_durably
from privfed.strategies.session import SessionDrive, run_stage

_NONE = RecordDict()


@dataclass(frozen=True, slots=True)
class Outcome:
    """groups: of a committee's draw the committee alone. nodes: how many they were drawn from."""

    groups: Groups
    nodes: int

    @property
    def committee(self) -> Drawn:
        return Drawn(self.groups[0], self.nodes)

    def encode(self, run: int) -> bytes:
        parts = [codec.u64(run), codec.u32(self.nodes), codec.u32(len(self.groups))]
        return b"".join((*parts, *map(codec.node_list, self.groups)))


def _read(reader: codec.Reader) -> tuple[int, Outcome]:
    run, nodes, count = reader.number(8), reader.number(4), reader.number(4)
    return run, Outcome(tuple(reader.nodes() for _ in range(count)), nodes)


class Drawing:
    """Run a beacon when a run first needs what it draws, and hand out the same from then on.

    what: "groups" or "committee", as errors, reports and the file in the run's folder have it. number: gives session
    numbers, which rise.
    """

    def __init__(self, beacon: Beacon, what: str, number: Callable[[], int], stage_timeout: float) -> None:
        self._beacon = beacon
        self._what = what
        self._number = number
        self._timeout = stage_timeout
        self._grid: ref[Grid] | None = None
        self.outcome = Outcome((), 0)

    def of(self, exchange: Exchange) -> Outcome:
        """Return what was drawn in the exchange's run. Raises QuorumError, RunFailed when nothing can be."""
        if self._grid is None or self._grid() is not exchange.grid:
            self.outcome = self._known(exchange) or self._draw(exchange)
            self._grid = ref(exchange.grid)
            sizes = [len(group) for group in self.outcome.groups]
            facts = {self._what: len(sizes), "smallest": min(sizes), "nodes": self.outcome.nodes}
            exchange.grid.recorder.report("drawn", round=exchange.round, **facts)
        return self.outcome

    def _known(self, exchange: Exchange) -> Outcome | None:
        """Return what this run drew before its server crashed: another beacon would end open sessions."""
        path = journal_path(exchange, self._what)
        if path is None or not path.exists():
            return None
        try:
            run, outcome = codec.decode(path.read_bytes(), _read)
        except DecodeError as cause:
            raise RunFailed(
                f"{path} is damaged: {cause}; nodes keep their {self._what}, delete it to ask them"
            ) from cause
        return outcome if run == exchange.grid.run_id else None

    def _keep(self, exchange: Exchange, outcome: Outcome) -> Outcome:
        path = journal_path(exchange, self._what)
        if path is not None:
            write_durably(path, outcome.encode(exchange.grid.run_id))
        return outcome

    def _draw(self, exchange: Exchange) -> Outcome:
        nodes, where = tuple(exchange.grid.get_node_ids()), f"{exchange.kind} round {exchange.round}"
        last: TooFewSurvivors | None = None
        for _ in range(ATTEMPTS):
            journal = SessionJournal(
                journal_path(exchange, f"draw-{self._what}.journal"), exchange.grid.run_id, exchange.kind
            )
            nodes = nodes if journal.pending is None else journal.pending.nodes
            try:
                drive, server = self._open(exchange, nodes, journal)
                while server.stage:
                    run_stage(exchange, dict.fromkeys(nodes, drive), 0, self._timeout)
                    drive.close()
                outcome = self._keep(exchange, Outcome(server.groups, server.nodes))
                journal.discard()
                return outcome
            except TooFewSurvivors as cause:
                journal.discard()
                last, silent = cause, set(server.silent)
                nodes = tuple(node for node in nodes if node not in silent)
                if cause.stage == "commit" or len(nodes) < self._beacon.fewest:
                    break
            except ProtocolError as cause:
                raise RunFailed(f"{where}: no {self._what} could be drawn: {cause}") from cause
        assert last is not None
        causes = "; ".join(f"{count} x {text}" for text, count in drive.outcome.causes().items())
        detail = f"{where}: no {self._what} could be drawn, {last}" + (f": {causes}" if causes else "")
        raise QuorumError(last.have, last.threshold, detail) from last

    def _open(
        self, exchange: Exchange, nodes: tuple[int, ...], journal: SessionJournal
    ) -> tuple[SessionDrive, BeaconServer]:
        """Begin a draw over some nodes, or take up the one that a crash cut off."""
        layout = Layout(32, max(2, len(nodes)), 0, 1.0, None, ())
        session = journal.pending
        if session is None:
            binding, run = bind(_NONE, layout, exchange.kind), exchange.grid.run_id
            session = Session(run, self._number(), exchange.kind, nodes, layout.size, layout.bits, binding)
        description = ConfigRecord({"name": type(self._beacon).__name__})
        description["group_size"], description["committee"] = self._beacon.group_size, self._beacon.committee
        endpoint = Endpoint(self._beacon, lambda agreed: journal.serve(self._beacon, agreed))
        drive = SessionDrive(replace(exchange, content=_NONE), endpoint, session, layout, description)
        server = drive.server.inner if isinstance(drive.server, JournalServer) else drive.server
        assert isinstance(server, BeaconServer)
        return drive, server
