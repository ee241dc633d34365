"""Cohort samplers that hand over the event they are worth, so that accounting cannot disagree with what ran.

A sampler draws from the operating system: a cohort that the observer could predict amplifies nothing. Pass `random`
only in tests. Amplification holds against an observer of the output; the server, which sees the cohort, gets none
(`Accountant(observer="server")` charges the inner event).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Protocol, runtime_checkable

import numpy as np

from privfed.privacy.argument import number, whole
from privfed.privacy.events import Composed, Event, FixedSizeSampled, PoissonSampled, RandomAllocation, TruncatedPoisson
from privfed.privacy.inversion import InversionSampler, Weights
from privfed.privacy.keystream import Keystream, RandomBytes


@runtime_checkable
class Sampler(Protocol):
    """Choose cohorts and say what a mechanism run on such a cohort costs."""

    def sample(self, node_ids: Sequence[int], random: RandomBytes = os.urandom) -> list[int]:
        """Return this round's cohort, a sorted subset of `node_ids`; it may be empty."""

    def event(self, inner: Event) -> Event:
        """Return the event of running `inner` on a cohort from `sample`."""

    def expected_size(self, population: int) -> float:
        """Return the public constant to divide a private sum by (never the cohort that was drawn)."""


def _distinct(node_ids: Sequence[int]) -> list[int]:
    ordered = sorted(node_ids)
    if any(a == b for a, b in pairwise(ordered)):
        raise ValueError("node_ids: contain a node twice, which would double its chance and its contribution")
    return ordered


