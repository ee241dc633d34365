"""Measure exact noise sampling: CPU nanoseconds a sample on one core, best of five, beside numpy's own samplers.

    python benchmarks/noise.py [--size 1000000] [--json]

numpy's samplers are neither exact nor cryptographic; they say what the machine can do, not what to use.
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

from privfed.privacy import noise
from privfed.privacy.mechanisms import add_discrete_gaussian


def best(work: Callable[[], object], repeats: int = 5) -> float:
    """Return the least CPU seconds of several runs."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def cases(size: int) -> dict[str, tuple[Callable[[], object], Callable[[], object] | None]]:
    """Name each draw, with numpy's nearest relative."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=size)
    return {
        "discrete Gaussian, sigma 10": (
            lambda: noise.discrete_gaussian(size, 10.0),
            lambda: rng.normal(0.0, 10.0, size),
        ),
        "discrete Gaussian, sigma 1e6": (
            lambda: noise.discrete_gaussian(size, 1e6),
            lambda: rng.normal(0.0, 1e6, size),
        ),
        "discrete Laplace, scale 10": (
            lambda: noise.discrete_laplace(size, 10.0),
            lambda: rng.laplace(0.0, 10.0, size),
        ),
        "Skellam, sigma 10": (
            lambda: noise.skellam(size, 100.0),
            lambda: rng.poisson(50.0, size) - rng.poisson(50.0, size),
        ),
        "Skellam, sigma 1e4": (
            lambda: noise.skellam(size, 1e8),
            lambda: rng.poisson(5e7, size) - rng.poisson(5e7, size),
        ),
        "binomial, 1000 trials": (
            lambda: noise.binomial(size, 1000),
            lambda: rng.binomial(1000, 0.5, size),
        ),
        "add_discrete_gaussian": (
            lambda: add_discrete_gaussian(values, sensitivity=1.0, noise_multiplier=1.0),
            None,
        ),
    }


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1_000_000, help="samples in one vector")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    rows = []
    for name, (ours, theirs) in cases(options.size).items():
        cold = best(ours, 1)
        warm = best(ours)
        row = {
            "draw": name,
            "first_call_ms": round(1e3 * (cold - warm), 2),
            "ns_per_sample": round(1e9 * warm / options.size, 2),
            "million_per_second": round(options.size / warm / 1e6, 1),
            "numpy_ns_per_sample": None if theirs is None else round(1e9 * best(theirs) / options.size, 2),
        }
        rows.append(row)
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'draw':32} {'ns/sample':>10} {'M/s':>8} {'numpy ns':>9} {'first call, ms more':>20}")
    for row in rows:
        numpy_time = "" if row["numpy_ns_per_sample"] is None else row["numpy_ns_per_sample"]
        print(
            f"{row['draw']:32} {row['ns_per_sample']:>10} {row['million_per_second']:>8} {numpy_time:>9} "
            f"{row['first_call_ms']:>20}"
        )


if __name__ == "__main__":
    main()
