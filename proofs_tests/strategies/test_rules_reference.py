"""Published test values of other implementations, each under its own convention, noted in the file."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privfed.attacks.forgery import mimic, sign_flip
from privfed.attacks.search import strongest_inner_product, strongest_little
from privfed.strategies import rules

CASES = json.loads((Path(__file__).parents[1] / "vectors" / "robust_reference.json").read_text())


def in_front(rows: Any) -> Any:
    return rules.trimmed_mean(rules.clipping(rules.nearest_neighbor_mixing(rows, 1), 2.0), 1)


def chosen(X: Any, p: dict[str, Any], keep: int) -> Any:
    """Krum through the Gram core, with the case's neighbours: its precondition may not hold."""
    n, f = len(X), p["f"]
    text = str(p.get("neighbours", ""))
    neighbours = n - f - 1 if text.startswith("n-f-1") or (keep == 2 and n == 5) else max(1, n - f - 2)
    w = rules.multi_krum_weights(X @ X.T, f, keep, neighbours)
    return w[w > 0] @ X[w > 0]


OPS = {
    "mean": lambda X, p: rules.mean(X),
    "median": lambda X, p: rules.median(X),
    "trimmed_mean": lambda X, p: rules.trimmed_mean(X, p["f"] if "f" in p else int(p["beta"] * len(X))),
    "krum": lambda X, p: chosen(X, p, p.get("m", 1)),
    "multikrum": lambda X, p: chosen(X, p, p["m"]),
    "bulyan": lambda X, p: rules.bulyan(X, p["f"]),
    "centered_clipping": lambda X, p: rules.centered_clipping(X, p["tau"], np.full(X.shape[1], p["v0"]), p["L"]),
    "mda": lambda X, p: rules.minimum_diameter_mean(X, p["f"]),
    "arc": lambda X, p: rules.arc(X, p["f"]),
    "nearest_to_ref_mean": lambda X, p: rules.mean_around(X, p["ref"], p["beta"]),
    "attack_sign_flip": lambda X, p: sign_flip(X),
    "attack_mimic": lambda X, p: mimic(X, p["epsilon"]),
    "attack_optimal_ipm": lambda X, p: strongest_inner_product(X, p["f"], in_front).row,
    "attack_optimal_alie": lambda X, p: strongest_little(X, p["f"], in_front).row,
}


@pytest.mark.parametrize("case", CASES, ids=[f"{i}-{case['op']}" for i, case in enumerate(CASES)])
def test_a_published_value_comes_out(case: dict[str, Any]) -> None:
    X = np.array(case["input"], dtype=np.float64)
    found = OPS[case["op"]](X, case["params"])
    assert np.shape(found) == np.shape(case["expected"])
    np.testing.assert_allclose(found, case["expected"], rtol=case["rtol"])


@pytest.mark.parametrize("case", [c for c in CASES if c["op"] in ("krum", "multikrum") and len(c["input"]) == 3])
def test_the_same_cases_break_krums_precondition(case: dict[str, Any]) -> None:
    X, f = np.array(case["input"]), case["params"]["f"]
    for rule in (rules.krum, partial(rules.multi_krum, keep=2)):
        with pytest.raises(rules.Refusal, match=r"2f \+ 3 = 5 .* got n = 3"):
            rule(X, f)


def test_a_changed_value_fails() -> None:
    case = next(c for c in CASES if c["op"] == "bulyan")
    X = np.array(case["input"])
    X[3, 0] += 1e-3
    assert not np.allclose(OPS["bulyan"](X, case["params"]), case["expected"], rtol=case["rtol"], atol=0)
