"""Mods: functions around a message and its reply. `mods.NAME(...)` makes one; each is loaded on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from privfed.apps import compose

_HOMES = {
    "adaptive_clip": "privfed.mods.clipping",
    "clip": "privfed.mods.clipping",
    "distributed_dp": "privfed.mods.distributed",
    "local_dp": "privfed.mods.local",
    "message_size": "privfed.mods.size",
    "metric_floor": "privfed.mods.metrics",
    "noise": "privfed.mods.local",
    "privacy_budget": "privfed.mods.budget",
    "quantize": "privfed.mods.packing",
    "secure_aggregation": "privfed.mods.masking",
    "sparsify": "privfed.mods.packing",
    "unpack": "privfed.mods.packing",
}

__all__ = [
    "adaptive_clip",
    "clip",
    "compose",
    "distributed_dp",
    "local_dp",
    "message_size",
    "metric_floor",
    "noise",
    "privacy_budget",
    "quantize",
    "secure_aggregation",
    "sparsify",
    "unpack",
]


if TYPE_CHECKING:
    from privfed.mods.budget import privacy_budget
    from privfed.mods.clipping import adaptive_clip, clip
    from privfed.mods.distributed import distributed_dp
    from privfed.mods.local import local_dp, noise
    from privfed.mods.masking import secure_aggregation
    from privfed.mods.metrics import metric_floor
    from privfed.mods.packing import quantize, sparsify, unpack
    from privfed.mods.size import message_size


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'privfed.mods' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
