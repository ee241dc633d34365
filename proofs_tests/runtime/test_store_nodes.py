"""What a store knows of nodes that come and go: leases for some nodes, leases held, leases given back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from privfed import Message, RecordDict
from privfed.runtime.store import Holder, Lease, Store
from proofs_tests.runtime.store_case import EPOCH, NAMES, RUN, STORES, close, ids, instruction, running


@pytest.fixture(params=NAMES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    found = running(STORES[request.param](tmp_path))
    yield found
    close(found)


def leased(store: Store, nodes: set[int]) -> Lease:
    lease = store.lease(EPOCH, math.inf, nodes=nodes)
    assert lease is not None and lease.message.metadata.dst_node_id in nodes
    return lease


def reply_to(lease: Lease) -> Message:
    return Message(RecordDict(), reply_to=lease.message)


def test_a_lease_is_for_the_nodes_it_was_asked_for(store: Store) -> None:
    store.push(RUN, [instruction(node) for node in (1, 2, 3)])
    assert store.lease(EPOCH, 5, nodes=set()) is None
    assert leased(store, {2}).message.metadata.dst_node_id == 2
    assert store.lease(EPOCH, 5, nodes={2}) is None
    assert {leased(store, {1, 3}).message.metadata.dst_node_id for _ in range(2)} == {1, 3}


def test_a_token_names_its_node_until_it_is_lost_and_says_whether_it_counted(store: Store) -> None:
    message = instruction(2)
    store.push(RUN, [message])
    lease = leased(store, {2})
    (message_id,) = ids(message)
    assert store.holder(lease.token) == Holder(RUN, 2, message_id, False)
    assert store.holder("x" * 32) is None
    assert store.complete(lease.token, reply_to(lease), None) == message_id
    assert store.holder(lease.token) == Holder(RUN, 2, message_id, True)
    store.pull(RUN, [message_id])
    assert store.holder(lease.token) == Holder(RUN, 2, message_id, True)
    # Attempted again: who did not hear that it was counted must hear it then, or would undo what is in a round.
    store.set_run_state(RUN, "stopped")
    store.set_run_state(RUN, "running")
    assert store.holder(lease.token) == Holder(RUN, 2, message_id, True)
    store.set_run_state(RUN, "completed")
    assert store.holder(lease.token) is None


@pytest.mark.parametrize("end", ["forget", "stop", "expire"])
def test_a_token_of_a_task_that_is_gone_is_lost(store: Store, end: str) -> None:
    message = instruction(2, ttl=10.0)
    store.push(RUN, [message])
    lease = leased(store, {2})
    if end == "forget":
        store.forget(RUN, ids(message))
    elif end == "stop":
        store.set_run_state(RUN, "stopped")
    else:
        store.expire(EPOCH + 11)
    assert store.holder(lease.token) is None
    assert store.complete(lease.token, reply_to(lease), None) is None


def test_a_node_that_comes_back_keeps_what_it_holds_and_gives_back_the_rest(store: Store) -> None:
    other = RUN + 1
    store.create_run(other, [1, 2])
    store.set_run_state(other, "running")
    store.push(RUN, [instruction(1), instruction(2)])
    store.push(other, [instruction(1).with_metadata(run_id=other)])
    mine = [leased(store, {1}), leased(store, {1})]
    theirs = leased(store, {2})
    assert store.release(1, [mine[0].token]) == 1
    assert store.holder(mine[1].token) is None and store.holder(mine[0].token) is not None
    assert store.holder(theirs.token) is not None
    again = leased(store, {1})
    assert again.message.metadata.message_id == mine[1].message.metadata.message_id
    assert again.token != mine[1].token
    assert store.complete(mine[1].token, reply_to(mine[1]), None) is None
    assert store.release(1) == 2 and store.release(1) == 0 and store.release(9) == 0


def test_what_was_withdrawn_while_it_was_out_does_not_come_back(store: Store) -> None:
    message = instruction(1)
    store.push(RUN, [message])
    leased(store, {1})
    store.forget(RUN, ids(message))
    store.release(1)
    assert store.lease(EPOCH, 5) is None
