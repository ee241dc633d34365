"""Measure what a plan of distributed noise adds to a secure round beyond encoding and decoding; and exact drops.

    python benchmarks/distributed_round.py [--nodes 100] [--dimension 1000000] [--skip-exact-drops] [--json]

One process runs all nodes and the server; CPU seconds of one round, best of three, in the same ring. Encoding and
decoding by themselves are measured by `distributed_dp.py`, and taken off here.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from privfed import ArrayRecord, ClientApp, Context, LocalGrid, Message, MetricRecord, RecordDict, SecureStage, mods
from privfed.plan import PrivacyPlan
from privfed.privacy.share import NoiseParameters
from privfed.protocols import SecAggPlus
from privfed.strategies import FedAvg

BAR = 0.05
BITS = 20
Times = tuple[float, float]


def app_of(noised: bool, update: ArrayRecord) -> ClientApp:
    """Return nodes that answer at once."""
    inner = [mods.distributed_dp()] if noised else []
    app = ClientApp(mods=[mods.secure_aggregation(), *inner])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict({"arrays": update, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    return app


def run_once(nodes: int, dimension: int, plan: PrivacyPlan | None) -> float:
    """Return the CPU seconds of a round."""
    rng = np.random.default_rng(1)
    update = ArrayRecord([rng.normal(size=dimension).astype(np.float32) / np.sqrt(dimension).astype(np.float32)])
    stage = SecureStage(SecAggPlus(), bits=BITS, max_weight=1.0)
    strategy = FedAvg(stage=stage, privacy=plan, fraction_evaluate=0.0)
    grid = LocalGrid(app_of(plan is not None, update), nodes)
    start = time.process_time()
    strategy.start(grid, ArrayRecord([np.zeros(dimension, np.float32)]), 1)
    return time.process_time() - start


class Stopwatch:
    """Adds up the CPU seconds of a method."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method, self.seconds = method, 0.0

    def __get__(self, one: object, kind: object = None) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.process_time()
            try:
                return self.method(one, *arguments, **options)
            finally:
                self.seconds += time.process_time() - start

        return timed


def run_timed(nodes: int, dimension: int, plans: dict[str, PrivacyPlan | None], repeats: int) -> dict[str, Times]:
    """Return the CPU seconds of each plan's best round: all but encoding and decoding, and those two.

    The plans take turns, so that what slows the machine for a while slows all of them.
    """
    names = ("encode", "encode_removable", "remove", "decode")
    watches = {name: Stopwatch(getattr(NoiseParameters, name)) for name in names}
    found: dict[str, list[Times]] = {name: [] for name in plans}
    for name, watch in watches.items():
        setattr(NoiseParameters, name, watch)
    for _ in range(repeats):
        for name, plan in plans.items():
            for watch in watches.values():
                watch.seconds = 0.0
            total = run_once(nodes, dimension, plan)
            inside = sum(watch.seconds for watch in watches.values())
            found[name].append((total - inside, inside))
    for name, watch in watches.items():
        setattr(NoiseParameters, name, watch.method)
    return {name: min(times) for name, times in found.items()}


def main() -> None:
    """Print the seconds, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument("--dimension", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip-exact-drops", action="store_true", help="measure the plan without them alone")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    size = options.nodes, options.dimension
    shared = {"clip": 1.0, "noise_multiplier": 1.0, "mechanism": "skellam", "bits": BITS, "max_dropped": 0.2}
    plans: dict[str, PrivacyPlan | None] = {"plain": None, "plan": PrivacyPlan(**shared)}
    if not options.skip_exact_drops:
        plans["exact_drops"] = PrivacyPlan(**shared, exact_drops=True)
    rows = run_timed(*size, plans, options.repeats)
    found: dict[str, object] = {"nodes": size[0], "dimension": size[1]}
    for name, (outside, inside) in rows.items():
        found[name] = round(outside, 3)
        if inside:
            found[f"{name}_coding"] = round(inside, 3)
    overhead = rows["plan"][0] / rows["plain"][0] - 1
    report = {**found, "overhead": round(overhead, 3), "within_bar": overhead <= BAR}
    print(json.dumps(report, indent=1) if options.json else report)


if __name__ == "__main__":
    main()
