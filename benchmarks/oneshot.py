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


def run(dimension: int, nodes: int, members: int, bits: int, slots: int) -> dict[str, float]:
    """Run one session in which every node has the same input, and time its parts."""
    protocol = OneShot(0.67, committee=tuple(range(1, members + 1)), slots=slots, bounded=slots > 1)
    session = Session(1, 1, "train", tuple(range(1, nodes + 1)), dimension, bits)
    people, server, agreed = cohort(nodes), protocol.server(session), protocol.agree(session)
    values = inputs(nodes, dimension, bits)
    ring_mask = np.uint64((1 << bits) - 1)
    entries: NDArray[Any] = (values.view(np.uint64) & ring_mask).astype(np.uint32 if bits <= 32 else np.uint64)
    clients = {node: protocol.client(node, identity=people[node]) for node in people}
    kept: dict[int, bytes] = dict.fromkeys(people, b"")
    client, member, receive = [], dict.fromkeys(people, 0.0), []
    final = 0.0
    while stage := server.stage:
        for node, request in server.outbound().items():
            start = time.process_time()
            kept[node], reply = clients[node].step(kept[node], request, lambda: entries)
            spent = time.process_time() - start
            if stage == "send":
                client.append(spent)
                upload = len(reply)
            member[node] += 0.0 if stage == "send" else spent
            start = time.process_time()
            server.receive(node, reply)
            receive.append((stage, time.process_time() - start))
        start = time.process_time()
        server.close()
        final = time.process_time() - start
    assert server.result is not None
    expected = (nodes * values).view(np.uint64) & ring_mask
    if not np.array_equal(server.result.total, expected):
        raise SystemExit("the sum is wrong")
    return {
        "client": min(client),
        "encrypt": encryption(agreed, entries),
        "receive": min(spent for stage, spent in receive if stage == "send"),
        "add": addition(agreed.coefficients),
        "final": final,
        "decrypt": decryption(agreed, entries),
        "member": min(spent for spent in member.values() if spent),
        "upload": upload,
        "upload_target": 3.4 * dimension + 5400 * members,
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
        print(f"  member {1e3 * row['member']:.1f} ms")
        print(f"  upload {row['upload'] / d:.2f} B a coordinate, of which {options.committee - 1} boxes of {share} B")


if __name__ == "__main__":
    main()
