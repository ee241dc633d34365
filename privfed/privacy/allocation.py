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

_POINTS = 1200
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
    """Return the law of the sum of independent variables, on a new grid."""
    values = np.add.outer(first[0], second[0]).ravel()
    masses = np.multiply.outer(first[1], second[1]).ravel()
    good = masses * np.maximum(values, 1.0) > 1e-60
    gone = float(masses[~good] @ values[~good])
    values, masses = values[good], masses[good]
    low, high = _range(values, masses)
    step = math.log(high / low) / (_POINTS - 1)
    grid = low * np.exp(step * np.arange(_POINTS))
    place = np.log(np.maximum(values, low * 1e-3)) - math.log(low)
    cell = np.clip(np.floor(place / step).astype(np.int64) + 1, 0, _POINTS)
    mass: Floats = np.bincount(cell, masses, _POINTS + 1).astype(np.float64)
    moment: Floats = np.bincount(cell, masses * values, _POINTS + 1).astype(np.float64)
    lost = first[2] + second[2] + gone
    if upper:
        return _split_cells(np.concatenate(([0.0], grid)), mass, moment, lost)
    keep = mass > 0
    return moment[keep] / mass[keep], mass[keep], lost


def _range(values: Floats, masses: Floats) -> tuple[float, float]:
    """Return values outside which both laws have about _TAIL."""
    size = 4096
    positive = values > 0
    log = np.log(values[positive])
    low, high = float(log.min()), float(log.max())
    cell = np.minimum(((log - low) * (size / max(high - low, 1e-12))).astype(np.int64), size - 1)
    mass = np.bincount(cell, masses[positive], size)
    moment = np.bincount(cell, masses[positive] * values[positive], size)
    below = int(np.searchsorted(np.cumsum(mass), _TAIL))
    above = size - int(np.searchsorted(np.cumsum(moment[::-1]) / moment.sum(), _TAIL))
    width = (high - low) / size
    return math.exp(low + below * width), math.exp(low + (above + 1) * width)


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
