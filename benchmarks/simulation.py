"""Simulation: messages per second and server memory, beside flwr in the same run when it is there.

Method: a trivial client returns the model it got plus its node id, so every reply is a distinct array; the server app
folds the replies into a mean as they stream in. Wall time of the exchange alone, best of `--repeats`; each case runs in
a process of its own, so that peak memory is its own; the load of the machine is printed. The cases of the two
frameworks alternate. flwr's server app uses send_and_receive of its in-memory grid, its only way.

Run: python benchmarks/simulation.py [--flwr-python PATH-TO-A-PYTHON-WITH-FLWR] [--json]
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MILLION = 1_000_000
CASES = {
    "100 nodes x 1k floats": (100, 1_000, 3),
    "1000 nodes x 1k floats": (1_000, 1_000, 3),
    "100 nodes x 1M floats": (100, MILLION, 3),
    "1000 nodes x 1M floats": (1_000, MILLION, 1),
}
TARGETS = dict(zip(CASES, (3_000, 3_000, 200, 0), strict=True))
WINDOW = 16

FLOWER = """
import json, sys, time
import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation
nodes, size, repeats = map(int, sys.argv[1:])
client, server = ClientApp(), ServerApp()
@client.train()
def train(message, context):
    (weights,) = message.content["arrays"].to_numpy_ndarrays()
    record = ArrayRecord([weights + np.float32(context.node_id % 1000)])
    return Message(RecordDict({"arrays": record}), reply_to=message)
@server.main()
def main(grid, context):
    model = ArrayRecord([np.zeros(size, np.float32)])
    while len(list(grid.get_node_ids())) < nodes:
        time.sleep(0.1)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        content = RecordDict({"arrays": model})
        sent = [Message(content, node, "train") for node in grid.get_node_ids()]
        total = np.zeros(size)
        replies = list(grid.send_and_receive(sent))
        assert len(replies) == nodes and all(one.has_content() for one in replies)
        for reply in replies:
            total += reply.content["arrays"].to_numpy_ndarrays()[0]
        seconds.append(time.perf_counter() - start)
    print("RESULT" + json.dumps({"seconds": min(seconds)}), flush=True)
run_simulation(server, client, nodes, backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0}})
"""


def peak_bytes() -> int:
    """Return the peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(nodes: int, size: int, repeats: int, threads: int | None) -> dict[str, float]:
    """Run one case in this process; return the best seconds, and peak memory above what was there before, in bytes."""
    import numpy as np

    from privfed import Array, ArrayRecord, ClientApp, Context, Grid, Message, RecordDict, run_simulation

    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        weights = message.content.array_records["arrays"]["w"].view()
        new = Array.adopt(weights + np.float32(context.node_id % 1000))
        return Message(RecordDict({"arrays": ArrayRecord({"w": new})}), reply_to=message)

    def exchange(grid: Grid, content: RecordDict) -> float:
        start = time.perf_counter()

        def messages() -> Iterator[Message]:
            return (Message(content, node, "train") for node in grid.get_node_ids())

        total, count = np.zeros(size, np.float64), 0
        for reply in grid.stream(messages(), timeout=600, window=WINDOW if size >= MILLION else None):
            total += reply.content.array_records["arrays"]["w"].view()
            count += 1
        assert count == nodes
        expected = sum(node % 1000 for node in grid.get_node_ids())
        assert total[0] == expected
        return time.perf_counter() - start

    def main(grid: Grid, context: Context) -> dict[str, float]:
        content = RecordDict({"arrays": ArrayRecord({"w": Array(np.zeros(size, np.float32))})})
        before = peak_bytes()
        seconds = min(exchange(grid, content) for _ in range(repeats))
        return {"seconds": seconds, "bytes": float(peak_bytes() - before)}

    result: dict[str, float] = run_simulation(main, app, nodes, threads=threads).result
    return result


def run_case(name: str, threads: int | None) -> dict[str, Any]:
    """Run one case in a process of its own."""
    command = [sys.executable, __file__, "--case", name, *(["--threads", str(threads)] if threads else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def run_flower(python: str, name: str, limit: float) -> dict[str, Any]:
    """Run one case of flwr in a process of its own; say so when it does not finish within `limit` seconds."""
    nodes, size, repeats = CASES[name]
    environment = {**os.environ, "RAY_DISABLE_DOCKER_CPU_WARNING": "1", "FLWR_TELEMETRY_ENABLED": "0"}
    command = [python, "-c", FLOWER, str(nodes), str(size), str(repeats)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        cwd=Path.home(),
    ) as process:
        try:
            output, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.communicate()
            return {"failed": f"not finished within {limit:g} s"}
    for line in output.splitlines():
        if line.startswith("RESULT"):
            found: dict[str, Any] = json.loads(line.removeprefix("RESULT"))
            return found
    return {"failed": errors.strip().splitlines()[-1] if errors.strip() else "no result"}


def describe(name: str, found: dict[str, Any]) -> str:
    if "failed" in found:
        return str(found["failed"])
    text = f"{CASES[name][0] / found['seconds']:10,.0f} messages/s"
    return text + (f"   memory above the model {found['bytes'] / 1e6:6,.0f} MB" if "bytes" in found else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flwr-python", help="a Python that can import flwr")
    parser.add_argument("--flwr-limit", type=float, default=180.0, help="seconds per flwr case")
    parser.add_argument("--repeats", type=int, default=2, help="processes per case")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--case", choices=list(CASES), help="run one case in this process and print it as JSON")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(*CASES[options.case], options.threads)))
        return
    results: dict[str, dict[str, Any]] = {}
    for name in CASES:
        rows: dict[str, list[dict[str, Any]]] = {"privfed": [], "flwr": []}
        load = os.getloadavg()[0]
        for _ in range(options.repeats):
            rows["privfed"].append(run_case(name, options.threads))
            if options.flwr_python and not any("failed" in row for row in rows["flwr"]):
                rows["flwr"].append(run_flower(options.flwr_python, name, options.flwr_limit))
        best = {who: min(found, key=lambda row: row.get("seconds", 1e9)) for who, found in rows.items() if found}
        results[name] = {**best, "load": load}
        if not options.json:
            target = f"   (target {TARGETS[name]:,})" if TARGETS[name] else ""
            print(f"{name:<24} privfed {describe(name, best['privfed'])}{target}   load {load:.1f}", flush=True)
            if "flwr" in best:
                print(f"{'':<24} flwr    {describe(name, best['flwr'])}", flush=True)
    if options.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
