"""Noise follows its law exactly, and what is released is what the event says.

Every statistical test runs on a fixed key, so it gives the same answer each time; the rates stated are the chance that
a correct sampler would have failed on a key picked at random.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from privfed.privacy import noise
from privfed.privacy.block import BlockSampler, GaussianCurve, PoissonCurve
from privfed.privacy.events import Gaussian
from privfed.privacy.inversion import InversionSampler, Weights
from privfed.privacy.keystream import Keystream
from privfed.privacy.mechanisms import (
    Lattice,
    LatticeSum,
    add_discrete_gaussian,
    default_granularity,
    gaussian_variance,
)

VECTORS = Path(__file__).parents[1] / "vectors"
SAMPLES = 1 << 20
FALSE_ALARM = 1e-6  # of each chi-square and each tail test


def load(name: str) -> Any:
    return json.loads((VECTORS / name).read_text())


def fixed(label: str) -> Callable[[int], bytes]:
    key = hashlib.sha256(label.encode()).digest()
    return lambda size: key[:size]


# --- masses -----------------------------------------------------------------------------------------------------

LAWS: dict[str, Callable[..., Weights]] = {
    "discrete_gaussian": lambda bits, sigma: noise.gaussian_weights(Fraction(sigma) ** 2, bits),
    "poisson": lambda bits, mean: noise.poisson_weights(Fraction(mean), bits),
    "skellam": lambda bits, variance: noise.skellam_weights(Fraction(variance), bits),
    "binomial": lambda bits, trials, probability: noise.binomial_weights(trials, Fraction(probability), bits),
}


def enclosed_masses(weights: Weights) -> dict[int, tuple[Fraction, Fraction]]:
    low = sum(cell[0] for cell in weights.cells)
    high = sum(cell[1] for cell in weights.cells) + weights.below + weights.above
    return {
        weights.first + i: (Fraction(cell[0], high), Fraction(cell[1], low)) for i, cell in enumerate(weights.cells)
    }


def masses(law: str, parameter: dict[str, Any], bits: int = 200) -> Callable[[int], tuple[Fraction, Fraction]]:
    """Enclose the masses the samplers use; the composite laws are put together from their parts."""
    if law in LAWS:
        table = enclosed_masses(LAWS[law](bits, **parameter))
        return lambda k: table.get(k, (Fraction(0), Fraction(1, 2**150)))
    side = enclosed_masses(noise.geometric_weights(1 / Fraction(parameter["scale"]), None, bits))

    def laplace(k: int) -> tuple[Fraction, Fraction]:  # the magnitude's mass, halved by the sign, without -0
        low, high = side[abs(k)]
        zero_low, zero_high = side[0]
        return low / (2 - zero_low), high / (2 - zero_high)

    return laplace


@pytest.mark.parametrize("case", load("pmf_noise.json")["cases"], ids=lambda c: f"{c['law']}{c['parameter']}")
def test_masses_are_enclosed(case: dict[str, Any]) -> None:
    mass = masses(case["law"], case["parameter"])
    for key, text in case["pmf"].items():
        low, high = mass(int(key))
        truth = Fraction(text)
        margin = truth / 10**38 + Fraction(1, 2**140)  # the vectors' own last digit
        assert low - margin <= truth <= high + margin, key
        assert high - low <= Fraction(1, 2**130), key


@pytest.mark.parametrize("case", load("pmf_bad_noise.json")["cases"], ids=lambda c: str(c["why"]))
def test_wrong_masses_are_not_enclosed(case: dict[str, Any]) -> None:
    mass = masses(case["law"], case["parameter"])
    for key, text in case["pmf"].items():
        low, high = mass(int(key))
        truth = Fraction(text)
        assert not low - truth / 10**12 <= truth <= high + truth / 10**12


# --- samples ----------------------------------------------------------------------------------------------------


def chi_square(samples: npt.NDArray[np.int64], cdf: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> float:
    """Return the p-value of a chi-square test on up to 400 bins of at least 20 expected samples."""
    spread = samples.std()
    edges = np.unique(np.round(np.linspace(-6, 6, 401) * spread + samples.mean()).astype(np.int64))
    probability = np.diff(np.concatenate([[0.0], cdf(edges), [1.0]]))
    counts = np.diff(np.concatenate([[0], np.searchsorted(np.sort(samples), edges, side="right"), [samples.size]]))
    expected = probability * samples.size
    group = np.minimum(np.cumsum(expected) // 20, samples.size // 20 - 1).astype(np.int64)
    _, group = np.unique(group, return_inverse=True)
    observed, wanted = np.bincount(group, counts), np.bincount(group, expected)
    while wanted[-1] < 20:
        wanted = np.append(wanted[:-2], wanted[-2:].sum())
        observed = np.append(observed[:-2], observed[-2:].sum())
    return float(stats.chi2.sf(((observed - wanted) ** 2 / wanted).sum(), len(wanted) - 1))


def gaussian_cdf(sigma: float) -> Callable[[npt.NDArray[Any]], npt.NDArray[Any]]:
    if sigma > 1000:  # Euler-Maclaurin: the sum of the masses is the integral to 1 / (24 sigma^2)
        return lambda k: stats.norm.cdf((k + 0.5) / sigma)
    reach = int(12 * sigma) + 3
    grid = np.arange(-reach, reach + 1)
    mass = np.exp(-(grid**2) / (2 * sigma**2))
    total = np.cumsum(mass) / mass.sum()
    return lambda k: np.where(k < -reach, 0.0, total[np.clip(k + reach, 0, 2 * reach)])


def laplace_cdf(scale: float) -> Callable[[npt.NDArray[Any]], npt.NDArray[Any]]:
    t = math.exp(-1 / scale)
    return lambda k: np.where(k >= 0, 1 - t ** (np.abs(k) + 1.0) / (1 + t), t ** np.abs(k) / (1 + t))


def skellam_cdf(variance: float) -> Callable[[npt.NDArray[Any]], npt.NDArray[Any]]:
    if variance > 1e6:  # Edgeworth to the fourth cumulant 1 / variance; the next term is of order variance^-2

        def edgeworth(k: npt.NDArray[Any]) -> npt.NDArray[Any]:
            z = (k + 0.5) / math.sqrt(variance)
            correction = stats.norm.pdf(z) * (z**3 - 3 * z) / (24 * variance)
            return np.asarray(stats.norm.cdf(z) - correction)

        return edgeworth
    return lambda k: np.asarray(stats.skellam.cdf(k, variance / 2, variance / 2))


DRAWS: list[tuple[str, tuple[Any, ...], Callable[[npt.NDArray[Any]], npt.NDArray[Any]]]] = [
    ("discrete_gaussian", (0.4,), gaussian_cdf(0.4)),
    ("discrete_gaussian", (10.0,), gaussian_cdf(10.0)),
    ("discrete_gaussian", (127.0,), gaussian_cdf(127.0)),
    ("discrete_gaussian", (500.0,), gaussian_cdf(500.0)),
    ("discrete_gaussian", (2.0**26,), gaussian_cdf(2.0**26)),
    ("discrete_laplace", (0.7,), laplace_cdf(0.7)),
    ("discrete_laplace", (5000.0,), laplace_cdf(5000.0)),
    ("skellam", (0.5,), skellam_cdf(0.5)),
    ("skellam", (100.0,), skellam_cdf(100.0)),
    ("skellam", (512.0**2,), skellam_cdf(512.0**2)),
    ("skellam", (600.0**2,), skellam_cdf(600.0**2)),
    ("skellam", (2.0**30,), skellam_cdf(2.0**30)),
    ("poisson", (1e5,), lambda k: np.asarray(stats.poisson.cdf(k, 1e5))),
    ("binomial", (1000, 0.25), lambda k: np.asarray(stats.binom.cdf(k, 1000, 0.25))),
]


@pytest.mark.parametrize(("draw", "arguments", "cdf"), DRAWS, ids=lambda x: str(x) if not callable(x) else "")
def test_samples_follow_their_law(
    draw: str, arguments: tuple[Any, ...], cdf: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]
) -> None:
    samples = getattr(noise, draw)(SAMPLES, *arguments, random=fixed(f"law {draw} {arguments}"))
    assert chi_square(samples, cdf) > FALSE_ALARM
    for sigmas in (3.0, 4.0, 4.7):  # both tails, at 2.7e-3 to 2.6e-6 of a Gaussian's mass
        center, reach = round(samples.mean()), sigmas * samples.std()
        low, high = math.floor(center - reach), math.ceil(center + reach)
        for count, share in (
            (int((samples <= low).sum()), float(cdf(np.array([low]))[0])),
            (int((samples > high).sum()), 1 - float(cdf(np.array([high]))[0])),
        ):
            assert stats.binomtest(count, SAMPLES, min(max(share, 0.0), 1.0)).pvalue > FALSE_ALARM


def test_chi_square_notices_a_rounded_gaussian() -> None:
    rounded = np.rint(np.random.default_rng(1).normal(0.0, 1.0, SAMPLES)).astype(np.int64)
    assert chi_square(rounded, gaussian_cdf(1.0)) < FALSE_ALARM


def test_chi_square_notices_one_percent_of_scale() -> None:
    samples = noise.discrete_gaussian(SAMPLES, 10.1, random=fixed("scale"))
    assert chi_square(samples, gaussian_cdf(10.0)) < FALSE_ALARM


def test_coordinates_are_uncorrelated() -> None:
    """Serial correlations at lags 1 to 4 and across two calls are within 5.5 standard errors (false alarm 2e-7)."""
    a = noise.discrete_gaussian(SAMPLES, 300.0, random=fixed("a")).astype(np.float64) / 300
    b = noise.discrete_gaussian(SAMPLES, 300.0, random=fixed("b")).astype(np.float64) / 300
    for x, y in [(a[:-lag], a[lag:]) for lag in (1, 2, 3, 4)] + [(a, b)]:
        assert abs((x * y).mean()) * math.sqrt(x.size) < 5.5


@pytest.mark.parametrize("case", load("noise_stream.json")["cases"], ids=lambda c: f"{c['draw']}{c['arguments']}")
def test_draws_are_the_same_on_every_machine(case: dict[str, Any]) -> None:
    key = bytes.fromhex(load("noise_stream.json")["key"])
    samples = getattr(noise, case["draw"])(1000, *case["arguments"], random=lambda size: key[:size])
    assert samples[:8].tolist() == case["first"]
    assert int(samples.sum()) == case["sum"]
    assert hashlib.sha256(samples.astype("<i8").tobytes()).hexdigest() == case["sha256"]


def test_ties_after_64_bits_are_resolved_by_the_true_boundary() -> None:
    """A word on a cell's edge goes left with the probability the exact boundary gives (5.5 sigma: 4e-8)."""
    sampler = InversionSampler(lambda bits: noise.gaussian_weights(Fraction(9), bits))
    with mpmath.workprec(300):
        weight = [mpmath.exp(-(mpmath.mpf(k) ** 2) / 18) for k in range(-60, 61)]
        boundary = mpmath.fsum(weight[:61]) / mpmath.fsum(weight) * mpmath.mpf(2) ** 64  # P(X <= 0)
        word = int(mpmath.floor(boundary))
        share = float(boundary - word)
    stream = Keystream(fixed("ties"))
    trials = 1000
    picks = [sampler._resolve(word, stream) for _ in range(trials)]
    assert set(picks) <= {0, 1}
    assert abs(picks.count(0) - trials * share) <= 5.5 * math.sqrt(trials * share * (1 - share)) + 1


