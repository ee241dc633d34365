"""The graph that nodes choose themselves: what a server gains by hiding nodes, or by who is said to have confirmed."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.protocols import SecAggPlus, secure_sum
from privfed.protocols.codec import Reader, decode, node_list
from privfed.protocols.errors import RemoteError, TooFewSurvivors
from privfed.protocols.graph import chance_of_marked
from privfed.protocols.secagg import messages
from privfed.protocols.secagg.messages import Advertisement, Kept, Terms
from privfed.protocols.secagg.neighbourhood import fallen_out, holders, least_survivors
from privfed.protocols.session import Session
from proofs_tests.protocols import test_secagg_sparse
from proofs_tests.protocols.test_secagg_refusals import refuses
from proofs_tests.protocols.test_secagg_sparse import ACTIVE, COHORT, Room


def chosen(room: Room, node: int) -> tuple[int, ...]:
    """Return the holders a node chose: its secret, which the test reads from what it kept."""
    return holders(room.server._terms, node, COHORT, bytes(32), decode(room.kept[node], Kept.read).root)


def thinned(request: bytes, present: set[int]) -> bytes:
    def read(reader: Reader) -> dict[int, Advertisement]:
        reader.take(65)
        return messages.read_advertisements(reader)

    rows = {node: row for node, row in decode(request, read).items() if node in present}
    return request[:65] + messages.encode_advertisements(rows)


def sealed_for(reply: bytes) -> set[int]:
    return set(decode(reply, lambda r: (r.take(33), messages.read_sealed(r))[1]))


@settings(max_examples=12, deadline=None)
@given(st.sets(st.sampled_from(COHORT[1:]), min_size=15))
def test_hiding_nodes_brings_no_other_holders(present: set[int]) -> None:
    """Otherwise a server could show the corrupt nodes and few others, and they would hold t shares."""
    room = Room(ACTIVE, "share")
    mine = set(chosen(room, 1)) & present
    reply = room.step(1, thinned(bytes(room.server.outbound()[1]), present | {1}))
    assert sealed_for(reply) == (mine if len(mine) >= ACTIVE.threshold else set())  # type: ignore[operator]  # a count


def test_a_node_without_enough_holders_shares_nothing_and_masks_nothing() -> None:
    room = Room(ACTIVE, "share")
    strangers = set(COHORT) - set(chosen(room, 1))
    reply = room.step(1, thinned(bytes(room.server.outbound()[1]), strangers))
    assert sealed_for(reply) == set()
    told = messages.head(messages.MASK, room.server._bound) + node_list([]) + messages.encode_sealed({})
    refuses(room, 1, told, "too-few-neighbours")


def test_survivors_few_enough_to_be_apart_are_refused() -> None:
    room = Room(ACTIVE, "confirm")
    least = least_survivors(room.server._terms, 0)
    head = bytes(room.server.outbound()[1])[:33]
    assert 2 < least < len(COHORT)
    refuses(room, 1, head + node_list(COHORT[: least - 1]), "too-few-survivors")
    room.step(1, head + node_list(COHORT[:least]))


def test_only_confirmations_of_its_own_holders_count() -> None:
    """All the others confirm; t - 1 of the nodes that hold its shares do."""
    room = Room(ACTIVE, "reveal")
    request = bytes(room.server.outbound()[1])

    def read(reader: Reader) -> tuple[tuple[int, ...], dict[int, bytes]]:
        reader.take(33)
        return reader.nodes(), messages.read_signatures(reader)

    survivors, signatures = decode(request, read)
    mine = chosen(room, 1)
    for node in mine[8:]:  # the threshold is 9
        del signatures[node]
    assert len(signatures) > 9
    told = request[:33] + node_list(survivors) + messages.encode_signatures(signatures)
    refuses(room, 1, told, "too-few-confirmations")
    room.step(1, request)


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_whoever_vanishes_no_honest_node_blames_the_server(data: st.DataObject) -> None:
    """The server leaves out, or stops, before it asks an honest node for what it would refuse."""
    dropped: dict[str, set[int]] = {stage: set() for stage in ACTIVE.stages}
    for node in data.draw(st.sets(st.sampled_from(COHORT), max_size=20)):
        dropped[data.draw(st.sampled_from(ACTIVE.stages))].add(node)
    inputs = {node: np.array([node, 1 << node]) for node in COHORT}
    try:
        result = secure_sum(inputs, ACTIVE, dropped=dropped)
    except TooFewSurvivors as few:
        assert few.have < few.threshold
        return
    assert np.array_equal(result.total, sum(inputs[node] for node in result.survivors))


def test_the_server_stops_when_a_node_has_too_few_confirmed_holders() -> None:
    room = Room(ACTIVE, "confirm")
    for node, reply in room.replies().items():
        if node in chosen(room, 1)[:8] or node == 1:
            room.server.receive(node, reply)
    with pytest.raises(TooFewSurvivors) as fault:
        room.server.close()
    assert fault.value.stage == "confirm"
    assert fault.value.have < fault.value.threshold == 9


def test_more_holders_than_the_degree_are_refused() -> None:
    room = Room(ACTIVE, "share")
    reply = room.step(1, bytes(room.server.outbound()[1]))
    rows = decode(reply, lambda r: (r.take(33), messages.read_sealed(r))[1])
    text = next(iter(rows.values()))
    more = dict(rows) | {next(node for node in COHORT if node not in rows and node != 1): text}
    itself = dict(list(rows.items())[1:]) | {1: text}
    for wrong in (more, itself):
        with pytest.raises(RemoteError) as fault:
            room.server.receive(1, reply[:33] + messages.encode_sealed(wrong))
        assert (fault.value.deviation, fault.value.culprits) == ("wrong-holders", (1,))
    room.server.receive(1, reply)


@pytest.mark.parametrize("sender", [31, 1])
def test_shares_of_a_stranger_or_of_itself_are_refused(sender: int) -> None:
    """Where anyone may choose anyone, only the keys say who is there."""
    room = Room(ACTIVE, "mask")
    request = bytes(room.server.outbound()[1])

    def read(reader: Reader) -> tuple[tuple[int, ...], dict[int, bytes]]:
        reader.take(33)
        return reader.nodes(), messages.read_sealed(reader)

    live, sealed = decode(request, read)
    sealed[sender] = next(iter(sealed.values()))
    refuses(room, 1, request[:33] + node_list(live) + messages.encode_sealed(sealed), "foreign-node")


def sparse_terms(n: int, degree: int, threshold: int) -> Terms:
    return Terms(Session(1, 1, "train", tuple(range(1, n + 1)), 5, 32, bytes(32)), degree, threshold, True)


@pytest.mark.parametrize(
    ("n", "degree", "threshold", "silent", "most"),
    [(100, 16, 11, 10, 5), (1000, 52, 37, 0, 0), (1000, 52, 37, 50, 3), (1000, 52, 37, 150, 7)],
)
def test_a_server_that_sees_the_graph_lets_no_more_fall_out_than_the_bound(
    n: int, degree: int, threshold: int, silent: int, most: int
) -> None:
    """Greedily: those whom the fewest chose, as long as all who chose them can be kept from confirming."""
    rng = np.random.default_rng(silent)
    chose = np.zeros((n, n), dtype=bool)
    for node in range(n):
        others = rng.choice(n - 1, degree, replace=False)
        chose[node, others + (others >= node)] = True
    kept, fallen = np.zeros(n, dtype=bool), 0
    while True:
        cost = (chose & ~kept[:, None]).sum(axis=0)
        best = int(np.argmin(np.where(kept, n, cost)))
        after = kept | chose[:, best]
        if after.sum() > silent:
            break
        kept, fallen = after, fallen + 1
        chose[:, best] = True
    assert fallen_out(sparse_terms(n, degree, threshold), n - silent, n, n // 20) == most
    assert fallen <= most
    assert fallen > 0 or silent < degree


@pytest.mark.parametrize(
    ("n", "degree", "threshold", "gone", "most"),
    [(100, 16, 11, 0, 2), (100, 16, 11, 5, 93), (100, 32, 22, 10, 1), (50, 16, 11, 5, 43), (1000, 52, 37, 50, 3)],
)
def test_a_sum_over_the_few_whose_neighbours_are_corrupt_or_gone(
    n: int, degree: int, threshold: int, gone: int, most: int
) -> None:
    """Of 100 with 16 neighbours, five corrupt: two may have chosen all five and each other, and ten that are gone."""
    assert fallen_out(sparse_terms(n, degree, threshold), n - gone, n - gone, n // 20) == most


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 12), st.integers(0, 13))
def test_the_chance_of_so_many_marked_is_the_one_counted(n: int, marked: int, drawn: int, least: int) -> None:
    marked, drawn = min(marked, n), min(drawn, n)
    ways = sum(math.comb(marked, x) * math.comb(n - marked, drawn - x) for x in range(least, drawn + 1))
    assert chance_of_marked(n, marked, drawn, least) == pytest.approx(ways / math.comb(n, drawn), rel=1e-9)


def test_survivors_of_whom_too_many_may_not_be_in_the_sum_are_refused() -> None:
    """Those who did not confirm may be all who chose some node, whose input then need not be in the sum."""
    room = Room(ACTIVE, "reveal")
    request, signatures = bytes(room.server.outbound()[1]), dict(room.server._signatures)
    for node in sorted(set(COHORT) - set(chosen(room, 1)) - {1})[:10]:
        del signatures[node]
    body = messages.head(messages.REVEAL, room.server._bound) + node_list(COHORT)
    fewer = body + messages.encode_signatures(signatures)
    missing, alone = (fallen_out(room.server._terms, confirmed, len(COHORT), 0) for confirmed in (20, len(COHORT)))
    assert len(signatures) == 20
    assert 0 <= alone < missing < len(COHORT) // 2
    for floors in ({"min_survivors": 31 - missing}, {"min_cohort": 31 - missing}):
        room.clients[1]._policy = replace(room.clients[1]._policy, **floors)  # type: ignore[arg-type]  # two counts
        refuses(room, 1, fewer, "too-few-survivors")
        room.clients[1]._policy = replace(room.clients[1]._policy, min_survivors=2, min_cohort=2)
    room.clients[1]._policy = replace(room.clients[1]._policy, min_survivors=30 - missing)
    kept = room.kept[1]
    room.step(1, fewer)
    room.kept[1] = kept
    room.clients[1]._policy = replace(room.clients[1]._policy, min_survivors=30 - alone)
    room.step(1, request)


@pytest.mark.long
@pytest.mark.parametrize("floor", [2, 200])
def test_a_node_on_everybodys_list_whose_input_is_not_in_the_sum(floor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attack itself, over 200 nodes: nobody dropped out, says the list, and the sum is over 199."""
    cohort = tuple(range(1, 201))
    monkeypatch.setattr(test_secagg_sparse, "COHORT", cohort)
    room = Room(SecAggPlus(neighbours=30, threshold=16, mode="active", corrupt=0.0, dropout=0.05), "mask")
    server = room.server
    roots = {node: decode(room.kept[node], Kept.read).root for node in cohort}
    choice = {node: holders(server._terms, node, cohort, bytes(32), root) for node, root in roots.items()}
    chosen_by = {node: {other for other in cohort if node in choice[other]} for node in cohort}
    victim = min(cohort, key=lambda node: len(chosen_by[node]))
    del server._sealed[victim]
    for node, reply in room.replies().items():
        server.receive(node, reply)
    server.close()
    server._masked = set(cohort)
    request = bytes(server.outbound()[victim])
    for node in set(cohort) - chosen_by[victim] - {victim}:
        server.receive(node, room.step(node, request))
    server.close()
    for client in room.clients.values():
        client._policy = replace(client._policy, min_survivors=floor)
    if floor > 2:
        with pytest.raises(RemoteError, match="too-few-survivors"):
            room.replies()
        return
    for node, reply in room.replies().items():
        server.receive(node, reply)
    server._masked.discard(victim)
    server.close()
    assert server.result is not None
    assert server.result.total.tolist() == [sum(cohort) - victim, 199]
