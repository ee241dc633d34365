"""Measure the aggregation rules: CPU time and peak memory above the input, beside numpy, flwr and byzfl.

    python benchmarks/strategies.py --rows 20 100 --dim 1000000 [--threads 2]

With PRIVFED_FAST=0 in the environment the compiled loops of the extra `fast` are left out, as they are without numba.
float32, one BLAS thread, the least of `--repeat` CPU times, after a call that compiles; memory by tracemalloc in a run
of its own, output included. Peers are measured in the same run when they are installed, and left out when they are not.
flwr's Bulyan is its one-shot selection, not the paper's; byzfl's geometric median stops after three steps.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import argparse
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

from privfed.strategies import rules

Call = Callable[[], Any]


def cpu_seconds(call: Call, repeat: int) -> float:
    """Return the least CPU time of `repeat` calls."""
    call()
    best = float("inf")
    for _ in range(repeat):
        start = time.process_time()
        call()
        best = min(best, time.process_time() - start)
    return best


def wall_seconds(call: Call, repeat: int) -> float:
    """Return the least wall time of `repeat` calls."""
    best = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def peak_mebibytes(call: Call) -> float:
    """Return the most memory a call holds, its result included."""
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return float(peak / 2**20)


def ours(X: Any, f: int) -> dict[str, Call]:
    """Return the rules to measure."""
    radius = float(np.sqrt(X.shape[1]))
    return {
        "read once": lambda: X.sum(),
        "weighted_mean": lambda: rules.weighted_mean(X, np.arange(1, 1 + len(X))),
        "median": lambda: rules.median(X),
        "trimmed_mean": lambda: rules.trimmed_mean(X, f),
        "meamed": lambda: rules.meamed(X, f),
        "phocas": lambda: rules.phocas(X, f),
        "krum": lambda: rules.krum(X, f),
        "multi_krum": lambda: rules.multi_krum(X, f),
        "bulyan": lambda: rules.bulyan(X, f),
        "geometric_median": lambda: rules.geometric_median(X),
        "centered_clipping": lambda: rules.centered_clipping(X, radius, steps=3),
        "minimum_diameter": lambda: rules.minimum_diameter_mean(X, f),
        "cge": lambda: rules.cge(X, f),
        "caf": lambda: rules.caf(X, f),
        "nnm+median": lambda: rules.median(rules.lazy_mixing(X, f)),
        "nnm+geometric_median": lambda: rules.geometric_median(rules.lazy_mixing(X, f)),
    }


def numpy_peers(X: Any, f: int) -> dict[str, dict[str, Call]]:
    """Return what numpy alone offers."""
    return {
        "weighted_mean": {"numpy": lambda: X.mean(axis=0)},
        "median": {"numpy": lambda: np.median(X, axis=0)},
        "trimmed_mean": {"numpy": lambda: np.sort(X, axis=0)[f : len(X) - f].mean(axis=0)},
    }


def flwr_peers(X: Any, f: int) -> dict[str, dict[str, Call]]:
    """Return flwr's rules, or nothing when flwr is not installed."""
    try:
        from flwr.app import ArrayRecord, MetricRecord, RecordDict
        from flwr.serverapp.strategy.bulyan import aggregate_n_closest_weights
        from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
        from flwr.serverapp.strategy.multikrum import select_multikrum
        from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
    except ImportError:
        return {}
    metrics = {"num-examples": 1}
    contents = [RecordDict({"arrays": ArrayRecord([row]), "metrics": MetricRecord(metrics)}) for row in X]
    n = len(X)

    def arrays(keep: int) -> list[Any]:
        return [c["arrays"].to_numpy_ndarrays() for c in select_multikrum(contents, f, keep)]

    def bulyan() -> Any:
        chosen = arrays(n - 2 * f)
        reference = [np.median(np.stack([c[0] for c in chosen]), axis=0)]
        return aggregate_n_closest_weights(reference, chosen, n - 4 * f)

    def multi_krum() -> Any:
        return aggregate_arrayrecords(select_multikrum(contents, f, n - f), "num-examples")

    return {
        "weighted_mean": {"flwr": lambda: aggregate_arrayrecords(contents, "num-examples")},
        "median": {"flwr": lambda: np.median(np.stack([c["arrays"].to_numpy_ndarrays()[0] for c in contents]), axis=0)},
        "trimmed_mean": {
            "flwr": lambda: trim_mean(np.stack([c["arrays"].to_numpy_ndarrays()[0] for c in contents]), f / n + 1e-9)
        },
        "krum": {"flwr": lambda: select_multikrum(contents, f, 1)},
        "multi_krum": {"flwr": multi_krum},
        "bulyan": {"flwr": bulyan},
    }


def byzfl_peers(X: Any, f: int) -> dict[str, dict[str, Call]]:
    """Return byzfl's rules, or nothing when byzfl is not installed."""
    try:
        import byzfl
    except ImportError:
        return {}
    found = {
        "median": lambda: byzfl.Median()(X),
        "trimmed_mean": lambda: byzfl.TrMean(f)(X),
        "meamed": lambda: byzfl.Meamed(f)(X),
        "krum": lambda: byzfl.Krum(f)(X),
        "multi_krum": lambda: byzfl.MultiKrum(f)(X),
        "geometric_median": lambda: byzfl.GeometricMedian()(X),
        "centered_clipping": lambda: byzfl.CenteredClipping(L=3, tau=float(np.sqrt(X.shape[1])))(X),
        "nnm+median": lambda: byzfl.Median()(byzfl.NNM(f)(X)),
        "nnm+geometric_median": lambda: byzfl.GeometricMedian()(byzfl.NNM(f)(X)),
    }
    if len(X) * (len(X) - f) * X.nbytes // len(X) > 4 << 30:  # its mixing holds n (n-f) d numbers: 32 GB at 100 x 1e6
        del found["nnm+median"], found["nnm+geometric_median"]
    return {name: {"byzfl": call} for name, call in found.items()}


def measure(n: int, d: int, f: int, repeat: int, threads: int, only: list[str]) -> None:
    """Print one table."""
    X = np.random.default_rng(0).standard_normal((n, d), dtype=np.float32)
    peers = [numpy_peers(X, f), flwr_peers(X, f), byzfl_peers(X, f)]
    print(f"\n{n} x {d:g}, f = {f}: CPU ms [peak MiB]; a peer's figure is followed by its ratio to ours")
    for name, call in ours(X, f).items():
        if only and name not in only:
            continue
        mine = cpu_seconds(call, repeat)
        line = f"{name:22s} {mine * 1e3:9.1f} [{peak_mebibytes(call):6.1f}]"
        for group in peers:
            for who, peer in group.get(name, {}).items():
                theirs = cpu_seconds(peer, max(1, repeat // 2))
                line += f"   {who} {theirs * 1e3:.1f} [{peak_mebibytes(peer):.0f}] x{theirs / mine:.1f}"
        if threads > 1:
            alone = wall_seconds(call, repeat)
            with rules.threads(threads):
                line += f"   {threads} threads: wall x{alone / wall_seconds(call, repeat):.2f}"
        print(line, flush=True)


def main() -> None:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[20, 50, 100])
    parser.add_argument("--dim", type=int, default=1_000_000)
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    for n in options.rows:
        measure(n, options.dim, n // 5, options.repeat, options.threads, options.only)


if __name__ == "__main__":
    main()
