"""Networks and windows of ranks: every rank, every number of rows, and sums that lose nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.strategies import rules
from privfed.strategies.coordinate import around
from privfed.strategies.matrix import as_matrix
from privfed.strategies.network import NETWORK_ROWS, comparators, program, run_program


def zeros_and_ones(n: int) -> Any:
    """Return what decides whether a network sorts: every input of zeros and ones for few rows, else random ones."""
    if n <= 12:
        return (np.arange(1 << n) >> np.arange(n)[:, None] & 1).astype(np.float32)
    rng = np.random.default_rng(n)
    return (rng.random((n, 3000)) < rng.random(3000)).astype(np.float32)


@pytest.mark.parametrize("n", [*range(1, 13), 17, 20, 33, 50, NETWORK_ROWS])
def test_a_pruned_network_gives_the_ranks_it_is_for(n: int) -> None:
    X = zeros_and_ones(n)
    kept, ranked = X.copy(), np.sort(X, axis=0)
    wanted = [tuple(range(f, n - f)) for f in range((n + 1) // 2)] + [(r,) for r in range(n)]
    for ranks in wanted[:: max(1, n // 12)]:
        for together in (False, True):
            made = program(n, ranks, together)
            scratch = np.full((made.scratch, X.shape[1]), np.nan, np.float32)
            run_program(made, X, scratch)
            found = scratch[: len(ranks)]
            np.testing.assert_array_equal(np.sort(found, axis=0) if together else found, ranked[list(ranks)])
            assert made.scratch <= n + 1
    np.testing.assert_array_equal(X, kept)


def test_a_network_that_lacks_a_comparator_is_noticed() -> None:
    whole = comparators(6, tuple(range(6)))
    for left_out in range(len(whole)):
        values = zeros_and_ones(6)
        for a, b, _, _ in whole[:left_out] + whole[left_out + 1 :]:
            values[a], values[b] = np.minimum(values[a], values[b]), np.maximum(values[a], values[b])
        assert (np.diff(values, axis=0) < 0).any()


@pytest.mark.parametrize("n", [5, 9, 12, NETWORK_ROWS + 1])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), ties=st.booleans(), single=st.booleans())
def test_a_window_about_a_middle_holds_what_is_nearest(n: int, seed: int, ties: bool, single: bool) -> None:
    rng = np.random.default_rng(seed)
    scales = 10.0 ** rng.integers(-3, 3, n)[:, None]
    drawn = rng.integers(-3, 4, (n, 30)) if ties else rng.standard_normal((n, 30)) * scales
    # in float32 the last digit may say which of two is nearer, unless values are few
    X = drawn.astype(np.float32 if ties and single else np.float64)
    f = int(rng.integers(0, (n + 1) // 2))
    keep = int(rng.integers(1, n + 1))
    ranked = np.sort(X.astype(np.float64), axis=0)  # the lower of two equally near values comes first
    references = {"median": np.median(ranked, axis=0), "trimmed": ranked[f : n - f].mean(axis=0)}
    for name, middle in references.items():
        if name == "trimmed" and ties:
            continue  # what is equally near is for the last digit of the mean to say
        nearest = np.argsort(np.abs(ranked - middle), axis=0, kind="stable")[:keep]
        exact = np.take_along_axis(ranked, nearest, axis=0).mean(axis=0)
        found = around(as_matrix(X), keep, name, f)
        np.testing.assert_allclose(found, exact, rtol=1e-6 if single else 1e-9, atol=1e-12 * np.abs(ranked).max())


@pytest.mark.parametrize("n", [2, 6, NETWORK_ROWS + 2])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_least_and_the_largest_numbers_that_are_let_in_have_a_median(n: int, dtype: type) -> None:
    for value in (np.finfo(dtype).smallest_subnormal, 2.0**57):
        X = np.full((n, 3), value, dtype)
        np.testing.assert_array_equal(rules.median(X), X[0])
        np.testing.assert_array_equal(rules.trimmed_mean(X, (n - 1) // 2), X[0])


@pytest.mark.parametrize("n", [7, 20, NETWORK_ROWS + 3])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), decades=st.integers(0, 16), f=st.integers(0, 3))
def test_means_of_ranks_are_those_of_float64_however_far_apart_values_lie(
    n: int, seed: int, decades: int, f: int
) -> None:
    rng = np.random.default_rng(seed)
    X = (rng.standard_normal((n, 20)) * 10.0 ** rng.uniform(-decades, 0, (n, 20)) * 10.0 ** (decades / 2)).astype(
        np.float32
    )
    X[: n // 2] = -X[n - n // 2 :] + X[: n // 2] * np.float32(1e-6)  # all but cancels
    found = rules.trimmed_mean(X, f)
    for column, value in zip(np.sort(X, axis=0).T.astype(np.float64), found, strict=True):
        kept = column[f : n - f]
        exact = math.fsum(kept) / len(kept)
        assert abs(value - exact) <= 2.0**-23 * abs(exact) + n * 2.0**-52 * np.abs(kept).max() + 2.0**-149
