"""The beacon: what a node refuses of a server that draws groups or a committee, and what they are worth."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import count
from math import comb
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.protocols import Beacon, codec, keys
from privfed.protocols.beacon import (
    ATTEMPTS,
    COMMIT,
    REVEAL,
    SETTLE,
    SETTLED,
    anonymity,
    committee_of,
    corrupt_members,
    draw_committee,
    draw_groups,
    group_of,
)
from privfed.protocols.errors import LocalError, RemoteError, TooFewSurvivors
from privfed.protocols.session import Drawn, Identity, Policy, Session

NODES = (2, 3, 5, 7, 11, 13)
SIGNING = {node: bytes([node]) * 32 for node in (*NODES, 17)}
ROSTER = {node: keys.signing_public(SIGNING[node]) for node in NODES}
numbers = count(1)


class Run:
    """Nodes and an honest server, whose requests a test may spoil."""

    def __init__(self, identities: bool = True, policy: Policy = Policy(), committee: int = 0) -> None:
        self.kept = dict.fromkeys(NODES, b"")
        self.beacon = Beacon(committee=committee) if committee else Beacon(3)
        self.clients = {
            n: self.beacon.client(n, identity=Identity(n, SIGNING[n], ROSTER) if identities else None, policy=policy)
            for n in NODES
        }

    def start(self, nodes: tuple[int, ...] = NODES, size: int = 0) -> Any:
        beacon = Beacon(size) if size else self.beacon
        return beacon.server(Session(1, next(numbers), "train", nodes, 0, 32))

    def ask(self, node: int, request: Any) -> bytes:
        self.kept[node], reply = self.clients[node].step(self.kept[node], request, _none)
        return bytes(reply)

    def stage(self, server: Any) -> dict[int, bytes]:
        requests = {node: bytes(request) for node, request in server.outbound().items()}
        for node, request in requests.items():
            server.receive(node, self.ask(node, request))
        server.close()
        return requests


def _none() -> Any:
    raise AssertionError("a beacon takes no input")


def refusal(run: Run, node: int, request: bytes) -> str:
    before = run.kept[node]
    with pytest.raises(RemoteError) as caught:
        run.ask(node, request)
    assert run.kept[node] == before
    return caught.value.deviation


@pytest.mark.parametrize("identities", [True, False])
def test_all_nodes_settle_on_the_same_groups(identities: bool) -> None:
    run = Run(identities)
    server = run.start()
    for _ in range(3):
        run.stage(server)
    assert server.stage == ""
    assert sorted(node for group in server.groups for node in group) == list(NODES)
    assert {node: group_of(run.kept[node]) for node in NODES} == {n: g for g in server.groups for n in g}
    again = run.start(NODES[:4], 2)
    run.stage(again)
    assert again.stage == ""
    assert set(again.groups) <= set(server.groups), "settled groups are told, and not drawn again"


def test_a_server_that_changes_a_commitment_after_it_saw_reveals_is_refused() -> None:
    run = Run()
    server = run.start()
    run.stage(server)
    reveal = bytes(server.outbound()[2])
    rows = codec.decode(reveal[1:], lambda r: r.table(32))
    changed = {**rows, 2: bytes(32)}
    assert refusal(run, 2, bytes([REVEAL]) + codec.table(changed.items())) == "swapped-commitment"
    foreign = {**rows, 17: bytes(32)}
    assert refusal(run, 2, bytes([REVEAL]) + codec.table(foreign.items())) == "foreign-node"
    alone = {2: rows[2]}
    assert refusal(run, 2, bytes([REVEAL]) + codec.table(alone.items())) == "group-too-small"
    run.stage(server)
    settle = bytes(server.outbound()[2])
    shown = {node: bytes(row) for node, row in codec.decode(settle[1:], lambda r: r.table(96)).items()}
    other = {**shown, 13: bytes(32) + shown[13][32:]}
    assert refusal(run, 2, bytes([SETTLE]) + codec.table(other.items())) == "beacon-mismatch"
    del other[13]
    assert refusal(run, 2, bytes([SETTLE]) + codec.table(other.items())) == "beacon-unopened"
    for truncated in (settle[:-1], settle + b"\0", b"", bytes([COMMIT])):
        assert refusal(run, 2, truncated) in ("malformed", "out-of-order")
    assert refusal(run, 2, reveal) == "out-of-order", "a node reveals once in a beacon"
    assert run.ask(2, settle)


def test_members_that_saw_other_commitments_are_noticed() -> None:
    """The server shows two nodes two lists; each is right for itself, and no signature fits the other."""
    run = Run()
    server = run.start()
    run.stage(server)
    rows = codec.decode(bytes(server.outbound()[2])[1:], lambda r: r.table(32))
    part = bytes([REVEAL]) + codec.table([(n, bytes(rows[n])) for n in NODES if n != 13])
    whole = bytes(server.outbound()[2])
    opened = {node: run.ask(node, part if node == 3 else whole) for node in NODES}
    settle = bytes([SETTLE]) + codec.table(opened.items())
    together = next(group for group in _groups(run, server, opened) if 3 in group)
    for node in NODES:
        if node in together and node != 3:
            assert refusal(run, node, settle) == "split-beacon"
        elif node != 3:
            assert run.ask(node, settle)
    assert refusal(run, 3, settle) == "beacon-foreign"


def _groups(run: Run, server: Any, opened: dict[int, bytes]) -> Any:
    for node, raw in opened.items():
        server.receive(node, raw)
    server.close()
    return server.groups


def test_a_node_reveals_in_few_beacons_of_a_run() -> None:
    run = Run()
    for _ in range(ATTEMPTS):
        server = run.start()
        run.stage(server)
        for node in NODES[:-1]:
            server.receive(node, run.ask(node, server.outbound()[node]))
        with pytest.raises(TooFewSurvivors):
            server.close()
        assert server.silent == (13,)
    server = run.start()
    run.stage(server)
    assert refusal(run, 2, bytes(server.outbound()[2])) == "beacon-exhausted"


def test_what_a_node_does_not_join() -> None:
    stranger = Session(1, 1, "train", (*NODES, 17), 0, 32)
    small = Session(1, 1, "train", NODES, 0, 32)
    for policy, session, size, deviation in (
        (Policy(), stranger, 3, "foreign-node"),
        (Policy(min_cohort=4), small, 3, "group-too-small"),
        (Policy(), small, 1, "group-too-small"),
        (Policy(run=2), small, 3, "wrong-run"),
        (Policy(), Session(1, 1, "train", NODES[1:], 0, 32), 3, "foreign-session"),
    ):
        assert refusal(Run(policy=policy), 2, asked(session, size, 0)) == deviation
    with pytest.raises(LocalError, match="identity"):
        Run(identities=False, policy=Policy(require_active=True)).ask(2, asked(small, 3, 0))


def asked(session: Session, size: int, committee: int) -> bytes:
    return bytes([COMMIT]) + codec.encode_session(session) + codec.u32(size) + codec.u32(committee)


@pytest.mark.parametrize(
    ("policy", "size", "committee", "deviation"),
    [
        (Policy(), 0, 1, "committee-too-small"),
        (Policy(), 0, 7, "committee-too-small"),
        (Policy(min_neighbours=4), 0, 4, "committee-too-small"),
        (Policy(min_cohort=7), 0, 4, "group-too-small"),
        (Policy(run=2), 0, 4, "wrong-run"),
        (Policy(), 0, 0, "malformed"),
        (Policy(), 3, 4, "malformed"),
    ],
)
def test_what_committee_a_node_does_not_draw(policy: Policy, size: int, committee: int, deviation: str) -> None:
    session = Session(1, 1, "train", NODES, 0, 32)
    assert refusal(Run(policy=policy, committee=4), 2, asked(session, size, committee)) == deviation


def test_a_node_takes_part_in_the_draw_that_it_was_called_for() -> None:
    """A request for groups under the name of a committee would make a node file its group as the run's committee."""
    for run, other in (
        (Run(), Beacon(committee=3)),
        (Run(committee=3), Beacon(3)),
        (Run(committee=3), Beacon(committee=4)),
    ):
        session = Session(1, next(numbers), "train", NODES, 0, 32)
        assert refusal(run, 2, bytes(other.server(session).outbound()[2])) == "parameters-differ"


