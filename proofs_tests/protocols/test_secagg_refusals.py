"""The rarer lies: each test fails when the one check it names is taken out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from privfed.protocols import SecAgg, keys
from privfed.protocols.codec import Reader, decode, node_list
from privfed.protocols.errors import LocalError, RemoteError
from privfed.protocols.secagg import messages
from privfed.protocols.secagg.messages import Kept
from privfed.protocols.session import Policy
from privfed.protocols.shamir import SHARE_BYTES, P
from proofs_tests.protocols.secagg_lab import NODES, PASSIVE, Lab, aborts, confirmations
from proofs_tests.protocols.test_secagg_sparse import COHORT, Room
from proofs_tests.protocols.test_secagg_sparse import PASSIVE as SPARSE


def test_a_node_joins_no_session_bound_to_another_model() -> None:
    lab = Lab(policy=Policy(binding=b"w" * 32)).until("advertise")
    aborts(lab, 1, lab.requests[1], "inconsistent-model")
    same = Lab(policy=Policy(binding=b"m" * 32)).until("advertise")
    same.step(1, same.requests[1])


@pytest.mark.parametrize("protocol", [PASSIVE, SecAgg(threshold=4, mode="active", corrupt=0.2)])
def test_no_graph_is_drawn_where_everyone_is_a_neighbour(protocol: SecAgg) -> None:
    lab = Lab(protocol).until("share")
    request = lab.requests[1]
    aborts(lab, 1, request[:33] + b"g" * 32 + request[65:], "malformed")


def test_a_sealed_share_outside_the_field_names_its_sender() -> None:
    """Node 2 seals, correctly, what is no share."""
    lab = Lab(PASSIVE).until("mask")
    rows = decode(lab.kept[2], Kept.read)
    terms, view = lab.server._terms, lab.server._view()
    seal = lab.clients[2]._secrets(rows.root, terms)[0]
    channel = keys.Channel(keys.agree(seal, 1, lab.server._rows[1].seal_key), view)
    bad = channel.seal(2, 1, P.to_bytes(3, "little") * (2 * SHARE_BYTES // 3))

    def read(reader: Reader) -> tuple[tuple[int, ...], dict[int, bytes]]:
        reader.take(33)
        return reader.nodes(), messages.read_sealed(reader)

    live, sealed = decode(lab.requests[1], read)
    sealed[2] = bad
    request = lab.requests[1][:33] + node_list(live) + messages.encode_sealed(sealed)
    before = lab.kept[1]
    with pytest.raises(RemoteError) as fault:
        lab.step(1, request)
    assert (fault.value.deviation, fault.value.culprits) == ("bad-share", (2,))
    assert lab.kept[1] == before


def refuses(room: Room, node: int, request: bytes, deviation: str) -> None:
    before = room.kept[node]
    with pytest.raises(RemoteError) as fault:
        room.step(node, request)
    assert (fault.value.deviation, fault.value.culprits) == (deviation, (0,))
    assert room.kept[node] == before


def test_a_survivor_nobody_heard_of() -> None:
    room = Room(SPARSE, "reveal")
    head = bytes(room.server.outbound()[1])[:33]
    refuses(room, 1, head + node_list([*COHORT, 31]), "foreign-node")


def test_a_silent_neighbour_cannot_survive() -> None:
    """A neighbour that is said to have shared nothing, and later to be in the sum."""
    room = Room(SPARSE, "share")
    silent = room.server._graph[1][0]
    for node, reply in room.replies().items():
        if node != silent:
            room.server.receive(node, reply)
    room.server.close()
    for node, reply in room.replies().items():
        room.server.receive(node, reply)
    room.server.close()
    head = bytes(room.server.outbound()[1])[:33]
    refuses(room, 1, head + node_list(COHORT), "foreign-node")


def test_a_confirmation_of_a_node_that_is_no_survivor() -> None:
    lab = Lab().until("reveal", gone=(5,))
    statement = lab.server._bound, lab.server._view(), node_list((1, 2, 3, 4))
    extra = keys.sign(lab.identities[5].secret_key, b"secagg confirm", *statement)
    aborts(lab, 1, confirmations(lab, lambda rows: rows.update({5: extra})), "foreign-node")


def test_shares_for_others_than_the_holders_are_refused() -> None:
    lab = Lab(PASSIVE).until("share")
    reply = lab.step(1, lab.requests[1])
    sealed = decode(reply, lambda r: (r.take(33), messages.read_sealed(r))[1])
    del sealed[3]
    with pytest.raises(RemoteError) as fault:
        lab.server.receive(1, reply[:33] + messages.encode_sealed(sealed))
    assert (fault.value.deviation, fault.value.culprits) == ("wrong-holders", (1,))


def test_shares_of_others_than_those_held_are_refused() -> None:
    lab = Lab(PASSIVE).until("reveal")
    reply = lab.step(1, lab.requests[1])
    rows = decode(reply, lambda r: (r.take(33), messages.read_revealed(r))[1])
    del rows[NODES[2]]
    with pytest.raises(RemoteError) as fault:
        lab.server.receive(1, reply[:33] + messages.encode_revealed(rows))
    assert (fault.value.deviation, fault.value.culprits) == ("wrong-shares", (1,))


@pytest.mark.parametrize(
    "vector", [np.zeros(6), np.zeros(6, np.int64), np.zeros(6, np.uint16), np.zeros((6, 1), np.uint32)]
)
def test_an_input_that_is_no_ring_vector_is_the_callers_mistake(vector: NDArray[Any]) -> None:
    lab = Lab(PASSIVE).until("mask")
    before = lab.kept[1]
    with pytest.raises(LocalError, match="uint32 or uint64 of length 6"):
        lab.clients[1].step(before, lab.requests[1], lambda: vector)
    lab.step(1, lab.requests[1])