@pytest.mark.parametrize("curve", [GaussianCurve(Fraction(10**9)), PoissonCurve(Fraction(10**9))])
def test_acceptance_is_decided_by_the_true_ratio(curve: GaussianCurve | PoissonCurve) -> None:
    """A word within rounding of the ratio is accepted as often as its exact place says (5.5 sigma: 4e-8)."""
    sampler = BlockSampler(curve)
    head = curve.mode + 8 * curve.width
    point = head + curve.width // 2 + 1
    with mpmath.workprec(300):
        if isinstance(curve, GaussianCurve):
            logarithm = mpmath.mpf(head**2 - point**2) / (2 * 10**9)
        else:
            logarithm = (point - head) * mpmath.log(10**9) + mpmath.loggamma(head + 1) - mpmath.loggamma(point + 1)
        exact = mpmath.exp(logarithm) * 2**32
        word, share = int(mpmath.floor(exact)), float(exact - mpmath.floor(exact))
    stream = Keystream(fixed("accept"))
    trials = 600
    accepted = sum(sampler._resolve(word, head, point, stream) for _ in range(trials))
    assert abs(accepted - trials * share) <= 5.5 * math.sqrt(trials * share * (1 - share)) + 1
    assert sampler._resolve(word - 1, head, point, stream)
    assert not sampler._resolve(word + 1, head, point, stream)


