"""Filters stop before their limit, conversions err on the safe side, and an odometer may be read at any time."""

from __future__ import annotations

import math
import random

import mpmath
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.privacy import conversion
from privfed.privacy.accountant import Accountant
from privfed.privacy.events import (
    AboveThreshold,
    Central,
    Composed,
    DiscreteGaussian,
    DiscreteLaplace,
    DistributedSkellam,
    FixedSizeSampled,
    Gaussian,
    Laplace,
    PoissonSampled,
    PureDP,
    RandomizedResponse,
    Unaccounted,
)
from privfed.privacy.filters import Budget, BudgetExceeded, GdpFilter, RenyiFilter, ZcdpFilter
from privfed.privacy.odometer import RenyiOdometer

DELTAS = st.floats(-80, -0.5).map(lambda exponent: 2.0**exponent)
MULTIPLIERS = st.floats(0.3, 300)


def truth(mu: float, epsilon: float) -> mpmath.mpf:
    """Return delta(epsilon) of mu-GDP at 40 digits."""
    with mpmath.workdps(40):
        m, e = mpmath.mpf(mu), mpmath.mpf(epsilon)
        return mpmath.ncdf(m / 2 - e / m) - mpmath.exp(e) * mpmath.ncdf(-m / 2 - e / m)


# --- conversions ------------------------------------------------------------------------------------------------


@given(st.floats(0.01, 8), DELTAS)
@settings(max_examples=60, deadline=None)
def test_gaussian_conversion_is_tight_and_safe(mu: float, delta: float) -> None:
    epsilon = conversion.gdp_epsilon(mu, delta)
    assert truth(mu, epsilon) <= delta
    if epsilon > 0:
        assert truth(mu, epsilon * (1 - 1e-8) - 1e-12) >= delta * (1 - 1e-6)


@given(st.floats(1e-4, 30), DELTAS)
@settings(max_examples=80, deadline=None)
def test_zcdp_conversion_covers_a_gaussian_and_beats_the_simple_formula(rho: float, delta: float) -> None:
    """The Gaussian of that rho is rho-zCDP, so its exact epsilon is a lower bound [BS16]."""
    epsilon = conversion.zcdp_epsilon(rho, delta)
    assert epsilon >= conversion.gdp_epsilon(math.sqrt(2 * rho), delta) * (1 - 1e-9)
    assert epsilon <= rho + 2 * math.sqrt(rho * math.log(1 / delta)) + 1e-9


@given(st.floats(1e-4, 30), DELTAS, st.floats(1.001, 500))
@settings(max_examples=80, deadline=None)
def test_no_single_order_beats_the_best_one(rho: float, delta: float, order: float) -> None:
    assert (
        conversion.zcdp_epsilon(rho, delta) <= conversion.renyi_epsilon(order * rho, order, delta) * (1 + 1e-6) + 1e-9
    )


def test_known_conversions() -> None:
    """The formulas of [BBG+20, Thm 21] and [BW18, Thm 8], worked out by hand at 30 digits."""
    with mpmath.workdps(30):
        wanted = 1 + mpmath.log(mpmath.mpf(9) / 10) - (mpmath.log(1e-5) + mpmath.log(10)) / 9
    assert conversion.renyi_epsilon(1.0, 10.0, 1e-5) == pytest.approx(float(wanted), rel=1e-11)
    assert conversion.gaussian_delta(1.0, 1.0) == pytest.approx(float(truth(1.0, 1.0)), rel=1e-12)
    assert conversion.gdp_epsilon(0.001, 0.5) == 0
    assert conversion.zcdp_epsilon(0.0, 1e-6) == 0
    assert conversion.zcdp_epsilon(math.inf, 1e-6) == math.inf


@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0, math.nan])
def test_conversions_refuse_a_bad_delta(delta: float) -> None:
    for convert in (
        lambda: conversion.zcdp_epsilon(1.0, delta),
        lambda: conversion.gdp_epsilon(1.0, delta),
        lambda: conversion.renyi_epsilon(1.0, 2.0, delta),
        lambda: RenyiOdometer(delta),
    ):
        with pytest.raises(ValueError, match=r"^delta:"):
            convert()


# --- filters ----------------------------------------------------------------------------------------------------

Filter = ZcdpFilter | GdpFilter | RenyiFilter


