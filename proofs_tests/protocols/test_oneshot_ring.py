"""The one-shot protocol's ring: exact products, the sampler's law, packing, wire form, noise budget, garbage."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import scipy.stats
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from privfed.protocols import OneShot
from privfed.protocols.errors import LocalError, RemoteError
from privfed.protocols.oneshot import ciphertext, packing, ring, sampler

VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "oneshot_ring.json").read_text())
Q = 1 << 54


def stream(seed: bytes) -> Callable[[int], bytes]:
    """AES-128-CTR keystream from a zero block."""
    encryptor = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
    return lambda size: encryptor.update(bytes(size))


def negacyclic(a: list[int], b: list[int]) -> list[int]:
    """a * b in Z_q[X]/(X^N + 1): one product of big integers with a digit per coefficient."""
    digit, n = 128, len(a)
    product = sum(x << (digit * i) for i, x in enumerate(a)) * sum(x << (digit * i) for i, x in enumerate(b))
    full = []
    for _ in range(2 * n):
        low = product & ((1 << digit) - 1)
        low -= (low >> (digit - 1)) << digit
        full.append(low)
        product = (product - low) >> digit
    return [(full[i] - full[i + n]) % Q for i in range(n)]


def plain(folded: NDArray[Any]) -> list[int]:
    return [int(x) for x in ring.unfold(folded)]


def exact(limbs: ring.Limbs, small: NDArray[Any]) -> list[int]:
    return negacyclic([x % Q for x in plain(ring.value(limbs))], plain(small))


def random_limbs(generator: np.random.Generator, blocks: int = 1) -> ring.Limbs:
    return ring.limbs_from(generator.bytes(ciphertext.POLYNOMIAL_BYTES * blocks))


EXTREMES = {
    "gaussian": lambda g: g.integers(-25, 26, ring.N),
    "all at the cut": lambda g: np.full(ring.N, 85),
    "alternating at the cut": lambda g: np.resize([85, -85], ring.N),
    "a sum of 1000": lambda g: g.normal(0, 6.4 * 1000**0.5, ring.N).round().astype(np.int64),
    "a sum of 12336": lambda g: g.normal(0, 6.4 * 12336**0.5, ring.N).round().astype(np.int64),
    "half the share field": lambda g: np.resize([1048570, -1048571], ring.N),
    "zero": lambda g: np.zeros(ring.N, dtype=np.int64),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_product_equals_that_of_big_integers(name: str) -> None:
    generator = np.random.default_rng(len(name))
    small = EXTREMES[name](generator)
    limbs = random_limbs(generator)
    got = ring.Multiplier.of(small).times(limbs)
    assert [x % Q for x in plain(got[0])] == exact(limbs[0], small)


@pytest.mark.parametrize("sign", [-1, 1])
def test_product_of_the_largest_limbs_is_exact(sign: int) -> None:
    """Every limb at its extreme, signs aligned so that one coefficient reaches 2^26 * 85 * 2048."""
    limbs = np.full((1, 2, ring.N), -(1 << 26) if sign < 0 else (1 << 26) - 1, dtype=np.int32)
    small = np.full(ring.N, 85)
    got = ring.Multiplier.of(small).times(limbs)
    assert [x % Q for x in plain(got[0])] == exact(limbs[0], small)


@given(st.integers(0, 2**32), st.integers(2, 5))
@settings(max_examples=8, deadline=None)
def test_every_split_gives_the_same_product(seed: int, parts: int) -> None:
    generator = np.random.default_rng(seed)
    small = generator.integers(-85, 86, ring.N)
    limbs = random_limbs(generator, 3)
    expected = ring.Multiplier.of(small, parts=2).times(limbs) % np.uint64(Q)
    assert np.array_equal(ring.Multiplier.of(small, parts=parts).times(limbs) % np.uint64(Q), expected)


def test_limbs_grow_before_float64_runs_out() -> None:
    assert [ring.Multiplier.of(np.full(ring.N, size)).parts for size in (6, 200, 1000, 1 << 20)] == [
        2,
        2,
        3,
        4,
    ]
    with pytest.raises(ValueError, match="small has Euclidean norm"):
        ring.Multiplier.of(np.full(ring.N, 1 << 40))


def test_a_product_too_coarse_for_float64_is_refused_not_rounded() -> None:
    """Two limbs and a factor of 2^23 per coefficient: the result needs more than 53 bits."""
    generator = np.random.default_rng(3)
    small = generator.integers(-(1 << 23), 1 << 23, ring.N)
    with pytest.raises(ring.RoundingError, match="2 limbs"):
        ring.Multiplier.of(small, parts=2).times(random_limbs(generator))


def test_public_polynomials_are_uniform_limbs_of_the_keystream() -> None:
    words = np.arange(4 * ring.N, dtype="<u4") * np.uint32(2654435761)
    limbs = ring.limbs_from(words.tobytes())
    assert limbs.shape == (2, 2, ring.N)
    assert limbs.reshape(-1).tolist() == [(int(w) >> 5) - (1 << 26) for w in words]
    assert int(ring.value(limbs)[1, 7]) == (int(limbs[1, 0, 7]) + (int(limbs[1, 1, 7]) << 27)) % (1 << 64)


def test_fold_is_undone_by_unfold() -> None:
    x = np.arange(2 * ring.N).reshape(2, ring.N)
    assert np.array_equal(ring.unfold(ring.fold(x)), x)
    assert ring.fold(x)[0, :4].tolist() == [0, 1024, 1, 1025]


# --- sampler


def test_thresholds_are_the_exact_law_to_eighty_bits() -> None:
    """Against mpmath at 60 digits: each threshold is the nearest integer to 2^80 P[X <= k]."""
    with mpmath.workdps(60):
        weights = [mpmath.exp(-(mpmath.mpf(k) ** 2) / (2 * mpmath.mpf("6.4") ** 2)) for k in range(-85, 86)]
        total, running = mpmath.fsum(weights), mpmath.mpf(0)
        for weight, threshold in zip(weights, sampler.thresholds(), strict=False):
            running += weight
            assert abs(running / total * 2**80 - threshold) <= mpmath.mpf("0.500001")


def in_turn(parts: list[bytes]) -> Callable[[int], bytes]:
    """A random source that says these."""
    left = iter(parts)
    return lambda size: next(left)


def test_the_table_answers_as_a_search_through_all_thresholds() -> None:
    edges = sampler.thresholds()
    generator = np.random.default_rng(5)
    at_edges = [edge + offset for edge in edges for offset in (-1, 0, 1)]
    spread = [int.from_bytes(generator.bytes(10), "little") for _ in range(500)]
    draws = [u for u in [*at_edges, *spread, 0, (1 << 80) - 1] if 0 <= u < 1 << 80]
    for u in draws:
        parts = [(u >> 64).to_bytes(2, "little"), (u & ((1 << 64) - 1)).to_bytes(8, "little")]
        [value] = sampler.draw(1, in_turn(parts))
        assert value == sum(edge <= u for edge in edges) - 85


def test_histogram_of_noise_is_the_discrete_gaussian() -> None:
    """Chi-square over cells of expectation >= 20; a fair sampler fails at rate 10^-6, and the seed is fixed."""
    count = 1 << 20
    drawn = sampler.draw(count, stream(b"noise histogram!"))
    weights = np.exp(-(np.arange(-85, 86) ** 2) / (2 * 6.4**2))
    expected = weights / weights.sum() * count
    observed = np.bincount(drawn.astype(np.int64) + 85, minlength=171)
    keep = expected >= 20
    cells = [*observed[keep], observed[~keep].sum()], [*expected[keep], expected[~keep].sum()]
    assert scipy.stats.chisquare(cells[0], np.array(cells[1]) * count / sum(cells[1])).pvalue > 1e-6
    # A rounded continuous Gaussian of the same scale, and sd 6.3, must fail the same test: the test has teeth.
    generator = np.random.default_rng(8)
    narrow = np.bincount(generator.normal(0, 6.3, count).round().astype(np.int64) + 85, minlength=171)
    cells = [*narrow[keep], narrow[~keep].sum()], cells[1]
    assert scipy.stats.chisquare(cells[0], np.array(cells[1]) * count / sum(cells[1])).pvalue < 1e-6


def test_neighbouring_draws_are_uncorrelated() -> None:
    """|correlation| * sqrt(count) is a standard normal: beyond 5 at rate 6e-7."""
    drawn = sampler.draw(1 << 18, stream(b"lagged noise....")).astype(np.float64)
    for lag in (1, 2, 1024, 2048):
        correlation = float(np.mean(drawn[:-lag] * drawn[lag:])) / 6.4**2
        assert abs(correlation) * math.sqrt(len(drawn) - lag) < 5


def test_public_keystream_of_the_sampler_matches_the_vector() -> None:
    for case in VECTORS["sampler"]:
        assert sampler.draw(case["count"], stream(bytes.fromhex(case["seed"]))).tolist() == case["values"]


# --- packing


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_sums_of_packed_entries_come_back(data: st.DataObject) -> None:
    bounded = data.draw(st.booleans())
    n = data.draw(st.integers(2, 40))
    bits = data.draw(st.integers(1 if not bounded else 8, 42))
    slots = data.draw(st.sampled_from([None, 1, 2, 3]))
    dimension = data.draw(st.integers(1, 9000))
    try:
        chosen = packing.choose(bits, n, slots, bounded)
    except LocalError:
        return
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    if chosen.bounded:
        reach = max(1, (1 << (bits - 1)) // n)
        entries = generator.integers(-reach + 1, reach, (n, dimension)).view(np.uint64) % np.uint64(1 << bits)
    else:
        entries = generator.integers(0, 1 << bits, (n, dimension), dtype=np.uint64)
    size = chosen.coefficients(dimension)
    bound = packing.noise_bound(n)
    total = generator.integers(-bound, bound + 1, size).view(np.uint64)
    for row in entries:
        total = total + np.concatenate([chosen.pack(row, 0, size // 2), chosen.pack(row, size // 2, size)])
    message, error = chosen.split(total % np.uint64(Q))
    assert np.abs(error).max() <= bound
    expected = entries.sum(axis=0) % np.uint64(1 << bits)
    assert np.array_equal(chosen.unpack(message, dimension), expected)


@pytest.mark.parametrize(("slots", "bits", "n", "bounded"), VECTORS["budget"])
def test_noise_budget_is_used_and_not_exceeded(slots: int, bits: int, n: int, bounded: bool) -> None:
    """n is the largest number of nodes for which so many slots of so many bits can be read."""
    chosen = packing.choose(bits, n, slots, bounded)
    assert 1 << (chosen.shift - 1) > packing.noise_bound(n)
    with pytest.raises(LocalError, match=f"noise of n={n + 1} nodes"):
        packing.choose(bits, n + 1, slots, bounded)


def test_noise_bound_leaves_one_failure_in_a_trillion() -> None:
    """Subgaussian tail: P[|sum of n| > B] <= 2 exp(-B^2 / (2 n 6.4^2)), over 2^32 coefficients."""
    for n in (1, 2, 10, 1000, 12336):
        exponent = Fraction(packing.noise_bound(n) ** 2) / (2 * n * Fraction("40.96"))
        assert 2 * math.exp(-exponent) * 2**32 <= 2**-40


def test_wider_rings_take_fewer_slots() -> None:
    assert [packing.choose(bits, 1000, None, True).slots for bits in (14, 15, 21, 22, 42)] == [3, 2, 2, 1, 1]


@given(st.integers(2, 40), st.integers(1, 42), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_what_is_decrypted_is_a_function_of_the_ring_sum(n: int, bits: int, seed: int) -> None:
    """Not `bounded`: entries of one sum modulo 2^bits leave one message, however often they wrapped."""
    generator = np.random.default_rng(seed)
    chosen, wrap = packing.choose(bits, n, None, False), np.uint64((1 << bits) - 1)
    rows = generator.integers(0, 1 << bits, (2, n, 50), dtype=np.uint64)
    rows[1, -1] = (rows[0].sum(axis=0) - rows[1, :-1].sum(axis=0)) & wrap
    size = chosen.coefficients(50)
    totals = [sum((chosen.pack(row, 0, size) for row in half), np.zeros(size, np.uint64)) for half in rows]
    messages = [chosen.split(total % np.uint64(Q))[0] for total in totals]
    assert np.array_equal(*messages)


def test_several_slots_are_for_bounded_sums() -> None:
    """Between entries there is no room for carries, which would tell how many of the summands are negative."""
    assert all(packing.choose(bits, 10, None, False).slots == 1 for bits in (1, 10, 14, 20, 21, 42))
    for slots in (2, 3):
        with pytest.raises(LocalError, match="bounded"):
            packing.choose(8, 10, slots, False)
        with pytest.raises(ValueError, match="bounded"):
            OneShot(3, slots=slots)


# --- ciphertexts


@given(st.integers(1, 9), st.integers(0, 2**32))
@settings(max_examples=10, deadline=None)
def test_wire_form_adds_like_integers(count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    words = generator.integers(0, 1 << 64, (count, 2 * ring.N), dtype=np.uint64)
    accumulator = ciphertext.Accumulator(2 * ring.N)
    for row in words:
        wire = ciphertext.to_wire(row)
        assert len(wire) == ciphertext.wire_size(len(row)) == len(row) * 27 // 4
        accumulator.add(wire.tobytes())
    expected = words.sum(axis=0, dtype=np.uint64) % np.uint64(Q)
    for _ in range(2):
        assert np.array_equal(accumulator.total() % np.uint64(Q), expected)


def test_carries_survive_a_thousand_additions() -> None:
    """All ones is the worst case of every plane; 1000 rounds cross the limit of a byte of carries thrice."""
    words = np.full(ring.N, Q - 1, dtype=np.uint64)
    wire, accumulator = ciphertext.to_wire(words), ciphertext.Accumulator(ring.N)
    for _ in range(1000):
        accumulator.add(wire)
    assert set((accumulator.total() % np.uint64(Q)).tolist()) == {-1000 % Q}


def make(count: int, dimension: int, seed: int, bits: int = 20) -> tuple[Any, ...]:
    """(total words, summed secret, packing, public seed, expected sum, wires) of `count` encrypted vectors."""
    generator = np.random.default_rng(seed)
    chosen, public = packing.choose(bits, count, None, False), generator.bytes(16)
    secrets = np.zeros(ring.N, dtype=np.int64)
    accumulator = ciphertext.Accumulator(chosen.coefficients(dimension))
    entries = generator.integers(0, 1 << bits, (count, dimension), dtype=np.uint64)
    wires = []
    for row in entries:
        secret = sampler.draw(ring.N, stream(generator.bytes(16)))
        wires.append(ciphertext.encrypt(row, secret, chosen, stream(public), stream(generator.bytes(16))))
        accumulator.add(wires[-1])
        secrets += secret
    return accumulator.total(), secrets, chosen, public, entries.sum(axis=0) % np.uint64(1 << bits), wires


@pytest.mark.parametrize("dimension", [1, 2047, 4097, 70000])
def test_sum_of_ciphertexts_decrypts_to_the_sum(dimension: int) -> None:
    total, secret, chosen, public, expected, _ = make(5, dimension, seed=dimension)
    assert np.array_equal(ciphertext.decrypt(total, secret, chosen, stream(public), 5, dimension), expected)


def test_ciphertext_is_what_the_definition_says() -> None:
    """c - a s - (q/T) m is small, with a s from big integers: the error has the drawn sd, the message is on top."""
    generator = np.random.default_rng(11)
    chosen = packing.choose(21, 100, 2, True)
    entries = generator.integers(0, 1 << 21, 4096, dtype=np.uint64)
    secret = sampler.draw(ring.N, stream(b"s" * 16))
    accumulator = ciphertext.Accumulator(ring.N)
    accumulator.add(ciphertext.encrypt(entries, secret, chosen, stream(b"a" * 16), stream(b"e" * 16)))
    limbs = ring.limbs_from(stream(b"a" * 16)(ciphertext.POLYNOMIAL_BYTES))[0]
    product = ring.fold(np.array(exact(limbs, secret), dtype=np.uint64))
    errors = (accumulator.total() - product - chosen.pack(entries, 0, ring.N)) % np.uint64(Q)
    centred = (errors.astype(np.int64) + Q // 2) % Q - Q // 2
    assert np.array_equal(centred, sampler.draw(ring.N, stream(b"e" * 16)))


def test_vector_of_one_ciphertext() -> None:
    case = VECTORS["ciphertext"]
    entries = np.arange(case["dimension"], dtype=np.uint64) * np.uint64(case["step"]) % np.uint64(1 << case["bits"])
    chosen = packing.choose(case["bits"], case["n"], case["slots"], case["bounded"])
    secret = sampler.draw(ring.N, stream(bytes.fromhex(case["secret_seed"])))
    public, noise = stream(bytes.fromhex(case["public_seed"])), stream(bytes.fromhex(case["noise_seed"]))
    wire = ciphertext.encrypt(entries, secret, chosen, public, noise)
    assert hashlib.sha256(wire.tobytes()).hexdigest() == case["sha256"]


def garble(words: NDArray[Any], how: str, shift: int) -> None:
    if how == "one coefficient":
        words[5] += np.uint64(1 << (shift - 2))
    elif how == "random":
        words[:] = np.frombuffer(os.urandom(words.nbytes), dtype=np.uint64)
    elif how == "tripled noise":
        more = np.random.default_rng(1).normal(0, 3 * 6.4 * 5**0.5, len(words))
        words += more.round().astype(np.int64).view(np.uint64)


@pytest.mark.parametrize("how", ["one coefficient", "random", "tripled noise"])
def test_garbage_is_detected_before_a_sum_is_released(how: str) -> None:
    total, secret, chosen, public, _, _ = make(5, 3000, seed=9)
    total = total.copy()
    garble(total, how, chosen.shift)
    with pytest.raises(RemoteError, match="garbage-ciphertext"):
        ciphertext.decrypt(total, secret, chosen, stream(public), 5, 3000)


def test_a_wrong_public_polynomial_or_secret_is_garbage() -> None:
    total, secret, chosen, public, _, _ = make(3, 3000, seed=10)
    with pytest.raises(RemoteError, match="garbage-ciphertext"):
        ciphertext.decrypt(total, secret, chosen, stream(bytes(16)), 3, 3000)
    secret[100] += 1
    with pytest.raises(RemoteError, match="garbage-ciphertext"):
        ciphertext.decrypt(total, secret, chosen, stream(public), 3, 3000)


def test_noise_with_the_right_bound_and_the_wrong_size_is_garbage() -> None:
    """Each coefficient within the bound, yet too large together: only the mean square sees it."""
    error = np.full((2, ring.N), packing.noise_bound(4) // 2)
    assert packing.is_noise(np.zeros_like(error), 4)
    assert not packing.is_noise(error, 4)
    error[:] = 0
    error[1, 3] = packing.noise_bound(4) + 1
    assert not packing.is_noise(error, 4)
    assert not packing.is_noise(-error, 4)
