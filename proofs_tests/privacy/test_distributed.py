"""Distributed Skellam noise: the integers keep to their sensitivity, and the sum carries the planned noise.

Statistical tests run on fixed keys, so they give the same answer each time; the rates stated are the chance that a
correct mechanism would have failed on keys picked at random.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import os
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from privfed.privacy import rotation
from privfed.privacy.distributed import NoiseParameters, solve_noise, wrap_bound
from privfed.privacy.rdp import rounded_norm
from privfed.protocols import LightSecAgg, SecAgg, SecAggPlus
from privfed.protocols.loop import drive
from privfed.protocols.session import Session
from proofs_tests.privacy.noise_case import SEED, SIGMAS, parameters, stream, unit

# --- sensitivity ------------------------------------------------------------------------------------------------


@st.composite
def settings_and_updates(draw: st.DrawFn) -> tuple[NoiseParameters, np.ndarray]:
    size = draw(st.integers(1, 200))
    beta = draw(st.sampled_from([0.0, math.exp(-0.5), 0.9, 0.999]))
    scale = 2.0 ** draw(st.floats(-3, 38))
    found = parameters(dimension=size, scale=scale, beta=beta, bits=62, noise_multiplier=2.0**-20)
    length = draw(st.sampled_from([0.0, 1e-300, 1e-3, 0.999999, 1.0, 1.0000001, 7.0, 1e160, 1e300]))
    if draw(st.booleans()):
        values = np.zeros(size)
        values[draw(st.integers(0, size - 1))] = length
    else:
        values = unit(draw(st.integers(0, 2**32 - 1)), size) * length
    return found, values


@given(settings_and_updates(), st.sampled_from([np.float64, np.float32]))
@settings(max_examples=300, deadline=None)
def test_the_rounded_integers_keep_to_the_bound_exactly(pair: tuple[NoiseParameters, np.ndarray], dtype: Any) -> None:
    found, values = pair
    if dtype == np.float32:
        values = np.clip(values, -1e38, 1e38)
    steps = found.round_update(values.astype(dtype), SEED)
    assert sum(int(k) ** 2 for k in steps) <= Fraction(found.norm_bound) ** 2
    event = found.event
    assert rounded_norm(event.clip * event.scale, event.dimension, event.beta) == found.norm_bound
    if not values.any():
        assert not steps.any()  # a node without data adds nothing but noise


def test_roundings_that_are_too_long_occur_and_are_refused() -> None:
    """With beta near 1 the bound is close to the mean: free rounding breaks it often, conditional rounding never."""
    tight, free = parameters(dimension=64, scale=4.0, beta=0.999), parameters(dimension=64, scale=4.0, beta=0.0)
    assert tight.norm_bound < free.norm_bound
    found, broken = [], 0
    flat = np.zeros(64)
    flat[0] = 1.0  # rotated, every coordinate is +-1/2 step, the worst case for rounding
    for attempt in range(200):
        seed = hashlib.sha256(b"%d" % attempt).digest()
        squared = float(np.sum(free.round_update(flat, seed) ** 2))
        broken += squared > tight.norm_bound**2
        found.append(float(np.sum(tight.round_update(flat, seed) ** 2)))
    assert broken >= 20  # about half of 200; fewer than 20 has probability below 10^-30
    assert max(found) <= tight.norm_bound**2


def test_rounding_is_unbiased_and_its_error_is_below_half_a_step() -> None:
    found = parameters(dimension=64, scale=9.0)
    values, rounds = unit(3, 64, 0.8), 4000
    random = stream("unbiased")
    total = sum(found.round_update(values, SEED, random) for _ in range(rounds))
    rotated = rotation.rotate(values, SEED, 9.0)
    # Below the clip no rounding is refused, and each has a variance of at most 1/4: 64 coordinates at 5.6 sigmas.
    assert np.abs(total / rounds - rotated).max() < SIGMAS * 0.5 / math.sqrt(rounds)


def test_what_is_not_finite_or_has_another_shape_is_refused() -> None:
    found = parameters(dimension=4)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="update: contains NaN or infinity"):
            found.encode(np.array([0.0, bad, 0.0, 0.0]), SEED)
    with pytest.raises(ValueError, match=r"update: must have the shape \(4,\)"):
        found.encode(np.zeros((2, 2)), SEED)


# --- noise ------------------------------------------------------------------------------------------------------


@given(
    st.floats(1e-3, 1e3),
    st.floats(1e-2, 1e2),
    st.integers(1, 300),
    st.floats(0, 0.5),
    st.floats(0, 0.4),
    st.floats(1e-3, 10),
)
@settings(max_examples=200, deadline=None)
def test_honest_survivors_have_at_least_the_planned_noise(
    clip: float, z: float, nodes: int, dropped: float, colluding: float, scale: float
) -> None:
    found = parameters(
        clip=clip, noise_multiplier=z, nodes=nodes, scale=scale,
        max_dropped=int(dropped * nodes), max_colluding=int(colluding * nodes),
    )  # fmt: skip
    assert found.honest == nodes - found.max_dropped - found.max_colluding
    planned = (Fraction(z) * Fraction(clip) * Fraction(scale)) ** 2
    provided = found.honest * Fraction(found.local_variance)
    assert planned <= provided <= planned * (1 + Fraction(1, 2**36))
    event = found.event
    charged = event.survivors * (Fraction(event.local_stddev) * Fraction(event.scale)) ** 2
    assert charged <= provided
    assert event.survivors == found.honest
    assert event.modulus == 2**found.bits


def masked_sum(
    found: NoiseParameters, updates: dict[int, np.ndarray], dropped: set[int], protocol: Any, label: str
) -> tuple[np.ndarray, frozenset[int]]:
    """Run the protocol on encoded vectors; the dropped nodes vanish before they send theirs."""
    session = Session(1, 1, "train", tuple(updates), found.padded, found.bits)
    vectors = {node: found.encode(values, SEED, stream(f"{label} {node}")) for node, values in updates.items()}
    result, _ = drive(session, protocol, vectors, {"mask": dropped})
    return result.total, result.survivors


def signed(total: np.ndarray, bits: int) -> np.ndarray:
    values = total.astype(np.int64)
    return np.where(values >= 1 << (bits - 1), values - (1 << bits), values)


DROPS = [(0, SecAggPlus(neighbours=8, threshold=4)), (2, SecAgg(threshold=14)), (6, LightSecAgg(threshold=14))]


@pytest.mark.parametrize(("dropped", "protocol"), DROPS, ids=["0 %", "10 %", "30 %"])
def test_the_sum_of_zeros_is_skellam_noise_of_the_survivors(dropped: int, protocol: Any) -> None:
    """Variance, kurtosis and the whole law, at 0, 10 and 30 % drops of 20 nodes; false alarms below 2 * 10^-6 each."""
    found = parameters(nodes=20, dimension=1 << 15, max_dropped=6, scale=2.0, noise_multiplier=1.0, bits=16)
    # Local variance 4 / 14, so that the sum's kurtosis tells Skellam noise from Gaussian noise.
    zeros = {node: np.zeros(found.dimension) for node in range(1, 21)}
    total, survivors = masked_sum(found, zeros, set(range(1, dropped + 1)), protocol, f"zeros {dropped}")
    assert len(survivors) == 20 - dropped >= found.least_survivors
    noise, variance = signed(total, found.bits), (20 - dropped) * found.local_variance
    planned = (found.noise_multiplier * found.clip * found.scale) ** 2
    assert variance >= planned * (1 - 1e-9)
    count, kurtosis = noise.size, 1 / variance
    assert abs(noise.mean()) < SIGMAS * math.sqrt(variance / count)
    assert abs(noise.var() / variance - 1) < SIGMAS * math.sqrt((2 + kurtosis) / count)
    # Skellam noise's excess kurtosis is 1 / variance; the standard error is that of nearly normal samples, by 1.5.
    assert abs(stats.kurtosis(noise) - kurtosis) < SIGMAS * 1.5 * math.sqrt(24 / count)
    edges = np.arange(-5, 6)
    probability = np.diff(np.concatenate([[0.0], stats.skellam(variance / 2, variance / 2).cdf(edges), [1.0]]))
    observed = np.diff(np.concatenate([[0], np.searchsorted(np.sort(noise), edges, side="right"), [count]]))
    assert stats.chisquare(observed, probability * count).pvalue > 1e-6
    less = (19 - dropped) * found.local_variance  # the test sees one node's missing noise
    assert abs(noise.var() / less - 1) > SIGMAS * math.sqrt(2 / count) / 2


@pytest.mark.parametrize(("dropped", "protocol"), DROPS, ids=["0 %", "10 %", "30 %"])
def test_the_decoded_sum_is_the_plain_sum_plus_the_planned_noise(dropped: int, protocol: Any) -> None:
    found = solve_noise(
        clip=2.0, noise_multiplier=0.7, nodes=20, dimension=5000, bits=18, max_dropped=6, max_colluding=2
    )
    updates = {node: unit(node, 5000, node / 5) for node in range(1, 21)}  # half of them longer than the clip
    total, survivors = masked_sum(found, updates, set(range(1, dropped + 1)), protocol, f"sum {dropped}")
    plain = sum(unit(node, 5000, min(2.0, node / 5)) for node in survivors)
    decoded = found.decode(total, SEED, len(survivors))
    noise, variance = decoded - plain, len(survivors) * found.local_variance / found.scale**2
    rounding = len(survivors) / 4 / found.scale**2
    assert rounding < 0.01 * variance
    error = SIGMAS * math.sqrt(2 / noise.size)  # false alarm 2 * 10^-8
    assert (1 - error) * variance < noise.var() < (1 + error) * (variance + rounding)
    assert abs(noise.mean()) < SIGMAS * math.sqrt(variance / noise.size)
    assert variance >= (0.7 * 2.0) ** 2 * len(survivors) / 20  # and at most six drops leave what was planned
    mean = found.decode(total, SEED, len(survivors), denominator=20.0)
    np.testing.assert_allclose(mean, decoded / 20, rtol=1e-12)


def test_without_noise_only_rounding_separates_the_decoded_sum_from_the_plain_one() -> None:
    found = solve_noise(clip=1.0, noise_multiplier=0.5, nodes=30, dimension=777, bits=20)
    updates = [unit(node, 777, 0.9) for node in range(30)]
    steps = np.sum([found.round_update(values, SEED) for values in updates], axis=0)
    decoded = found.decode(steps.view(np.uint64) & np.uint64(2**20 - 1), SEED, 30)
    assert np.linalg.norm(decoded - np.sum(updates, axis=0)) < 30 * math.sqrt(found.padded) / found.scale
    assert np.abs(decoded - np.sum(updates, axis=0)).max() < 8 * math.sqrt(30 / 4) / found.scale


def test_every_encoding_is_fresh_and_comes_from_the_operating_system() -> None:
    found = parameters()
    for method in (found.encode, found.encode_integers, found.round_update):
        assert inspect.signature(method).parameters["random"].default is os.urandom
    one, two = found.encode(np.zeros(100), SEED), found.encode(np.zeros(100), SEED)
    assert (one != two).sum() > 60


@pytest.mark.parametrize("bits", [8, 20, 31, 32, 33, 40, 62])
def test_encoded_vectors_are_ring_elements(bits: int) -> None:
    found = parameters(bits=bits, scale=3.0)
    vector = found.encode(unit(1, 100), SEED, stream("ring"))
    assert vector.dtype == (np.uint32 if bits <= 32 else np.uint64)
    assert vector.shape == (found.padded,) == (112,)
    integers = found.encode_integers(unit(1, 100), SEED, stream("ring"))
    assert [int(v) for v in vector] == [int(k) % 2**bits for k in integers]


# --- wrap-around ------------------------------------------------------------------------------------------------


@given(st.floats(0.01, 1e4), st.floats(0.5, 12))
@settings(max_examples=150, deadline=None)
def test_the_wrap_bound_is_above_the_exact_tail_and_not_far(variance: float, deviations: float) -> None:
    reach = math.ceil(deviations * math.sqrt(variance))
    exact = 2 * float(stats.skellam(variance / 2, variance / 2).sf(reach - 1))
    bound = wrap_bound(reach, 0.0, variance, 1)
    assert bound >= min(1.0, exact * (1 - 1e-9))
    assert bound <= 1.0
    if exact > 1e-12 and variance > 1:
        assert bound < 60 * exact  # a Chernoff bound loses about a factor sqrt(2 pi) times the deviations


def test_the_wrap_bound_is_above_the_exact_tail_of_signs() -> None:
    signs = np.array(np.meshgrid(*[[-1, 1]] * 12)).reshape(12, -1).sum(axis=0)  # all 4096 sums of twelve signs
    for reach in range(1, 13):
        assert wrap_bound(reach, 12.0, 0.0, 12) >= np.mean(np.abs(signs) >= reach)
    assert wrap_bound(0.0, 1.0, 1.0, 4) == 1.0
    assert wrap_bound(-5.0, 1.0, 1.0, 4) == 1.0


def wraps(found: NoiseParameters, rounds: int) -> int:
    """Count rounds of worst-case updates, all the same and as long as the clip, in which some coordinate wraps."""
    wrapped = 0
    update, half = unit(5, found.dimension), 1 << (found.bits - 1)
    for number in range(rounds):
        seed, random = hashlib.sha256(b"wrap %d" % number).digest(), stream(f"wrap {number}")
        integers = [found.encode_integers(update, seed, random) for _ in range(found.nodes)]
        total = np.sum(integers, axis=0)
        inside = bool((total >= -half).all() and (total < half).all())
        wrapped += not inside
        ring = (total.view(np.uint64) & np.uint64(2 * half - 1)).astype(np.uint32)
        decoded = found.decode(ring, seed, found.nodes)
        true = rotation.unrotate(total.astype(np.float64), seed, found.dimension, 1 / found.scale)
        assert np.allclose(decoded, true, atol=1e-9) == inside  # a wrap is what spoils a sum, and nothing else does
    return wrapped


@pytest.mark.parametrize("noise_multiplier", [1.0, 0.01], ids=["mostly noise", "mostly updates"])
def test_sums_wrap_no_more_often_than_planned(noise_multiplier: float) -> None:
    planned, rounds = 0.02, 300
    found = solve_noise(
        clip=1.0, noise_multiplier=noise_multiplier, nodes=8, dimension=256, bits=12, wrap_probability=planned
    )
    assert found.wrap_probability <= planned
    allowed = int(stats.binom.isf(1e-6, rounds, planned))  # false alarm 10^-6 at the planned probability itself
    assert wraps(found, rounds) <= allowed
    # The count can fail: a lattice twice too fine breaks the plan.
    assert wraps(replace(found, scale=2 * found.scale), 60) > int(stats.binom.isf(1e-6, 60, planned))
