"""Parameters of distributed noise and updates for it, rotated and drawn on fixed keys: each run is the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from privfed.privacy.distributed import NoiseParameters

SEED = hashlib.sha256(b"a public seed").digest()
SIGMAS = 5.6  # a two-sided normal test at this distance raises a false alarm with probability 2 * 10^-8


def stream(label: str) -> Callable[[int], bytes]:
    """A random source that never repeats and always says the same."""
    calls = iter(range(10**9))
    return lambda size: hashlib.shake_256(f"{label} {next(calls)}".encode()).digest(size)


def parameters(**changes: Any) -> NoiseParameters:
    given_values = {"clip": 1.0, "noise_multiplier": 1.0, "nodes": 10, "dimension": 100, "bits": 20, "scale": 50.0}
    return NoiseParameters(**{**given_values, **changes})


def unit(label: int, size: int, length: float = 1.0) -> np.ndarray:
    values = np.random.default_rng(label).normal(size=size)
    return np.asarray(values * (length / np.linalg.norm(values)))
