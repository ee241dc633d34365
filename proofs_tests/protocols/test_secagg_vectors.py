"""A whole session byte by byte, in both modes, and the same session with one message changed.

The vectors fix the wire format, every label and the order in which randomness is drawn: a change of any of them is a
change of the protocol. `python proofs_tests/protocols/test_secagg_vectors.py` writes them anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privfed.protocols import SecAgg, SecAggPlus, keys
from privfed.protocols.codec import decode, node_list
from privfed.protocols.errors import RemoteError
from privfed.protocols.secagg.server import SecAggServer
from privfed.protocols.session import Client, Identity, Session

VECTORS = Path(__file__).resolve().parents[1] / "vectors"
LATE = 3
"""This node vanishes before it sends its masked vector."""
INPUTS = {2: [1, 2, 3], 3: [10, 20, 30], 7: [100, 200, 300], 9: [4, 4, 4], 12: [7, 0, 1023], 14: [0, 0, 1]}
FULL, SPARSE = (2, 3, 7), (2, 3, 7, 9, 12, 14)
Protocols = dict[str, SecAgg | SecAggPlus]
MODES: Protocols = {
    "semi_honest": SecAgg(threshold=2),
    "active": SecAgg(threshold=2, mode="active", corrupt=0.0),
}
SPARSE_MODES: Protocols = {
    "sparse semi_honest": SecAggPlus(neighbours=4, threshold=2),
    "sparse active": SecAggPlus(neighbours=4, threshold=3, mode="active", corrupt=0.0, dropout=0.0),
}
FILES = {"secagg": MODES, "secaggplus": SPARSE_MODES}


def stream(name: str) -> Callable[[int], bytes]:
    calls = count()
    return lambda size: hashlib.shake_256(f"secagg vector {name} {next(calls)}".encode()).digest(size)


class Play:
    """One session with fixed randomness, stage by stage."""

    def __init__(self, mode: str) -> None:
        protocol = (MODES | SPARSE_MODES)[mode]
        nodes = FULL if mode in MODES else SPARSE
        signing = {node: bytes([node]) * 32 for node in nodes}
        roster = {node: keys.signing_public(key) for node, key in signing.items()}
        session = Session(1, 9, "train", nodes, 3, 10, hashlib.sha256(b"a model and its configuration").digest())
        self.stages = protocol.stages
        server = protocol.server(session, random=stream("server"))
        assert isinstance(server, SecAggServer)
        self.server = server
        self.clients: dict[int, Client] = {
            node: protocol.client(node, identity=Identity(node, signing[node], roster), random=stream(f"node {node}"))
            for node in nodes
        }
        self.kept = dict.fromkeys(nodes, b"")

    def requests(self) -> dict[int, bytes]:
        late = self.server.stage not in ("advertise", "share")
        return {node: bytes(text) for node, text in self.server.outbound().items() if not (late and node == LATE)}

    def step(self, node: int, request: bytes) -> bytes:
        vector = np.array(INPUTS[node], dtype=np.uint64)
        self.kept[node], reply = self.clients[node].step(self.kept[node], request, lambda: vector)
        return bytes(reply)

    def stage(self) -> list[dict[str, Any]]:
        """Run the open stage and return what travelled."""
        name, lines = self.server.stage, []
        for node, request in self.requests().items():
            reply = self.step(node, request)
            self.server.receive(node, reply)
            lines.append({"stage": name, "node": node, "request": request.hex(), "reply": reply.hex()})
        self.server.close()
        return lines


def record(mode: str) -> dict[str, Any]:
    play, lines = Play(mode), []
    while play.server.stage:
        lines += play.stage()
    assert play.server.result is not None
    return {
        "mode": mode,
        "messages": lines,
        "total": play.server.result.total.tolist(),
        "survivors": sorted(play.server.result.survivors),
    }


def read(name: str) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads((VECTORS / name).read_text())
    return cases


@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name, modes in FILES.items() for mode in modes])
def test_a_session_is_the_recorded_one_byte_by_byte(name: str, mode: str) -> None:
    (expected,) = [case for case in read(f"{name}.json") if case["mode"] == mode]
    assert record(mode) == expected
    survivors = [node for node in (FULL if mode in MODES else SPARSE) if node != LATE]
    assert expected["survivors"] == survivors
    assert expected["total"] == [sum(INPUTS[node][place] for node in survivors) % 1024 for place in range(3)]


@pytest.mark.parametrize("name", FILES)
def test_a_changed_message_is_refused_for_the_recorded_reason(name: str) -> None:
    cases = read(f"bad_{name}.json")
    seen = set()
    for mode in FILES[name]:
        play = Play(mode)
        while play.server.stage:
            for case in (case for case in cases if (case["mode"], case["stage"]) == (mode, play.server.stage)):
                request = play.requests()[2]
                assert bytes.fromhex(case["request"]) != request
                with pytest.raises(RemoteError) as fault:
                    play.step(2, bytes.fromhex(case["request"]))
                assert fault.value.deviation == case["deviation"], case["why"]
                seen.add(case["why"])
            play.stage()
    assert len(seen) == len({case["why"] for case in cases}) >= 10


def tampered(stage: str, request: bytes) -> list[tuple[str, bytes]]:
    """Return the ways in which the recorded bad requests differ from the good one."""
    changes = [
        ("one byte too many", request + b"\0"),
        ("one byte too few", request[:-1]),
        ("another kind", bytes([9]) + request[1:]),
    ]
    if stage == "advertise":
        changes.append(("a threshold of one", request[:6] + (1).to_bytes(4, "big") + request[10:]))
        changes.append(("a threshold above the cohort", request[:6] + (9).to_bytes(4, "big") + request[10:]))
    else:
        changes.append(("bound to another session", request[:1] + bytes([request[1] ^ 1]) + request[2:]))
    if stage == "share":
        at = 33 + 32 + 4 + 8
        changes.append(("its own key swapped", request[:at] + bytes([request[at] ^ 1]) + request[at + 1 :]))
        changes.append(("ids that do not ascend", request[: at - 1] + b"\x09" + request[at:]))
    if stage == "mask":
        changes.append(("a sealed share flipped", request[:-1] + bytes([request[-1] ^ 1])))
    if stage in ("confirm", "reveal"):
        survivors, rest = decode(request[33:], lambda r: (r.nodes(), bytes(r.rest())))
        others = node_list({*survivors[1:], LATE})
        changes.append(("this node said to be gone", request[:33] + others + rest))
    if stage == "reveal" and rest:
        changes.append(("a confirmation flipped", request[:-1] + bytes([request[-1] ^ 1])))
    return changes


def write() -> None:
    for name, modes in FILES.items():
        (VECTORS / f"{name}.json").write_text(json.dumps([record(mode) for mode in modes], indent=1) + "\n")
        bad = [line for mode in modes for line in refusals(mode)]
        (VECTORS / f"bad_{name}.json").write_text(json.dumps(bad, indent=1) + "\n")


def refusals(mode: str) -> list[dict[str, Any]]:
    """Return every changed request of a session with the stage that must fail and the deviation it names."""
    play, bad = Play(mode), []
    while play.server.stage:
        stage = play.server.stage
        for why, request in tampered(stage, play.requests()[2]):
            try:
                play.step(2, request)
            except RemoteError as fault:
                deviation = fault.deviation
            else:
                raise AssertionError(f"{mode} {stage}: {why} was accepted")
            line = {"mode": mode, "stage": stage, "why": f"{stage}: {why}", "request": request.hex()}
            bad.append({**line, "deviation": deviation})
        play.stage()
    return bad


if __name__ == "__main__":
    write()
