"""Measure what noise costs in accuracy: the distributed_dp example, central and distributed, on paired seeds.

    python benchmarks/distributed_accuracy.py [--seeds 10] [--json]

Every seed is another split and partition of the digits over 200 nodes; both plans see the same. Accuracy is that of the
last round on the test rows.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "distributed_dp"
LEAST, GAP = 90.0, 2.0


def measure(seed: int, mechanism: str) -> tuple[float, float]:
    """Return test accuracy in percent and epsilon of one run."""
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, "-m", "privfed.cli.main", "run", str(EXAMPLE)]
        options = ["--seed", str(seed), "-c", f"mechanism={mechanism}", "--threads", "1"]
        environment = {**os.environ, "PRIVFED_HOME": home}
        done = subprocess.run(command + options, capture_output=True, text=True, check=True, env=environment)
    accuracy = re.search(r"^test accuracy after \d+ rounds: ([0-9.]+)%", done.stdout, re.M)
    epsilon = re.search(r"epsilon = ([0-9.]+) at delta", done.stdout)
    if accuracy is None or epsilon is None:
        raise RuntimeError(f"seed {seed}: the example said\n{done.stdout}")
    return float(accuracy[1]), float(epsilon[1])


def main() -> None:
    """Print a row a seed and the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    rows = []
    for seed in range(1, options.seeds + 1):
        (central, spent), (distributed, also) = measure(seed, "gaussian"), measure(seed, "skellam")
        rows.append({"seed": seed, "central": central, "distributed": distributed, "epsilon": max(spent, also)})
        if not options.json:
            print(rows[-1], flush=True)
    means = {name: statistics.fmean(row[name] for row in rows) for name in ("central", "distributed")}
    gap = means["central"] - means["distributed"]
    met = min(means.values()) >= LEAST and gap <= GAP and max(row["epsilon"] for row in rows) <= 8.0
    summary = {**{name: round(mean, 2) for name, mean in means.items()}, "gap": round(gap, 2), "within_bars": met}
    print(json.dumps({"rows": rows, "mean": summary}, indent=1) if options.json else summary)


if __name__ == "__main__":
    main()
