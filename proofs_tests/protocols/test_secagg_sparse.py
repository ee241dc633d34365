"""SecAgg+ on a sparse graph, and what a server refuses of one bad node so that the others need not abort."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.protocols import SecAggPlus, keys, secure_sum
from privfed.protocols.codec import decode
from privfed.protocols.errors import RemoteError, TooFewSurvivors
from privfed.protocols.secagg import client as client_module
from privfed.protocols.secagg import messages
from privfed.protocols.secagg.client import SecAggClient
from privfed.protocols.secagg.messages import Advertisement
from privfed.protocols.secagg.neighbourhood import chosen_graph_connected, holders, in_degree_limit
from privfed.protocols.secagg.server import SecAggServer
from privfed.protocols.session import Identity, Session
from privfed.protocols.shamir import SHARE_BYTES, P

COHORT = tuple(range(1, 31))
PASSIVE = SecAggPlus(neighbours=8, threshold=4, corrupt=0.0, dropout=0.0)
ACTIVE = SecAggPlus(neighbours=16, threshold=9, mode="active", corrupt=0.0, dropout=0.0)


@settings(max_examples=6, deadline=None)
@given(st.sampled_from([PASSIVE, ACTIVE]), st.data())
def test_sparse_sums_are_those_of_the_survivors(protocol: SecAggPlus, data: st.DataObject) -> None:
    inputs = {node: np.array([node, -node * node]) for node in COHORT}
    gone = data.draw(st.sets(st.sampled_from(COHORT), max_size=4))
    dropped: dict[str, set[int]] = {stage: set() for stage in protocol.stages}
    for node in gone:
        dropped[data.draw(st.sampled_from(protocol.stages))].add(node)
    try:
        result = secure_sum(inputs, protocol, dropped=dropped)
    except TooFewSurvivors:
        assert gone  # a node may lose too many neighbours; nobody learns a sum then
        return
    assert result.survivors <= set(COHORT) - dropped["advertise"] - dropped["share"] - dropped["mask"]
    assert np.array_equal(result.total, sum(inputs[node] for node in result.survivors))


def test_a_sparse_node_talks_to_its_neighbours_only() -> None:
    session = Session(1, 1, "sum", COHORT, 1, 32)
    terms = PASSIVE.terms(session)
    graph = {node: holders(terms, node, COHORT, b"s" * 32, None) for node in COHORT}
    for node, peers in graph.items():
        assert len(peers) == 8
        assert node not in peers
        assert all(node in graph[peer] for peer in peers)
    assert graph != {node: holders(terms, node, COHORT, b"t" * 32, None) for node in COHORT}


def test_active_neighbours_are_the_nodes_own_choice() -> None:
    terms = ACTIVE.terms(Session(1, 1, "sum", COHORT, 1, 32))
    mine = holders(terms, 5, COHORT, bytes(32), b"r" * 32)
    assert mine == holders(terms, 5, COHORT, b"x" * 32, b"r" * 32), "the server's seed changes nothing"
    assert mine != holders(terms, 5, COHORT, bytes(32), b"q" * 32)
    assert len(mine) == 16
    assert 5 not in mine


class Room:
    """Honest nodes and a server, up to a stage."""

    def __init__(self, protocol: SecAggPlus, stage: str) -> None:
        session = Session(1, 1, "train", COHORT, 2, 32)
        signing = {node: bytes([node]) * 32 for node in COHORT}
        roster = {node: keys.signing_public(key) for node, key in signing.items()}
        server = protocol.server(session)
        assert isinstance(server, SecAggServer)
        self.server = server
        self.clients: dict[int, SecAggClient] = {
            node: protocol.client(node, identity=Identity(node, signing[node], roster)) for node in COHORT
        }
        self.kept = dict.fromkeys(COHORT, b"")
        while server.stage != stage:
            for node, reply in self.replies().items():
                server.receive(node, reply)
            server.close()

    def step(self, node: int, request: bytes) -> bytes:
        source = lambda: np.array([node, 1], dtype=np.uint64)  # noqa: E731 - a vector a node
        self.kept[node], reply = self.clients[node].step(self.kept[node], request, source)
        return bytes(reply)

    def replies(self) -> dict[int, bytes]:
        return {node: self.step(node, bytes(request)) for node, request in self.server.outbound().items()}


def test_too_many_that_chose_one_node_abort(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that steers shares to one node exceeds the degree that chance explains."""
    room = Room(ACTIVE, "mask")
    request = bytes(room.server.outbound()[1])
    monkeypatch.setattr(client_module, "in_degree_limit", lambda n, degree: 3)
    with pytest.raises(RemoteError) as fault:
        room.step(1, request)
    assert fault.value.deviation == "in-degree"
    monkeypatch.undo()
    room.step(1, request)


