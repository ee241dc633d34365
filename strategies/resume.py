"""What a start of a strategy may take up: the last round that this very start committed, in an earlier process."""

from __future__ import annotations

from weakref import ref

from privfed.errors import RunFailed
from privfed.grid import Checkpoint, Recorder
from privfed.record import ConfigRecord, RecordDict

START = "privfed.start"
_starts: dict[int, int] = {}
_alive: dict[int, ref[Recorder]] = {}


def _count(recorder: Recorder) -> int:
    """Return which start on this very recorder this is; it is forgotten with the recorder, which need not hash."""
    key = id(recorder)
    if key not in _alive:

        def forget(_: ref[Recorder]) -> None:
            _alive.pop(key, None)
            _starts.pop(key, None)

        _alive[key] = ref(recorder, forget)
    _starts[key] = _starts.get(key, 0) + 1
    return _starts[key]


class Resumption:
    """The n-th start of a strategy in a run; each start of a run begins anew, unless it is the one that was cut off.

    checkpoint: what to go on from, or None. Raises RunFailed when a later start than this one was cut off: what this
    one returned is not kept, so the run cannot be taken up.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.number = _count(recorder)
        found = recorder.restore()
        number = _number(found) if found is not None else 0
        if number > self.number:
            raise RunFailed(
                f"the run was cut off in start {number} of a strategy, and only a run's first start can be resumed: "
                "run it again from the beginning"
            )
        self.checkpoint: Checkpoint | None = found if number == self.number else None

    def mark(self, state: RecordDict) -> None:
        """Note in a checkpoint's state which start it belongs to."""
        state[START] = ConfigRecord({"number": self.number})


def _number(checkpoint: Checkpoint) -> int:
    record = checkpoint.state.get(START)
    return int(str(record["number"])) if isinstance(record, ConfigRecord) else 1