def below(bound: int, stream: Keystream) -> int:
    """Draw uniformly from range(bound), exactly: words beyond the last full copy of the range are redrawn."""
    bits = 8 * (1 + bound.bit_length() // 8)
    limit = (1 << bits) - (1 << bits) % bound
    while True:
        word = stream.bits(bits)
        if word < limit:
            return word % bound


def choose(items: Sequence[int], count: int, random: RandomBytes = os.urandom) -> list[int]:
    """Choose `count` of the items uniformly without replacement, by a Fisher-Yates shuffle; return them sorted."""
    pool, stream = list(items), Keystream(random)
    for i in range(count):
        j = i + below(len(pool) - i, stream)
        pool[i], pool[j] = pool[j], pool[i]
    return sorted(pool[:count])


@dataclass(frozen=True, slots=True)
class PoissonSampler:
    """Take every node independently with probability `rate`.

    An empty cohort is a valid outcome: the round releases noise alone. Drawing again until somebody is there would
    be another mechanism. A node that is offline may be left out of `node_ids`: its chance only falls.
    """

    rate: float

    def __post_init__(self) -> None:
        number("rate", self.rate, 0, 1)

    def sample(self, node_ids: Sequence[int], random: RandomBytes = os.urandom) -> list[int]:
        """Return the nodes whose coin fell heads, each with probability exactly `rate`."""
        nodes = _distinct(node_ids)
        if self.rate in (0, 1):
            return nodes if self.rate == 1 else []
        share = Fraction(self.rate)
        tails, heads = share.denominator - share.numerator, share.numerator
        coin = InversionSampler(lambda bits: Weights(0, [(tails, tails), (heads, heads)], 0, 0))
        picked = coin.sample(len(nodes), Keystream(random))
        return [nodes[i] for i in np.flatnonzero(picked)]

    def event(self, inner: Event) -> Event:
        """Return PoissonSampled(rate, inner)."""
        return PoissonSampled(self.rate, inner)

    def expected_size(self, population: int) -> float:
        """Return rate * population."""
        return self.rate * population


@dataclass(frozen=True, slots=True)
class FixedSizeSampler:
    """Take `sample_size` of a population of `population` nodes, uniformly without replacement.

    The whole population must be offered: a choice among those who happen to be online is not this mechanism.
    """

    sample_size: int
    population: int

    def __post_init__(self) -> None:
        whole("population", self.population, 1)
        if whole("sample_size", self.sample_size) > self.population:
            raise ValueError(f"sample_size: must be in [0, {self.population}], not {self.sample_size}")

    def sample(self, node_ids: Sequence[int], random: RandomBytes = os.urandom) -> list[int]:
        """Return `sample_size` nodes; ValueError unless exactly the population is offered."""
        nodes = _distinct(node_ids)
        if len(nodes) != self.population:
            raise ValueError(
                f"node_ids: {len(nodes)} nodes for a population of {self.population}; the privacy claim is about "
                "the whole population. Wait for all nodes, or use PoissonSampler or AvailabilitySampler"
            )
        return choose(nodes, self.sample_size, random)

    def event(self, inner: Event) -> Event:
        """Return FixedSizeSampled(sample_size, population, inner)."""
        return FixedSizeSampled(self.sample_size, self.population, inner)

    def expected_size(self, population: int) -> float:
        """Return sample_size."""
        return float(self.sample_size)


@dataclass(frozen=True, slots=True)
class TruncatedPoissonSampler:
    """Take every node independently with probability `rate`, then at most `cap` of those, uniformly at random.

    For machinery of fixed capacity: a cohort never exceeds `cap`. population: the most nodes ever offered.
    """

    rate: float
    population: int
    cap: int

    def __post_init__(self) -> None:
        number("rate", self.rate, 0, 1)
        whole("population", self.population, 1)
        whole("cap", self.cap, 1)

    def sample(self, node_ids: Sequence[int], random: RandomBytes = os.urandom) -> list[int]:
        """Return the cohort; ValueError if more nodes are offered than the population the privacy claim is about."""
        if len(node_ids) > self.population:
            raise ValueError(
                f"node_ids: {len(node_ids)} nodes for a population of at most {self.population}; the more there are, "
                "the likelier a full cohort, so state the larger population"
            )
        drawn = PoissonSampler(self.rate).sample(node_ids, random)
        return drawn if len(drawn) <= self.cap else choose(drawn, self.cap, random)

    def event(self, inner: Event) -> Event:
        """Return TruncatedPoisson(rate, population, cap, inner)."""
        return TruncatedPoisson(self.rate, self.population, self.cap, inner)

    def expected_size(self, population: int) -> float:
        """Return rate * population, at most the cap: a public constant, slightly above the mean size."""
        return min(self.rate * population, float(self.cap))


@dataclass(frozen=True, slots=True)
class AvailabilitySampler:
    """Take whoever is there, up to `sample_size` of them at random: no amplification is claimed.

    `expected_size` needs a public constant, so the size (or else the population) serves as the denominator even in
    rounds that find fewer nodes.
    """

    sample_size: int | None = None

    def __post_init__(self) -> None:
        if self.sample_size is not None:
            whole("sample_size", self.sample_size, 1)

    def sample(self, node_ids: Sequence[int], random: RandomBytes = os.urandom) -> list[int]:
        """Return all nodes offered, or a uniform choice of `sample_size` when there are more."""
        nodes = _distinct(node_ids)
        if self.sample_size is None or len(nodes) <= self.sample_size:
            return nodes
        return choose(nodes, self.sample_size, random)

    def event(self, inner: Event) -> Event:
        """Return the inner event: who is online is not random."""
        return inner

    def expected_size(self, population: int) -> float:
        """Return sample_size, or the population when there is no limit."""
        return float(population if self.sample_size is None else min(self.sample_size, population))


class RandomAllocationSampler:
    """Let every node take part in exactly one of `rounds` rounds, drawn uniformly and independently (balls in bins).

    A pass over the rounds is one release: its cost cannot be cut into rounds, so the first round of a pass is charged
    `RandomAllocation(rounds, inner)`, the whole pass, and the others cost nothing more (`Composed(())`). A pass that
    stops early has paid in full. Every round of a pass must run the same inner event. A node that comes after the
    pass began draws its round then, and waits for the next pass if that round is over.

    Who is drawn for which round must stay hidden from the observer until the pass is over, and afterwards. One
    sampler serves one run: unlike the other samplers it remembers where it is.
    """

    def __init__(self, rounds: int) -> None:
        self.rounds = whole("rounds", rounds, 1)
        self._round = 0  # rounds sampled in this pass
        self._bins: dict[int, int] = {}
        self._inner: Event | None = None  # what this pass was charged for

    def sample(self, node_ids: Sequence[int], random: RandomBytes = os.urandom) -> list[int]:
        """Return the nodes whose round this is; RuntimeError unless `event` was asked for at the start of the pass."""
        nodes = _distinct(node_ids)
        if self._inner is None:
            raise RuntimeError("no pass was charged: charge the event from `event` before the cohort is drawn")
        if self._round == 0:
            self._bins = {}
        stream = Keystream(random)
        for node in nodes:
            if node not in self._bins:
                self._bins[node] = below(self.rounds, stream)
        cohort = [node for node in nodes if self._bins[node] == self._round]
        self._round = (self._round + 1) % self.rounds
        if self._round == 0:
            self._inner = None  # the next pass is another charge
        return cohort

    def event(self, inner: Event) -> Event:
        """Return what the coming round adds: the whole pass before its first round, nothing before the others."""
        if self._round == 0:
            self._inner = inner
            return RandomAllocation(self.rounds, inner)
        if inner != self._inner:  # the noise of later rounds is what the pass was charged for
            raise ValueError(f"inner: this pass was charged for {self._inner} in every round, not for {inner}")
        return Composed(())

    def expected_size(self, population: int) -> float:
        """Return population / rounds."""
        return population / self.rounds
