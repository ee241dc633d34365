"""Random compositions over all events, relations and observers: lower <= truth <= upper, the truth to 28 digits."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import mpmath
import pytest
from mpmath import mpf

from privfed.privacy import events as ev
from privfed.privacy.accountant import Accountant
from proofs_tests.privacy import oracle

Laws = tuple[oracle.Law, oracle.Law]
RELATIONS = ("add_remove", "replace_one", "zero_out")
WAYS = {"add_remove": 1, "zero_out": 1, "replace_one": 2}


@dataclass(frozen=True)
class Case:
    """An event with the laws of both directions; `tight` if they are the worst there is, and not one instance."""

    event: ev.Event
    laws: Laws
    tight: bool = True


def both(law: oracle.Law) -> Laws:
    return law, law.swapped()


def twice(law: oracle.Law) -> Laws:
    return law, law


def noise(rng: random.Random, low: float = 0.6, high: float = 6.0) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def plain(rng: random.Random, relation: str) -> Case:
    """Unsampled noise: one law, its own mirror image."""
    z, ways = noise(rng), WAYS[relation]
    kind = rng.randrange(6)
    if kind == 0:
        return Case(ev.Gaussian(z), twice(oracle.gaussian(1.0, z, ways)))
    if kind == 1:
        return Case(ev.MatrixGaussian(z, 2.0), twice(oracle.gaussian(1.0, z, 2 * ways)))
    if kind == 2:
        return Case(ev.Laplace(z), twice(oracle.laplace(1.0, z, ways)))
    return integers(rng, 1.0, relation)


def integers(rng: random.Random, rate: float, relation: str) -> Case:
    """Noise on the integers, Poisson-sampled if the rate is below 1."""
    z, step, ways = noise(rng, 0.8, 4.0), rng.choice([1, 1, 2]), WAYS[relation]
    antipodal = rate < 1 and ways == 2
    shift = step if rate < 1 else step * ways
    cut = rng.choice([None, None, 5 + 2 * step])
    kind = rng.choice(["gaussian", "laplace", "skellam"])
    inner: ev.Event = {
        "gaussian": lambda: ev.DiscreteGaussian(z, step, cut),
        "laplace": lambda: ev.DiscreteLaplace(z, step),
        "skellam": lambda: ev.Skellam(z * z + 1, step),
    }[kind]()
    size = z * z + 1 if kind == "skellam" else z
    law = oracle.integer(kind, size, rate, shift, antipodal, cut if kind == "gaussian" else None)
    if rate == 1:
        return Case(inner, twice(law))
    return Case(ev.PoissonSampled(rate, inner), twice(law) if antipodal else both(law))


def poisson(rng: random.Random, relation: str) -> Case:
    z, rate, antipodal = noise(rng), rng.choice([0.01, 0.05, 0.2, 0.6, 0.95]), relation == "replace_one"
    kind = rng.randrange(4)
    if kind < 2:
        law = oracle.gaussian(rate, z, 1, antipodal)
        return Case(ev.PoissonSampled(rate, ev.Gaussian(z)), twice(law) if antipodal else both(law))
    if kind == 2:
        law = oracle.laplace(rate, z, 1, antipodal)
        return Case(ev.PoissonSampled(rate, ev.Laplace(z)), twice(law) if antipodal else both(law))
    return integers(rng, rate, relation)


def fixed_size(rng: random.Random) -> Case:
    z, drawn = noise(rng), rng.choice([1, 8, 32, 60])
    kind = rng.randrange(3)
    if kind == 0:
        event: ev.Event = ev.Gaussian(z)
        law = oracle.gaussian(drawn / 64, z, 2, positive=True)
    elif kind == 1:
        event, law = ev.Laplace(z), oracle.laplace(drawn / 64, z, 2)
    else:
        event, law = ev.DiscreteGaussian(z + 0.4, 1), oracle.integer("gaussian", z + 0.4, drawn / 64, 2, False)
    return Case(ev.FixedSizeSampled(drawn, 64, event), twice(law.joined()))


def truncated(rng: random.Random, relation: str) -> Case:
    """Told how many others were drawn: Poisson sampling, or a replacement where the cohort is full."""
    z, cap = noise(rng), rng.choice([7, 10, 20])
    with mpmath.workdps(oracle.DIGITS):
        q = mpf(0.125)
        few = mpmath.fsum(mpmath.binomial(49, k) * q**k * (1 - q) ** (49 - k) for k in range(cap))
        full = 1 - few
    event = ev.TruncatedPoisson(0.125, 50, cap, ev.Gaussian(z))
    displaced = oracle.gaussian(0.125, z, 2)
    if relation == "replace_one":
        joined = oracle.gaussian(0.125, z, 2, positive=True).joined()
        return Case(event, twice(oracle.tagged(oracle.gaussian(0.125, z, 1, True), joined, full)))
    free = oracle.gaussian(0.125, z)
    return Case(
        event,
        (oracle.tagged(free, displaced, full), oracle.tagged(free.swapped(), displaced.swapped(), full)),
    )


def atoms(rng: random.Random, relation: str) -> Case:
    """Guarantees without a mechanism: the law that dominates them all, or one that has them."""
    epsilon, rate, kind = rng.choice([0.1, 0.4, 1.5]), rng.choice([0.1, 0.5]), rng.randrange(7)
    if kind == 0:
        return Case(ev.PureDP(epsilon), twice(oracle.response(epsilon)))
    if kind == 1:
        return Case(ev.AboveThreshold(epsilon), twice(oracle.response(epsilon)))
    if kind == 2:
        delta = rng.choice([1e-9, 1e-5])
        return Case(ev.ApproximateDP(epsilon, delta), twice(oracle.response(epsilon, delta)))
    if kind == 3:
        law = oracle.bounded_range(epsilon, epsilon * rng.uniform(0.1, 0.9))
        return Case(ev.Exponential(epsilon), both(law), tight=False)
    if kind == 4 and relation != "add_remove":
        law = oracle.categories(0.4, 4, relation)
        return Case(ev.RandomizedResponse(0.4, 4), both(law))
    if relation == "add_remove":
        inner = ev.ApproximateDP(epsilon, 1e-7) if kind == 5 else ev.PureDP(epsilon)
        law = oracle.thinned(oracle.response(epsilon, 1e-7 if kind == 5 else 0.0), rate)
        return Case(ev.PoissonSampled(rate, inner), both(law))
    if relation == "replace_one":
        law = oracle.thinned(oracle.response(epsilon), 0.25)
        return Case(ev.FixedSizeSampled(16, 64, ev.PureDP(epsilon)), twice(law.joined()))
    return Case(ev.PureDP(epsilon), twice(oracle.response(epsilon)))


def instances(rng: random.Random, relation: str) -> Case:
    """Events of which only moments are proved: one mechanism that has them must cost no more."""
    ways, nodes, kind = WAYS[relation], rng.choice([4, 20]), rng.randrange(4)
    if kind == 0 or (relation == "replace_one" and kind == 3):
        rho = rng.choice([0.01, 0.2])
        return Case(ev.ZCDP(rho), twice(oracle.gaussian(1.0, 1 / math.sqrt(2 * rho * (1 - 1e-12)))), tight=False)
    local = noise(rng, 0.8, 2.0)
    if kind == 1:
        event: ev.Event = ev.DistributedDiscreteGaussian(local, 1.0, 1.0, 1, nodes, 2**20, 0.0)
        # a sum of discrete Gaussians is, at these widths, the discrete Gaussian of the summed variance to 1e-6
        law = oracle.integer("gaussian", math.sqrt(nodes) * local, 1.0, ways, False)
        return Case(event, twice(law), tight=False)
    event = ev.DistributedSkellam(local, 1.0, 1.0, 1, nodes, 2**20, 0.0)
    if kind == 2:
        return Case(event, twice(oracle.integer("skellam", nodes * local**2, 1.0, ways, False)), tight=False)
    law = oracle.integer("skellam", nodes * local**2, 0.25, 1, False)
    return Case(ev.PoissonSampled(0.25, event), both(law), tight=False)


def allocation(rng: random.Random) -> list[tuple[Case, int]]:
    """Two bins: the sum of the two outputs is Gaussian noise, their difference a symmetric mixture, independent."""
    z, passes = noise(rng, 0.8, 4.0), rng.choice([1, 2, 5])
    with mpmath.workdps(oracle.DIGITS):
        part = 1 / (mpf(z) * mpmath.sqrt(2))
        step = mpf(1) / 8 / max(1, math.ceil(part))
        nodes = [k * step for k in range(math.floor(-30 / step), math.ceil(30 / step))]
        losses = tuple(mpmath.log(mpmath.cosh(part * x)) - part**2 / 2 for x in nodes)
        weights = tuple(step * mpmath.npdf(x) * mpmath.exp(y) for x, y in zip(nodes, losses, strict=True))
        mixed = oracle.Law(losses, weights, highest=20 * max(1.0, 1 / float(part)))
        summed = oracle.gaussian(1.0, float(1 / part))
    event = ev.RandomAllocation(2, ev.Gaussian(z))
    return [(Case(event, both(mixed)), passes), (Case(ev.Composed(()), twice(summed)), passes)]


def drawn(rng: random.Random) -> tuple[list[tuple[Case, int]], str, str]:
    """Return cases with counts, a relation and an observer."""
    relation = rng.choice(RELATIONS)
    count = rng.choice([1, 2, 3, 8, 30, 200])
    kind = rng.randrange(11)
    observer = "output"
    if kind == 0:
        cases = [(plain(rng, relation), count)]
    elif kind < 4:
        cases = [(poisson(rng, relation), count)]
    elif kind == 4:
        relation, cases = "replace_one", [(fixed_size(rng), count)]
    elif kind == 5:
        cases = [(truncated(rng, relation), count)]
    elif kind == 6:
        cases = [(atoms(rng, relation), count)]
    elif kind == 7:
        cases = [(instances(rng, relation), count)]
    elif kind == 8:
        relation, cases = rng.choice(["add_remove", "zero_out"]), allocation(rng)
    elif kind == 9:  # the server sees every cohort: what it draws costs its inner event
        observer, inner = "server", plain(rng, relation)
        sampled = rng.choice(
            [
                ev.PoissonSampled(0.1, inner.event),
                ev.TruncatedPoisson(0.1, 50, 9, inner.event),
                ev.RandomAllocation(9, inner.event),
                ev.FixedSizeSampled(3, 50, inner.event),
            ]
        )
        cases = [(Case(sampled, inner.laws), count)]
    else:
        cases = [(plain(rng, relation), count), (poisson(rng, relation), count), (atoms(rng, relation), 2)]
    return cases, relation, observer


class Truth:
    """The larger delta of two directions, near one epsilon; Gaussian noise is added where inversion needs it."""

    def __init__(self, cases: Sequence[tuple[Case, int]], extra: float, near: float) -> None:
        self.sides = []
        for side in (0, 1):
            laws = [(case.laws[side], count) for case, count in cases]
            self.sides.append(solved(laws, extra, near))

    def delta(self, epsilon: float) -> mpf:
        return max(side.delta(epsilon) for side in self.sides)


def solved(laws: list[tuple[oracle.Law, int]], mu: float, near: float) -> oracle.Enumerated | oracle.Inverted:
    size = math.prod(oracle.size_of(len(law.losses), count) for law, count in laws)
    if size <= 3000 and all(math.isinf(law.highest) for law, _ in laws):
        return oracle.Enumerated(laws, mu)
    if not mu and all(math.isinf(law.highest) for law, _ in laws):
        # The moments of lattices come back: only noise beside them makes them vanish for good.
        raise oracle.Unresolved("atoms alone cannot be inverted")
    return oracle.Inverted(laws, mu, near)


def check(seed: int) -> None:
    """Ask for epsilon at a random delta, and for delta there; compare both with the truth."""
    rng = random.Random(seed)
    cases, relation, observer = drawn(rng)
    delta = 10.0 ** rng.uniform(-12, -2)
    # Moments that do not vanish cannot be inverted: Gaussian noise beside the cases smooths them, more if need be.
    for extra in (0.0, rng.choice([1.0, 1.5]), 3.0, 6.0):
        accountant = Accountant(relation=relation, observer=observer)
        for case, count in cases:
            accountant.step(case.event, count)
        if extra:
            accountant.step(ev.Gaussian(WAYS[relation] / extra))
        found = accountant.epsilon(delta)
        try:
            truth = Truth(cases, extra, min(found.estimate, 200.0))
            break
        except oracle.Unresolved:
            continue
    else:
        raise AssertionError(f"the oracle resolves no variant of {cases}")
    assert 0 <= found.lower <= found.estimate <= found.upper
    tight = all(case.tight for case, _ in cases)
    if found.upper < math.inf:
        assert truth.delta(found.upper) <= delta, (cases, found)
    if found.lower > 0:
        here = truth.delta(min(found.lower, 200.0))
        assert not tight or here >= delta, (cases, found)
    at = min(found.estimate, 200.0)
    back, exact = accountant.delta(at), truth.delta(at)
    assert exact <= back.upper, (cases, at)
    assert not tight or back.lower <= exact, (cases, at)
    if tight and "effort" not in back.method and "Renyi" not in back.method:
        assert back.lower >= exact * mpf("0.98"), (cases, at)


@pytest.mark.parametrize("seed", range(30))
def test_brackets_hold_the_truth(seed: int) -> None:
    check(seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(30, 580))
def test_brackets_hold_the_truth_at_length(seed: int) -> None:
    check(seed)
