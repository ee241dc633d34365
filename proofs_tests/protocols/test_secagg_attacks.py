"""A server that lies at every step in every listed way: the honest node aborts and names the deviation.

Each test drives honest clients and tampers with one request (or, in the second half, one reply). Removing the check
named in the test's id makes the test fail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.protocols import SecAgg, SecAggPlus, keys
from privfed.protocols.codec import Reader, decode, node_list, u8
from privfed.protocols.errors import LocalError, ProtocolError, RemoteError
from privfed.protocols.secagg import messages
from privfed.protocols.secagg.messages import Advertisement, Kept, Terms
from privfed.protocols.session import Policy, Session
from proofs_tests.protocols.secagg_lab import ACTIVE, NODES, PASSIVE, VECTOR, Lab, aborts, confirmations

# -- advertise: what a server may not ask ---------------------------------------------------------------------------

TERMS: list[tuple[str, Callable[[Terms], Terms], Policy, str]] = [
    ("cohort", lambda t: t, Policy(min_cohort=6), "cohort-too-small"),
    ("threshold-floor", lambda t: t, Policy(min_threshold=5), "threshold-too-low"),
    ("threshold-of-one", lambda t: replace(t, threshold=1), Policy(), "threshold-too-low"),
    ("half-threshold", lambda t: replace(t, threshold=2), Policy(), "threshold-too-low"),
    ("threshold-over-n", lambda t: replace(t, threshold=6), Policy(), "threshold-too-high"),
    ("degree", lambda t: replace(t, degree=2, threshold=2), Policy(min_neighbours=3), "too-few-neighbours"),
    ("modulus-two", lambda t: replace(t, session=replace(t.session, bits=1)), Policy(), "modulus-too-small"),
    ("replayed-round", lambda t: t, Policy(min_round=6), "stale-round"),
    ("mode-lowered", lambda t: replace(t, active=False), Policy(), "mode-lowered"),
    ("foreign", lambda t: replace(t, session=replace(t.session, nodes=(2, 3, 4, 5))), Policy(), "foreign-session"),
]


@pytest.mark.parametrize(
    ("change", "policy", "deviation"), [case[1:] for case in TERMS], ids=[case[0] for case in TERMS]
)
def test_terms_are_refused(change: Callable[[Terms], Terms], policy: Policy, deviation: str) -> None:
    lab = Lab(policy=policy).until("advertise")
    terms = change(decode(lab.requests[1], Terms.read))
    aborts(lab, 1, terms.encode(), deviation)


def test_passive_session_is_refused_by_an_active_policy() -> None:
    lab = Lab(PASSIVE, policy=Policy(require_active=True)).until("advertise")
    aborts(lab, 1, lab.requests[1], "mode-lowered")


def test_active_mode_without_identity_is_the_callers_mistake() -> None:
    lab = Lab().until("advertise")
    client = ACTIVE.client(1)
    with pytest.raises(LocalError, match="Identity"):
        client.step(b"", lab.requests[1], lambda: VECTOR)


# -- share: the keys of the cohort ----------------------------------------------------------------------------------


def view(lab: Lab, change: Callable[[dict[int, Advertisement]], object]) -> bytes:
    request = lab.requests[1]
    rows = decode(request, lambda r: (r.take(65), messages.read_advertisements(r))[1])
    change(rows)
    return request[:65] + messages.encode_advertisements(rows)


def swapped(rows: dict[int, Advertisement]) -> None:
    rows[2] = replace(rows[2], mask_key=keys.exchange_public(b"x" * 32))


def swapped_own(rows: dict[int, Advertisement]) -> None:
    rows[1] = replace(rows[1], seal_key=keys.exchange_public(b"x" * 32))


def duplicated(rows: dict[int, Advertisement]) -> None:
    rows[2] = replace(rows[2], mask_key=rows[3].mask_key)


def invented(rows: dict[int, Advertisement]) -> None:
    rows[9] = replace(rows[2], mask_key=keys.exchange_public(b"y" * 32), seal_key=keys.exchange_public(b"z" * 32))


def thinned(rows: dict[int, Advertisement]) -> None:
    for node in (3, 4, 5):
        del rows[node]


@pytest.mark.parametrize(
    ("change", "deviation"),
    [
        (swapped, "bad-signature"),
        (swapped_own, "swapped-key"),
        (duplicated, "duplicate-key"),
        (invented, "foreign-node"),
        (thinned, "cohort-too-small"),
    ],
)
def test_relayed_keys_are_checked(change: Callable[[dict[int, Advertisement]], None], deviation: str) -> None:
    lab = Lab().until("share")
    aborts(lab, 1, view(lab, change), deviation)


def test_a_sybil_is_not_on_the_roster() -> None:
    lab = Lab().until("share")
    del lab.roster[4]
    aborts(lab, 1, lab.requests[1], "not-on-roster")


def test_low_order_key_is_refused() -> None:
    lab = Lab(PASSIVE).until("share")

    def low(rows: dict[int, Advertisement]) -> None:
        rows[2] = replace(rows[2], seal_key=bytes(32))

    aborts(lab, 1, view(lab, low), "low-order-key")


def test_replayed_signature_of_another_session_is_refused() -> None:
    old, new = Lab(), Lab(round=6)
    old.until("share")
    new.until("share")
    stale = decode(old.requests[1], lambda r: (r.take(65), messages.read_advertisements(r))[1])
    aborts(new, 1, view(new, lambda rows: rows.update({2: stale[2]})), "bad-signature")


def test_another_model_is_another_session() -> None:
    lab, other = Lab().until("share"), Lab(binding=b"M" * 32).until("share")
    aborts(lab, 1, other.requests[1], "inconsistent-session")


# -- mask: who shared ------------------------------------------------------------------------------------------------


def shares(lab: Lab, live: tuple[int, ...] | None = None, drop: int = 0, flip: int = 0) -> bytes:
    request = lab.requests[1]

    def read(reader: Reader) -> tuple[tuple[int, ...], dict[int, bytes]]:
        reader.take(33)
        return reader.nodes(), messages.read_sealed(reader)

    told, sealed = decode(request, read)
    if drop:
        del sealed[drop]
    if flip:
        sealed[flip] = bytes([sealed[flip][0] ^ 1]) + sealed[flip][1:]
    return request[:33] + node_list(told if live is None else live) + messages.encode_sealed(sealed)


@pytest.mark.parametrize(
    ("changes", "deviation"),
    [
        ({"live": (1, 2, 3, 4)}, "wrong-neighbours"),
        ({"drop": 3}, "wrong-neighbours"),
        ({"live": (2, 3, 4, 5)}, "wrong-neighbours"),
        ({"live": (1, 2, 3, 4, 5, 9)}, "foreign-node"),
        ({"flip": 2}, "bad-share"),
    ],
)
def test_relayed_shares_are_checked(changes: dict[str, Any], deviation: str) -> None:
    lab = Lab().until("mask")
    aborts(lab, 1, shares(lab, **changes), deviation)


def test_too_few_live_neighbours() -> None:
    lab = Lab().until("mask")
    request = lab.requests[1]
    sealed = decode(request, lambda r: (r.take(33), r.nodes(), messages.read_sealed(r))[2])
    few = {node: sealed[node] for node in (2, 3)}
    aborts(lab, 1, request[:33] + node_list((1, 2, 3)) + messages.encode_sealed(few), "too-few-neighbours")


def test_split_view_of_the_keys_breaks_every_sealed_share() -> None:
    """Node 1 is shown a cohort without node 5; its neighbours sealed under the whole one."""
    lab = Lab().until("share")
    replies = {node: lab.step(node, lab.requests[node]) for node in NODES if node != 1}
    replies[1] = lab.step(1, view(lab, lambda rows: rows.pop(5)))
    sealed = {
        node: decode(reply, lambda r: (r.take(33), messages.read_sealed(r))[1])[1]
        for node, reply in replies.items()
        if node not in (1, 5)
    }
    request = lab.requests[1][:0] + messages.head(messages.MASK, lab.server._bound)
    aborts(lab, 1, request + node_list((1, 2, 3, 4)) + messages.encode_sealed(sealed), "bad-share")


# -- confirm and reveal: who survived --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("survivors", "deviation"),
    [
        ((2, 3, 4, 5), "excluded-survivor"),
        ((1, 2, 3), "too-few-survivors"),
        ((1, 2, 3, 4, 5, 9), "foreign-node"),
    ],
)
@pytest.mark.parametrize(("protocol", "stage"), [(ACTIVE, "confirm"), (SecAgg(threshold=4), "reveal")])
def test_survivor_lists_are_checked(protocol: SecAgg, stage: str, survivors: tuple[int, ...], deviation: str) -> None:
    lab = Lab(protocol).until(stage)
    aborts(lab, 1, lab.requests[1][:33] + node_list(survivors), deviation)


def test_a_node_that_shared_nothing_cannot_survive() -> None:
    lab = Lab(SecAgg(threshold=3))
    lab.until("share")
    for node in (1, 2, 3, 4):
        lab.server.receive(node, lab.step(node, lab.requests[node]))
    lab.server.close()
    lab.until("reveal")
    aborts(lab, 1, lab.requests[1][:33] + node_list(NODES), "foreign-node")


def test_too_few_confirmations() -> None:
    lab = Lab().until("reveal")
    aborts(lab, 1, confirmations(lab, lambda rows: [rows.pop(n) for n in (3, 4)]), "too-few-confirmations")


def test_a_confirmation_of_other_survivors() -> None:
    lab = Lab().until("reveal")
    forged = keys.sign(lab.identities[2].secret_key, b"secagg confirm", b"other", b"other", b"other")
    aborts(lab, 1, confirmations(lab, lambda rows: rows.update({2: forged})), "split-survivors")


def test_survivors_split_between_confirm_and_reveal() -> None:
    """The server has node 1 confirm everyone, and asks it to open a sum without node 5."""
    lab = Lab().until("confirm")
    lab.step(1, lab.requests[1])
    fewer = node_list((1, 2, 3, 4))
    signatures = messages.encode_signatures({})
    aborts(lab, 1, messages.head(messages.REVEAL, lab.server._bound) + fewer + signatures, "split-survivors")


# -- every stage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [ACTIVE, PASSIVE])
def test_identical_redelivery_gets_the_stored_bytes_and_another_request_is_refused(protocol: SecAgg) -> None:
    lab = Lab(protocol)
    for stage in protocol.stages:
        lab.until(stage)
        request = lab.requests[1]
        first = lab.step(1, request)
        state = lab.kept[1]
        assert lab.step(1, request) == first
        assert lab.kept[1] == state
        aborts(lab, 1, request + b"\0", "second-request")
        lab.server.receive(1, first)
        for node, other in lab.requests.items():
            if node != 1:
                lab.server.receive(node, lab.step(node, other))
        lab.server.close()
    assert lab.server.result is not None
    assert np.array_equal(lab.server.result.total, VECTOR.astype(np.uint64) * 5)


@pytest.mark.parametrize("protocol", [ACTIVE, PASSIVE])
def test_a_node_put_back_from_a_backup_seals_no_other_text_under_the_keys_it_has_used(protocol: SecAgg) -> None:
    lab = Lab(protocol).until("share")
    backup, request = lab.kept[1], lab.requests[1]
    first = lab.step(1, request)
    lab.kept[1] = backup
    assert lab.step(1, request) == first


def test_second_unmask_finds_nothing_to_open() -> None:
    lab = Lab(PASSIVE).until("reveal", gone=(5,))
    lab.step(1, lab.requests[1])
    other = lab.requests[1][:33] + node_list((1, 2, 3))
    aborts(lab, 1, other, "second-request")
    kept = decode(lab.kept[1], Kept.read)
    assert (kept.root, kept.agreed, kept.inbox, kept.edges) == (b"", {}, {}, ())


@pytest.mark.parametrize("stage", ACTIVE.stages)
def test_steps_out_of_order_are_refused(stage: str) -> None:
    lab = Lab().until(stage)
    for kind in range(1, 7):
        name = messages.STAGE_NAMES.get(kind)
        previous = ACTIVE.stages[ACTIVE.stages.index(stage) - 1] if stage != "advertise" else None
        if name not in (stage, previous):
            aborts(lab, 1, u8(kind) + lab.requests[1][1:], "out-of-order")


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ACTIVE.stages), st.data())
def test_truncated_extended_or_flipped_requests_abort(stage: str, data: st.DataObject) -> None:
    lab = Lab().until(stage)
    good = lab.requests[1]
    how = data.draw(st.sampled_from(["cut", "extend", "flip"]))
    if how == "cut":
        bad = good[: data.draw(st.integers(0, len(good) - 1))]
    elif how == "extend":
        bad = good + data.draw(st.binary(min_size=1, max_size=9))
    else:
        place = data.draw(st.integers(0, len(good) - 1))
        bad = good[:place] + bytes([good[place] ^ data.draw(st.integers(1, 255))]) + good[place + 1 :]
    if stage == "advertise" and how == "flip":
        # Other terms are another session, and every node sees the same ones: they may be acceptable.
        try:
            lab.step(1, bad)
        except ProtocolError:
            return
        lab.kept[1] = b""
        assert decode(bad, Terms.read) != decode(good, Terms.read)
        return
    before = lab.kept[1]
    with pytest.raises(RemoteError):
        lab.step(1, bad)
    assert lab.kept[1] == before


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ACTIVE.stages), st.data())
def test_any_bytes_from_a_node_are_refused_and_change_nothing(stage: str, data: st.DataObject) -> None:
    lab = Lab().until(stage)
    replies = {node: lab.step(node, request) for node, request in lab.requests.items()}
    good = replies[1]
    bad = data.draw(st.one_of(st.binary(max_size=40), st.integers(0, len(good) - 1).map(lambda n: good[:n])))
    with pytest.raises(RemoteError) as fault:
        lab.server.receive(1, bad)
    assert fault.value.culprits == (1,)
    for node, reply in replies.items():
        lab.server.receive(node, reply)
    with pytest.raises(RemoteError, match="unexpected-reply"):
        lab.server.receive(1, good)
    lab.server.close()


def test_a_masked_input_that_comes_late_is_refused() -> None:
    lab = Lab(PASSIVE).until("mask")
    replies = {node: lab.step(node, request) for node, request in lab.requests.items()}
    for node in (1, 2, 3, 4):
        lab.server.receive(node, replies[node])
    lab.server.close()
    with pytest.raises(RemoteError, match="unexpected-reply"):
        lab.server.receive(5, replies[5])


def test_wrong_shares_are_named_and_left_out() -> None:
    lab = Lab(PASSIVE).until("reveal")
    for node, request in lab.requests.items():
        reply = bytearray(lab.step(node, request))
        if node == 2:
            reply[33 + 4 + 8 + 1] ^= 1  # its share of node 1's secret
        lab.server.receive(node, bytes(reply))
    lab.server.close()
    assert lab.server.culprits == (2,)
    assert lab.server.result is not None
    assert np.array_equal(lab.server.result.total, VECTOR.astype(np.uint64) * 5)


def test_shares_that_fit_nothing_abort() -> None:
    lab = Lab(SecAgg(threshold=5)).until("reveal")
    for node, request in lab.requests.items():
        reply = bytearray(lab.step(node, request))
        if node == 2:
            reply[33 + 4 + 8 + 1] ^= 1
        lab.server.receive(node, bytes(reply))
    with pytest.raises(RemoteError, match="bad-share"):
        lab.server.close()


def test_a_share_of_the_other_secret_is_refused() -> None:
    lab = Lab(PASSIVE).until("reveal", gone=(5,))
    reply = bytearray(lab.step(1, lab.requests[1]))
    reply[33 + 4 + 8] ^= 1
    with pytest.raises(RemoteError, match="wrong-shares"):
        lab.server.receive(1, bytes(reply))


def test_an_improbable_in_degree_aborts() -> None:
    """In the sparse active graph the server could route every node's shares to one victim."""
    from privfed.protocols.secagg.neighbourhood import chosen_graph_connected, in_degree_limit

    assert in_degree_limit(1000, 50) < 150
    assert chosen_graph_connected(1000, 100, 52)
    assert not chosen_graph_connected(1000, 990, 2)
    SecAggPlus(neighbours=52, threshold=37, mode="active", corrupt=0.05, dropout=0.05).terms(
        Session(1, 1, "sum", tuple(range(1, 1001)), 1, 32)
    )


def test_nothing_secret_prints() -> None:
    lab = Lab().until("mask")
    kept = decode(lab.kept[1], Kept.read)
    assert kept.root.hex() not in repr(kept)
    assert "secret_key" not in repr(lab.identities[1])
    assert lab.identities[1].secret_key.hex() not in repr(lab.identities[1])
