"""Ciphertexts: encryption, 6.75 bytes per coefficient on the wire, addition in that form, decryption.

On the wire c coefficients are three planes: the low 32 bits (uint32[c]), the next 16 (uint16[c]), the top 6
(four coefficients, a quarter of the vector apart, in three bytes). The server adds planes, with the carries
counted apart, and never expands a client's vector to 64-bit words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.protocols.errors import RemoteError
from privfed.protocols.oneshot.packing import Packing, is_noise
from privfed.protocols.oneshot.ring import Multiplier, N, Words, limbs_from
from privfed.protocols.oneshot.sampler import draw

Bytes = NDArray[np.uint8]
Keystream = Callable[[int], bytes]

POLYNOMIAL_BYTES = 8 * N
"""Keystream of one public polynomial."""
_CHUNK = 16
"""Polynomials encrypted at once: their transforms stay in a core's cache."""
_SPAN = 1 << 16
"""Coefficients added at once, for the same reason."""
_TWO_BITS = np.uint64(0x0303030303030303)
_CARRIES = 254
"""Additions after which a byte of counted carries must be emptied."""


def wire_size(coefficients: int) -> int:
    """Bytes of a ciphertext of so many coefficients, a multiple of 2048."""
    return coefficients * 27 // 4


@dataclass(frozen=True, slots=True)
class _Planes:
    """Views into a ciphertext: low uint32[c], middle uint16[c], top uint8[3, c/4]."""

    low: NDArray[np.uint32]
    middle: NDArray[np.uint16]
    top: Bytes

    @classmethod
    def of(cls, buffer: Bytes) -> _Planes:
        c = len(buffer) * 4 // 27
        low, middle, top = np.split(buffer, [4 * c, 6 * c])
        return cls(low.view("<u4"), middle.view("<u2"), top.reshape(3, c // 4))


def to_wire(words: Words) -> Bytes:
    """Encode residues modulo 2^54: uint64[c] -> uint8[6.75 c]."""
    out = np.empty(wire_size(len(words)), dtype=np.uint8)
    planes = _Planes.of(out)
    tops = np.empty(len(words), dtype=np.uint8)
    for start in range(0, len(words), _SPAN):
        span = slice(start, start + _SPAN)
        part = words[span].astype("<u8", copy=False)
        planes.low[span] = part.view("<u4")[::2]
        planes.middle[span] = part.view("<u2")[2::4]
        tops[span] = part.view(np.uint8)[6::8]
    lanes = tops.reshape(4, -1)
    lanes &= np.uint8(63)
    for byte in range(3):
        np.bitwise_or(lanes[byte], (lanes[3] << np.uint8(6 - 2 * byte)) & np.uint8(192), out=planes.top[byte])
    return out


class Accumulator:
    """Sum of ciphertexts modulo 2^54: wire form, and a byte of carries per entry of the two lower planes."""

    def __init__(self, coefficients: int) -> None:
        self._sum = _Planes.of(np.zeros(wire_size(coefficients), dtype=np.uint8))
        self._spare = np.zeros((3, coefficients // 4), dtype=np.uint8)
        """The two bits above each lane of the three top bytes, added up: they are the lanes of the last quarter."""
        self._fourth = np.zeros(coefficients // 4, dtype=np.uint8)
        """Carries into those."""
        self._from_low = np.zeros(coefficients, dtype=np.uint8)
        self._from_middle = np.zeros(coefficients, dtype=np.uint8)
        self._carried = np.empty(_SPAN, dtype=np.bool_)
        self._pending = 0

    def add(self, buffer: bytes | bytearray | memoryview | Bytes) -> None:
        """Add one ciphertext of the accumulator's size, exactly as it came: 0.3 ns per coefficient."""
        flat = buffer if isinstance(buffer, np.ndarray) else np.frombuffer(buffer, dtype=np.uint8)
        other = _Planes.of(flat)
        if self._pending == _CARRIES:
            self._settle()
        self._pending += 1
        self._add(self._sum.low, other.low, self._from_low)
        self._add(self._sum.middle, other.middle, self._from_middle)
        for mine, spare, theirs in zip(self._sum.top, self._spare, other.top, strict=True):
            mine += theirs  # the two bits above a lane collect rubbish that nothing reads
            # Eight bytes at a time: numpy has no fast shift of single ones. Bits that come from the next are masked.
            above = theirs.view(np.uint64) >> np.uint64(6)
            above &= _TWO_BITS
            spare += above.view(np.uint8)

    def _add(self, mine: NDArray[Any], theirs: NDArray[Any], carries: Bytes) -> None:
        for start in range(0, len(mine), _SPAN):
            part, more = mine[start : start + _SPAN], theirs[start : start + _SPAN]
            carried = self._carried[: len(part)]
            np.add(part, more, out=part)
            np.less(part, more, out=carried)
            carries[start : start + _SPAN] += carried.view(np.uint8)

    def _settle(self) -> None:
        """Move the counted carries up a plane."""
        self._pending = 0
        self._add(self._sum.middle, self._from_low.astype(np.uint16), self._from_middle)
        quarters = self._from_middle.reshape(4, -1)
        for mine, carried in zip([*self._sum.top, self._fourth], quarters, strict=True):
            mine += carried
        self._from_low[:] = 0
        self._from_middle[:] = 0

    def total(self) -> Words:
        """The sum so far: uint64[coefficients], of which the low 54 bits count."""
        self._settle()
        out = np.empty(len(self._sum.low), dtype=np.uint64)
        first, second, third = self._spare
        fourth = self._fourth + first + (second << np.uint8(2)) + (third << np.uint8(4))
        tops = np.concatenate([*self._sum.top, fourth])
        for start in range(0, len(out), _SPAN):
            span = slice(start, start + _SPAN)
            out[span] = tops[span]
            out[span] <<= np.uint64(16)
            out[span] |= self._sum.middle[span]
            out[span] <<= np.uint64(32)
            out[span] |= self._sum.low[span]
        return out


def encrypt(
    entries: NDArray[np.unsignedinteger[Any]],
    secret: NDArray[np.int8],
    packing: Packing,
    public: Keystream,
    noise: Keystream,
) -> Bytes:
    """Encrypt ring entries: a*s + e + (q/T)*m over as many public polynomials a as they need, in wire form.

    entries: uint32 or uint64[d] below 2^bits. secret: int8[2048]. public: keystream of the session's
    polynomials. noise: fresh secret keystream, from which the errors e are drawn.
    """
    multiplier = Multiplier.of(secret)
    total = packing.coefficients(len(entries))
    words = np.empty(total, dtype=np.uint64)
    for start in range(0, total, _CHUNK * N):
        stop = min(start + _CHUNK * N, total)
        part = words[start:stop]
        limbs = limbs_from(public(POLYNOMIAL_BYTES * ((stop - start) // N)))
        part[:] = multiplier.times(limbs).reshape(-1)
        part += draw(stop - start, noise).astype(np.int64).view(np.uint64)
        part += packing.pack(entries, start, stop)
    return to_wire(words)


def decrypt(
    sums: Words, secret: NDArray[np.int64], packing: Packing, public: Keystream, n: int, dimension: int
) -> Words:
    """Recover the summed entries: uint64[coefficients], summed secret int64[2048] -> uint64[dimension].

    n: ciphertexts in the sum. Raises RemoteError("garbage-ciphertext") when what is left beside the message
    is not the noise of n honest clients; nothing about the sum may then be released.
    """
    multiplier = Multiplier.of(secret)
    messages = np.empty(len(sums), dtype=np.uint64)
    for start in range(0, len(sums), _CHUNK * N):
        part = sums[start : start + _CHUNK * N]
        limbs = limbs_from(public(POLYNOMIAL_BYTES * (len(part) // N)))
        message, error = packing.split(part - multiplier.times(limbs).reshape(-1))
        if not is_noise(error.reshape(-1, N), n):
            raise RemoteError(
                "garbage-ciphertext", (), "the decrypted sum holds more than honest noise; run a new round"
            )
        messages[start : start + len(part)] = message
    return packing.unpack(messages, dimension)
