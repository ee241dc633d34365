"""The one-shot protocol's messages, shares, boxes and streams: one encoding each, and oracles for the arithmetic."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.protocols import keys
from privfed.protocols.errors import DecodeError, LocalError, ProtocolError, RemoteError
from privfed.protocols.oneshot import OneShot, ring, sealing, sharing
from privfed.protocols.oneshot.messages import (
    BOX_BYTES,
    Bundle,
    Contribution,
    Invitation,
    Kept,
    Quorum,
    Share,
    Signature,
)
from privfed.protocols.session import Identity
from proofs_tests.protocols.oneshot_cohort import Cohort, roster_of, secret_key


def encodings() -> dict[str, tuple[bytes, Callable[[bytes], Any]]]:
    """One honest message of each kind, and how its receiver decodes it."""
    cohort = Cohort(4, OneShot(3))
    agreed = cohort.protocol.agree(cohort.session)
    sent = cohort.stage()
    cohort.server.close()
    kept = cohort.kept[1]
    confirmed = cohort.stage()
    cohort.server.close()
    opened = cohort.stage()
    return {
        "invitation": (sent[1][0], Invitation.decode),
        "contribution": (sent[1][1], lambda wire: Contribution.decode(wire, agreed.ciphertext_bytes, 3)),
        "bundle": (confirmed[1][0], lambda wire: Bundle.decode(wire, 1)),
        "signature": (confirmed[1][1], Signature.decode),
        "quorum": (opened[1][0], Quorum.decode),
        "share": (opened[1][1], Share.decode),
        "kept": (kept, Kept.decode),
    }


ENCODINGS = encodings()


@pytest.mark.parametrize("kind", ENCODINGS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_whatever_decodes_has_one_encoding(kind: str, data: st.DataObject) -> None:
    """Edited and arbitrary bytes: a DecodeError, or a message that encodes to the very same bytes."""
    honest, decode = ENCODINGS[kind]
    wire = bytearray(honest if data.draw(st.booleans()) else honest[:8] + data.draw(st.binary(max_size=300)))
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, min(len(wire) - 1, 300)))
        wire[at] = data.draw(st.integers(0, 255))
    try:
        message = decode(bytes(wire))
    except DecodeError:
        return
    assert message.encode() == bytes(wire)
    assert decode(honest).encode() == honest


def test_a_node_recognises_its_own_state_only() -> None:
    cohort = Cohort(3, OneShot(2)).until("confirm")
    request, kept = cohort.server.outbound()[1], cohort.kept[1]
    for bad in (kept[:-1], kept + b"x", b"x" + kept, kept[:8] + b"\x03" + kept[9:]):
        cohort.kept[1] = bad
        with pytest.raises(LocalError, match="no state of this protocol"):
            cohort.answer(1, request)


def test_shares_of_any_residues_survive_the_wire() -> None:
    generator = np.random.default_rng(2)
    for share in (
        generator.integers(0, sharing.PRIME, ring.N),
        np.zeros(ring.N, dtype=np.int64),
        np.full(ring.N, sharing.PRIME - 1),
    ):
        wire = sharing.to_wire(share)
        assert len(wire) == sharing.SHARE_BYTES == 5376
        assert np.array_equal(sharing.from_wire(wire), share)
        share[9] = sharing.PRIME
        with pytest.raises(DecodeError, match="beyond the prime"):
            sharing.from_wire(sharing.to_wire(share))
    for size in (0, 5375, 5377):
        with pytest.raises(DecodeError, match="5376 bytes"):
            sharing.from_wire(bytes(size))


@given(st.integers(2, 12), st.data())
@settings(max_examples=15, deadline=None)
def test_any_threshold_of_members_opens_what_plain_lagrange_opens(threshold: int, data: st.DataObject) -> None:
    """Against interpolation with Python integers; the members need not be the first ones."""
    members = data.draw(st.integers(threshold, 15))
    nodes = [10 * node for node in range(1, members + 1)]
    answering = sorted(data.draw(st.permutations(nodes))[: data.draw(st.integers(threshold, members))])
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    secret = generator.integers(-85, 86, ring.N).astype(np.int8)
    shares = sharing.split(secret, threshold, members, generator.bytes)
    answers = {node: shares[node // 10 - 1] for node in answering}
    assert np.array_equal(sharing.combine(answers, threshold, nodes, 1), secret)
    points = [node // 10 for node in answering[:threshold]]
    total = 0
    for x in points:
        weight = 1
        for y in points:
            if y != x:
                weight = weight * -y * pow(x - y, -1, sharing.PRIME) % sharing.PRIME
        total += weight * int(shares[x - 1, 0])
    assert total % sharing.PRIME == int(secret[0]) % sharing.PRIME


def test_boxes_open_for_their_member_session_and_sender_only() -> None:
    roster = roster_of([1, 2, 3])
    people = {node: Identity(node, secret_key(node), roster) for node in roster}
    secret, digest = keys.digest(b"secret"), keys.digest(b"session")
    box = sealing.seal_box(secret, digest, people[1], 2, b"share")
    public = keys.exchange_public(secret)
    assert len(box) == len(b"share") + BOX_BYTES - sharing.SHARE_BYTES
    assert sealing.open_box(box, public, digest, 1, people[2]) == b"share"
    calls: tuple[Callable[[], bytes], ...] = (
        lambda: sealing.open_box(box, public, digest, 1, people[3]),
        lambda: sealing.open_box(box, public, digest, 3, people[2]),
        lambda: sealing.open_box(box, public, keys.digest(b"another"), 1, people[2]),
        lambda: sealing.open_box(box, keys.exchange_public(digest), digest, 1, people[2]),
        lambda: sealing.open_box(box[:-1], public, digest, 1, people[2]),
    )
    for call in calls:
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
