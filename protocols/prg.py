"""Masks from seeds, as fast as AES.

The stream of a 16-byte seed is cut into chunks of 1 MiB; chunk j is the AES-128-CTR keystream whose initial counter
block is be96(j) || be32(2). That is what AES-128-GCM with nonce be96(j) adds to its text, and OpenSSL's GCM is the
faster of the two paths. Both give the same bits, and any chunk can be had without the ones before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

SEED_BYTES = 16
CHUNK = 1 << 20
BLOCK = 1 << 18
"""Bytes handled at a time: one block of the sum and one of keystream stay in the second-level cache."""

Words = NDArray[np.uint32] | NDArray[np.uint64]
_ZEROS = memoryview(bytes(BLOCK))


def word(bits: int) -> type[np.uint32] | type[np.uint64]:
    """Return the integer type whose ring contains Z_2^bits: uint32 up to 32 bits, uint64 up to 64."""
    if not 1 <= bits <= 64:
        raise ValueError(f"bits must be between 1 and 64, got {bits}")
    return np.uint32 if bits <= 32 else np.uint64


def reduce(vector: Words, bits: int) -> None:
    """Reduce modulo 2^bits, in place."""
    width = vector.dtype.itemsize * 8
    if bits < width:
        np.bitwise_and(vector, vector.dtype.type((1 << bits) - 1), out=vector)


def _stream(seed: bytes, chunk: int) -> CipherContext:
    return Cipher(algorithms.AES(seed), modes.GCM(chunk.to_bytes(12, "big"))).encryptor()


def draws(seed: bytes) -> Callable[[int], bytes]:
    """Return the bytes of a seed's stream, each call the next ones: randomness that can be drawn again alike."""
    stream = _stream(seed, 0)
    return lambda size: stream.update(bytes(size))


def keystream(seed: bytes, size: int) -> bytes:
    """Return the first `size` bytes of the stream of a seed."""
    parts = [_stream(seed, start // CHUNK).update(bytes(min(CHUNK, size - start))) for start in range(0, size, CHUNK)]
    return b"".join(parts)


def expand(seed: bytes, size: int, bits: int) -> Words:
    """Return `size` uniform entries below 2^bits."""
    vector = np.zeros(size, dtype=np.dtype(word(bits)))
    add_masks(vector, [seed], [])
    reduce(vector, bits)
    return vector


def add_masks(total: Words, plus: Sequence[bytes], minus: Sequence[bytes], *, threads: int = 1) -> None:
    """Add the masks of the seeds in `plus` and subtract those in `minus`, in place, modulo 2^32 or 2^64.

    total: contiguous little-endian uint32 or uint64. Blocks are the outer loop and seeds the inner one, so that the sum
    is read and written once. threads: chunks in parallel (AES and numpy release the interpreter lock).
    """
    if total.dtype.byteorder == ">" or not total.flags.c_contiguous:
        raise ValueError("total must be contiguous and little-endian")
    if any(len(seed) != SEED_BYTES for seed in (*plus, *minus)):
        raise ValueError(f"a mask seed has {SEED_BYTES} bytes")
    if not plus and not minus:
        return
    starts = range(0, total.nbytes, CHUNK)
    if threads <= 1 or len(starts) == 1:
        for start in starts:
            _add_chunk(total, start, plus, minus)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda start: _add_chunk(total, start, plus, minus), starts))


def _add_chunk(total: Words, start: int, plus: Sequence[bytes], minus: Sequence[bytes]) -> None:
    number, item = start // CHUNK, total.dtype.itemsize
    streams = [(_stream(seed, number), True) for seed in plus] + [(_stream(seed, number), False) for seed in minus]
    buffer = bytearray(BLOCK)
    end = min(start + CHUNK, total.nbytes)
    for at in range(start, end, BLOCK):
        size = min(BLOCK, end - at)
        part = total[at // item : (at + size) // item]
        target = memoryview(buffer)[:size]
        mask = np.frombuffer(target, dtype=total.dtype)
        for stream, added in streams:
            stream.update_into(_ZEROS[:size], target)
            (np.add if added else np.subtract)(part, mask, out=part)
