"""Brackets hold against independent high-precision computations and against dp-accounting."""

from __future__ import annotations

import math
import random
from typing import Any

import mpmath
import numpy as np
import pytest
from scipy import special

from privfed.privacy import allocation, stretch
from privfed.privacy import events as ev
from privfed.privacy.accountant import Accountant
from privfed.privacy.cumulant import Cumulants, invert
from privfed.privacy.dominating import pairs
from privfed.privacy.pair import ULP, NormalPair, Pair
from privfed.privacy.query import Plan


def truth(losses: list[tuple[mpmath.mpf, mpmath.mpf]], count: int, epsilon: float) -> mpmath.mpf:
    """Return delta(epsilon) of `count` uses of a law with few losses: every multiset of outcomes, 30 digits."""
    with mpmath.workdps(30):
        composed: dict[mpmath.mpf, mpmath.mpf] = {mpmath.mpf(0): mpmath.mpf(1)}
        for _ in range(count):
            grown: dict[mpmath.mpf, mpmath.mpf] = {}
            for total, mass in composed.items():
                for loss, share in losses:
                    key = mpmath.nstr(total + loss, 24)
                    grown[mpmath.mpf(key)] = grown.get(mpmath.mpf(key), mpmath.mpf(0)) + mass * share
            composed = grown
        return mpmath.fsum(m * (1 - mpmath.e ** (epsilon - x)) for x, m in composed.items() if x > epsilon)


def gaussian_inversion(rate: float, noise: float, count: int, epsilon: float, added: bool) -> mpmath.mpf:
    """Return delta(epsilon) of the sampled Gaussian by inverting its moments along a line, 30 digits throughout.

    The moments are Riemann sums in x with a step at which they have converged; nothing is shared with the engine.
    """
    with mpmath.workdps(30):
        mu, step = 1 / mpmath.mpf(noise), mpmath.mpf(1) / 16
        xs = [k * step for k in range(-16 * 14, int(16 * (14 + 8 * float(mu))))]
        ratio = [mpmath.log(1 - rate + rate * mpmath.e ** (mu * x - mu**2 / 2)) for x in xs]
        base = [step * mpmath.npdf(x) for x in xs]
        if added:
            loss, mass = [-r for r in ratio], base
        else:
            loss, mass = ratio, [b * mpmath.e**r for b, r in zip(base, ratio, strict=True)]
        line = mpmath.mpf(2)

        def moment(s: mpmath.mpc) -> mpmath.mpc:
            return mpmath.fsum(m * mpmath.exp(s * x) for m, x in zip(mass, loss, strict=True))

        centre = mpmath.log(moment(line))

        def integrand(u: mpmath.mpf) -> mpmath.mpf:
            s = mpmath.mpc(line, u)
            return mpmath.re(mpmath.exp(count * (mpmath.log(moment(s)) - centre) - 1j * u * epsilon) / (s * (s + 1)))

        width = mpmath.mpf("0.2")
        total, k = integrand(mpmath.mpf(0)) / 2, 1
        small = 0
        while small < 5 and k < 4000:
            term = integrand(k * width)
            total, k = total + term, k + 1
            small = small + 1 if abs(term) < mpmath.mpf(10) ** -18 else 0
        return total * width / mpmath.pi * mpmath.exp(count * centre - line * epsilon)


def random_case(rng: random.Random) -> tuple[ev.Event, int, str]:
    """Return an event, a count and a relation, over every kind that has a dominating pair."""
    noise = math.exp(rng.uniform(math.log(0.6), math.log(8)))
    inner: ev.Event = rng.choice(
        [
            ev.Gaussian(noise),
            ev.Laplace(noise),
            ev.DiscreteGaussian(noise + 0.5, rng.choice([1, 2])),
            ev.DiscreteLaplace(noise),
            ev.Skellam(noise**2 + 1),
        ]
    )
    kind = rng.randrange(8)
    count = rng.choice([1, 2, 3, 7, 20, 100])
    if kind < 3:
        return ev.PoissonSampled(rng.choice([0.01, 0.1, 0.5]), inner), count, rng.choice(["add_remove", "replace_one"])
    if kind == 3:
        return ev.FixedSizeSampled(rng.choice([1, 20, 60]), 100, inner), count, "replace_one"
    if kind == 4:
        return ev.TruncatedPoisson(0.1, 100, rng.choice([9, 14, 25]), inner), count, "add_remove"
    if kind == 5:
        choice = rng.choice([ev.RandomizedResponse(0.4, 3), ev.Exponential(0.4), ev.ApproximateDP(0.3, 1e-9)])
        return choice, count, "replace_one"
    return inner, count, rng.choice(["add_remove", "replace_one", "zero_out"])


