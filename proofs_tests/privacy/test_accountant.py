"""An accountant's answers bracket the truth, order as they should, and mix nothing that does not mix."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.privacy import events as ev
from privfed.privacy.accountant import Accountant
from privfed.privacy.bound import Bound
from privfed.privacy.calibration import calibrate, calibrate_bound, calibrate_steps

RELATIONS = ("add_remove", "replace_one", "zero_out")
few = settings(max_examples=6, deadline=None)


def epsilon(event: ev.Event, count: int = 1, delta: float = 1e-6, **terms: Any) -> Bound:
    return Accountant(**terms).step(event, count).epsilon(delta)


rates = st.sampled_from([0.01, 0.05, 0.3, 0.9])
noises = st.sampled_from([0.8, 1.0, 2.0, 5.0])
steps = st.sampled_from([1, 2, 10, 300])


@few
@given(rates, noises, steps, st.sampled_from([1e-3, 1e-6, 1e-12]))
def test_monotone_in_every_parameter(rate: float, noise: float, count: int, delta: float) -> None:
    """More noise, fewer steps, a lower rate or a larger delta never cost more, up to the bracket."""
    here = epsilon(ev.PoissonSampled(rate, ev.Gaussian(noise)), count, delta)
    assert here.lower <= here.estimate <= here.upper
    assert epsilon(ev.PoissonSampled(rate, ev.Gaussian(noise * 1.1)), count, delta).lower <= here.upper
    assert epsilon(ev.PoissonSampled(rate * 0.9, ev.Gaussian(noise)), count, delta).lower <= here.upper
    assert epsilon(ev.PoissonSampled(rate, ev.Gaussian(noise)), count, delta * 2).lower <= here.upper
    assert epsilon(ev.PoissonSampled(rate, ev.Gaussian(noise)), count + 1, delta).upper >= here.lower
    assert epsilon(ev.Gaussian(noise), count, delta).upper >= here.lower  # sampling only helps


@few
@given(st.permutations(range(4)), st.sampled_from(RELATIONS))
def test_composition_commutes_and_associates(order: list[int], relation: str) -> None:
    parts = [ev.Gaussian(4.0), ev.PoissonSampled(0.1, ev.Gaussian(1.0)), ev.Laplace(30.0), ev.PureDP(0.1)]
    one = Accountant(relation=relation)
    for k in range(4):
        one.step(parts[k], 5)
    other, rest = Accountant(relation=relation), Accountant(relation=relation)
    for k in order[:2]:
        other.step(parts[k], 2)
    for k in order:
        rest.step(parts[k], 3 if k in order[:2] else 5)
    other.compose(rest)
    assert other.events == one.events
    first, second = one.epsilon(1e-6), other.epsilon(1e-6)
    assert max(first.lower, second.lower) <= min(first.upper, second.upper)
    assert first.estimate == pytest.approx(second.estimate, rel=1e-7)


def test_tighter_tolerance_never_widens() -> None:
    accountant = Accountant().step(ev.PoissonSampled(0.01, ev.Gaussian(1.0)), 1000)
    gaps = [accountant.epsilon(1e-5, tol=tol).gap for tol in (1e-2, 1e-3, 1e-4, 1e-5)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] <= 1e-5


def test_refinement_ends() -> None:
    """Where one side cannot come any closer, the other one tries, and then the answer says so."""
    found = Accountant().step(ev.PoissonSampled(0.001, ev.Gaussian(0.5)), 10_000).epsilon(1e-5, tol=1e-4)
    assert found.gap <= 1e-4 or "effort limit" in found.method
    assert found.gap <= 1e-3


@pytest.mark.parametrize(
    ("noise", "count", "delta"), [(0.7, 100_000, 1e-10), (0.5, 10_000, 1e-6), (0.64, 100_000, 1e-10)]
)
def test_estimates_of_heavy_tails_lie_in_the_bracket(noise: float, count: int, delta: float) -> None:
    """Far from the saddle point the inversion shows echoes of the answer; none of them is mistaken for it."""
    accountant = Accountant().step(ev.PoissonSampled(1e-4, ev.Gaussian(noise)), count)
    found = accountant.epsilon(delta)
    assert found.lower <= accountant.estimate(delta) <= found.upper


def test_wide_brackets_say_so() -> None:
    """A hair below the largest loss, delta hangs on the last digits of epsilon."""
    accountant = Accountant(relation="replace_one").step(ev.RandomizedResponse(0.05, 20), 8)
    found = accountant.delta(47.54239500101156)
    assert found.lower <= 1.3848513267388791e-12 <= found.upper
    assert found.gap <= 1e-3 or "effort limit" in found.method
    assert accountant.delta(47.6).upper < 1e-270


def test_discrete_laplace_noise_has_few_losses() -> None:
    """Noise on the integers that moves by one step has two losses: it is randomised response."""
    scale = 30.0
    once = ev.PureDP(1 / scale)
    for count, delta in ((1, 1e-3), (7, 1e-3), (1000, 1e-6)):
        ours, theirs = epsilon(ev.DiscreteLaplace(scale), count, delta), epsilon(once, count, delta)
        assert ours.estimate == pytest.approx(theirs.estimate, rel=1e-9)
        assert ours.gap < 1e-6


@pytest.mark.parametrize("delta", [1e-12, 1e-15, 1e-20, 1e-30])
def test_small_delta(delta: float) -> None:
    """Deltas far below the resolution of floats keep two sides."""
    found = epsilon(ev.PoissonSampled(0.01, ev.Gaussian(1.0)), 1000, delta)
    assert found.gap <= 1e-3
    back = Accountant().step(ev.PoissonSampled(0.01, ev.Gaussian(1.0)), 1000).delta(found.estimate)
    assert back.lower <= delta <= back.upper
    assert back.estimate == pytest.approx(delta, rel=1e-6)


def test_edges() -> None:
    sampled = ev.PoissonSampled(0.1, ev.Gaussian(1.0))
    assert epsilon(ev.Gaussian(0.0)).upper == math.inf
    assert epsilon(ev.PoissonSampled(0.1, ev.Gaussian(0.0))).upper == math.inf
    assert epsilon(ev.Laplace(0.0)).upper == math.inf
    assert epsilon(ev.Unaccounted("test randomness")).upper == math.inf
    assert Accountant().step(ev.Unaccounted()).delta(1.0).upper == 1
    assert epsilon(ev.PoissonSampled(0.0, ev.Gaussian(1.0)), 10).upper == 0
    assert epsilon(ev.Gaussian(math.inf), 10).upper == 0
    assert epsilon(sampled, 0).upper == 0
    assert epsilon(sampled, delta=0).upper == math.inf
    assert epsilon(ev.Laplace(10.0), 5, delta=0).estimate == pytest.approx(0.5, rel=1e-12)
    assert epsilon(ev.PureDP(0.3), 4, delta=0).upper == pytest.approx(1.2, rel=1e-9)
    assert epsilon(ev.PoissonSampled(1.0, ev.Gaussian(2.0)), 9) == epsilon(ev.Gaussian(2.0), 9)


def test_observers_and_relations() -> None:
    """The server sees cohorts; replace_one doubles the sensitivity; zero_out of a sum is add_remove."""
    sampled = ev.PoissonSampled(0.01, ev.Gaussian(3.0))
    assert epsilon(sampled, 50, observer="server") == epsilon(ev.Gaussian(3.0), 50)
    fixed = ev.FixedSizeSampled(10, 1000, ev.Gaussian(3.0))
    assert epsilon(fixed, 50, observer="server", relation="replace_one").estimate == pytest.approx(
        epsilon(ev.Gaussian(1.5), 50).estimate
    )
    assert epsilon(ev.Central(sampled), observer="server").upper == math.inf
    assert epsilon(ev.Central(sampled), 3) == epsilon(sampled, 3)
    assert epsilon(sampled, 50, relation="zero_out") == epsilon(sampled, 50)
    assert epsilon(sampled, 50, relation="replace_one").lower > epsilon(sampled, 50).upper


REFUSED: list[tuple[ev.Event, str]] = [
    (ev.FixedSizeSampled(10, 100, ev.Gaussian(1.0)), "add_remove"),
    (ev.FixedSizeSampled(10, 100, ev.Gaussian(1.0)), "zero_out"),
    (ev.RandomizedResponse(0.5, 3), "add_remove"),
    (ev.PoissonSampled(0.1, ev.PureDP(1.0)), "replace_one"),
    (ev.RandomAllocation(4, ev.Gaussian(1.0)), "replace_one"),
    (ev.PoissonSampled(0.1, ev.Composed(((ev.Gaussian(1.0), 2),))), "add_remove"),
]


@pytest.mark.parametrize(("event", "relation"), REFUSED)
def test_what_is_not_proved_is_refused_and_changes_nothing(event: ev.Event, relation: str) -> None:
    accountant = Accountant(relation=relation).step(ev.Gaussian(2.0))
    before = accountant.events
    with pytest.raises(ValueError, match=r"^(relation|event):"):
        accountant.step(ev.Composed(((ev.Gaussian(1.0), 1), (event, 1))))
    assert accountant.events == before


def test_bad_arguments_name_themselves() -> None:
    accountant, no_event = Accountant(), cast(Any, "Gaussian")
    for name, call in {
        "count": lambda: accountant.step(ev.Gaussian(1.0), -1),
        "event": lambda: accountant.step(no_event),
        "delta": lambda: accountant.epsilon(1.0),
        "epsilon": lambda: accountant.delta(math.nan),
        "relation": lambda: Accountant(relation="add"),
        "observer": lambda: Accountant(observer="me"),
        "unit": lambda: Accountant(unit=""),
        "alpha": lambda: accountant.tradeoff(2.0),
        "prior": lambda: accountant.bayes_risk(-1.0),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}:"):
            call()
    for terms in ({"unit": "record"}, {"relation": "zero_out"}, {"observer": "server"}):
        with pytest.raises(ValueError, match=f"^{next(iter(terms))}:"):
            accountant.compose(Accountant(**terms))


def test_preview_leaves_no_trace_and_equal_events_merge() -> None:
    accountant = Accountant().step(ev.Gaussian(2.0), 3)
    after = accountant.preview(ev.Gaussian(2.0), 2)
    assert after.events == {ev.Gaussian(2.0): 5}
    assert accountant.events == {ev.Gaussian(2.0): 3}


def test_gaussian_curve_and_risks() -> None:
    """Trade-off, true-positive rate and Bayes risk of plain Gaussian noise have closed forms."""
    from statistics import NormalDist

    normal = NormalDist()
    accountant = Accountant().step(ev.Gaussian(1.0))
    for alpha in (0.01, 0.1, 0.5):
        beta = normal.cdf(normal.inv_cdf(1 - alpha) - 1)
        found = accountant.tradeoff(alpha)
        assert found.lower <= beta <= found.upper
        assert found.estimate == pytest.approx(beta, rel=1e-6)
        assert accountant.tpr_at(alpha).upper == pytest.approx(1 - found.lower)
    assert accountant.bayes_risk(0.5).estimate == pytest.approx(normal.cdf(-0.5))


@pytest.mark.parametrize(("rate", "count", "budget", "delta"), [(0.04, 2000, 8.0, 1e-5), (0.01, 500, 1.0, 1e-6)])
def test_calibration_is_certified_and_nearly_least(rate: float, count: int, budget: float, delta: float) -> None:
    def plan(z: float) -> ev.Event:
        return ev.PoissonSampled(rate, ev.Gaussian(z))

    noise = calibrate(plan, count=count, epsilon=budget, delta=delta)
    assert epsilon(plan(noise), count, delta).upper <= budget  # as the accountant answers who is asked before a round
    assert epsilon(plan(noise * (1 - 1e-3)), count, delta).lower > budget
    found = calibrate_bound(plan, count=count, epsilon=budget, delta=delta)
    assert found.lower <= found.estimate <= found.upper == noise
    assert found.upper <= found.lower * (1 + 1e-3)


def sampled(rate: float) -> Callable[[float], ev.Event]:
    return lambda z: ev.PoissonSampled(rate, ev.Gaussian(z))


GRID = json.loads((Path(__file__).parents[1] / "vectors" / "dp_grid.json").read_text())["rows"]
PLANS: list[tuple[Callable[[float], ev.Event], int, float, float, str]] = [
    (sampled(row["q"]), int(row["T"]), row["delta"], 2.0, "add_remove") for row in GRID
] + [
    (ev.Laplace, 1000, 1e-6, 5.0, "add_remove"),
    (ev.DiscreteGaussian, 1000, 1e-6, 5.0, "replace_one"),
    (ev.DiscreteLaplace, 1000, 1e-6, 5.0, "add_remove"),
    (ev.Skellam, 1000, 1e-6, 5.0, "zero_out"),
    (lambda z: ev.RandomizedResponse(1 / (1 + 1 / z), 4), 100, 1e-6, 5.0, "replace_one"),
    (lambda z: ev.FixedSizeSampled(100, 10_000, ev.Gaussian(z)), 1000, 1e-6, 5.0, "replace_one"),
    (lambda z: ev.PoissonSampled(0.01, ev.Gaussian(z)), 1000, 1e-6, 5.0, "replace_one"),
    (lambda z: ev.TruncatedPoisson(0.01, 10_000, 150, ev.Gaussian(z)), 1000, 1e-6, 5.0, "add_remove"),
    (lambda z: ev.PoissonSampled(0.01, ev.Laplace(z)), 1000, 1e-6, 5.0, "add_remove"),
    (lambda z: ev.DistributedSkellam(z / 10, 1.0, 1000.0, 1024, 100, 2**24), 100, 1e-6, 5.0, "add_remove"),
    (lambda z: ev.DistributedDiscreteGaussian(z / 10, 1.0, 1000.0, 1024, 100, 2**24), 100, 1e-6, 5.0, "add_remove"),
    (
        lambda z: ev.Composed(((ev.PoissonSampled(0.02, ev.Gaussian(z)), 1), (ev.Laplace(100.0), 1))),
        100, 1e-6, 5.0, "add_remove",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("plan", "count", "delta", "budget", "relation"), PLANS)
def test_a_calibrated_plan_may_spend_its_last_round(
    plan: Callable[[float], ev.Event], count: int, delta: float, budget: float, relation: str
) -> None:
    """Charged use by use, by the accountant's own default, the whole plan fits, and little is left."""
    noise = calibrate(plan, count=count, epsilon=budget, delta=delta, relation=relation)
    accountant = Accountant(relation=relation).step(plan(noise), count - 1)
    assert accountant.preview(plan(noise)).epsilon(delta).upper <= budget
    assert accountant.step(plan(noise)).epsilon(delta).upper > budget * (1 - 3e-3)