def filters(epsilon: float, delta: float, relation: str = "add_remove") -> list[Filter]:
    return [
        ZcdpFilter.within(epsilon, delta, relation=relation),
        GdpFilter.within(epsilon, delta, relation=relation),
        RenyiFilter.within(epsilon, delta, order=1 + 4 * math.log(1 / delta) / epsilon, relation=relation),
    ]


@given(st.floats(0.1, 20), st.floats(-60, -7).map(lambda e: 2.0**e))
@settings(max_examples=50, deadline=None)
def test_the_limit_is_worth_the_budget_and_no_more(epsilon: float, delta: float) -> None:
    for each in filters(epsilon, delta):
        assert epsilon * (1 - 1e-6) - 1e-9 <= each.epsilon(delta) <= epsilon


@given(st.lists(MULTIPLIERS, min_size=1, max_size=40), st.sampled_from(["add_remove", "zero_out", "replace_one"]))
@settings(max_examples=50, deadline=None)
def test_what_a_filter_lets_through_costs_at_most_its_budget(multipliers: list[float], relation: str) -> None:
    """The exact epsilon of the Gaussians admitted, however many, is within the budget."""
    scale = 2 if relation == "replace_one" else 1
    for each in filters(2.0, 1e-6, relation):
        square = 0.0
        for z in multipliers:
            before = each.spent
            try:
                each.charge(Gaussian(z))
            except BudgetExceeded:
                assert each.spent == before
                assert not each.admits(Gaussian(z))
            else:
                square += (scale / z) ** 2
        assert conversion.gdp_epsilon(math.sqrt(square), 1e-6) <= 2.0 * (1 + 1e-9)


@given(MULTIPLIERS, st.integers(1, 10**6))
@settings(max_examples=50, deadline=None)
def test_costs_of_a_gaussian(z: float, count: int) -> None:
    wanted = {"rho": 1 / (2 * z * z), "mu^2": 1 / (z * z), "divergence": 5 / (2 * z * z)}
    for each in (ZcdpFilter(1e30), GdpFilter(1e30), RenyiFilter(1e30, order=5.0)):
        assert each.preview(Gaussian(z), count) == pytest.approx(count * wanted[each.measure], rel=1e-9)
        assert each.preview(Gaussian(z), count) >= count * wanted[each.measure] * (1 - 1e-15)
        assert each.preview(Gaussian(z), 0) == 0


def test_replacing_costs_four_times_as_much() -> None:
    for kind in (ZcdpFilter, GdpFilter):
        one = kind(1e9, relation="add_remove").preview(Gaussian(3.0))
        assert kind(1e9, relation="replace_one").preview(Gaussian(3.0)) == pytest.approx(4 * one, rel=1e-12)


def test_sampled_events_have_a_renyi_cost_only() -> None:
    sampled = PoissonSampled(0.01, Gaussian(1.0))
    for each in (ZcdpFilter(1.0), GdpFilter(1.0)):
        with pytest.raises(ValueError, match=r"^event:"):
            each.charge(sampled)
        assert each.spent == 0
    alone = RenyiFilter(10.0, order=8.0).preview(Gaussian(1.0))
    assert 0 < RenyiFilter(10.0, order=8.0).preview(sampled) < alone / 100
    server = RenyiFilter(10.0, order=8.0, observer="server").preview(sampled)
    assert server == pytest.approx(alone, rel=1e-9)


@given(st.floats(0.001, 0.9), st.floats(0.5, 20), st.integers(2, 40))
@settings(max_examples=25, deadline=None)
def test_sampled_gaussians_cost_what_the_binomial_sum_gives(rate: float, z: float, order: int) -> None:
    """[MTZ19, Sec 3.3] at 40 digits."""
    with mpmath.workdps(40):
        q, s = mpmath.mpf(rate), mpmath.mpf(z)
        total = mpmath.fsum(
            mpmath.binomial(order, k) * (1 - q) ** (order - k) * q**k * mpmath.exp((k * k - k) / (2 * s * s))
            for k in range(order + 1)
        )
        exact = float(mpmath.log(total) / (order - 1))
    cost = RenyiFilter(1e9, order=float(order)).cost(PoissonSampled(rate, Gaussian(z)))
    assert cost == pytest.approx(exact, rel=1e-7, abs=1e-13)


