"""Pairs made of atoms, and pairs made from pairs: swapped, joined in both directions, tagged branches, sampled."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from privfed.privacy.pair import ULP, Floats, Masses, Pair


class OutOfRange(OverflowError):
    """Privacy losses are finite and too large for floats."""


@dataclass(frozen=True, eq=False)
class Atoms:
    """Finitely many outcomes with P masses p and Q masses q (the rest of P is where Q is 0: `certain`).

    lost: Q mass of outcomes that P has not. rounding: relative error of the masses. spacing: if positive, all finite
    losses lie on one lattice of that step. endless: outcomes too rare for floats were left out, with larger losses.
    """

    p: Floats
    q: Floats
    certain: float = 0.0
    rounding: float = 8 * ULP
    spacing: float = 0.0
    lost: float = 0.0
    endless: bool = False

    @property
    def losses(self) -> Floats:
        """Return log(p / q) of each outcome."""
        return np.log(self.p) - np.log(self.q)

    def masses(self, edges: Floats) -> Masses:
        """Return sums of the masses per cell."""
        cells = np.searchsorted(edges, self.losses, side="left")
        size = len(edges) + 1
        p: Floats = np.bincount(cells, self.p, size).astype(np.float64)
        q: Floats = np.bincount(cells, self.q, size).astype(np.float64)
        summed = self.rounding + min(64, 2 + len(self.p)) * ULP
        return Masses(p, q, p * summed, q * summed)

    def nodes(self, reach: float, wave: float = 0.0) -> tuple[Floats, Floats]:
        """Return the atoms."""
        return self.losses, self.p

    def positive_nodes(self, reach: float, wave: float = 0.0) -> tuple[Floats, Floats]:
        """Return the atoms of positive loss."""
        keep = self.losses > 0
        return self.losses[keep], self.p[keep]

    def ends(self) -> tuple[float, float] | None:
        """Return the two losses of a pair of at most three outcomes."""
        losses = self.losses
        return (float(losses.min()), float(losses.max())) if 2 <= len(losses) <= 3 else None

    def top(self) -> tuple[float, float]:
        """Return the largest finite loss and its P mass."""
        losses = self.losses
        high = float(losses.max())
        return high, float(self.p[losses == high].sum())

    def span(self, tail: float) -> tuple[float, float]:
        """Return the least and largest finite loss, or nearer losses if masses beyond are negligible."""
        losses = self.losses
        order = np.argsort(losses)
        above = np.cumsum(self.p[order][::-1])[::-1]
        below = np.cumsum(self.q[order])
        keep_high = losses[order][above > tail]
        keep_low = losses[order][below > tail]
        high = float(keep_high[-1]) if len(keep_high) else float(losses.max())
        low = float(keep_low[0]) if len(keep_low) else float(losses.min())
        return min(low, high), max(low, high)

    def profile(self, epsilon: float) -> float:
        """Return the hockey stick by its definition."""
        with np.errstate(over="ignore"):
            return float(np.maximum(self.p - math.exp(epsilon) * self.q, 0.0).sum()) + self.certain


def certain_of(pair: object) -> float:
    """Return the P mass of outcomes that Q has not."""
    return float(getattr(pair, "certain", 0.0))


def loss_error(pair: object) -> float:
    """Bound how far the losses of outcomes are from the true ones; for densities that is part of the masses' errors."""
    if isinstance(pair, Atoms):
        logs = float(np.abs(np.log(np.concatenate((pair.p, pair.q)))).max())
        return 2 * pair.rounding + 4 * ULP * (1 + logs)
    parts = [branch for _, branch in getattr(pair, "branches", ())]
    parts += [getattr(pair, name) for name in ("pair", "above", "below") if hasattr(pair, name)]
    return max((loss_error(part) for part in parts), default=0.0)


def atoms_of(pair: Pair) -> tuple[float, float] | None:
    """Return the losses of two atoms that hold much of the mass, if the pair has such."""
    ends = getattr(pair, "ends", None)
    return ends() if ends is not None else None


