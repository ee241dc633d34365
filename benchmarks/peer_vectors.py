"""Write what flwr and byzfl make of random rows, for the tests to compare with: proofs_tests/vectors/robust_peers.json.

    pip install flwr==1.42.0 byzfl==0.0.11 torch==2.13.0
    python benchmarks/peer_vectors.py

Only rules whose conventions agree with ours, or for which ours has the same option, are recorded; each case says which:
byzfl's Krum counts n-f-1 neighbours, its geometric median is given 300 steps from the mean of rows with nu = 1e-12,
its centred clipping starts anew for every case. Its CAF and SMEA take one power iteration from a random vector where
ours are exact: nothing to compare. flwr's trimmed mean cuts int(beta n) values on each side, so beta
is (f + 0.5) / n. Peers get copies: some change their input. Rows are float64 from numpy's default generator, rounded
to 6 digits so that the file stays small.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import byzfl
import numpy as np
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
from flwr.serverapp.strategy.multikrum import select_multikrum
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

SEED = 20240607
SHAPES = [(5, 1, 3), (8, 2, 5), (11, 2, 4), (13, 3, 6), (70, 9, 3)]
PATH = Path(__file__).parents[1] / "proofs_tests" / "vectors" / "robust_peers.json"


def flwr_multi_krum(X: Any, f: int, keep: int) -> Any:
    """Return the mean of the rows that flwr's selection keeps."""
    contents = [
        RecordDict({"arrays": ArrayRecord([row]), "metrics": MetricRecord({"num-examples": 1, "i": i})})
        for i, row in enumerate(X)
    ]
    kept: Any = select_multikrum(contents, f, keep)
    return X[[int(content["metrics"]["i"]) for content in kept]].mean(axis=0)


def flwr_mean(X: Any, weights: Any) -> Any:
    """Return flwr's weighted mean."""
    contents = [
        RecordDict({"arrays": ArrayRecord([row]), "metrics": MetricRecord({"num-examples": int(w)})})
        for row, w in zip(X, weights, strict=True)
    ]
    return aggregate_arrayrecords(contents, "num-examples").to_numpy_ndarrays()[0]


def cases(X: Any, f: int) -> dict[str, tuple[str, Callable[[], Any]]]:
    """Return op -> the peer and a function that computes its result."""
    n = len(X)
    found: dict[str, tuple[str, Callable[[], Any]]] = {
        "weighted_mean": ("flwr", lambda: flwr_mean(X, np.arange(1, n + 1))),
        "flwr_trimmed_mean": ("flwr", lambda: trim_mean(X, (f + 0.5) / n)),
        "median": ("byzfl", lambda: byzfl.Median()(X)),
        "trimmed_mean": ("byzfl", lambda: byzfl.TrMean(f)(X)),
        "meamed": ("byzfl", lambda: byzfl.Meamed(f)(X)),
        "krum_allouah": ("byzfl", lambda: byzfl.Krum(f)(X)),
        "multi_krum_allouah": ("byzfl", lambda: byzfl.MultiKrum(f)(X)),
        "geometric_median": ("byzfl", lambda: byzfl.GeometricMedian(nu=1e-12, T=300)(X)),
        "monna": ("byzfl", lambda: byzfl.MoNNA(f, 0)(X)),
        "centered_clipping": ("byzfl", lambda: byzfl.CenteredClipping(L=4, tau=1.5)(X)),
        "nearest_neighbor_mixing": ("byzfl", lambda: byzfl.NNM(f)(X)),
        "nnm_median": ("byzfl", lambda: byzfl.Median()(byzfl.NNM(f)(X))),
        "clipping": ("byzfl", lambda: byzfl.Clipping(c=1.5)(X)),
        "arc": ("byzfl", lambda: byzfl.ARC(f)(X)),
    }
    if n >= 2 * f + 3:
        found["multi_krum"] = ("flwr", lambda: flwr_multi_krum(X, f, n - f))
        found["krum"] = ("flwr", lambda: flwr_multi_krum(X, f, 1))
    if n <= 13:
        found["minimum_diameter_mean"] = ("byzfl", lambda: byzfl.MDA(f)(X))
    return found


def main() -> None:
    """Compute and write every case."""
    rng = np.random.default_rng(SEED)
    listed = []
    for n, f, d in SHAPES:
        X = np.round(rng.standard_normal((n, d)) * rng.uniform(0.5, 2, d) + rng.uniform(-1, 1, d), 6)
        X[:f] = np.round(X[:f] + rng.uniform(2, 6, (f, 1)), 6)
        results = {
            op: {"peer": peer, "expected": np.asarray(cases(X.copy(), f)[op][1](), dtype=np.float64).tolist()}
            for op, (peer, _) in cases(X, f).items()
        }
        listed.append({"f": f, "input": X.tolist(), "results": results})
    versions = {name: version(name) for name in ("byzfl", "flwr", "numpy", "torch")}
    PATH.write_text(json.dumps({"seed": SEED, "versions": versions, "cases": listed}) + "\n")


if __name__ == "__main__":
    main()
