"""Measure what each privacy plan costs in accuracy: softmax regression on digits, against epsilon.

    python benchmarks/plans.py [--seeds 3] [--epsilons 1 2 4 8] [--plans central tree] [--json]

Every seed is another split and partition of the digits (1,437 training rows, 360 test rows) over 200 nodes by label
skew; all plans see the same. The data, the model and its settings are those of `examples/distributed_dp`, which were
chosen for one plan (central and Skellam noise at epsilon 8); only what a row names differs. Noise is fresh in each run;
where the nodes add it, their vectors are summed without masks, which cancel exactly and cost time alone. Ten rounds at
delta = 1e-5, unit client; accuracy of the last model on the test rows in percent, mean over the seeds 1, 2, ...
`record` is another task, `examples/record_level_dp` (five nodes, delta = 1e-4, a small network, unit record); it needs
the extra `torch`.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from privfed import (
    ArrayRecord,
    ClientApp,
    Context,
    LocalGrid,
    Message,
    MetricRecord,
    PrivacyPlan,
    RecordDict,
    SecureStage,
    mods,
)
from privfed.plan import AdaptiveClip
from privfed.privacy.correlated import Banded, Tree
from privfed.privacy.sampling import FixedSizeSampler, PoissonSampler
from privfed.protocols import SecAgg
from privfed.ring import DEMANDS, NOISED, VECTOR
from privfed.strategies import FedAvgM
from privfed.strategies.exchange import Exchange, SharedNoise
from privfed.strategies.view import Outcome, Sum

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NODES, ROUNDS, DELTA = 200, 10, 1e-5
SHARED: dict[str, Any] = {"bits": 20, "max_dropped": 0.1, "max_colluding": 0.05}
PLANS: dict[str, dict[str, Any]] = {
    "central": {"relation": "zero_out"},
    "fixed cohorts": {"relation": "replace_one", "sampler": FixedSizeSampler(100, NODES), "population": NODES},
    "Poisson cohorts": {"sampler": PoissonSampler(0.5), "population": NODES},
    "adaptive clip": {"relation": "zero_out", "clip": 1.0, "adaptive": AdaptiveClip(0.5, 1.0)},
    "tree": {"relation": "zero_out", "correlation": Tree(), "separation": 5},
    "banded": {"relation": "zero_out", "correlation": Banded.square_root(5), "separation": 5},
    "Skellam": {"mechanism": "skellam", **SHARED},
    "discrete Gaussian": {"mechanism": "discrete_gaussian", **SHARED},
    "exact drops": {"mechanism": "skellam", "exact_drops": True, **SHARED},
    "Skellam, adaptive": {"mechanism": "skellam", "clip": 1.0, "adaptive": AdaptiveClip(0.5, 1.0), **SHARED},
}
LOCAL, RECORD = "local", "record"


class OpenSum(SecureStage):
    """Sum the nodes' noised vectors as a masking protocol would, without the masks. Nobody drops out."""

    def _collect_noised(self, exchange: Exchange, noise: SharedNoise) -> Outcome:
        asked, count, keys = noise.parameters, 0, []
        total = np.zeros(asked.padded, np.uint64)
        for _, message in exchange.replies():
            total += message.content.array_records[NOISED][VECTOR].view()
            given = message.content.config_records[DEMANDS].get("level-keys", [])
            keys.append(tuple(key for key in given if isinstance(key, bytes)) if isinstance(given, list) else ())
            count += 1
        noise.charge(bytes(32))
        total &= np.uint64((1 << asked.bits) - 1)
        if asked.drop_levels:
            total = asked.remove(total, keys, asked.level(count))
        return Outcome(Sum(asked.decode(total, noise.seed, count, noise.denominator), noise.denominator), count)


def load_task() -> Any:
    """Return the example's data and model."""
    spec = importlib.util.spec_from_file_location("task", EXAMPLES / "distributed_dp" / "task.py")
    if spec is None or spec.loader is None:
        raise RuntimeError("examples/distributed_dp/task.py is not there")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def app_of(task: Any, seed: int, chain: list[Any]) -> ClientApp:
    """Return the nodes: each trains on its own digits."""
    parts = task.partition(seed, NODES)
    app = ClientApp(mods=chain)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        rows, labels = parts[context.node_id - 1]
        (weights,) = message.content["arrays"].to_numpy_ndarrays()
        moved = ArrayRecord([task.train(weights, rows, labels, 20, 20.0)])
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": moved, "metrics": metrics}), reply_to=message)

    return app


