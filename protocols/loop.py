"""One secure sum in this process: every party of a protocol, driven stage by stage."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.protocols import keys
from privfed.protocols.beacon import ATTEMPTS, Beacon, committee_of
from privfed.protocols.errors import LocalError, TooFewSurvivors
from privfed.protocols.quantize import LEAST_BOUND, FixedPoint, check_sum, from_ring, to_ring
from privfed.protocols.session import (
    Client,
    Drawn,
    Identity,
    Policy,
    Protocol,
    Random,
    RingSum,
    Server,
    Session,
    os_random,
)

DEFAULT_BITS = 32
MAX_BITS = 64


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of one stage, over all nodes. up: to the server. down: to the nodes."""

    up: int
    down: int


@dataclass(frozen=True, slots=True)
class SecureSum:
    """total: int64 (integer inputs, exact) or float64, in the inputs' shape. survivors: nodes whose input is in it.

    traffic: stage -> Traffic. error_bound: largest error of an entry; 0 for integer inputs.
    """

    total: NDArray[Any]
    survivors: frozenset[int]
    traffic: Mapping[str, Traffic]
    error_bound: float


def secure_sum(
    inputs: Mapping[int, NDArray[Any]],
    protocol: Protocol,
    *,
    dropped: Mapping[str, Set[int]] = {},
    seed: int | None = None,
    bits: int | None = None,
) -> SecureSum:
    """Sum arrays of one shape under a protocol, with every message passed through its encoding.

    inputs: node id > 0 -> array of integers (summed exactly) or floats (rounded to a grid, see `error_bound`).
    dropped: stage -> nodes that vanish before it. seed: makes keys and masks predictable, for tests only.
    Where the protocol has a beacon (`OneShot(committee=20)`), its stages "commit", "reveal" and "settle" come first.
    bits: the ring is Z_2^bits; None takes 32 when the sum fits, else 64 (or the protocol's own `max_bits`).
    Raises LocalError for inputs that do not fit, TooFewSurvivors when too few nodes are left.
    """
    beacon: Beacon | None = getattr(protocol, "beacon", None)
    stages = (*(beacon.stages if beacon is not None else ()), *protocol.stages)
    if unknown := set(dropped) - set(stages):
        raise LocalError(f"dropped names no stage {sorted(unknown)[0]!r}: the stages are {', '.join(stages)}")
    nodes = tuple(sorted(inputs))
    if not nodes or nodes[0] < 1:
        raise LocalError("inputs must map node ids > 0 to arrays")
    arrays = {node: np.asarray(inputs[node]) for node in nodes}
    shape = arrays[nodes[0]].shape
    if any(array.shape != shape for array in arrays.values()):
        raise LocalError("all inputs must have one shape")
    ceiling = int(getattr(protocol, "max_bits", MAX_BITS))
    if all(array.dtype.kind in "iub" for array in arrays.values()):
        width = _integer_bits(arrays, bits, ceiling)
        vectors = {node: to_ring(array.astype(np.int64).reshape(-1), width) for node, array in arrays.items()}
        grid = None
    elif all(array.dtype.kind in "iufb" for array in arrays.values()):
        width = min(bits or DEFAULT_BITS, ceiling)
        bound = max(float(np.abs(array.astype(np.float64)).max(initial=0.0)) for array in arrays.values())
        if not np.isfinite(bound):
            raise LocalError("an input has a NaN or an infinite entry")
        grid = FixedPoint(max(bound, LEAST_BOUND) if bound > 0 else 1.0, len(nodes), width)
        vectors = {node: grid.encode(array.reshape(-1)) for node, array in arrays.items()}
    else:
        raise LocalError("inputs must be arrays of integers or floats")
    session = Session(1, 1, "sum", nodes, int(np.prod(shape, dtype=np.int64)), width)
    result, traffic = drive(session, protocol, vectors, dropped, _random(seed))
    total: NDArray[Any] = from_ring(result.total, width) if grid is None else grid.decode(result.total)
    return SecureSum(total.reshape(shape), result.survivors, traffic, 0.0 if grid is None else grid.error_bound)


def _integer_bits(arrays: Mapping[int, NDArray[Any]], bits: int | None, ceiling: int) -> int:
    largest = max(max(-int(array.min()), int(array.max())) if array.size else 0 for array in arrays.values())
    if bits is None:
        bits = min(DEFAULT_BITS, ceiling)
        if largest * len(arrays) >= 1 << (bits - 1):
            bits = ceiling
    check_sum(largest, len(arrays), bits)
    return bits


