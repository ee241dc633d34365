"""Shamir's secret sharing, many secrets and holders in one matrix product [Sha79].

A 32-byte secret is cut into 13 limbs of 20 bits; each limb is shared on its own modulo p = 2^21 - 9. Products of two
residues stay below 2^42, so a float64 product of matrices with up to 2047 inner terms is exact. Sharing limb by limb is
information-theoretic: t - 1 shares of every limb say nothing about any of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from privfed.protocols.errors import LocalError
from privfed.protocols.session import Random, os_random

P = (1 << 21) - 9
SECRET_BYTES = 32
LIMB_BITS = 20
LIMBS = 13
MAX_THRESHOLD = 2047
SHARE_BYTES = LIMBS * 3
"""A share on the wire: 13 residues of 3 bytes."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
_PLACES = np.arange(LIMBS) * LIMB_BITS


def limbs(secret: bytes) -> Ints:
    """Cut a 32-byte secret into 13 limbs below 2^20."""
    number = int.from_bytes(secret, "little")
    return np.array([(number >> int(place)) & ((1 << LIMB_BITS) - 1) for place in _PLACES], dtype=np.int64)


def secret_of(values: Ints) -> bytes | None:
    """Put limbs together again; None when they are those of no 32-byte secret."""
    number = 0
    for place, value in zip(_PLACES.tolist(), values.tolist(), strict=True):
        if value >> LIMB_BITS:
            return None
        number |= value << place
    return number.to_bytes(SECRET_BYTES, "little") if number >> (8 * SECRET_BYTES) == 0 else None


def uniform(count: int, random: Random = os_random) -> Ints:
    """Return `count` uniform residues modulo p, by rejection."""
    kept = np.empty(0, dtype=np.int64)
    while len(kept) < count:
        drawn = np.frombuffer(random(4 * (count - len(kept) + 8)), dtype="<u4").astype(np.int64) & ((1 << 21) - 1)
        kept = np.concatenate([kept, drawn[drawn < P]])
    return kept[:count]


@lru_cache(maxsize=64)
def _powers(points: tuple[int, ...], threshold: int) -> Floats:
    base = np.array(points, dtype=np.int64)
    matrix = np.empty((len(points), threshold))
    column = np.ones(len(points), dtype=np.int64)
    for power in range(threshold):
        matrix[:, power] = column
        column = column * base % P
    matrix.flags.writeable = False
    return matrix


def _product(left: Floats, right: Floats) -> Ints:
    # Every entry is below 2047 * 2^42 < 2^53: the float64 product is exact.
    return (left @ right).astype(np.int64) % P


def check_points(points: Sequence[int], threshold: int) -> None:
    """Raise LocalError unless the points are distinct, in 1..p-1, and at least `threshold` of them."""
    if len(set(points)) != len(points) or not all(0 < point < P for point in points):
        raise LocalError("share points must be distinct and between 1 and p - 1")
    if not 1 <= threshold <= min(len(points), MAX_THRESHOLD):
        raise LocalError(f"threshold must be between 1 and {min(len(points), MAX_THRESHOLD)}, got {threshold}")


def split(secrets: Sequence[bytes], points: Sequence[int], threshold: int, random: Random = os_random) -> Ints:
    """Share secrets of 32 bytes among the points.

    Returns int64[points, secrets, 13], residues modulo p. Any `threshold` points recover, fewer know nothing.
    """
    check_points(points, threshold)
    if any(len(secret) != SECRET_BYTES for secret in secrets):
        raise LocalError(f"a secret has {SECRET_BYTES} bytes")
    width = len(secrets) * LIMBS
    # The top coefficient may be zero: excluding it would tell that the degree is full.
    coefficients = np.empty((threshold, width))
    coefficients[0] = np.concatenate([limbs(secret) for secret in secrets])
    coefficients[1:] = uniform((threshold - 1) * width, random).reshape(threshold - 1, width)
    shares = _product(_powers(tuple(points), threshold), coefficients)
    return shares.reshape(len(points), len(secrets), LIMBS)


@lru_cache(maxsize=256)
def _weights(points: tuple[int, ...], at: int) -> Floats:
    xs = np.array(points, dtype=np.int64)
    upper = np.ones(len(xs), dtype=np.int64)
    lower = np.ones(len(xs), dtype=np.int64)
    for index, x in enumerate(points):
        others = np.arange(len(xs)) != index
        upper[others] = upper[others] * ((at - x) % P) % P
        lower[others] = lower[others] * ((xs[others] - x) % P) % P
    weights = np.array([int(a) * pow(int(b), -1, P) % P for a, b in zip(upper, lower, strict=True)], dtype=np.float64)
    weights.flags.writeable = False
    return weights


def interpolate(shares: Ints, points: Sequence[int], at: int = 0) -> Ints:
    """Evaluate at `at` the polynomials through shares int64[points, ...]; returns int64[...]."""
    flat = shares.reshape(len(points), -1).astype(np.float64)
    return _product(_weights(tuple(points), at)[None, :], flat).reshape(shares.shape[1:])


def inconsistent(shares: Ints, points: Sequence[int], threshold: int) -> list[int]:
    """Return the points beyond the first `threshold` whose shares are off the polynomial through the first ones."""
    first = tuple(points[:threshold])
    return [
        point
        for point, share in zip(points[threshold:], shares[threshold:], strict=True)
        if not np.array_equal(interpolate(shares[:threshold], first, point), share)
    ]


def encode_share(share: Ints) -> bytes:
    """Return 3 little-endian bytes a residue; share: int64[13 * secrets]."""
    return share.astype("<u4").reshape(-1, 1).view(np.uint8)[:, :3].tobytes()


def decode_share(data: bytes | memoryview, secrets: int) -> Ints | None:
    """Return int64[secrets, 13], or None for another length or a residue >= p."""
    raw = np.frombuffer(data, dtype=np.uint8)
    if raw.size != SHARE_BYTES * secrets:
        return None
    wide = np.zeros((LIMBS * secrets, 4), dtype=np.uint8)
    wide[:, :3] = raw.reshape(-1, 3)
    values = wide.view("<u4").reshape(-1).astype(np.int64)
    return None if values.max(initial=0) >= P else values.reshape(secrets, LIMBS)
