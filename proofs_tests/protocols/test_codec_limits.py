"""What a decoder refuses at its edges: each case passes silently when its one check is taken out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privfed.protocols.codec import (
    MAX_ACTION,
    MAX_DIMENSION,
    MAX_NODE,
    Reader,
    blob,
    decode,
    encode_session,
    read_session,
    table,
    u8,
    u32,
    u64,
)
from privfed.protocols.errors import DecodeError, LocalError, RemoteError, TooFewSurvivors
from privfed.protocols.secagg import messages
from privfed.protocols.secagg.messages import Terms
from privfed.protocols.session import Session
from proofs_tests.protocols.secagg_lab import PASSIVE as FULL
from proofs_tests.protocols.secagg_lab import Lab
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


@given(st.dictionaries(st.integers(1, MAX_NODE), st.binary(min_size=5, max_size=5)))
def test_rows_are_what_a_table_holds(rows: dict[int, bytes]) -> None:
    raw = table(rows.items())
    assert dict(decode(raw, lambda r: r.rows("5s"))) == rows == decode(raw, lambda r: r.table(5))


@pytest.mark.parametrize("nodes", [(0,), (2, 1), (1, 1), (1, 2, 2), (MAX_NODE + 1,)])
def test_rows_of_nodes_that_do_not_ascend_are_none(nodes: tuple[int, ...]) -> None:
    raw = u32(len(nodes)) + b"".join(u64(node) + b"x" for node in nodes)
    with pytest.raises(DecodeError, match="ascending"):
        decode(raw, lambda r: r.rows("s"))


def test_rows_that_are_announced_and_missing_are_none() -> None:
    with pytest.raises(DecodeError, match="too short"):
        decode(u32(2) + u64(1) + b"x", lambda r: r.rows("s"))


def test_a_masked_vector_has_zeros_before_it() -> None:
    lab = Lab(FULL).until("mask")
    reply = bytes(lab.step(1, lab.requests[1]))
    for place in range(33, 40):
        with pytest.raises(RemoteError, match="not zero"):
            lab.server.receive(1, reply[:place] + b"\1" + reply[place + 1 :])
    lab.server.receive(1, reply)


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
