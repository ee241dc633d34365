"""The canonical JSON of events: sorted keys, no spaces, shortest floats, infinity as text; one event, one string."""

from __future__ import annotations

import json
import math
from typing import Any

_MAX_DEPTH = 32


def encode(value: Any) -> Any:
    """Return numbers, texts, tuples and objects with `fields()` as JSON values."""
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    if hasattr(value, "fields"):
        return value.fields()
    return value


def dump(fields: dict[str, Any]) -> str:
    """Return the one text of a JSON object; NaN raises ValueError."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)


def number(value: Any) -> Any:
    """Return "inf" as a float and everything else unchanged."""
    return math.inf if value == "inf" else value


def load(text: str | dict[str, Any]) -> dict[str, Any]:
    """Parse a JSON object; ValueError for anything else, for repeated keys, for NaN and for absurd nesting."""
    if isinstance(text, dict):
        return text
    try:
        fields = json.loads(text, object_pairs_hook=_distinct, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("event: nested too deeply") from None
    if not isinstance(fields, dict):
        raise ValueError(f"event: must be a JSON object, not {type(fields).__name__}")
    return fields


def checked_depth(depth: int) -> None:
    """Raise ValueError beyond the deepest nesting an event may have."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"event: nested more than {_MAX_DEPTH} deep")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("event: a key appears twice")
    return fields


def _refuse(text: str) -> float:
    raise ValueError(f"event: {text} is no number an event can have")