@given(
    st.sampled_from([GaussianCurve(Fraction(2) ** 15), GaussianCurve(Fraction(2) ** 71)])
    | st.sampled_from([PoissonCurve(Fraction(20000)), PoissonCurve(Fraction(2) ** 40 - Fraction(1, 3))]),
    st.floats(-13.5, 13.5),
    st.floats(0, 1, exclude_max=True),
)
@settings(max_examples=150, deadline=None)
def test_float_losses_are_within_the_slack(curve: GaussianCurve | PoissonCurve, place: float, share: float) -> None:
    sigma = math.sqrt(curve.variance if isinstance(curve, GaussianCurve) else curve.mean)
    side = 1 if place >= 0 else -1
    head = curve.mode + (0 if place >= 0 else -1) + round(place * sigma / curve.width) * curve.width
    point = head + side * int(share * curve.width)
    low, high = curve.enclose(point, 100), curve.enclose(head, 100)
    exact = float(Fraction(low[0]) - high[0])
    loss = float(curve.loss(np.array([head]), np.array([point]))[0])
    assert abs(loss - exact) < 2.0**-37


@pytest.mark.parametrize(
    ("draw", "arguments", "name"),
    [
        ("discrete_gaussian", (0.0,), "sigma"),
        ("discrete_gaussian", (-1.0,), "sigma"),
        ("discrete_gaussian", (math.nan,), "sigma"),
        ("discrete_gaussian", (2.0**37,), "sigma"),
        ("discrete_laplace", (0.0,), "scale"),
        ("discrete_laplace", (math.inf,), "scale"),
        ("skellam", (-4.0,), "variance"),
        ("skellam", (2.0**42,), "variance"),
        ("poisson", (0.0,), "mean"),
        ("binomial", (0, 0.5), "trials"),
        ("binomial", (10, 1.0), "probability"),
    ],
)
def test_bad_parameters_are_named(draw: str, arguments: tuple[Any, ...], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}:"):
        getattr(noise, draw)(10, *arguments)


