"""Masks, shares, keys, codec and fixed point: laws, oracles from second libraries, and bytes that must be refused."""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from Crypto.Cipher import AES
from Crypto.Util import Counter
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.protocols import keys
from privfed.protocols.codec import (
    Reader,
    decode,
    decode_vector,
    encode_session,
    encode_vector,
    node_list,
    read_session,
    table,
)
from privfed.protocols.errors import DecodeError, LocalError, RangeError, RemoteError
from privfed.protocols.packed import vector_bytes
from privfed.protocols.prg import CHUNK, add_masks, expand, keystream, reduce, word
from privfed.protocols.quantize import FixedPoint, check_sum, from_ring, to_ring
from privfed.protocols.session import Session
from privfed.protocols.shamir import (
    P,
    decode_share,
    encode_share,
    inconsistent,
    interpolate,
    limbs,
    secret_of,
    split,
    uniform,
)

VECTORS = Path(__file__).resolve().parents[1] / "vectors"
secret = st.binary(min_size=32, max_size=32)
seed = st.binary(min_size=16, max_size=16)


def ctr_oracle(key: bytes, size: int) -> bytes:
    """The stream as its definition says it, with pycryptodome's plain CTR."""
    out = b""
    for chunk in range(-(-size // CHUNK)):
        counter = Counter.new(32, prefix=chunk.to_bytes(12, "big"), initial_value=2)
        out += AES.new(key, AES.MODE_CTR, counter=counter).encrypt(bytes(min(CHUNK, size - chunk * CHUNK)))
    return out


@given(seed, st.integers(0, 300))
def test_keystream_is_plain_ctr(key: bytes, size: int) -> None:
    assert keystream(key, size) == ctr_oracle(key, size)


def test_keystream_crosses_chunks() -> None:
    size = 2 * CHUNK + 12
    assert keystream(b"k" * 16, size) == ctr_oracle(b"k" * 16, size)
    wide = np.zeros(size // 4, np.uint32)
    add_masks(wide, [b"k" * 16], [])
    assert wide.tobytes() == ctr_oracle(b"k" * 16, size)
    threaded = np.zeros(size // 4, np.uint32)
    add_masks(threaded, [b"k" * 16], [], threads=2)
    assert np.array_equal(wide, threaded)


@given(st.lists(seed, max_size=5), st.integers(1, 64), st.integers(0, 40))
def test_masks_cancel_in_every_ring(seeds: list[bytes], bits: int, size: int) -> None:
    start = np.arange(size).astype(word(bits))
    reduce(start, bits)
    total = start.copy()
    add_masks(total, seeds, [])
    add_masks(total, [], list(reversed(seeds)))
    reduce(total, bits)
    assert np.array_equal(total, start)


@given(seed, st.integers(1, 64))
def test_expanded_mask_stays_in_the_ring(key: bytes, bits: int) -> None:
    mask = expand(key, 64, bits)
    assert int(mask.max()) < 1 << bits


def test_mask_entries_are_uniform() -> None:
    """Chi-square over 256 cells, 2^18 draws, fixed seed: a true uniform fails with probability 1e-6."""
    counts = np.bincount(expand(b"fixed seed 16 by", 1 << 18, 8), minlength=256)
    expected = (1 << 18) / 256
    assert ((counts - expected) ** 2 / expected).sum() < 371.0  # chi2.isf(1e-6, 255)


def test_a_short_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        add_masks(np.zeros(4, np.uint32), [b"short"], [])


@given(secret)
def test_limbs_are_the_secret(value: bytes) -> None:
    assert secret_of(limbs(value)) == value


def test_limbs_of_no_secret_are_refused() -> None:
    too_big = np.full(13, (1 << 20) - 1)
    assert secret_of(too_big) is None  # 260 bits
    assert secret_of(np.array([1 << 20] + [0] * 12)) is None


@given(
    st.integers(1, 7), st.integers(0, 3), st.lists(secret, min_size=1, max_size=3), st.randoms(use_true_random=False)
)
def test_any_threshold_shares_recover(threshold: int, extra: int, values: list[bytes], random: Any) -> None:
    points = random.sample(range(1, 500), threshold + extra)
    shares = split(values, points, threshold)
    chosen = random.sample(range(len(points)), threshold)
    found = interpolate(shares[chosen], [points[i] for i in chosen])
    assert [secret_of(one) for one in found] == values
    assert inconsistent(shares, points, threshold) == []


def test_shares_match_plain_integer_lagrange() -> None:
    points, threshold = [3, 1, 9, 200], 3
    shares = split([bytes(range(32))], points, threshold)
    for subset in itertools.combinations(range(4), threshold):
        for limb in range(13):
            total = 0
            for i in subset:
                weight = 1
                for j in subset:
                    if j != i:
                        weight = weight * -points[j] * pow(points[i] - points[j], -1, P) % P
                total += int(shares[i, 0, limb]) * weight
            assert total % P == limbs(bytes(range(32)))[limb]


def test_fewer_shares_are_uniform() -> None:
    """Two secrets, one share of two: the same chi-square over 64 cells passes for both; false alarm 1e-6 each."""
    for value in (bytes(32), b"\xff" * 32):
        drawn = np.concatenate([split([value], [5, 6], 2)[0].ravel() for _ in range(1500)])
        counts = np.bincount(drawn * 64 // P, minlength=64)
        assert ((counts - len(drawn) / 64) ** 2 / (len(drawn) / 64)).sum() < 131.0  # chi2.isf(1e-6, 63)


def test_rejection_covers_the_field() -> None:
    drawn = uniform(200_000)
    assert drawn.min() >= 0
    assert drawn.max() < P
    calls = iter([(P + 3).to_bytes(4, "little") * 9, (7).to_bytes(4, "little") * 9])
    assert uniform(1, lambda size: next(calls)).tolist() == [7]


def test_a_flipped_share_is_seen() -> None:
    points = list(range(1, 7))
    shares = split([b"s" * 32], points, 3)
    shares[4, 0, 2] = (shares[4, 0, 2] + 1) % P
    assert inconsistent(shares, points, 3) == [5]


@pytest.mark.parametrize("points", [[1, 1, 2], [0, 1, 2], [P, 1, 2]])
def test_bad_points_are_refused(points: list[int]) -> None:
    with pytest.raises(LocalError):
        split([bytes(32)], points, 2)


@given(st.lists(st.integers(0, P - 1), min_size=13, max_size=13))
def test_share_encoding_round_trips(values: list[int]) -> None:
    share = np.array(values)
    assert np.array_equal(decode_share(encode_share(share), 1), share[None, :])


def test_share_outside_the_field_is_refused() -> None:
    assert decode_share(P.to_bytes(3, "little") * 13, 1) is None
    assert decode_share(bytes(38), 1) is None


@given(st.integers(1, 64), st.integers(0, 50), st.randoms(use_true_random=False))
def test_vector_encoding_is_canonical(bits: int, size: int, random: Any) -> None:
    values = np.array([random.getrandbits(bits) for _ in range(size)], dtype=word(bits))
    data = bytes(encode_vector(values, bits))
    assert len(data) == vector_bytes(size, bits)
    assert np.array_equal(decode_vector(data, size, bits), values)
    if size * bits % 8:
        bad = data[:-1] + bytes([data[-1] | 0x80])
        with pytest.raises(DecodeError):
            decode_vector(bad, size, bits)
    with pytest.raises(DecodeError):
        decode_vector(data + b"\0", size, bits)


@given(st.integers(1, 64), st.sampled_from([1, 16383, 16384, 65535, 65536, 65537, 140_000]), st.integers(0, 7))
@settings(max_examples=40)
def test_long_vectors_are_packed_as_short_ones_and_read_wherever_they_lie(bits: int, size: int, offset: int) -> None:
    values = np.frombuffer(np.random.default_rng(size + bits).bytes(8 * size), dtype="<u8") >> np.uint64(64 - bits)
    data = memoryview(bytes(offset) + bytes(encode_vector(values.astype(word(bits)), bits)))[offset:]
    assert np.array_equal(decode_vector(data, size, bits), values)
    number = sum(int(value) << (place * bits) for place, value in enumerate(values[:16].tolist()))
    first = vector_bytes(min(size, 16), bits)
    assert bytes(data[: first - 1]) == number.to_bytes(first, "little")[: first - 1]


sessions = st.builds(
    Session,
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.sampled_from(["train", "evaluate", "query.mean"]),
    st.sets(st.integers(1, 2**63 - 1), min_size=1, max_size=6).map(lambda s: tuple(sorted(s))),
    st.integers(0, 2**36),
    st.integers(1, 64),
    secret,
)


@given(sessions)
def test_session_round_trips(session: Session) -> None:
    assert decode(encode_session(session), read_session) == session


@given(sessions, st.data())
def test_changed_session_bytes_never_decode_to_the_same(session: Session, data: st.DataObject) -> None:
    raw = bytearray(encode_session(session))
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(DecodeError):
        assert decode(bytes(raw), read_session) != session


@given(st.binary(max_size=200))
def test_reader_takes_any_bytes(data: bytes) -> None:
    for read in (read_session, Reader.nodes, lambda r: r.table(3), lambda r: r.blob()):
        with contextlib.suppress(DecodeError):
            decode(data, read)


def test_lists_must_ascend() -> None:
    good = node_list([2, 9])
    assert decode(good, Reader.nodes) == (2, 9)
    for bad in (good[:4] + good[12:] + good[4:12], good[:4] + good[4:12] * 2, b"\0\0\0\1" + bytes(8)):
        with pytest.raises(DecodeError):
            decode(bad, Reader.nodes)
    assert {k: bytes(v) for k, v in decode(table([(3, b"x"), (1, b"y")]), lambda r: r.table(1)).items()} == {
        1: b"y",
        3: b"x",
    }


def test_key_agreement_and_sealing() -> None:
    a, b = b"a" * 32, b"b" * 32
    left = keys.agree(a, 2, keys.exchange_public(b))
    assert left == keys.agree(b, 1, keys.exchange_public(a))
    channel = keys.Channel(left, b"c" * 32)
    text = channel.seal(1, 2, b"share")
    assert keys.Channel(left, b"c" * 32).open(1, 2, text) == b"share"
    for sender, receiver, context, sealed in (
        (2, 1, b"c" * 32, text),
        (1, 2, b"d" * 32, text),
        (1, 2, b"c" * 32, text[:-1] + bytes([text[-1] ^ 1])),
    ):
        with pytest.raises(RemoteError, match="bad-share"):
            keys.Channel(left, context).open(sender, receiver, sealed)


LOW_ORDER = [
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
]


@pytest.mark.parametrize("point", LOW_ORDER)
def test_low_order_points_are_refused(point: str) -> None:
    with pytest.raises(RemoteError, match="low-order-key"):
        keys.agree(b"k" * 32, 7, bytes.fromhex(point))


def test_published_vectors() -> None:
    """X25519 [RFC7748 6.1], Ed25519 [RFC8032 7.1, test 2]."""
    facts = json.loads((VECTORS / "primitives.json").read_text())
    for case in facts["x25519"]:
        shared = keys.agree(bytes.fromhex(case["secret"]), 1, bytes.fromhex(case["public"]))
        assert shared.hex() == case["shared"]
    for case in facts["stream"]:
        assert keystream(bytes.fromhex(case["seed"]), case["size"]).hex() == case["stream"]
    for case in facts["bad_stream"]:
        assert keystream(bytes.fromhex(case["seed"]), case["size"]).hex() != case["stream"]


def test_signatures_bind_label_and_parts() -> None:
    key = b"s" * 32
    signature = keys.sign(key, b"label", b"one", b"two")
    public = keys.signing_public(key)
    assert keys.verified(public, signature, b"label", b"one", b"two")
    assert not keys.verified(public, signature, b"label", b"onetwo", b"")
    assert not keys.verified(public, signature, b"other", b"one", b"two")
    assert not keys.verified(b"\0" * 32, signature, b"label", b"one", b"two")


@given(st.integers(2, 64), st.data())
def test_ring_round_trips(bits: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(-(1 << (bits - 1)), (1 << (bits - 1)) - 1), max_size=8))
    array = np.array(values, dtype=np.int64)
    assert np.array_equal(from_ring(to_ring(array, bits), bits), array)


@given(
    st.integers(1, 20),
    st.integers(8, 64),
    st.floats(1e-6, 1e6),
    st.lists(st.floats(-1, 1), min_size=1, max_size=6),
)
def test_fixed_point_error_is_within_its_bound(clients: int, bits: int, bound: float, unit: list[float]) -> None:
    grid = FixedPoint(bound, clients, bits)
    values = np.array(unit) * bound
    total = np.zeros(len(values), dtype=np.uint64)
    for _ in range(clients):
        total += grid.encode(values)
    total &= np.uint64((1 << bits) - 1)
    error = np.abs(grid.decode(total) - values * clients)
    assert (error <= grid.error_bound).all()


@pytest.mark.parametrize("value", [1.0001, -1.0001, np.inf, np.nan])
def test_out_of_bound_is_an_error_not_a_wrap(value: float) -> None:
    with pytest.raises(LocalError):
        FixedPoint(1.0, 3, 16).encode(np.array([0.0, value]))


def test_possible_overflow_raises() -> None:
    check_sum(5, 3, 5)
    with pytest.raises(RangeError):
        check_sum(6, 3, 5)
    with pytest.raises(RangeError):
        FixedPoint(1.0, 200, 8)
