"""Questions of a run that nodes answer once: what the server does instead of asking again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from weakref import ref

from privfed.errors import RunFailed
from privfed.grid import Grid
from privfed.record import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from privfed.ring import Layout, bind
from privfed.strategies.exchange import Exchange
from privfed.strategies.view import Outcome

ANY_LAYOUT = Layout(32, 2, 0, 1.0, None, ())
REPEATED = (
    "nodes open one sum of the same model and action in a run, and this one was opened: a second sum over other "
    "survivors would tell what a single node sent. Change the model first, ask once a round, or start a new run"
)


@dataclass(frozen=True, slots=True)
class _Opened:
    round: int
    question: bytes
    outcome: Outcome


class Repeats:
    """Sums that were opened in the run, by model and action, as nodes mark them."""

    def __init__(self) -> None:
        self._grid: ref[Grid] | None = None
        self._opened: dict[bytes, _Opened] = {}

    def find(self, exchange: Exchange) -> Outcome | None:
        """Return the result of an evaluation of this very model under this very configuration, or None.

        Raises RunFailed, before anything is sent, for another sum over the same model and action.
        """
        if self._grid is None or self._grid() is not exchange.grid:
            self._grid, self._opened = ref(exchange.grid), {}
        found = self._opened.get(_mark(exchange))
        if found is None:
            return None
        if exchange.kind != "evaluate" or found.question != _question(exchange):
            raise RunFailed(f"{exchange.kind} round {exchange.round}, the model of round {found.round}: {REPEATED}")
        old = found.outcome
        notes = {**old.notes, "reused-from-round": found.round}
        return replace(old, metrics=MetricRecord(dict(old.metrics)), excluded=[], bytes_down=0, bytes_up=0, notes=notes)

    def note(self, exchange: Exchange, outcome: Outcome) -> Outcome:
        """Remember an opened sum, and return it; only an evaluation's metrics are kept."""
        mark = _mark(exchange)
        if mark and outcome.valid:
            kept = replace(outcome, view=None, notes=dict(outcome.notes)) if exchange.kind == "evaluate" else Outcome()
            self._opened[mark] = _Opened(exchange.round, _question(exchange), kept)
        return outcome


def _mark(exchange: Exchange) -> bytes:
    """Hash model and action as a node does; b"" for a query, where every question is another."""
    arrays = exchange.content.get(exchange.arrays_key)
    if exchange.kind.partition(".")[0] == "query" or not isinstance(arrays, ArrayRecord):
        return b""
    return bind(RecordDict({"arrays": arrays}), ANY_LAYOUT, exchange.kind)


def _question(exchange: Exchange) -> bytes:
    """Hash what is asked but for the number of the round."""
    content = RecordDict()
    for name, record in exchange.content.items():
        if isinstance(record, ConfigRecord):
            record = ConfigRecord({key: value for key, value in record.items() if key != "server-round"})
        content[name] = record
    return bind(content, ANY_LAYOUT, exchange.kind)