def test_the_server_refuses_what_no_honest_node_sends() -> None:
    run = Run()
    server = run.start()
    for raw in (b"", bytes(33)[:-1], bytes([SETTLED]) + b"\0"):
        with pytest.raises(RemoteError):
            server.receive(2, raw)
    with pytest.raises(RemoteError):
        server.receive(17, bytes(33))
    run.stage(server)
    with pytest.raises(RemoteError, match="do not open"):
        server.receive(2, bytes(96))
    lone = run.start()
    lone.receive(2, bytes([1]) + bytes(32))
    with pytest.raises(TooFewSurvivors):
        lone.close()


def test_a_node_that_lies_about_its_group_does_not_change_the_others() -> None:
    server = Beacon(3).server(Session(1, 1, "train", NODES, 0, 32))
    claims = {2: (2, 3, 5), 3: (2, 3, 5), 5: (5, 7, 11), 7: (7, 11, 13), 11: (7, 11, 13)}
    for node, group in claims.items():
        server.receive(node, bytes([SETTLED]) + codec.u32(6) + codec.node_list(group))
    server.close()
    assert server.groups == ((2, 3, 5), (7, 11, 13))


def test_few_that_claim_to_have_groups_do_not_end_a_draw() -> None:
    """Four of twelve answer the first commitment with groups of their liking, each with an honest node in it."""
    nodes = tuple(range(1, 13))
    claims = {9: (1, 9, 10), 10: (1, 9, 10), 11: (2, 11, 12), 12: (2, 11, 12)}
    for beacon in (Beacon(4), Beacon(committee=4)):
        server = beacon.server(Session(1, 1, "train", nodes, 0, 32))
        kept = dict.fromkeys(nodes, b"")
        while server.stage:
            for node, request in server.outbound().items():
                if node in claims:
                    reply: Any = bytes([SETTLED]) + codec.u32(12) + codec.node_list(claims[node])
                else:
                    kept[node], reply = beacon.client(node).step(kept[node], request, _none)
                server.receive(node, reply)
            server.close()
        drawn = {node for group in server.groups for node in group}
        assert drawn <= set(range(1, 9))
        assert server.nodes == 8


