"""Buffered aggregation: exact weighted sums of stale updates, and a holder that opens each mask at most once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.protocols.errors import LocalError, RemoteError, TooFewSurvivors
from privfed.protocols.lightsecagg import buffered, messages
from privfed.protocols.lightsecagg.exact import Words
from privfed.protocols.session import Buffer
from proofs_tests.protocols.buffered_run import BINDINGS, TERMS, Run, expected, filled, refusal, update


def test_two_buffers_with_stale_updates_and_the_least_of_holders() -> None:
    run = Run()
    for node, version in ((1, 3), (2, 5), (4, 4)):
        run.contribute(node, version)
    assert run.server.waiting == {1: 3, 2: 5, 4: 4} and run.server.ready(5) and not run.server.ready(6)
    found = run.buffer(5, open={1, 2, 3, 5})
    np.testing.assert_array_equal(found.total, expected({1: 3, 2: 5, 4: 4}, 5))
    assert (found.weights, found.denominator) == ({1: 2, 2: 8, 4: 4}, 14)
    for node, version in ((1, 5), (3, 6), (5, 6), (2, 7)):
        run.contribute(node, version)
    found = run.buffer(6, confirm={1, 2, 3, 4})
    np.testing.assert_array_equal(found.total, expected({1: 5, 3: 6, 5: 6}, 6))
    assert run.server.waiting == {2: 7}  # trained ahead of this buffer: it waits


@settings(max_examples=15, deadline=None)
@given(st.dictionaries(st.sampled_from(TERMS.nodes), st.integers(0, 2), min_size=3), st.data())
def test_any_buffer_and_any_holders(staleness: dict[int, int], data: st.DataObject) -> None:
    run = Run()
    members = {node: 9 - behind for node, behind in staleness.items()}
    for node, version in members.items():
        run.contribute(node, version)
    holders = set(data.draw(st.permutations(TERMS.nodes))[: data.draw(st.integers(3, 5))])
    if len(holders) < TERMS.threshold:
        with pytest.raises(TooFewSurvivors):
            run.buffer(9, open=holders)
    else:
        np.testing.assert_array_equal(run.buffer(9, open=holders).total, expected(members, 9))


def test_too_few_updates_or_signatures_open_nothing() -> None:
    run = Run()
    run.contribute(1, 1)
    run.contribute(2, 1)
    with pytest.raises(TooFewSurvivors) as caught:
        run.server.begin(1)
    assert (caught.value.have, caught.value.threshold) == (2, 3)
    run.contribute(3, 1)
    with pytest.raises(TooFewSurvivors) as caught:
        run.buffer(1, confirm={1, 2, 3})
    assert (caught.value.have, caught.value.threshold, caught.value.stage) == (3, 4, "confirm")


def rewrite(request: Buffer, current: int | None = None, **change: object) -> bytes:
    """The same buffer with another version, or with its first entry changed."""
    digest = bytes(memoryview(request)[1:33])
    at, entries = messages.body(request, buffered.BUFFER, digest, buffered.read_buffer)
    entries = (replace(entries[0], **change), *entries[1:])  # type: ignore[arg-type]  # names checked by replace
    return messages.sealed(buffered.BUFFER, digest, buffered.listing(at if current is None else current, entries))


def test_a_staleness_the_node_did_not_sign_is_refused() -> None:
    run, request = filled()
    assert refusal(run, rewrite(request, version=1)) == "bad-signature"
    assert refusal(run, rewrite(request, binding=bytes(32))) == "bad-signature"


def test_versions_beyond_the_table_or_in_the_future_are_refused() -> None:
    run, request = filled()
    assert refusal(run, rewrite(request, current=5)) == "too-stale"
    assert refusal(run, rewrite(request, current=1)) == "too-stale"


def test_a_foreign_node_and_a_small_buffer_are_refused() -> None:
    run, request = filled()
    digest = bytes(request[1:33])
    current, entries = messages.body(request, buffered.BUFFER, digest, buffered.read_buffer)

    def listing(rows: tuple[tuple[int, bytes], ...]) -> bytes:
        number = current.to_bytes(8, "big")
        return messages.sealed(buffered.BUFFER, digest, number, messages.encode_table(rows))

    rows = tuple((entry.node, entry.encode()) for entry in entries)
    assert refusal(run, listing((*rows, (9, rows[0][1])))) == "foreign-node"
    assert refusal(run, listing(rows[:2])) == "cohort-too-small"
    assert refusal(run, listing((rows[0], rows[0], rows[1]))) == "malformed-request"


def test_a_mask_is_opened_once_even_in_another_buffer() -> None:
    run, request = filled()
    run.confirm(5, request)
    assert refusal(run, request) == "version-not-rising"
    assert refusal(run, rewrite(request, current=3)) == "opened-before"


def test_a_holder_opens_only_what_it_signed_and_once() -> None:
    run, request = filled()
    for node in (1, 2, 3, 4):
        run.confirm(node, request)
    asked = run.server.ask()
    assert refusal(run, asked[4], node=5, step="open") == "unconfirmed-buffer"
    run.open(4, asked[4])
    assert refusal(run, asked[4], node=4, step="open") == "unconfirmed-buffer"


def parts(request: Buffer) -> tuple[bytes, bytes, messages.Table, messages.Table]:
    """An open request taken apart: head with listing, listing alone, signatures, shares."""
    digest, size = bytes(memoryview(request)[1:33]), TERMS.sealed_size
    (current, entries), signed, shares = messages.body(
        request,
        buffered.OPEN,
        digest,
        lambda r: (buffered.read_buffer(r), r.table(messages.SIGNATURE), r.table(size)),
    )
    return digest, buffered.listing(current, entries), signed, shares


def test_signatures_and_shares_are_checked_before_opening() -> None:
    run, request = filled()
    for node in (1, 2, 3, 4, 5):
        run.confirm(node, request)
    digest, listing, signed, shares = parts(run.server.ask()[5])

    def asked(signed: messages.Table, shares: messages.Table) -> bytes:
        tables = (messages.encode_table(signed.items()), messages.encode_table(shares.items()))
        return messages.sealed(buffered.OPEN, digest, listing, *tables)

    def judged(signed: messages.Table, shares: messages.Table) -> str:
        return refusal(run, asked(signed, shares), step="open")

    assert judged({**signed, 1: signed[2]}, shares) == "split-buffer"
    assert judged({node: signed[node] for node in (1, 2, 3)}, shares) == "too-few-confirmations"
    assert judged({**signed, 8: signed[1]}, shares) == "foreign-node"
    assert judged(signed, {node: shares[node] for node in (1, 2)}) == "wrong-shares"
    assert judged(signed, {**shares, 1: shares[2]}) == "bad-share"
    assert refusal(run, asked(signed, shares) + b"\0", step="open") == "malformed-request"
    run.open(5, asked(signed, shares))


def test_the_server_names_nodes_that_break_a_rule() -> None:
    run = Run()
    message = run.contribute(1, 2)
    for broken, name in (
        (message[:-1], "malformed-reply"),
        (message + b"\0", "malformed-reply"),
        (message, "version-not-rising"),
    ):
        with pytest.raises(RemoteError, match=f"{name} by node 1"):
            run.server.contribute(1, broken)
    with pytest.raises(RemoteError, match="wrong-shares by node 2"):
        run.server.contribute(2, message)
    _, other = run.nodes[2].contribute(run.kept[2], 2, BINDINGS[2], update(2, 2))
    with pytest.raises(RemoteError, match="bad-signature by node 2"):
        run.server.contribute(2, other[:80] + bytes([other[80] ^ 1]) + other[81:])
    with pytest.raises(RemoteError, match="foreign-node by node 9"):
        run.server.contribute(9, message)
    run.contribute(2, 2)
    run.contribute(3, 2)
    requests = run.server.begin(2)
    _, signature = run.nodes[1].confirm(run.kept[1], requests[1])
    with pytest.raises(RemoteError, match="bad-confirmation by node 2"):
        run.server.confirmed(2, signature)
    with pytest.raises(RemoteError, match="foreign-node by node 1"):
        run.server.opened(1, signature)


def test_a_wrong_share_sum_is_noticed_when_more_than_the_threshold_answer() -> None:
    run, request = filled()
    for node in TERMS.nodes:
        run.confirm(node, request)
    for node, asked in run.server.ask().items():
        _, message = run.nodes[node].open(run.kept[node], asked)
        run.server.opened(node, message if node != 3 else message[:-1] + bytes([message[-1] ^ 1]))
    with pytest.raises(RemoteError, match="inconsistent-shares"):
        run.server.finish()


@pytest.mark.parametrize(
    "bad", [np.zeros(8, np.uint32), np.zeros(9, np.int32), np.full(9, 1 << 32, np.uint64)], ids=str
)
def test_updates_that_are_no_ring_vectors_are_the_callers_mistake(bad: Words) -> None:
    with pytest.raises(LocalError, match="update"):
        Run().contribute(1, 1, bad)


def test_buffers_move_forward_and_answers_do_not_change() -> None:
    run, request = filled()
    for node in TERMS.nodes:
        run.confirm(node, request)
    for node, asked in run.server.ask().items():
        run.kept[node], message = run.nodes[node].open(run.kept[node], asked)
        run.server.opened(node, message)
        run.server.opened(node, message)  # the same again changes nothing
        with pytest.raises(RemoteError, match=f"second-reply by node {node}"):
            run.server.opened(node, message[:-1] + bytes([message[-1] ^ 1]))
    np.testing.assert_array_equal(run.server.finish().total, expected({1: 2, 2: 2, 3: 2}, 2))
    for node in (1, 2, 3):
        run.contribute(node, 3)
    with pytest.raises(LocalError, match="version must exceed 2"):
        run.server.begin(2)
    np.testing.assert_array_equal(run.buffer(4).total, expected({1: 3, 2: 3, 3: 3}, 4))
