"""Rotations by Hadamard matrices: exact on integers, undone to the last bits, flat on spikes, with the stated signs."""

from __future__ import annotations

import hashlib
import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg

from privfed.privacy import rotation
from privfed.privacy.distributed import solve_noise
from proofs_tests.privacy.noise_case import SEED, parameters, unit


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
