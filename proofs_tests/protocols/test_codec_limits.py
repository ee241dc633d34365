"""What a decoder refuses at its edges: each case passes silently when its one check is taken out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from privfed.protocols.codec import (
    MAX_ACTION,
    MAX_DIMENSION,
    Reader,
    blob,
    decode,
    encode_session,
    read_session,
    u8,
    u32,
    u64,
)
from privfed.protocols.errors import DecodeError, LocalError, TooFewSurvivors
from privfed.protocols.secagg import messages
from privfed.protocols.secagg.messages import Terms
from privfed.protocols.session import Session
from proofs_tests.protocols.test_secagg_attacks import PASSIVE as FULL
from proofs_tests.protocols.test_secagg_attacks import Lab
from proofs_tests.protocols.test_secagg_sparse import COHORT, PASSIVE, Room

SESSION = Session(1, 2, "train", (3, 4), 5, 16, b"m" * 32)


def test_a_reader_takes_no_more_and_no_less_than_there_is() -> None:
    reader = Reader(b"abc")
    for size in (-1, 4):
        with pytest.raises(DecodeError):
            reader.take(size)
    assert bytes(reader.take(3)) == b"abc"
    with pytest.raises(DecodeError):
        reader.take(1)


def test_a_blob_is_no_longer_than_its_limit() -> None:
    assert bytes(Reader(blob(b"abcd")).blob(4)) == b"abcd"
    with pytest.raises(DecodeError, match="longer than 3"):
        Reader(blob(b"abcd")).blob(3)


def test_a_list_announces_no_more_than_follows() -> None:
    for read in (Reader.nodes, lambda r: r.table(2)):
        with pytest.raises(DecodeError, match="announces"):
            decode(u32(1 << 31) + u64(1), read)


@pytest.mark.parametrize(
    "session",
    [
        replace(SESSION, action="a" * (MAX_ACTION + 1)),
        replace(SESSION, dimension=MAX_DIMENSION + 1),
        replace(SESSION, bits=0),
        replace(SESSION, bits=65),
        replace(SESSION, nodes=()),
    ],
)
def test_a_session_out_of_bounds_is_none(session: Session) -> None:
    with pytest.raises(DecodeError):
        decode(encode_session(session), read_session)
    assert decode(encode_session(SESSION), read_session) == SESSION


def test_terms_have_one_kind_and_two_modes() -> None:
    good = Terms(SESSION, 0, 2, True).encode()
    assert decode(good, Terms.read).active
    for bad in (u8(messages.SHARE) + good[1:], good[:1] + u8(2) + good[2:]):
        with pytest.raises(DecodeError):
            decode(bad, Terms.read)


def test_a_share_is_of_one_of_two_secrets() -> None:
    good = messages.encode_revealed({1: (messages.OF_SELF_SEED, bytes(39))})
    assert decode(good, messages.read_revealed) == {1: (1, bytes(39))}
    with pytest.raises(DecodeError, match="neither"):
        decode(good[:12] + u8(2) + good[13:], messages.read_revealed)


def test_a_finished_session_has_nothing_to_close() -> None:
    lab = Lab(FULL).until("reveal")
    for node, request in lab.requests.items():
        lab.server.receive(node, lab.step(node, request))
    lab.server.close()
    for act in (lab.server.close, lab.server.outbound):
        with pytest.raises(LocalError, match="over"):
            act()


def test_a_sparse_session_that_too_few_shared_in_ends_there() -> None:
    """Five nodes far apart share: none has its four live neighbours."""
    room = Room(PASSIVE, "share")
    replies = room.replies()
    for node in COHORT[::6]:
        room.server.receive(node, replies[node])
    with pytest.raises(TooFewSurvivors) as fault:
        room.server.close()
    assert fault.value.stage == "share"
    assert fault.value.have < fault.value.threshold == 4
