"""A server, members and clients that deviate: each is met by one named refusal, which only its own check raises.

The server's deviations are tried at every step on an honest node; each row names the rule that must stop it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privfed.protocols import keys
from privfed.protocols.errors import SERVER, ProtocolError, RemoteError, TooFewSurvivors
from privfed.protocols.oneshot import OneShot, committee, ring, sealing, sharing
from privfed.protocols.oneshot.messages import (
    BOX_BYTES,
    Bundle,
    Contribution,
    Header,
    Invitation,
    Quorum,
    Share,
    Signature,
)
from privfed.protocols.session import Identity, Policy
from proofs_tests.protocols.oneshot_cohort import Cohort, roster_of, secret_key

BAD = json.loads((Path(__file__).parent.parent / "vectors" / "bad_oneshot.json").read_text())
STRICT = Policy(min_cohort=3, min_threshold=3, min_neighbours=3, min_bits=16, min_round=3)


def refuses(deviation: str, culprits: set[int], act: Callable[[], object]) -> None:
    with pytest.raises(RemoteError) as raised:
        act()
    assert raised.value.deviation == deviation
    assert set(raised.value.culprits) == culprits


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
    "another packing": (invite(slots=1), "parameters-differ"),
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


def bundle(change: Callable[[Bundle], Bundle]) -> Callable[[bytes], bytes]:
    return lambda request: change(Bundle.decode(request, 1)).encode()


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
    return Bundle(*(tuple(column) for column in zip(*rows, strict=True))).encode()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", BUNDLES)
def test_a_member_refuses_to_confirm(name: str) -> None:
    change, deviation, culprits = BUNDLES[name]
    cohort = Cohort(5, OneShot(4), policy=STRICT).until("confirm")
    kept = cohort.kept[1]
    request = change(bytes(cohort.server.outbound()[1]))
    refuses(deviation, culprits, lambda: cohort.answer(1, request))
    assert cohort.kept[1] == kept


def malicious_box(cohort: Cohort, share: bytes, public_key: bytes | None = None) -> Callable[[Bundle], Bundle]:
    """What node 2 could send node 1 in earnest: its own signature, a box that opens."""
    identity, digest = cohort.identities[2], cohort.protocol.agree(cohort.session).digest
    secret = keys.digest(b"session key of node 2")
    header = committee.sign_header(digest, identity, public_key or keys.exchange_public(secret))
    box = sealing.seal_box(secret, digest, identity, 1, share)

    def change(honest: Bundle) -> Bundle:
        return Bundle(
            honest.survivors,
            (honest.headers[0], header, *honest.headers[2:]),
            (honest.boxes[0], box, *honest.boxes[2:]),
        )

    return change


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
        refuses("split-survivors", {SERVER}, lambda node=node: cohort.answer(node, Quorum(signatures).encode()))  # type: ignore[misc]


def test_a_member_signs_one_set_of_survivors() -> None:
    cohort = Cohort(5, OneShot(4)).until("confirm")
    request = bytes(cohort.server.outbound()[1])
    cohort.answer(1, request)
    other = bundle(keep({1, 2, 3, 4}))(request)
    for again in (other, request):
        refuses("out-of-order", {SERVER}, lambda again=again: cohort.answer(1, again))  # type: ignore[misc]


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
        refuses("malformed-request", {SERVER}, lambda cut=cut: cohort.answer(1, request[:cut]))  # type: ignore[misc]
    for more in (b"\x00", bytes(64), request):
        refuses("malformed-request", {SERVER}, lambda more=more: cohort.answer(1, request + more))  # type: ignore[misc]


@pytest.mark.parametrize("stage", ["send", "confirm", "open"])
def test_no_other_length_is_a_reply_and_the_server_goes_on(stage: str) -> None:
    cohort = Cohort(4, OneShot(3)).until(stage)
    reply = cohort.answer(1, cohort.server.outbound()[1])
    for bad in [reply[:cut] for cut in range(0, len(reply), max(1, len(reply) // 60))] + [
        reply + b"\x00",
        b"x" + reply[1:],
    ]:
        refuses("malformed-reply", {1}, lambda bad=bad: cohort.server.receive(1, bad))  # type: ignore[misc]
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


# --- nodes that deviate, seen from the server


def test_replies_come_once_from_those_asked_and_in_time() -> None:
    cohort = Cohort(5, OneShot(3, committee=(1, 2, 3, 4)))
    replies = {node: cohort.answer(node, request) for node, request in cohort.server.outbound().items()}
    refuses("unasked-reply", {99}, lambda: cohort.server.receive(99, replies[1]))
    for node in (1, 2, 3, 5):
        cohort.server.receive(node, replies[node])
        refuses("second-reply", {node}, lambda node=node: cohort.server.receive(node, replies[node]))  # type: ignore[misc]
    cohort.server.close()
    refuses("unasked-reply", {4}, lambda: cohort.server.receive(4, replies[4]))
    refuses("unasked-reply", {5}, lambda: cohort.server.receive(5, replies[5]))
    refuses("malformed-reply", {1}, lambda: cohort.server.receive(1, replies[1]))
    said = cohort.stage()
    refuses("second-reply", {1}, lambda: cohort.server.receive(1, said[1][1]))
    cohort.server.close()
    said = cohort.stage()
    refuses("second-reply", {1}, lambda: cohort.server.receive(1, said[1][1]))
    cohort.server.close()
    refuses("unasked-reply", {1}, lambda: cohort.server.receive(1, said[1][1]))
    assert cohort.server.result is not None
    assert np.array_equal(cohort.server.result.total, cohort.expected([1, 2, 3, 5]))


def flip_share(node: int, by: int = 54321) -> Callable[[int, bytes], bytes]:
    def change(sender: int, reply: bytes) -> bytes:
        if sender != node:
            return reply
        share = sharing.from_wire(Share.decode(reply).share)
        share[77] = (share[77] + by) % sharing.PRIME
        return Share(sharing.to_wire(share)).encode()

    return change


@pytest.mark.parametrize("liar", [1, 3, 6])
@pytest.mark.parametrize(("answers", "named"), [(4, False), (5, False), (6, True)])
def test_a_flipped_share_spoils_the_sum_and_is_named_when_it_can_be(liar: int, answers: int, named: bool) -> None:
    """t answers: the sum of secrets is not small. t + 1: the answers disagree. t + 2: the liar is known."""
    cohort = Cohort(6, OneShot(4)).until("open")
    gone = [node for node in (2, 4) if node != liar][: 6 - answers]
    cohort.stage(gone=gone, reply=flip_share(liar))
    refuses("inconsistent-share", {liar} if named else set(), cohort.server.close)
    assert cohort.server.result is None


@pytest.mark.parametrize("liar", [1, 3, 5, 6])
def test_the_least_flip_with_no_share_to_spare_still_releases_nothing(liar: int) -> None:
    """A flip by one may leave the opened secret small; then what it decrypts is not noise."""
    cohort = Cohort(6, OneShot(4)).until("open")
    cohort.stage(gone={2, 4}, reply=flip_share(liar, by=1))
    with pytest.raises(RemoteError, match="inconsistent-share|garbage-ciphertext"):
        cohort.server.close()
    assert cohort.server.result is None


def test_a_share_of_another_polynomial_is_noticed() -> None:
    """Node 2 gives node 1 a share off its polynomial: the committee's answers disagree."""
    cohort = Cohort(5, OneShot(3)).until("confirm")
    share = sharing.to_wire(np.arange(ring.N) % sharing.PRIME)
    change = bundle(malicious_box(cohort, share))
    cohort.stage(request=lambda node, request: change(request) if node == 1 else request)
    cohort.server.close()
    cohort.stage()
    refuses("inconsistent-share", {1}, cohort.server.close)


