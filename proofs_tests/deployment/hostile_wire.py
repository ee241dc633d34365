"""A peer that means harm: hand-made HTTP/2 and gRPC, random bytes and datagrams, as fast as they go.

    python -m proofs_tests.deployment.hostile_wire --frames 1000000 --seed 1

A SuperLink in a process of its own with all its listeners (nodes, users, users with tokens under TLS, monitor) and a
node with an exec socket take them, while a user's request is timed again and again. A *frame* is one HTTP/2 frame, one
gRPC message, one write of random bytes, or one datagram.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import socket
import ssl
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from privfed import Message, RecordDict
from privfed.runtime.control import ControlClient, Follow, Listing, NodeChange, RunName, Submit
from privfed.runtime.credentials import BearerToken, Credentials
from privfed.runtime.frame import Answer, Frame, Hello, Progress, RosterQuery, RunQuery, Want, chunk, pack, parcel
from privfed.runtime.result import ResultFile, ResultPart, ResultQuery

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS, ACK, END_STREAM, END_HEADERS = 0, 1, 4, 1, 1, 4
STREAMS = 50
METHODS = {
    "Fleet": ("Session", "Answer", "Upload", "Download", "Run", "Roster", "Send", "Fetch", "Nothing"),
    "Control": (
        "Submit",
        "Resume",
        "Stop",
        "Show",
        "Runs",
        "Nodes",
        "Node",
        "Roster",
        "Follow",
        "Results",
        "Result",
        "Nothing",
    ),
}
SEEDS: Sequence[Frame] = (
    Hello(slots=4, holding=("a",), runs=(1,)),
    RunQuery(run_id=5),
    RosterQuery(version=1 << 40),
    Want(parts=(Progress(digest=bytes(32), size=5),)),
    Answer(token="x", parcel=parcel(Message(RecordDict(), 1, "train"))[0]),
    Submit(digest=bytes(32), size=10, settings={"a": "b"}, seed=1, nodes=1, keep="last:3"),
    Follow(name="x", what="log", offset=0, follow=False),
    NodeChange(node_id=3, approve=True),
    RunName(name="nobody"),
    Listing(limit=3),
    ResultQuery(name="x", models="all"),
    ResultPart(run="x", file=ResultFile(path="format", size=1, digest=bytes(32)), offset=0),
)
"""Frames as a node or a user sends them, for a test to change."""


def h2(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return an HTTP/2 frame."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def request(service: str, method: str, stream: int, more: Sequence[tuple[str, str]] = ()) -> bytes:
    """Return the frame that opens a gRPC call; headers as plain literals."""
    told = [(":method", "POST"), (":scheme", "http"), (":path", f"/privfed.{service}/{method}"), (":authority", "x")]
    told += [("te", "trailers"), ("content-type", "application/grpc"), *more]
    block = b"".join(b"\0" + _text(name) + _text(value) for name, value in told)
    return h2(HEADERS, END_HEADERS, stream, block)


def _text(text: str) -> bytes:
    """Return a literal of HPACK: its length, in seven bits or then in pieces of seven, and its bytes."""
    raw = text.encode()
    if len(raw) < 127:
        return bytes((len(raw),)) + raw
    left, head = len(raw) - 127, b"\x7f"
    while left >= 128:
        head, left = head + bytes((left % 128 + 128,)), left // 128
    return head + bytes((left,)) + raw


def message(payload: bytes, size: int | None = None, compressed: int = 0) -> bytes:
    """Return a gRPC message; size: what it claims to have."""
    return bytes((compressed,)) + (len(payload) if size is None else size).to_bytes(4, "big") + payload


class Wire:
    """A connection that sends what it likes, and reads so that it may go on."""

    def __init__(self, address: str, tls: ssl.SSLContext | None = None) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=10)
        if tls is not None:
            self._socket = tls.wrap_socket(self._socket, server_hostname="127.0.0.1")
        self._socket.settimeout(10)

    def send(self, data: bytes) -> bool:
        """Send; return whether the other side still listens."""
        try:
            self._socket.sendall(data)
        except OSError:
            return False
        return True

    def hear(self, seconds: float) -> bytes:
        """Return what comes within a time."""
        self._socket.settimeout(seconds)
        heard = b""
        with contextlib.suppress(OSError):
            while piece := self._socket.recv(1 << 16):
                heard += piece
        return heard

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.close()


def mutated(rng: random.Random) -> bytes:
    """Return a frame of ours, with bytes changed, cut off, or put in."""
    raw = bytearray(pack(rng.choice(SEEDS)) if rng.random() < 0.9 else chunk(bytes(32), 0, 5, b"12345"))
    for _ in range(rng.randrange(4)):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    return bytes(raw[: rng.randrange(len(raw) + 1)] if rng.random() < 0.5 else raw + rng.randbytes(rng.randrange(3)))


def calls(
    rng: random.Random,
    service: str,
    address: str,
    tls: ssl.SSLContext | None = None,
    more: Callable[[random.Random], list[tuple[str, str]]] = lambda rng: [],
) -> int:
    """Send messages to every method, a connection full; return how many frames that were. more: further headers."""
    wire, sent = Wire(address, tls), 0
    wire.send(PREFACE + h2(SETTINGS, 0, 0) + h2(SETTINGS, ACK, 0))
    for place in range(STREAMS):
        stream = 2 * place + 1
        told = [("privfed-protocol", rng.choice(["1-1", "1-1", "1-1", "7-9", "x", ""])), ("privfed-node", "1")]
        told = told[: rng.randrange(3)] if place % 5 else told
        parts = [request(service, rng.choice(METHODS[service]), stream, [*told, *more(rng)])]
        for _ in range(rng.randrange(1, 4)):
            body = mutated(rng)
            odd = rng.random()
            if odd < 0.2:
                body = message(body, rng.choice([0, len(body) + 1, 5 << 20, 0xFFFFFFFF, max(0, len(body) - 1)]))
            elif odd < 0.25:
                body = message(body, compressed=rng.randrange(256))
            else:
                body = message(body)
            parts.append(h2(DATA, 0, stream, body))
        parts.append(h2(DATA, END_STREAM, stream))
        sent += len(parts)
        if not wire.send(b"".join(parts)):
            break
    wire.hear(0.05)
    wire.close()
    return sent


def noise(rng: random.Random, address: str, tls: ssl.SSLContext | None = None) -> int:
    """Send HTTP/2 frames of any kind until the other side has enough; return how many."""
    wire, sent = Wire(address, tls), 0
    wire.send(PREFACE + (h2(SETTINGS, 0, 0) if rng.random() < 0.7 else b""))
    for _ in range(100):
        payload = rng.randbytes(rng.randrange(64))
        frame = h2(rng.randrange(12), rng.randrange(256), rng.choice([0, 1, 3, 1 << 31, 0xFFFFFFFF]), payload)
        sent += 1
        if not wire.send(frame[: rng.randrange(len(frame))] if rng.random() < 0.05 else frame):
            break
    wire.close()
    return sent


def bytes_at(rng: random.Random, address: str, tls: ssl.SSLContext | None = None) -> int:
    """Send random bytes, and what looks like HTTP/1 or TLS; return how many writes."""
    wire, sent = Wire(address, tls), 0
    begin = rng.choice([b"", b"GET /metrics HTTP/1.1\r\n", b"POST / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n"])
    for _ in range(20):
        sent += 1
        if not wire.send(begin + rng.choice([b"", b"\x16\x03\x01\x02\x00\x01"]) + rng.randbytes(rng.randrange(500))):
            break
        begin = b""
    wire.close()
    return sent


def datagrams(rng: random.Random, path: Path) -> int:
    """Send what is no greeting to an exec socket; return how many."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stream:
        stream.settimeout(10)
        try:
            stream.connect(str(path))
            choice = [b'{"token": "x", "version": 1}', b"[]", b"{", b'{"op": "launched", "id": 1}', rng.randbytes(60)]
            stream.send(rng.choice(choice)[: rng.randrange(1, 61)])
            stream.recv(1 << 16)
        except OSError:
            pass
    return 1


