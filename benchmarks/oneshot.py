"""Measure the one-shot protocol: CPU time of one thread, best of several, beside what the machine can do.

    python benchmarks/oneshot.py [--dimension 1000000] [--nodes 100] [--committee 43] [--json]

client: the whole send step (sample, encrypt, share, seal, sign), and its encryption alone. add: the server's receive
of one contribution, and the addition alone. final: opening the secrets' sum and decrypting. member: confirm and open.
upload: bytes of a contribution. Limits of the same run: AES keystream of the public polynomials, four FFTs a
polynomial, reading a ciphertext and adding it to a sum as long. Sums are checked against plain addition.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import copy
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.fft
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from privfed.protocols import prg
from privfed.protocols.oneshot import OneShot, ciphertext, ring, sampler, sealing, sharing
from privfed.protocols.oneshot.agreement import Agreement
from privfed.protocols.oneshot.server import OneShotServer
from privfed.protocols.session import Identity, Session

LAYOUTS = ((42, 1), (21, 2), (14, 3))


def best(work: Callable[[], object], repeats: int = 7) -> float:
    """Return the least CPU seconds of several runs."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def cohort(nodes: int) -> dict[int, Identity]:
    """Make identities that know each other."""
    keys = {node: Ed25519PrivateKey.generate() for node in range(1, nodes + 1)}
    roster = {node: key.public_key().public_bytes_raw() for node, key in keys.items()}
    return {node: Identity(node, key.private_bytes_raw(), roster) for node, key in keys.items()}


