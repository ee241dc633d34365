"""Distributed discrete Gaussian noise: its sum is near one discrete Gaussian, or the setting is refused.

Statistical tests run on fixed keys; the rates stated are the chance that a correct mechanism would have failed on keys
picked at random.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from privfed.privacy.accountant import Accountant
from privfed.privacy.distributed import NoiseParameters, calibrate_noise, solve_noise
from privfed.privacy.events import DistributedDiscreteGaussian, DistributedSkellam
from privfed.protocols import LightSecAgg, SecAgg, SecAggPlus
from privfed.protocols.loop import drive
from privfed.protocols.session import Session
from proofs_tests.privacy.noise_case import SEED, SIGMAS, stream

GAUSSIAN = "discrete_gaussian"


def parameters(**changes: Any) -> NoiseParameters:
    given: dict[str, Any] = {
        "clip": 1.0, "noise_multiplier": 1.0, "nodes": 20, "dimension": 1 << 15, "bits": 16, "scale": 6.0,
        "max_dropped": 6, "mechanism": GAUSSIAN,
    }  # fmt: skip
    return NoiseParameters(**{**given, **changes})


DROPS = [(0, SecAggPlus(neighbours=8, threshold=4)), (2, SecAgg(threshold=14)), (6, LightSecAgg(threshold=14))]


@pytest.mark.parametrize(("dropped", "protocol"), DROPS, ids=["0 %", "10 %", "30 %"])
def test_the_sum_of_zeros_is_gaussian_noise_of_the_survivors(dropped: int, protocol: Any) -> None:
    """Variance, kurtosis and the whole law at 0, 10 and 30 % drops; false alarms below 2 * 10^-6 each."""
    found = parameters()  # one node's noise is 6 / sqrt(14) = 1.6 steps
    nodes = tuple(range(1, 21))
    vectors = {node: found.encode(np.zeros(found.dimension), SEED, stream(f"{dropped} {node}")) for node in nodes}
    session = Session(1, 1, "train", nodes, found.padded, found.bits)
    result, _ = drive(session, protocol, vectors, {"mask": set(range(1, dropped + 1))})
    total = result.total.astype(np.int64)
    noise = np.where(total >= 1 << 15, total - (1 << 16), total)
    variance, count = (20 - dropped) * found.local_variance, noise.size
    assert variance >= (found.noise_multiplier * found.scale) ** 2
    assert abs(noise.mean()) < SIGMAS * math.sqrt(variance / count)
    assert abs(noise.var() / variance - 1) < SIGMAS * math.sqrt(2 / count)
    assert abs(stats.kurtosis(noise)) < SIGMAS * math.sqrt(24 / count)
    edges = np.arange(-20, 21)
    masses = np.exp(-(np.arange(-200, 201) ** 2) / (2 * variance))
    below = np.concatenate([[0.0], np.cumsum(masses / masses.sum())[edges + 200], [1.0]])
    observed = np.diff(np.concatenate([[0], np.searchsorted(np.sort(noise), edges, side="right"), [count]]))
    assert stats.chisquare(observed, np.diff(below) * count).pvalue > 1e-6
    less = (19 - dropped) * found.local_variance  # the test sees one node's missing noise
    assert abs(noise.var() / less - 1) > SIGMAS * math.sqrt(2 / count) / 2


def test_the_decoded_sum_is_the_plain_sum_plus_noise() -> None:
    found = solve_noise(clip=2.0, noise_multiplier=0.7, nodes=10, dimension=3000, bits=20, mechanism=GAUSSIAN)
    updates = [np.random.default_rng(node).normal(size=3000) / 100 for node in range(10)]
    total = np.add.reduce([found.encode(u, SEED, stream(f"d {n}")) for n, u in enumerate(updates)], dtype=np.uint64)
    noise = found.decode(total & np.uint64(2**20 - 1), SEED, 10) - np.sum(updates, axis=0)
    assert abs(noise.var() / 1.4**2 - 1) < SIGMAS * math.sqrt(2 / 3000) + 1e-3


def independent_departure(nodes: int, stddev: float, dimension: int, clip_steps: float) -> float:
    """sqrt(D) tau over D2, [KLS21, Thm 1 and Prop 22] written out once more."""
    tau = 10 * sum(math.exp(-2 * math.pi**2 * stddev**2 * k / (k + 1)) for k in range(1, nodes))
    root = math.sqrt(dimension)
    square = min((clip_steps + root) ** 2, clip_steps**2 + dimension / 4 + clip_steps + root / 2)
    return root * tau / (math.sqrt(square) / (math.sqrt(nodes) * stddev))


@pytest.mark.parametrize(("stddev", "near"), [(1.0, False), (1.1, False), (1.3, True), (3.0, True)])
def test_noise_too_small_for_its_sum_to_be_near_one_is_refused(stddev: float, near: bool) -> None:
    """One standard deviation a step is not enough in a million dimensions, whatever is sometimes said."""
    nodes = 10**6
    scale = stddev * math.sqrt(nodes)  # a noise multiplier of 1
    found = parameters(
        nodes=nodes, max_dropped=0, dimension=1 << 20, scale=scale, bits=32,
    )  # fmt: skip
    assert found.departure == pytest.approx(independent_departure(nodes, stddev, 1 << 20, scale), rel=1e-6)
    assert (found.departure <= 0.01) == near
    if near:
        found.check()
    else:
        with pytest.raises(ValueError, match=r"scale: one node's discrete Gaussian noise is .* use more bits"):
            found.check()
    replace(found, mechanism="skellam").check()


def test_solving_refuses_it_too() -> None:
    arguments: dict[str, Any] = {"clip": 1.0, "noise_multiplier": 0.5, "nodes": 1000, "dimension": 2000, "bits": 14}
    assert solve_noise(**arguments).mechanism == "skellam"
    with pytest.raises(ValueError, match="sqrt\\(D\\) tau"):
        solve_noise(**arguments, mechanism=GAUSSIAN)
    with pytest.raises(ValueError, match="mechanism: must be skellam or discrete_gaussian"):
        solve_noise(**arguments, mechanism="laplace")


def test_a_budget_is_met_by_an_event_of_its_own_kind() -> None:
    arguments: dict[str, Any] = {
        "epsilon": 4.0, "delta": 1e-6, "rounds": 8, "clip": 1.0, "nodes": 50, "dimension": 2000, "bits": 20,
        "max_dropped": 5, "max_colluding": 5, "relation": "zero_out",
    }  # fmt: skip
    found, skellam = calibrate_noise(**arguments, mechanism=GAUSSIAN), calibrate_noise(**arguments)
    assert type(found.event) is DistributedDiscreteGaussian
    assert type(skellam.event) is DistributedSkellam
    accountant = Accountant(unit="client", relation="zero_out", observer="server")
    accountant.step(found.event, 8)
    assert 3.99 < accountant.epsilon(1e-6).upper <= 4.0
    # [KLS21, Prop 14], with a departure that is next to nothing here: a Gaussian's divergence at the rounded norm.
    ratio = (found.norm_bound / (found.noise_multiplier * found.scale)) ** 2
    best = min(
        8 * order * ratio / 2 + math.log1p(-1 / order) - math.log(1e-6 * order) / (order - 1)
        for order in np.arange(1.05, 60, 0.05)
    )
    assert accountant.epsilon(1e-6).upper == pytest.approx(best, rel=2e-3)
    assert found.noise_multiplier <= skellam.noise_multiplier * (1 + 1e-4)
