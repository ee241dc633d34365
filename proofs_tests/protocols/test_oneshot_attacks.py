"""A server, members and clients that deviate: each is met by one named refusal, which only its own check raises.

The server's deviations are tried at every step on an honest node; each row names the rule that must stop it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privfed.protocols.errors import SERVER, RemoteError
from privfed.protocols.oneshot import OneShot, sharing
from privfed.protocols.oneshot.messages import Bundle, Header, Invitation, Quorum, Signature
from privfed.protocols.oneshot.server import OneShotServer
from privfed.protocols.session import Identity, Policy
from proofs_tests.protocols.oneshot_cohort import Cohort, bundle, malicious_box, refuses, secret_key

BAD = json.loads((Path(__file__).parent.parent / "vectors" / "bad_oneshot.json").read_text())
STRICT = Policy(min_cohort=3, min_threshold=3, min_neighbours=3, min_bits=16, min_round=3)


# --- the server lies in the invitation


def invite(**changes: Any) -> Callable[[Invitation], Invitation]:
    def change(honest: Invitation) -> Invitation:
        facts = {name: value for name, value in changes.items() if hasattr(honest.session, name)}
        rest = {name: value for name, value in changes.items() if name not in facts}
        return replace(honest, session=replace(honest.session, **facts), **rest)

    return change


INVITATIONS = {
    "a session without the node": (invite(nodes=(2, 3, 4, 5)), "foreign-session"),
    "a Sybil beside the roster": (invite(nodes=(1, 2, 3, 4, 5, 99)), "foreign-node"),
    "a round seen before": (invite(round=2), "stale-round"),
    "a cohort of two": (invite(nodes=(1, 2)), "cohort-too-small"),
    "a ring of one bit": (invite(bits=1), "modulus-too-small"),
    "a ring that drowns in noise": (invite(bits=60), "unsafe-session"),
    "a lowered threshold": (invite(threshold=2), "threshold-lowered"),
    "a raised threshold": (invite(threshold=5), "parameters-differ"),
    "a smaller committee": (invite(committee=(1, 2, 3)), "foreign-committee"),
    "a committee of strangers": (invite(committee=(96, 97, 98, 99)), "foreign-committee"),
    "another packing": (invite(slots=2), "parameters-differ"),
    "more tolerated corruption": (invite(corrupt=1), "parameters-differ"),
    "bounded entries": (invite(bounded=True), "parameters-differ"),
}


@pytest.mark.parametrize("name", INVITATIONS)
def test_a_node_refuses(name: str) -> None:
    change, deviation = INVITATIONS[name]
    cohort = Cohort(5, OneShot(4), policy=STRICT)
    request = change(Invitation.decode(cohort.server.outbound()[1])).encode()
    refuses(deviation, {SERVER}, lambda: cohort.answer(1, request))
    assert cohort.kept[1] == b"", "nothing was sent, nothing is kept"


@pytest.mark.parametrize(
    ("policy", "deviation"),
    [
        (Policy(min_threshold=5), "threshold-too-low"),
        (Policy(min_neighbours=5), "committee-too-small"),
        (Policy(min_cohort=6), "cohort-too-small"),
        (Policy(min_bits=21), "modulus-too-small"),
        (Policy(min_round=4), "stale-round"),
    ],
)
def test_a_nodes_floors_hold_for_its_own_parameters_too(policy: Policy, deviation: str) -> None:
    cohort = Cohort(5, OneShot(4), policy=policy)
    refuses(deviation, {SERVER}, lambda: cohort.answer(1, cohort.server.outbound()[1]))


# --- the server lies about the survivors


def keep(nodes: set[int]) -> Callable[[Bundle], Bundle]:
    def change(honest: Bundle) -> Bundle:
        rows = [row for row in zip(honest.survivors, honest.headers, honest.boxes, strict=True) if row[0] in nodes]
        survivors, headers, boxes = (tuple(column) for column in zip(*rows, strict=True))
        return Bundle(survivors, headers, boxes)

    return change


def rename(honest: Bundle) -> Bundle:
    return replace(honest, survivors=(*honest.survivors[:-1], 99))


def with_header(node: int, **changes: bytes) -> Callable[[Bundle], Bundle]:
    def change(honest: Bundle) -> Bundle:
        at = honest.survivors.index(node)
        headers = list(honest.headers)
        headers[at] = replace(headers[at], **changes)
        return replace(honest, headers=tuple(headers))

    return change


def swap_boxes(honest: Bundle) -> Bundle:
    first, second, third, *rest = honest.boxes
    return replace(honest, boxes=(first, third, second, *rest))


def flip_box(honest: Bundle) -> Bundle:
    first, second, *rest = honest.boxes
    return replace(honest, boxes=(first, bytes([second[0] ^ 1]) + second[1:], *rest))


def foreign_key(honest: Bundle) -> Bundle:
    """Another node's session key, validly signed by that node, under node 2's name."""
    return with_header(2, public_key=honest.headers[2].public_key, signature=honest.headers[2].signature)(honest)


BUNDLES = {
    "a foreign survivor": (bundle(rename), "foreign-survivor", {SERVER}),
    "survivors without the member": (
        lambda request: replace_survivors(request, {2, 3, 4, 5}),
        "own-input-missing",
        {SERVER},
    ),
    "two survivors": (bundle(keep({1, 2})), "cohort-too-small", {SERVER}),
    "a contribution to another model": (bundle(with_header(3, digest=bytes(32))), "inconsistent-session", {SERVER, 3}),
    "a session key of the server's": (
        bundle(with_header(2, public_key=bytes(31) + b"\x09")),
        "bad-signature",
        {SERVER, 2},
    ),
    "a session key of another node's": (bundle(foreign_key), "bad-signature", {SERVER, 2}),
    "a forged signature": (bundle(with_header(4, signature=bytes(64))), "bad-signature", {SERVER, 4}),
    "two boxes swapped": (bundle(swap_boxes), "bad-share", {SERVER, 2}),
    "a flipped bit in a box": (bundle(flip_box), "bad-share", {SERVER, 2}),
    "the open stage first": (lambda request: Quorum({1: bytes(64)}).encode(), "out-of-order", {SERVER}),
}


def replace_survivors(request: bytes, nodes: set[int]) -> bytes:
    """A bundle as node 9 would get it, so that no own box is left out."""
    honest = Bundle.decode(request, 1)
    rows = [row for row in zip(honest.survivors, honest.headers, honest.boxes, strict=True) if row[0] in nodes]
    return Bundle(*(tuple(column) for column in zip(*rows, strict=True))).encode()


@pytest.mark.parametrize("name", BUNDLES)
def test_a_member_refuses_to_confirm(name: str) -> None:
    change, deviation, culprits = BUNDLES[name]
    cohort = Cohort(5, OneShot(4), policy=STRICT).until("confirm")
    kept = cohort.kept[1]
    request = change(bytes(cohort.server.outbound()[1]))
    refuses(deviation, culprits, lambda: cohort.answer(1, request))
    assert cohort.kept[1] == kept


def test_a_share_beyond_the_prime_names_its_sender() -> None:
    cohort = Cohort(5, OneShot(4)).until("confirm")
    share = b"\xff" * sharing.SHARE_BYTES
    request = bundle(malicious_box(cohort, share))(bytes(cohort.server.outbound()[1]))
    refuses("bad-share", {2}, lambda: cohort.answer(1, request))


@pytest.mark.parametrize("point", [bytes(32), b"\x01" + bytes(31), (2**255 - 20).to_bytes(32, "little")])
def test_a_low_order_session_key_names_its_sender(point: bytes) -> None:
    cohort = Cohort(5, OneShot(4)).until("confirm")
    change = malicious_box(cohort, bytes(sharing.SHARE_BYTES), public_key=point)
    request = bundle(change)(bytes(cohort.server.outbound()[1]))
    refuses("low-order-key", {2}, lambda: cohort.answer(1, request))


def test_a_roster_key_of_low_order_is_not_sealed_to() -> None:
    """y = -1 is a point of order two: its X25519 form is 0."""
    cohort = Cohort(3, OneShot(2))
    roster = {**cohort.roster, 2: (2**255 - 20).to_bytes(32, "little")}
    client = OneShot(2).client(1, identity=Identity(1, secret_key(1), roster))
    request = cohort.server.outbound()[1]
    refuses("low-order-key", {2}, lambda: client.step(b"", request, lambda: cohort.inputs[1]))


# --- the server tells members different survivors, or asks twice


def test_split_survivors_open_nothing() -> None:
    """Four of seven are told {1..6}, three {2..7} and so on: whatever quorum is shown, nobody opens.

    This is the attack that signing prevents: shares of different sums combine into differences of sums.
    """
    cohort = Cohort(7, OneShot(5)).until("confirm")
    views = {1: set(range(1, 7)), 2: set(range(1, 7)), 3: set(range(1, 8)), 4: set(range(1, 8)), 5: set(range(1, 8))}
    signatures = {}
    for node, view in views.items():
        honest = Bundle.decode(cohort.server.outbound()[node], node)
        signed = cohort.answer(node, keep(view)(honest).encode())
        signatures[node] = Signature.decode(signed).signature
    for node in views:
        refuses("split-survivors", {SERVER}, partial(cohort.answer, node, Quorum(signatures).encode()))


def twice(cohort: Cohort, node: int) -> OneShotServer:
    """What the server holds when a node that lost its state answers the same invitation again: another (s, e)."""
    other = cohort.protocol.server(cohort.session)
    for sender, request in cohort.server.outbound().items():
        reply = cohort.answer(sender, request)
        cohort.server.receive(sender, reply)
        if sender == node:
            reply = bytes(cohort.clients[node].step(b"", request, lambda: cohort.inputs[node])[1])
        other.receive(sender, reply)
    cohort.server.close()
    other.close()
    return other


def test_two_contributions_of_one_node_are_two_sets() -> None:
    """Were the ids alone signed, sums over the same ids with either contribution would open under one quorum."""
    cohort = Cohort(5, OneShot(4))
    other = twice(cohort, 3)
    views = {1: cohort.server, 2: cohort.server, 4: other, 5: other}
    signatures = {
        node: Signature.decode(cohort.answer(node, server.outbound()[node])).signature for node, server in views.items()
    }
    for node in views:
        refuses("split-survivors", {SERVER}, partial(cohort.answer, node, Quorum(signatures).encode()))


def test_a_member_adds_up_its_own_contribution_and_no_earlier_one() -> None:
    cohort = Cohort(5, OneShot(4))
    request = twice(cohort, 3).outbound()[3]
    refuses("own-input-changed", {SERVER}, lambda: cohort.answer(3, request))


def test_a_member_signs_one_set_of_survivors() -> None:
    cohort = Cohort(5, OneShot(4)).until("confirm")
    request = bytes(cohort.server.outbound()[1])
    cohort.answer(1, request)
    other = bundle(keep({1, 2, 3, 4}))(request)
    for again in (other, request):
        refuses("out-of-order", {SERVER}, partial(cohort.answer, 1, again))


def test_a_member_opens_once() -> None:
    cohort = Cohort(5, OneShot(4)).until("open")
    request = bytes(cohort.server.outbound()[1])
    cohort.answer(1, request)
    refuses("second-request", {SERVER}, lambda: cohort.answer(1, request))


def test_a_node_contributes_once_and_a_plain_node_is_never_asked_again() -> None:
    cohort = Cohort(5, OneShot(3, committee=(2, 3, 4)))
    invitation = bytes(cohort.server.outbound()[1])
    cohort.until("confirm")
    refuses("second-request", {SERVER}, lambda: cohort.answer(1, invitation))
    refuses("out-of-order", {SERVER}, lambda: cohort.answer(2, invitation))


def quorum(change: Callable[[dict[int, bytes]], dict[int, bytes]]) -> Callable[[Cohort, bytes], bytes]:
    return lambda cohort, request: Quorum(change(Quorum.decode(request).signatures)).encode()


def other_session(cohort: Cohort, request: bytes) -> bytes:
    """Signatures of the same nodes on the same survivors, from the round before."""
    earlier = Cohort(5, OneShot(4), round=2).until("open")
    return bytes(earlier.server.outbound()[1])


QUORUMS = {
    "too few signatures": (quorum(lambda s: {n: s[n] for n in (1, 2, 3)}), "split-survivors"),
    "no signatures": (quorum(lambda s: {}), "split-survivors"),
    "forged signatures": (quorum(lambda s: {n: s[n] if n < 3 else bytes(64) for n in s}), "split-survivors"),
    "one signature under every name": (quorum(lambda s: dict.fromkeys(s, s[1])), "split-survivors"),
    "a signer outside the committee": (quorum(lambda s: {**s, 99: s[1]}), "foreign-signer"),
    "another session's signatures": (other_session, "split-survivors"),
}


@pytest.mark.parametrize("name", QUORUMS)
def test_a_member_refuses_to_open(name: str) -> None:
    change, deviation = QUORUMS[name]
    cohort = Cohort(5, OneShot(4)).until("open")
    request = change(cohort, bytes(cohort.server.outbound()[1]))
    refuses(deviation, {SERVER}, lambda: cohort.answer(1, request))
    cohort.answer(1, cohort.server.outbound()[1])


def test_one_bad_signature_among_enough_good_ones_stops_nobody() -> None:
    """A corrupt member must not be able to end the session by signing rubbish."""
    cohort = Cohort(5, OneShot(4)).until("confirm")
    cohort.stage(reply=lambda node, reply: Signature(bytes(64)).encode() if node == 5 else reply)
    cohort.server.close()
    cohort.stage(gone={5})
    cohort.server.close()
    assert cohort.server.result is not None
    assert np.array_equal(cohort.server.result.total, cohort.expected(range(1, 6)))


def test_nodes_told_different_models_do_not_share_a_sum() -> None:
    """A crafted model for node 1 alone: its contribution fits no one else's session, at server and members."""
    cohort, crafted = Cohort(5, OneShot(4)), Cohort(5, OneShot(4), binding=bytes(32))
    stray = crafted.answer(1, crafted.server.outbound()[1])
    refuses("inconsistent-session", {1}, lambda: cohort.server.receive(1, stray))
    cohort.until("confirm")
    header = Header(stray[8:40], stray[40:72], stray[72:136])
    request = Bundle.decode(cohort.server.outbound()[2], 2)
    request = replace(request, headers=(header, *request.headers[1:]))
    refuses("inconsistent-session", {SERVER, 1}, lambda: cohort.answer(2, request.encode()))
    relabelled = replace(request, headers=(replace(header, digest=request.headers[1].digest), *request.headers[1:]))
    refuses("bad-signature", {SERVER, 1}, lambda: cohort.answer(2, relabelled.encode()))


