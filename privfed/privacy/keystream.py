"""A cryptographic stream of random words: AES-256 in counter mode under a key from the operating system.

Every draw that protects somebody comes from here. The key is fresh for each stream, is never stored and never
printed; `random` is there for tests and for callers that bring their own secret source.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

RandomBytes = Callable[[int], bytes]
_ZEROS = memoryview(bytes(1 << 15))  # encrypted piece by piece: it stays in the first-level cache


class Keystream:
    """Expand 32 bytes of `random` into an unlimited stream of uniform words.

    Distinguishing b blocks (16 bytes each) from uniform bits means breaking AES-256, but for a permutation's
    advantage of b^2 / 2^129. A stream serves one call and is thrown away, so b is 2^23 for ten million samples.
    Raises ValueError if `random` returns fewer bytes than asked for.
    """

    __slots__ = ("_encryptor",)

    def __init__(self, random: RandomBytes = os.urandom) -> None:
        key = random(32)
        if len(key) != 32:
            raise ValueError(f"random: returned {len(key)} bytes for 32; pass a callable like os.urandom")
        self._encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def uint8(self, size: int) -> npt.NDArray[np.uint8]:
        """Draw `size` uniform bytes, writable."""
        out = np.empty(size + 15, np.uint8)
        room, done = out.data, 0
        while done < size:
            done += self._encryptor.update_into(_ZEROS[: size - done], room[done:])
        return out[:size]

    def uint16(self, size: int) -> npt.NDArray[np.uint16]:
        """Draw `size` uniform 16-bit words."""
        return self.uint8(2 * size).view(np.uint16)

    def uint32(self, size: int) -> npt.NDArray[np.uint32]:
        """Draw `size` uniform 32-bit words."""
        return self.uint8(4 * size).view(np.uint32)

    def uint64(self, size: int) -> npt.NDArray[np.uint64]:
        """Draw `size` uniform 64-bit words."""
        return self.uint8(8 * size).view(np.uint64)

    def bits(self, count: int) -> int:
        """Draw one uniform integer of `count` bits, a multiple of 8."""
        return int.from_bytes(self.uint8(count // 8).tobytes(), "big")
