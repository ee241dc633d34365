"""Secure aggregation: masks, shares and whole sessions, each beside the limit measured in the same run.

Method: one thread, CPU time (process_time), best of several. `limit` is AES-128-GCM keystream into a warm buffer plus
an in-place add, the cheapest way to the same bits that the libraries offer.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import argparse
import importlib.util
import secrets
import time
from collections.abc import Callable

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from privfed.protocols import SecAgg, SecAggPlus, keys
from privfed.protocols.prg import add_masks
from privfed.protocols.secagg.server import SecAggServer
from privfed.protocols.session import Identity, Policy, Protocol, Session
from privfed.protocols.shamir import interpolate, split

MILLION = 1_000_000


def best(function: Callable[[], object], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def limit_per_mask() -> float:
    """Seconds for one mask of 1M uint32 at the speed of the libraries: 256 KiB at a time, 16 masks."""
    size, seeds = 1 << 18, [secrets.token_bytes(16) for _ in range(16)]
    zeros, buffer = memoryview(bytes(size)), bytearray(size)
    total, mask = np.zeros(size // 4, np.uint32), np.frombuffer(buffer, np.uint32)

    def run() -> None:
        for seed in seeds:
            stream = Cipher(algorithms.AES(seed), modes.GCM(bytes(12))).encryptor()
            for _ in range(4):
                stream.update_into(zeros, buffer)
                np.add(total, mask, out=total)

    return best(run) / len(seeds) * (4 * MILLION / (4 * size))


def masks() -> float:
    total = np.zeros(MILLION, np.uint32)
    seeds = [secrets.token_bytes(16) for _ in range(32)]
    return best(lambda: add_masks(total, seeds[:16], seeds[16:])) / 32


def masks_on_threads(threads: int) -> float:
    """Wall seconds a mask of 1M uint32 when chunks are shared among threads; on a busy machine it says little."""
    total = np.zeros(MILLION, np.uint32)
    seeds = [secrets.token_bytes(16) for _ in range(32)]
    times = []
    for _ in range(7):
        start = time.perf_counter()
        add_masks(total, seeds, [], threads=threads)
        times.append(time.perf_counter() - start)
    return min(times) / len(seeds)


def shamir(n: int, threshold: int) -> tuple[float, float]:
    pair = [secrets.token_bytes(32), secrets.token_bytes(32)]
    points = range(1, n + 1)
    shares = split(pair, points, threshold)
    return best(lambda: split(pair, points, threshold)), best(
        lambda: interpolate(shares[:threshold], points[:threshold])
    )


def session(protocol: Protocol, n: int, dimension: int, drop: float, clients_timed: int = 3) -> dict[str, float]:
    """Return CPU seconds of one client and of the server, and bytes up per client. Every node's step really runs."""
    nodes = tuple(range(1, n + 1))
    agreed = Session(1, 1, "train", nodes, dimension, 32)
    signing = {node: secrets.token_bytes(32) for node in nodes}
    roster = {node: keys.signing_public(key) for node, key in signing.items()}
    server = protocol.server(agreed)
    assert isinstance(server, SecAggServer)
    clients = {
        node: protocol.client(node, identity=Identity(node, signing[node], roster), policy=Policy()) for node in nodes
    }
    kept = dict.fromkeys(nodes, b"")
    vector = np.random.default_rng(0).integers(0, 1 << 20, dimension, dtype=np.uint64)
    gone = set(nodes[: int(n * drop)])
    spent = {"client": 0.0, "server": 0.0, "up": 0.0}
    for stage in protocol.stages:
        start = time.process_time()
        requests = server.outbound()
        spent["server"] += time.process_time() - start
        for node, request in requests.items():
            if node in gone and stage not in ("advertise", "share"):
                continue
            start = time.process_time()
            kept[node], reply = clients[node].step(kept[node], request, lambda: vector)
            middle = time.process_time()
            server.receive(node, reply)
            spent["server"] += time.process_time() - middle
            if node > n - clients_timed:
                spent["client"] += (middle - start) / clients_timed
                spent["up"] += len(reply) / clients_timed
            if stage == "reveal":
                kept[node] = b""
        start = time.process_time()
        server.close()
        spent["server"] += time.process_time() - start
    assert server.result is not None
    expected = (vector.astype(np.uint64) * (n - len(gone))) & np.uint64(0xFFFFFFFF)
    assert np.array_equal(server.result.total, expected)
    return spent


