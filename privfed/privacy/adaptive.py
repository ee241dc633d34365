"""Adaptive clipping: how one noise budget pays for the update and for the quantile bits [ATMR21, Thm 1]."""

from __future__ import annotations

import math
from collections.abc import Iterable


def combined_multiplier(multipliers: Iterable[float]) -> float:
    """Return the noise multiplier that several Gaussian releases together are worth: (sum z^-2)^(-1/2)."""
    total = 0.0
    for z in multipliers:
        if not z >= 0:
            raise ValueError(f"multipliers: must not be negative or NaN, not {z}")
        if z == 0:
            return 0.0
        total += z**-2
    return total**-0.5 if total else math.inf


def delta_multiplier(noise_multiplier: float, bits_stddev: float) -> float:
    """Return the multiplier left for the update so that update and bits together are worth `noise_multiplier`.

    bits_stddev: of the noise on the sum of bits, which are +-1/2: a unit moves the sum by at most 1/2. With bits 0/1
    the same noise would be worth half as much, and the total less than promised.
    """
    if not noise_multiplier >= 0:
        raise ValueError(f"noise_multiplier: must not be negative or NaN, not {noise_multiplier}")
    if not 2 * bits_stddev > noise_multiplier:
        raise ValueError(f"bits_stddev: must be above noise_multiplier / 2 = {noise_multiplier / 2}, not {bits_stddev}")
    return 0.0 if noise_multiplier == 0 else (noise_multiplier**-2 - (2 * bits_stddev) ** -2) ** -0.5
