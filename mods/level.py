"""Parts of a node's noise that it gives away once it is known how few nodes dropped [Jiang+24].

The server names a level of drops at the first stage after the input, and keeps to it. The node then helps to open no
sum with fewer survivors than that level provides for: the survivors are the protocol's, signed where it is active, so a
server cannot pretend that fewer nodes dropped. With its last reply the node gives the keys of the parts above it.
"""

from __future__ import annotations

from privfed.errors import PlanRefused
from privfed.record import ConfigRecord, RecordDict

_STATE, _REMOVED = "levels", "removed"


class Levels:
    """What a node keeps of a session's removable noise, in the state of the mod that masks."""

    def __init__(self, state: RecordDict) -> None:
        self._state = state

    def forget(self) -> None:
        """Begin a session."""
        self._state.pop(_STATE, None)
        self._state.pop(_REMOVED, None)

    def keep(self, demands: ConfigRecord, stage: int) -> None:
        """Keep the keys of the vector that is masked at this stage, if it has removable parts."""
        if "level-keys" in demands:
            kept = ConfigRecord({"input": stage, "level": -1})
            kept.update({name: demands[name] for name in ("level-survivors", "level-keys")})
            self._state[_STATE] = kept

    def floor(self, stage: int, level: int | None) -> int:
        """Return how many survivors a stage that names this level needs. Raises PlanRefused for one that may not."""
        if level is None:
            return 0
        record = self._state.get(_STATE)
        if not isinstance(record, ConfigRecord):
            raise PlanRefused(f"level {level} was named, and this node's noise has no removable parts")
        survivors, named = record["level-survivors"], int(str(record["level"]))
        first = named < 0 and stage == int(str(record["input"])) + 1
        if not isinstance(survivors, list) or not 0 <= level < len(survivors) or not (first or level == named):
            raise PlanRefused(
                f"level {level} was named at stage {stage}, after {named}: it is named once, after the input"
            )
        return int(str(survivors[level]))

    def answered(self, level: int | None, *, over: bool) -> None:
        """Note the level of an answered stage; after the last one only what is given away is left."""
        record = self._state.get(_STATE)
        if not isinstance(record, ConfigRecord):
            return
        if level is not None:
            record["level"] = level
        if over:
            keys = record["level-keys"]
            del self._state[_STATE]
            if level is not None and isinstance(keys, list):
                given = [key for key in keys[level:] if isinstance(key, bytes)]
                self._state[_REMOVED] = ConfigRecord({"keys": given})

    @property
    def removed(self) -> ConfigRecord | None:
        """What the last reply of the session gives away."""
        record = self._state.get(_REMOVED)
        return record if isinstance(record, ConfigRecord) else None
