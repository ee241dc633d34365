"""Hundreds of peers that are refused, all at once: what they take of a SuperLink's memory.

    python -m proofs_tests.deployment.hostile_crowd --connections 200

Each crowd is met by a SuperLink in a process of its own, under mutual TLS with a listener for tokens beside it, or
without keys. All connections are open before the first of them asks for anything; then each sends calls to as many
streams as it likes, reads nothing, and stays. The growth is that of the resident memory, looked at all the while.
"""

from __future__ import annotations

import argparse
import random
import ssl
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from privfed.runtime.authority import Authority
from proofs_tests.deployment.hostile_wire import (
    ACK,
    DATA,
    END_STREAM,
    METHODS,
    PREFACE,
    SETTINGS,
    Wire,
    h2,
    message,
    mutated,
    request,
    resident_kib,
)
from proofs_tests.deployment.identity_provider import place
from proofs_tests.deployment.kill_federation import member
from proofs_tests.deployment.superlink_process import SuperLinkProcess

STREAMS = 50
HOLD_SECONDS = 2.0
LIMIT_KIB = 64 << 10


def silent(wire: Wire) -> None:
    """Say nothing at all."""


def asking(service: str, rng: random.Random) -> Callable[[Wire], None]:
    """Return what sends a call on each of many streams."""

    def ask(wire: Wire) -> None:
        parts = [PREFACE, h2(SETTINGS, 0, 0), h2(SETTINGS, ACK, 0)]
        for number in range(STREAMS):
            stream = 2 * number + 1
            told = [("privfed-protocol", "1-2"), ("privfed-release", "0.1.0"), ("privfed-node", "7")]
            parts.append(request(service, rng.choice(METHODS[service]), stream, told))
            parts.append(h2(DATA, END_STREAM if number % 2 else 0, stream, message(mutated(rng))))
        wire.send(b"".join(parts))

    return ask


def context(keys: Path, own: Path | None = None) -> ssl.SSLContext:
    """Return TLS that trusts the federation's authority; own: the keys to show."""
    found = ssl.create_default_context(cafile=str(keys / "ca.pem"))
    found.set_alpn_protocols(["h2"])
    if own is not None:
        found.load_cert_chain(own / "certificate.pem", own / "key.pem")
    return found


@contextmanager
def watching(pid: int, seen: list[int]) -> Iterator[None]:
    """Note the growth of a process's memory."""
    before, over = resident_kib(pid), threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            seen.append(resident_kib(pid) - before)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        over.wait(HOLD_SECONDS)
        over.set()
        thread.join()


def crowd(
    link: SuperLinkProcess, name: str, count: int, tls: ssl.SSLContext | None, act: Callable[[Wire], None]
) -> int:
    """Open so many connections to a listener, have each act, and hold them; return the growth in KiB."""
    seen, wires = [0], []
    with watching(link.pid, seen):
        for _ in range(count):
            try:
                wires.append(Wire(link.addresses[name], tls))
            except OSError:  # turned away by TLS
                continue
        for wire in wires:
            act(wire)
    for wire in wires:
        wire.close()
    return max(seen)


def make_keys(folder: Path) -> Path:
    """Make the keys of a SuperLink, a user and a node, and a policy for tokens."""
    folder.mkdir()
    authority = Authority.create(folder / "authority", "crowd")
    for role, name in (("link", "main"), ("submitter", "alice"), ("node", "a")):
        member(authority, folder / name, role, name)
    (folder / "main" / "roster.json").write_bytes(authority.roster_document)
    (folder / "oidc").mkdir()
    place(folder / "oidc")
    return folder


def growths(folder: Path, count: int) -> dict[str, int]:
    """Return the growth that each kind of crowd causes, in KiB; each meets a SuperLink that has met nobody."""
    rng, found = random.Random(1), {}
    keys = make_keys(folder / "keys")
    bare, user, node = (context(keys / "main", own) for own in (None, keys / "alice", keys / "a"))
    fleet, control = asking("Fleet", rng), asking("Control", rng)
    cases = {
        "silent, nodes' listener": ("fleet", None, silent),
        "no certificate, nodes' listener": ("fleet", bare, fleet),
        "a user, nodes' listener": ("fleet", user, fleet),
        "one node as often, nodes' listener": ("fleet", node, fleet),
        "a node, users' listener": ("control", node, control),
        "no token, tokens' listener": ("token-control", bare, control),
        "no keys at all, nodes' listener": ("fleet", None, fleet),
        "no keys at all, users' listener": ("control", None, control),
    }
    tokens = ["--token-control", "127.0.0.1:0", "--oidc", str(keys / "oidc" / "oidc.toml")]
    for number, (name, (listener, tls, act)) in enumerate(cases.items()):
        insecure = name.startswith("no keys")
        link = SuperLinkProcess(
            folder / str(number), keys=None if insecure else keys / "main", options=[] if insecure else tokens
        )
        with link:
            found[name] = crowd(link, listener, count, tls, act)
        sys.stderr.write(f"{name}: {found[name] / 1024:.1f} MiB\n")
    return found


def main() -> None:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=200)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = growths(Path(folder), asked.connections)
    for name, growth in found.items():
        sys.stdout.write(f"{asked.connections} connections, {name}: RSS +{growth / 1024:.1f} MiB\n")
    sys.exit(max(found.values()) > LIMIT_KIB)


if __name__ == "__main__":
    main()