@dataclass
class Seen:
    """What came of it."""

    frames: Counter[str] = field(default_factory=Counter)
    probes: list[float] = field(default_factory=list)
    failed: int = 0
    growth_kib: int = 0

    def summary(self) -> str:
        """Return the figures in a line or two."""
        found = sorted(self.probes) or [0.0]
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.frames.items()))
        return (
            f"{sum(self.frames.values())} frames ({kinds}); growth of RSS {self.growth_kib / 1024:.1f} MiB; "
            f"{len(found)} requests of a user meanwhile, {self.failed} failed: median "
            f"{1e3 * found[len(found) // 2]:.0f} ms, p99 {1e3 * found[int(0.99 * (len(found) - 1))]:.0f} ms, "
            f"largest {1e3 * found[-1]:.0f} ms"
        )


def resident_kib(pid: int) -> int:
    """Return the memory of a process, in KiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1])
    raise AssertionError("the process is gone")


@contextlib.contextmanager
def probing(
    control: str, seen: Seen, pids: Sequence[int], by: Credentials | BearerToken | None = None
) -> Iterator[None]:
    """Ask as a user again and again, and look at the processes' memory; what is noted is its growth."""
    over = threading.Event()
    with ControlClient(control, by) as user:
        for _ in range(20):  # what is allocated once does not count
            user.runs()
        before = {pid: resident_kib(pid) for pid in pids}

        def probe() -> None:
            while not over.wait(0.1):
                began = time.monotonic()
                try:
                    user.runs()
                except Exception:  # noqa: BLE001 - counted
                    seen.failed += 1
                seen.probes.append(time.monotonic() - began)
                seen.growth_kib = max(seen.growth_kib, *(resident_kib(pid) - before[pid] for pid in pids))

        thread = threading.Thread(target=probe)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def send(ways: Sequence[tuple[str, float, Callable[[], int]]], frames: int, seen: Seen) -> None:
    """Send so many frames. ways: of each kind its name, its share, and what sends some and says how many."""
    while (total := sum(seen.frames.values())) < frames:
        name, _, way = min(ways, key=lambda one: seen.frames[one[0]] / one[1])
        try:
            seen.frames[name] += way()
        except OSError as fault:  # the backlog is full for a moment
            sys.stderr.write(f"{name}: {fault}\n")
            time.sleep(0.1)
        if total // 50_000 != sum(seen.frames.values()) // 50_000:
            sys.stderr.write(f"{seen.summary()}\n")