@pytest.mark.parametrize(
    "plan",
    [
        lambda z: ev.ZCDP(1 / z),
        lambda z: ev.PoissonSampled(0.1, ev.ZCDP(1 / z)),
        lambda z: ev.DistributedSkellam(z, 1.0, 100.0, 1000, 50, 2**20),
    ],
)
def test_noise_and_rounds_are_found_where_only_a_renyi_bound_is_proved(plan: Callable[[float], ev.Event]) -> None:
    """The parameter keeps the budget, a little less does not, and nothing is claimed from below."""
    found = calibrate_bound(plan, count=4, epsilon=3.0, delta=1e-6)
    spent = [Accountant().step(plan(found.upper * share), 4).epsilon(1e-6, tol=1e-4).upper for share in (1.0, 0.998)]
    assert spent[0] <= 3.0 < spent[1]
    assert found.lower == 0.0
    rounds = calibrate_steps(plan(found.upper), epsilon=3.0, delta=1e-6)
    assert rounds >= 3
    assert Accountant().step(plan(found.upper), rounds).epsilon(1e-6).upper <= 3.0
    assert Accountant().step(plan(found.upper), rounds + 1).epsilon(1e-6).upper > 3.0


def test_noise_is_found_for_renyi_bounds_beside_other_parts() -> None:
    found = calibrate_bound(lambda z: ev.Composed(((ev.ZCDP(1 / z), 2), (ev.Laplace(z), 3))), epsilon=3.0, delta=1e-6)
    plan = ev.Composed(((ev.ZCDP(1 / found.upper), 2), (ev.Laplace(found.upper), 3)))
    assert 3.0 * 0.9 < Accountant().step(plan).epsilon(1e-6, tol=1e-4).upper <= 3.0