def test_a_short_random_source_is_refused() -> None:
    with pytest.raises(ValueError, match="random"):
        noise.discrete_gaussian(10, 1.0, random=lambda size: bytes(size - 1))


# --- releases ---------------------------------------------------------------------------------------------------


def test_a_release_is_the_value_plus_noise_of_the_stated_size() -> None:
    """The sample variance of 10^6 coordinates is within 5.5 standard errors (4e-8) of the lattice's own."""
    values = np.random.default_rng(0).normal(size=1_000_000)
    released, event = add_discrete_gaussian(values, sensitivity=2.0, noise_multiplier=1.5, random=fixed("release"))
    assert event == Gaussian(noise_multiplier=1.5)
    difference = released - values
    assert abs(difference.var() / 9.0 - 1) < 5.5 * math.sqrt(2 / values.size) + 1e-4
    assert abs(difference.mean()) < 5.5 * 3.0 / math.sqrt(values.size)


@given(
    st.floats(1e-3, 1e3),
    st.floats(0.05, 20),
    st.integers(1, 10**7),
    st.integers(-30, 4),
)
@settings(max_examples=200, deadline=None)
def test_the_noise_pays_for_rounding(sensitivity: float, multiplier: float, dimension: int, coarse: int) -> None:
    """z^2 (C/g + sqrt d)^2 + 16 never exceeds the variance used, in exact arithmetic."""
    step = 2.0 ** (math.floor(math.log2(sensitivity)) + coarse)
    lattice = Lattice(step)
    variance = gaussian_variance(multiplier, lattice.sensitivity(sensitivity, dimension))
    exact = Fraction(sensitivity) / Fraction(step)
    root = Fraction(math.isqrt(dimension << 80), 1 << 40)  # at most sqrt(d)
    assert variance >= (Fraction(multiplier) * (exact + root)) ** 2 + 16


@given(st.floats(1e-200, 1e200), st.integers(1, 10**9))
@settings(max_examples=100, deadline=None)
def test_default_rounding_is_small_against_the_sensitivity(sensitivity: float, dimension: int) -> None:
    step = default_granularity(sensitivity, dimension)
    assert math.frexp(step)[0] == 0.5
    assert step * math.sqrt(dimension) <= sensitivity * 2.0**-16 * (1 + 1e-9)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.integers(-20, 3))