def _random(seed: int | None) -> Random:
    if seed is None:
        return os_random
    calls = count()

    def random(size: int) -> bytes:
        return hashlib.shake_256(f"privfed insecure test randomness {seed} {next(calls)}".encode()).digest(size)

    return random


def drive(
    session: Session,
    protocol: Protocol,
    vectors: Mapping[int, NDArray[Any]],
    dropped: Mapping[str, Set[int]],
    random: Random = os_random,
) -> tuple[RingSum, dict[str, Traffic]]:
    """Run a session to its end: vectors are ring elements by node. Returns the sum and the traffic of each stage."""
    signing = {node: secrets.token_bytes(32) for node in session.nodes}
    roster = {node: keys.signing_public(key) for node, key in signing.items()}
    known = {node: Identity(node, signing[node], roster) for node in session.nodes}
    policies = dict.fromkeys(session.nodes, Policy(min_bits=1))
    gone: set[int] = set()
    traffic: dict[str, Traffic] = {}
    beacon: Beacon | None = getattr(protocol, "beacon", None)
    if beacon is not None:
        clients = {
            node: beacon.client(node, identity=known[node], policy=policies[node], random=random)
            for node in session.nodes
        }
        drawn, seen = draw(beacon, session, clients, gone, dropped, traffic)
        policies = {node: replace(policies[node], committee=seen.get(node)) for node in session.nodes}
        bare: Any = protocol  # the contract of a protocol that has a beacon
        protocol = bare.with_drawn(drawn)
        gone |= set(session.nodes) - set(seen)  # they refuse a committee that they did not see drawn
    server = protocol.server(session, random=random)
    parties = {
        node: protocol.client(node, identity=known[node], policy=policies[node], random=random)
        for node in session.nodes
    }
    kept = dict.fromkeys(session.nodes, b"")
    for stage in protocol.stages:
        gone |= dropped.get(stage, set())
        traffic[stage] = _run_stage(server, parties, kept, gone, vectors)
    result = server.result
    if result is None:
        raise TooFewSurvivors(0, 1, protocol.stages[-1])
    return result, traffic


def draw(
    beacon: Beacon,
    session: Session,
    clients: Mapping[int, Client],
    gone: set[int],
    dropped: Mapping[str, Set[int]],
    traffic: dict[str, Traffic],
) -> tuple[Drawn, dict[int, Drawn]]:
    """Run a committee's beacon over a session's nodes, anew without those that do not reveal.

    gone: nodes that are not there; those that vanish are added. Returns the committee, and each node's own view of it.
    Raises TooFewSurvivors.
    """
    kept = dict.fromkeys(session.nodes, b"")
    nodes, last = session.nodes, TooFewSurvivors(0, 2, "commit")
    for attempt in range(ATTEMPTS):
        server = beacon.server(replace(session, nodes=nodes, round=session.round + attempt, dimension=0))
        try:
            while server.stage:
                stage = server.stage
                gone |= dropped.get(stage, set())
                spent = _run_stage(server, clients, kept, gone, {})
                before = traffic.get(stage, Traffic(0, 0))
                traffic[stage] = Traffic(before.up + spent.up, before.down + spent.down)
        except TooFewSurvivors as cause:
            last, nodes = cause, tuple(node for node in nodes if node not in server.silent)
            if cause.stage == "commit" or len(nodes) < beacon.fewest:
                raise
            continue
        views = {node: committee_of(state) for node, state in kept.items()}
        return server.drawn, {node: view for node, view in views.items() if view is not None}
    raise last


def _run_stage(
    server: Server,
    clients: Mapping[int, Client],
    kept: dict[int, bytes],
    gone: Set[int],
    vectors: Mapping[int, NDArray[Any]],
) -> Traffic:
    """Run the open stage with the nodes that are there."""
    up = down = 0
    for node, request in server.outbound().items():
        if node in gone:
            continue
        kept[node], reply = clients[node].step(kept[node], request, lambda node=node: vectors[node])  # type: ignore[misc]  # bound now
        up, down = up + len(reply), down + len(request)
        server.receive(node, reply)
    server.close()
    return Traffic(up, down)
