"""The deployment on one machine: round overhead, large models, idle nodes. Real processes and sockets over loopback.

    python benchmarks/deployment.py                    round overhead, 100 MB model, idle nodes
    python benchmarks/deployment.py --only large --megabytes 1000 --nodes 4
    python benchmarks/deployment.py --only idle --nodes 5000

Everything is mutual TLS with SQLite on disk, unless --insecure. A node here is `privfed.runtime.fleet` and a thread
that answers at once with what it was sent, so what is measured is the runtime and not an app.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import argparse
import json
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

APP = """
import numpy as np
from privfed import ArrayRecord, ClientApp, Message, RecordDict, ServerApp
from privfed.message import MessageType

client = ClientApp()
server = ServerApp()

@client.train()
def train(message, context):
    return Message(message.content, reply_to=message)

@server.main()
def main(grid, context):
    import time
    size, rounds = context.run_config["bytes"], context.run_config["num-rounds"]
    model = np.random.default_rng(1).random(size // 4, np.float32)
    for number in range(rounds):
        begun = time.perf_counter()
        model[0] = number
        content = RecordDict({"arrays": ArrayRecord([model])})
        asked = (Message(content, node, MessageType.TRAIN) for node in grid.get_node_ids())
        total = 0.0
        for reply in grid.stream(asked, window=None):
            total += float(reply.content["arrays"].to_numpy_ndarrays()[0][0])
            del reply
        assert total == number * len(grid.get_node_ids())
        grid.recorder.report("round-end", round=number + 1, metrics={"seconds": time.perf_counter() - begun})
"""
MANIFEST = """
[project]
name = "echo"
version = "1"
[tool.privfed.app.components]
serverapp = "echo_app:server"
clientapp = "echo_app:client"
[tool.privfed.app.config]
num-rounds = 3
bytes = 4096
"""


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "privfed.cli.main", *words]


class Bench:
    """A SuperLink with keys, in a temporary folder."""

    def __init__(self, folder: Path, nodes: int, insecure: bool, isolation: str) -> None:
        self.folder = folder
        self.nodes = nodes
        self.insecure = insecure
        app = folder / "echo"
        app.mkdir()
        (app / "echo_app.py").write_text(APP)
        (app / "pyproject.toml").write_text(MANIFEST)
        if not insecure:
            self._keys()
        keys = ["--insecure"] if insecure else ["--keys", str(folder / "keys" / "link")]
        words = command("superlink", *keys, "--home", str(folder / "home"), "--isolation", isolation)
        words += ["--fleet", "127.0.0.1:0", "--control", "127.0.0.1:0"]
        self.log = (folder / "log").open("wb")
        self.link = subprocess.Popen(words, stdout=self.log, stderr=self.log)
        self.processes = [self.link]
        while not (folder / "home" / "addresses.json").exists():
            assert self.link.poll() is None, (folder / "log").read_text()
            time.sleep(0.05)
        self.addresses = json.loads((folder / "home" / "addresses.json").read_text())

    def _keys(self) -> None:
        from privfed.runtime.authority import Authority, make_request
        from privfed.runtime.credentials import accept_answer

        keys = self.folder / "keys"
        authority = Authority.create(keys / "authority", "bench")
        members = [("link", "main"), ("operator", "alice"), *(("node", f"n{n}") for n in range(1, self.nodes + 1))]
        for role, name in [*members[2:], *members[:2]]:
            place = keys / (name if role == "node" else role)
            make_request(place, role, name, ["127.0.0.1"] if role == "link" else ())
            import msgspec

            _, answer = authority.answer((place / "request.json").read_bytes())
            accept_answer(place, msgspec.json.encode(answer))

    def start_nodes(self) -> None:
        for node in range(1, self.nodes + 1):
            keys = "-" if self.insecure else str(self.folder / "keys" / f"n{node}")
            words = [sys.executable, __file__, "--node", self.addresses["fleet"], str(node), keys]
            self.processes.append(subprocess.Popen(words, stdout=self.log, stderr=self.log))

    def run(self, rounds: int, size: int) -> list[float]:
        """Run the app; return the seconds of each round."""
        from privfed.runtime.control import ControlClient, Submission
        from privfed.runtime.credentials import Credentials
        from privfed.runtime.federation import open_app

        keys = None if self.insecure else Credentials.load(self.folder / "keys" / "operator")
        with ControlClient(self.addresses["control"], keys) as control:
            settings = {"num-rounds": str(rounds), "bytes": str(size)}
            name = control.submit(Submission(open_app(self.folder / "echo"), settings, 1, self.nodes)).name
            found = []
            for piece in control.follow(name, "events"):
                events = [json.loads(line) for line in piece.data.splitlines()]
                found += [event["metrics"]["seconds"] for event in events if event["event"] == "round-end"]
                if piece.state == "failed":
                    raise SystemExit(f"the run failed: {piece.reason}\n{(self.folder / 'log').read_text()[-3000:]}")
        return found

    def end(self) -> None:
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            process.wait(30)


def serve_node(address: str, node: int, keys: str) -> None:
    """Be a node: answer every task with what it carried."""
    from privfed.message import Message
    from privfed.runtime.credentials import Credentials
    from privfed.runtime.fleet import FleetClient

    client = FleetClient(address, None if keys == "-" else Credentials.load(Path(keys)), node)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    while True:
        task = client.receive(3600)
        if task is not None:
            client.reply(task.token, Message(task.message.content, reply_to=task.message))


def status(process: int, key: str) -> float:
    """Return a figure of /proc/PID/status in MB."""
    text = Path(f"/proc/{process}/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(key)) / 1024


def cpu(process: int) -> float:
    """Return the CPU seconds a process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def overhead(insecure: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), 2, insecure, "subprocess")
        bench.start_nodes()
        seconds = bench.run(30, 4096)[5:]
        bench.end()
    print(
        f"round overhead, 2 nodes, 4 kB: median {statistics.median(seconds) * 1000:.0f} ms, "
        f"largest {max(seconds) * 1000:.0f} ms (bound 150 ms)"
    )