@dataclass(frozen=True)
class Swapped:
    """The pair (Q, P)."""

    pair: Pair

    def masses(self, edges: Floats) -> Masses:
        """Return the mirrored cells."""
        p, q, p_error, q_error = self.pair.masses(-edges[::-1])
        return Masses(q[::-1], p[::-1], q_error[::-1], p_error[::-1])

    @property
    def certain(self) -> float:
        """Return the mass of Q where P is 0."""
        return self.pair.lost if isinstance(self.pair, Atoms) else 0.0

    @property
    def top(self) -> Callable[[], tuple[float, float]] | None:
        """Return how to ask for the largest loss and its mass, if an atom has it."""
        if isinstance(self.pair, Atoms):
            losses = self.pair.losses
            low = float(losses.min())
            mass = float(self.pair.q[losses == low].sum())
            return lambda: (-low, mass)
        ends = atoms_of(self.pair)
        if ends is None:
            return None
        bottom = float(self.pair.masses(np.array([ends[0] + 1e-12 * abs(ends[0])])).q[0]) * (1 - 1e-9)
        return lambda: (-ends[0], bottom)

    def ends(self) -> tuple[float, float] | None:
        """Return the losses of two atoms that belong on a lattice, if the pair has such."""
        ends = atoms_of(self.pair)
        return None if ends is None else (-ends[1], -ends[0])

    def nodes(self, reach: float, wave: float = 0.0) -> tuple[Floats, Floats]:
        """Return the mirrored nodes."""
        losses, weights = self.pair.nodes(0.0, wave)
        return -losses, weights * np.exp(-losses)

    def positive_nodes(self, reach: float, wave: float = 0.0) -> tuple[Floats, Floats]:
        """Return those of positive loss; only for pairs made of atoms."""
        losses, weights = self.nodes(reach, wave)
        return losses[losses > 0], weights[losses > 0]

    def span(self, tail: float) -> tuple[float, float]:
        """Return the mirrored span."""
        low, high = self.pair.span(tail)
        return -high, -low

    def profile(self, epsilon: float) -> float:
        """Return 1 - e^eps + e^eps delta(-eps), the hockey stick of the swapped pair."""
        p, q = self.masses(np.array([epsilon]))[:2]
        return max(0.0, float(p[1] - math.exp(epsilon) * q[1]))


@dataclass(frozen=True)
class Joined:
    """The symmetric pair with the hockey stick of `pair` above 0 and, mirrored, below: both directions at once."""

    pair: Pair

    @property
    def certain(self) -> float:
        """Return what only P has; Q has as much of its own."""
        return certain_of(self.pair)

    def masses(self, edges: Floats) -> Masses:
        """Return the positive part, its mirror image, and the rest at loss 0."""
        at = np.unique(np.concatenate((edges, -edges, [0.0])))
        p, q, p_error, q_error = self.pair.masses(at)
        zero = int(np.searchsorted(at, 0.0))
        positive_p, positive_q = p[zero + 1 :], q[zero + 1 :]
        rest = max(0.0, 1.0 - float(positive_p.sum()) - float(positive_q.sum()) - self.certain)
        size = len(at) + 1
        out = np.zeros((4, size))
        out[:, zero + 1 :] = positive_p, positive_q, p_error[zero + 1 :], q_error[zero + 1 :]
        mirror = zero - np.arange(0, size - zero - 1)
        for row, values in ((0, positive_q), (1, positive_p), (2, q_error[zero + 1 :]), (3, p_error[zero + 1 :])):
            out[row, mirror] += values
        out[0, zero] += rest
        out[1, zero] += rest
        out[2:, zero] += 8 * ULP
        cells = np.concatenate((np.searchsorted(edges, at, side="left"), [len(edges)]))
        return Masses(*(np.bincount(cells, row, len(edges) + 1).astype(np.float64) for row in out))

    def nodes(self, reach: float, wave: float = 0.0) -> tuple[Floats, Floats]:
        """Return the nodes of the three parts."""
        losses, p = self.pair.positive_nodes(reach, wave)
        q = p * np.exp(-losses)
        rest = max(0.0, 1 - float(p.sum()) - float(q.sum()) - self.certain)
        return np.concatenate((-losses, [0.0], losses)), np.concatenate((q, [rest], p))

    def positive_nodes(self, reach: float, wave: float = 0.0) -> tuple[Floats, Floats]:
        """Return those of the pair."""
        return self.pair.positive_nodes(reach, wave)

    def span(self, tail: float) -> tuple[float, float]:
        """Return the span of the larger side, both ways."""
        high = max(self.pair.span(tail)[1], 0.0)
        return -high, high

    def profile(self, epsilon: float) -> float:
        """Return the pair's own above 0 and the mirror image below."""
        if epsilon >= 0:
            return self.pair.profile(epsilon)
        return -math.expm1(epsilon) + math.exp(epsilon) * self.pair.profile(-epsilon)


