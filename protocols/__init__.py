"""Secure computation without I/O: secure-aggregation protocols and what they are made of."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "Beacon": "privfed.protocols.beacon",
    "LightSecAgg": "privfed.protocols.lightsecagg",
    "OneShot": "privfed.protocols.oneshot",
    "SecAgg": "privfed.protocols.secagg",
    "SecAggPlus": "privfed.protocols.secagg",
    "SecureSum": "privfed.protocols.loop",
    "secure_sum": "privfed.protocols.loop",
}

__all__ = ["Beacon", "LightSecAgg", "OneShot", "SecAgg", "SecAggPlus", "SecureSum", "secure_sum"]

if TYPE_CHECKING:
    from privfed.protocols.beacon import Beacon
    from privfed.protocols.lightsecagg import LightSecAgg
    from privfed.protocols.loop import SecureSum, secure_sum
    from privfed.protocols.oneshot import OneShot
    from privfed.protocols.secagg import SecAgg, SecAggPlus


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'privfed.protocols' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
