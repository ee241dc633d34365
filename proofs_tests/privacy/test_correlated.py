"""Correlated noise: streams compute C g and C^-1 w, sensitivities hold for every pattern of participation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.privacy.correlated import (
    Banded,
    Correlation,
    Tree,
    noise_in_steps,
    row_sensitivity,
    sensitivity,
)

bands = st.lists(st.floats(-1, 1), max_size=4).map(lambda rest: Banded((1.0, *rest)))
correlations = st.one_of(bands, st.just(Tree()))


def run(correlation: Correlation, sums: np.ndarray, noise: np.ndarray, restart: bool) -> np.ndarray:
    stream, releases = correlation.stream(sums.shape[1]), []
    for number, (total, drawn) in enumerate(zip(sums, noise, strict=True), start=1):
        row = stream.encode(number, total)
        releases.append(stream.decode(number, total, row + drawn))
        if restart:
            fresh = correlation.stream(sums.shape[1])
            fresh.load(number, stream.save())
            stream = fresh
    return np.array(releases)


@settings(max_examples=150, deadline=None)
@given(correlation=correlations, rounds=st.integers(1, 17), restart=st.booleans(), seed=st.integers(0, 99))
def test_a_stream_is_its_matrix(correlation: Correlation, rounds: int, restart: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sums, noise = rng.normal(size=(2, rounds, 3))
    matrix = correlation.encoder(rounds)
    assert np.array_equal(np.diag(matrix), np.ones(rounds))
    assert not np.triu(matrix, 1).any()
    expected = sums + np.linalg.solve(matrix, noise)
    scale = max(1.0, np.abs(expected).max())
    assert np.allclose(run(correlation, sums, noise, restart) / scale, expected / scale, atol=1e-8)


@settings(max_examples=60, deadline=None)
@given(correlation=correlations, rounds=st.integers(1, 7), separation=st.integers(1, 8), seed=st.integers(0, 99))
def test_the_sensitivity_holds_for_every_pattern(
    correlation: Correlation, rounds: int, separation: int, seed: int
) -> None:
    """All patterns of participation, contributions in one direction with all signs, and random directions."""
    matrix, bound = correlation.encoder(rounds), sensitivity(correlation, rounds, separation)
    rng = np.random.default_rng(seed)
    worst = 0.0
    for pattern in itertools.product((0, 1), repeat=rounds):
        chosen = np.flatnonzero(pattern)
        if chosen.size and chosen.size > 1 and np.diff(chosen).min() < separation:
            continue
        for signs in itertools.product((-1.0, 1.0), repeat=len(chosen)):
            vector = np.zeros(rounds)
            vector[chosen] = signs
            worst = max(worst, float(np.linalg.norm(matrix @ vector)))
        directions = rng.normal(size=(rounds, 3))
        directions *= np.array(pattern)[:, None] / np.linalg.norm(directions, axis=1, keepdims=True)
        assert np.linalg.norm(matrix @ directions) <= bound * (1 + 1e-12)
        for row in matrix:
            assert np.linalg.norm(row @ directions) <= row_sensitivity(row, separation) * (1 + 1e-12)
    assert worst <= bound * (1 + 1e-12)


@pytest.mark.parametrize(
    ("correlation", "rounds", "separation", "value"),
    [
        (Banded((1.0,)), 9, 9, 1.0),
        (Banded((1.0,)), 9, 3, math.sqrt(3)),
        (Banded((1.0, 0.5)), 8, 8, math.sqrt(1.25)),
        (Banded((1.0, 0.5)), 8, 2, math.sqrt(4 * 1.25)),
        (Tree(), 8, 8, 2.0),
        (Tree(), 16, 16, math.sqrt(5)),
        (Tree(), 1, 1, 1.0),
    ],
)
def test_known_sensitivities(correlation: Correlation, rounds: int, separation: int, value: float) -> None:
    assert sensitivity(correlation, rounds, separation) == pytest.approx(value, rel=1e-12)


def test_square_root_coefficients_multiply_to_prefix_sums() -> None:
    matrix = Banded.square_root(20).encoder(20)
    assert np.allclose(matrix @ matrix, np.tril(np.ones((20, 20))), atol=1e-12)


def test_correlated_noise_leaves_less_in_the_sum_than_independent_noise() -> None:
    """The variance of the last prefix sum, at equal price for one participation: exact, from the matrices."""
    rounds = 64
    ones = np.ones(rounds)
    spread = {}
    for name, correlation in {"none": Banded((1.0,)), "band": Banded.square_root(32), "tree": Tree()}.items():
        decoder = np.linalg.inv(correlation.encoder(rounds))
        spread[name] = sensitivity(correlation, rounds, rounds) * float(np.linalg.norm(ones @ decoder))
    assert spread["none"] == pytest.approx(8.0)
    assert spread["band"] < 0.6 * spread["none"]
    assert spread["tree"] < 0.6 * spread["none"]


def test_rounding_is_paid_for() -> None:
    whole = sensitivity(Banded((1.0, 0.5)), 10, 10)
    multiplier = noise_in_steps(Banded((1.0, 0.5)), 10, 10)
    assert multiplier(2.0, 1_000, 0.0) >= 2.0 * whole
    assert multiplier(2.0, 1_000, 1e-3) >= 2.0 * (whole + math.sqrt(10 * 1_000) * 1e-3)
    with pytest.raises(ValueError, match="step"):
        multiplier(2.0, 10, math.nan)


def test_bad_arguments_and_states_are_named() -> None:
    for coefficients in ((), (0.5,), (1.0, math.nan)):
        with pytest.raises(ValueError, match="coefficients"):
            Banded(coefficients)
    with pytest.raises(ValueError, match="rounds"):
        sensitivity(Tree(), 5_000, 1)
    for correlation in (Tree(), Banded((1.0, 0.5))):
        stream = correlation.stream(2)
        with pytest.raises(ValueError, match="cannot follow"):
            stream.encode(2, np.zeros(2))
        stream.decode(1, np.zeros(2), np.zeros(2))
        saved = stream.save()
        with pytest.raises(ValueError, match="saved"):
            correlation.stream(3).load(1, saved)
        with pytest.raises(ValueError, match="saved"):
            correlation.stream(2).load(1, {})
        with pytest.raises(ValueError, match="saved"):
            correlation.stream(2).load(1, {name: rows * math.nan for name, rows in saved.items()})