def inputs(nodes: int, dimension: int, bits: int) -> NDArray[np.int64]:
    """Signed entries whose sum over `nodes` copies fits `bits` bits."""
    reach = max(1, (1 << (bits - 1)) // nodes)
    return np.random.default_rng(0).integers(1 - reach, reach, dimension)


def limits(coefficients: int) -> dict[str, float]:
    """Seconds the machine needs for the unavoidable parts."""
    polynomials = coefficients // ring.N
    spectrum = np.ones((16, ring.N // 2), dtype=np.complex128)
    seed, size = bytes(prg.SEED_BYTES), ciphertext.wire_size(coefficients)
    total, more = np.zeros(size, dtype=np.uint8), np.ones(size, dtype=np.uint8)
    return {
        "keystream": best(lambda: prg.keystream(seed, coefficients * 8)),
        "transforms": best(lambda: scipy.fft.fft(spectrum, axis=-1)) * 4 * polynomials / 16,
        "bytes_added": best(lambda: np.add(total, more, out=total)),
    }


def drive(
    protocol: OneShot, session: Session, entries: NDArray[Any], gone: frozenset[int]
) -> tuple[NDArray[np.uint64], dict[str, float]]:
    """Run a session in which every node has the same input and some vanish after sending; time its parts."""
    people, server = cohort(len(session.nodes)), protocol.server(session)
    clients = {node: protocol.client(node, identity=people[node]) for node in people}
    kept: dict[int, bytes] = dict.fromkeys(people, b"")
    times: dict[str, list[float]] = {"client": [], "receive": [], "member": [], "server": []}
    final = upload = 0.0
    while stage := server.stage:
        start = time.process_time()
        requests = server.outbound()
        times["server"].append(time.process_time() - start)
        for node, request in requests.items():
            if stage != "send" and node in gone:
                continue
            start = time.process_time()
            kept[node], reply = clients[node].step(kept[node], request, lambda: entries)
            middle = time.process_time()
            server.receive(node, reply)
            end = time.process_time()
            times["client" if stage == "send" else "member"].append(middle - start)
            times["receive" if stage == "send" else "server"].append(end - middle)
            upload = max(upload, len(reply))
        final = min(closing(server) for _ in range(5 if stage == "open" else 1))
        server.close()
    assert server.result is not None
    return server.result.total, {
        "client": min(times["client"]),
        "receive": min(times["receive"]),
        "final": final,
        "member": sum(times["member"]) / len(requests),
        "server": sum(times["receive"]) + sum(times["server"]) + final,
        "upload": upload,
    }


def closing(server: OneShotServer) -> float:
    """Seconds that closing the open stage takes, on a copy."""
    copied = copy.deepcopy(server)
    start = time.process_time()
    copied.close()
    return time.process_time() - start


def run(dimension: int, nodes: int, members: int, bits: int, slots: int) -> dict[str, float]:
    """Time one layout: a session without drops, one that loses 30 % of the nodes after sending, and the kernels."""
    protocol = OneShot(0.67, committee=tuple(range(1, members + 1)), slots=slots, bounded=slots > 1)
    session = Session(1, 1, "train", tuple(range(1, nodes + 1)), dimension, bits)
    values, ring_mask = inputs(nodes, dimension, bits), np.uint64((1 << bits) - 1)
    entries: NDArray[Any] = (values.view(np.uint64) & ring_mask).astype(np.uint32 if bits <= 32 else np.uint64)
    nodes_gone = frozenset(node for node in session.nodes if node % 10 in (3, 6, 9))
    total, row = drive(protocol, session, entries, frozenset())
    after, dropped = drive(protocol, session, entries, nodes_gone)
    expected = (nodes * values).view(np.uint64) & ring_mask
    if not (np.array_equal(total, expected) and np.array_equal(after, expected)):
        raise SystemExit("a sum is wrong")
    agreed = protocol.agree(session)
    return {
        **row,
        "server_at_30_percent_drops": dropped["server"],
        "encrypt": encryption(agreed, entries),
        "add": addition(agreed.coefficients),
        "decrypt": decryption(agreed, entries),
        **{f"limit_{name}": spent for name, spent in limits(agreed.coefficients).items()},
    }


def encryption(agreed: Agreement, entries: NDArray[Any]) -> float:
    """Seconds to encrypt a vector."""
    secret = sampler.draw(ring.N, os.urandom)

    def work() -> None:
        noise = sealing.keystream(b"error", os.urandom(32))
        ciphertext.encrypt(entries, secret, agreed.packing, agreed.public(), noise)

    return best(work)


def decryption(agreed: Agreement, entries: NDArray[Any]) -> float:
    """Seconds to collect the sum and decrypt it."""
    secret = sampler.draw(ring.N, os.urandom)
    accumulator = ciphertext.Accumulator(agreed.coefficients)
    noise = sealing.keystream(b"error", os.urandom(32))
    accumulator.add(ciphertext.encrypt(entries, secret, agreed.packing, agreed.public(), noise))
    wide = secret.astype(np.int64)
    return best(
        lambda: ciphertext.decrypt(
            accumulator.total(), wide, agreed.packing, agreed.public(), 1, agreed.session.dimension
        )
    )


def addition(coefficients: int) -> float:
    """Seconds to add one ciphertext out of a queue too long for the caches."""
    wires = [os.urandom(ciphertext.wire_size(coefficients)) for _ in range(8)]
    accumulator = ciphertext.Accumulator(coefficients)

    def work() -> None:
        for wire in wires:
            accumulator.add(wire)

    return best(work) / len(wires)


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dimension", type=int, default=1_000_000)
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument("--committee", type=int, default=43)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    d, out = options.dimension, {}
    for bits, slots in LAYOUTS:
        out[f"{slots} x {bits}"] = run(d, options.nodes, options.committee, bits, slots)
    if options.json:
        print(json.dumps(out))
        return
    share = sharing.SHARE_BYTES
    print(f"d = {d}, n = {options.nodes}, m = {options.committee}; ns a coordinate, but where it says otherwise")
    print("bars for 2 x 21 bits: client 25, add 0.4, final 30 ms, upload 3.4 B a coordinate and 5.4 kB a member")
    for name, row in out.items():
        ns = {part: spent / d * 1e9 for part, spent in row.items()}
        print(f"\n{name} bits")
        print(f"  client {ns['client']:.1f} (encryption {ns['encrypt']:.1f})")
        print(f"    limit: keystream {ns['limit_keystream']:.2f} + transforms {ns['limit_transforms']:.2f}")
        print(f"  server add {ns['add']:.3f}, whole receive {ns['receive']:.3f}")
        print(f"    limit: adding as many bytes {ns['limit_bytes_added']:.3f}")
        print(f"  final {1e3 * row['final']:.1f} ms (decryption {1e3 * row['decrypt']:.1f} ms)")
        print(f"  member {1e3 * row['member']:.1f} ms; server in all {1e3 * row['server']:.1f} ms, ", end="")
        print(f"{1e3 * row['server_at_30_percent_drops']:.1f} ms when 30 % vanish after sending")
        print(f"  upload {row['upload'] / d:.2f} B a coordinate, of which {options.committee - 1} boxes of {share} B")


if __name__ == "__main__":
    main()