# --- truncated, extended and garbled messages, at every step


@pytest.mark.parametrize("stage", ["send", "confirm", "open"])
def test_no_other_length_is_a_request(stage: str) -> None:
    cohort = Cohort(4, OneShot(3)).until(stage)
    request = bytes(cohort.server.outbound()[1])
    cuts = range(len(request)) if len(request) < 500 else range(0, len(request), 97)
    for cut in cuts:
        refuses("malformed-request", {SERVER}, partial(cohort.answer, 1, request[:cut]))
    for more in (b"\x00", bytes(64), request):
        refuses("malformed-request", {SERVER}, partial(cohort.answer, 1, request + more))


@pytest.mark.parametrize("stage", ["send", "confirm", "open"])
def test_no_other_length_is_a_reply_and_the_server_goes_on(stage: str) -> None:
    cohort = Cohort(4, OneShot(3)).until(stage)
    reply = cohort.answer(1, cohort.server.outbound()[1])
    for bad in [reply[:cut] for cut in range(0, len(reply), max(1, len(reply) // 60))] + [
        reply + b"\x00",
        b"x" + reply[1:],
    ]:
        refuses("malformed-reply", {1}, partial(cohort.server.receive, 1, bad))
    cohort.server.receive(1, reply)
    for node in (2, 3, 4):
        cohort.server.receive(node, cohort.answer(node, cohort.server.outbound()[node]))
    cohort.server.close()
    while cohort.server.stage:
        cohort.stage()
        cohort.server.close()
    assert cohort.server.result is not None
    assert np.array_equal(cohort.server.result.total, cohort.expected(range(1, 5)))


def duplicate(encoded: bytes, at: int, size: int) -> bytes:
    """Repeat the row at `at` and count it."""
    count = int.from_bytes(encoded[8:12], "big") + 1
    return encoded[:8] + count.to_bytes(4, "big") + encoded[12:at] + encoded[at : at + size] + encoded[at:]


def test_ids_are_never_repeated() -> None:
    """A signature counted twice would lower the threshold, a survivor counted twice double an input."""
    cohort = Cohort(5, OneShot(4)).until("confirm")
    request = bytes(cohort.server.outbound()[1])
    survivor = duplicate(request, 12, 8)
    refuses("malformed-request", {SERVER}, lambda: cohort.answer(1, survivor))
    cohort.stage()
    cohort.server.close()
    signer = duplicate(bytes(cohort.server.outbound()[1]), 12, 8 + 64)
    refuses("malformed-request", {SERVER}, lambda: cohort.answer(1, signer))
    invitation = replace(cohort.protocol.agree(cohort.session).invitation, committee=(1, 1, 2, 3)).encode()
    fresh = Cohort(5, OneShot(4))
    refuses("malformed-request", {SERVER}, lambda: fresh.answer(1, invitation))


@pytest.mark.parametrize("case", BAD["cases"], ids=lambda case: case["name"])
def test_bad_vectors(case: dict[str, Any]) -> None:
    """Edits of the vector session's messages, and what each must raise."""
    base = BAD["session"]
    cohort = Cohort(3, OneShot(2), dimension=base["dimension"], bits=base["bits"], seed=base["seed"]).until(
        case["stage"]
    )
    node = case["node"]
    message = bytearray(cohort.server.outbound()[node])
    if case["to"] == "server":
        message = bytearray(cohort.answer(node, bytes(message)))
    for kind, *how in case["edits"]:
        if kind == "set":
            message[how[0] : how[0] + len(how[1]) // 2] = bytes.fromhex(how[1])
        elif kind == "cut":
            del message[how[0] :]
        else:
            message += bytes.fromhex(how[0])
    with pytest.raises(RemoteError) as raised:
        if case["to"] == "server":
            cohort.server.receive(node, bytes(message))
        else:
            cohort.answer(node, bytes(message))
    assert raised.value.deviation == case["deviation"]
    assert list(raised.value.culprits) == case["culprits"]
