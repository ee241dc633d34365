"""Note how large messages are."""

from __future__ import annotations

import logging

from privfed.apps import CallNext, Mod
from privfed.context import Context
from privfed.message import Message

log = logging.getLogger("privfed.mods")


def message_size(level: int = logging.INFO) -> Mod:
    """Log the content bytes of every message and of its reply, array bytes apart; nothing is changed."""

    def note_size(message: Message, context: Context, call_next: CallNext) -> Message:
        _note("received", message, context, level)
        reply = call_next(message, context)
        _note("replies", reply, context, level)
        return reply

    return note_size


def _note(what: str, message: Message, context: Context, level: int) -> None:
    if message.has_error():
        log.log(level, "node %d %s an error: %s", context.node_id, what, message.error)
        return
    content = message.content
    arrays = sum(record.count_bytes() for record in content.array_records.values())
    kind = message.metadata.message_type
    log.log(
        level, "node %d %s %s: %d bytes, %d of them arrays", context.node_id, what, kind, content.count_bytes(), arrays
    )
