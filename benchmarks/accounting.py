"""Measure the accountants: certified gap, time, calibration, incremental use, import; peers in the same run.

    python benchmarks/accounting.py [--repeat 3] [--steps 100000] [--json FILE]

CPU time of one thread, best of the repeats. Peers: dp-accounting's PLD (default grid), and opacus' RDP if installed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import threads  # noqa: F401 - fixes the number of threads before numpy is loaded

from privfed.privacy import Accountant, Gaussian, PoissonSampled, RandomAllocation, calibrate, stretch
from privfed.privacy.dominating import _pairs
from privfed.privacy.events import Event
from privfed.privacy.query import lesser

GRID = Path(__file__).parents[1] / "proofs_tests" / "vectors" / "dp_grid.json"
EXACT = Path(__file__).parents[1] / "proofs_tests" / "vectors" / "dp_reference.json"


def forget() -> None:
    """Drop everything that is kept between queries."""
    _pairs.cache_clear()
    lesser.cache_clear()
    stretch.forget()


def best(work: Callable[[], Any], repeat: int) -> tuple[float, Any]:
    """Return CPU milliseconds of the fastest run, and its result; nothing is cached between runs."""
    times, result = [], None
    for _ in range(repeat):
        forget()
        start = time.process_time()
        result = work()
        times.append(1e3 * (time.process_time() - start))
    return min(times), result


def ours(row: dict[str, float]) -> Any:
    """Return the certified bracket of one grid row."""
    event = PoissonSampled(row["q"], Gaussian(row["sigma"]))
    return Accountant().step(event, int(row["T"])).epsilon(row["delta"])


def peer(row: dict[str, float]) -> float:
    """Return dp-accounting's upper bound."""
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant()
    event = dp_accounting.PoissonSampledDpEvent(row["q"], dp_accounting.GaussianDpEvent(row["sigma"]))
    return float(accountant.compose(event, int(row["T"])).get_epsilon(row["delta"]))


def opacus(row: dict[str, float]) -> float:
    """Return opacus' RDP figure."""
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(row["sigma"], row["q"], int(row["T"]))]
    return float(accountant.get_epsilon(row["delta"]))


def reference() -> dict[tuple[float, ...], float]:
    """Return exact values by (q, sigma, T, delta)."""
    facts = json.loads(EXACT.read_text())["facts"]
    keys = ("q", "sigma", "T", "delta")
    return {
        tuple(float(fact["inputs"][key]) for key in keys): fact["expected"]
        for fact in facts
        if fact["id"].startswith("exact-sg")
    }


def grid(repeat: int) -> list[dict[str, Any]]:
    """Measure every row of the grid."""
    exact, out = reference(), []
    for row in json.loads(GRID.read_text())["rows"]:
        spent, bound = best(lambda row=row: ours(row), repeat)
        truth = exact.get(tuple(float(row[key]) for key in ("q", "sigma", "T", "delta")))
        entry = {**row, "ms": spent, "gap": bound.gap, "lower": bound.lower, "upper": bound.upper}
        entry["estimate_error"] = abs(bound.estimate / truth - 1) if truth else None
        if find_spec("dp_accounting"):
            entry["dp_accounting_ms"], entry["dp_accounting"] = best(lambda row=row: peer(row), 1)
        if find_spec("opacus"):
            entry["opacus_rdp_ms"], entry["opacus_rdp"] = best(lambda row=row: opacus(row), 1)
        out.append(entry)
        print(
            f"q {row['q']:<7g} sigma {row['sigma']:<5g} T {row['T']:<7g} delta {row['delta']:<7g} "
            f"[{bound.lower:.6f}, {bound.upper:.6f}] gap {bound.gap:.1e} {spent:7.1f} ms   "
            f"dp-accounting {entry.get('dp_accounting', float('nan')):.6f} "
            f"{entry.get('dp_accounting_ms', float('nan')):7.1f} ms",
            flush=True,
        )
    return out


