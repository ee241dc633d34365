"""An MDS code over Z_2^bits: any `threshold` of n shares give a vector back, any `privacy` of them say nothing.

LightSecAgg [SHY+22] codes masks over a prime field and so sums modulo that prime. Here the code works in the ring of
the sum itself, so the sum is exact modulo 2^bits for any input and nothing but it is revealed. Z_2^bits has too few
units for a Vandermonde matrix; its Galois extension Z_2^bits[x] / (f) with f irreducible of degree m modulo 2 has
enough, as a square matrix is invertible there exactly when it is modulo 2, over the field of 2^m elements. The
generator lifts a Vandermonde matrix over that field with coefficients 0 and 1: entries stay so small that 32-bit data
needs a single exact float64 matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from privfed.protocols.errors import LocalError
from privfed.protocols.lightsecagg.exact import Ints, Words, product, signed, words

MAX_NODES = 1023

# Primitive polynomials modulo 2, bit i the coefficient of x^i, by degree.
_PRIMITIVE = {2: 0x7, 3: 0xB, 4: 0x13, 5: 0x25, 6: 0x43, 7: 0x83, 8: 0x11D, 9: 0x211, 10: 0x409}


@dataclass(frozen=True)
class Extension:
    """Z[x] / (f), f primitive of degree m modulo 2, with 0/1 coefficients; elements are arrays [..., m]."""

    degree: int

    @cached_property
    def _tables(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Powers of x modulo 2, twice around, and their logarithms (the logarithm of 0 is unused)."""
        order = (1 << self.degree) - 1
        power = np.ones(2 * order, dtype=np.int64)
        for i in range(1, order):
            shifted = int(power[i - 1]) << 1
            power[i] = shifted ^ (_PRIMITIVE[self.degree] if shifted > order else 0)
        power[order:] = power[:order]
        log = np.zeros(order + 1, dtype=np.int64)
        log[power[:order]] = np.arange(order)
        return power, log

    def times(self, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
        """Product modulo 2 of field elements written as integers."""
        power, log = self._tables
        result: NDArray[np.int64] = np.where((a == 0) | (b == 0), 0, power[log[a] + log[b]])
        return result

    def inverse(self, a: NDArray[np.int64]) -> NDArray[np.int64]:
        """Inverse modulo 2 of field elements other than 0."""
        power, log = self._tables
        result: NDArray[np.int64] = power[(len(log) - 1 - log[a]) % (len(log) - 1)]
        return result

    def lift(self, a: NDArray[np.int64]) -> NDArray[np.int64]:
        """Coefficients 0 or 1 of field elements written as integers: [...] -> [..., m]."""
        result: NDArray[np.int64] = (a[..., None] >> np.arange(self.degree)) & 1
        return result

    @cached_property
    def _action(self) -> NDArray[np.int64]:
        """[i, r, c]: coefficient r of x^i * x^c, over the integers."""
        m = self.degree
        low = -((_PRIMITIVE[m] >> np.arange(m)) & 1)  # x^m = -(f - x^m)
        rows = [np.eye(m, dtype=np.int64)[i] for i in range(m)]
        for _ in range(m - 1):
            last = rows[-1]
            rows.append(np.concatenate(([0], last[:-1])) + last[-1] * low)
        return np.array([[rows[i + c] for c in range(m)] for i in range(m)]).transpose(0, 2, 1)

    def matrices(self, a: Ints) -> Ints:
        """Multiplication by each element as an m x m block: [rows, columns, m] -> [rows * m, columns * m].

        Entries grow by a factor of at most 8 or wrap around modulo 2^64.
        """
        rows, columns, m = a.shape
        action = self._action.transpose(0, 2, 1)  # [i, c, r]
        if int(np.abs(a).max(initial=0)) < 1 << 48:  # exact in floats, where products are fast
            spread = (a.reshape(-1, m).astype(np.float64) @ action.reshape(m, -1)).astype(np.int64)
        else:
            spread = a.reshape(-1, m) @ action.reshape(m, -1)
        blocks = spread.reshape(rows, columns, m, m).transpose(0, 3, 1, 2)
        return blocks.reshape(rows * m, columns * m)


@dataclass(frozen=True)
class Code:
    """Shares of a vector: n of them, `threshold` decode, `privacy` reveal nothing. Share i belongs to point i + 1."""

    n: int
    threshold: int
    privacy: int
    bits: int

    def __post_init__(self) -> None:
        if not 0 <= self.privacy < self.threshold <= self.n <= MAX_NODES or self.n < 2:
            raise LocalError(
                f"no code has n={self.n}, threshold={self.threshold}, privacy={self.privacy}: "
                f"0 <= privacy < threshold <= n <= {MAX_NODES} and n >= 2 must hold"
            )

    @cached_property
    def ring(self) -> Extension:
        return Extension(max(2, self.n.bit_length()))

    @property
    def data_rows(self) -> int:
        """Sub-blocks that the data is cut into."""
        return (self.threshold - self.privacy) * self.ring.degree

    def width(self, dimension: int) -> int:
        """Columns of the data matrix: ceil(dimension / data_rows)."""
        return -(-dimension // self.data_rows)

    def share_size(self, dimension: int) -> int:
        """Entries of one share of a vector of `dimension` entries."""
        return self.ring.degree * self.width(dimension)

    def noise_size(self, dimension: int) -> int:
        """Uniform entries that `encode` needs to hide such a vector."""
        return self.privacy * self.share_size(dimension)

    @cached_property
    def _points(self) -> NDArray[np.int64]:
        """[n, threshold]: powers of the points, modulo 2. The noise meets the upper powers: any `privacy` rows of
        those are a Vandermonde matrix times units, so the noise alone makes that many shares uniform."""
        points = np.arange(1, self.n + 1)
        columns = [np.ones(self.n, dtype=np.int64)]
        for _ in range(self.threshold - 1):
            columns.append(self.ring.times(columns[-1], points))
        return np.stack(columns, axis=1)

    def generator(self, shares: list[int] | range) -> Ints:
        """Rows of the generator for these shares, as an integer matrix over Z_2^bits."""
        lifted = self.ring.lift(self._points[np.array(shares, dtype=np.int64)])
        return self.ring.matrices(lifted)

    def encode(self, vector: Words, noise: Words, shares: list[int] | range | None = None) -> Words:
        """Code a vector (entries below 2^bits) into one row per share.

        noise: `noise_size(len(vector))` uniform entries, used once. shares: which ones, default all n.
        """
        length = self.width(len(vector))
        if len(noise) != self.noise_size(len(vector)):
            raise ValueError(f"noise must have {self.noise_size(len(vector))} entries, got {len(noise)}")
        stacked = np.zeros((self.threshold * self.ring.degree, length), dtype=words(self.bits))
        flat = stacked[: self.data_rows].reshape(-1)
        flat[: len(vector)] = vector
        stacked[self.data_rows :] = noise.reshape(self.privacy * self.ring.degree, length)
        coded = product(self.generator(range(self.n) if shares is None else shares), stacked, self.bits)
        return coded.reshape(coded.shape[0] // self.ring.degree, self.ring.degree * length)

    def decode(self, shares: dict[int, Words], dimension: int, weights: bytes = b"") -> Words | None:
        """Recover the vector from `threshold` shares; None when the further ones contradict them.

        shares: index -> row of `encode`, or sums of rows of several encodings. weights: random bytes that mix the
        further shares into the check, `check_bytes(len(shares))` of them; without them only `threshold` are used.
        """
        used = sorted(shares)[: len(shares) if weights else self.threshold]
        first, further = used[: self.threshold], used[self.threshold :]
        if further:
            plan = self._with_check(self._solution(first, self.threshold), further, weights)
        else:
            plan = self._solution(first, self.threshold - self.privacy)
        length = self.width(dimension)
        rows = np.stack([shares[i] for i in used]).reshape(len(used) * self.ring.degree, length)
        found = product(signed(self.ring.matrices(signed(plan, self.bits)).view(np.uint64), self.bits), rows, self.bits)
        if found[self.data_rows :].any():
            return None
        return found[: self.data_rows].reshape(-1)[:dimension]

    def check_bytes(self, shares: int) -> int:
        """Random bytes that `decode` needs to check `shares` shares: wrong ones pass with probability <= 2^-40."""
        return 2 * self._checks * max(0, shares - self.threshold)

    @property
    def _checks(self) -> int:
        return -(-40 // self.ring.degree)

    def _with_check(self, solve: NDArray[np.uint64], further: list[int], weights: bytes) -> NDArray[np.uint64]:
        """Append rows that are zero on consistent shares: random combinations of (predicted - received)."""
        if len(weights) != self.check_bytes(self.threshold + len(further)):
            raise ValueError("weights must have check_bytes(len(shares)) bytes")
        m = self.ring.degree
        drawn = np.frombuffer(weights, dtype="<u2").astype(np.int64) % (1 << m)
        mix = self.ring.lift(drawn.reshape(self._checks, len(further))).astype(np.uint64)
        rows = self.ring.lift(self._points[np.array(further)]).astype(np.uint64)
        predicted = self._times(self._times(mix, rows, self.bits), solve, self.bits)
        top = np.concatenate((solve, predicted))[[*range(self.threshold - self.privacy), *range(-self._checks, 0)]]
        side = np.zeros((len(top), len(further), m), dtype=np.uint64)
        side[-self._checks :] = -mix
        return np.concatenate((top, side), axis=1)

    def _times(self, a: NDArray[np.uint64], b: NDArray[np.uint64], bits: int) -> NDArray[np.uint64]:
        """Matrix product of elements: [r, k, m] x [k, c, m] -> [r, c, m], modulo 2^bits."""
        return self._apply(self.ring.matrices(signed(a, bits)), b, bits)

    def _apply(self, a: Ints, b: NDArray[np.uint64], bits: int) -> NDArray[np.uint64]:
        """The same with the left factor's blocks already written out: [r * m, k * m] x [k, c, m] -> [r, c, m]."""
        m = self.ring.degree
        flat: Words = b.transpose(0, 2, 1).reshape(-1, b.shape[1]).astype(words(bits))
        out = product(a, flat, bits).astype(np.uint64)
        return out.reshape(-1, m, b.shape[1]).transpose(0, 2, 1)

    def _solution(self, shares: list[int], rows: int) -> NDArray[np.uint64]:
        """First rows of the inverse of the generator's rows of `threshold` shares: [rows, threshold, m]."""
        forward = self.generator(shares)
        inverse = self.ring.lift(self._field_inverse(np.array(shares) + 1)).astype(np.uint64)
        known = 1
        while known < self.bits:  # Newton: each step doubles the low bits that are right
            target = min(2 * known, self.bits)
            error = -self._apply(forward, inverse, target)
            error[range(self.threshold), range(self.threshold), 0] += np.uint64(1)
            error = (error & _mask(target)) >> np.uint64(known)
            if target == self.bits:
                inverse = inverse[:rows]
            inverse = inverse + (self._times(inverse, error, target - known) << np.uint64(known))
            known = target
        return inverse[:rows]

    def _field_inverse(self, points: NDArray[np.int64]) -> NDArray[np.int64]:
        """Inverse modulo 2 of the Vandermonde matrix of these points, by Lagrange's polynomials."""
        times, size = self.ring.times, len(points)
        master = np.zeros(size + 1, dtype=np.int64)  # product of (x - point), lowest coefficient first
        master[0] = 1
        for point in points:
            shifted = np.concatenate(([0], master[:-1]))
            master = shifted ^ times(master, point)
        rows = np.empty((size, size), dtype=np.int64)  # [power, point]: master / (x - point)
        rows[size - 1] = 1
        for power in range(size - 2, -1, -1):
            rows[power] = master[power + 1] ^ times(points, rows[power + 1])
        value = rows[size - 1]
        for power in range(size - 2, -1, -1):
            value = rows[power] ^ times(points, value)
        return times(rows, self.ring.inverse(value)[None, :])


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)
