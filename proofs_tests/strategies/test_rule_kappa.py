"""For no set of honest rows is a rule's result further from their mean than its kappa allows, however others lie."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from privfed.strategies import rules


def adversarial(seed: int, n: int, f: int, d: int) -> Any:
    """Rows of which f lie as attackers choose: far, colluding, just outside, along one axis, or nowhere special."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    kind = seed % 6
    if kind == 1:
        X[:f] = 10.0 ** rng.uniform(0, 6) * rng.standard_normal(d)
    elif kind == 2:
        X[:f] = X[f:].mean(axis=0) + rng.uniform(0, 4) * X[f:].std(axis=0)
    elif kind == 3:
        X[: n // 2] += 3.0  # two camps
    elif kind == 4:
        X = np.zeros((n, d))
        X[:f, 0] = 1.0  # a corner case: variance comes from these rows alone
    elif kind == 5:
        X[:f] = -rng.uniform(0, 3) * X[f:].mean(axis=0)
    return X[rng.permutation(n)]


def bounds(law: rules.Law) -> list[Any]:
    return [bound for bound in (law.kappa, law.sharp) if bound is not None]


BOUNDED = [name for name in sorted(rules.LAWS) if bounds(rules.LAWS[name])]


def worst_ratio(X: Any, out: Any, f: int) -> float:
    """Return the greatest |out - mean_S|^2 / variance_S over all sets S of n-f rows."""
    n = len(X)
    chosen = np.zeros((math.comb(n, f), n))
    for row, left_out in zip(chosen, combinations(range(n), f), strict=True):
        row[:] = 1 / (n - f)
        row[list(left_out)] = 0.0
    means = chosen @ X
    variances = (chosen[:, :, None] * (X[None] - means[:, None]) ** 2).sum(axis=(1, 2))
    errors = ((out - means) ** 2).sum(axis=1)
    sound = variances > 1e-12 * (1 + (X**2).sum())
    return float((errors[sound] / variances[sound]).max(initial=0.0))


def climb(name: str, n: int, f: int, d: int, seed: int, steps: int) -> float:
    """Return the greatest ratio that a search finds, which moves rows at random and keeps what is worse."""
    law, rng = rules.LAWS[name], np.random.default_rng(seed)
    X = adversarial(seed, n, f, d)
    best = worst_ratio(X, law.apply(X, f), f)
    for step in range(steps):
        moved = X + rng.standard_normal((n, d)) * 10.0 ** rng.uniform(-2, 0.5) * (rng.random((n, 1)) < 0.4)
        if step % 7 == 0:
            moved[rng.integers(n)] = moved[rng.integers(n)]
        found = worst_ratio(moved, law.apply(moved, f), f)
        if found > best:
            X, best = moved, found
    return best


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", BOUNDED)
def test_a_search_for_the_worst_rows_does_not_pass_kappa(name: str, seed: int) -> None:
    law, (n, f) = rules.LAWS[name], ((7, 2), (9, 3), (6, 1))[seed]
    n = max(n, law.least(f))
    found = max(climb(name, n, f, d, seed + 10 * d, 100) for d in (1, 2))
    for bound in bounds(law):
        assert found <= bound(n, f) * (1 + 1e-9)
    if law.sharp is not None and (name == "trimmed_mean" or (name == "median" and n % 2)):
        assert found >= 0.5 * law.sharp(n, f)  # the search comes near where the bound is sharp


@lru_cache(maxsize=16)
def subsets(n: int, size: int) -> NDArray[np.intp]:
    """Return every subset of `size` of n indices, one a row."""
    return np.array(list(combinations(range(n), size)), dtype=np.intp)


@pytest.mark.parametrize("name", BOUNDED)
@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**9),
    shape=st.sampled_from([(5, 1, 3), (7, 2, 2), (9, 3, 4), (11, 5, 1), (11, 5, 5), (4, 0, 3)]),
)
def test_kappa_holds_for_every_honest_subset(name: str, seed: int, shape: tuple[int, int, int]) -> None:
    n, f, d = shape
    law = rules.LAWS[name]
    n = max(n, law.least(f))
    X = adversarial(seed, n, f, d)
    out = law.apply(X, f)
    kappa = min(bound(n, f) for bound in bounds(law))
    S = X[subsets(n, n - f)]  # (subsets, n - f, d)
    center = S.mean(axis=1)
    variance = ((S - center[:, None]) ** 2).sum(axis=2).mean(axis=1)
    assert (((out - center) ** 2).sum(axis=1) <= kappa * variance + 1e-9 * (1 + variance)).all()


def test_the_mean_breaks_kappa_so_the_property_can_fail() -> None:
    X = np.zeros((7, 2))
    X[0] = 1e3
    S = X[1:]
    law = rules.LAWS["trimmed_mean"]
    assert law.kappa is not None
    assert ((X.mean(axis=0) - S.mean(axis=0)) ** 2).sum() > law.kappa(7, 1) * S.var(axis=0).sum() + 1.0