def test_a_group_with_a_member_that_has_none_is_not_taken() -> None:
    server = Beacon(2).server(Session(1, 1, "train", NODES, 0, 32))
    told = {2: (2, 3), 3: (2, 3), 5: (5, 7), 7: (5, 7), 11: (11, 13)}
    for node, group in told.items():
        server.receive(node, bytes([SETTLED]) + codec.u32(6) + codec.node_list(group))
    server.receive(13, bytes([1]) + bytes(32))
    server.close()
    assert server.groups == ((2, 3), (5, 7))


def settled(run: Run) -> Any:
    server = run.start()
    while server.stage:
        run.stage(server)
    return server


@pytest.mark.parametrize("identities", [True, False])
def test_all_nodes_settle_on_the_same_committee(identities: bool) -> None:
    run = Run(identities, committee=4)
    drawn = settled(run).drawn
    assert len(drawn.members) == 4
    assert set(drawn.members) < set(NODES)
    assert drawn.nodes == len(NODES)
    assert {committee_of(run.kept[node]) for node in NODES} == {drawn}
    again = run.start(NODES[:3] + NODES[4:])
    run.stage(again)
    assert again.stage == ""
    assert again.drawn == drawn, "a settled committee is told, and not drawn again"
    with pytest.raises(LocalError, match="more than"):
        Beacon(committee=7).server(Session(1, 1, "train", NODES, 0, 32))
    with pytest.raises(LocalError, match="no committee"):
        _ = run.start().drawn


