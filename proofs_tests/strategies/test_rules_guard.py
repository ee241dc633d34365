"""What rules do with rows that hold nonsense, inputs of every form, and numbers of rows that promise nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.strategies import rules
from privfed.strategies.compiled import TOGETHER
from privfed.strategies.gram import combine, gram
from privfed.strategies.matrix import as_matrix
from privfed.strategies.sums import COLUMNS

# foolsgold withstands what all attackers send alike, as they do here
ROBUST = sorted([*(name for name, law in rules.LAWS.items() if law.robust), "foolsgold"])
VALUES = [np.nan, np.inf, -np.inf, 1e20, -1e20, 1e38, 3e4]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", ROBUST)
def test_the_grid_of_bad_values(name: str, value: float, everywhere: bool, dtype: type) -> None:
    law, f = rules.LAWS[name], 2
    honest = np.random.default_rng(1).standard_normal((max(law.least(f), 12) - f, 30))
    bad = np.zeros((f, 30))
    if everywhere:
        bad[:] = value
    else:
        bad[:, 7] = value
    X = np.vstack([honest[:1], bad, honest[1:]]).astype(dtype)
    out = law.apply(X, f)
    spread = np.linalg.norm(honest - honest.mean(axis=0), axis=1).max()
    assert out.dtype == dtype
    assert np.linalg.norm(out - honest.mean(axis=0)) <= 2 * spread


@pytest.mark.parametrize("name", sorted(rules.LAWS))
def test_more_bad_rows_than_f_are_refused_by_name(name: str) -> None:
    law, f = rules.LAWS[name], 2
    X = np.random.default_rng(1).standard_normal((max(law.least(f), 12), 5)).astype(np.float32)
    X[2 : len(X) // 2 + 3, 1] = np.nan
    if name == "fltrust":  # tolerates all rows but one, while the server's own is sound
        X[1:] = np.nan
        np.testing.assert_allclose(law.apply(X, f), X[0], rtol=1e-6)
        X[0] = np.nan
        with pytest.raises(ValueError, match="server is not finite"):
            law.apply(X, f)
        return
    with pytest.raises(rules.Refusal, match=r"row 2 is NaN"):
        law.apply(X, f)


def test_a_mean_refuses_one_bad_row_and_says_which() -> None:
    X = np.ones((4, 3), np.float32)
    for value, words in ((np.nan, "row 1 is NaN"), (np.inf, "row 1 is infinite"), (1e20, "row 1 exceeds")):
        X[1, 2] = value
        with pytest.raises(rules.Refusal, match=words):
            rules.weighted_mean(X, [1, 2, 3, 4])


def test_screen_reports_and_counts() -> None:
    X = np.ones((6, 3), np.float32)
    X[1, 0], X[4, 2], X[5, 1] = np.nan, np.inf, -1e20
    found = rules.screen(X, 4)
    assert [e.index for e in found.excluded] == [1, 4, 5]
    assert [e.reason.split()[1] for e in found.excluded] == ["NaN", "infinite", "1.44e+17"]
    assert (found.f, found.kept) == (1, (0, 2, 3))
    np.testing.assert_array_equal(rules.trimmed_mean(found, 4), [1, 1, 1])
    assert rules.screen(found, 3) is found
    assert len(rules.screen(np.array([[1.0], [5.0]]), 1, largest=2.0).excluded) == 1
    with pytest.raises(rules.Refusal, match="3 of 6 rows"):
        rules.screen(X, 2)


def test_exclusion_lowers_f_so_that_preconditions_still_hold() -> None:
    X = np.random.default_rng(0).standard_normal((11, 8)).astype(np.float32)  # 2f + 3 with f = 4
    X[3] = np.nan
    clean = np.delete(X, 3, axis=0)
    np.testing.assert_array_equal(rules.krum(X, 4), rules.krum(clean, 3))


def test_distances_of_updates_far_smaller_than_the_weights() -> None:
    rng = np.random.default_rng(0)
    d = 20_000
    weights = rng.standard_normal(d)
    updates = rng.standard_normal((12, d)) * 1e-4 / 3
    X = (weights + updates).astype(np.float32)
    exact = X.astype(np.float64)
    true = ((exact[:, None] - exact[None]) ** 2).sum(axis=2)
    off = ~np.eye(12, dtype=bool)
    for center in (None, weights.astype(np.float32)):
        D = gram(as_matrix(X), center).distance
        assert (np.abs(np.sqrt(D[off]) / np.sqrt(true[off]) - 1) < 1e-4).all()
        assert np.array_equal(D, D.T)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 17, 128, 129])  # products go by panels of eight rows up to 128
def test_inner_products_are_right_at_the_edges_of_panels(n: int, dtype: type) -> None:
    X = np.random.default_rng(n).standard_normal((n, 8_192 + 200)).astype(dtype)
    exact = X.astype(np.float64)
    G = gram(as_matrix(X))
    np.testing.assert_allclose(G.origin, exact @ exact.T, atol=1e-2 if dtype == np.float32 else 1e-9)
    assert (G.origin == G.origin.T).all()


@pytest.mark.parametrize("column", [0, 1_151, 1_152, 8_191, 8_192, 8_391])
@pytest.mark.parametrize("row", [0, 8, 39])
def test_a_bad_number_is_found_in_every_part_of_a_gram_matrix_and_of_a_sum(row: int, column: int) -> None:
    X = np.random.default_rng(2).standard_normal((40, 8_192 + 200)).astype(np.float32)
    X[row, column] = np.nan
    np.testing.assert_array_equal(rules.multi_krum(X, 8), rules.multi_krum(np.delete(X, row, axis=0), 7, 32))
    with pytest.raises(rules.Refusal, match=f"row {row} is NaN"):
        rules.mean(X)


@pytest.mark.parametrize("about", [0.0, 1e4])
@pytest.mark.parametrize("n", [1, 2, TOGETHER - 1, TOGETHER, TOGETHER + 1, 3 * TOGETHER, 100])
def test_a_weighted_sum_keeps_its_digits_at_every_number_of_rows(n: int, about: float) -> None:
    rng = np.random.default_rng(n)
    X = (rng.standard_normal((n, 500)) + about).astype(np.float32)
    weights = rng.uniform(0.5, 2.0, n)
    share = weights / weights.sum()
    exact = share @ X.astype(np.float64)
    bound = 1.01 * 2.0**-24 * np.abs(exact) + 1e-12 * about + 1e-14
    for found in (
        rules.weighted_mean(X, weights),
        rules.weighted_mean(list(X), weights),
        combine(as_matrix(X), share),
        combine(as_matrix(X), share, np.full(500, about)),
    ):
        assert found.dtype == np.float32
        assert (np.abs(found - exact) <= bound).all()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    data=st.data(),
    n=st.integers(1, 3 * TOGETHER),
    kind=st.sampled_from([np.float16, np.float32, np.float64]),
    about=st.sampled_from([None, 0.0, 1.0, 1e6]),
)
def test_a_sum_is_right_whatever_cancels_in_it(data: Any, n: int, kind: type, about: float | None) -> None:
    """Beside the exact sum: half a last digit of the result, and (n + 2) 2^-53 of what was added."""
    largest = 2.0**15 if kind == np.float16 else 2.0**56
    width = {np.float16: 16, np.float32: 32, np.float64: 64}[kind]
    numbers = st.floats(-largest, largest, width=width, allow_nan=False)
    column = data.draw(st.lists(numbers, min_size=n, max_size=n))
    column += [-value for value in column] * data.draw(st.booleans())  # nothing is left but what comes next
    column += data.draw(st.lists(st.floats(-1, 1, width=width), max_size=3))
    weights = data.draw(st.lists(st.floats(0.25, 4), min_size=len(column), max_size=len(column)))
    X = np.array(column, kind)[:, None]
    share = np.array(weights) / np.array(weights).sum()
    found = (
        rules.weighted_mean(X, share)
        if about is None
        else combine(as_matrix(X), share, np.array([about], as_matrix(X).work))
    )
    o = 0.0 if about is None else about
    terms = [float(w) * (float(x) - o) for w, x in zip(share, column, strict=True)]
    exact = math.fsum([o, *terms])
    slack = (len(column) + 3) * 2.0**-52 * (math.fsum(map(abs, terms)) + abs(o))
    work = as_matrix(X).work
    rounded = {work} if about is not None else {work, X.dtype}
    half = sum(0.5 * float(np.spacing(np.array(abs(exact) * (1 + 1e-9), kind))) for kind in rounded)
    assert abs(float(found[0]) - exact) <= half + slack


def test_a_small_row_between_two_large_ones_counts() -> None:
    X = np.zeros((3, 4), np.float32)
    X[:, 1:] = np.float32([[1e8], [1], [-1e8]])
    np.testing.assert_array_equal(rules.mean(X), np.float32([0, 1 / 3, 1 / 3, 1 / 3]))
    many = np.repeat(X, 40, axis=0)
    np.testing.assert_allclose(rules.mean(many), np.float32([0, 1 / 3, 1 / 3, 1 / 3]), rtol=1e-6)


@pytest.mark.parametrize("large", [1e18, 1e20, 3e38])
def test_huge_rows_that_cancel_are_still_found(large: float) -> None:
    X = np.ones((3, 5), np.float32)
    X[0, 3], X[2, 3] = large, -large
    with pytest.raises(rules.Refusal, match="row 0 exceeds"):
        rules.mean(X)


@pytest.mark.parametrize("about", [0.0, 3e4])
@pytest.mark.parametrize("mixing", [False, True])
def test_a_geometric_median_near_and_far_from_the_origin_keeps_its_digits(about: float, mixing: bool) -> None:
    X = (np.random.default_rng(4).standard_normal((20, 400)) + about).astype(np.float32)
    X[3] += 1e3
    rows, exact = (rules.lazy_mixing(Y, 4) if mixing else Y for Y in (X, X.astype(np.float64)))
    found, right = rules.geometric_median(rows), rules.geometric_median(exact)
    assert np.abs(found - right).max() <= 2.0**-23 * np.abs(right).max() + 2e-5


def test_an_outlier_does_not_spoil_the_distances_of_others() -> None:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((10, 5000)).astype(np.float32)
    X += 100
    X[0] = 1e15
    X[4] = X[5] + np.float32(1e-3) * rng.standard_normal(5000).astype(np.float32)  # a tight pair
    X[6] = X[7]
    exact = X.astype(np.float64)
    true = ((exact[:, None] - exact[None]) ** 2).sum(axis=2)
    found = gram(as_matrix(X))
    off = true > 0
    assert (np.abs(np.sqrt(found.distance[off]) / np.sqrt(true[off]) - 1) < 1e-4).all()
    assert found.distance[6, 7] == 0
    assert found.medoid != 0


def test_attackers_ten_times_farther_are_not_picked_among_large_weights() -> None:
    rng = np.random.default_rng(2)
    d = 10_000
    weights = 3 * rng.standard_normal(d)
    for _ in range(5):
        updates = rng.standard_normal((12, d)) * 1e-4
        updates[:2] *= 10
        X = (weights + updates).astype(np.float32)
        w = rules.multi_krum_weights(gram(as_matrix(X)), 2, 6)
        assert (w[:2] == 0).all()


def test_every_form_of_input_gives_its_own_form_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((7, 6)).astype(np.float32)
    path = tmp_path / "rows.bin"
    X.tofile(path)
    mapped = np.memmap(path, dtype=np.float32, mode="r", shape=(7, 6))
    layers = [[row[:2].reshape(1, 2), row[2:].reshape(2, 2)] for row in X]
    for rule in (
        rules.median,
        lambda X: rules.krum(X, 1),
        rules.geometric_median,
        rules.mean,
        lambda X: rules.bulyan(X, 1),
    ):
        flat = rule(X)
        assert flat.dtype == np.float32
        for form in (list(X), mapped, X[:, ::-1][:, ::-1], np.asfortranarray(X)):
            np.testing.assert_allclose(rule(form), flat, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(rule(X.reshape(7, 2, 3)), flat.reshape(2, 3), rtol=1e-6, atol=1e-7)
        first, second = rule(layers)
        assert (first.shape, second.shape) == ((1, 2), (2, 2))
        np.testing.assert_allclose(np.concatenate([first.ravel(), second.ravel()]), flat, rtol=1e-6, atol=1e-7)
        half = rule(X.astype(np.float16))
        assert half.dtype == np.float16
        np.testing.assert_allclose(half, flat, rtol=1e-2, atol=1e-2)
        assert rule(X.tolist()).dtype == np.float64
    assert rules.median(np.array([[1, 4], [3, 2], [2, 9]])).dtype == np.float64
    made = rules.nearest_neighbor_mixing(layers, 1)
    assert [layer.shape for layer in made[0]] == [(1, 2), (2, 2)]
    assert rules.median([np.array(1.0), np.array(3.0), np.array(2.0)]).shape == ()
    assert np.ndim(rules.median(np.array([1.0, 3.0, 2.0]))) == 0


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_rows_in_pieces_give_what_one_array_gives_and_stay_as_they_are(kind: type) -> None:
    """Pieces end inside of blocks, at their edges and across several."""
    sizes = (3, COLUMNS - 3, 5, 2 * COLUMNS, 700)
    X = np.random.default_rng(6).standard_normal((11, sum(sizes))).astype(kind)
    pieces = [np.split(row.copy(), np.cumsum(sizes)[:-1]) for row in X]
    for rule in (
        rules.mean,
        rules.median,
        rules.geometric_median,
        lambda X: rules.trimmed_mean(X, 2),
        lambda X: rules.multi_krum(X, 2),
        lambda X: rules.bulyan(X, 2),
    ):
        found = np.concatenate(rule(pieces))
        assert found.dtype == kind
        np.testing.assert_array_equal(found, rule(list(X)))
        np.testing.assert_allclose(found, rule(X), rtol=2e-3 if kind == np.float16 else 1e-6, atol=1e-7)
    np.testing.assert_array_equal(np.stack([np.concatenate(row) for row in pieces]), X)


def test_inputs_are_not_changed() -> None:
    X = np.random.default_rng(0).standard_normal((11, 50)).astype(np.float32)
    kept = X.copy()
    for law in rules.LAWS.values():
        law.apply(X, 2)
    rules.arc(X, 2), rules.clipping(X, 1.0), rules.bucketing(X, 2, np.random.default_rng(0))
    np.testing.assert_array_equal(X, kept)


def test_claimed_weights_can_be_capped() -> None:
    X = np.array([[0.0], [0.0], [0.0], [10.0]])
    assert rules.weighted_mean(X, [1, 1, 1, 10**9])[0] > 9.9
    assert rules.weighted_mean(X, [1, 1, 1, 10**9], cap=1.0)[0] == 2.5


def test_ties_go_to_the_lowest_index() -> None:
    X = np.arange(5.0)[:, None]  # scores 5, 2, 2, 2, 5
    assert rules.krum_weights(X @ X.T, 1).argmax() == 1
    np.testing.assert_array_equal(rules.krum(np.array([[2.0], [2.0], [2.0], [2.0], [2.0]]), 1), [2.0])
    assert rules.krum_weights(np.zeros((5, 5)), 1).argmax() == 0
    np.testing.assert_array_equal(np.flatnonzero(rules.cge_weights(np.eye(5), 2)), [0, 1, 2])


def test_a_radius_without_end_clips_nothing() -> None:
    X = np.random.default_rng(0).standard_normal((7, 9))
    np.testing.assert_allclose(rules.centered_clipping(X, math.inf, steps=3), X.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(rules.norm_bounding(X, math.inf), X.mean(axis=0), atol=1e-12)


@pytest.mark.parametrize("weight", [5e-324, 1e-300, 1e308])
def test_weights_of_any_size_are_shares(weight: float) -> None:
    X = np.array([[1.0], [2.0], [6.0]])
    np.testing.assert_allclose(rules.weighted_mean(X, [weight] * 3), [3.0])
    np.testing.assert_allclose(rules.weighted_mean(X, [weight, 0, 0]), [1.0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("where", ["update", "history", "both", "screened"])
def test_foolsgold_leaves_out_a_client_whose_update_or_history_is_unusable(where: str, bad: float) -> None:
    rng = np.random.default_rng(2)
    X, past = (rng.standard_normal((9, 40)).astype(np.float32) for _ in range(2))
    expected = rules.foolsgold(np.delete(X, 4, axis=0), np.delete(past, 4, axis=0))
    if where != "history":
        X[4, 3] = bad
    if where in ("history", "both"):
        past[4] = bad
    given = rules.screen(X, 3) if where == "screened" else X
    np.testing.assert_array_equal(rules.foolsgold(given, past), expected)
    past[:] = bad
    with pytest.raises(rules.Refusal, match="rows cannot be used"):
        rules.foolsgold(given, past)


def test_one_that_resembles_nobody_counts_in_full_with_foolsgold() -> None:
    X = np.random.default_rng(2).standard_normal((9, 400))
    X[4] *= 1e6
    assert not rules.LAWS["foolsgold"].robust
    assert np.linalg.norm(rules.foolsgold(X)) > 1e5


@pytest.mark.parametrize("value", [30.0, 1e15])
@pytest.mark.parametrize("column", [0, 4_321, 9_999])
def test_nobody_hides_from_dnc_in_coordinates_that_are_seldom_drawn(value: float, column: int) -> None:
    honest = np.random.default_rng(3).standard_normal((14, 10_000)).astype(np.float32)
    X = np.vstack([honest, np.zeros((2, 10_000), np.float32)])
    X[14:, column] = value * 10
    out = rules.dnc(X, 2, rng=np.random.default_rng(0), dimension=50, iterations=2)
    assert abs(out[column]) < 5
    assert np.linalg.norm(out - honest.mean(axis=0)) < np.linalg.norm(honest[0] - honest.mean(axis=0))


@pytest.mark.parametrize(("kind", "power"), [(np.float32, -20), (np.float64, -159)])
def test_distances_are_right_down_to_the_documented_length(kind: type, power: int) -> None:
    for seed in range(10):
        X = np.random.default_rng(seed).standard_normal((11, 30))
        found = gram(as_matrix((X * 10.0**power).astype(kind))).distance / 10.0**power / 10.0**power
        exact = ((X[:, None] - X[None]) ** 2).sum(axis=-1)
        assert np.abs(found - exact).max() <= 1e-4 * exact.max()
