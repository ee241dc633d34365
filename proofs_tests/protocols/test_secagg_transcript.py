"""The whole transcript, exactly: over all masks of a two-element ring, equal sums give equal views."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import count, product

import numpy as np
import pytest

from privfed.protocols import SecAgg
from privfed.protocols.prg import Words
from privfed.protocols.secagg import client as client_module
from privfed.protocols.secagg import server as server_module
from privfed.protocols.secagg.server import SecAggServer
from privfed.protocols.session import Policy, Session

NODES = (1, 2, 3)
PROTOCOL = SecAgg(threshold=2)
Masks = dict[bytes, int]


class Table:
    """In place of the mask generator: seed -> one bit, from a table; what the server expands is noted."""

    def __init__(self, masks: Masks) -> None:
        self.masks = masks
        self.seen: set[bytes] = set()
        self.known: Masks = {}

    def at_node(self, total: Words, plus: list[bytes], minus: list[bytes], *, threads: int = 1) -> None:
        for seed in (*plus, *minus):
            self.seen.add(seed)
            total += np.uint32(self.masks.get(seed, 0))  # plus and minus are one in Z_2

    def at_server(self, total: Words, plus: list[bytes], minus: list[bytes], *, threads: int = 1) -> None:
        for seed in (*plus, *minus):
            self.known[seed] = self.masks.get(seed, 0)
            total += np.uint32(self.masks.get(seed, 0))


def session(
    inputs: tuple[int, int, int], gone: frozenset[int], table: Table, monkeypatch: pytest.MonkeyPatch
) -> tuple[bytes, int]:
    """Run the engine with the same keys each time. Returns a digest of all the server sees, and the sum."""
    calls = count()

    def random(size: int) -> bytes:
        return hashlib.shake_256(f"transcript {next(calls)}".encode()).digest(size)

    monkeypatch.setattr(client_module, "add_masks", table.at_node)
    monkeypatch.setattr(server_module, "add_masks", table.at_server)
    server = PROTOCOL.server(Session(1, 1, "train", NODES, 1, 1), random=random)
    assert isinstance(server, SecAggServer)
    clients = {node: PROTOCOL.client(node, policy=Policy(min_bits=1), random=random) for node in NODES}
    kept = dict.fromkeys(NODES, b"")
    view = hashlib.sha256()
    while stage := server.stage:
        for node, request in server.outbound().items():
            if node in gone and stage in ("mask", "reveal"):
                continue
            vector = np.array([inputs[node - 1]], np.uint64)
            kept[node], reply = clients[node].step(kept[node], request, vector.copy)
            view.update(bytes(request) + bytes(reply))
            server.receive(node, reply)
        server.close()
    assert server.result is not None
    view.update(repr(sorted(table.known.items())).encode())
    return view.digest(), int(server.result.total[0])


@pytest.mark.parametrize(
    ("first", "second", "gone"),
    [
        ((0, 1, 1), (1, 1, 0), frozenset[int]()),
        ((0, 0, 0), (1, 1, 0), frozenset[int]()),
        ((0, 1, 0), (1, 0, 0), frozenset({3})),
        ((0, 1, 1), (0, 1, 0), frozenset({3})),  # the dropped node's input is nowhere
    ],
)
def test_equal_sums_give_the_same_views_equally_often(
    first: tuple[int, int, int], second: tuple[int, int, int], gone: frozenset[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    views = all_views(first, second, gone, monkeypatch)
    assert views[0] == views[1]
    assert len(views[0]) > 1


def all_views(
    first: tuple[int, int, int], second: tuple[int, int, int], gone: frozenset[int], monkeypatch: pytest.MonkeyPatch
) -> list[Counter[bytes]]:
    """Run both input sets under every assignment of masks; every sum is checked."""
    probe = Table({})
    session(first, gone, probe, monkeypatch)
    seeds = sorted(probe.seen)
    assert len(seeds) == (5 if gone else 6)  # a self-mask a survivor, a mask a pair with a survivor in it
    views: list[Counter[bytes]] = [Counter(), Counter()]
    for bits in product((0, 1), repeat=len(seeds)):
        masks = dict(zip(seeds, bits, strict=True))
        for found, inputs in zip(views, (first, second), strict=True):
            seen, total = session(inputs, gone, Table(masks), monkeypatch)
            assert total == sum(inputs[node - 1] for node in NODES if node not in gone) % 2
            found[seen] += 1
    return views


def test_unequal_sums_give_no_view_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same measurement tells inputs whose sums differ."""
    views = all_views((0, 0, 0), (1, 0, 0), frozenset(), monkeypatch)
    assert not views[0] & views[1]