@settings(max_examples=100, deadline=None)
def test_quantising_moves_each_value_by_at_most_half_a_step(values: list[float], exponent: int) -> None:
    lattice = Lattice(2.0**exponent)
    restored = lattice.restore(lattice.quantise(values))
    assert np.abs(restored - np.array(values)).max() <= lattice.granularity / 2


def test_a_lattice_sum_does_not_depend_on_order_or_neighbours() -> None:
    rng = np.random.default_rng(5)
    updates = rng.normal(size=(50, 200))
    updates /= np.linalg.norm(updates, axis=1, keepdims=True)
    sums = []
    for order in (range(50), reversed(range(50))):
        total = LatticeSum(200, sensitivity=1.0)
        for i in order:
            total.add(updates[i])
        sums.append(total.release(noise_multiplier=0.0)[0])
    np.testing.assert_array_equal(sums[0], sums[1])
    np.testing.assert_allclose(sums[0], updates.sum(axis=0), atol=50 * default_granularity(1.0, 200))


def test_lattice_sum_releases_noise_and_its_event() -> None:
    """400 coordinates at z = 3: the sample variance is within 5.5 standard errors (false alarm 4e-8)."""
    total = LatticeSum(20_000, sensitivity=0.5)
    released, event = total.release(noise_multiplier=3.0, random=fixed("sum"))
    assert event == Gaussian(noise_multiplier=3.0)
    assert abs(released.var() / 2.25 - 1) < 5.5 * math.sqrt(2 / released.size) + 1e-4


def test_contributions_beyond_their_bound_are_refused() -> None:
    total = LatticeSum(4, sensitivity=1.0)
    with pytest.raises(ValueError, match="L2 norm 2 exceeds"):
        total.add([1.0, 1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="NaN"):
        total.add([math.nan, 0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="4 coordinates"):
        total.add([0.5])


@pytest.mark.parametrize(
    ("values", "arguments", "name"),
    [
        ([[1.0]], {}, "values"),
        ([math.nan], {}, "values"),
        ([math.inf], {}, "values"),
        ([1e300], {"granularity": 2.0**-40}, "values"),
        ([1.0], {"sensitivity": 0.0}, "sensitivity"),
        ([1.0], {"sensitivity": math.inf}, "sensitivity"),
        ([1.0], {"noise_multiplier": -1.0}, "noise_multiplier"),
        ([1.0], {"noise_multiplier": math.nan}, "noise_multiplier"),
        ([1.0], {"granularity": 0.3}, "granularity"),
        ([1.0], {"granularity": 2.0**-60}, "granularity"),
        ([1.0], {"rounding_error": -1.0}, "rounding_error"),
    ],
)
def test_bad_releases_are_named(values: list[Any], arguments: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}:"):
        add_discrete_gaussian(values, **{"sensitivity": 1.0, "noise_multiplier": 1.0, **arguments})


def test_zero_noise_says_so() -> None:
    released, event = add_discrete_gaussian([0.5], sensitivity=1.0, noise_multiplier=0.0)
    assert released[0] == 0.5
    assert event == Gaussian(noise_multiplier=0.0)


@pytest.mark.parametrize("bound", [0.5, 3.0])
def test_the_lattice_gaussian_is_no_easier_to_tell_than_its_event(bound: float) -> None:
    """In one dimension, the exact hockey stick of the integer law stays below the Gaussian's, at any epsilon.

    Three times less variance than the lattice asks for is noticed.
    """
    steps = math.ceil(bound)  # an integer shift of at most this many steps

    def excess(variance: float) -> float:
        k = np.arange(-4000, 4001)
        mass = np.exp(-(k**2) / (2 * variance))
        mass /= mass.sum()
        worst = -1.0
        for epsilon in np.linspace(0.05, 4, 40):
            delta = np.maximum(mass[:-steps] - math.exp(epsilon) * mass[steps:], 0).sum()
            mu = 1.0
            claim = stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)
            worst = max(worst, delta / claim - 1)
        return worst

    variance = float(gaussian_variance(1.0, steps))
    assert excess(variance) <= 1e-9
    assert excess(variance / 3 if steps > 1 else steps**2 / 3) > 1e-9