def calibrations(rows: list[dict[str, Any]], repeat: int) -> tuple[list[float], float]:
    """Calibrate the noise of every row of the grid to what the row costs; return milliseconds and the largest excess.

    Every result is certified by the accountant as it answers by default: RuntimeError if one is not.
    """
    times, widest = [], 0.0
    for row in rows:

        def plan(noise: float, row: dict[str, Any] = row) -> Event:
            return PoissonSampled(row["q"], Gaussian(noise))

        terms = {"epsilon": row["upper"], "delta": row["delta"]}
        spent, noise = best(
            lambda plan=plan, row=row, terms=terms: calibrate(plan, count=int(row["T"]), **terms), repeat
        )
        if not Accountant().step(plan(noise), int(row["T"])).epsilon(row["delta"]).upper <= row["upper"]:
            raise RuntimeError(f"the noise {noise} found for {row} is not certified")
        times.append(spent)
        widest = max(widest, noise / row["sigma"] - 1)
    return times, widest


def incremental(events: tuple[Event, ...], total: int = 100_000, delta: float = 1e-5) -> tuple[float, float, float]:
    """Run a loop of `total` steps that asks for the certified bracket after every one, the events taking turns.

    Return CPU milliseconds per step + epsilon, the slowest of all, and the widest relative gap.
    """
    forget()
    accountant = Accountant()
    slowest = widest = 0.0
    begun = last = time.process_time()
    for turn in range(total):
        bound = accountant.step(events[turn % len(events)]).epsilon(delta)
        now = time.process_time()
        slowest, widest, last = max(slowest, now - last), max(widest, bound.gap), now
    return 1e3 * (last - begun) / total, 1e3 * slowest, widest


def import_time() -> float:
    """Return CPU milliseconds that importing the package costs beyond numpy."""
    code = "import numpy, time; t = time.process_time(); import privfed.privacy; print(1e3 * (time.process_time() - t))"
    return min(
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) for _ in range(5)
    )


def main() -> None:
    """Print the figures; write them as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=100_000, help="length of the loops that ask after every step")
    options = parser.parse_args()
    rows = grid(options.repeat)
    times = [row["ms"] for row in rows]
    errors = [row["estimate_error"] for row in rows if row["estimate_error"] is not None]
    calibration, noise = best(
        lambda: calibrate(lambda z: PoissonSampled(0.04, Gaussian(z)), count=2000, epsilon=8.0, delta=1e-5), 3
    )
    allocation, bound = best(lambda: Accountant().step(RandomAllocation(1000, Gaussian(1.0))).epsilon(1e-5), 1)
    found, excess = calibrations(rows, options.repeat)
    one = PoissonSampled(0.01, Gaussian(1.0))
    alone = incremental((one,), options.steps)
    mixed = incremental((one, PoissonSampled(0.02, Gaussian(2.0))), options.steps)
    summary = {
        "worst_gap": max(row["gap"] for row in rows),
        "median_ms": statistics.median(times),
        "max_ms": max(times),
        "worst_estimate_error": max(errors),
        "calibrate_ms": calibration,
        "calibrated_noise": noise,
        "calibrate_grid_median_ms": statistics.median(found),
        "calibrate_grid_max_ms": max(found),
        "calibrate_grid_excess": excess,
        "allocation_ms": allocation,
        "allocation_gap": bound.gap,
        "step_and_epsilon_ms": alone[0],
        "step_and_epsilon_slowest_ms": alone[1],
        "step_and_epsilon_gap": alone[2],
        "mixed_step_and_epsilon_ms": mixed[0],
        "mixed_step_and_epsilon_slowest_ms": mixed[1],
        "mixed_step_and_epsilon_gap": mixed[2],
        "import_ms": import_time(),
    }
    print(json.dumps(summary, indent=1))
    if options.json:
        options.json.write_text(json.dumps({"summary": summary, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