def test_the_in_degree_limit_is_the_binomial_quantile() -> None:
    """Against scipy's tail: n * P[X > limit] <= 2^-40 < n * P[X > limit - 1]."""
    from scipy.stats import binom

    for n, degree in ((100, 20), (1000, 50), (1000, 216)):
        limit = in_degree_limit(n, degree)
        law = binom(n - 1, degree / (n - 1))
        assert n * law.sf(limit) <= 2.0**-40 < n * law.sf(limit - 1)


def test_chosen_graphs_stay_connected() -> None:
    assert chosen_graph_connected(1000, 100, 52)
    assert not chosen_graph_connected(1000, 990, 2)
    assert not chosen_graph_connected(30, 25, 4)


def low_order(rows: dict[int, Advertisement], own: Advertisement) -> Advertisement:
    return replace(own, mask_key=bytes(32))


def copied(rows: dict[int, Advertisement], own: Advertisement) -> Advertisement:
    return replace(own, seal_key=rows[1].mask_key)


def doubled(rows: dict[int, Advertisement], own: Advertisement) -> Advertisement:
    return replace(own, seal_key=own.mask_key)


@pytest.mark.parametrize(
    ("change", "deviation"), [(low_order, "low-order-key"), (copied, "duplicate-key"), (doubled, "duplicate-key")]
)
def test_bad_keys_leave_out_their_owner(
    change: Callable[[dict[int, Advertisement], Advertisement], Advertisement], deviation: str
) -> None:
    room = Room(PASSIVE, "advertise")
    replies = room.replies()
    read = {node: decode(reply, lambda r: (r.take(33), r.rest())[1]) for node, reply in replies.items()}
    rows = {node: Advertisement.of(row) for node, row in read.items()}
    room.server.receive(1, replies[1])
    with pytest.raises(RemoteError) as fault:
        room.server.receive(2, replies[2][:33] + change(rows, rows[2]).encode())
    assert fault.value.deviation == deviation
    assert fault.value.culprits == (2,)
    room.server.receive(2, replies[2])


def test_a_share_outside_the_field_leaves_out_its_sender() -> None:
    room = Room(PASSIVE, "reveal")
    replies = room.replies()
    bad = replies[1][:-SHARE_BYTES] + P.to_bytes(3, "little") * (SHARE_BYTES // 3)
    with pytest.raises(RemoteError) as fault:
        room.server.receive(1, bad)
    assert fault.value.deviation == "bad-share"
    assert fault.value.culprits == (1,)
    for node, reply in replies.items():
        if node != 1:
            room.server.receive(node, reply)
    room.server.close()
    assert room.server.result is not None
    assert room.server.result.total.tolist() == [sum(COHORT), len(COHORT)]


def test_a_reply_bound_to_another_session_names_the_node() -> None:
    room = Room(PASSIVE, "share")
    replies = room.replies()
    with pytest.raises(RemoteError) as fault:
        room.server.receive(4, messages.head(messages.SHARE, b"x" * 32) + replies[4][33:])
    assert fault.value.deviation == "inconsistent-session"
    assert fault.value.culprits == (4,)