def attack(addresses: dict[str, str], exec_socket: Path, frames: int, seed: int, seen: Seen) -> None:
    """Send so many frames of all kinds to all listeners."""
    rng = random.Random(seed)
    fleet, control = addresses["fleet"], addresses["control"]
    ways: Sequence[tuple[str, float, Callable[[], int]]] = (
        ("gRPC messages to nodes' methods", 0.3, lambda: calls(rng, "Fleet", fleet)),
        ("gRPC messages to users' methods", 0.3, lambda: calls(rng, "Control", control)),
        ("HTTP/2 frames", 0.25, lambda: noise(rng, rng.choice([fleet, control]))),
        ("writes of random bytes", 0.1, lambda: bytes_at(rng, rng.choice(list(addresses.values())))),
        ("datagrams", 0.05, lambda: datagrams(rng, exec_socket)),
    )
    send(ways, frames, seen)


def campaign(folder: Path, frames: int, seed: int) -> tuple[Seen, list[str]]:
    """Attack a SuperLink and a node in processes of their own; return what came of it, and what their logs say."""
    from proofs_tests.deployment.node_process import NodeProcess
    from proofs_tests.deployment.superlink_process import SuperLinkProcess
    from proofs_tests.deployment.waiting import eventually

    seen = Seen()
    link = SuperLinkProcess(folder / "link", options=["--monitor", "127.0.0.1:0"])
    with link, NodeProcess(folder / "node", link.fleet, 9, ["--isolation", "external"]) as node:
        socket_path = folder / "node" / "exec.sock"
        eventually(socket_path.exists)
        with probing(link.control, seen, [link.pid, node.pid]):
            attack(link.addresses, socket_path, frames, seed, seen)
        output = [link.output, node.output]
        assert link.end() == 0
        assert node.end() == 0
    return seen, output


def main() -> None:
    """Run a campaign from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seen, output = campaign(Path(folder), asked.frames, asked.seed)
    sys.stdout.write(f"{seen.summary()}\n")
    bad = [line for text in output for line in text.splitlines() if "Traceback" in line or "a request failed" in line]
    sys.stdout.writelines(f"{line}\n" for line in bad[:20])
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
