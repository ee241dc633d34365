"""Strategies and stages. Everything is loaded on first use."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Answer": "analytics",
    "FedAnalytics": "analytics",
    "FedAvg": "fedavg",
    "FedAvgM": "fedavgm",
    "FedProx": "fedprox",
    "FedAdagrad": "fedopt",
    "FedAdam": "fedopt",
    "FedYogi": "fedopt",
    "FedOpt": "fedopt",
    "FedMedian": "robust",
    "FedTrimmedAvg": "robust",
    "Krum": "robust",
    "MultiKrum": "robust",
    "Bulyan": "robust",
    "RobustStrategy": "robust",
    "RFA": "rfa",
    "CenteredClipping": "centering",
    "NearestNeighborMixing": "nnm",
    "FLTrust": "fltrust",
    "QFedAvg": "qfedavg",
    "Strategy": "strategy",
    "Result": "result",
    "Stage": "stage",
    "PlainStage": "stage",
    "SecureStage": "secure",
    "GroupedStage": "grouped",
    "Sum": "view",
    "Updates": "view",
    "GroupMeans": "view",
}

__all__ = [
    "RFA",
    "Answer",
    "Bulyan",
    "CenteredClipping",
    "FLTrust",
    "FedAdagrad",
    "FedAdam",
    "FedAnalytics",
    "FedAvg",
    "FedAvgM",
    "FedMedian",
    "FedOpt",
    "FedProx",
    "FedTrimmedAvg",
    "FedYogi",
    "GroupMeans",
    "GroupedStage",
    "Krum",
    "MultiKrum",
    "NearestNeighborMixing",
    "PlainStage",
    "QFedAvg",
    "Result",
    "RobustStrategy",
    "SecureStage",
    "Stage",
    "Strategy",
    "Sum",
    "Updates",
    "rules",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"privfed.strategies.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name == "rules":
        return importlib.import_module("privfed.strategies.rules")
    raise AttributeError(f"module 'privfed.strategies' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
