"""What a node tells its connection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True)
class FleetOptions:
    """What a node tells its connection.

    slots: tasks it takes at a time. holding: tokens of tasks it received before a restart and will still answer; all
    others are handed out again. runs: runs it keeps workers or state for, to be told when they ended.
    on_status: told in one line what the connection does ("connected", "waiting for approval", ...).
    on_ended: told the id of each run that ended, from a thread of the client.
    cache: folder for what was downloaded, kept for the next start; None: one that is removed when the client closes.
    """

    slots: int = 4
    holding: tuple[str, ...] = ()
    runs: tuple[int, ...] = ()
    on_status: Callable[[str], None] = field(default=lambda text: None)
    on_ended: Callable[[int], None] = field(default=lambda run_id: None)
    cache: str | None = None