def large(insecure: bool, megabytes: int, nodes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), nodes, insecure, "inline")
        bench.start_nodes()
        seconds = bench.run(3, megabytes * 1_000_000)
        peak = status(bench.link.pid, "VmHWM")
        bench.end()
    print(
        f"{megabytes} MB model, {nodes} nodes, both ways: rounds of {', '.join(f'{one:.2f}' for one in seconds)} s; "
        f"peak memory of SuperLink and ServerApp {peak:.0f} MB"
    )


def idle(insecure: bool, nodes: int, seconds: float = 20.0) -> None:
    """Connect many nodes that do nothing, from processes of 500 connections each."""
    del insecure  # certificates for thousands of nodes take minutes to make: one certificate would be one node
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), 0, True, "inline")
        before = status(bench.link.pid, "VmRSS")
        crowd = []
        for first in range(1, nodes + 1, 500):
            words = [
                sys.executable,
                __file__,
                "--crowd",
                bench.addresses["fleet"],
                str(first),
                str(min(500, nodes + 1 - first)),
            ]
            crowd.append(subprocess.Popen(words, stdout=bench.log, stderr=bench.log))
        from privfed.runtime.control import ControlClient

        begun = time.monotonic()
        with ControlClient(bench.addresses["control"]) as control:
            while (here := sum(row.connected for row in control.nodes())) < nodes:
                time.sleep(1.0)
                if time.monotonic() - begun > 200:
                    raise SystemExit(f"only {here} came\n{(bench.folder / 'log').read_text()[-2000:]}")
        took = time.monotonic() - begun
        time.sleep(2.0)
        used, memory = cpu(bench.link.pid), status(bench.link.pid, "VmRSS")
        time.sleep(seconds)
        share = (cpu(bench.link.pid) - used) / seconds
        for process in crowd:
            process.kill()
            process.wait()
        bench.end()
    print(
        f"{nodes} idle nodes: {share * 100:.1f} % of a core, {(memory - before) * 1024 / nodes:.0f} kB each; all came within {took:.0f} s"
    )


def serve_crowd(address: str, first: int, count: int) -> None:
    """Hold many sessions that do nothing."""
    import asyncio

    import grpc.aio

    from privfed.runtime.frame import Hello, pack
    from privfed.runtime.handshake import channel_options, greeting

    entering = asyncio.Semaphore(16)

    async def hold(node: int) -> None:
        channel = grpc.aio.insecure_channel(address, options=channel_options())
        while True:
            async with entering:
                stream = channel.stream_stream("/privfed.Fleet/Session")(metadata=greeting(node_id=node))
                await stream.write(pack(Hello(slots=1)))
                frame = await stream.read()
            while frame is not grpc.aio.EOF:
                frame = await stream.read()
            print(node, await stream.code(), flush=True)

    async def hold_all() -> None:
        await asyncio.gather(*(hold(node) for node in range(first, first + count)))

    asyncio.run(hold_all())


def main() -> None:
    if sys.argv[1:2] == ["--node"]:
        serve_node(sys.argv[2], int(sys.argv[3]), sys.argv[4])
        return
    if sys.argv[1:2] == ["--crowd"]:
        serve_crowd(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["overhead", "large", "idle"])
    parser.add_argument("--insecure", action="store_true")
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--nodes", type=int)
    asked = parser.parse_args()
    if asked.only in (None, "overhead"):
        overhead(asked.insecure)
    if asked.only in (None, "large"):
        large(asked.insecure, asked.megabytes, asked.nodes or 2)
    if asked.only in (None, "idle"):
        idle(asked.insecure, asked.nodes or 1000)


if __name__ == "__main__":
    main()
