"""Privacy-first federated learning. Everything public is loaded on first use; `import privfed` stays light."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Array": "privfed.array",
    "ArrayRecord": "privfed.record",
    "MetricRecord": "privfed.record",
    "ConfigRecord": "privfed.record",
    "RecordDict": "privfed.record",
    "Message": "privfed.message",
    "Metadata": "privfed.message",
    "MessageType": "privfed.message",
    "Error": "privfed.message",
    "ErrorCode": "privfed.message",
    "Context": "privfed.context",
    "ClientApp": "privfed.apps",
    "ServerApp": "privfed.apps",
    "Grid": "privfed.grid",
    "LocalGrid": "privfed.grid",
    "RunFailed": "privfed.errors",
    "PrivacyPlan": "privfed.plan",
    "PlainStage": "privfed.strategies",
    "SecureStage": "privfed.strategies",
    "GroupedStage": "privfed.strategies",
    "Result": "privfed.strategies",
    "RunResult": "privfed.runtime.simulation",
    "run_simulation": "privfed.runtime.simulation",
}
_PARTS = ("attacks", "audit", "mods", "partition", "privacy", "protocols", "runtime", "strategies")

__all__ = [
    "Array",
    "ArrayRecord",
    "ClientApp",
    "ConfigRecord",
    "Context",
    "Error",
    "ErrorCode",
    "Grid",
    "GroupedStage",
    "LocalGrid",
    "Message",
    "MessageType",
    "Metadata",
    "MetricRecord",
    "PlainStage",
    "PrivacyPlan",
    "RecordDict",
    "Result",
    "RunFailed",
    "RunResult",
    "SecureStage",
    "ServerApp",
    "__version__",
    "run_simulation",
]

if TYPE_CHECKING:
    from privfed.apps import ClientApp, ServerApp
    from privfed.array import Array
    from privfed.context import Context
    from privfed.errors import RunFailed
    from privfed.grid import Grid, LocalGrid
    from privfed.message import Error, ErrorCode, Message, MessageType, Metadata
    from privfed.plan import PrivacyPlan
    from privfed.record import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
    from privfed.runtime.simulation import RunResult, run_simulation
    from privfed.strategies import GroupedStage, PlainStage, Result, SecureStage


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    if name in _PARTS:
        return importlib.import_module(f"privfed.{name}")
    raise AttributeError(f"module 'privfed' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_PARTS])