@given(st.floats(0.01, 0.9), st.floats(0.4, 5), st.floats(1.5, 64))
@settings(max_examples=30, deadline=None)
def test_sampled_replacements_cost_at_least_the_binary_test(rate: float, z: float, order: float) -> None:
    """Telling the two halves of the line apart is post-processing, so its divergence is a lower bound."""
    event = FixedSizeSampled(max(1, round(rate * 1000)), 1000, Gaussian(z))
    cost = RenyiFilter(1e9, order=order, relation="replace_one").cost(event)
    q = event.sample_size / 1000
    with mpmath.workdps(60):
        best = mpmath.mpf(0)
        for cut in (0, 1 / z, 5 / z, order / z):
            p, o = ((1 - q) * mpmath.ncdf(-cut) + q * mpmath.ncdf(s / z - cut) for s in (1, -1))
            moment = p**order * o ** (1 - order) + (1 - p) ** order * (1 - o) ** (1 - order)
            best = max(best, mpmath.log(moment) / (order - 1))
    assert cost >= best * (1 - 1e-9)


def test_other_events_have_renyi_costs() -> None:
    skellam = DistributedSkellam(local_stddev=1.0, clip=1.0, scale=100.0, dimension=64, survivors=20, modulus=2**20)
    for event, relation in (
        (skellam, "add_remove"),
        (PoissonSampled(0.1, skellam), "add_remove"),
        (FixedSizeSampled(5, 100, Gaussian(2.0)), "replace_one"),
        (Laplace(2.0), "zero_out"),
        (DiscreteGaussian(3.0), "add_remove"),
        (RandomizedResponse(0.5), "replace_one"),
        (Composed(((Gaussian(3.0), 2), (Laplace(9.0), 1))), "add_remove"),
    ):
        low = RenyiFilter(1e9, order=2.0, relation=relation).cost(event)
        high = RenyiFilter(1e9, order=16.0, relation=relation).cost(event)
        assert 0 < low <= high < 100
    for event in (Central(Gaussian(5.0)), Unaccounted("seeded")):
        assert RenyiFilter(1e9, order=2.0, observer="server").cost(event) == math.inf


@given(st.floats(0.02, 20), st.floats(1.01, 60))
@settings(max_examples=60, deadline=None)
def test_rho_of_pure_privacy_covers_randomised_response_at_every_order(epsilon: float, order: float) -> None:
    with mpmath.workdps(40):
        p = 1 / (1 + mpmath.exp(-mpmath.mpf(epsilon)))
        exact = mpmath.log(p**order * (1 - p) ** (1 - order) + (1 - p) ** order * p ** (1 - order)) / (order - 1)
    assert ZcdpFilter(1e9).cost(PureDP(epsilon)) * order >= exact * (1 - 1e-12)
    assert RenyiFilter(1e9, order=order).cost(PureDP(epsilon)) == pytest.approx(float(exact), rel=1e-9)
    for event in (Laplace(1 / epsilon), DiscreteLaplace(1 / epsilon), AboveThreshold(epsilon)):
        assert RenyiFilter(1e9, order=order).cost(event) <= exact * (1 + 1e-9)


def test_a_renyi_filter_covers_the_accountant() -> None:
    """What is admitted at one order costs no more by the tighter composition of the same events."""
    event = PoissonSampled(0.02, Gaussian(1.0))
    each = RenyiFilter.within(3.0, 1e-5, order=8.0)
    rounds = 0
    while each.admits(event, 50):
        each.charge(event, 50)
        rounds += 50
    accountant = Accountant(unit="client", relation="add_remove", observer="output")
    accountant.step(event, count=rounds)
    assert rounds >= 100
    assert accountant.epsilon(1e-5).upper <= 3.0


def test_no_noise_costs_everything() -> None:
    for each in (ZcdpFilter(1e9), GdpFilter(1e9), RenyiFilter(1e9, order=2.0)):
        with pytest.raises(BudgetExceeded):
            each.charge(Gaussian(0.0))
        assert each.spent == 0


# --- odometers --------------------------------------------------------------------------------------------------


