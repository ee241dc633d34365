"""A sampler draws the cohort its event describes, from randomness nobody can predict."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.privacy.accountant import Accountant
from privfed.privacy.events import FixedSizeSampled, Gaussian, PoissonSampled, RandomAllocation, TruncatedPoisson
from privfed.privacy.filters import Budget
from privfed.privacy.keystream import Keystream
from privfed.privacy.ledger import Ledger, Terms
from privfed.privacy.sampling import (
    AvailabilitySampler,
    FixedSizeSampler,
    PoissonSampler,
    RandomAllocationSampler,
    Sampler,
    TruncatedPoissonSampler,
    below,
    choose,
)

NODES = st.lists(st.integers(-(2**63), 2**63 - 1), unique=True, max_size=60)


def fixed(label: str) -> Callable[[int], bytes]:
    key = hashlib.sha256(label.encode()).digest()
    return lambda size: key[:size]


def counting(label: str) -> Callable[[int], bytes]:
    """A different key at every call, the same ones in every run."""
    calls = 0

    def random(size: int) -> bytes:
        nonlocal calls
        calls += 1
        return hashlib.sha256(f"{label} {calls}".encode()).digest()[:size]

    return random


@given(NODES, st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_cohorts_are_sorted_subsets(nodes: list[int], rate: float) -> None:
    samplers: list[Sampler] = [PoissonSampler(rate), AvailabilitySampler(), AvailabilitySampler(5)]
    if nodes:
        samplers.append(FixedSizeSampler(int(rate * len(nodes)), len(nodes)))
    for sampler in samplers:
        assert isinstance(sampler, Sampler)
        cohort = sampler.sample(nodes)
        assert cohort == sorted(set(cohort))
        assert set(cohort) <= set(nodes)


@given(NODES)
@settings(max_examples=30, deadline=None)
def test_the_order_of_nodes_does_not_matter(nodes: list[int]) -> None:
    sampler = PoissonSampler(0.5)
    assert sampler.sample(nodes, fixed("x")) == sampler.sample(nodes[::-1], fixed("x"))


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.97])
def test_poisson_cohorts_have_the_size_of_independent_coins(rate: float) -> None:
    """Mean and variance of 400 cohorts of 1000 are within 5.5 standard errors (false alarm below 1e-7 each)."""
    sampler, random = PoissonSampler(rate), counting(f"poisson {rate}")
    sizes = [len(sampler.sample(range(1000), random)) for _ in range(400)]
    mean, variance = 1000 * rate, 1000 * rate * (1 - rate)
    average = sum(sizes) / 400
    assert abs(average - mean) < 5.5 * math.sqrt(variance / 400)
    sample_variance = sum((size - mean) ** 2 for size in sizes) / 400
    spread = math.sqrt((2 + (1 - 6 * rate * (1 - rate)) / variance) / 400)
    assert abs(sample_variance / variance - 1) < 5.5 * spread


def test_every_node_is_as_likely_as_any_other() -> None:
    """Chi-square over 40 nodes and 4000 cohorts: statistics above 39 + 5.5 sqrt(78) have probability below 1e-5."""
    for sampler in (FixedSizeSampler(10, 40), AvailabilitySampler(10)):
        random = counting(f"uniform {sampler}")
        counts = Counter(node for _ in range(4000) for node in sampler.sample(range(40), random))
        statistic = sum((counts[node] - 1000) ** 2 / (1000 * 0.75) for node in range(40)) * 39 / 40
        assert 5 < statistic < 39 + 5.5 * math.sqrt(78)


def test_pairs_are_drawn_without_replacement() -> None:
    """Two given nodes of five, two drawn: together in 1/10 of 5000 cohorts, within 5.5 standard errors (4e-8)."""
    random = counting("pairs")
    together = sum(choose(range(5), 2, random) == [1, 3] for _ in range(5000))
    assert abs(together - 500) < 5.5 * math.sqrt(5000 * 0.1 * 0.9)


@given(st.integers(1, 10**12))
@settings(max_examples=50, deadline=None)
def test_integers_below_stay_below(bound: int) -> None:
    assert 0 <= below(bound, Keystream()) < bound


def test_extreme_rates() -> None:
    assert PoissonSampler(0.0).sample(range(10)) == []
    assert PoissonSampler(1.0).sample(range(10)) == list(range(10))
    assert PoissonSampler(5e-324).sample(range(1000)) == []
    assert FixedSizeSampler(0, 3).sample([1, 2, 3]) == []
    assert FixedSizeSampler(3, 3).sample([3, 1, 2]) == [1, 2, 3]


def test_cohorts_come_from_the_operating_system_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert PoissonSampler(0.5).sample(range(200)) != PoissonSampler(0.5).sample(range(200))  # equal: 2^-200
    assert FixedSizeSampler(50, 200).sample(range(200), fixed("a")) == FixedSizeSampler(50, 200).sample(
        range(200), fixed("a")
    )
    for sampler in (PoissonSampler(0.5), FixedSizeSampler(5, 10), AvailabilitySampler(5)):
        defaults = type(sampler).sample.__defaults__
        assert defaults == (os.urandom,)


def test_samplers_hand_over_their_event() -> None:
    inner = Gaussian(noise_multiplier=1.0)
    assert PoissonSampler(0.1).event(inner) == PoissonSampled(0.1, inner)
    assert FixedSizeSampler(5, 50).event(inner) == FixedSizeSampled(5, 50, inner)
    assert AvailabilitySampler(5).event(inner) == inner


def test_denominators_are_public_constants() -> None:
    assert PoissonSampler(0.1).expected_size(200) == 20
    assert FixedSizeSampler(5, 50).expected_size(50) == 5
    assert AvailabilitySampler(5).expected_size(50) == 5
    assert AvailabilitySampler().expected_size(50) == 50


def test_a_fixed_cohort_of_those_online_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^node_ids: 40 nodes for a population of 50"):
        FixedSizeSampler(5, 50).sample(range(40))


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: PoissonSampler(-0.1), "rate"),
        (lambda: PoissonSampler(1.1), "rate"),
        (lambda: PoissonSampler(math.nan), "rate"),
        (lambda: FixedSizeSampler(5, 0), "population"),
        (lambda: FixedSizeSampler(6, 5), "sample_size"),
        (lambda: FixedSizeSampler(-1, 5), "sample_size"),
        (lambda: AvailabilitySampler(0), "sample_size"),
        (lambda: PoissonSampler(0.5).sample([1, 2, 1]), "node_ids"),
        (lambda: AvailabilitySampler().sample([1, 1]), "node_ids"),
    ],
)
def test_bad_arguments_are_named(build: Callable[[], object], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}:"):
        build()


# --- truncated and allocated cohorts ----------------------------------------------------------------------------


def test_a_truncated_cohort_never_exceeds_its_cap_and_favours_nobody() -> None:
    """Every one of 12 nodes is as likely as any other: false alarm of one bound 4e-6 per node, 5e-5 together."""
    sampler = TruncatedPoissonSampler(0.5, 12, 4)
    random = counting("truncated")
    seen: Counter[int] = Counter()
    sizes: Counter[int] = Counter()
    for _ in range(1500):
        cohort = sampler.sample(range(12), random)
        assert cohort == sorted(set(cohort))
        sizes[len(cohort)] += 1
        seen.update(cohort)
    assert max(sizes) == 4
    chance = sum(min(k, 4) * math.comb(12, k) for k in range(13)) / 2**12 / 12
    for node in range(12):
        assert abs(seen[node] - 1500 * chance) < 4.6 * math.sqrt(1500 * chance * (1 - chance))
    assert sampler.event(Gaussian(1.0)) == TruncatedPoisson(0.5, 12, 4, Gaussian(1.0))
    assert sampler.expected_size(12) == 4.0
    assert sampler.expected_size(2) == 1.0


def test_a_truncated_sampler_refuses_more_nodes_than_it_claims() -> None:
    with pytest.raises(ValueError, match=r"^node_ids: 6 nodes for a population of at most 5"):
        TruncatedPoissonSampler(0.5, 5, 2).sample(range(6))


@given(st.integers(1, 9), NODES)
@settings(max_examples=40, deadline=None)
def test_every_node_is_in_exactly_one_round_of_a_pass(rounds: int, nodes: list[int]) -> None:
    sampler = RandomAllocationSampler(rounds)
    assert isinstance(sampler, Sampler)
    for _ in range(2):
        cohorts = []
        for _ in range(rounds):
            sampler.event(Gaussian(1.0))
            cohorts.append(sampler.sample(nodes))
        assert sorted(node for cohort in cohorts for node in cohort) == sorted(nodes)


def test_a_pass_is_charged_whole_before_its_first_round() -> None:
    """A run of 2.5 passes costs 3, whatever is asked in between."""
    sampler, inner = RandomAllocationSampler(4), Gaussian(2.0)
    whole_pass = RandomAllocation(4, inner)
    book = Ledger.create(None, Terms("node", Budget(50.0, 1e-6)))
    expected = Accountant()
    for number in range(10):
        event = sampler.event(inner)
        book.charge(event, run="r", round=number, transcript=hashlib.sha256(b"%d" % number).hexdigest())
        if number % 4 == 0:
            assert event == whole_pass
            expected.step(whole_pass)
        assert book.spent == pytest.approx(expected.epsilon(1e-6).upper)
        sampler.sample(range(30))
    assert expected.events == {whole_pass: 3}
    assert sampler.expected_size(30) == 7.5


def test_a_pass_cannot_change_its_noise_or_start_without_a_charge() -> None:
    sampler = RandomAllocationSampler(3)
    sampler.event(Gaussian(2.0))
    sampler.sample(range(5))
    with pytest.raises(ValueError, match=r"^inner: this pass was charged for"):
        sampler.event(Gaussian(1.0))
    unpaid = RandomAllocationSampler(3)
    with pytest.raises(RuntimeError, match=r"charge"):
        unpaid.sample(range(5))


def test_rounds_are_drawn_uniformly() -> None:
    """Of 3000 nodes about a third is in each of 3 rounds: 4.6 standard deviations, false alarm 2e-5."""
    sampler = RandomAllocationSampler(3)
    sampler.event(Gaussian(1.0))
    for _ in range(3):
        size = len(sampler.sample(range(3000), counting("allocated")))
        assert abs(size - 1000) < 4.6 * math.sqrt(3000 * 2 / 9)
