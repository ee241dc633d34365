"""Random events with the laws that are their truth, over every kind of event, relation and observer."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import mpmath
from mpmath import mpf

from privfed.privacy import events as ev
from proofs_tests.privacy import oracle
from proofs_tests.privacy.oracle_exact import convolved

Laws = tuple[oracle.Law, oracle.Law]
RELATIONS = ("add_remove", "replace_one", "zero_out")
WAYS = {"add_remove": 1, "zero_out": 1, "replace_one": 2}


@dataclass(frozen=True)
class Case:
    """An event with the laws of both directions; `tight` if they are the worst there is, and not one instance."""

    event: ev.Event
    laws: Laws
    tight: bool = True


def both_of(law: oracle.Law) -> Laws:
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
    return Case(ev.PoissonSampled(rate, inner), twice(law) if antipodal else both_of(law))


def poisson(rng: random.Random, relation: str) -> Case:
    z, rate, antipodal = noise(rng), rng.choice([0.01, 0.05, 0.2, 0.6, 0.95]), relation == "replace_one"
    kind = rng.randrange(4)
    if kind < 2:
        law = oracle.gaussian(rate, z, 1, antipodal)
        return Case(ev.PoissonSampled(rate, ev.Gaussian(z)), twice(law) if antipodal else both_of(law))
    if kind == 2:
        law = oracle.laplace(rate, z, 1, antipodal)
        return Case(ev.PoissonSampled(rate, ev.Laplace(z)), twice(law) if antipodal else both_of(law))
    return integers(rng, rate, relation)


def fixed_size(rng: random.Random) -> Case:
    """Sampling without replacement: the hockey stick above 0 is that of a rate, and the rest its mirror image."""
    z, drawn = noise(rng), rng.choice([1, 8, 32, 60])
    share, step = drawn / 64, rng.choice([1, 2])
    cut = rng.choice([None, 6 + step])
    event, law = rng.choice(
        [
            lambda: (ev.Gaussian(z), oracle.gaussian(share, z, 2, positive=True)),
            lambda: (ev.Gaussian(z), oracle.gaussian(share, z, 2, positive=True)),
            lambda: (ev.Laplace(z), oracle.laplace(share, z, 2)),
            lambda: (
                ev.DiscreteGaussian(z + 0.4, step, cut),
                oracle.integer("gaussian", z + 0.4, share, 2 * step, False, cut),
            ),
            lambda: (ev.Skellam(z * z + 1, step), oracle.integer("skellam", z * z + 1, share, 2 * step, False)),
            lambda: (ev.DiscreteLaplace(z, step), oracle.integer("laplace", z, share, 2 * step, False)),
            lambda: (ev.PureDP(z / 4), oracle.thinned(oracle.response(z / 4), share)),
            lambda: (ev.ApproximateDP(z / 4, 1e-7), oracle.thinned(oracle.response(z / 4, 1e-7), share)),
            lambda: (ev.RandomizedResponse(0.3, 5), oracle.thinned(oracle.categories(0.3, 5, "replace_one"), share)),
        ]
    )()
    return Case(ev.FixedSizeSampled(drawn, 64, event), twice(law.joined()))


def truncated(rng: random.Random, relation: str) -> Case:
    """Told how many others were drawn: Poisson sampling, or a replacement where the cohort is full."""
    z, cap = noise(rng), rng.choice([7, 10, 20])
    with mpmath.workdps(oracle.DIGITS):
        q = mpf(0.125)
        few = mpmath.fsum(mpmath.binomial(49, k) * q**k * (1 - q) ** (49 - k) for k in range(cap))
        full = 1 - few
    kind = rng.choice(["gaussian", "gaussian", "laplace", "integers"])
    inner: ev.Event = ev.Gaussian(z)

    def law(distance: int, antipodal: bool = False) -> oracle.Law:
        if kind == "gaussian":
            return oracle.gaussian(0.125, z, distance, antipodal)
        if kind == "laplace":
            return oracle.laplace(0.125, z, distance, antipodal)
        return oracle.integer("gaussian", z + 0.4, 0.125, distance, antipodal, 9)

    if kind == "laplace":
        inner = ev.Laplace(z)
    elif kind == "integers":
        inner = ev.DiscreteGaussian(z + 0.4, 1, 9)
    event = ev.TruncatedPoisson(0.125, 50, cap, inner)
    if relation == "replace_one":
        joined = oracle.gaussian(0.125, z, 2, positive=True) if kind == "gaussian" else law(2)
        return Case(event, twice(oracle.tagged(law(1, True), joined.joined(), full)))
    free, displaced = law(1), law(2)
    return Case(event, (oracle.tagged(free, displaced, full), oracle.tagged(free.swapped(), displaced.swapped(), full)))


def crowded(rng: random.Random, relation: str) -> Case:
    """Truncated Poisson sampling of a unit at -1 and perhaps one at 1, where nobody tells how many were drawn."""
    z, rate = noise(rng), rng.choice([0.1, 0.5, 0.9])
    with mpmath.workdps(oracle.DIGITS):
        q = mpf(rate)
        none, one = (1 - q) ** 2, q * (1 - q) + q * q / 2
        others = {
            "add_remove": (1 - q, q, mpf(0)),
            "zero_out": (none + one, one, mpf(0)),
            "replace_one": (none, 2 * one, mpf(0)),
        }
        law = oracle.three_points(z, (none, one, one), others[relation])
    return Case(ev.TruncatedPoisson(rate, 2, 1, ev.Gaussian(z)), both_of(law), tight=False)


def atoms(rng: random.Random, relation: str) -> Case:
    """Guarantees without a mechanism: the law that dominates them all, or one that has them."""
    epsilon, rate, kind = rng.choice([0.1, 0.4, 1.5]), rng.choice([0.1, 0.5]), rng.randrange(8)
    if kind == 0:
        return Case(ev.PureDP(epsilon), twice(oracle.response(epsilon)))
    if kind == 1:
        return Case(ev.AboveThreshold(epsilon), twice(oracle.response(epsilon)))
    if kind == 2:
        delta = rng.choice([1e-9, 1e-5, 1e-3])
        return Case(ev.ApproximateDP(epsilon, delta), twice(oracle.response(epsilon, delta)))
    if kind == 3:
        law = oracle.bounded_range(epsilon, epsilon * rng.uniform(0.1, 0.9))
        return Case(ev.Exponential(epsilon), both_of(law), tight=False)
    if kind in (4, 5) and relation != "add_remove":
        noise_share, k = rng.choice([(0.4, 4), (0.5, 2), (0.05, 20)])
        return Case(ev.RandomizedResponse(noise_share, k), both_of(oracle.categories(noise_share, k, relation)))
    if relation == "add_remove":
        inner, base = rng.choice(
            [
                (ev.PureDP(epsilon), oracle.response(epsilon)),
                (ev.AboveThreshold(epsilon), oracle.response(epsilon)),
                (ev.ApproximateDP(epsilon, 1e-7), oracle.response(epsilon, 1e-7)),
            ]
        )
        return Case(ev.PoissonSampled(rate, inner), both_of(oracle.thinned(base, rate)))
    if relation == "replace_one":
        return fixed_size(rng)
    return Case(ev.PureDP(epsilon), twice(oracle.response(epsilon)))


def _sum_of(kind: str, size: float, nodes: int) -> tuple[mpf, ...]:
    """Return the masses at 0, 1, 2, ... of a sum of independent integers."""
    half = oracle.masses(kind, size)
    first, masses = convolved([*half[:0:-1], *half], nodes)
    middle = nodes * (len(half) - 1) - first
    return tuple(masses[middle:])


def instances(rng: random.Random, relation: str) -> Case:
    """Events of which only moments are proved: one mechanism that has them must cost no more."""
    ways, nodes, kind = WAYS[relation], rng.choice([2, 4, 20]), rng.randrange(5)
    rho = rng.choice([0.01, 0.2])
    if kind == 0 or (relation == "replace_one" and kind == 3):
        return Case(ev.ZCDP(rho), twice(oracle.gaussian(1.0, 1 / math.sqrt(2 * rho * (1 - 1e-12)))), tight=False)
    if kind == 4 and relation == "add_remove":
        law = oracle.gaussian(0.25, 1 / math.sqrt(2 * rho * (1 - 1e-12)))
        return Case(ev.PoissonSampled(0.25, ev.ZCDP(rho)), both_of(law), tight=False)
    local, name = noise(rng, 0.6, 2.0), rng.choice(["gaussian", "skellam"])
    size = local if name == "gaussian" else local**2
    rate = 0.25 if kind == 3 else 1.0
    # a contribution of 1.0 or of 1.4, rounded up with probability 0.4, against nothing or its mirror image
    clip = rng.choice([1.0, 1.4])
    with mpmath.workdps(oracle.DIGITS):
        law = oracle.rounded(_sum_of(name, size, nodes), rate, mpf(clip), ways == 2)
    made = ev.DistributedDiscreteGaussian if name == "gaussian" else ev.DistributedSkellam
    event: ev.Event = made(local, clip, 1.0, 1, nodes, 2**20, 0.0)
    return Case(ev.PoissonSampled(rate, event) if rate < 1 else event, both_of(law), tight=False)


def allocation(rng: random.Random) -> list[tuple[Case, int]]:
    """Two bins: the sum of the two outputs is Gaussian noise, their difference a symmetric mixture, independent."""
    z, passes = noise(rng, 0.8, 4.0), rng.choice([1, 2, 5])
    with mpmath.workdps(oracle.DIGITS):
        part = 1 / (mpf(z) * mpmath.sqrt(2))
        step = mpf(1) / 8 / max(1, math.ceil(part))
        nodes = [k * step for k in range(math.floor(-30 / step), math.ceil(30 / step))]
        losses = tuple(mpmath.log(mpmath.cosh(part * x)) - part**2 / 2 for x in nodes)
        weights = tuple(step * mpmath.npdf(x) * mpmath.exp(y) for x, y in zip(nodes, losses, strict=True))
        mixed = oracle.Law(losses, weights, highest=20 * max(1.0, 1 / float(part)), fades=True)
        summed = oracle.gaussian(1.0, float(1 / part))
    event = ev.RandomAllocation(2, ev.Gaussian(z))
    return [(Case(event, both_of(mixed)), passes), (Case(ev.Composed(()), twice(summed)), passes)]


def served(rng: random.Random, relation: str) -> Case:
    """What the server draws costs the server its inner event."""
    inner = plain(rng, relation)
    event = rng.choice(
        [
            ev.PoissonSampled(0.1, inner.event),
            ev.TruncatedPoisson(0.1, 50, 9, inner.event),
            ev.RandomAllocation(9, inner.event),
            ev.FixedSizeSampled(3, 50, inner.event),
        ]
    )
    return replace(inner, event=event)


def mixed(rng: random.Random, relation: str) -> list[tuple[Case, int]]:
    """Two to five kinds of event, each a few or many times."""
    makers = [plain, poisson, atoms, instances, truncated]
    if relation == "replace_one":
        makers[4] = lambda rng, relation: fixed_size(rng)
    return [(make(rng, relation), rng.choice([1, 2, 8, 30])) for make in rng.sample(makers, rng.choice([2, 3, 3, 5]))]


def drawn(rng: random.Random) -> tuple[list[tuple[Case, int]], str, str]:
    """Return cases with counts, a relation and an observer."""
    relation, observer = rng.choice(RELATIONS), "output"
    count = rng.choice([1, 2, 3, 4, 8, 30, 200])
    kind = rng.randrange(13)
    if kind == 0:
        cases = [(plain(rng, relation), count)]
    elif kind < 3:
        cases = [(poisson(rng, relation), count)]
    elif kind == 3:
        cases = [(integers(rng, rng.choice([1.0, 1.0, 0.3]), relation), count)]
    elif kind == 4:
        relation, cases = "replace_one", [(fixed_size(rng), count)]
    elif kind == 5:
        cases = [(truncated(rng, relation), count)]
    elif kind == 6:
        cases = [(atoms(rng, relation), count)]
    elif kind < 9:
        cases = [((crowded if rng.random() < 0.2 else instances)(rng, relation), count)]
    elif kind == 9:
        relation, cases = rng.choice(["add_remove", "zero_out"]), allocation(rng)
    elif kind == 10:
        observer, cases = "server", [(served(rng, relation), count)]
    else:
        cases = mixed(rng, relation)
    if observer == "output" and rng.random() < 0.3:  # in other words
        cases = [(replace(case, event=ev.Central(ev.Composed(((case.event, 1),)))), n) for case, n in cases]
    return cases, relation, observer
