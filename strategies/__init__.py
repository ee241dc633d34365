"""Strategies and stages. Everything is loaded on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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
    "SCAFFOLD": "scaffold",
    "ControlVariate": "scaffold",
    "FedNova": "fednova",
    "normalize_update": "fednova",
    "FedBuff": "fedbuff",
    "FedXgbBagging": "fedxgb",
    "FedXgbCyclic": "fedxgb",
    "Strategy": "strategy",
    "Result": "result",
    "Stage": "stage",
    "Pace": "pace",
    "PlainStage": "stage",
    "SecureStage": "secure",
    "GroupedStage": "grouped",
    "Sum": "view",
    "Updates": "view",
    "GroupMeans": "view",
}

__all__ = [
    "RFA",
    "SCAFFOLD",
    "Answer",
    "Bulyan",
    "CenteredClipping",
    "ControlVariate",
    "FLTrust",
    "FedAdagrad",
    "FedAdam",
    "FedAnalytics",
    "FedAvg",
    "FedAvgM",
    "FedBuff",
    "FedMedian",
    "FedNova",
    "FedOpt",
    "FedProx",
    "FedTrimmedAvg",
    "FedXgbBagging",
    "FedXgbCyclic",
    "FedYogi",
    "GroupMeans",
    "GroupedStage",
    "Krum",
    "MultiKrum",
    "NearestNeighborMixing",
    "Pace",
    "PlainStage",
    "QFedAvg",
    "Result",
    "RobustStrategy",
    "SecureStage",
    "Stage",
    "Strategy",
    "Sum",
    "Updates",
    "normalize_update",
    "rules",
]


if TYPE_CHECKING:
    from privfed.strategies import rules
    from privfed.strategies.analytics import Answer, FedAnalytics
    from privfed.strategies.centering import CenteredClipping
    from privfed.strategies.fedavg import FedAvg
    from privfed.strategies.fedavgm import FedAvgM
    from privfed.strategies.fedopt import FedAdagrad, FedAdam, FedOpt, FedYogi
    from privfed.strategies.fedprox import FedProx
    from privfed.strategies.fltrust import FLTrust
    from privfed.strategies.grouped import GroupedStage
    from privfed.strategies.nnm import NearestNeighborMixing
    from privfed.strategies.qfedavg import QFedAvg
    from privfed.strategies.result import Result
    from privfed.strategies.rfa import RFA
    from privfed.strategies.robust import Bulyan, FedMedian, FedTrimmedAvg, Krum, MultiKrum, RobustStrategy
    from privfed.strategies.secure import SecureStage
    from privfed.strategies.stage import PlainStage, Stage
    from privfed.strategies.strategy import Strategy
    from privfed.strategies.view import GroupMeans, Sum, Updates


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