def quadrature_delta(event: ev.Event, count: int, relation: str, epsilon: float) -> float:
    """Return the larger direction's delta by an FFT of the whole law of losses on a very fine lattice, rounded up.

    Independent of the engine's tilting, cells, merging and inversion; bracketed by rounding losses down and up.
    """
    both = pairs(event, relation)
    assert both is not None
    worst = 0.0
    for pair in both:
        worst = max(worst, fine_lattice_delta(pair, count, epsilon))
    return worst


def fine_lattice_delta(pair: Pair, count: int, epsilon: float) -> float:
    low, high = pair.span(1e-13)
    low, high = low - 1e-9, high + 1e-9
    size = 1 << 15
    edges = np.linspace(low, high, size)
    p = pair.masses(edges).p
    centres = np.concatenate(([low], (edges[1:] + edges[:-1]) / 2, [high]))
    step = edges[1] - edges[0]
    mean = float(p @ centres)
    total = 1 << math.ceil(math.log2(4 * size * min(count, 16)))
    spot = (centres - mean) / step
    first = np.floor(spot).astype(int)
    law = np.bincount(first % total, p * (first + 1 - spot), total)
    law += np.bincount((first + 1) % total, p * (spot - first), total)
    composed = np.fft.irfft(np.fft.rfft(law) ** count, total)
    k = np.arange(total)
    k[k > total // 2] -= total
    losses = count * mean + step * k
    certain = float(getattr(pair, "certain", 0.0))
    return (
        float(np.maximum(1 - np.exp(np.minimum(epsilon - losses, 0.0)), 0.0) @ composed) * (1 - certain) ** count
        + 1
        - (1 - certain) ** count
    )


def check_case(seed: int) -> None:
    rng = random.Random(seed)
    event, count, relation = random_case(rng)
    accountant = Accountant(relation=relation).step(event, count)
    delta = 10.0 ** -rng.choice([2, 3, 4, 5])
    found = accountant.epsilon(delta)
    assert found.lower <= found.estimate <= found.upper
    if found.upper == math.inf:
        assert quadrature_delta(event, count, relation, 50.0) > delta / 2
        return
    slack = 2e-3 * max(found.upper, 0.05)
    assert quadrature_delta(event, count, relation, found.upper + slack) <= delta * (1 + 1e-6), (event, count, relation)
    if found.lower > slack:
        assert quadrature_delta(event, count, relation, found.lower - slack) >= delta * (1 - 1e-6), (event, count)


@pytest.mark.parametrize("seed", range(24))
def test_random_brackets_hold_the_fine_lattice(seed: int) -> None:
    check_case(seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(24, 524))
def test_random_brackets_hold_the_fine_lattice_at_length(seed: int) -> None:
    check_case(seed)


CASES = [(0.1, 1.0, 20, 1.0), (0.3, 2.0, 50, 2.0), (0.5, 1.2, 6, 1.5)]


@pytest.mark.parametrize(("rate", "noise", "count", "epsilon"), CASES[:1])
def test_brackets_hold_30_digits(rate: float, noise: float, count: int, epsilon: float) -> None:
    exact = max(gaussian_inversion(rate, noise, count, epsilon, added) for added in (False, True))
    found = Accountant().step(ev.PoissonSampled(rate, ev.Gaussian(noise)), count).delta(epsilon)
    assert found.lower <= exact <= found.upper
    assert found.estimate == pytest.approx(float(exact), rel=1e-7)


@pytest.mark.long
@pytest.mark.parametrize(("rate", "noise", "count", "epsilon"), CASES[1:])
def test_brackets_hold_30_digits_at_length(rate: float, noise: float, count: int, epsilon: float) -> None:
    test_brackets_hold_30_digits(rate, noise, count, epsilon)


@pytest.mark.parametrize("count", [1, 5, 17, 40])
def test_randomised_response_holds_30_digits(count: int) -> None:
    """Lattice losses: every count of truths, exactly (a peer forgets the count and reports a tenth)."""
    with mpmath.workdps(30):
        p, q = mpmath.mpf("0.9"), mpmath.mpf("0.1")
        losses = [(mpmath.log(p / q), p), (mpmath.log(q / p), q)]
    accountant = Accountant(relation="replace_one").step(ev.RandomizedResponse(0.2, 2), count)
    for epsilon in (0.5, 2.0, 9.0):
        found, exact = accountant.delta(epsilon), truth(losses, count, epsilon)
        assert found.lower <= exact * (1 + 1e-9)
        assert exact * (1 - 1e-9) <= found.upper
    assert Accountant(relation="replace_one").step(ev.RandomizedResponse(0.2, 2), 10).epsilon(
        1e-6
    ).estimate == pytest.approx(21.97224, rel=1e-5)


@pytest.mark.parametrize("count", [3, 20])
def test_three_way_response_holds_30_digits(count: int) -> None:
    """Three losses on one lattice, of which the middle one is 0."""
    with mpmath.workdps(30):
        p, q, rest = 1 - mpmath.mpf(0.4) * 2 / 3, mpmath.mpf(0.4) / 3, mpmath.mpf(0.4) / 3
        losses = [(mpmath.log(p / q), p), (mpmath.log(q / p), q), (mpmath.mpf(0), rest)]
    accountant = Accountant(relation="replace_one").step(ev.RandomizedResponse(0.4, 3), count)
    for epsilon in (0.5, 3.0):
        found, exact = accountant.delta(epsilon), truth(losses, count, epsilon)
        assert found.lower <= exact * (1 + 1e-9)
        assert exact * (1 - 1e-9) <= found.upper


def test_normal_tails_are_as_accurate_as_claimed() -> None:
    """The rounding bound of cell masses rests on this: 2 ulp, plus what the argument's own rounding does."""
    with mpmath.workdps(40):
        for x in np.concatenate((-np.logspace(-3, math.log10(37), 300), [-0.5, -1.0])):
            exact = mpmath.ncdf(mpmath.mpf(float(x)))
            assert abs(mpmath.mpf(float(special.ndtr(x))) / exact - 1) <= 2 * ULP * (1 + x * x)


@pytest.mark.parametrize("relation", ["add_remove", "replace_one"])
def test_against_dp_accounting(relation: str) -> None:
    """dp-accounting's fine pessimistic bound lies between our lower bound and a little above our upper bound."""
    accounting = pytest.importorskip("dp_accounting")
    from dp_accounting.pld import PLDAccountant

    neighbouring = {
        "add_remove": accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
        "replace_one": accounting.NeighboringRelation.REPLACE_ONE,
    }[relation]
    other = PLDAccountant(neighbouring)
    other.compose(accounting.PoissonSampledDpEvent(0.05, accounting.GaussianDpEvent(1.5)), 100)
    theirs = other.get_epsilon(1e-6)
    ours = Accountant(relation=relation).step(ev.PoissonSampled(0.05, ev.Gaussian(1.5)), 100).epsilon(1e-6)
    assert ours.lower <= theirs
    assert theirs == pytest.approx(ours.estimate, rel=1e-4)


def test_unsound_peers_are_under_our_lower_bound() -> None:
    """The central-limit figure for a long run lies below the truth; our guarantee must not."""
    from privfed.privacy.closed_form import gaussian_epsilon

    rate, noise, count, delta = 1e-4, 0.7, 1000, 1e-10
    limit = rate * math.sqrt(count * (math.exp(noise**-2) - 1))
    found = Accountant().step(ev.PoissonSampled(rate, ev.Gaussian(noise)), count).epsilon(delta, tol=0.05)
    assert gaussian_epsilon(limit, delta) < found.lower


def test_directions_mirror() -> None:
    pair = NormalPair(1.0, 0.3)
    for epsilon in (-1.0, 0.0, 0.3, 2.0):
        swapped = pairs(ev.PoissonSampled(0.3, ev.Gaussian(1.0)), "add_remove")
        assert swapped is not None
        mirrored = 1 - math.exp(epsilon) + math.exp(epsilon) * pair.profile(-epsilon)
        assert swapped[1].profile(epsilon) == pytest.approx(mirrored, abs=1e-14)


def sampled_stick(rate: float, mu: float, epsilon: float, antipodal: bool) -> mpmath.mpf:
    """Return the hockey stick of one sampled Gaussian against its noise (or its mirror image), 60 digits."""
    with mpmath.workdps(60):
        q, m, growth = mpmath.mpf(rate), mpmath.mpf(mu), mpmath.exp(mpmath.mpf(epsilon))
        if antipodal:
            c, b = q * mpmath.exp(-m * m / 2), (1 - q) * (1 - growth)
            x = mpmath.log((-b + mpmath.sqrt(b * b + 4 * c * c * growth)) / (2 * c)) / m
            other = (1 - q) * mpmath.ncdf(-x) + q * mpmath.ncdf(-m - x)
        else:
            x = (mpmath.log((growth - 1 + q) / q) + m * m / 2) / m
            other = mpmath.ncdf(-x)
        return (1 - q) * mpmath.ncdf(-x) + q * mpmath.ncdf(m - x) - growth * other


EXTREME = [
    (0.05, 0.22, 3.4e-229, True),  # where a tail's argument counts for more than its own digits
    (1.4e-6, 28.2, 2.4e-7, True),  # where a likelihood ratio's square leaves the range of floats
    (0.4, 12.0, 1e-30, True),
    (0.98, 10.95, 4.6e-281, False),  # where one of two tails underflows
    (0.01, 1.0, 1e-30, False),
    (1 - 1e-9, 3.0, 1e-120, False),
]


@pytest.mark.parametrize(("rate", "mu", "delta", "antipodal"), EXTREME)
def test_extreme_sampled_gaussians_hold_60_digits(rate: float, mu: float, delta: float, antipodal: bool) -> None:
    """One use, both sides, at deltas and noise far from what anybody runs."""
    relation = "replace_one" if antipodal else "add_remove"
    found = Accountant(relation=relation).step(ev.PoissonSampled(rate, ev.Gaussian(1 / mu)), 1).epsilon(delta)
    scale = 1 / (1 / mu)  # what the accountant makes of it
    assert sampled_stick(rate, scale, found.upper, antipodal) <= delta
    assert found.lower > 0 or "effort limit" in found.method
    assert found.lower == 0 or sampled_stick(rate, scale, found.lower, antipodal) >= delta


def test_bounds_allow_for_what_losses_are_off_by() -> None:
    """Beside the largest loss a delta of 1e-17 hangs on its last digit: 2 / scale, and no more."""
    scale = 57.22656838333692
    found = Accountant().step(ev.DiscreteLaplace(scale, 2)).epsilon(8.047e-18)
    with mpmath.workdps(40):
        exact = 2 / mpmath.mpf(scale)  # less some 1e-17
    assert found.lower <= exact - 1e-16 < exact <= found.upper


WILD: list[Any] = [
    (
        "zero_out",
        3.19e-103,
        [(ev.MatrixGaussian(0.566, 2.41), 254_384), (ev.PoissonSampled(0.638, ev.Skellam(0.14)), 5)],
    ),
    ("add_remove", 1.28e-24, [(ev.PoissonSampled(1e-15, ev.Gaussian(3.377)), 86), (ev.Gaussian(0.0043), 1)]),
    pytest.param(
        "zero_out",
        0.5,
        [
            (ev.PoissonSampled(0.0043, ev.DiscreteGaussian(1.527, 1, 3)), 21),
            (ev.DistributedDiscreteGaussian(0.1626, 1.0, 3.055, 609, 155, 2**24, 0.0), 1),
        ],
        marks=pytest.mark.long,
    ),
    ("zero_out", 0.5, [(ev.PoissonSampled(0.53, ev.Gaussian(0.0079)), 7), (ev.ZCDP(0.1), 2), (ev.Laplace(0.01), 7)]),
    ("add_remove", 0.1, [(ev.PoissonSampled(0.293, ev.Skellam(19_326.46, 3)), 2)]),
    (
        "add_remove",
        2.4e-17,
        [
            (ev.TruncatedPoisson(0.125, 50, 20, ev.Gaussian(0.747)), 1),
            (ev.PoissonSampled(0.05, ev.DiscreteLaplace(1.42)), 2),
        ],
    ),
]


@pytest.mark.parametrize(("relation", "delta", "parts"), WILD)
def test_wild_parameters_get_an_answer(relation: str, delta: float, parts: list[tuple[ev.Event, int]]) -> None:
    """Whatever leaves the range of floats, an answer comes: ordered, without a warning, and the estimate as well."""
    accountant = Accountant(relation=relation)
    for event, count in parts:
        accountant.step(event, count)
    found = accountant.epsilon(delta)
    assert 0 <= found.lower <= found.estimate <= found.upper
    assert accountant.estimate(delta) <= found.upper * (1 + 1e-9)
    if found.upper < math.inf:
        back = accountant.delta(found.upper)
        assert back.lower <= delta * (1 + 1e-9)


def test_a_long_run_gets_the_larger_of_both_directions() -> None:
    """Of the lesser direction only an upper bound at a few counts is kept; the answer is that of asking both."""
    for event in (ev.PoissonSampled(0.01, ev.Gaussian(1.0)), ev.PoissonSampled(0.5, ev.Gaussian(5.0))):
        for count in (64, 65, 500, 1025):
            found = Accountant().step(event, count).epsilon(1e-5)
            sides = [side.bracket_epsilon(1e-5, 1e-3) for side in Plan({event: count}, "add_remove").directions]
            assert found.upper == max(side.upper for side in sides)
            assert found.lower == max(side.lower for side in sides)


def test_moments_and_inversions_are_the_same_one_by_one_and_at_once() -> None:
    law = Cumulants(((NormalPair(1.0, 0.01), 300), (NormalPair(0.5, 0.2), 7)))
    orders = np.array([0.01, 0.5, 2.0, 30.0, 90.0])
    assert law.values(orders) == pytest.approx([law.at(float(order))[0] for order in orders], rel=1e-12, abs=1e-14)
    line = invert(law, law.order_for_delta(math.log(1e-6)))
    places = np.linspace(0.2, 2.0, 7)
    values, sure = line.sure_log_deltas(places)
    for place, value, certain in zip(places.tolist(), values, sure, strict=True):
        assert line.sure_log_delta(place) == (pytest.approx(value, rel=1e-9), certain)
    for log_delta in (-8.0, -14.0):
        found = line.epsilon(log_delta, 0.5, 3.0)
        assert line.log_delta(found) == pytest.approx(log_delta, abs=1e-9)


def test_frequencies_left_out_are_paid_for() -> None:
    """With every frequency kept, delta at lattice points lies between the bounds that keep a few."""
    event, count, delta = ev.PoissonSampled(0.01, ev.Gaussian(1.0)), 1000, 1e-5
    sides = Plan({event: count}, "add_remove").directions
    near = sides[0].near_epsilon(delta, 1e-3)[0]
    sides[0].bracket_epsilon(delta, 1e-3)
    ladder = stretch.stretch(sides[0].pairs, sides[0].counts, delta, 1e-3, False)._ladder
    assert ladder is not None
    few = ladder.spectrum(0, True)
    assert not few._whole
    lattice = ladder._lattice(0, ladder.levels[0].cells[0], True)
    mass = np.zeros(few.size)
    index, tilted = few._tilted(lattice, few._moments[0])
    np.add.at(mass, index % few.size, tilted)
    power = np.fft.irfft(np.fft.rfft(mass) ** count, few.size)
    composed = few.at((count,))
    for place in range(round((near - composed._offset) / few.step), few.size // 2, few.size // 9):
        away = np.arange(few.size) * few.step
        kernel = np.exp(-few.order * away) - np.exp(-(few.order + 1) * away)
        exact = float(power[(place + np.arange(few.size)) % few.size] @ kernel)
        assert abs(composed._sum(place) - exact) <= few._slack


def test_a_law_summed_with_itself_is_the_law_of_the_sum() -> None:
    for upper in (True, False):
        law = allocation._lognormal(0.7, upper)
        twin, sum_ = allocation._add(law, law, upper), allocation._add(law, (law[0], law[1], law[2]), upper)
        assert [part.sum() for part in (twin[0], twin[1])] == pytest.approx([sum_[0].sum(), sum_[1].sum()], rel=1e-12)
        assert twin[1] == pytest.approx(sum_[1], rel=1e-9, abs=1e-30)
        assert float(twin[1].sum()) == pytest.approx(1.0, abs=1e-12)
        assert float(twin[0] @ twin[1]) + twin[2] == pytest.approx(2.0, rel=1e-12)


def test_a_thousand_bins_are_bracketed_to_a_thousandth() -> None:
    found = Accountant().step(ev.RandomAllocation(1000, ev.Gaussian(1.0))).epsilon(1e-5)
    assert found.gap <= 1e-3
    assert "effort limit" not in found.method