def run_plan(task: Any, name: str, epsilon: float, seed: int) -> tuple[float, float]:
    """Return test accuracy in percent and epsilon spent."""
    _, _, rows, labels = task.digits(seed)
    settings: dict[str, Any] = {"fraction_evaluate": 0.0, "server_learning_rate": 4.0, "server_momentum": 0.5}
    if name == LOCAL:
        chain: list[Any] = [mods.local_dp(8.0, epsilon=epsilon, delta=DELTA, rounds=ROUNDS)]
    else:
        plan = PrivacyPlan(**{"clip": 8.0, "epsilon": epsilon, "delta": DELTA, **PLANS[name]})
        settings["privacy"] = plan
        chain = [mods.clip()]
        if plan.distributed:
            chain = [mods.distributed_dp()]
            settings["stage"] = OpenSum(SecAgg())
    grid = LocalGrid(app_of(task, seed, chain), NODES)
    result = FedAvgM(**settings).start(grid, ArrayRecord([np.zeros(task.SHAPE)]), num_rounds=ROUNDS)
    (weights,) = result.arrays.to_numpy_ndarrays()
    return 100 * task.accuracy(weights, rows, labels), result.epsilon if result.epsilon is not None else epsilon


def run_record(_: Any, name: str, epsilon: float, seed: int) -> tuple[float, float]:
    """Return test accuracy in percent and epsilon a record of the record-level example."""
    command = [sys.executable, "-m", "privfed.cli.main", "run", str(EXAMPLES / "record_level_dp")]
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(
            [*command, "--seed", str(seed), "-c", f"epsilon={epsilon}"],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PRIVFED_HOME": home},
        )
    accuracy = re.search(r"test accuracy: ([0-9.]+)%", done.stdout)
    spent = re.search(r"epsilon = ([0-9.]+) at delta", done.stdout)
    if accuracy is None or spent is None:
        raise RuntimeError(f"{name}, seed {seed}: the example said\n{done.stdout}")
    return float(accuracy[1]), float(spent[1])


def measure(task: Any, name: str, epsilon: float, seeds: int) -> dict[str, object]:
    """Return one cell: mean and least accuracy over the seeds 1, 2, ..., and the largest epsilon spent."""
    run: Callable[[Any, str, float, int], tuple[float, float]] = run_record if name == RECORD else run_plan
    found = [run(task, name, epsilon, seed) for seed in range(1, seeds + 1)]
    accuracies = [accuracy for accuracy, _ in found]
    spent = max(epsilon for _, epsilon in found)
    if spent > epsilon:
        raise RuntimeError(f"{name}: epsilon {spent} was spent, {epsilon} planned")
    return {
        "plan": name,
        "epsilon": epsilon,
        "accuracy": round(statistics.fmean(accuracies), 1),
        "least": round(min(accuracies), 1),
        "spent": round(spent, 4),
    }


def main() -> None:
    """Print a line a cell, then the table; or JSON."""
    names = [*PLANS, LOCAL, RECORD]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epsilons", type=float, nargs="+", default=[1.0, 2.0, 4.0, 8.0])
    parser.add_argument("--plans", nargs="+", choices=names, metavar="PLAN", default=None, help=", ".join(names))
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    asked = options.plans
    if asked is None:
        asked = [name for name in names if name != RECORD or importlib.util.find_spec("opacus") is not None]
    task = load_task()
    cells = []
    for name in asked:
        for epsilon in options.epsilons:
            cells.append(measure(task, name, epsilon, options.seeds))
            if not options.json:
                print(cells[-1], flush=True)
    if options.json:
        print(json.dumps(cells, indent=1))
        return
    print("| plan | " + " | ".join(f"epsilon {epsilon:g}" for epsilon in options.epsilons) + " |")
    for name in asked:
        row = [str(cell["accuracy"]) for cell in cells if cell["plan"] == name]
        print(f"| {name} | " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