def best_session(protocol: Protocol, n: int, drop: float, repeats: int = 3) -> dict[str, float]:
    """Return the least of every figure over several sessions of 1M entries."""
    runs = [session(protocol, n, MILLION, drop) for _ in range(repeats)]
    return {name: min(run[name] for run in runs) for name in runs[0]}


def against_flwr(n: int, dimension: int) -> None:
    """Print our sessions beside flwr's own mod and workflow, both driven in this process over the full graph."""
    if importlib.util.find_spec("flwr") is None:
        print(
            "flwr is not installed in this Python: NO ratio table (pip install flwr, or run with a Python that has it)"
        )
        return
    import flwr
    import flwr_secagg

    print(f"flwr {flwr.__version__}, secaggplus_mod under SecAggPlusWorkflow, n={n} d={dimension:,}, once each:")
    for drop in (0.0, 0.05):
        threshold = round(0.51 * n)
        mine = session(SecAgg(threshold=threshold), n, dimension, drop)
        theirs = flwr_secagg.session(n, dimension, drop, threshold)
        for role in ("client", "server"):
            ratio = theirs[role] / mine[role]
            print(f"  drop={drop:.0%} {role}: flwr {theirs[role]:.3f} s, ours {mine[role]:.4f} s, {ratio:.0f} x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", action="store_true", help="also 1,000 nodes on a sparse graph (needs 8 GB)")
    parser.add_argument("--flwr-nodes", type=int, default=40, help="nodes in the ratio table; 100 take minutes")
    parser.add_argument("--flwr-dimension", type=int, default=100_000, help="entries of a vector in the ratio table")
    parser.add_argument("--only-flwr", action="store_true", help="the ratio table alone")
    options = parser.parse_args()
    if options.only_flwr:
        against_flwr(options.flwr_nodes, options.flwr_dimension)
        return
    print(f"load average {os.getloadavg()[0]:.1f}")
    limit, mask = limit_per_mask(), masks()
    print(f"mask 1M uint32: {mask * 1e3:.3f} ms, limit {limit * 1e3:.3f} ms, ratio {mask / limit:.2f} (bar 1.5)")
    walls = {threads: masks_on_threads(threads) for threads in (1, 2)}
    print(f"mask 1M uint32, wall: {walls[1] * 1e3:.3f} ms on one thread, {walls[2] * 1e3:.3f} ms on two")
    for n, threshold, bar in ((100, 51, 0.1), (1000, 501, 1.5)):
        made, found = shamir(n, threshold)
        print(
            f"shamir n={n} t={threshold}, two secrets: split {made * 1e3:.3f} ms (bar {bar}), "
            f"combine {found * 1e3:.3f} ms"
        )
    for drop, bar in ((0.0, 0.1), (0.05, 0.35), (0.3, 1.2)):
        spent = best_session(SecAgg(threshold=51), 100, drop)
        bound = (100 + 100 * drop * 100 * (1 - drop)) * limit
        print(
            f"secagg n=100 d=1M drop={drop:.0%}: client {spent['client']:.3f} s (bar 0.06), "
            f"server {spent['server']:.3f} s (bar {bar}; masks alone {bound:.3f}), "
            f"up {spent['up'] / 4 / MILLION:.3f} x plain uint32"
        )
    spent = best_session(SecAgg(threshold=0.7, mode="active"), 100, 0.05)
    print(f"secagg active n=100 d=1M drop=5%: client {spent['client']:.3f} s, server {spent['server']:.3f} s")
    against_flwr(options.flwr_nodes, options.flwr_dimension)
    if options.large:
        spent = session(SecAggPlus(corrupt=0.05, dropout=0.05), 1000, MILLION, 0.05)
        print(f"secagg+ n=1000 d=1M drop=5%: client {spent['client']:.3f} s, server {spent['server']:.3f} s (bar 3.5)")


if __name__ == "__main__":
    main()