def test_a_node_that_lies_about_the_committee_does_not_change_it() -> None:
    server = Beacon(committee=3).server(Session(1, 1, "train", NODES, 0, 32))
    for node in NODES:
        told = (2, 3, 5) if node == 2 else (5, 7, 11)
        server.receive(node, bytes([SETTLED]) + codec.u32(6) + codec.node_list(told))
    server.close()
    assert server.drawn == Drawn((5, 7, 11), 6)


def test_a_server_that_deviates_in_the_draw_of_a_committee() -> None:
    run = Run(committee=4)
    server = run.start()
    run.stage(server)
    reveal = bytes(server.outbound()[2])
    rows = codec.decode(reveal[1:], lambda r: r.table(32))
    for change, deviation in (
        ({**rows, 2: bytes(32)}, "swapped-commitment"),
        ({node: row for node, row in rows.items() if node != 2}, "swapped-commitment"),
        ({**rows, 17: bytes(32)}, "foreign-node"),
        ({node: rows[node] for node in (2, 3, 5)}, "committee-too-small"),
    ):
        assert refusal(run, 2, bytes([REVEAL]) + codec.table(change.items())) == deviation
    run.stage(server)
    settle = bytes(server.outbound()[2])
    shown = {node: bytes(row) for node, row in codec.decode(settle[1:], lambda r: r.table(96)).items()}
    for other, deviation in (
        ({**shown, 13: bytes(32) + shown[13][32:]}, "beacon-mismatch"),
        ({node: row for node, row in shown.items() if node != 13}, "beacon-unopened"),
        ({**shown, 17: bytes(96)}, "beacon-foreign"),
        ({node: row[:32] + bytes(64) for node, row in shown.items()}, "split-beacon"),
    ):
        assert refusal(run, 2, bytes([SETTLE]) + codec.table(other.items())) == deviation
    assert refusal(run, 2, reveal) == "out-of-order", "a node reveals once in a beacon"
    assert run.ask(2, settle)


def test_context_and_size_are_in_every_commitment() -> None:
    """A commitment made for one draw opens in no other: the terms are hashed into it."""
    session = Session(1, 1, "train", NODES, 0, 32)
    seen = set()
    for told, size, committee in ((session, 0, 4), (session, 0, 3), (session, 3, 0), (replace(session, run=2), 0, 4)):
        client = Beacon(size, committee).client(2, identity=Identity(2, SIGNING[2], ROSTER), random=bytes)
        seen.add(bytes(client.step(b"", asked(told, size, committee), _none)[1]))
    assert len(seen) == 4


def test_one_honest_contribution_makes_the_committee_uniform() -> None:
    """Five nodes always say the same, node 2 alone is random. 600 draws of 3 of 6: chi-square fails once in 10^6."""
    seen = dict.fromkeys(NODES, 0)
    for _ in range(600):
        run = Run(False, committee=3)
        for node in NODES[1:]:
            run.clients[node] = replace(run.clients[node], random=bytes)
        for node in settled(run).drawn.members:
            seen[node] += 1
    # Draws without replacement vary less than independent ones: the test errs on the quiet side. 5 degrees.
    assert sum((value - 300) ** 2 / 300 for value in seen.values()) < 35.9


@given(st.integers(2, 60), st.integers(0, 10**9))
@settings(max_examples=30, deadline=None)
def test_a_committee_is_of_the_roster_and_the_same_for_all(nodes: int, label: int) -> None:
    size, seed = 2 + label % (nodes - 1), label.to_bytes(32, "big")
    members = draw_committee(range(1, nodes + 1), size, seed)
    assert len(members) == size
    assert list(members) == sorted(set(members) & set(range(1, nodes + 1)))
    assert members == draw_committee(list(range(nodes, 0, -1)), size, seed)


def _told(claims: dict[int, tuple[int, ...]], size: int = 3) -> Any:
    """A server whose nodes answer the first request with groups, or with commitments."""
    server = Beacon(size).server(Session(1, 1, "train", NODES, 0, 32))
    for node in NODES:
        if node in claims:
            group = claims[node]
            told = bytes([SETTLED]) + codec.u32(6) + codec.node_list(group)
            server.receive(node, told if group else bytes([1]) + bytes(32))
    return server


