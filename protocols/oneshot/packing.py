"""How ring entries share a coefficient, and how many ciphertexts fit before the noise reaches the message.

A coefficient of 54 bits holds, from the top, `slots` entries and below them `shift` bits for noise.

* One slot: any entries, exact in Z_2^bits; what wraps leaves the coefficient at its top and is gone.
* More (`bounded` only): entries are read as signed, and whoever quantised them promises that every signed sum fits
  `bits` bits; then a borrow from the entry above is known and undone.

Room between entries for the carries of sums that wrap would make any entries readable, and is not offered: whoever
decrypts reads the carries as well, so how many nodes' entries are negative, beside the sum in Z_2^bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.protocols.errors import LocalError
from privfed.protocols.oneshot.ring import LOG_Q, N, Words
from privfed.protocols.oneshot.sampler import SIGMA

MAX_SLOTS = 3
_DEVIATIONS = math.sqrt(2 * math.log(2) * (40 + 1 + 32))
"""10.06 standard deviations: 2^32 coefficients all stay below with probability 1 - 2^-40."""


def noise_bound(n: int) -> int:
    """Largest absolute error that a sum of n honest ciphertexts may show."""
    return math.ceil(_DEVIATIONS * SIGMA * math.sqrt(n))


@dataclass(frozen=True, slots=True)
class Packing:
    """Place of the entries in a coefficient. Build with `choose`, which checks the noise budget."""

    bits: int
    slots: int

    @property
    def bounded(self) -> bool:
        """Whether signed sums must fit the bits: entries that share a coefficient borrow from one another."""
        return self.slots > 1

    @property
    def shift(self) -> int:
        """Bits below the lowest entry: log2 of the factor q/T between message and coefficient."""
        return LOG_Q - self.slots * self.bits

    def coefficients(self, dimension: int) -> int:
        """Coefficients that hold `dimension` entries: a multiple of 2048."""
        return -(-dimension // (self.slots * N)) * N

    def pack(self, entries: NDArray[np.unsignedinteger[Any]], start: int, stop: int) -> Words:
        """Message part of coefficients start..stop: uint64[stop - start], already multiplied by q/T.

        Entry i is in slot i // c of coefficient i % c, c = coefficients(len(entries)).
        """
        step = self.coefficients(len(entries))
        out = np.zeros(stop - start, dtype=np.uint64)
        for slot in range(self.slots):
            part = entries[slot * step + start : min(slot * step + stop, (slot + 1) * step)]
            wide = part.astype(np.uint64)
            if slot < self.slots - 1:
                spare = np.uint64(64 - self.bits)
                wide = ((wide << spare).view(np.int64) >> np.int64(spare)).view(np.uint64)
            wide <<= np.uint64(self.shift + slot * self.bits)
            out[: len(part)] += wide
        return out

    def unpack(self, message: Words, dimension: int) -> Words:
        """Entries of the summed message (q/T divided out): uint64[coefficients] -> uint64[dimension]."""
        step = len(message)
        out = np.empty(self.slots * step, dtype=np.uint64)
        half = np.uint64(1 << (self.bits - 1))
        for slot in range(self.slots - 1):
            message = message + (half << np.uint64(slot * self.bits))
        for slot in range(self.slots):
            part = out[slot * step : (slot + 1) * step]
            np.right_shift(message, np.uint64(slot * self.bits), out=part)
            if slot < self.slots - 1:
                part -= half
            part &= np.uint64((1 << self.bits) - 1)
        return out[:dimension]

    def split(self, sums: Words) -> tuple[Words, NDArray[np.int64]]:
        """Separate message and noise: uint64[...] modulo 2^54 -> (message, error)."""
        rounded = sums + np.uint64(1 << (self.shift - 1))
        error = (rounded & np.uint64((1 << self.shift) - 1)).view(np.int64) - np.int64(1 << (self.shift - 1))
        rounded >>= np.uint64(self.shift)
        rounded &= np.uint64((1 << (LOG_Q - self.shift)) - 1)
        return rounded, error


def _fits(bits: int, slots: int, n: int) -> Packing | None:
    packing = Packing(bits, slots)
    return packing if packing.shift > 0 and 1 << (packing.shift - 1) > noise_bound(n) else None


def choose(bits: int, n: int, slots: int | None, bounded: bool) -> Packing:
    """Choose the most slots per coefficient (or exactly `slots`) whose sum of n ciphertexts can be read.

    Raises LocalError when there is no such packing, as the sum would drown in the noise, and for several slots of
    entries that are not `bounded`, whose carries would be readable.
    """
    if slots is not None and slots > 1 and not bounded:
        raise LocalError(f"slots={slots} need bounded=True: carries between entries would tell more than their sum")
    for count in range(MAX_SLOTS if bounded else 1, 0, -1) if slots is None else (slots,):
        packing = _fits(bits, count, n)
        if packing is not None:
            return packing
    wanted = f"{slots or 1} x {bits} bits"
    raise LocalError(
        f"{wanted} per coefficient leave no room for the noise of n={n} nodes in {LOG_Q} bits: "
        "lower the bits of the ring, use fewer slots or fewer nodes"
    )


def is_noise(error: NDArray[np.int64], n: int) -> bool:
    """Tell the error of n honest ciphertexts from that of garbage, each polynomial of int64[blocks, 2048].

    Honest: no coefficient beyond `noise_bound`, and a mean square below twice its expectation; wrong with
    probability 2^-40 for 2^32 coefficients. Garbage is uniform, with 33 times the mean square: missed with
    probability below 2^-1000.
    """
    bound = noise_bound(n)
    if int(error.max(initial=0)) > bound or int(error.min(initial=0)) < -bound:
        return False
    floats = error.astype(np.float64)
    squares = np.einsum("ij,ij->i", floats, floats)
    return bool((squares <= 2 * n * SIGMA**2 * N).all())
