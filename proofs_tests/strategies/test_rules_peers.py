"""What flwr and byzfl make of random rows, where their conventions agree with ours; numpy beside them, live.

The vectors were written once by benchmarks/peer_vectors.py, with the versions and the seed the file states.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privfed.strategies import rules

FILE = json.loads((Path(__file__).parents[1] / "vectors" / "robust_peers.json").read_text())
CASES = [
    (op, case, result["peer"], np.array(result["expected"]))
    for case in FILE["cases"]
    for op, result in case["results"].items()
]
OPS: dict[str, Callable[[Any, int], Any]] = {
    "weighted_mean": lambda X, f: rules.weighted_mean(X, np.arange(1, len(X) + 1)),
    "flwr_trimmed_mean": rules.trimmed_mean,
    "trimmed_mean": rules.trimmed_mean,
    "median": rules.median,
    "meamed": rules.meamed,
    "krum": rules.krum,
    "multi_krum": rules.multi_krum,
    "krum_allouah": lambda X, f: rules.krum(X, f, neighbours=len(X) - f - 1),
    "multi_krum_allouah": lambda X, f: rules.multi_krum(X, f, neighbours=len(X) - f - 1),
    "geometric_median": rules.geometric_median,
    "monna": rules.monna,
    "centered_clipping": lambda X, f: rules.centered_clipping(X, 1.5, steps=4),
    "minimum_diameter_mean": rules.minimum_diameter_mean,
    "nearest_neighbor_mixing": rules.nearest_neighbor_mixing,
    "nnm_median": lambda X, f: rules.median(rules.lazy_mixing(X, f)),
    "clipping": lambda X, f: rules.clipping(X, 1.5),
    "arc": rules.arc,
}


@pytest.mark.parametrize(
    ("op", "case", "peer", "expected"), CASES, ids=[f"{c[2]}-{c[0]}-{len(c[1]['input'])}" for c in CASES]
)
def test_a_peers_result_comes_out(op: str, case: dict[str, Any], peer: str, expected: Any) -> None:
    found = OPS[op](np.array(case["input"]), case["f"])
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_every_rule_compared_is_in_the_file_and_the_versions_are_stated() -> None:
    assert {op for op, *_ in CASES} == set(OPS)
    assert set(FILE["versions"]) == {"byzfl", "flwr", "numpy", "torch"}
    assert isinstance(FILE["seed"], int)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 21, 64, 65, 130])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numpy_agrees_on_columns(n: int, dtype: Any) -> None:
    rng = np.random.default_rng(n)
    X = (rng.standard_normal((n, 2500)) * 10.0 ** rng.integers(-3, 4, 2500)).astype(dtype)
    f = (n - 1) // 3
    exact = X.astype(np.float64)
    tight = {"rtol": 2e-6 if dtype == np.float32 else 1e-12, "atol": 0}
    scale = np.abs(exact).max(axis=0)

    def close(found: Any, wanted: Any) -> None:
        np.testing.assert_allclose(found / scale, wanted / scale, rtol=0, atol=tight["rtol"])

    close(rules.median(X), np.median(exact, axis=0))
    close(rules.trimmed_mean(X, f), np.sort(exact, axis=0)[f : n - f].mean(axis=0))
    close(rules.mean(X), exact.mean(axis=0))
    close(rules.weighted_mean(X, np.arange(1, n + 1)), np.average(exact, axis=0, weights=np.arange(1, n + 1)))