@dataclass(frozen=True)
class Tagged:
    """Branches drawn with known probabilities and shown to the observer: (probability, pair).

    rounding: relative error of the probabilities.
    """

    branches: tuple[tuple[float, Pair], ...]
    rounding: float = 0.0

    @property
    def certain(self) -> float:
        """Return the weighted sum of what only P has."""
        return sum(share * certain_of(pair) for share, pair in self.branches)

    def masses(self, edges: Floats) -> Masses:
        """Return the weighted sums."""
        parts = [(share, pair.masses(edges)) for share, pair in self.branches]
        total: list[Floats] = [np.sum([share * part[i] for share, part in parts], axis=0) for i in range(4)]
        p, q, p_error, q_error = total
        wrong = self.rounding + 8 * ULP
        return Masses(p, q, p_error + wrong * p, q_error + wrong * q)

    def nodes(self, reach: float, wave: float = 0.0) -> tuple[Floats, Floats]:
        """Return all nodes, weighted."""
        return _weighted([(share, *pair.nodes(reach, wave)) for share, pair in self.branches])

    def positive_nodes(self, reach: float, wave: float = 0.0) -> tuple[Floats, Floats]:
        """Return all nodes of positive loss, weighted."""
        return _weighted([(share, *pair.positive_nodes(reach, wave)) for share, pair in self.branches])

    def span(self, tail: float) -> tuple[float, float]:
        """Return the hull of the spans, each branch's tail scaled by its probability."""
        spans = [pair.span(tail / share) if tail < share else (0.0, 0.0) for share, pair in self.branches]
        return min(low for low, _ in spans), max(high for _, high in spans)

    def profile(self, epsilon: float) -> float:
        """Return the weighted sum."""
        return sum(share * pair.profile(epsilon) for share, pair in self.branches)


def _weighted(parts: list[tuple[float, Floats, Floats]]) -> tuple[Floats, Floats]:
    return np.concatenate([part[1] for part in parts]), np.concatenate([part[0] * part[2] for part in parts])


def sampled(atoms: Atoms, rate: float) -> Atoms:
    """Return (1 - rate) Q + rate P against Q [ZDW22]; outcomes that only Q has are kept."""
    only = atoms.lost
    p, q = (np.append(atoms.p, 0.0), np.append(atoms.q, only)) if only else (atoms.p, atoms.q)
    return Atoms((1 - rate) * q + rate * p, q, rate * atoms.certain, atoms.rounding + 4 * ULP, endless=atoms.endless)


def randomized_response(epsilon: float, delta: float = 0.0) -> Atoms:
    """Return the pair that dominates every (epsilon, delta)-DP mechanism [KOV15]; delta of Q is lost at the bottom."""
    p = (1 - delta) / (1 + math.exp(-epsilon))
    q = (1 - delta) * math.exp(-epsilon) / (1 + math.exp(-epsilon))
    if epsilon == 0:
        return Atoms(np.array([1 - delta]), np.array([1 - delta]), delta, lost=delta)
    return Atoms(np.array([p, q]), np.array([q, p]), delta, spacing=2 * epsilon, lost=delta)
