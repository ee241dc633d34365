"""The code under LightSecAgg: any threshold of shares decode exactly, any `privacy` of them are uniform."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.protocols.errors import LocalError
from privfed.protocols.lightsecagg import exact
from privfed.protocols.lightsecagg.code import Code, Extension


def ring(bits: int, size: int, seed: int) -> exact.Words:
    drawn = np.random.default_rng(seed).integers(0, 2**64, size, dtype=np.uint64, endpoint=False)
    words: exact.Words = (drawn >> np.uint64(64 - bits)).astype(exact.words(bits))
    return words


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(1, 64), st.integers(1, 60), st.integers(0, 2**32), st.data())
def test_any_threshold_of_shares_decode_sums(n: int, bits: int, dimension: int, seed: int, data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, n))
    privacy = data.draw(st.integers(0, threshold - 1))
    code = Code(n, threshold, privacy, bits)
    vectors = [ring(bits, dimension, seed + i) for i in range(3)]
    coded = [code.encode(v, ring(bits, code.noise_size(dimension), seed + 9 + i)) for i, v in enumerate(vectors)]
    mask = exact.words(bits)(2**bits - 1)
    shares, total = sum(coded[1:], coded[0]) & mask, sum(vectors[1:], vectors[0]) & mask
    some = data.draw(st.permutations(range(n)))[:threshold]
    decoded = code.decode({i: shares[i] for i in some}, dimension)
    assert decoded is not None and decoded.dtype == exact.words(bits)
    np.testing.assert_array_equal(decoded, total)


@pytest.mark.parametrize(("n", "threshold", "privacy"), [(4, 3, 1), (5, 3, 2), (6, 4, 1)])
def test_every_choice_of_responders_decodes(n: int, threshold: int, privacy: int) -> None:
    code = Code(n, threshold, privacy, 64)
    vector = ring(64, 23, 1)
    shares = code.encode(vector, ring(64, code.noise_size(23), 2))
    for some in combinations(range(n), threshold):
        np.testing.assert_array_equal(code.decode({i: shares[i] for i in some}, 23), vector)


@pytest.mark.parametrize(("n", "threshold", "privacy"), [(2, 2, 1), (3, 3, 2), (3, 2, 1)])
def test_privacy_is_perfect_in_a_small_ring(n: int, threshold: int, privacy: int) -> None:
    """All noise of Z_2 enumerated: the joint value of any `privacy` shares has one distribution for all data."""
    code = Code(n, threshold, privacy, 1)
    size = code.share_size(code.data_rows)
    for holders in combinations(range(n), privacy):
        views = []
        for vector in ([0] * code.data_rows, [1, 0] * (code.data_rows // 2)):
            view: Counter[bytes] = Counter()
            for noise in product((0, 1), repeat=code.noise_size(code.data_rows)):
                coded = code.encode(np.array(vector, np.uint32), np.array(noise, np.uint32), list(holders))
                view[coded.tobytes()] += 1
            views.append(view)
        assert views[0] == views[1]
        assert len(views[0]) == 2 ** (privacy * size)  # and it is the uniform one


@pytest.mark.parametrize("n", [4, 7, 9])
def test_any_privacy_rows_of_the_noise_generator_are_invertible(n: int) -> None:
    """Odd determinants make shares of `privacy` holders uniform in every ring Z_2^bits, whatever the data."""
    code = Code(n, n - 1, (n - 1) // 2, 8)
    m = code.ring.degree
    for holders in combinations(range(n), code.privacy):
        noise = code.generator(list(holders))[:, (code.threshold - code.privacy) * m :]
        assert round(np.linalg.det(noise % 2)) % 2 == 1


@pytest.mark.parametrize("degree", range(2, 11))
def test_the_extension_is_a_field_modulo_2(degree: int) -> None:
    field = Extension(degree)
    units = np.arange(1, 2**degree)
    assert (field.times(units, field.inverse(units)) == 1).all()
    assert (field.times(units, np.zeros_like(units)) == 0).all()
    other = np.roll(units, 1)
    lifted = np.einsum(
        "krc,kc->kr", field.matrices(field.lift(units)[:, None]).reshape(-1, degree, degree), field.lift(other)
    )
    np.testing.assert_array_equal(lifted % 2, field.lift(field.times(units, other)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 64), st.integers(1, 63), st.integers(1, 40), st.integers(0, 2**32))
def test_products_are_exact(bits: int, left_bits: int, inner: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    bound = 2 ** (left_bits - 1)
    a = rng.integers(-bound, bound, (3, inner))
    a.flat[0] = -bound
    b = ring(bits, inner * 5, seed).reshape(inner, 5)
    b[0, 0] = 2**bits - 1
    expected = (a.astype(object) @ b.astype(object)) % 2**bits
    assert (exact.product(a, b, bits).astype(object) == expected).all()


def test_products_are_exact_at_the_extremes() -> None:
    """The largest entries of the sizes in use, where a float64 sum is closest to losing a bit."""
    for inner, left, bits in ((1600, 5, 32), (490, 2**31, 32), (1600, 2**34, 32), (1600, 2**62, 64)):
        for fill in (2 ** (bits - 1), 2 ** (bits - 1) - 1, 2**bits - 1):
            for sign in (1, -1):
                a = np.full((1, inner), sign * left, dtype=np.int64)
                b = np.full((inner, 1), fill, dtype=exact.words(bits))
                assert int(exact.product(a, b, bits)[0, 0]) == sign * left * fill * inner % 2**bits


@pytest.mark.parametrize("bits", [1, 8, 32, 64])
def test_a_changed_share_contradicts_the_others(bits: int) -> None:
    code = Code(7, 4, 1, bits)
    shares = code.encode(ring(bits, 50, 1), ring(bits, code.noise_size(50), 2))
    weights = bytes(range(7, 7 + code.check_bytes(7)))
    honest = dict(enumerate(shares))
    np.testing.assert_array_equal(code.decode(honest, 50, weights), ring(bits, 50, 1))
    for holder in range(7):
        for entry in (0, len(shares[0]) - 1):
            bent = shares[holder].copy()
            bent[entry] ^= exact.words(bits)(1 << (bits - 1))
            assert code.decode({**honest, holder: bent}, 50, weights) is None


def test_bad_parameters_are_refused() -> None:
    for n, threshold, privacy in ((1, 1, 0), (3, 4, 1), (3, 2, 2), (3, 2, -1), (1024, 700, 100)):
        with pytest.raises(LocalError, match="no code"):
            Code(n, threshold, privacy, 32)
    with pytest.raises(ValueError, match="noise"):
        Code(3, 3, 2, 32).encode(ring(32, 5, 0), ring(32, 1, 0))
    with pytest.raises(ValueError, match="weights"):
        code = Code(4, 3, 1, 32)
        code.decode(dict(enumerate(code.encode(ring(32, 5, 0), ring(32, code.noise_size(5), 0)))), 5, b"x")
