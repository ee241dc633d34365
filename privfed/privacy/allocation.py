"""Random allocation (balls in bins): each unit takes part in one of t rounds of Gaussian noise, drawn uniformly.

One pass is dominated by (1/t) sum_i N(mu e_i, I) against N(0, I) [FS25, CGH+24]. Its likelihood ratio under the second
law is the mean of t independent lognormals, and the privacy profile is E (ratio - e^eps)+: whatever is larger in the
convex order costs more. So the law of the sum is built by doubling on a geometric grid, once with every atom split
to its two neighbours (mean kept, convexly larger), once with every cell merged to its mean (convexly smaller).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import special

from privfed.privacy import events as ev
from privfed.privacy.atoms import Atoms, Swapped, certain_of
from privfed.privacy.pair import Floats, Masses, Pair

_POINTS = 1800
_ROWS = 32  # of the table of all sums, at once: what is worked on stays in the second-level cache
_GROUP = 8
_TAIL = 1e-19  # of either law, cut off above and below at every doubling (and moved to the safe side)
Law = tuple[Floats, Floats, float]  # values, masses, and the first moment beyond every value


@dataclass(frozen=True, eq=False)
class Enclosed:
    """A pair known between two others: `above` dominates it, it dominates `below`."""

    above: Pair
    below: Pair

    @property
    def certain(self) -> float:
        """Return that of `above`."""
        return certain_of(self.above)

    def masses(self, edges: Floats) -> Masses:
        """Return those of `above`."""
        return self.above.masses(edges)

    def nodes(self, reach: float, wave: float = 0.0) -> tuple[Floats, Floats]:
        """Return those of `above`."""
        return self.above.nodes(reach, wave)

    def positive_nodes(self, reach: float, wave: float = 0.0) -> tuple[Floats, Floats]:
        """Return those of `above`."""
        return self.above.positive_nodes(reach, wave)

    def span(self, tail: float) -> tuple[float, float]:
        """Return that of `above`."""
        return self.above.span(tail)

    def profile(self, epsilon: float) -> float:
        """Return that of `above`."""
        return self.above.profile(epsilon)


def _lognormal(mu: float, upper: bool) -> Law:
    """Return atoms of exp(mu z - mu^2 / 2) for normal z."""
    edges = np.linspace(-9.2, 9.2 + mu, _POINTS)
    base = np.diff(special.ndtr(np.concatenate(([-np.inf], edges, [np.inf]))))
    moment = np.diff(special.ndtr(np.concatenate(([-np.inf], edges, [np.inf])) - mu))
    right = edges > 0
    base[1:][right] = (special.ndtr(-edges) - special.ndtr(-np.append(edges[1:], np.inf)))[right]
    shifted = edges > mu
    moment[1:][shifted] = (special.ndtr(mu - edges) - special.ndtr(mu - np.append(edges[1:], np.inf)))[shifted]
    if not upper:
        keep = base > 0
        return moment[keep] / base[keep], base[keep], 0.0
    grid = np.concatenate(([0.0], np.exp(mu * edges - mu * mu / 2)))
    return _split_cells(grid, base, moment, 0.0)


def _split_cells(grid: Floats, mass: Floats, moment: Floats, lost: float) -> Law:
    """Spread cells [grid_k, grid_k+1) with these masses and first moments to their ends.

    The last cell is open: its mass stays at its lower end, and the moment that is missing there goes to infinity.
    """
    width = np.diff(grid)
    up = np.clip((moment[:-1] - mass[:-1] * grid[:-1]) / width, 0.0, mass[:-1])
    out = np.zeros(len(grid))
    out[:-1] += mass[:-1] - up
    out[1:] += up
    out[-1] += float(mass[-1])
    return grid, out, lost + max(0.0, float(moment[-1] - mass[-1] * grid[-1]))


def _add(first: Law, second: Law, upper: bool) -> Law:
    """Return the law of the sum of independent variables, on a new grid.

    Any range is valid: what lies outside goes to the first or last cell. Of a law's sum with itself, one half is
    computed and counted twice.
    """
    low, high = _range(first, second)
    step = math.log(high / low) / (_POINTS - 1)
    mass, moment = np.zeros(_POINTS + 1), np.zeros(_POINTS + 1)
    twin = first is second
    for start in range(0, len(first[0]), _ROWS):
        rows = slice(start, start + _ROWS)
        from_column = start if twin else 0
        weights = second[1][from_column:].copy()
        if twin:
            weights[_ROWS:] *= 2
        values = np.add.outer(first[0][rows], second[0][from_column:]).ravel()
        masses = np.multiply.outer(first[1][rows], weights).ravel()
        cell = np.log(np.maximum(values, low * 1e-3))
        cell -= math.log(low)
        cell /= step
        np.clip(cell, -1.0, _POINTS - 1, out=cell)
        cell += 1.0  # nothing below 0 is left, so cutting off digits rounds down
        cells = cell.astype(np.intp)
        mass += np.bincount(cells, masses, _POINTS + 1)
        masses *= values
        moment += np.bincount(cells, masses, _POINTS + 1)
    if upper:
        grid = low * np.exp(step * np.arange(_POINTS))
        return _split_cells(np.concatenate(([0.0], grid)), mass, moment, first[2] + second[2])
    keep = mass > 0
    return moment[keep] / mass[keep], mass[keep], 0.0


def _range(first: Law, second: Law) -> tuple[float, float]:
    """Return values outside which the sum has about _TAIL of both laws, by groups of outcomes taken as one."""
    groups = []
    for values, masses, _ in (first, second):
        order = np.argsort(values)
        starts = np.arange(0, len(order), _GROUP)
        ends = np.append(starts[1:] - 1, len(order) - 1)
        groups.append((values[order][starts], values[order][ends], np.add.reduceat(masses[order], starts)))
    mass = np.multiply.outer(groups[0][2], groups[1][2]).ravel()
    least = np.add.outer(groups[0][0], groups[1][0]).ravel()
    most = np.add.outer(groups[0][1], groups[1][1]).ravel()
    rising, falling = np.argsort(least), np.argsort(most)[::-1]
    rising = rising[least[rising] > 0]
    low = float(least[rising][np.argmax(np.cumsum(mass[rising]) >= _TAIL)])
    moment = np.cumsum((mass * most)[falling])
    high = float(most[falling][np.argmax(moment >= _TAIL * moment[-1])])
    return low, max(high, low * (1 + 1e-9))


def _summed(mu: float, terms: int, upper: bool) -> Law:
    """Return the law of the sum of `terms` lognormals by doubling."""
    power, total, rest = _lognormal(mu, upper), None, terms
    while True:
        if rest & 1:
            total = power if total is None else _add(total, power, upper)
        rest >>= 1
        if not rest:
            break
        power = _add(power, power, upper)
    assert total is not None
    return total


def _atoms(law: Law, terms: int) -> Atoms:
    values, masses, lost = law
    keep = (values > 0) & (masses > 0)
    p = masses[keep] * values[keep] / terms
    never = float(masses[values == 0].sum())  # Q mass without P mass
    return Atoms(p, masses[keep], lost / terms, rounding=1e-11, lost=never, endless=True)


def allocation_pairs(event: ev.RandomAllocation, relation: str) -> tuple[Pair, Pair]:
    """Return the pairs (remove, add) of one pass, each enclosed from both sides."""
    from privfed.privacy.dominating import gaussian_mu

    mu = gaussian_mu(event.inner, "add_remove")
    if mu is None or relation == "replace_one":
        raise ValueError(
            f"relation: RandomAllocation is proved for Gaussian noise under add_remove and zero_out, not for "
            f"{type(event.inner).__name__} under {relation}"
        )
    if mu == math.inf:
        raise OverflowError("no noise")
    if mu > 20:
        raise ValueError(f"event: a noise multiplier of {1 / mu:g} is too small for random allocation; nothing helps")
    above = _atoms(_summed(mu, event.rounds, True), event.rounds)
    below = _atoms(_summed(mu, event.rounds, False), event.rounds)
    return Enclosed(above, below), Enclosed(Swapped(above), Swapped(below))
