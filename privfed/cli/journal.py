"""Logs of the long-lived processes: lines for people, or JSON for machines; on stderr.

A line carries what its work is bound to (`structlog.contextvars`): the run, the node, the task, the peer.
"""

from __future__ import annotations

import logging
import sys

import structlog
from structlog.typing import EventDict, Processor

SECRET = ("authorization", "credential", "key", "password", "secret", "token")


def configure(form: str, *, debug: bool = False) -> None:
    """Send the log of this process to stderr. form: "text" or "json"."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        _cover,
    ]
    last: list[Processor]
    if form == "json":
        last = [structlog.processors.ExceptionRenderer(), structlog.processors.JSONRenderer()]
    else:
        # Plain tracebacks: the default ones show local variables, keys among them.
        plain = structlog.dev.plain_traceback
        colors = sys.stderr.isatty()
        last = [structlog.dev.ConsoleRenderer(colors=colors, timestamp_key="time", exception_formatter=plain)]
    handler = logging.StreamHandler(sys.stderr)
    remove = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=[remove, *last]))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if debug else logging.WARNING)  # of other packages
    logging.getLogger("privfed").setLevel(logging.DEBUG if debug else logging.INFO)


def _cover(logger: object, method: str, event: EventDict) -> EventDict:
    """Cover what is named like a secret, should anybody ever bind one."""
    del logger, method
    return {name: "***" if any(word in name.lower() for word in SECRET) else value for name, value in event.items()}
