"""What rules and their parts refuse: by name, with the numbers, before they touch a row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from privfed.strategies import rules


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda X: rules.krum(X, 2), r"krum needs n >= 2f \+ 3 = 7 .* got n = 6"),
        (lambda X: rules.multi_krum(X, 2, 3), r"multi_krum needs n >= 2f \+ 3 = 7"),
        (lambda X: rules.bulyan(X, 1), r"bulyan needs n >= 4f \+ 3 = 7"),
        (lambda X: rules.trimmed_mean(X, 3), r"trimmed_mean needs n >= 2f \+ 1 = 7"),
        (lambda X: rules.meamed(X, 3), "2f"),
        (lambda X: rules.phocas(X, 3), "2f"),
        (lambda X: rules.median(X, 3), "2f"),
        (lambda X: rules.geometric_median(X, 3), "2f"),
        (lambda X: rules.minimum_diameter_mean(X, 3), "2f"),
        (lambda X: rules.nearest_neighbor_mixing(X, 3), "2f"),
        (lambda X: rules.cge(X, 3), "2f"),
        (lambda X: rules.smea(X, 3), "2f"),
        (lambda X: rules.caf(X, 3), "2f"),
        (lambda X: rules.arc(X, 3), "2f"),
        (lambda X: rules.multi_krum(X, 1, 7), "keep = 7 with n = 6"),
        (lambda X: rules.multi_krum(X, 1, 0), "keep = 0"),
        (lambda X: rules.krum(X, 1, neighbours=6), "neighbours = 6"),
        (lambda X: rules.krum(X, 99), "= 201"),
        (lambda X: rules.smea(X, 2, budget=3), "use caf"),
        (lambda X: rules.mean_around(X, 0.0, 7), "keep = 7"),
    ],
)
def test_preconditions_say_the_numbers(call: Any, words: str) -> None:
    with pytest.raises(rules.Refusal, match=words):
        call(np.random.default_rng(0).standard_normal((6, 4)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: rules.trimmed_mean(np.ones((5, 2)), 0.2), "f must be a whole number"),
        (lambda: rules.trimmed_mean(np.ones((5, 2)), -1), "f must be"),
        (lambda: rules.trimmed_mean(np.ones((5, 2)), True), "f must be"),
        (lambda: rules.median([]), "no rows"),
        (lambda: rules.median(np.float32(3)), "'numpy.float32' object is not iterable|at least one row"),
        (lambda: rules.median([np.ones(3), np.ones(4)]), "row 1 of X has shape"),
        (lambda: rules.median([np.ones(3, np.float32), np.ones(3, np.float16)]), "row 1 of X .* float16"),
        (lambda: rules.median([[1.0, 2.0], [1.0]]), "row 1 has 1 entries, row 0 has 2"),
        (lambda: rules.median([[np.ones(2)], [np.ones(3)]]), "layers of row 1"),
        (lambda: rules.median([[np.ones(2), np.ones(2, np.float32)]] * 3), "mix dtypes"),
        (lambda: rules.median(np.ones((3, 2), complex)), "complex128"),
        (lambda: rules.weighted_mean(np.ones((2, 2)), [1, -4]), r"weights\[1\] is -4"),
        (lambda: rules.weighted_mean(np.ones((2, 2)), [1, np.nan]), r"weights\[1\]"),
        (lambda: rules.weighted_mean(np.ones((2, 2)), [0, 0]), "all zero"),
        (lambda: rules.weighted_mean(np.ones((2, 2)), [1]), "one number a row"),
        (lambda: rules.centered_clipping(np.ones((2, 2)), 0.0), "radius"),
        (lambda: rules.centered_clipping(np.ones((2, 2)), 1.0, steps=0), "steps"),
        (lambda: rules.centered_clipping(np.ones((2, 2)), 1.0, np.ones(3)), "center has 3 numbers"),
        (lambda: rules.centered_clipping(np.ones((2, 2)), 1.0, np.array([0, np.nan])), "center is not finite"),
        (lambda: rules.bucketing(np.ones((2, 2)), 3, np.random.default_rng(0)), "size must be"),
        (lambda: rules.clipping(np.ones((2, 2)), -1.0), "radius"),
        (lambda: rules.monna(np.ones((3, 2)), 1, pivot=3), "no row 3"),
        (lambda: rules.krum_weights(np.ones((2, 3)), 0), "square"),
        (lambda: rules.krum_weights(np.full((5, 5), np.nan), 1), "not finite"),
        (lambda: rules.krum_weights(np.eye(5), 1.0), "f must be a whole number"),
        (lambda: rules.krum(np.ones((5, 2)), 1, neighbours=1.5), "neighbours must be a whole number"),
        (lambda: rules.multi_krum_weights(np.eye(5), 1, 0), "would keep 0 of n = 5"),
        (lambda: rules.multi_krum_weights(np.eye(5), 1, 6), "would keep 6 of n = 5"),
        (lambda: rules.bulyan_rows(np.eye(5), 3), "would keep -1 of n = 5"),
        (lambda: rules.minimum_diameter_weights(np.eye(5), 5), "would keep 0 of n = 5"),
        (lambda: rules.cge_weights(np.eye(5), 9), "would keep -4 of n = 5"),
        (lambda: rules.monna_weights(np.eye(5), 5), "would keep 0 of n = 5"),
        (lambda: rules.smea_weights(np.eye(5), 6), "would keep -1 of n = 5"),
        (lambda: rules.caf_weights(np.eye(5), 3), "would keep -1 of n = 5"),
        (lambda: rules.dnc_rows(np.eye(5), 5), "would keep 0 of n = 5"),
        (lambda: rules.dnc(np.ones((5, 2)), 1, iterations=0), "iterations must be a whole number >= 1"),
        (lambda: rules.dnc(np.ones((5, 2)), 1, share=0.0), "share must be positive"),
        (lambda: rules.dnc(np.ones((5, 2)), 1, share=-1.0), "share must be positive"),
        (lambda: rules.flame(np.ones((5, 2)), noise=np.nan, rng=np.random.default_rng(0)), "noise must be"),
        (lambda: rules.centered_clipping(np.ones((5, 2)), 1.0, steps=1.5), "steps must be a whole number"),
        (lambda: rules.weighted_mean(np.ones((2, 2)), [1, 2], cap=0.0), "cap must be positive"),
        (lambda: rules.weighted_mean(np.ones((2, 2)), [1, 2], cap=np.nan), "cap must be positive"),
        (lambda: rules.monna(np.ones((5, 2)), 1, pivot=np.array([1e200, 0])), r"pivot holds 1e\+200"),
        (lambda: rules.monna(np.array([[1.0], [2], [3e200]]), 1, pivot=2), r"pivot holds 3e\+200"),
        (lambda: rules.fltrust(np.ones((5, 2)), np.array([1e300, 0])), r"server holds 1e\+300"),
        (lambda: rules.foolsgold(np.eye(5), np.eye(5)[:3]), "history has 3 rows, X has 5"),
    ],
)
def test_wrong_arguments_are_named(call: Any, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        call()


ROWS = np.random.default_rng(4).standard_normal((9, 5)).astype(np.float32)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: rules.krum(ROWS, 2, center=np.full(5, 1e30)), r"center holds 1e\+30, more than the 1.44e\+17"),
        (lambda: rules.centered_clipping(ROWS, 1.0, center=np.full(5, -1e30)), "center holds"),
        (lambda: rules.cge(ROWS, 2, center=[np.full(5, 1e30)]), "center holds"),
        (lambda: rules.neighbor_weights(ROWS @ ROWS.T, 9), "n = 9 rows, and f = 9"),
        (lambda: rules.neighbor_weights(ROWS @ ROWS.T, 1.5), "f must be a whole number"),
        (lambda: rules.bucketing(ROWS, 2.0, np.random.default_rng(1)), "size must be a whole number"),
        (lambda: rules.bucketing(ROWS, 10, np.random.default_rng(1)), "size must be from 1 to n = 9"),
        (lambda: rules.bucketing(ROWS, 2, 5), "rng must be a numpy.random.Generator, got int"),
        (lambda: rules.screen(ROWS, 2, largest=np.nan), "largest must be positive"),
        (lambda: rules.screen(ROWS, 2, largest=0), "largest must be positive"),
        (lambda: rules.median({1: ROWS[0], 2: ROWS[1]}), "a mapping; give its values"),
        (lambda: rules.median(np.ma.masked_array(ROWS, ROWS > 1)), "a masked array"),
        (lambda: rules.median([np.ma.masked_array(one, one > 1) for one in ROWS]), "a masked array"),
    ],
)
def test_what_would_be_used_as_something_else_is_refused(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
