"""Sensitivities of matrix mechanisms: what one unit's contributions can add up to after encoding."""

from __future__ import annotations

import math

import numpy as np

from privfed.privacy.pair import Floats


def tree_sensitivity(steps: int) -> float:
    """Return the L2 sensitivity, in units of C, of binary-tree sums when a unit takes part in one of `steps` steps."""
    if steps < 1:
        raise ValueError(f"steps: must be at least 1, not {steps}")
    return math.sqrt(math.ceil(math.log2(steps)) + 1)


def encoder_sensitivity(encoder: Floats, separation: int | None = None) -> float:
    """Return an upper bound on the L2 sensitivity of a lower-triangular encoder, float64[n, n].

    separation: a unit takes part at most once in any window of so many steps; None: at most once in the run. The
    bound adds up column norms over the participations; it is exact for banded encoders no wider than `separation`.
    """
    columns = np.linalg.norm(encoder, axis=0)
    if separation is None:
        return float(columns.max())
    if separation < 1:
        raise ValueError(f"separation: must be at least 1, not {separation}")
    gram = np.abs(encoder.T @ encoder)
    worst = 0.0
    for start in range(min(separation, len(columns))):
        chosen = np.arange(start, len(columns), separation)
        worst = max(worst, float(gram[np.ix_(chosen, chosen)].sum()))
    spread = math.ceil(len(columns) / separation) * float(columns.max()) ** 2
    banded = not np.tril(encoder, -separation).any()
    return math.sqrt(spread if banded else max(worst, _loose(gram, separation)))


def _loose(gram: Floats, separation: int) -> float:
    """Bound the squared norm over all admissible patterns: each participation with the largest entry per window."""
    size = len(gram)
    total = 0.0
    windows = [np.arange(i, min(i + separation, size)) for i in range(0, size, separation)]
    for first in windows:
        for second in windows:
            total += float(gram[np.ix_(first, second)].max())
    return total
