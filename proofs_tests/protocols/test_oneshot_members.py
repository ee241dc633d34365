"""Nodes that deviate, seen from the server: bad shares, garbage ciphertexts, replies out of turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from privfed.protocols import keys
from privfed.protocols.errors import ProtocolError, RemoteError, TooFewSurvivors
from privfed.protocols.oneshot import OneShot, committee, packing, ring, sealing, sharing
from privfed.protocols.oneshot.messages import BOX_BYTES, Contribution, Kept, Share
from proofs_tests.protocols.oneshot_cohort import Cohort, refuses

# --- nodes that deviate, seen from the server


def test_replies_come_once_from_those_asked_and_in_time() -> None:
    cohort = Cohort(5, OneShot(3, committee=(1, 2, 3, 4)))
    replies = {node: cohort.answer(node, request) for node, request in cohort.server.outbound().items()}
    refuses("unexpected-reply", {99}, lambda: cohort.server.receive(99, replies[1]))
    for node in (1, 2, 3, 5):
        cohort.server.receive(node, replies[node])
        refuses("second-reply", {node}, partial(cohort.server.receive, node, replies[node]))
    cohort.server.close()
    refuses("unexpected-reply", {4}, lambda: cohort.server.receive(4, replies[4]))
    refuses("unexpected-reply", {5}, lambda: cohort.server.receive(5, replies[5]))
    refuses("malformed-reply", {1}, lambda: cohort.server.receive(1, replies[1]))
    said = cohort.stage()
    refuses("second-reply", {1}, lambda: cohort.server.receive(1, said[1][1]))
    cohort.server.close()
    said = cohort.stage()
    refuses("second-reply", {1}, lambda: cohort.server.receive(1, said[1][1]))
    cohort.server.close()
    refuses("unexpected-reply", {1}, lambda: cohort.server.receive(1, said[1][1]))
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
    refuses("inconsistent-shares", {liar} if named else set(), cohort.server.close)
    assert cohort.server.result is None


@pytest.mark.parametrize("liar", [1, 3, 5, 6])
def test_the_least_flip_with_no_share_to_spare_still_releases_nothing(liar: int) -> None:
    """A flip by one may leave the opened secret small; then what it decrypts is not noise."""
    cohort = Cohort(6, OneShot(4)).until("open")
    cohort.stage(gone={2, 4}, reply=flip_share(liar, by=1))
    with pytest.raises(RemoteError, match=r"inconsistent-shares|garbage-ciphertext"):
        cohort.server.close()
    assert cohort.server.result is None


def test_a_share_of_another_polynomial_is_noticed() -> None:
    """Node 2 gives node 1 a share off its polynomial: the committee's answers disagree."""
    cohort = Cohort(5, OneShot(3))
    agreement, identity = cohort.protocol.agree(cohort.session), cohort.identities[2]
    secret = keys.digest(b"session key of node 2")

    def lie(node: int, reply: bytes) -> bytes:
        if node != 2:
            return reply
        honest = Contribution.decode(reply, agreement.ciphertext_bytes, 4)
        boxes = []
        for place, member in enumerate((1, 3, 4, 5)):
            box = honest.boxes[BOX_BYTES * place : BOX_BYTES * (place + 1)]
            text = sealing.open_box(box, honest.header.public_key, agreement.digest, 2, cohort.identities[member])
            if member == 1:
                text = sharing.to_wire(np.arange(ring.N) % sharing.PRIME)
            boxes.append(sealing.seal_box(secret, agreement.digest, identity, member, text))
        header = committee.sign_header(agreement.digest, identity, keys.exchange_public(secret))
        return replace(honest, header=header, boxes=b"".join(boxes)).encode()

    cohort.stage(reply=lie)
    # Node 2 itself confirms what it sent, as a liar does.
    state = Kept.decode(cohort.kept[2])
    sent = committee.sign_header(agreement.digest, identity, keys.exchange_public(secret))
    cohort.kept[2] = replace(state, header=sent.encode()).encode()
    cohort.server.close()
    cohort.stage()
    cohort.server.close()
    cohort.stage()
    refuses("inconsistent-shares", {1}, cohort.server.close)


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
    refuses("inconsistent-shares", set(), lambda: sharing.combine(answers, 2, (1, 2), 1))
    assert size == 12336


@pytest.mark.parametrize("n", [2, 100, 1010])
def test_what_is_too_loud_for_noise_is_garbage_even_within_its_bound(n: int) -> None:
    """Each entry may be large, all of them together may not: half the bound everywhere is 12 times the mean square."""
    bound = packing.noise_bound(n)
    honest = np.rint(np.random.default_rng(n).normal(0, 6.4 * n**0.5, (3, ring.N))).astype(np.int64)
    assert packing.is_noise(honest, n)
    spiked = honest.copy()
    spiked[1, 7] = bound
    assert packing.is_noise(spiked, n)
    spiked[1, 7] = -bound - 1
    assert not packing.is_noise(spiked, n)
    loud = honest.copy()
    loud[2] = bound // 2
    assert not packing.is_noise(loud, n)


def test_after_too_few_survivors_nothing_is_opened() -> None:
    cohort = Cohort(5, OneShot(4)).until("confirm")
    cohort.stage(gone={1, 2})
    with pytest.raises(TooFewSurvivors):
        cohort.server.close()
    assert cohort.server.stage == ""
    assert cohort.server.outbound() == {}
    with pytest.raises(ProtocolError, match="session is over"):
        cohort.server.close()
