"""Shamir shares of secret polynomials, modulo 2^21 - 9, and their 21-bit wire form.

Coefficient by coefficient, member j of the committee (j = 1..m) holds the value at j of a random polynomial
of degree t - 1 through the secret. Shares add like secrets, so t members can open a sum of secrets, no single
one. Products are float64 matrix products, exact because t (2^21 - 9)^2 < 2^53.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from privfed.protocols import shamir
from privfed.protocols.errors import DecodeError, RemoteError
from privfed.protocols.oneshot.ciphertext import Keystream
from privfed.protocols.oneshot.ring import N
from privfed.protocols.oneshot.sampler import CUT

PRIME = shamir.P
MAX_COMMITTEE = shamir.MAX_THRESHOLD
"""Members, and so the threshold, for which float64 products are exact."""
MAX_NODES = (PRIME // 2) // CUT
"""12336 nodes: the sum of as many secrets stays below half the prime, so its sign is known."""
SHARE_BYTES = N * 21 // 8
"""5376 bytes: a share of a polynomial on the wire."""

Residues = NDArray[np.int64]


def _product(a: Residues, b: Residues) -> Residues:
    """a @ b modulo PRIME, inner dimension at most MAX_COMMITTEE."""
    exact = a.astype(np.float64) @ b.astype(np.float64)
    out: Residues = exact.astype(np.int64)
    out %= PRIME
    return out


def _power(base: Residues, exponent: int) -> Residues:
    out = np.ones_like(base)
    while exponent:
        if exponent & 1:
            out = out * base % PRIME
        base = base * base % PRIME
        exponent >>= 1
    return out


@lru_cache(maxsize=4)
def _powers(members: int, threshold: int) -> Residues:
    """x^k for x = 1..members, k = 0..threshold - 1."""
    out = np.empty((members, threshold), dtype=np.int64)
    out[:, 0], points = 1, np.arange(1, members + 1)
    for k in range(1, threshold):
        out[:, k] = out[:, k - 1] * points % PRIME
    out.setflags(write=False)
    return out


def split(secret: NDArray[np.int8], threshold: int, members: int, keystream: Keystream) -> Residues:
    """Share a secret int8[2048] among 1..members: int64[members, 2048]. keystream: fresh and secret."""
    coefficients = shamir.uniform(threshold * N, keystream).reshape(threshold, N)
    coefficients[0] = secret.astype(np.int64) % PRIME
    return _product(_powers(members, threshold), coefficients)


def _lagrange(points: Residues, targets: Residues) -> Residues:
    """Weights w with f(target_r) = sum_i w_ri f(points_i) for every polynomial of degree below len(points).

    targets: none of the points. Returns int64[len(targets), len(points)].
    """
    away = (targets[:, None] - points[None, :]) % PRIME
    denominators, numerators = away.copy(), np.ones((len(targets), 1), dtype=np.int64)
    for i, point in enumerate(points):
        from_point = (points - point) % PRIME
        from_point[i] = 1
        denominators = denominators * from_point % PRIME
        numerators = numerators * away[:, i : i + 1] % PRIME
    out: Residues = numerators * _power(denominators, PRIME - 2) % PRIME
    return out


def _mismatches(points: Residues, shares: Residues, threshold: int) -> NDArray[np.bool_]:
    """Coefficients at which the shares beyond the first `threshold` do not lie on the polynomial of those."""
    expected = _product(_lagrange(points[:threshold], points[threshold:]), shares[:threshold])
    out: NDArray[np.bool_] = (expected != shares[threshold:]).any(axis=0)
    return out


def _liars(points: Residues, shares: Residues, threshold: int) -> list[int]:
    """Positions whose removal alone makes the rest consistent; none unless a surplus share is left."""
    if len(points) < threshold + 2:
        return []
    found = []
    for position in range(len(points)):
        rest = np.delete(np.arange(len(points)), position)
        if not _mismatches(points[rest], shares[rest], threshold).any():
            found.append(position)
    return found


def combine(answers: dict[int, Residues], threshold: int, members: Sequence[int], count: int) -> Residues:
    """Open a sum of `count` secrets: node -> share int64[2048], at least `threshold` of them -> int64[2048].

    members: the committee in order. Raises RemoteError("inconsistent-shares") when surplus answers contradict
    each other, naming the liar if there is one and t + 2 answered, and when the result is no sum of small
    secrets.
    """
    nodes = sorted(answers, key=members.index)
    points = np.array([members.index(node) + 1 for node in nodes])
    shares = np.stack([answers[node] for node in nodes])
    wrong = _mismatches(points, shares, threshold)
    if wrong.any():
        liars = [nodes[position] for position in _liars(points, shares[:, np.flatnonzero(wrong)[:8]], threshold)]
        raise RemoteError("inconsistent-shares", liars, "the committee's answers lie on no common polynomial")
    weights = _lagrange(points[:threshold], np.zeros(1, dtype=np.int64))
    total: Residues = _product(weights, shares[:threshold])[0]
    total[total > PRIME // 2] -= PRIME
    if int(np.abs(total).max()) > CUT * count:
        raise RemoteError("inconsistent-shares", (), "the opened secret is no sum of small ones")
    return total


def to_wire(share: Residues) -> bytes:
    """Encode residues int64[2048] in 21 bits each: a plane of low 16 bits, then 8 x 5 bits in 5 bytes."""
    low = share.astype("<u2")
    high = (share >> 16).astype(np.uint64).reshape(-1, 8) << np.arange(0, 40, 5, dtype=np.uint64)
    packed = np.bitwise_or.reduce(high, axis=1).astype("<u8").view(np.uint8).reshape(-1, 8)[:, :5]
    return bytes(low.tobytes() + packed.tobytes())


def from_wire(wire: bytes | memoryview) -> Residues:
    """Decode 5376 bytes into int64[2048]. DecodeError for another length or a value that is no residue."""
    if len(wire) != SHARE_BYTES:
        raise DecodeError(f"a share takes {SHARE_BYTES} bytes, got {len(wire)}")
    out = np.frombuffer(wire, dtype="<u2", count=N).astype(np.int64)
    groups = np.zeros((N // 8, 8), dtype=np.uint8)
    groups[:, :5] = np.frombuffer(wire, dtype=np.uint8, offset=2 * N).reshape(-1, 5)
    lanes = (groups.view("<u8") >> np.arange(0, 40, 5, dtype=np.uint64)) & np.uint64(31)
    out += lanes.reshape(-1).astype(np.int64) << 16
    if int(out.max()) >= PRIME:
        raise DecodeError("a share holds a value beyond the prime 2^21 - 9")
    return out
