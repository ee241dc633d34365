"""What docstrings promise of rules beside kappa: for every set of honest rows, on random and adversarial rows."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.strategies import rules

MANY = settings(max_examples=60, deadline=None, derandomize=True)
SEEDS = st.integers(0, 10**6)
SHAPES = st.sampled_from([(5, 1, 3), (7, 2, 2), (9, 3, 4), (7, 3, 1)])
SLACK = 1 + 1e-9


def rows_of(seed: int, n: int, f: int, d: int) -> Any:
    """Honest rows, and f that are far off, near, equal to one another or to an honest one."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d)) + rng.uniform(-3, 3)
    kind = seed % 4
    if kind == 0:
        X[:f] *= 10.0 ** rng.uniform(0, 6)
    elif kind == 1:
        X[:f] = X[f:].mean(axis=0) + rng.uniform(0, 4) * X[f:].std(axis=0)
    elif kind == 2:
        X[:f] = X[-1]
    return X[rng.permutation(n)]


def honest_sets(X: Any, f: int) -> Any:
    return (X[list(chosen)] for chosen in combinations(range(len(X)), len(X) - f))


@MANY
@given(seed=SEEDS, shape=SHAPES)
def test_minimum_diameter_stays_within_its_share_of_the_honest_diameter(seed: int, shape: tuple[int, int, int]) -> None:
    n, f, _ = shape
    X = rows_of(seed, *shape)
    found = rules.minimum_diameter_mean(X, f)
    for S in honest_sets(X, f):
        diameter = np.linalg.norm(S[:, None] - S[None], axis=2).max()
        assert np.linalg.norm(found - S.mean(axis=0)) <= 2 * f / (n - f) * diameter * SLACK


@MANY
@given(seed=SEEDS, shape=st.sampled_from([(5, 1, 3), (7, 2, 2), (9, 3, 4)]), few=st.integers(0, 5))
def test_multi_krum_has_krums_kappa_however_many_rows_it_takes(
    seed: int, shape: tuple[int, int, int], few: int
) -> None:
    n, f, _ = shape
    X = rows_of(seed, *shape)
    kappa = rules.LAWS["krum"].sharp
    assert kappa is not None
    found = rules.multi_krum(X, f, max(1, n - f - few))
    for S in honest_sets(X, f):
        variance = ((S - S.mean(axis=0)) ** 2).sum(axis=1).mean()
        assert ((found - S.mean(axis=0)) ** 2).sum() <= kappa(n, f) * variance * SLACK


@MANY
@given(seed=SEEDS, shape=SHAPES)
def test_smea_answers_for_the_worst_direction_alone(seed: int, shape: tuple[int, int, int]) -> None:
    n, f, _ = shape
    X = rows_of(seed, *shape)
    found = rules.smea(X, f)
    for S in honest_sets(X, f):
        top = np.linalg.norm(S - S.mean(axis=0), 2) ** 2 / len(S)
        assert ((found - S.mean(axis=0)) ** 2).sum() <= 4 * f / (n - 2 * f) * top * SLACK


@MANY
@given(seed=SEEDS, shape=SHAPES)
def test_monna_is_as_good_as_its_pivot(seed: int, shape: tuple[int, int, int]) -> None:
    n, f, _ = shape
    X = rows_of(seed, *shape)
    found = rules.monna(X, f)
    for others in combinations(range(1, n), n - f - 1):
        S = X[[0, *others]]
        center = S.mean(axis=0)
        spread = ((S - center) ** 2).sum(axis=1).mean() + ((X[0] - center) ** 2).sum()
        assert ((found - center) ** 2).sum() <= 4 * f / (n - f) * spread * SLACK


@MANY
@given(seed=SEEDS, shape=SHAPES, radius=st.floats(0.1, 5))
def test_clipping_bounds_what_f_rows_can_move(seed: int, shape: tuple[int, int, int], radius: float) -> None:
    n, f, d = shape
    X = rows_of(seed, *shape)
    other = X.copy()
    other[:f] = np.random.default_rng(seed).standard_normal((f, d)) * 1e3
    for rule in (rules.norm_bounding, rules.centered_clipping):
        move = np.linalg.norm(rule(X, radius) - rule(other, radius))
        assert move <= 2 * f * radius / n * SLACK + 1e-9
        assert np.linalg.norm(rule(X, radius)) <= radius * SLACK + 1e-9


@MANY
@given(seed=SEEDS, shape=SHAPES)
def test_rules_of_norms_and_directions_keep_to_theirs(seed: int, shape: tuple[int, int, int]) -> None:
    f, d = shape[1:]
    X = rows_of(seed, *shape)
    norms = np.linalg.norm(X, axis=1)
    assert np.linalg.norm(rules.flame(X)) <= np.median(norms) * SLACK
    server = np.random.default_rng(seed + 1).standard_normal(d)
    if (X @ server > 0).any():
        found = rules.fltrust(X, server)
        assert np.linalg.norm(found) <= np.linalg.norm(server) * SLACK and found @ server >= -1e-9
    clipped = np.linalg.norm(rules.arc(X, f), axis=1).max()
    for S in honest_sets(X, f):
        longest = np.linalg.norm(S, axis=1).max()
        assert clipped <= longest * (1 + 1e-6)
        assert np.linalg.norm(rules.cge(X, f)) <= longest * SLACK


def test_a_mean_keeps_to_none_of_it() -> None:
    """The same measure fails for it, so that the properties can fail."""
    X = np.zeros((7, 2))
    X[0] = 1e3
    S = np.vstack([X[1:], X[:0]])
    assert np.linalg.norm(rules.mean(X) - S.mean(axis=0)) > 1e2
    assert np.linalg.norm(rules.mean(X)) > np.median(np.linalg.norm(X, axis=1))
