"""What the server of SecAgg sees depends on the sum alone: a small ring, two input sets with equal sums.

The server knows every survivor's own mask and every dropped node's mask key. Its view of the inputs is what is left
of the masked vectors after it takes off all it knows. Randomness is a fixed stream, so a verdict never changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import pytest

from privfed.protocols import SecAgg, keys
from privfed.protocols.codec import decode
from privfed.protocols.prg import Words, add_masks, expand
from privfed.protocols.secagg import client as client_module
from privfed.protocols.secagg.client import pair_seed, self_seed
from privfed.protocols.secagg.messages import Kept
from privfed.protocols.secagg.server import SecAggServer
from privfed.protocols.session import Policy, Session

BITS, RUNS = 1, 300
PROTOCOL = SecAgg(threshold=2)


def stream(name: str) -> Callable[[int], bytes]:
    calls = count()
    return lambda size: hashlib.shake_256(f"{name} {next(calls)}".encode()).digest(size)


def view(inputs: tuple[int, ...], gone: int, name: str) -> tuple[int, ...]:
    """Run one session and return the survivors' vectors with every mask off that the server can compute."""
    nodes = tuple(range(1, len(inputs) + 1))
    session = Session(1, 1, "train", nodes, 1, BITS)
    random = stream(name)
    server = PROTOCOL.server(session, random=random)
    assert isinstance(server, SecAggServer)
    clients = {node: PROTOCOL.client(node, policy=Policy(min_bits=1), random=random) for node in nodes}
    kept = dict.fromkeys(nodes, b"")
    for _ in range(2):
        for node, request in server.outbound().items():
            kept[node], reply = clients[node].step(kept[node], request, lambda: np.zeros(1, np.uint64))
            server.receive(node, reply)
        server.close()
    terms, transcript, rows = server._terms, server._view(), server._rows
    secrets = {node: clients[node]._secrets(decode(kept[node], Kept.read).root, terms) for node in nodes}
    left = []
    for node, request in server.outbound().items():
        if node == gone:
            continue
        value = np.array([inputs[node - 1]], np.uint64)
        kept[node], reply = clients[node].step(kept[node], request, lambda value=value: value)  # type: ignore[misc]  # bound now
        known = int(expand(self_seed(secrets[node][2], node, transcript), 1, BITS)[0])
        if gone:
            lost = keys.load(secrets[gone][1])
            seed = pair_seed(lost, node, rows[node].mask_key, gone, transcript, node)
            known += int(expand(seed, 1, BITS)[0]) * (1 if node < gone else -1)
        left.append((bytes(reply)[-1] - known) % (1 << BITS))
    return tuple(left)


def distances(first: tuple[int, ...], second: tuple[int, ...], gone: int) -> float:
    """Return the two-sample chi-square of the views of two input sets."""
    tables = []
    for which, inputs in enumerate((first, second)):
        cells: dict[tuple[int, ...], int] = {}
        for run in range(RUNS):
            seen = view(inputs, gone, f"view {gone} {which} {run}")
            cells[seen] = cells.get(seen, 0) + 1
        tables.append(cells)
    cells_seen = set(tables[0]) | set(tables[1])
    return sum(
        (tables[0].get(cell, 0) - tables[1].get(cell, 0)) ** 2 / (tables[0].get(cell, 0) + tables[1].get(cell, 0))
        for cell in cells_seen
    )


EQUAL_SUMS = [((0, 1, 1), (1, 1, 0), 0), ((0, 1, 1, 1), (1, 1, 0, 1), 4)]
# Three survivors in Z_2 have four views of equal sum: three degrees of freedom; chi2.isf(1e-6, 3) = 30.66.
LIMIT = 30.66


@pytest.mark.parametrize(("first", "second", "gone"), EQUAL_SUMS)
def test_equal_sums_look_the_same(first: tuple[int, ...], second: tuple[int, ...], gone: int) -> None:
    """False alarm 1e-6 for another fixed stream."""
    assert distances(first, second, gone) < LIMIT


def test_without_pair_masks_the_difference_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same measurement tells a node that adds its own mask only."""

    def own_mask_only(total: Words, plus: list[bytes], minus: list[bytes], **others: Any) -> None:
        del minus
        add_masks(total, plus[:1], [], **others)

    monkeypatch.setattr(client_module, "add_masks", own_mask_only)
    assert distances(*EQUAL_SUMS[0]) > LIMIT


def test_without_its_own_mask_a_late_input_would_be_open() -> None:
    """A node declared dropped whose vector arrives all the same: its own mask still hides it."""
    seen = {0: 0, 1: 0}
    for run in range(200):
        nodes = (1, 2, 3)
        session = Session(1, 1, "train", nodes, 1, BITS)
        random = stream(f"late {run}")
        server = PROTOCOL.server(session, random=random)
        assert isinstance(server, SecAggServer)
        clients = {node: PROTOCOL.client(node, policy=Policy(min_bits=1), random=random) for node in nodes}
        kept = dict.fromkeys(nodes, b"")
        for _ in range(2):
            for node, request in server.outbound().items():
                kept[node], reply = clients[node].step(kept[node], request, lambda: np.zeros(1, np.uint64))
                server.receive(node, reply)
            server.close()
        terms, transcript, rows = server._terms, server._view(), server._rows
        mask_key = keys.load(clients[3]._secrets(decode(kept[3], Kept.read).root, terms)[1])
        _, late = clients[3].step(kept[3], server.outbound()[3], lambda: np.ones(1, np.uint64))
        value = bytes(late)[-1]
        for peer in (1, 2):
            seed = pair_seed(mask_key, peer, rows[peer].mask_key, 3, transcript, peer)
            value += int(expand(seed, 1, BITS)[0])
        seen[value % 2] += 1
    # Binomial(200, 1/2): |count - 100| > 35 has probability 7e-7.
    assert abs(seen[1] - 100) <= 35
