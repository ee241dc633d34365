"""What a node's metrics may say, and about how many."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection

from privfed.apps import CallNext, Mod
from privfed.context import Context
from privfed.message import Error, ErrorCode, Message
from privfed.record import MetricRecord, RecordDict
from privfed.update import PLAN

log = logging.getLogger("privfed.mods")


def metric_floor(
    min_examples: int, *, key: str = "num-examples", allowed: Collection[str] | None = None, round_to: int = 1
) -> Mod:
    """Let metrics leave only when they are about enough examples, and none of them when a privacy plan is in force.

    min_examples: a reply whose `key` is smaller leaves without its metrics, `key` included; one without `key` too.
    allowed: names that may leave; None: all. round_to: `key` is rounded down to a multiple of it.

    Under a privacy plan (a `privfed.plan` record in the message) every metric stays on the node, whatever its size: a
    metric is made of the data, and has no noise that anybody accounts for; evaluate on data the server holds. A floor
    is not differential privacy: two cohorts that differ by one node still tell that node's metric.

    Raises ValueError for min_examples or round_to below 1.
    """
    if min_examples < 1:
        raise ValueError(f"min_examples must be >= 1, got {min_examples}")
    if round_to < 1:
        raise ValueError(f"round_to must be >= 1, got {round_to}")

    def floor(message: Message, context: Context, call_next: CallNext) -> Message:
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        count = _count(reply.content, key)
        enough = PLAN not in message.content and count is not None and count >= min_examples
        names = {name for record in reply.content.metric_records.values() for name in record}
        kept = {name for name in names if enough and (allowed is None or name in allowed)}
        if kept != names:
            log.info("node %d keeps back metrics %s", context.node_id, ", ".join(sorted(names - kept)))
        content = RecordDict()
        for name, record in reply.content.items():
            if isinstance(record, MetricRecord):
                values = {metric: value for metric, value in record.items() if metric in kept}
                if key in values and count is not None:
                    values[key] = type(count)(math.floor(count / round_to) * round_to)
                record = MetricRecord(values)
            content[name] = record
        if not _says_anything(content):
            return Message(Error(ErrorCode.POLICY_REFUSED, "TooFewExamples"), reply_to=message)
        return reply.with_content(content)

    return floor


def _count(content: RecordDict, key: str) -> int | float | None:
    for record in content.metric_records.values():
        value = record.get(key)
        if isinstance(value, int | float):
            return value
    return None


def _says_anything(content: RecordDict) -> bool:
    """Return whether a reply still holds something but empty metrics."""
    return any(not isinstance(record, MetricRecord) or bool(record) for record in content.values())
