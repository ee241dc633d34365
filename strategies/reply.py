"""What makes a reply valid, and what is read from it."""

from __future__ import annotations

from dataclasses import dataclass

from privfed.message import ErrorCode, Message
from privfed.record import ArrayRecord, MetricRecord, RecordDict
from privfed.strategies.metric import is_finite_metric, metrics_of
from privfed.update import UpdateError, arrays_of, check_arrays, is_update

_CODES = {value: name for name, value in vars(ErrorCode).items() if isinstance(value, int)}


MAX_WEIGHT = 2.0**53
"""A claim beyond this is no number of examples, and would push sums out of float64."""


class BadReply(Exception):
    """A reply that does not count; the text is the cause that is reported."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A valid reply. arrays: empty for an evaluation. update: whether they are an update. metrics: without arrays."""

    node: int
    arrays: ArrayRecord
    update: bool
    weight: float
    metrics: RecordDict


def content_of(message: Message) -> RecordDict:
    """Return the reply's content. Raises BadReply with code and class name when it is an error."""
    if message.has_error():
        error = message.error
        code = _CODES.get(error.code, str(error.code))
        raise BadReply(f"{code} {error.reason or ''}".strip())
    return message.content


def read_weight(metrics: MetricRecord, key: str | None) -> float:
    """Return a reply's weight, 1 when weights are uniform. Raises BadReply."""
    if key is None:
        return 1.0
    weight = metrics.get(key)
    if weight is None or isinstance(weight, list):
        raise BadReply(f"metric {key!r}, the weight, is missing")
    if not 0 <= weight <= MAX_WEIGHT:  # false for NaN
        raise BadReply(f"weight {key!r} is {weight}, not in [0, 2^53]")
    return float(weight)


def read_metrics(content: RecordDict) -> MetricRecord:
    """Return a reply's metrics. Raises BadReply when one is NaN or infinite."""
    metrics = metrics_of(content)
    for name, value in metrics.items():
        if not is_finite_metric(value):
            raise BadReply(f"metric {name!r} is not finite")
    return metrics


def read_train(node: int, message: Message, model: ArrayRecord, arrays_key: str, weight_key: str | None) -> Reply:
    """Return a valid training reply. Raises BadReply."""
    content = content_of(message)
    weight, metrics = _numbers(content, weight_key)
    try:
        arrays = arrays_of(content, arrays_key)
        check_arrays(model, arrays, update=is_update(content))
    except UpdateError as cause:
        raise BadReply(str(cause)) from cause
    return Reply(node, arrays, is_update(content), weight, metrics)


def read_evaluate(node: int, message: Message, weight_key: str | None) -> Reply:
    """Return a valid evaluation reply. Raises BadReply."""
    weight, metrics = _numbers(content_of(message), weight_key)
    return Reply(node, ArrayRecord(), False, weight, metrics)


def _numbers(content: RecordDict, weight_key: str | None) -> tuple[float, RecordDict]:
    weight = read_weight(metrics_of(content), weight_key)
    return weight, RecordDict({"metrics": read_metrics(content)})
