"""Measure LightSecAgg: CPU time of one thread, best of several, beside what the machine can do.

    python benchmarks/lightsecagg.py [--dimension 1000000] [--bits 32] [--repeats 3] [--json]

One row per (nodes, privacy T, vanishing D, threshold U). encode: a node codes its mask into n shares. seal: sealing
them. mask: masking the input. open: a holder opens and adds the shares of U survivors. decode: the server recovers
the sum of masks from the last U nodes, so that no share is a favoured one; with 0 and with D gone, which must cost
the same; checked: the same with every node's share in the consistency check. Limits of the same run: the exact
float64 products that encoding and decoding need at the rate of one large product, and the AES keystream of the mask
and noise. Every decoding is compared with the mask.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
import time
from collections.abc import Callable

import numpy as np

from privfed.protocols import codec, keys, prg
from privfed.protocols.lightsecagg.code import Code
from privfed.protocols.lightsecagg.exact import Words, plan
from privfed.protocols.packed import vector_bytes

CASES = ((30, 10, 9, 21), (100, 50, 30, 70), (100, 33, 33, 67), (200, 66, 60, 140))


def best(work: Callable[[], object], repeats: int) -> float:
    """Return the least CPU milliseconds of several runs."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return 1e3 * min(times)


def product_rate(repeats: int) -> float:
    """Multiply-adds a millisecond in float64, of one product as large as the protocol's."""
    left, right = np.ones((700, 490)), np.ones((490, 2048))
    return left.size * right.shape[1] / best(lambda: left @ right, 5 * repeats)


def measure(case: tuple[int, int, int, int], dimension: int, bits: int, repeats: int, rate: float) -> dict[str, float]:
    n, privacy, gone, threshold = case
    code, seed = Code(n, threshold, privacy, bits), bytes(16)
    mask = prg.expand(seed, dimension, bits)
    noise = prg.expand(bytes(15) + b"\1", code.noise_size(dimension), bits)
    shares = code.encode(mask, noise)
    channel = keys.Channel(bytes(32), bytes(32))
    packed = [bytes(codec.encode_vector(share, bits)) for share in shares]
    sealed = channel.seal(1, 2, packed[0])

    def add_up() -> Words:
        total: Words = shares[0].copy()
        for _ in range(threshold - 1):
            total += codec.decode_vector(channel.open(1, 2, sealed), len(shares[0]), bits)
        return total

    def decode(first: int, weights: bytes = b"") -> Words | None:
        return code.decode({i: shares[i] for i in range(first, n)}, dimension, weights)

    weights = os.urandom(code.check_bytes(n))
    for found in (decode(0), decode(gone), decode(0, weights)):
        if found is None or not np.array_equal(found, mask):
            raise SystemExit("a decoding is wrong")
    m, width = code.ring.degree, code.width(dimension)
    left, a, right, b = plan(1 << (bits - 1), bits, threshold * m)  # decoding has coefficients of full size
    limbs = sum(i * a + j * b < bits for i in range(left) for j in range(right))
    stream = best(lambda: prg.expand(seed, dimension + len(noise), bits), repeats)
    return {
        "n": n,
        "T": privacy,
        "D": gone,
        "U": threshold,
        "encode_ms": best(lambda: code.encode(mask, noise), repeats),
        "encode_limit_ms": n * m * threshold * m * width / rate,
        "keystream_ms": stream,
        "seal_ms": best(lambda: [channel.seal(1, 2, text) for text in packed], repeats),
        "mask_ms": best(lambda: mask + mask, repeats),
        "open_ms": best(add_up, repeats),
        "decode_ms": best(lambda: decode(0), repeats),
        "decode_dropped_ms": best(lambda: decode(gone), repeats),
        "decode_checked_ms": best(lambda: decode(0, weights), repeats),
        "decode_limit_ms": code.data_rows * threshold * m * width * limbs / rate,
        "offline_upload_MB": sum(map(len, packed)) * (n - 1) / n / 1e6,
        "masked_upload_MB": vector_bytes(dimension, bits) / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure LightSecAgg.")
    parser.add_argument("--dimension", type=int, default=1_000_000)
    parser.add_argument("--bits", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rate = product_rate(options.repeats)
    rows = [measure(case, options.dimension, options.bits, options.repeats, rate) for case in CASES]
    if options.json:
        print(json.dumps({"gigaflops": rate * 2e-6, "rows": rows}, indent=1))
        return
    print(f"float64 products: {rate * 2e-6:.1f} GFlop/s; dimension {options.dimension}, {options.bits} bits")
    names = list(rows[0])
    print("  ".join(f"{name:>12}" for name in names))
    for row in rows:
        print("  ".join(f"{row[name]:>12.4g}" for name in names))


if __name__ == "__main__":
    main()
