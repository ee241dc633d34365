"""What an app kept when it gave its input to a secure session: kept beside what the node's mods keep, and not undone.

A server that dies in a session takes it up again from its journal, and the inputs it had taken count. The state of the
app goes back when a run is attempted again, or when a reply was not counted, since its training is done again; here it
is not. So the node keeps the state that goes with its input, and the app goes on from it when the session does, or when
its round was committed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from privfed.message import Message
from privfed.record import ConfigRecord, RecordDict
from privfed.ring import SECURE
from privfed.runtime.store import NodeState, pack_states, unpack_states

ABOUT, STATE = "privfed.taken.about", "privfed.taken.state"


def taken_up(
    app: NodeState, mods: Mapping[str, RecordDict], message: Message, began: Sequence[int], commit: int
) -> NodeState:
    """Return the app's state to go on from: the one that goes with its last input, if that counts. Else `app`.

    began, commit: of the task (`privfed.runtime.fleet.Task`).
    """
    known = mods.get(ABOUT)
    if known is None:
        return app
    about = known.config_records["about"]
    session, number, seen = (int(str(about[name])) for name in ("session", "round", "attempts"))
    if any(back < number - 1 for back in began[seen:]):  # the run went on from before that round
        return app
    if commit < number and session_of(message) != session:
        return app
    # Nothing kept is no record at all, and does not come back from the disk.
    return unpack_states(mods.get(STATE, RecordDict())).get(0, NodeState())


def note_taken(mods: dict[str, RecordDict], app: NodeState, message: Message, attempts: int) -> None:
    """Note the state of an app that ran over a message: that of an input is kept, after anything else none is."""
    session, number = session_of(message), message.metadata.group_id
    mods.pop(ABOUT, None)
    mods.pop(STATE, None)
    if session is not None and number.isdecimal():
        about = ConfigRecord({"session": session, "round": int(number), "attempts": attempts})
        mods[ABOUT] = RecordDict({"about": about})
        mods[STATE] = pack_states({0: app})


def session_of(message: Message) -> int | None:
    """Return the number of the secure session a message is of; None for one that is of none."""
    head = message.content.get(SECURE)
    number = head.get("number") if isinstance(head, ConfigRecord) else None
    return number if type(number) is int else None
