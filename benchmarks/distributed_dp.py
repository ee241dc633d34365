"""Measure distributed noise: CPU nanoseconds a coordinate on one core, best of nine.

    python benchmarks/distributed_dp.py [--dimension 1000000] [--dtype float64] [--json]

Encoding is clipping, rotation, rounding, noise and the modulus on a node; decoding is what the server does once a
round. The bar is for both together, noise included; `without_noise` is the same less the noise, which has a bar of its
own (`noise.py`). Skellam noise costs more where its local standard deviation is above 512 lattice steps.
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

from privfed.privacy.distributed import MECHANISMS, solve_noise

BAR = 60.0
CASES = ((1000, 14), (1000, 16), (100, 14), (100, 16), (100, 20), (1000, 20), (100, 32))


def best(work: Callable[[], object], repeats: int = 9) -> float:
    """Return the least CPU seconds of several runs."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def measure(nodes: int, bits: int, dimension: int, dtype: str, mechanism: str) -> dict[str, object]:
    """Return one row: nanoseconds a coordinate of the update, by step."""
    plan = solve_noise(
        clip=1.0,
        noise_multiplier=1.0,
        nodes=nodes,
        dimension=dimension,
        bits=bits,
        max_dropped=nodes // 5,
        mechanism=mechanism,
    )
    seed = os.urandom(32)
    update = np.random.default_rng(0).normal(size=dimension).astype(dtype)
    update /= np.linalg.norm(update)
    vector = plan.encode(update, seed)
    work = {
        "clip_rotate_round": lambda: plan.round_update(update, seed),
        "noise": plan.draw,
        "encode": lambda: plan.encode(update, seed),
        "decode": lambda: plan.decode(vector, seed, nodes),
    }
    times = {name: 1e9 * best(step) / dimension for name, step in work.items()}
    both = times["encode"] + times["decode"]
    return {
        "mechanism": mechanism,
        "nodes": nodes,
        "bits": bits,
        "dtype": dtype,
        "local_sd": round(plan.local_variance**0.5, 1),
        **{name: round(value, 1) for name, value in times.items()},
        "encode_decode": round(both, 1),
        "without_noise": round(both - times["noise"], 1),
        "within_bar": both <= BAR,
    }


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimension", type=int, default=1_000_000, help="coordinates of the update")
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64", help="of the update")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    rows = [
        measure(nodes, bits, options.dimension, options.dtype, mechanism)
        for mechanism in MECHANISMS
        for nodes, bits in CASES
    ]
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"ns a coordinate, {options.dimension} coordinates; the bar for encode + decode is {BAR:g}")
    print("  ".join(f"{name:>17}" for name in rows[0]))
    for row in rows:
        print("  ".join(f"{value!s:>17}" for value in row.values()))


if __name__ == "__main__":
    main()
