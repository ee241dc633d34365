"""The parameters of distributed noise: the finest lattice that fits, refusals by name, and their epsilon."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privfed.privacy.accountant import Accountant
from privfed.privacy.distributed import NoiseParameters, calibrate_noise, solve_noise
from privfed.privacy.events import PoissonSampled
from privfed.privacy.filters import Budget, BudgetExceeded
from privfed.privacy.ledger import Ledger, Terms
from proofs_tests.privacy.noise_case import SEED, parameters, stream, unit

# --- the lattice ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimension", [10, 650, 10**6])
@pytest.mark.parametrize("bits", [14, 20, 24])
@pytest.mark.parametrize("wrap_probability", [1e-3, 1e-9])
def test_the_lattice_is_the_finest_that_fits(dimension: int, bits: int, wrap_probability: float) -> None:
    found = solve_noise(
        clip=3.0, noise_multiplier=1.0, nodes=50, dimension=dimension, bits=bits, wrap_probability=wrap_probability
    )
    assert found.wrap_probability <= wrap_probability
    assert replace(found, scale=found.scale * 1.001).wrap_probability > wrap_probability
    assert found.growth <= 2
    larger = replace(found, clip=30.0, scale=found.scale / 10)
    assert larger.wrap_probability == pytest.approx(found.wrap_probability, rel=1e-6)  # only clip * scale matters


def test_a_wide_ring_is_used_up_to_what_the_sampler_takes() -> None:
    found = solve_noise(clip=3.0, noise_multiplier=1.0, nodes=50, dimension=650, bits=40)
    assert 2.0**41 * (1 - 1e-9) < found.local_variance <= 2.0**41
    assert found.wrap_probability < 1e-30
    vector = found.encode(unit(1, 650, 3.0), SEED, stream("wide"))
    assert np.abs(found.decode(vector, SEED, 50)).max() < 7 * found.local_stddev + 3.0
    quiet = solve_noise(clip=3.0, noise_multiplier=1e-6, nodes=50, dimension=650, bits=60)
    assert quiet.clip * quiet.scale == pytest.approx(2.0**40, rel=1e-9)
    assert sum(int(k) ** 2 for k in quiet.round_update(unit(1, 650, 9.0), SEED)) <= Fraction(quiet.norm_bound) ** 2


def test_a_ring_that_is_too_small_is_refused_with_the_bits_that_do() -> None:
    arguments: dict[str, Any] = {"clip": 1.0, "noise_multiplier": 1.0, "nodes": 100, "dimension": 10**6}
    with pytest.raises(ValueError, match=r"bits: in a ring of 10 bits .* 13 bits suffice"):
        solve_noise(**arguments, bits=10)
    assert solve_noise(**arguments, bits=13).growth <= 2
    with pytest.raises(ValueError, match="13 bits suffice"):
        solve_noise(**arguments, bits=12)
    with pytest.raises(ValueError, match=r"in a ring of 8 bits"):  # 300 roundings alone fill it
        solve_noise(clip=1.0, noise_multiplier=1.0, nodes=300, dimension=10, bits=8)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"clip": 0.0}, "clip"),
        ({"clip": math.nan}, "clip"),
        ({"noise_multiplier": math.inf}, "noise_multiplier"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"nodes": 0}, "nodes"),
        ({"nodes": True}, "nodes"),
        ({"dimension": 0}, "dimension"),
        ({"bits": 7}, "bits"),
        ({"bits": 63}, "bits"),
        ({"scale": 0.0}, "scale"),
        ({"scale": 2.0**41}, "scale"),
        ({"noise_multiplier": 2.0**20}, "scale"),
        ({"max_dropped": -1}, "max_dropped"),
        ({"max_colluding": 0.5}, "max_colluding"),
        ({"max_dropped": 6, "max_colluding": 4}, "max_dropped: 10 nodes less 6 dropped less 4 colluding leave nobody"),
        ({"beta": 1.0}, "beta"),
        ({"beta": -0.1}, "beta"),
    ],
)
def test_nonsense_is_refused_by_name(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        parameters(**changes)


@pytest.mark.parametrize("probability", [0.0, 1.0, math.nan])
def test_a_wrap_probability_that_is_none_is_refused(probability: float) -> None:
    with pytest.raises(ValueError, match="wrap_probability"):
        solve_noise(clip=1.0, noise_multiplier=1.0, nodes=5, dimension=5, wrap_probability=probability)


def test_a_sum_of_too_few_or_too_many_is_not_decoded() -> None:
    found = parameters(max_dropped=3)
    total = np.zeros(112, np.uint32)
    assert found.least_survivors == 7
    for survivors in (7, 10):
        assert found.decode(total, SEED, survivors).shape == (100,)
    for survivors in (6, 11):
        with pytest.raises(ValueError, match=f"survivors: {survivors} nodes are in the sum, the plan is for 7 to 10"):
            found.decode(total, SEED, survivors)
    for bad in (np.zeros(100, np.uint32), np.zeros(112, np.int64)):
        with pytest.raises(ValueError, match="total: must be unsigned"):
            found.decode(bad, SEED, 10)
    with pytest.raises(ValueError, match="denominator"):
        found.decode(total, SEED, 10, denominator=0.0)


PAGE = (Path(__file__).parents[2] / "docs" / "distributed-dp.md").read_text()


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", PAGE, re.S))
def test_the_pages_examples_run(block: str) -> None:
    exec(compile(block, "<docs>", "exec"), {"__name__": "docs"})  # our own page, not input


# --- accounting -------------------------------------------------------------------------------------------------


def epsilon_by_hand(found: NoiseParameters, rounds: int, delta: float, sensitivity: float = 1.0) -> float:
    """The Renyi bound of [AKL21] and the conversion of [BBG+20], written out again from the parameters."""
    assert found.dimension == 650
    squared, size = (found.clip * found.scale) ** 2, 2 * 12 * 28  # the least order that holds 650
    length = found.clip * found.scale
    l2 = (
        min(
            (length + math.sqrt(size)) ** 2,
            squared + size / 4 + math.sqrt(2 * math.log(1 / found.beta)) * (length + math.sqrt(size) / 2),
        )
        ** 0.5
        * sensitivity
    )
    l1 = l2 * min(math.sqrt(size), l2)
    variance = (found.noise_multiplier * length) ** 2
    best = math.inf
    for a in range(2, 65):
        extra = min(((2 * a - 1) * l2**2 + 6 * l1) / (4 * variance**2), 3 * l1 / (2 * variance))
        cost = rounds * (a * l2**2 / (2 * variance) + extra)
        best = min(best, cost + math.log((a - 1) / a) - (math.log(delta) + math.log(a)) / (a - 1))
    return best


@pytest.mark.parametrize("bits", [14, 20])
@pytest.mark.parametrize(("relation", "sensitivity"), [("add_remove", 1), ("zero_out", 1), ("replace_one", 2)])
def test_epsilon_is_what_the_parameters_say(bits: int, relation: str, sensitivity: int) -> None:
    found = solve_noise(
        clip=0.5, noise_multiplier=3.0, nodes=200, dimension=650, bits=bits, max_dropped=60, max_colluding=20
    )
    accountant = Accountant(unit="client", relation=relation, observer="server").step(found.event, 10)
    expected = epsilon_by_hand(found, 10, 1e-5, sensitivity)
    assert accountant.epsilon(1e-5).upper == pytest.approx(expected, rel=1e-3)
    assert accountant.epsilon(1e-5).upper >= 0.999 * expected


def test_sampling_saves_nothing_against_the_server() -> None:
    event = solve_noise(clip=1.0, noise_multiplier=2.0, nodes=100, dimension=650).event
    spent = {
        (observer, sampled): Accountant(observer=observer)
        .step(PoissonSampled(0.1, event) if sampled else event, 10)
        .epsilon(1e-5)
        .upper
        for observer in ("output", "server")
        for sampled in (False, True)
    }
    assert spent["server", True] == spent["server", False] == spent["output", False]
    assert spent["output", True] < spent["output", False] / 2


@pytest.mark.parametrize("relation", ["add_remove", "replace_one"])
def test_calibrated_noise_is_certified_and_not_much_more_than_needed(relation: str) -> None:
    found = calibrate_noise(
        epsilon=8.0, delta=1e-5, rounds=10, clip=1.0, nodes=200, dimension=650, max_dropped=60, relation=relation
    )
    spent = Accountant(relation=relation, observer="server").step(found.event, 10).epsilon(1e-5)
    assert 8.0 * (1 - 1e-3) < spent.upper <= 8.0
    assert found.wrap_probability <= 1e-6
    with_colluders = calibrate_noise(
        epsilon=8.0, delta=1e-5, rounds=10, clip=1.0, nodes=200, dimension=650, max_dropped=60, max_colluding=40,
        relation=relation,
    )  # fmt: skip
    ratio = with_colluders.local_stddev / found.local_stddev
    assert ratio == pytest.approx(math.sqrt(140 / 100), rel=1e-3)


def test_calibration_counts_a_sampler_only_for_the_output() -> None:
    def noise(observer: str) -> float:
        return calibrate_noise(
            epsilon=4.0, delta=1e-5, rounds=20, clip=1.0, nodes=100, dimension=650, observer=observer,
            sampled=lambda event: PoissonSampled(0.1, event),
        ).noise_multiplier  # fmt: skip

    assert noise("output") < noise("server") / 2


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"bits": 12, "epsilon": 0.01, "rounds": 100}, r"epsilon: 20 nodes, 100000 coordinates and 12 bits cost"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"delta": 1.0}, "delta"),
        ({"rounds": 0}, "rounds"),
        ({"clip": -1.0}, "clip"),
        ({"max_dropped": 20}, "max_dropped"),
    ],
)
def test_a_budget_out_of_reach_is_refused_with_numbers(changes: dict[str, Any], text: str) -> None:
    arguments: dict[str, Any] = {"epsilon": 8.0, "delta": 1e-5, "clip": 1.0, "nodes": 20, "dimension": 10**5}
    with pytest.raises(ValueError, match=f"^{text}"):
        calibrate_noise(**{**arguments, **changes})


def test_a_ledger_charges_the_event_and_refuses_what_the_budget_does_not_cover() -> None:
    found = calibrate_noise(epsilon=4.0, delta=1e-5, rounds=3, clip=1.0, nodes=40, dimension=100)
    ledger = Ledger.create(None, Terms("run", Budget(4.0, 1e-5), observer="server"))
    for number in range(3):
        ledger.charge(found.event, run="1", round=number, transcript=hashlib.sha256(b"%d" % number).hexdigest())
    assert ledger.spent <= 4.0
    with pytest.raises(BudgetExceeded):
        ledger.charge(found.event, run="1", round=3, transcript=hashlib.sha256(b"3").hexdigest())
