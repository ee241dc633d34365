"""OneShot with a committee that a beacon drew: every dropout over every step of both, and what members refuse."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import combinations_with_replacement, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.audit import check_protocol
from privfed.protocols import OneShot, secure_sum
from privfed.protocols.beacon import corrupt_members
from privfed.protocols.errors import SERVER, LocalError, RemoteError, TooFewSurvivors
from privfed.protocols.oneshot.messages import Attendance, Bundle, Invitation
from privfed.protocols.session import Drawn, Policy
from proofs_tests.protocols.oneshot_cohort import Cohort, refuses, roster_of

STAGES = ("commit", "reveal", "settle", "send", "confirm", "open")
DRAWN = Drawn((2, 3, 5, 8, 9), 9)
"""Of nodes 1..9; 8 and 9 are not in a session of nodes 1..7."""


def check_pattern(leaves: dict[int, str], n: int, members: int, threshold: int) -> None:
    """Whoever leaves before whichever step: the exact sum of those who gave their input, or TooFewSurvivors."""
    inputs = {node: np.arange(3) * 10**node for node in range(1, n + 1)}
    dropped = {stage: {node for node in leaves if leaves[node] == stage} for stage in STAGES}
    in_draw = set().union(*(dropped[stage] for stage in ("commit", "reveal")))
    gave = set(inputs) - set().union(*(dropped[stage] for stage in STAGES[:4]))
    try:
        result = secure_sum(inputs, OneShot(threshold, committee=members), dropped=dropped)
    except TooFewSurvivors as error:
        late = sum(stage in ("settle", "send", "confirm", "open") for stage in leaves.values())
        # The draw needs `members` nodes; of those it drew, late leavers may all be members.
        assert n - len(in_draw) < members or members - late < threshold or len(gave) < 2, leaves
        assert error.have < error.threshold
        return
    assert result.survivors == gave, leaves
    assert np.array_equal(result.total, sum(inputs[node] for node in gave)), leaves
    assert n - len(in_draw) >= members
    assert n - len(leaves) >= threshold or sum(node not in leaves for node in inputs) >= threshold - 1


def patterns(n: int) -> Any:
    return product(("~", *STAGES), repeat=n)


def leaves_of(stages: Any) -> dict[int, str]:
    return {node: stage for node, stage in enumerate(stages, 1) if stage != "~"}


@pytest.mark.parametrize(
    ("n", "members", "threshold"),
    [(2, 2, 2), (3, 2, 2), (3, 3, 2), (4, 3, 2), pytest.param(5, 4, 3, marks=pytest.mark.long)],
)
def test_every_dropout_pattern_over_the_draw_and_the_session(n: int, members: int, threshold: int) -> None:
    for stages in patterns(n):
        check_pattern(leaves_of(stages), n, members, threshold)


@pytest.mark.parametrize(("n", "members", "threshold"), [(5, 4, 3), (6, 4, 3)])
def test_dropout_patterns_up_to_symmetry(n: int, members: int, threshold: int) -> None:
    for stages in combinations_with_replacement(("~", *STAGES), n):
        check_pattern(leaves_of(stages), n, members, threshold)


@given(st.integers(0, 2**32))
@settings(max_examples=3, deadline=None)
def test_random_dropouts_of_a_hundred_nodes(seed: int) -> None:
    chosen = np.random.default_rng(seed).choice(("~", *STAGES), 100, p=[0.88, *[0.02] * 6])
    leaves = leaves_of(map(str, chosen))
    inputs = {node: np.full(5, node) for node in range(1, 101)}
    dropped = {stage: {node for node in leaves if leaves[node] == stage} for stage in STAGES}
    result = secure_sum(inputs, OneShot(11, committee=20), dropped=dropped)
    gave = {node for node in inputs if leaves.get(node, "open") in ("confirm", "open")}
    assert result.survivors == gave
    assert result.total.tolist() == [sum(gave)] * 5


def test_the_suite_for_protocols_holds_for_one_with_a_beacon() -> None:
    assert check_protocol(OneShot(threshold=2, committee=3)).passed


def drawn(threshold: int = 4, corrupt: int = 0, **arguments: Any) -> Cohort:
    return Cohort(7, OneShot(threshold, committee=DRAWN, corrupt=corrupt), **arguments)


def test_members_outside_the_session_help_to_open_it() -> None:
    """Exactly `threshold` of the members are left, two of them without an input of their own."""
    cohort = drawn()
    assert set(cohort.server.outbound()) == set(range(1, 10))
    result = cohort.run({"send": {1}, "confirm": {2}})
    assert result.survivors == {2, 3, 4, 5, 6, 7}
    assert np.array_equal(result.total, cohort.expected(result.survivors))
    with pytest.raises(TooFewSurvivors) as raised:
        drawn().run({"send": {8}, "open": {9}})
    assert (raised.value.have, raised.value.threshold) == (3, 4)


def test_a_node_shares_its_secret_only_with_the_committee_it_saw_drawn() -> None:
    """Other members, none drawn, another size, a member that is no longer on the roster: nothing leaves the node."""
    cohort = drawn()
    request = bytes(cohort.server.outbound()[1])
    other = Cohort(7, OneShot(4, committee=Drawn((1, 2, 3, 8, 9), 9)))
    refuses("foreign-committee", {SERVER}, lambda: cohort.answer(1, bytes(other.server.outbound()[1])))
    named = Cohort(7, OneShot(4))
    refuses("foreign-committee", {SERVER}, lambda: cohort.answer(1, bytes(named.server.outbound()[1])))
    everyone = OneShot(4).client(1, identity=named.identities[1], policy=Policy(committee=DRAWN))
    refuses("foreign-node", {SERVER}, lambda: everyone.step(b"", named.server.outbound()[1], lambda: named.inputs[1]))

    def asked(size: int, policy: Policy, roster: dict[int, bytes] = cohort.roster) -> Any:
        identity = replace(cohort.identities[1], roster=roster)
        client = OneShot(4, committee=size).client(1, identity=identity, policy=policy)
        return lambda: client.step(b"", request, lambda: cohort.inputs[1])

    refuses("committee-not-drawn", {SERVER}, asked(5, Policy()))
    refuses("unsafe-session", {SERVER}, asked(4, Policy(committee=DRAWN)))
    refuses("foreign-node", {SERVER}, asked(5, Policy(committee=DRAWN), roster_of(range(1, 9))))
    known = replace(cohort.identities[1], roster={**cohort.roster, **named.roster})
    everyone = OneShot(4).client(1, identity=known, policy=Policy(committee=DRAWN))
    refuses(
        "foreign-committee", {SERVER}, lambda: everyone.step(b"", named.server.outbound()[1], lambda: named.inputs[1])
    )
    pinned = OneShot(4, committee=None).client(1, identity=cohort.identities[1], policy=Policy(committee=DRAWN))
    refuses("foreign-committee", {SERVER}, lambda: pinned.step(b"", request, lambda: cohort.inputs[1]))
    assert cohort.answer(1, request)


def no_input() -> Any:
    raise AssertionError("the input was asked for")


def test_a_node_that_is_neither_member_nor_in_the_session_joins_nothing() -> None:
    cohort = Cohort(6, OneShot(4, committee=DRAWN))
    stranger = drawn().clients[7]
    refuses("foreign-session", {SERVER}, lambda: stranger.step(b"", cohort.server.outbound()[1], no_input))


def test_a_member_without_input_is_held_to_every_floor() -> None:
    for policy, deviation in (
        (Policy(min_cohort=8), "cohort-too-small"),
        (Policy(min_bits=21), "modulus-too-small"),
        (Policy(min_threshold=5), "threshold-too-low"),
        (Policy(min_neighbours=5), "committee-too-small"),
        (Policy(min_round=4), "stale-round"),
        (Policy(run=1), "wrong-run"),
        (Policy(corrupt=0.2), "corrupt-too-low"),
    ):
        cohort = drawn(policy=policy)
        refuses(deviation, {SERVER}, partial(cohort.answer, 9, cohort.server.outbound()[9]))
    cohort = drawn(policy=Policy(min_survivors=7)).until("confirm")
    less = Bundle.decode(cohort.server.outbound()[9], 9)
    less = Bundle(less.survivors[:-1], less.headers[:-1], less.boxes[:-1])
    refuses("cohort-too-small", {SERVER}, lambda: cohort.answer(9, less.encode()))


def test_a_member_without_input_answers_each_stage_once_and_for_one_set() -> None:
    cohort = drawn()
    request = bytes(cohort.server.outbound()[9])
    assert Attendance.decode(cohort.answer(9, request)).digest == cohort.protocol.agree(cohort.session).digest
    refuses("out-of-order", {SERVER}, lambda: cohort.answer(9, request))
    cohort = drawn().until("open")
    signed = cohort.server.outbound()[9]
    refuses("out-of-order", {SERVER}, lambda: cohort.answer(9, drawn().until("confirm").server.outbound()[9]))
    refuses("split-survivors", {SERVER}, lambda: cohort.answer(9, drawn(round=4).until("open").server.outbound()[9]))
    assert cohort.answer(9, signed)
    refuses("second-request", {SERVER}, lambda: cohort.answer(9, signed))


def test_the_server_takes_attendance_for_this_session_only_and_once() -> None:
    cohort = drawn()
    requests = cohort.server.outbound()
    there, input_ = cohort.answer(9, requests[9]), cohort.answer(1, requests[1])
    elsewhere = drawn(round=4)
    other = elsewhere.answer(9, elsewhere.server.outbound()[9])
    refuses("inconsistent-session", {9}, lambda: cohort.server.receive(9, other))
    refuses("malformed-reply", {9}, lambda: cohort.server.receive(9, input_))
    refuses("malformed-reply", {2}, lambda: cohort.server.receive(2, there))
    for bad in (b"", there[:-1], there + b"\0"):
        refuses("malformed-reply", {9}, partial(cohort.server.receive, 9, bad))
    cohort.server.receive(9, there)
    refuses("second-reply", {9}, lambda: cohort.server.receive(9, there))


@given(st.integers(10, 400), st.data())
@settings(max_examples=60, deadline=None)
def test_no_drawn_committee_lets_its_corrupt_members_open_two_sums(nodes: int, data: st.DataObject) -> None:
    """2t > m + c and m >= c + 2 for the quantile c of the draw; the sum still holds two honest of all corrupt nodes."""
    corrupt = data.draw(st.integers(0, nodes - 2))
    size = data.draw(st.integers(2, nodes))
    threshold = data.draw(st.none() | st.integers(2, size))
    session = Cohort(4, OneShot(3)).session
    session = replace(session, nodes=tuple(range(1, nodes + 1)))
    protocol = OneShot(threshold, committee=Drawn(tuple(range(1, size + 1)), nodes), corrupt=corrupt)
    inside = corrupt_members(nodes, size, corrupt)
    least = (size + inside) // 2 + 1
    safe = size >= inside + 2 and (threshold or least) >= least
    try:
        agreed = protocol.agree(session)
    except LocalError:
        assert not safe
        return
    assert safe
    assert 2 * agreed.threshold > size + inside
    assert agreed.fewest_survivors == corrupt + 2


def test_a_draw_is_worth_a_smaller_committee() -> None:
    """1000 nodes, 50 corrupt, 60 members: at most 22 corrupt ones, so t = 42; named by the server t would be 56."""
    everyone = tuple(range(1, 1001))
    session = replace(Cohort(4, OneShot(3)).session, nodes=everyone)
    assert corrupt_members(1000, 60, 50) == 22
    assert OneShot(42, committee=Drawn(everyone[:60], 1000), corrupt=50).agree(session).threshold == 42
    with pytest.raises(LocalError, match="two different sums"):
        OneShot(41, committee=Drawn(everyone[:60], 1000), corrupt=50).agree(session)
    with pytest.raises(LocalError, match=">= 56"):
        OneShot(40, committee=everyone[:60], corrupt=50).agree(session)


def test_parameters_of_a_draw_are_checked() -> None:
    for committee in (1, 0, True):
        with pytest.raises(ValueError, match="committee"):
            OneShot(committee=committee)
    with pytest.raises(LocalError, match="run its beacon first"):
        OneShot(2, committee=3).server(Cohort(4, OneShot(3)).session)
    with pytest.raises(LocalError, match="was drawn in this run"):
        OneShot(2, committee=3).with_drawn(Drawn((1, 2), 4))
    with pytest.raises(LocalError, match="drawn from"):
        OneShot(2, committee=Drawn((1, 2, 3), 4), corrupt=5).agree(Cohort(7, OneShot(4)).session)
    beacon = OneShot(2, committee=3).beacon
    assert beacon is not None
    assert beacon.committee == 3
    assert OneShot(2).beacon is None
    assert OneShot(2, committee=(1, 2)).beacon is None
    with pytest.raises(RemoteError, match="foreign-session"):
        Cohort(3, OneShot(2)).clients[1].step(
            b"", replace_nodes(Cohort(3, OneShot(2)).server.outbound()[1], (2, 3)), lambda: np.zeros(5, np.uint64)
        )


def replace_nodes(request: Any, nodes: tuple[int, ...]) -> bytes:
    invitation = Invitation.decode(request)
    session = replace(invitation.session, nodes=nodes)
    return replace(invitation, session=session, committee=(1, *nodes)).encode()
