"""Search for the strength at which an attack does most damage to the rule in use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from privfed.attacks.forgery import Row, Rows, inner_product, little_is_enough

Rule = Callable[[Rows], Row]
Family = Callable[[Rows, float], Row]


@dataclass(frozen=True)
class Strongest:
    """The row found, its strength, and how far it moved the rule's result from the mean of honest rows."""

    row: Row
    strength: float
    damage: float


def strongest(
    honest: Rows,
    f: int,
    rule: Rule,
    family: Family,
    *,
    evaluations: int = 20,
    start: float = 0.0,
    step: float = 10.0,
    ratio: float = 0.8,
) -> Strongest:
    """Find the strength whose row, sent f times, moves `rule` farthest from the mean of honest rows.

    rule: a function of the (n, d) matrix, honest rows first: a partial of one of `privfed.strategies.rules`, with any
    mixing or clipping in front. The step doubles while that helps; afterwards steps from the best strength so far
    shrink by `ratio`. `evaluations` bounds the calls of the rule. A step may be negative. A strength that the rule
    refuses does no damage; where it refuses `start`, its error is raised.
    """
    if evaluations < 1 or step == 0 or not 0 < ratio < 1:
        raise ValueError(f"need evaluations >= 1, step != 0, 0 < ratio < 1; got {evaluations}, {step}, {ratio}")
    honest = np.asarray(honest)
    mean = honest.mean(axis=0, dtype=np.float64)

    def damage(strength: float) -> float:
        row = family(honest, strength).astype(honest.dtype, copy=False)
        result = np.asarray(rule(np.concatenate([honest, np.repeat(row[None], f, axis=0)])), dtype=np.float64)
        return float(np.linalg.norm(result - mean))

    best, most = start, damage(start)
    growing = True
    for _ in range(evaluations - 1):
        proposed = best + step
        try:
            found = damage(proposed)
        except ValueError:  # rows too large for any rule: the round would fail and the model stay
            found = 0.0
        better = found > most
        if better:
            best, most = proposed, found
        growing = growing and better
        step *= 2.0 if growing else ratio
    return Strongest(family(honest, best), best, most)


def strongest_inner_product(honest: Rows, f: int, rule: Rule, **search: float) -> Strongest:
    """Return the IPM row of the strength worst for `rule`; search options as in `strongest`."""
    return strongest(honest, f, rule, inner_product, **search)  # type: ignore[arg-type]  # options checked there


def strongest_little(honest: Rows, f: int, rule: Rule, **search: float) -> Strongest:
    """Return the ALIE row of the strength worst for `rule`; search options as in `strongest`."""
    return strongest(honest, f, rule, little_is_enough, **search)  # type: ignore[arg-type]  # options checked there
