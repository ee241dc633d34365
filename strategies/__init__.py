"""Strategies and stages. Everything is loaded on first use."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "FedAvg": "fedavg",
    "GroupedStage": "grouped",
    "PlainStage": "stage",
    "Result": "result",
    "SecureStage": "secure",
    "Stage": "stage",
    "Strategy": "strategy",
    "GroupMeans": "view",
    "Sum": "view",
    "Updates": "view",
}

__all__ = [
    "FedAvg",
    "GroupMeans",
    "GroupedStage",
    "PlainStage",
    "Result",
    "SecureStage",
    "Stage",
    "Strategy",
    "Sum",
    "Updates",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"privfed.strategies.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'privfed.strategies' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
