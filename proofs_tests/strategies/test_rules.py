"""The laws of every rule, read from its table, and each rule against a plain oracle."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from privfed.strategies import rules
from privfed.strategies.diameter import smallest_diameter
from privfed.strategies.network import NETWORK_ROWS, comparators

FAST = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
NAMES = sorted(rules.LAWS)


def sample(seed: int, n: int, d: int = 6) -> Any:
    return np.random.default_rng(seed).standard_normal((n, d)) + np.arange(d)


def rows_for(name: str, seed: int, f: int) -> Any:
    least = max(rules.LAWS[name].least(f), 9)
    return sample(seed, least // 2 * 2 + 1 + 2 * (seed % 2))  # odd, and not few: else ties are natural


def named(flag: str) -> list[str]:
    return [name for name in NAMES if getattr(rules.LAWS[name], flag)]


@pytest.mark.parametrize("name", named("translation"))
@FAST
@given(seed=st.integers(0, 10**6), f=st.integers(0, 2))
def test_translation_moves_the_result_along(name: str, seed: int, f: int) -> None:
    X, apply = rows_for(name, seed, f), rules.LAWS[name].apply
    t = np.linspace(-5, 5, X.shape[1])
    np.testing.assert_allclose(apply(X + t, f), apply(X, f) + t, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", named("scale"))
@FAST
@given(seed=st.integers(0, 10**6), f=st.integers(0, 2), c=st.sampled_from([1e-6, 0.25, 3.0, 1e6]))
def test_scale_carries_over(name: str, seed: int, f: int, c: float) -> None:
    X, apply = rows_for(name, seed, f), rules.LAWS[name].apply
    np.testing.assert_allclose(apply(c * X, f), c * apply(X, f), rtol=1e-6, atol=1e-6 * c)


@pytest.mark.parametrize("name", named("permutation"))
@FAST
@given(seed=st.integers(0, 10**6), f=st.integers(0, 2))
def test_the_order_of_rows_does_not_matter(name: str, seed: int, f: int) -> None:
    law = rules.LAWS[name]
    X = rows_for(name, seed, f)
    shuffled = X[np.random.default_rng(seed + 1).permutation(len(X))]
    if name == "fltrust":  # its server row comes first
        shuffled = np.vstack([X[:1], X[1:][::-1]])
    np.testing.assert_allclose(law.apply(shuffled, f), law.apply(X, f), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", named("idempotence"))
@FAST
@given(seed=st.integers(0, 10**6), f=st.integers(0, 2))
def test_equal_rows_give_that_row(name: str, seed: int, f: int) -> None:
    X, apply = rows_for(name, seed, f), rules.LAWS[name].apply
    row = X[0]
    np.testing.assert_allclose(apply(np.repeat(row[None], len(X), axis=0), f), row, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", named("range"))
@FAST
@given(seed=st.integers(0, 10**6), f=st.integers(0, 2))
def test_the_result_stays_among_the_values(name: str, seed: int, f: int) -> None:
    X, apply = rows_for(name, seed, f), rules.LAWS[name].apply
    out = apply(X, f)
    assert (out >= X.min(axis=0) - 1e-9).all()
    assert (out <= X.max(axis=0) + 1e-9).all()


@pytest.mark.parametrize("name", named("robust"))
def test_far_outliers_move_the_result_little(name: str) -> None:
    f = 2
    law = rules.LAWS[name]
    honest = sample(5, max(law.least(f), 9) - f, 40) - np.arange(40)
    spread = np.linalg.norm(honest - honest.mean(axis=0), axis=1).max()
    for size in (1e3, 1e8, 1e15):
        X = np.vstack([honest, np.full((f, 40), size)])
        assert np.linalg.norm(law.apply(X, f) - honest.mean(axis=0)) <= 3 * spread


# ------------------------------------------------------------------------------------------------ oracles


def krum_order(X: Any, f: int, neighbours: int) -> Any:
    D = ((X[:, None] - X[None]) ** 2).sum(axis=2)
    scores = [np.sort(np.delete(D[i], i))[:neighbours].sum() for i in range(len(X))]
    return np.argsort(scores, kind="stable")


def bulyan_plain(X: Any, f: int) -> Any:
    left, picked = list(range(len(X))), []
    for _ in range(len(X) - 2 * f):
        k = max(len(left) - f - 2, min(1, len(left) - 1))
        best = left[krum_order(X[left], f, k)[0]] if k else left[0]
        picked.append(best)
        left.remove(best)
    S = X[picked]
    return nearest_plain(S, np.median(S, axis=0), len(picked) - 2 * f)


def nearest_plain(X: Any, reference: Any, keep: int) -> Any:
    order = np.argsort(np.abs(X - reference), axis=0, kind="stable")[:keep]
    return np.take_along_axis(X, order, axis=0).mean(axis=0)


def trimmed_plain(X: Any, f: int) -> Any:
    return np.sort(X, axis=0)[f : len(X) - f].mean(axis=0)


def diameter_plain(X: Any, f: int) -> Any:
    D = ((X[:, None] - X[None]) ** 2).sum(axis=2)
    sets = list(combinations(range(len(X)), len(X) - f))
    return X[list(min(sets, key=lambda s: D[np.ix_(s, s)].max()))].mean(axis=0)


def smea_plain(X: Any, f: int) -> Any:
    def top(s: tuple[int, ...]) -> float:
        return float(np.linalg.eigvalsh(np.atleast_2d(np.cov(X[list(s)].T, ddof=0)))[-1])

    return X[list(min(combinations(range(len(X)), len(X) - f), key=top))].mean(axis=0)


def mixing_plain(X: Any, f: int) -> Any:
    D = ((X[:, None] - X[None]) ** 2).sum(axis=2)
    return np.stack([X[np.argsort(D[i], kind="stable")[: len(X) - f]].mean(axis=0) for i in range(len(X))])


def clipping_plain(X: Any, radius: float, center: Any, steps: int) -> Any:
    v = np.array(center, dtype=np.float64)
    for _ in range(steps):
        norms = np.linalg.norm(X - v, axis=1)
        v = v + ((X - v) * np.minimum(1, radius / norms)[:, None]).mean(axis=0)
    return v


def dnc_plain(X: Any, f: int) -> Any:
    centred = X - X.mean(axis=0)
    top = np.linalg.svd(centred, full_matrices=False)[2][0]
    return X[np.sort(np.argsort((centred @ top) ** 2, kind="stable")[: len(X) - f])].mean(axis=0)


def caf_plain(X: Any, f: int) -> Any:
    c, best, out = np.ones(len(X)), np.inf, X.mean(axis=0)
    while c.sum() > len(X) - 2 * f:
        mu = c @ X / c.sum()
        values, vectors = np.linalg.eigh((X - mu).T @ (c[:, None] * (X - mu)) / c.sum())
        if values[-1] < best:
            best, out = values[-1], mu
        tau = ((X - mu) @ vectors[:, -1]) ** 2
        c = c * (1 - tau / tau.max())
    return out


ORACLES = {
    "median": (lambda X, f: rules.median(X), lambda X, f: np.median(X, axis=0)),
    "trimmed_mean": (rules.trimmed_mean, trimmed_plain),
    "meamed": (rules.meamed, lambda X, f: nearest_plain(X, np.median(X, axis=0), len(X) - f)),
    "phocas": (rules.phocas, lambda X, f: nearest_plain(X, trimmed_plain(X, f), len(X) - f)),
    "krum": (rules.krum, lambda X, f: X[krum_order(X, f, len(X) - f - 2)[0]]),
    "multi_krum": (
        lambda X, f: rules.multi_krum(X, f, 3),
        lambda X, f: X[krum_order(X, f, len(X) - f - 2)[:3]].mean(axis=0),
    ),
    "bulyan": (rules.bulyan, bulyan_plain),
    "minimum_diameter_mean": (rules.minimum_diameter_mean, diameter_plain),
    "smea": (rules.smea, smea_plain),
    "caf": (rules.caf, caf_plain),
    "dnc": (rules.dnc, dnc_plain),
    "monna": (
        lambda X, f: rules.monna(X, f, pivot=1),
        lambda X, f: X[np.argsort(((X - X[1]) ** 2).sum(axis=1))[: len(X) - f]].mean(axis=0),
    ),
    "cge": (rules.cge, lambda X, f: X[np.argsort((X**2).sum(axis=1))[: len(X) - f]].mean(axis=0)),
    "nearest_neighbor_mixing": (rules.nearest_neighbor_mixing, mixing_plain),
    "centered_clipping": (
        lambda X, f: rules.centered_clipping(X, 2.0, X[0] / 2, 4),
        lambda X, f: clipping_plain(X, 2.0, X[0] / 2, 4),
    ),
    "norm_bounding": (lambda X, f: rules.norm_bounding(X, 1.5), lambda X, f: clipping_plain(X, 1.5, 0 * X[0], 1)),
    "mean_around": (lambda X, f: rules.mean_around(X, X[2], 4), lambda X, f: nearest_plain(X, X[2], 4)),
    "nnm+median": (
        lambda X, f: rules.median(rules.lazy_mixing(X, f)),
        lambda X, f: np.median(mixing_plain(X, f), axis=0),
    ),
    "nnm+multi_krum": (
        lambda X, f: rules.multi_krum(rules.lazy_mixing(X, f), f, 3),
        lambda X, f: mixing_plain(X, f)[krum_order(mixing_plain(X, f), f, len(X) - f - 2)[:3]].mean(axis=0),
    ),
    "arc+trimmed": (
        lambda X, f: rules.trimmed_mean(rules.lazy_arc(X, f), f),
        lambda X, f: trimmed_plain(rules.arc(X, f), f),
    ),
}


@pytest.mark.parametrize("name", sorted(ORACLES))
@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**9), n=st.integers(11, 14), f=st.integers(0, 2), single=st.booleans())
def test_a_rule_equals_its_plain_form(name: str, seed: int, n: int, f: int, single: bool) -> None:
    X = sample(seed, n, 7).astype(np.float32 if single else np.float64)
    ours, plain = ORACLES[name]
    expected = plain(X.astype(np.float64), f)
    np.testing.assert_allclose(ours(X, f), expected, rtol=2e-4 if single else 1e-7, atol=2e-4 if single else 1e-7)


@pytest.mark.parametrize("n", [1, 2, 3, 27, 28, NETWORK_ROWS, NETWORK_ROWS + 1, 150])
def test_order_statistics_on_either_side_of_the_network(n: int) -> None:
    X = np.random.default_rng(n).standard_normal((n, 3000)).astype(np.float32)
    np.testing.assert_allclose(rules.median(X), np.median(X, axis=0), rtol=1e-6, atol=1e-7)
    f = (n - 1) // 4
    np.testing.assert_allclose(rules.trimmed_mean(X, f), trimmed_plain(X.astype(np.float64), f), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        rules.meamed(X, f), nearest_plain(X.astype(np.float64), np.median(X, axis=0), n - f), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("n", [2, 3, 5, 8, 12])
def test_networks_sort_by_the_zero_one_principle(n: int) -> None:
    whole = comparators(n, tuple(range(n)))
    for bits in range(1 << n):
        values = [bits >> i & 1 for i in range(n)]
        wanted = sorted(values)
        for a, b, low, high in whole:
            assert low and high
            values[a], values[b] = min(values[a], values[b]), max(values[a], values[b])
        assert values == wanted


@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_geometric_median_is_converged(seed: int) -> None:
    X = sample(seed, 9, 5)
    z = rules.geometric_median(X)
    pulls = (X - z) / np.linalg.norm(X - z, axis=1, keepdims=True)
    assert np.linalg.norm(pulls.sum(axis=0)) < 1e-6


def test_geometric_median_stays_on_a_row_that_is_best() -> None:
    X = np.array([[0.0, 0], [1, 0], [-1, 0], [0, 1], [0, -1.0]])
    np.testing.assert_array_equal(rules.geometric_median(X), [0, 0])
    np.testing.assert_array_equal(rules.geometric_median(np.array([[5.0, 5]] * 3 + [[9.0, 1], [8.0, 2]])), [5, 5])


@pytest.mark.parametrize("seed", range(6))
def test_minimum_diameter_of_many_rows_is_no_worse_than_the_planted_set(seed: int) -> None:
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((60, 3))
    X[:12] *= 3
    w = rules.minimum_diameter_weights(X @ X.T, 12)
    D = ((X[:, None] - X[None]) ** 2).sum(axis=2)
    chosen = np.flatnonzero(w)
    assert len(chosen) == 48
    assert D[np.ix_(chosen, chosen)].max() <= D[12:, 12:].max() + 1e-9


def circulant(n: int, steps: tuple[int, ...]) -> Any:
    apart = np.abs(np.arange(n)[:, None] - np.arange(n)[None])
    return np.where(np.isin(apart, [k for step in steps for k in (step, n - step)]), 2.0, 1.0) - np.eye(n)


def test_minimum_diameter_gives_up_in_words() -> None:
    D = circulant(40, (1, 7, 12))  # no vertex stands out and none is a leaf: nothing to do but branch
    with pytest.raises(rules.Refusal, match="budget"):
        smallest_diameter(D, 14, budget=3)
    chosen = smallest_diameter(D, 12)
    assert D[np.ix_(chosen, chosen)].max() == 1.0


def test_threads_do_not_change_a_result() -> None:
    X = np.random.default_rng(0).standard_normal((15, 200_000)).astype(np.float32)
    for rule in (rules.median, rules.geometric_median, rules.mean, lambda X: rules.bulyan(X, 2)):
        alone = rule(X)
        with rules.threads(3):
            np.testing.assert_array_equal(rule(X), alone)
    with pytest.raises(ValueError, match="count"), rules.threads(0):
        pass


def test_fltrust_scales_trusted_rows_to_the_servers_norm() -> None:
    server = np.array([3.0, 4.0])
    X = np.array([[6.0, 8.0], [-3.0, -4.0], [4.0, -3.0]])
    np.testing.assert_allclose(rules.fltrust(X, server), server)
    with pytest.raises(rules.Refusal, match="nobody"):
        rules.fltrust(-X[:1], server)
    with pytest.raises(rules.Refusal, match="zero"):
        rules.fltrust(X, 0 * server)


def test_foolsgold_silences_sybils() -> None:
    rng = np.random.default_rng(3)
    honest, sybil = rng.standard_normal((6, 50)), rng.standard_normal(50)
    X = np.vstack([honest, sybil, sybil, sybil])
    weights = rules.foolsgold_weights(X @ X.T)
    assert (weights[6:] == 0).all()
    assert (weights[:6] > 0).all()


def test_flame_keeps_the_majority_direction_and_clips() -> None:
    rng = np.random.default_rng(4)
    honest = np.ones((7, 30)) + 0.1 * rng.standard_normal((7, 30))
    out = rules.flame(np.vstack([honest, -50 * np.ones((4, 30))]))
    assert np.linalg.norm(out - 1) < 1.0
    noisy = rules.flame(honest, noise=0.1, rng=np.random.default_rng(0))
    assert not np.allclose(noisy, rules.flame(honest))
    with pytest.raises(ValueError, match="rng"):
        rules.flame(honest, noise=0.1)


def test_dnc_on_drawn_coordinates_drops_planted_rows() -> None:
    rng = np.random.default_rng(1)
    X = rng.standard_normal((20, 500))
    X[:3] += 4
    out = rules.dnc(X, 3, rng=rng, dimension=100, iterations=2)
    assert np.abs(out - X[3:].mean(axis=0)).max() < 1.5
    with pytest.raises(rules.Refusal, match="iterations"):
        rules.dnc(X, 7, rng=rng, dimension=100, iterations=3)
    with pytest.raises(ValueError, match="rng"):
        rules.dnc(X, 3, iterations=2)


def test_bucketing_averages_everyone_once() -> None:
    X = sample(0, 11)
    buckets = rules.bucketing(X, 3, np.random.default_rng(0))
    assert buckets.shape == (4, X.shape[1])
    np.testing.assert_allclose((np.array([3, 3, 3, 2]) @ buckets) / 11, X.mean(axis=0))
    lazy = rules.lazy_bucketing(X, 3, np.random.default_rng(0))
    np.testing.assert_allclose(rules.median(lazy), np.median(buckets, axis=0))
    np.testing.assert_allclose(rules.geometric_median(lazy), rules.geometric_median(buckets), atol=1e-7)


def test_clipping_bounds_norms_about_the_center() -> None:
    X, center = sample(0, 8), np.arange(6.0)
    out = rules.clipping(X, 0.5, center=center)
    np.testing.assert_allclose(np.linalg.norm(out - center, axis=1), 0.5)
    np.testing.assert_allclose(
        rules.geometric_median(rules.lazy_clipping(X, 0.5, center=center)), rules.geometric_median(out), atol=1e-7
    )


@pytest.mark.parametrize("name", [name for name in rules.__all__ if callable(getattr(rules, name))])
def test_every_rule_says_what_it_guarantees_and_costs(name: str) -> None:
    """All that turn rows into a row or rows: the rest of the module are their parts."""
    rule = getattr(rules, name)
    parts = name.endswith(("_weights", "_rows", "_scores", "_radius")) or name.startswith("lazy_")
    if isinstance(rule, type) or parts or name in ("as_matrix", "fast", "gram", "screen", "threads"):
        return
    text = " ".join((rule.__doc__ or "").split())
    for word in ("Return", "Guarantee: ", "Breakdown point: ", "Cost: "):
        assert word in text, f"{name} does not say its {word}"
