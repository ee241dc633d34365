"""The deployment on one machine: round overhead, large models, idle nodes. Real processes and sockets over loopback.

    python benchmarks/deployment.py                    round overhead, 100 MB model, idle nodes
    python benchmarks/deployment.py --only large --megabytes 1000 --nodes 4
    python benchmarks/deployment.py --only idle --nodes 5000
    python benchmarks/deployment.py --only active --nodes 500

Everything is mutual TLS with SQLite on disk, unless --insecure. The server app is FedAvg as it is shipped, in a
process of its own, with a checkpoint every round. A node is `privfed.runtime.fleet` and a thread that changes one
weight of what it was sent and answers at once: all of the model travels both ways, and the runtime is measured.
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
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from privfed.message import Message
    from privfed.runtime.control import ControlClient

APP = """
import time
import numpy as np
from privfed import Array, ArrayRecord, ClientApp, Message, MetricRecord, ServerApp
from privfed.strategies import FedAvg

client = ClientApp()
server = ServerApp()

@client.train()
def train(message, context):
    return Message(message.content, reply_to=message)

@server.main()
def main(grid, context):
    size, rounds = context.run_config["bytes"], context.run_config["num-rounds"]
    count = len(grid.get_node_ids())
    model = ArrayRecord({"0": Array.adopt(np.random.default_rng(1).random(size // 4, np.float32))})
    first = float(model["0"].view()[0])
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=count, min_available_nodes=count)
    begun = time.perf_counter()

    def round_ended(number, arrays):  # the seconds of a round: from the end of the one before, its checkpoint included
        nonlocal begun
        expected = first + number * (count + 1) / 2  # node i answers with the first weight plus i
        assert abs(float(arrays["0"].view()[0]) - expected) < 1e-3 * expected
        begun, before = time.perf_counter(), begun
        return MetricRecord({"seconds": begun - before})

    strategy.start(grid, model, num_rounds=rounds, evaluate_fn=round_ended)
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

    def __init__(self, folder: Path, nodes: int, insecure: bool, isolation: str, crowd: int = 0) -> None:
        self.folder = folder
        self.nodes = nodes
        self.insecure = insecure
        app = folder / "echo"
        app.mkdir()
        (app / "echo_app.py").write_text(APP)
        (app / "pyproject.toml").write_text(MANIFEST)
        if not insecure:
            self._keys()
            if crowd:
                certify_crowd(self, crowd)
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
            here = {**os.environ, "TMPDIR": str(self.folder)}  # they are killed, and nothing of theirs is to be left
            self.processes.append(subprocess.Popen(words, stdout=self.log, stderr=self.log, env=here))

    def control(self) -> ControlClient:
        """Return a connection as an operator."""
        from privfed.runtime.control import ControlClient
        from privfed.runtime.credentials import Credentials

        keys = None if self.insecure else Credentials.load(self.folder / "keys" / "operator")
        return ControlClient(self.addresses["control"], keys)

    def run(self, rounds: int, size: int) -> list[float]:
        """Run the app; return the seconds of each round."""
        from privfed.runtime.control import Submission
        from privfed.runtime.federation import open_app

        with self.control() as control:
            settings = {"num-rounds": str(rounds), "bytes": str(size)}
            name = control.submit(Submission(open_app(self.folder / "echo"), settings, 1, self.nodes)).name
            found = []
            for piece in control.follow(name, "events"):
                events = [json.loads(line) for line in piece.data.splitlines()]
                found += [event["metrics"]["server"]["seconds"] for event in events if event["event"] == "round-end"]
                if piece.state == "failed":
                    raise SystemExit(f"the run failed: {piece.reason}\n{(self.folder / 'log').read_text()[-3000:]}")
        return found

    def end(self) -> None:
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            process.wait(30)


def changed(message: Message, by: float) -> Message:
    """Return the reply: the model with another first weight."""
    from privfed import Array, ArrayRecord, Message, MetricRecord, RecordDict

    model = message.content.array_records["arrays"]["0"].numpy()
    model[0] += by
    content = {"arrays": ArrayRecord({"0": Array.adopt(model)}), "metrics": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(content), reply_to=message)


def serve_node(address: str, node: int, keys: str) -> None:
    """Be a node: answer every task with what it carried."""
    from privfed.runtime.credentials import Credentials
    from privfed.runtime.fleet import FleetClient

    client = FleetClient(address, None if keys == "-" else Credentials.load(Path(keys)), node)
    while True:
        task = client.receive(3600)
        if task is not None:
            client.reply(task.token, changed(task.message, node))


def serve_nodes(address: str, first: int, count: int, keys: str) -> None:
    """Be many nodes, each with a connection and a thread of its own. keys: the folder of their key folders, or "-"."""

    def place(node: int) -> str:
        return keys if keys == "-" else str(Path(keys) / f"n{node}")

    for node in range(first + 1, first + count):
        threading.Thread(target=serve_node, args=(address, node, place(node)), daemon=True).start()
    serve_node(address, first, place(first))


def active(insecure: bool, nodes: int, size: int = 1_000_000) -> None:
    """Run rounds over many nodes that answer at once."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), nodes, insecure, "subprocess")
        keys = "-" if insecure else str(Path(folder) / "keys")
        for first in range(1, nodes + 1, 50):
            count = str(min(50, nodes + 1 - first))
            words = [sys.executable, __file__, "--serve", bench.addresses["fleet"], str(first), count, keys]
            here = {**os.environ, "TMPDIR": folder}  # as for `start_nodes`
            bench.processes.append(subprocess.Popen(words, stdout=bench.log, stderr=bench.log, env=here))
        with Watch(bench.link.pid) as watch:
            seconds = bench.run(2, size)
        nodes_seconds = sum(cpu(process.pid) for process in bench.processes[1:])
        bench.end()
    kind = "plain" if insecure else "TLS"
    print(f"{nodes} active nodes, {kind}, {size / 1e6:g} MB: rounds of {', '.join(f'{one:.1f}' for one in seconds)} s")
    watch.show_time(nodes_seconds)
    watch.show(size / 1e6)


class Watch:
    """Looks at a SuperLink and the ServerApp's process it starts, twenty times a second."""

    def __init__(self, link: int) -> None:
        self._link = link
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.peaks: dict[tuple[str, str], float] = {}
        self.seconds: dict[str, float] = {}
        self._before = cpu(link)
        self.together: dict[str, float] = {}

    def _look(self) -> None:
        while not self._ended.wait(0.05):
            now: dict[str, float] = {}
            for name, process in [("SuperLink", self._link), *(("ServerApp", one) for one in children(self._link))]:
                try:
                    self.seconds[name] = cpu(process) - (self._before if name == "SuperLink" else 0.0)
                    seen = {key: status(process, key) for key in ("VmHWM", "RssAnon", "VmRSS")}
                except (OSError, StopIteration):  # it has ended
                    continue
                for key, found in seen.items():
                    self.peaks[name, key] = max(found, self.peaks.get((name, key), 0.0))
                    now[key] = now.get(key, 0.0) + found
            self.together = {key: max(found, self.together.get(key, 0.0)) for key, found in now.items()}

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *fault: object) -> None:
        self._ended.set()
        self._thread.join()

    def show_time(self, nodes: float) -> None:
        """Print the CPU seconds of all rounds and the load of the machine."""
        used = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
        print(f"  CPU seconds of all rounds, starts included: {used}, nodes {nodes:.1f}; load {load}")

    def show(self, megabytes: float) -> None:
        """Print the peaks. VmHWM counts every page a process had mapped at one time, page cache included."""
        model = megabytes * 1e6 / (1 << 20)
        parts = [f"{name} {self.peaks[name, 'VmHWM']:.0f}" for name in ("SuperLink", "ServerApp")]
        anonymous = [f"{name} {self.peaks[name, 'RssAnon']:.0f}" for name in ("SuperLink", "ServerApp")]
        total = sum(self.peaks[name, "VmHWM"] for name in ("SuperLink", "ServerApp"))
        print(f"  peak resident MiB (VmHWM, mapped pages counted): {', '.join(parts)}; sum {total:.0f}")
        print(f"  anonymous alone (RssAnon, sampled): {', '.join(anonymous)}")
        print(f"  the two together at one time (VmRSS, sampled): {self.together['VmRSS']:.0f}; model {model:.0f}")
        if megabytes >= 1000:  # below, the processes themselves outweigh the model
            print(f"  sum of the peaks / model: {total / model:.2f} (bound 1.3)")


def children(process: int) -> list[int]:
    """Return the processes a process has started."""
    found = Path(f"/proc/{process}/task").glob("*/children")
    return [int(one) for path in found for one in path.read_text().split()]


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


def large(insecure: bool, megabytes: int, nodes: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), nodes, insecure, "subprocess")
        bench.start_nodes()
        with Watch(bench.link.pid) as watch:
            seconds = bench.run(rounds, megabytes * 1_000_000)
        nodes_seconds = sum(cpu(process.pid) for process in bench.processes[1:])
        bench.end()
    print(f"{megabytes} MB model, {nodes} nodes, both ways: rounds of {', '.join(f'{one:.2f}' for one in seconds)} s")
    watch.show_time(nodes_seconds)
    watch.show(megabytes)


def certify_crowd(bench: Bench, nodes: int) -> None:
    """Issue a certificate to every node of the crowd, and approve all of them."""
    import msgspec

    from privfed.runtime import certificate as cert
    from privfed.runtime.authority import utc_now
    from privfed.runtime.node_register import Entry

    place = bench.folder / "keys" / "authority"
    authority = cert.read_certificate((place / "ca.pem").read_bytes(), "ca.pem")
    signer = cert.read_key((place / "ca.key").read_bytes(), "ca.key")
    crowd = bench.folder / "crowd"
    crowd.mkdir()
    key = cert.new_key()  # one key, many certificates: what a handshake costs is the same
    (crowd / "key").write_bytes(cert.key_pem(key))
    (crowd / "ca").write_bytes((place / "ca.pem").read_bytes())
    for node in range(1, nodes + 1):
        peer = cert.Peer("node", f"c{node}", node)
        issued = cert.issue(authority, signer, key.public_key(), peer, (), utc_now(), 1)
        (crowd / str(node)).write_bytes(cert.certificate_pem(issued))
    entries = [Entry(node, f"c{node}", "approved") for node in range(1, nodes + 1)]
    (bench.folder / "home").mkdir()
    (bench.folder / "home" / "nodes.json").write_bytes(msgspec.json.encode(entries))


def idle(insecure: bool, nodes: int, seconds: float) -> None:
    """Connect many nodes that do nothing, from processes of 500 connections each."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), 0, insecure, "inline", crowd=nodes)
        before = status(bench.link.pid, "VmRSS")
        crowd = []
        for first in range(1, nodes + 1, 500):
            words = ["--crowd", bench.addresses["fleet"], str(first), str(min(500, nodes + 1 - first))]
            words.append("-" if insecure else str(bench.folder / "crowd"))
            crowd.append(subprocess.Popen([sys.executable, __file__, *words], stdout=bench.log, stderr=bench.log))
        begun = time.monotonic()
        with bench.control() as control:
            while (here := sum(row.connected for row in control.nodes())) < nodes:
                time.sleep(1.0)
                if time.monotonic() - begun > 900:
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
        f"{nodes} idle nodes, {'plain' if insecure else 'TLS'}: {share * 100:.2f} % of a core over {seconds:g} s, "
        f"{(memory - before) * 1024 / nodes:.0f} kB each; all came within {took:.0f} s"
    )


def serve_crowd(address: str, first: int, count: int, keys: str) -> None:
    """Hold many sessions that do nothing."""
    import asyncio

    from privfed.runtime.credentials import require_tls_1_3

    require_tls_1_3()
    import grpc.aio

    from privfed.runtime.frame import Hello, pack
    from privfed.runtime.handshake import channel_options, greeting

    entering = asyncio.Semaphore(8)

    def open_channel(node: int) -> grpc.aio.Channel:
        if keys == "-":
            return grpc.aio.insecure_channel(address, options=channel_options())
        ca, key, chain = ((Path(keys) / name).read_bytes() for name in ("ca", "key", str(node)))
        credentials = grpc.ssl_channel_credentials(ca, key, chain)
        return grpc.aio.secure_channel(address, credentials, options=channel_options())

    async def hold(node: int) -> None:
        channel = open_channel(node)
        while True:
            async with entering:
                stream = channel.stream_stream("/privfed.Fleet/Session")(metadata=greeting(node_id=node))
                try:
                    await stream.write(pack(Hello(slots=1)))
                    frame = await stream.read()
                except grpc.aio.AioRpcError as fault:
                    print(node, fault.code(), fault.details(), flush=True)
                    continue
            while frame is not grpc.aio.EOF:
                frame = await stream.read()
            print(node, await stream.code(), flush=True)

    async def hold_all() -> None:
        await asyncio.gather(*(hold(node) for node in range(first, first + count)))

    asyncio.run(hold_all())


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        serve_nodes(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
        return
    if sys.argv[1:2] == ["--node"]:
        serve_node(sys.argv[2], int(sys.argv[3]), sys.argv[4])
        return
    if sys.argv[1:2] == ["--crowd"]:
        serve_crowd(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["overhead", "large", "idle", "active"])
    parser.add_argument("--insecure", action="store_true")
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0)
    asked = parser.parse_args()
    if asked.only in (None, "overhead"):
        overhead(asked.insecure)
    if asked.only in (None, "large"):
        large(asked.insecure, asked.megabytes, asked.nodes or 2, asked.rounds)
    if asked.only == "active":
        active(asked.insecure, asked.nodes or 500)
    if asked.only in (None, "idle"):
        idle(asked.insecure, asked.nodes or 1000, asked.seconds)


if __name__ == "__main__":
    main()
