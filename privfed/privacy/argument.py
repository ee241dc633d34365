"""Checks of arguments: every error names the argument, what it must be and what was given."""

from __future__ import annotations

import math

import numpy as np


def number(
    name: str,
    value: object,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
) -> float:
    """Return the value as a float; ValueError unless it is a number in [low, high].

    above, below: the end itself is excluded. NaN, truth values and texts are no numbers.
    """
    real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    found = float(value) if real else math.nan  # type: ignore[arg-type]  # it is a number, as was just asked
    if not (low < found if above else low <= found) or not (found < high if below else found <= high):
        if math.isinf(low) and math.isinf(high):
            raise ValueError(f"{name}: must be a number, not {value!r}")
        interval = f"{'(' if above else '['}{low:g}, {high:g}{')' if below else ']'}"
        raise ValueError(f"{name}: must be a number in {interval}, not {value!r}")
    return found


def whole(name: str, value: object, least: int = 0) -> int:
    """Return the value as an int; ValueError unless it is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name}: must be a whole number of at least {least}, not {value!r}")
    return int(value)
