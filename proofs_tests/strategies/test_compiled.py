"""Compiled loops and numpy make the same bits, refuse the same rows, and can be switched off."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from privfed.strategies import compiled, rules
from privfed.strategies.compiled import TILE, TOGETHER, VARIABLE, kernels_for
from privfed.strategies.matrix import Room, as_matrix
from privfed.strategies.network import COMPILED_ROWS, NETWORK_ROWS, comparators, wires
from privfed.strategies.sums import COMPILED_COLUMNS, sum_rows

ROWS = [*range(1, 2 * TOGETHER + 2), NETWORK_ROWS, NETWORK_ROWS + 1, 100, COMPILED_ROWS, COMPILED_ROWS + 1]
LENGTHS = [1, 2, 3, 15, 16, 17, 40, TILE + 1]
Rule = Callable[[Any, int], Any]


def weigh(X: Any, f: int) -> Any:
    return rules.weighted_mean(X, np.arange(len(X)) % 3 + 0.1)


def bulyan(X: Any, f: int) -> Any:
    return rules.bulyan(X, min(f, (len(X) - 3) // 4)) if len(X) >= 3 else rules.median(X)


RULES: dict[str, Rule] = {
    "weighted mean": weigh,
    "mean of buckets": lambda X, f: rules.mean(rules.lazy_bucketing(X, min(2, len(X)), np.random.default_rng(0))),
    "median": lambda X, f: rules.median(X),
    "trimmed mean": rules.trimmed_mean,
    "meamed": rules.meamed,
    "phocas": rules.phocas,
    "bulyan": bulyan,
    "geometric median": lambda X, f: rules.geometric_median(X),
    "clipping about a centre": lambda X, f: rules.centered_clipping(X, 2.0, np.full(np.shape(X[0]), 0.25), 2),
    "mixing, then median": lambda X, f: rules.median(rules.lazy_mixing(X, f)),
    "mixing, then trimmed mean": lambda X, f: rules.trimmed_mean(rules.lazy_mixing(X, f), f),
    "clipped, then trimmed mean": lambda X, f: rules.trimmed_mean(rules.lazy_clipping(X, 2.0), f),
}


def numbers(kind: str, n: int, d: int, seed: int, dtype: Any) -> Any:
    rng = np.random.default_rng(seed)
    tiny = np.finfo(np.float64 if dtype is np.float64 else np.float32).smallest_subnormal
    made = {
        "normal": lambda: rng.standard_normal((n, d)),
        "ties and both zeros": lambda: rng.integers(-1, 2, (n, d)) * rng.choice([-1.0, 1.0], (n, d)),
        "subnormal": lambda: rng.integers(-9, 10, (n, d)) * float(tiny),
        "cancelling": lambda: rng.choice([1e8, -1e8, 1.0, -1e-3, 2.0**56, -(2.0**56)], (n, d)),
    }[kind]()
    return made.astype(dtype)


def shaped(form: str, X: Any, folder: Path) -> Any:
    """Return the same rows in another form."""
    if form == "list":
        return list(X)
    if form == "layers":
        cut = X.shape[1] // 2
        return [[row[:cut], row[cut:]] for row in X]
    if form == "read-only map":
        np.save(folder / "rows.npy", X)
        return np.load(folder / "rows.npy", mmap_mode="r")
    if form == "columns of a wider array":
        wide = np.zeros((len(X), X.shape[1] + 7), X.dtype)
        wide[:, 3:-4] = X
        return wide[:, 3:-4]
    if form == "every second number of a list":
        return list(np.repeat(X, 2, axis=1)[:, ::2])
    if form == "at odd addresses":
        return [np.frombuffer(b"x" + row.tobytes(), np.uint8)[1:].view(X.dtype) for row in X]
    return X


def bits(made: Any) -> bytes:
    return b"".join(np.asarray(part).tobytes() for part in (made if isinstance(made, list) else [made]))


def both(rule: Rule, X: Any, f: int) -> tuple[bytes, bytes]:
    with rules.fast(None):
        plain = rule(X, f)
    with rules.fast(0):
        assert kernels_for(as_matrix(X)) is not None
        return bits(plain), bits(rule(X, f))


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_compiled_loops_and_numpy_make_the_same_bits(name: str, tmp_path: Path, data: st.DataObject) -> None:
    n, d = data.draw(st.sampled_from(ROWS)), data.draw(st.sampled_from(LENGTHS))
    kind = data.draw(st.sampled_from(["normal", "ties and both zeros", "subnormal", "cancelling"]))
    forms = ["array", "list", "layers", "read-only map", "columns of a wider array", "every second number of a list"]
    form = data.draw(st.sampled_from([*forms, "at odd addresses"]))
    dtype = data.draw(st.sampled_from([np.float16, np.float32, np.float64, np.int32]))
    if dtype in (np.float16, np.int32) and kind != "normal":
        kind = "ties and both zeros"
    X = numbers(kind, n, d, data.draw(st.integers(0, 10**6)), dtype)
    if form == "layers" and name == "clipping about a centre":
        form = "list"
    plain, fast = both(RULES[name], shaped(form, X, tmp_path), data.draw(st.integers(0, (n - 1) // 2)))
    assert plain == fast


@pytest.mark.parametrize("name", RULES)
def test_blocks_and_threads_change_no_bit(name: str) -> None:
    X = numbers("cancelling", 23, COMPILED_COLUMNS + 37, 5, np.float32)
    plain, fast = both(RULES[name], X, 4)
    with rules.threads(2), rules.fast(0):
        assert plain == fast == bits(RULES[name](X, 4))


@pytest.mark.parametrize("name", [name for name in RULES if name != "mean of buckets"])
@pytest.mark.parametrize("n", [12, 19, NETWORK_ROWS + 2])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e20, 3e38])
def test_a_row_that_no_rule_can_use_is_left_out_in_both_ways(name: str, n: int, value: float) -> None:
    for row, column in ((0, 0), (n - 1, 39), (n // 2, 17)):
        X = numbers("normal", n, 40, 1, np.float32)
        X[row, column] = value
        if name == "weighted mean":
            for least in (None, 0):
                with rules.fast(least), pytest.raises(rules.Refusal, match=rf"row {row} "):
                    RULES[name](X, 2)
            continue
        plain, fast = both(RULES[name], X, 2)
        assert plain == fast and np.isfinite(np.frombuffer(fast, np.float32)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_that_cancel_are_no_way_to_hide_a_huge_number(dtype: Any) -> None:
    X = np.zeros((2 * TOGETHER, 50), dtype)
    X[3, 20] = X[4, 20] = np.finfo(dtype).max / 4
    X[4] *= -1
    with rules.fast(0), pytest.raises(rules.Refusal, match="row 3 exceeds"):
        rules.mean(X)


@pytest.mark.parametrize("n", [2, 3, 7, 12, 20, 50, NETWORK_ROWS, 100, COMPILED_ROWS])
@pytest.mark.parametrize("together", [False, True])
def test_exchanges_bring_the_ranks_they_are_for(n: int, together: bool) -> None:
    rng = np.random.default_rng(n)
    X = (rng.random((n, 3 * TILE)) < rng.random(3 * TILE)).astype(np.float32)  # zeros and ones decide
    kernels = compiled._compile("float32") if "float32" not in compiled._made else compiled._made["float32"]
    assert kernels is not None
    for f in {0, n // 5, (n - 1) // 2}:
        ranks = tuple(range(f, n - f))
        held = X.copy()
        kernels.exchange(held, wires(n, ranks, together))
        found, sought = held[f : n - f], np.sort(X, axis=0)[f : n - f]
        np.testing.assert_array_equal(np.sort(found, axis=0) if together else found, sought)
        assert len(wires(n, ranks, together)) == len(comparators(n, ranks, together))


def test_another_order_of_additions_would_be_noticed() -> None:
    X = numbers("cancelling", 2 * TOGETHER + 3, 400, 0, np.float64)
    with rules.fast(0):
        kernels = kernels_for(as_matrix(X))
    assert kernels is not None
    sums = [sum_rows(rows, Room(), kernels) for rows in (X, np.ascontiguousarray(X[::-1]))]
    assert sums[0].tobytes() != sums[1].tobytes()


def test_there_is_a_switch_and_a_size_below_which_numpy_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    X = as_matrix(np.zeros((10, 50), np.float32))
    assert kernels_for(X) is None
    assert kernels_for(as_matrix(np.zeros((10, 10**6), np.float32))) is not None
    with rules.fast(500):
        assert kernels_for(X) is not None
        monkeypatch.setenv(VARIABLE, "0")
        assert kernels_for(X) is None
        monkeypatch.setenv(VARIABLE, "yes")
        with pytest.raises(ValueError, match="PRIVFED_FAST must be 0"):
            kernels_for(X)
    monkeypatch.setenv(VARIABLE, "1")
    with rules.fast(501):
        assert kernels_for(X) is None
    with pytest.raises(ValueError, match="least"), rules.fast(-1):
        pass


def test_an_extra_that_cannot_be_used_is_said_and_missed_by_no_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    X = numbers("normal", 10, 50, 0, np.float32)
    monkeypatch.setattr(compiled, "_made", {})
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: object())
    with rules.fast(0), pytest.warns(RuntimeWarning, match="the extra `fast` cannot be used"):
        made = rules.median(X)
    monkeypatch.setattr(compiled, "_made", {})
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)
    with rules.fast(0):
        assert bits(rules.median(X)) == bits(made)


def test_small_inputs_and_processes_of_limited_memory_load_no_compiler() -> None:
    code = (
        "import resource, sys, numpy as np; from privfed.strategies import rules; X = np.ones((20, 1000), np.float32);"
        "rules.trimmed_mean(X, 2); resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40));"
        "context = rules.fast(0); context.__enter__(); rules.trimmed_mean(X, 2); assert 'numba' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
