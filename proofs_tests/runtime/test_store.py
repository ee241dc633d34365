"""One suite for every store: what a Link may rely on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from privfed import Array, ArrayRecord, ErrorCode, Message, RecordDict
from privfed.runtime.sqlstore import LARGE, SqlStore
from privfed.runtime.store import Lease, NodeState, Store, StoreError
from proofs_tests.runtime.store_case import EPOCH, NAMES, RUN, STORES, close, ids, instruction, running, state


@pytest.fixture(params=NAMES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    found = running(STORES[request.param](tmp_path))
    yield found
    close(found)


def leased(store: Store, now: float = EPOCH, seconds: float = 50.0) -> Lease:
    lease = store.lease(now, seconds)
    assert lease is not None
    return lease


def reply_to(lease: Lease) -> Message:
    return Message(RecordDict(), reply_to=lease.message)


def test_a_task_goes_out_once_and_comes_back_once(store: Store) -> None:
    message = instruction(2, mark=7)
    assert store.push(RUN, [message]) == []
    assert not store.arrived(RUN, ids(message))
    lease = leased(store)
    assert lease.message.metadata == message.metadata
    assert lease.message.content == message.content
    assert lease.expires_at == EPOCH + 50
    assert store.lease(EPOCH, 50) is None
    assert store.complete(lease.token, reply_to(lease), None) == message.metadata.message_id
    assert store.complete(lease.token, reply_to(lease), None) is None
    assert store.arrived(RUN, ids(message))
    assert store.arrived(RUN, {*ids(message), "other"})
    (reply,) = store.pull(RUN, [*ids(message), *ids(message), "other"])
    assert reply.metadata.reply_to_message_id == message.metadata.message_id
    assert store.pull(RUN, ids(message)) == []
    assert not store.arrived(RUN, ids(message))


def test_tasks_of_a_node_go_out_one_at_a_time_in_order_with_its_state(store: Store) -> None:
    first, second, elsewhere = instruction(1, mark=1), instruction(1, mark=2), instruction(3, mark=3)
    store.push(RUN, [first, second, elsewhere])
    taken = {lease.message.metadata.dst_node_id: lease for lease in (leased(store), leased(store))}
    assert sorted(taken) == [1, 3]
    assert store.lease(EPOCH, 50) is None
    assert taken[1].message.content == first.content
    assert store.complete(taken[1].token, reply_to(taken[1]), state(4)) is not None
    after = leased(store)
    assert after.message.content == second.content
    assert after.state == state(4)
    assert store.state(RUN, 3) == NodeState()
    assert store.states(RUN) == {1: state(4)}


def test_what_a_worker_does_to_its_state_counts_only_with_its_reply(store: Store) -> None:
    store.put_states(RUN, {1: state(1)})
    store.push(RUN, [instruction(1), instruction(1)])
    lease = leased(store)
    lease.state.app.clear()
    lease.state.mods["mod"]["c"]["mark"] = 99
    assert store.state(RUN, 1) == state(1)
    assert store.complete(lease.token, reply_to(lease), None) is not None
    assert leased(store).state == state(1)


def test_a_lost_lease_goes_out_again_and_its_first_holder_changes_nothing(store: Store) -> None:
    message = instruction(1)
    store.push(RUN, [message, instruction(1, mark=1)])
    lost = leased(store, seconds=10)
    assert store.expire(EPOCH + 9.99) == []
    assert store.lease(EPOCH + 9.99, 10) is None
    assert store.expire(EPOCH + 10) == []
    again = leased(store, EPOCH + 10)
    assert again.message.metadata.message_id == message.metadata.message_id
    assert again.token != lost.token
    assert store.complete(lost.token, reply_to(lost), state(1)) is None
    assert store.state(RUN, 1) == NodeState()
    assert not store.arrived(RUN, ids(message))
    assert store.complete(again.token, reply_to(again), state(2)) is not None
    assert len(store.pull(RUN, ids(message))) == 1


def test_the_next_deadline_is_not_missed(store: Store) -> None:
    assert store.next_deadline() == math.inf
    store.push(RUN, [instruction(1, ttl=30), instruction(2, ttl=20)])
    assert store.next_deadline() == EPOCH + 20
    leased(store, seconds=5)
    assert store.next_deadline() == EPOCH + 5
    store.expire(EPOCH + 5)
    assert EPOCH + 5 < store.next_deadline() <= EPOCH + 20


def test_an_endless_lease_never_lapses(store: Store) -> None:
    store.push(RUN, [instruction(1, ttl=1e9)])
    lease = leased(store, seconds=math.inf)
    assert store.expire(EPOCH + 1e8) == []
    assert store.complete(lease.token, reply_to(lease), None) is not None


@pytest.mark.parametrize("out", [False, True])
def test_an_overdue_task_is_answered_with_an_error_whether_out_or_not(store: Store, out: bool) -> None:
    message, later = instruction(1, ttl=10), instruction(1, ttl=20)
    store.push(RUN, [message, later])
    lease = leased(store) if out else None
    assert store.expire(EPOCH + 9.99) == []
    assert store.expire(EPOCH + 10) == ids(message)
    (reply,) = store.pull(RUN, ids(message))
    assert reply.error.code == ErrorCode.MESSAGE_UNAVAILABLE
    assert reply.metadata.reply_to_message_id == message.metadata.message_id
    # The node does not wait for a worker whose task is over.
    assert leased(store, EPOCH + 10).message.metadata.message_id == later.metadata.message_id
    if lease is not None:
        assert store.complete(lease.token, reply_to(lease), state(1)) is None
        assert store.state(RUN, 1) == NodeState()


def test_an_overdue_task_is_not_handed_out_even_before_it_is_answered(store: Store) -> None:
    store.push(RUN, [instruction(1, ttl=10), instruction(1, ttl=20, mark=2)])
    assert leased(store, EPOCH + 10).message.content == instruction(1, mark=2).content


def test_a_withdrawn_task_is_not_handed_out_and_its_reply_is_dropped(store: Store) -> None:
    waiting, out, done, other = (instruction(node) for node in (1, 2, 3, 1))
    store.push(RUN, [out])
    lease = leased(store)
    store.push(RUN, [done])
    finished = leased(store)
    store.complete(finished.token, reply_to(finished), None)
    store.push(RUN, [waiting, other, instruction(2, mark=8)])
    store.forget(RUN, [*ids(waiting, out, done), "unknown"])
    assert leased(store).message.metadata.message_id == other.metadata.message_id
    # The node of a withdrawn task that is out stays taken until the worker is done.
    assert store.lease(EPOCH, 50) is None
    assert store.complete(lease.token, reply_to(lease), state(1)) is None
    assert leased(store).message.content == instruction(2, mark=8).content
    assert store.state(RUN, 2) == NodeState()
    assert store.pull(RUN, ids(waiting, out, done)) == []


@pytest.mark.parametrize("out", [False, True])
def test_a_withdrawn_task_is_not_answered_when_it_is_overdue_and_its_node_is_free_when_its_lease_is(
    store: Store, out: bool
) -> None:
    message = instruction(1, ttl=10)
    store.push(RUN, [message])
    if out:
        leased(store, seconds=20)
    store.forget(RUN, ids(message))
    assert store.expire(EPOCH + 15) == []
    assert store.pull(RUN, ids(message)) == []
    store.push(RUN, [instruction(1, mark=4)])
    assert (store.lease(EPOCH + 15, 50) is None) == out
    assert store.expire(EPOCH + 20) == []
    if out:
        assert leased(store, EPOCH + 20).message.content == instruction(1, mark=4).content


def test_an_instruction_sent_again_after_it_was_withdrawn_is_a_task_of_its_own(store: Store) -> None:
    message = instruction(1)
    store.push(RUN, [message])
    lease = leased(store)
    store.forget(RUN, ids(message))
    store.push(RUN, [message])
    assert store.complete(lease.token, reply_to(lease), state(1)) is None
    assert not store.arrived(RUN, ids(message))
    again = leased(store)
    assert again.state == NodeState()
    assert store.complete(again.token, reply_to(again), None) == message.metadata.message_id
    assert len(store.pull(RUN, ids(message))) == 1


def test_an_unknown_node_is_answered_at_once(store: Store) -> None:
    message = instruction(9)
    assert store.push(RUN, [message]) == ids(message)
    (reply,) = store.pull(RUN, ids(message))
    assert reply.error.code == ErrorCode.NODE_UNAVAILABLE
    assert store.lease(EPOCH, 50) is None


def test_runs_follow_their_states_and_take_their_tasks_with_them(store: Store) -> None:
    queued, out, done = (instruction(node) for node in (1, 2, 3))
    store.push(RUN, [done])
    lease = leased(store)
    store.complete(lease.token, reply_to(lease), state(3))
    store.push(RUN, [out])
    lease = leased(store)
    store.push(RUN, [queued])
    store.set_run_state(RUN, "stopped", "asked")
    info = store.run(RUN)
    assert (info.run_id, info.state, info.reason) == (RUN, "stopped", "asked")
    assert store.lease(EPOCH, 50) is None
    assert store.complete(lease.token, reply_to(lease), state(2)) is None
    with pytest.raises(StoreError, match="stopped"):
        store.push(RUN, [instruction(1)])
    store.set_run_state(RUN, "running")
    assert store.lease(EPOCH, 50) is None
    assert store.pull(RUN, ids(queued, out, done)) == []
    assert store.states(RUN) == {3: state(3)}
    store.set_run_state(RUN, "completed")
    for after in ("running", "failed", "pending", "unknown"):
        with pytest.raises(StoreError):
            store.set_run_state(RUN, after)
    assert [info.state for info in store.runs()] == ["completed"]


def test_runs_are_apart(store: Store) -> None:
    store.create_run(6, [2, 4])
    store.set_run_state(6, "running")
    here, there = instruction(2), instruction(2).with_metadata(run_id=6)
    store.push(RUN, [here])
    store.push(6, [there])
    assert list(store.nodes(RUN)) == [1, 2, 3]
    assert list(store.nodes(6)) == [2, 4]
    lease = store.lease(EPOCH, 50, run_id=6)
    assert lease is not None
    assert lease.message.metadata.run_id == 6
    store.complete(lease.token, reply_to(lease), state(1))
    assert store.pull(RUN, ids(there)) == []
    assert store.states(RUN) == {}
    store.set_run_state(6, "failed", "why")
    assert leased(store).message.metadata.run_id == RUN
    assert [info.run_id for info in store.runs()] == [RUN, 6]


def test_mistakes_are_refused_and_named(store: Store) -> None:
    message = instruction(1)
    store.push(RUN, [message])
    for refused, why in (
        (lambda: store.push(RUN, [message]), "already"),
        (lambda: store.create_run(RUN, [1]), "exists"),
        (lambda: store.run(99), "no run 99"),
        (lambda: store.push(99, []), "no run 99"),
        (lambda: store.pull(99, []), "no run 99"),
        (lambda: store.put_states(RUN, {9: state(1)}), "no node 9"),
    ):
        with pytest.raises(StoreError, match=why):
            refused()


def test_a_refused_push_queues_nothing(tmp_path: Path) -> None:
    store = running(SqlStore(tmp_path))
    known = instruction(1)
    store.push(RUN, [known])
    with pytest.raises(StoreError):
        store.push(RUN, [instruction(2), known])
    assert leased(store).message.metadata.message_id == known.metadata.message_id
    assert store.lease(EPOCH, 50) is None
    store.close()


def weights(mark: int, size: int = LARGE // 4) -> ArrayRecord:
    return ArrayRecord({"w": Array(np.full(size, mark, np.float32)), "small": Array(np.arange(mark + 2))})


def files(path: Path) -> list[Path]:
    return sorted(one for one in (path / "arrays").rglob("*") if one.is_file() and one.name != "marker")


def test_sqlite_keeps_everything_across_a_restart(tmp_path: Path) -> None:
    first = SqlStore(tmp_path)
    running(first)
    message = Message(RecordDict({"a": weights(1)}), 1, "train", ttl=100).with_metadata(created_at=EPOCH, run_id=RUN)
    first.push(RUN, [message, instruction(2)])
    lease = leased(first)
    first.complete(
        lease.token, Message(RecordDict({"a": weights(2)}), reply_to=message), NodeState(RecordDict({"a": weights(3)}))
    )
    held = leased(first)
    first.close()
    second = SqlStore(tmp_path)
    assert second.run(RUN).state == "running"
    assert second.states(RUN) == {1: NodeState(RecordDict({"a": weights(3)}))}
    (reply,) = second.pull(RUN, ids(message))
    assert reply.content == RecordDict({"a": weights(2)})
    assert second.complete(held.token, reply_to(held), None) is not None
    second.close()


def test_sqlite_keeps_one_model_sent_to_many_nodes_once_and_drops_it_with_its_last_use(tmp_path: Path) -> None:
    store = SqlStore(tmp_path)
    running(store, nodes=10)
    content = RecordDict({"a": weights(1)})
    sent = [Message(content, node, "train").with_metadata(run_id=RUN) for node in range(1, 11)]
    store.push(RUN, sent)
    assert [file.stat().st_size for file in files(tmp_path)] == [LARGE]
    for message in sent[:9]:
        store.forget(RUN, ids(message))
    assert len(files(tmp_path)) == 1
    lease = leased(store, now=sent[9].metadata.created_at)
    assert lease.message.content == content
    store.set_run_state(RUN, "completed")
    store.runs()  # files go in the transaction after the one that dropped their last use
    assert files(tmp_path) == []
    store.close()


def test_sqlite_drops_the_arrays_of_a_state_that_is_replaced(tmp_path: Path) -> None:
    store = SqlStore(tmp_path)
    running(store)
    for mark in (1, 2, 2):
        store.put_states(RUN, {1: NodeState(RecordDict({"a": weights(mark)}))})
        store.runs()
        assert len(files(tmp_path)) == 1
        assert store.states(RUN) == {1: NodeState(RecordDict({"a": weights(mark)}))}
    store.put_states(RUN, {1: NodeState()})
    store.runs()
    assert files(tmp_path) == []
    assert store.states(RUN) == {}
    store.close()


def test_sqlite_sweeps_files_that_a_crash_left_behind(tmp_path: Path) -> None:
    store = SqlStore(tmp_path)
    running(store)
    store.put_states(RUN, {1: NodeState(RecordDict({"a": weights(1)}))})
    store._arrays.write(bytes(range(32)), bytes(LARGE))
    store.close()
    assert len(files(tmp_path)) == 2
    again = SqlStore(tmp_path)
    assert again.states(RUN) == {1: NodeState(RecordDict({"a": weights(1)}))}
    assert len(files(tmp_path)) == 1
    again.close()


def test_sqlite_notices_a_damaged_file(tmp_path: Path) -> None:
    store = SqlStore(tmp_path)
    running(store)
    store.put_states(RUN, {1: NodeState(RecordDict({"a": weights(1)}))})
    (file,) = files(tmp_path)
    damaged = bytearray(file.read_bytes())
    damaged[5] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(Exception, match="does not have the hash"):
        store.state(RUN, 1)
    store.close()
