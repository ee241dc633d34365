"""Distributed Skellam noise: the integers keep to their sensitivity, and the sum carries the planned noise.

Statistical tests run on fixed keys, so they give the same answer each time; the rates stated are the chance that a
correct mechanism would have failed on keys picked at random.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, stats

from privfed.privacy import rotation
from privfed.privacy.accountant import Accountant
from privfed.privacy.distributed import NoiseParameters, calibrate_noise, solve_noise, wrap_bound
from privfed.privacy.events import PoissonSampled
from privfed.privacy.filters import Budget, BudgetExceeded
from privfed.privacy.ledger import Ledger, Terms
from privfed.privacy.rdp import rounded_norm
from privfed.protocols import LightSecAgg, SecAgg, SecAggPlus
from privfed.protocols.loop import drive
from privfed.protocols.session import Session

SEED = hashlib.sha256(b"a public seed").digest()
SIGMAS = 5.6  # a two-sided normal test at this distance raises a false alarm with probability 2 * 10^-8


def stream(label: str) -> Callable[[int], bytes]:
    """A random source that never repeats and always says the same."""
    calls = iter(range(10**9))
    return lambda size: hashlib.shake_256(f"{label} {next(calls)}".encode()).digest(size)


def parameters(**changes: Any) -> NoiseParameters:
    given_values = {"clip": 1.0, "noise_multiplier": 1.0, "nodes": 10, "dimension": 100, "bits": 20, "scale": 50.0}
    return NoiseParameters(**{**given_values, **changes})


def unit(label: int, size: int, length: float = 1.0) -> np.ndarray:
    values = np.random.default_rng(label).normal(size=size)
    return np.asarray(values * (length / np.linalg.norm(values)))


# --- rotation ---------------------------------------------------------------------------------------------------


def orders(limit: int) -> list[int]:
    """All orders of rotations up to a limit: a power of two times up to three of 12, 20, 28, 44."""
    products = {math.prod(some) for count in range(4) for some in itertools.product((12, 20, 28, 44), repeat=count)}
    return sorted({product << bits for product in products for bits in range(30) if product << bits <= limit})


@pytest.mark.parametrize("order", [12, 20, 28, 44])
def test_the_small_matrices_are_symmetric_hadamard_matrices(order: int) -> None:
    matrix = rotation.paley(order)
    assert (np.abs(matrix) == 1).all()
    assert (matrix == matrix.T).all()
    assert (matrix @ matrix == order * np.eye(order)).all()


@pytest.mark.parametrize("order", orders(2048))
def test_every_order_is_a_symmetric_matrix_of_signs_with_orthogonal_rows(order: int) -> None:
    """Flatness, lengths and the inverse rest on this alone: all in whole numbers, so exact."""
    matrix = np.zeros((order, order))
    for row in range(order):
        matrix[row, row] = 1.0
        rotation.transform(matrix[row])
    assert (np.abs(matrix) == 1).all()
    assert (matrix == matrix.T).all()
    assert (matrix @ matrix == order * np.eye(order)).all()


@pytest.mark.parametrize("bits", range(12))
def test_powers_of_two_have_the_walsh_hadamard_matrix(bits: int) -> None:
    values = np.random.default_rng(bits).normal(size=1 << bits)
    before = values.copy()
    rotation.transform(values)
    np.testing.assert_allclose(values, linalg.hadamard(1 << bits) @ before, atol=1e-12 * 2 ** (bits / 2))


@pytest.mark.parametrize(("dtype", "error"), [(np.float64, 1e-12), (np.float32, 1e-4)])
@pytest.mark.parametrize("order", [1, 2, 12, 20, 28, 44, 528, 4096, 15680])
def test_the_transform_is_its_own_inverse_in_place(order: int, dtype: Any, error: float) -> None:
    values = np.random.default_rng(order).normal(size=order).astype(dtype)
    before, kept = values.astype(np.float64), values
    rotation.transform(values)
    assert kept is values
    rotation.transform(values)
    np.testing.assert_allclose(values, before * order, atol=error * order)


@given(st.one_of(st.integers(1, 3000), st.integers(3000, 10**8)))
@settings(max_examples=300, deadline=None)
def test_the_least_order_that_holds_a_vector_is_taken(size: int) -> None:
    found = rotation.padded(size)
    every = orders(2 * size)
    assert found == min(order for order in every if order >= size)
    assert size < 30_000 or found <= 1.065 * size


def test_a_million_coordinates_are_padded_by_less_than_half_a_percent() -> None:
    assert rotation.padded(1_000_000) == 20 * 28 * 28 * 2**6 == 1_003_520


def test_integers_are_transformed_exactly() -> None:
    values = np.random.default_rng(1).integers(-(2**20), 2**20, 1 << 15).astype(np.float64)
    before = values.copy()
    rotation.transform(values)
    rotation.transform(values)
    assert (values == before * (1 << 15)).all()


@pytest.mark.parametrize(
    "values",
    [np.zeros(3), np.zeros(0), np.zeros((2, 2)), np.zeros(4, np.int64), np.zeros(8)[::2], np.zeros(4, np.float16)],
)
def test_other_vectors_are_not_transformed(values: Any) -> None:
    with pytest.raises(ValueError, match=r"values: (must be|there is no rotation of order 3; the next is 4)"):
        rotation.transform(values)


def test_signs_are_the_bits_of_the_stated_stream() -> None:
    key = hashlib.sha256(b"privfed rotation signs v1\0" + SEED).digest()
    block = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(16))
    expected = [1 - 2 * (block[i // 8] >> (7 - i % 8) & 1) for i in range(128)]
    assert rotation.signs(SEED, 128).tolist() == expected
    assert rotation.signs(SEED, 77).tolist() == expected[:77]
    with pytest.raises(ValueError, match="seed: must be 32 bytes"):
        rotation.signs(b"short", 8)


@given(st.integers(1, 700), st.integers(0, 2**32 - 1), st.sampled_from([np.float32, np.float64]))
@settings(max_examples=60, deadline=None)
def test_rotation_keeps_length_and_is_undone(size: int, label: int, dtype: Any) -> None:
    values = unit(label, size).astype(dtype)
    rotated = rotation.rotate(values, SEED, 3.0)
    error = 1e-5 if dtype == np.float32 else 1e-13
    assert rotated.dtype == dtype
    assert rotated.size == rotation.padded(size)
    assert np.linalg.norm(rotated) == pytest.approx(3.0, rel=error)
    np.testing.assert_allclose(rotation.unrotate(rotated, SEED, size, 1 / 3), values, atol=error)


@pytest.mark.parametrize("size", [4096, 4032, 4480, 5632])
def test_rotation_flattens_the_spikes(size: int) -> None:
    assert rotation.padded(size) == size
    spike = np.zeros(size)
    spike[[17, 18, 900]] = 1.0
    rotated = rotation.rotate(spike, SEED)
    # Each coordinate is a sum of three signs over the root of the order: it has four values and no others.
    steps = rotated * math.sqrt(size)
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-9)
    assert set(np.rint(steps).tolist()) == {-3.0, -1.0, 1.0, 3.0}


def test_a_vector_of_another_length_is_not_rotated_back() -> None:
    rotated = rotation.rotate(np.ones(4000), SEED)
    with pytest.raises(ValueError, match="padded to 4032"):
        rotation.unrotate(rotated[:2048].copy(), SEED, 4000)


@pytest.mark.parametrize("size", [700, 30_000])
def test_short_floats_move_a_coordinate_by_little(size: int) -> None:
    exact = rotation.rotate(unit(1, size), SEED, 1e6)
    short = rotation.rotate(unit(1, size), SEED, 1e6, np.float32)
    assert short.dtype == np.float32
    wide = math.sqrt(np.mean(exact**2))
    # At the widest update in short floats, 2^15 steps, this is less than 2^-4 of a step, and 2^-7 in the mean.
    assert np.abs(short - exact).max() < 2.0**-19 * wide
    assert math.sqrt(np.mean((short - exact) ** 2)) < 2.0**-22 * wide


@pytest.mark.parametrize(("scale", "kind"), [(2.0**15 * math.sqrt(112), np.float32), (2.0**16 * 11, np.float64)])
def test_updates_are_rotated_in_short_floats_where_a_step_is_wide(scale: float, kind: Any) -> None:
    found = parameters(scale=scale, bits=40)
    assert found.padded == 112
    assert found._floats == kind
    rotated = rotation.rotate(unit(1, 100, 0.9), SEED, scale)
    assert np.abs(found.round_update(unit(1, 100, 0.9), SEED) - rotated).max() < 1 + 2.0**-4


@pytest.mark.parametrize("bits", [12, 20, 32, 40])
def test_sums_are_rotated_back_in_short_floats_where_noise_is_wider(bits: int) -> None:
    loud = solve_noise(clip=1.0, noise_multiplier=0.5, nodes=30, dimension=777, bits=bits)
    quiet = replace(loud, noise_multiplier=2.0**-20)
    assert (loud._sum_floats, quiet._sum_floats) == (np.float32, np.float64)
    total = np.add.reduce([loud.encode(unit(node, 777, 0.9), SEED) for node in range(30)], dtype=np.uint64)
    total &= np.uint64(2**bits - 1)
    moved = loud.decode(total, SEED, 30) - quiet.decode(total, SEED, 30)
    assert np.abs(moved).max() < 2.0**-7 * loud.noise_multiplier * loud.clip


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


# --- parameters -------------------------------------------------------------------------------------------------


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
