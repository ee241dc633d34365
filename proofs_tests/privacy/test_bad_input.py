"""Whatever is no number of the kind asked for raises a ValueError that names the argument; edges have their value."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.privacy import argument, filters, odometer
from privfed.privacy import events as ev
from privfed.privacy.accountant import Accountant
from privfed.privacy.calibration import calibrate, calibrate_steps
from privfed.privacy.cost import renyi_cost
from privfed.privacy.sampling import (
    AvailabilitySampler,
    FixedSizeSampler,
    PoissonSampler,
    RandomAllocationSampler,
    TruncatedPoissonSampler,
)

ODD: list[object] = [math.nan, "x", None, True, 1j, [0.5]]
NEGATIVE = st.one_of(st.floats(max_value=-1e-300, allow_nan=False), st.integers(max_value=-1))
ABOVE_ONE = st.one_of(st.floats(min_value=1.0000001, allow_nan=False), st.integers(min_value=2))
GAUSS = ev.Gaussian(1.0)
COUNT: list[object] = [-1, 1.5, *ODD]
SHARE: list[object] = [-0.1, 1.1, math.inf, -math.inf, *ODD]
OPEN_SHARE: list[object] = [0.0, 1.0, *SHARE]
DELTA: list[object] = [1.0, *SHARE]


def accountant() -> Accountant:
    return Accountant().step(GAUSS, 2)


def plan(z: float) -> ev.Event:
    return ev.Gaussian(z)


CALLS: dict[str, tuple[str, Callable[[Any], object], list[object]]] = {
    "epsilon": ("delta", lambda v: accountant().epsilon(v), DELTA),
    "epsilon tol": ("tol", lambda v: accountant().epsilon(1e-5, tol=v), [v for v in OPEN_SHARE if v is not None]),
    "delta": ("epsilon", lambda v: accountant().delta(v), ODD),
    "delta tol": ("tol", lambda v: accountant().delta(1.0, tol=v), [v for v in OPEN_SHARE if v is not None]),
    "estimate": ("delta", lambda v: accountant().estimate(v), DELTA),
    "divergence": ("order", lambda v: accountant().divergence(v), [1.0, 0, -1, *ODD]),
    "tradeoff": ("alpha", lambda v: accountant().tradeoff(v), SHARE),
    "tpr_at": ("fpr", lambda v: accountant().tpr_at(v), SHARE),
    "bayes_risk": ("prior", lambda v: accountant().bayes_risk(v), SHARE),
    "step": ("count", lambda v: accountant().step(GAUSS, v), COUNT),
    "step event": ("event", lambda v: accountant().step(v), [1.0, *ODD]),
    "preview": ("count", lambda v: accountant().preview(GAUSS, v), COUNT),
    "preview event": ("event", lambda v: accountant().preview(v), [1.0, *ODD]),
    "compose": ("other", lambda v: accountant().compose(v), [GAUSS, *ODD]),
    "unit": ("unit", lambda v: Accountant(v), ["", 1, None]),
    "relation": ("relation", lambda v: Accountant(relation=v), ["replace", *ODD]),
    "observer": ("observer", lambda v: Accountant(observer=v), ["attacker", *ODD]),
    "tol": ("tol", lambda v: Accountant(tol=v), OPEN_SHARE),
    "calibrate": ("epsilon", lambda v: calibrate(plan, epsilon=v, delta=1e-5), [0, -1.0, math.inf, *ODD]),
    "calibrate delta": ("delta", lambda v: calibrate(plan, epsilon=1.0, delta=v), DELTA),
    "calibrate count": ("count", lambda v: calibrate(plan, count=v, epsilon=1.0, delta=1e-5), [0, *COUNT]),
    "calibrate tol": ("tol", lambda v: calibrate(plan, epsilon=1.0, delta=1e-5, tol=v), OPEN_SHARE),
    "steps": ("epsilon", lambda v: calibrate_steps(GAUSS, epsilon=v, delta=1e-5), [0, -1.0, *ODD]),
    "steps delta": ("delta", lambda v: calibrate_steps(GAUSS, epsilon=1.0, delta=v), DELTA),
    "steps most": ("most", lambda v: calibrate_steps(GAUSS, epsilon=1.0, delta=1e-5, most=v), [0, math.inf, *COUNT]),
    "budget": ("epsilon", lambda v: filters.Budget(v, 1e-5), [0, -1.0, *ODD]),
    "budget delta": ("delta", lambda v: filters.Budget(1.0, v), DELTA),
    "budget order": ("order", lambda v: filters.Budget(1.0, 1e-5, "renyi", v), [1.0, math.inf, *ODD]),
    "filter limit": ("limit", lambda v: filters.ZcdpFilter(v), [-1.0, *ODD]),
    "filter relation": ("relation", lambda v: filters.GdpFilter(1.0, relation=v), ["swap", *ODD]),
    "filter order": ("order", lambda v: filters.RenyiFilter(1.0, order=v), [1, 0.5, math.inf, *ODD]),
    "filter count": ("count", lambda v: filters.ZcdpFilter(1.0).preview(GAUSS, v), COUNT),
    "filter event": ("event", lambda v: filters.ZcdpFilter(1.0).charge(v), ODD),
    "filter within": ("epsilon", lambda v: filters.ZcdpFilter.within(v, 1e-5), [0, -1, *ODD]),
    "odometer": ("delta", lambda v: odometer.RenyiOdometer(v), [0, 1, *ODD]),
    "odometer order": ("order", lambda v: odometer.RenyiOdometer(1e-5, orders=[v]), [1, *ODD]),
    "odometer count": ("count", lambda v: odometer.RenyiOdometer(1e-5).add(GAUSS, v), COUNT),
    "cost": ("order", lambda v: renyi_cost(GAUSS, v), [1, 0.5, *ODD]),
    "poisson": ("rate", lambda v: PoissonSampler(v), SHARE),
    "fixed": ("sample_size", lambda v: FixedSizeSampler(v, 10), [11, *COUNT]),
    "fixed population": ("population", lambda v: FixedSizeSampler(1, v), [0, *COUNT]),
    "availability": ("sample_size", lambda v: AvailabilitySampler(v), [0, *(v for v in COUNT if v is not None)]),
    "truncated": ("rate", lambda v: TruncatedPoissonSampler(v, 10, 2), SHARE),
    "truncated cap": ("cap", lambda v: TruncatedPoissonSampler(0.5, 10, v), [0, *COUNT]),
    "truncated population": ("population", lambda v: TruncatedPoissonSampler(0.5, v, 1), [0, *COUNT]),
    "allocation": ("rounds", lambda v: RandomAllocationSampler(v), [0, *COUNT]),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_such_number_is_named(call: str) -> None:
    name, function, values = CALLS[call]
    for value in values:
        with pytest.raises(ValueError, match=rf"^{name}: "):
            function(value)


INNER = {"inner": GAUSS}
SHARED_NOISE = {
    "local_stddev": 1.0,
    "clip": 1.0,
    "scale": 9.0,
    "dimension": 4,
    "survivors": 3,
    "modulus": 64,
    "beta": 0.5,
}
KINDS: dict[type[ev.Event], dict[str, Any]] = {
    ev.Gaussian: {"noise_multiplier": 1.0},
    ev.Laplace: {"noise_multiplier": 1.0},
    ev.MatrixGaussian: {"noise_multiplier": 1.0, "sensitivity": 2.0},
    ev.DiscreteGaussian: {"sigma": 1.0, "sensitivity": 1},
    ev.DiscreteLaplace: {"scale": 1.0, "sensitivity": 1},
    ev.Skellam: {"variance": 1.0, "sensitivity": 1},
    ev.RandomizedResponse: {"noise": 0.5, "categories": 3},
    ev.Exponential: {"epsilon": 1.0},
    ev.AboveThreshold: {"epsilon": 1.0},
    ev.PureDP: {"epsilon": 1.0},
    ev.ApproximateDP: {"epsilon": 1.0, "delta": 1e-5},
    ev.ZCDP: {"rho": 1.0},
    ev.PoissonSampled: {"rate": 0.5, **INNER},
    ev.FixedSizeSampled: {"sample_size": 2, "population": 9, **INNER},
    ev.TruncatedPoisson: {"rate": 0.5, "population": 9, "cap": 3, **INNER},
    ev.RandomAllocation: {"rounds": 3, **INNER},
    ev.DistributedDiscreteGaussian: SHARED_NOISE,
    ev.DistributedSkellam: SHARED_NOISE,
}
SHARES = {"rate", "noise", "delta", "beta"}


def test_every_kind_of_event_is_tried() -> None:
    kinds = {kind for kind in vars(ev).values() if isinstance(kind, type) and issubclass(kind, ev.Event)}
    bare = {ev.Event, ev.DistributedNoise, ev.Composed, ev.Central, ev.Unaccounted}
    assert kinds - bare == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_field_of_every_event_refuses_what_it_cannot_be(kind: type[ev.Event], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(KINDS[kind])))
    values: st.SearchStrategy[Any] = st.one_of(NEGATIVE, st.sampled_from(ODD))
    if name in SHARES:
        values |= ABOVE_ONE
    value = data.draw(values)
    with pytest.raises(ValueError, match=rf"^{name}: "):
        kind(**{**KINDS[kind], name: value})


@given(st.one_of(NEGATIVE, ABOVE_ONE, st.sampled_from(ODD)))
def test_a_share_is_in_its_interval(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^share: must be a number in \[0, 1\], not "):
        argument.number("share", value, 0, 1)


# --- edges ------------------------------------------------------------------------------------------------------

NOISE = {"noise_multiplier", "sigma", "scale", "variance", "noise", "local_stddev"}
FREE = {"rate": 0.0, "sample_size": 0, "sensitivity": 0, "epsilon": 0.0, "rho": 0.0, "clip": 0.0}


def relation_of(kind: type[ev.Event]) -> str:
    return "replace_one" if kind in (ev.FixedSizeSampled, ev.RandomizedResponse) else "zero_out"


@pytest.mark.parametrize("kind", KINDS)
def test_no_noise_costs_infinity_and_no_use_costs_nothing(kind: type[ev.Event]) -> None:
    event, relation = kind(**KINDS[kind]), relation_of(kind)
    assert Accountant(relation=relation).step(event, 0).epsilon(0.0).upper == 0
    for name in NOISE & set(KINDS[kind]) - ({"scale"} if "clip" in KINDS[kind] else set()):
        bare = dataclasses.replace(event, **{name: 0.0})
        found = Accountant(relation=relation).step(bare)
        assert found.epsilon(1e-5).upper == math.inf
        assert found.delta(3.0).upper == 1
    for name in FREE.keys() & set(KINDS[kind]) - ({"epsilon"} if "delta" in KINDS[kind] else set()):
        silent = dataclasses.replace(event, **{name: FREE[name]})
        assert Accountant(relation=relation).step(silent, 7).epsilon(0.0).upper == 0


SAMPLED: list[tuple[ev.Event, str]] = [
    (ev.PoissonSampled(0.5, ev.Gaussian(0.0)), "add_remove"),
    (ev.FixedSizeSampled(2, 9, ev.Laplace(0.0)), "replace_one"),
    (ev.TruncatedPoisson(0.5, 9, 3, ev.Gaussian(0.0)), "zero_out"),
    (ev.RandomAllocation(3, ev.Gaussian(0.0)), "add_remove"),
]


@pytest.mark.parametrize(("event", "relation"), SAMPLED)
def test_no_noise_under_a_sampler(event: ev.Event, relation: str) -> None:
    assert Accountant(relation=relation).step(event).epsilon(1e-5).upper == math.inf


PURE = {ev.Laplace, ev.DiscreteLaplace, ev.RandomizedResponse, ev.Exponential, ev.AboveThreshold, ev.PureDP}


@pytest.mark.parametrize("kind", KINDS)
def test_delta_zero_is_finite_for_pure_privacy_only(kind: type[ev.Event]) -> None:
    event, relation = kind(**KINDS[kind]), relation_of(kind)
    for count in (1, 3):
        found = Accountant(relation=relation).step(event, count).epsilon(0.0)
        assert math.isfinite(found.upper) == (kind in PURE)
        if kind in PURE:
            one = Accountant(relation=relation).step(event).epsilon(0.0)
            assert found.upper == pytest.approx(count * one.upper)


UNBOUNDED: list[tuple[ev.Event, str]] = [
    (ev.PoissonSampled(0.1, ev.DiscreteGaussian(2.0)), "add_remove"),
    (ev.PoissonSampled(0.1, ev.Skellam(4.0)), "replace_one"),
    (ev.FixedSizeSampled(2, 9, ev.ApproximateDP(0.5, 1e-6)), "replace_one"),
    (ev.FixedSizeSampled(2, 9, ev.DiscreteGaussian(2.0)), "replace_one"),
    (ev.TruncatedPoisson(0.5, 9, 3, ev.DiscreteGaussian(2.0, 1, 9)), "add_remove"),
    (ev.RandomAllocation(3, GAUSS), "add_remove"),
]


@pytest.mark.parametrize(("event", "relation"), UNBOUNDED)
def test_unbounded_losses_have_no_epsilon_at_delta_zero(event: ev.Event, relation: str) -> None:
    assert Accountant(relation=relation).step(event, 2).epsilon(0.0).upper == math.inf


@pytest.mark.parametrize(
    ("event", "relation", "certain"),
    [
        (ev.FixedSizeSampled(16, 64, ev.ApproximateDP(0.4, 1e-3)), "replace_one", 1 - (1 - 2.5e-4) ** 2),
        (ev.PoissonSampled(0.25, ev.ApproximateDP(0.4, 1e-3)), "add_remove", 1 - (1 - 2.5e-4) ** 2),
        (ev.ApproximateDP(0.4, 1e-3), "zero_out", 1 - (1 - 1e-3) ** 2),
    ],
)
def test_what_only_one_world_shows_is_never_lost(event: ev.Event, relation: str, certain: float) -> None:
    """A sampled or joined mechanism keeps its delta however large epsilon is."""
    found = Accountant(relation=relation).step(event, 2)
    assert found.delta(30.0).lower == pytest.approx(certain, rel=1e-9)
    assert found.delta(30.0).lower <= certain <= found.delta(30.0).upper
    assert found.epsilon(certain * 0.99).upper == math.inf
    assert found.epsilon(certain * 1.01).upper < math.inf


def test_delta_equal_to_what_is_certain_has_the_epsilon_that_was_claimed() -> None:
    found = Accountant().step(ev.ApproximateDP(0.4, 1e-5)).epsilon(1e-5)
    assert found.lower <= 0.4 <= found.upper
    assert found.upper == pytest.approx(0.4, rel=1e-9)


def test_infinite_epsilons() -> None:
    assert accountant().delta(math.inf).upper == 0
    sampled = Accountant().step(ev.PoissonSampled(0.1, GAUSS), 3)
    assert sampled.delta(math.inf).upper == 0
    assert sampled.delta(-math.inf).lower == 1


def test_randomized_response_against_a_uniform_report_costs_its_worse_direction() -> None:
    """0.75 against 0.5 is a loss of log 1.5; 0.5 against 0.25, the other way round, one of log 2."""
    found = Accountant(relation="zero_out").step(ev.RandomizedResponse(0.5, 2))
    assert found.epsilon(0.0).upper == pytest.approx(math.log(2))
    assert found.epsilon(1e-9).lower == pytest.approx(math.log(2), rel=1e-6)
    assert found.divergence(50.0) > math.log(1.5)