def test_nodes_that_claim_groups_in_a_fresh_run_are_left_out_of_the_draw() -> None:
    """Liars would choose whom an honest node, which has no group yet, is summed with."""
    server = _told({2: (2, 3, 5), 3: (2, 3, 5), 5: (), 7: (), 11: (), 13: ()})
    server.close()
    assert server.stage == "reveal"
    assert set(server.outbound()) == {5, 7, 11, 13}


def test_a_node_that_claims_a_committee_in_a_fresh_run_is_left_out_of_the_draw() -> None:
    server = Beacon(committee=3).server(Session(1, 1, "train", NODES, 0, 32))
    server.receive(2, bytes([SETTLED]) + codec.u32(6) + codec.node_list((2, 3, 5)))
    for node in NODES[1:]:
        server.receive(node, bytes([1]) + bytes(32))
    server.close()
    assert server.stage == "reveal"
    assert set(server.outbound()) == set(NODES[1:])


def test_no_group_is_taken_over_a_node_that_has_none() -> None:
    server = _told({2: (2, 3, 5), 3: (2, 3, 5), 5: (), 7: (7, 11, 13), 11: (7, 11, 13)})
    server.close()
    assert server.groups == ((7, 11, 13),)


@pytest.mark.parametrize(
    "claims",
    [
        {2: (2, 3, 5), 3: (2, 3, 5), 5: ()},  # over a node without a group
        {2: (2, 3, 5, 7)},  # no majority of its members
        {2: (2, 3), 3: (2, 3)},  # smaller than any group that was drawn
        {2: (3, 5, 7), 3: (2, 5, 7)},  # of others
    ],
)
def test_claims_that_stand_for_nothing_end_the_draw(claims: dict[int, tuple[int, ...]]) -> None:
    with pytest.raises(RemoteError, match="split-beacon"):
        _told(claims).close()


@given(st.integers(2, 200), st.integers(2, 30), st.binary(min_size=32, max_size=32))
@settings(max_examples=40, deadline=None)
def test_groups_cover_all_nodes_and_none_is_small(nodes: int, size: int, seed: bytes) -> None:
    ids = tuple(range(1, nodes + 1))
    groups = draw_groups(seed, ids, size)
    assert sorted(node for group in groups for node in group) == list(ids)
    assert min(map(len, groups)) >= min(size, nodes)
    assert groups == draw_groups(seed, ids, size)


def test_groups_are_uniform() -> None:
    """Each other node shares node 1's group equally often: chi-square, 9 degrees, fails by chance once in 10^6."""
    seen = dict.fromkeys(range(2, 12), 0)
    for draw in range(4000):
        groups = draw_groups(draw.to_bytes(32, "big"), tuple(range(1, 12)), 5)
        for node in next(group for group in groups if 1 in group):
            if node != 1:
                seen[node] += 1
    mean = sum(seen.values()) / len(seen)
    assert sum((value - mean) ** 2 / mean for value in seen.values()) < 45


@given(st.integers(2, 120), st.integers(1, 60), st.sampled_from([0.0, 0.05, 1 / 3, 0.5]))
@settings(max_examples=60, deadline=None)
def test_the_anonymity_is_the_exact_quantile(nodes: int, size: int, corrupt: float) -> None:
    size = min(size, nodes)
    marked = int((corrupt + 1e-14) * nodes)

    def risk(bound: int) -> Fraction:
        ways = sum(comb(marked, bad) * comb(nodes - marked, size - bad) for bad in range(bound + 1, size + 1))
        return Fraction(ways * nodes * ATTEMPTS, comb(nodes, size))

    least = next(bound for bound in range(size + 1) if risk(bound) <= Fraction(1, 1 << 40))
    assert corrupt_members(nodes, size, marked) == least
    assert anonymity(nodes, size, corrupt) == size - least