@pytest.mark.parametrize("kind", ["random", "another session's", "shifted"])
def test_a_garbage_ciphertext_releases_nothing(kind: str) -> None:
    cohort = Cohort(5, OneShot(3), dimension=3000)
    size = cohort.protocol.agree(cohort.session).ciphertext_bytes
    other = Cohort(5, OneShot(3), dimension=3000, round=4)
    other_wire = other.answer(2, other.server.outbound()[2])

    def spoil(node: int, reply: bytes) -> bytes:
        if node != 2:
            return reply
        honest = Contribution.decode(reply, size, 4)
        vector = {
            "random": np.random.default_rng(1).bytes(size),
            "another session's": other_wire[136 : 136 + size],
            "shifted": reply[140 : 136 + size] + reply[136:140],
        }[kind]
        return replace(honest, ciphertext=vector).encode()

    cohort.stage(reply=spoil)
    cohort.server.close()
    while cohort.server.stage != "open":
        cohort.stage()
        cohort.server.close()
    cohort.stage()
    refuses("garbage-ciphertext", set(), cohort.server.close)
    assert cohort.server.result is None


def test_secrets_too_large_for_the_law_are_noticed() -> None:
    """A client whose secret is beyond the cut cannot hide it when the others are small."""
    count, size = 3, sharing.MAX_NODES
    secrets = [np.zeros(ring.N, dtype=np.int8) for _ in range(count)]
    secrets[0][5] = 127
    answers: dict[int, Any] = dict.fromkeys((1, 2), 0)
    for index, secret in enumerate(secrets):
        for node, share in zip((1, 2), sharing.split(secret, 2, 2, np.random.default_rng(index).bytes), strict=True):
            answers[node] = (answers[node] + share) % sharing.PRIME
    assert sharing.combine(answers, 2, (1, 2), count)[5] == 127
    refuses("inconsistent-share", set(), lambda: sharing.combine(answers, 2, (1, 2), 1))
    assert size == 12336