@given(st.lists(MULTIPLIERS, min_size=1, max_size=20))
@settings(max_examples=40, deadline=None)
def test_an_odometer_never_reads_less_than_the_truth_and_never_falls(multipliers: list[float]) -> None:
    odometer = RenyiOdometer(1e-6)
    assert odometer.epsilon == 0
    last = square = 0.0
    for z in multipliers:
        odometer.add(Gaussian(z))
        square += z**-2
        assert odometer.epsilon >= max(last, conversion.gdp_epsilon(math.sqrt(square), 1e-6))
        last = odometer.epsilon


def test_an_odometer_holds_at_all_times_for_a_steered_run() -> None:
    """Simulated losses of Gaussians whose noise follows the loss so far exceed the reading as rarely as claimed.

    At delta 0.05, 2000 runs of 60 steps: at most 100 expected, 155 allowed (5.5 standard errors, false alarm 2e-8).
    An odometer without its log(1/delta) term would be exceeded far more often, which is checked too.
    """
    generator = random.Random(3)
    exceeded = naive = 0
    for _ in range(2000):
        loss, rho, above, above_mean = 0.0, 0.0, False, False
        for _ in range(60):
            z = 4.0 if loss > 0 else 9.0  # spend more once ahead
            loss += generator.gauss(1 / (2 * z * z), 1 / z)
            rho += 1 / (2 * z * z)
            orders = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
            reading = min(a * rho + math.log(len(orders) / 0.05) / (a - 1) for a in orders)
            above |= loss > reading
            above_mean |= loss > 1.5 * rho
        exceeded += above
        naive += above_mean
    assert exceeded <= 155
    assert naive > 500
    odometer = RenyiOdometer(0.05, orders=(1.5, 2.0, 3.0, 4.0, 6.0, 8.0))
    odometer.add(Gaussian(4.0), count=3)
    odometer.add(Gaussian(9.0), count=2)
    rho = 3 / 32 + 2 / 162
    wanted = min(a * rho + math.log(6 / 0.05) / (a - 1) for a in (1.5, 2.0, 3.0, 4.0, 6.0, 8.0))
    assert odometer.epsilon == pytest.approx(wanted, rel=1e-9)


def test_a_refused_event_leaves_the_odometer_alone() -> None:
    odometer = RenyiOdometer(1e-6)
    odometer.add(Gaussian(5.0))
    before = odometer.epsilon
    with pytest.raises(ValueError, match=r"^count:"):
        odometer.add(Gaussian(5.0), count=-1)
    assert odometer.epsilon == before


# --- bad arguments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: ZcdpFilter(-1.0), "limit"),
        (lambda: ZcdpFilter(math.nan), "limit"),
        (lambda: RenyiFilter(1.0, order=1.0), "order"),
        (lambda: RenyiFilter(1.0, order=math.inf), "order"),
        (lambda: RenyiFilter.within(0.1, 1e-9, order=2.0), "order"),
        (lambda: ZcdpFilter.within(0.0, 1e-6), "epsilon"),
        (lambda: Budget(0.0, 1e-6), "epsilon"),
        (lambda: Budget(math.nan, 1e-6), "epsilon"),
        (lambda: Budget(1.0, 1.0), "delta"),
        (lambda: Budget(1.0, 1e-6, "clt"), "filter"),  # type: ignore[arg-type]  # what a file may say
        (lambda: Budget(1.0, 1e-6, "renyi"), "order"),
        (lambda: Budget(1.0, 1e-6, "zcdp", 2.0), "order"),
        (lambda: ZcdpFilter(1.0).preview(Gaussian(1.0), -1), "count"),
        (lambda: RenyiOdometer(1e-6, orders=()), "orders"),
    ],
)
def test_bad_arguments_are_named(build: object, name: str) -> None:
    assert callable(build)
    with pytest.raises(ValueError, match=f"^{name}:"):
        build()


@given(st.sampled_from(["composition", "zcdp", "gdp", "renyi"]), st.floats(0.1, 50) | st.just(math.inf))
@settings(max_examples=20, deadline=None)
def test_budgets_survive_their_fields(name: str, epsilon: float) -> None:
    budget = Budget(epsilon, 1e-6, name, 500.0 if name == "renyi" else None)  # type: ignore[arg-type]  # drawn
    assert Budget.parse(budget.fields()) == budget
    meter = budget.meter(unit="client", relation="add_remove", observer="output")
    assert meter.limit > 0
    assert math.isinf(meter.limit) == math.isinf(epsilon)