def test_calibrated_steps_are_the_last_that_fit() -> None:
    event = ev.PoissonSampled(0.02, ev.Gaussian(1.1))
    most = calibrate_steps(event, epsilon=2.0, delta=1e-6)
    assert epsilon(event, most).upper <= 2.0 < epsilon(event, most + max(2, most // 200)).upper
    assert calibrate_steps(ev.Gaussian(0.1), epsilon=1.0, delta=1e-6) == 0
    with pytest.raises(ValueError, match=r"^epsilon:"):
        calibrate(lambda z: event, epsilon=-1.0, delta=1e-6)


def test_import_is_lazy() -> None:
    """Names load nothing of scipy until something is asked."""
    code = (
        "import sys, privfed.privacy as p; assert 'scipy' not in sys.modules; p.Gaussian(1.0); "
        "assert 'scipy' not in sys.modules; p.Accountant().step(p.Gaussian(1.0)).epsilon(1e-5); "
        "assert 'scipy.stats' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_estimates_are_no_worse_than_what_is_known() -> None:
    """Below the largest loss where that decides, and finite where rare outcomes were left out of a pair."""
    tiny = Accountant().step(ev.PoissonSampled(6.6e-7, ev.DiscreteLaplace(2.2)), 2)
    assert tiny.estimate(2.6e-180) <= tiny.epsilon(2.6e-180).upper
    passes = Accountant(relation="zero_out").step(ev.RandomAllocation(1773, ev.Gaussian(8.64)), 12)
    assert 0 < passes.estimate(3.6e-97) <= passes.epsilon(3.6e-97).upper * (1 + 1e-9) < math.inf


@pytest.mark.parametrize(
    ("parts", "delta"),
    [
        ([(ev.PureDP(0.0002), 1), (ev.PureDP(0.00121), 3000)], 1e-2),
        ([(ev.PureDP(0.1), 10), (ev.Laplace(30.0), 100)], 1e-6),
        ([(ev.PureDP(0.1), 10), (ev.RandomizedResponse(0.5, 4), 20), (ev.Gaussian(4.0), 50)], 1e-6),
    ],
)
def test_mechanisms_with_single_outcomes_meet_on_one_lattice(parts: list[tuple[ev.Event, int]], delta: float) -> None:
    accountant = Accountant(relation="replace_one")
    for event, count in parts:
        accountant.step(event, count)
    found = accountant.epsilon(delta)
    assert found.gap <= 1e-3
    assert 0 < found.lower <= found.upper


@pytest.mark.parametrize("row", GRID)
def test_the_grid_is_bracketed_to_a_thousandth(row: dict[str, float]) -> None:
    """What errors are charged for must leave room for that, also after 1e5 uses at delta 1e-10."""
    event = ev.PoissonSampled(row["q"], ev.Gaussian(row["sigma"]))
    found = epsilon(event, int(row["T"]), row["delta"])
    assert found.gap <= 1e-3
    assert "effort limit" not in found.method