def test_after_too_few_survivors_nothing_is_opened() -> None:
    cohort = Cohort(5, OneShot(4)).until("confirm")
    cohort.stage(gone={1, 2})
    with pytest.raises(TooFewSurvivors):
        cohort.server.close()
    assert cohort.server.stage == ""
    assert cohort.server.outbound() == {}
    with pytest.raises(ProtocolError, match="session is over"):
        cohort.server.close()


def test_boxes_open_for_their_member_session_and_sender_only() -> None:
    roster = roster_of([1, 2, 3])
    people = {node: Identity(node, secret_key(node), roster) for node in roster}
    secret, digest = keys.digest(b"secret"), keys.digest(b"session")
    box = sealing.seal_box(secret, digest, people[1], 2, b"share")
    public = keys.exchange_public(secret)
    assert len(box) == len(b"share") + BOX_BYTES - sharing.SHARE_BYTES
    assert sealing.open_box(box, public, digest, 1, people[2]) == b"share"
    for call in (
        lambda: sealing.open_box(box, public, digest, 1, people[3]),
        lambda: sealing.open_box(box, public, digest, 3, people[2]),
        lambda: sealing.open_box(box, public, keys.digest(b"another"), 1, people[2]),
        lambda: sealing.open_box(box, keys.exchange_public(digest), digest, 1, people[2]),
        lambda: sealing.open_box(box[:-1], public, digest, 1, people[2]),
    ):
        with pytest.raises(RemoteError, match="bad-share"):
            call()


def test_identity_keys_map_to_exchange_keys_as_the_curve_says() -> None:
    """(1 + y) / (1 - y) of the public key is the public key of the hashed secret: two ways to one point."""
    for node in range(1, 20):
        hashed = hashlib.sha512(secret_key(node)).digest()[:32]
        assert sealing.exchange_form(keys.signing_public(secret_key(node))) == keys.exchange_public(hashed)
    for bad in (b"\x01" + bytes(31), b"\xff" * 31 + b"\x7f", bytes(31)):
        with pytest.raises(ProtocolError, match="no Ed25519 public key"):
            sealing.exchange_form(bad)


def test_streams_differ_by_label_secret_and_call() -> None:
    stream = sealing.keystream(b"a", bytes(32))
    parts = [stream(32), stream(32), sealing.keystream(b"b", bytes(32))(32), sealing.keystream(b"a", b"\x01" * 32)(32)]
    assert len(set(parts)) == 4
    assert sealing.keystream(b"a", bytes(32))(64)[:32] == parts[0]
