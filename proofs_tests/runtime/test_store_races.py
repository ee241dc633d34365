"""Two who are after the same task, in both databases: what one of them has not committed, the other neither sees nor
undoes, and of what both want one gets it.

In PostgreSQL one of them stops between its last statement and its commit, while the other goes on; in SQLite writers
come one after the other, and the two begin together.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sql

from privfed import Array, ArrayRecord, Message, RecordDict, failpoint
from privfed.runtime.database import alone
from privfed.runtime.sqlstore import SqlStore
from privfed.runtime.store import Lease, NodeState
from proofs_tests.runtime.store_case import EPOCH, RUN, ids, instruction, running, state

DATABASES = ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)]
LATER = EPOCH + 60
PATIENCE = 60.0
Two = tuple[SqlStore, SqlStore]


@pytest.fixture(params=DATABASES)
def two(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Two]:
    """Two stores of one database, as two processes have them."""
    url = None
    if request.param == "postgres":
        from proofs_tests.runtime.postgres import server

        url = server().database()
    first, second = running(SqlStore(tmp_path, url), 4), SqlStore(tmp_path, url)
    assert isinstance(first, SqlStore)
    yield first, second
    first.close()
    second.close()


@pytest.fixture
def apart() -> Iterator[None]:
    """Undo what a test installs."""
    yield
    failpoint.install(None)


@contextmanager
def stopped_before(step: str) -> Iterator[Callable[[Callable[[], object]], Future[object]]]:
    """Give what runs something in a thread that stops just before its first commit of a step; it goes on at the end."""
    reached, go_on = threading.Event(), threading.Event()
    name = "stopped"

    def strike(moment: str) -> None:
        if moment == f"before-{step}" and threading.current_thread().name.startswith(name):
            reached.set()
            assert go_on.wait(PATIENCE)

    failpoint.install(strike)
    with ThreadPoolExecutor(1, thread_name_prefix=name) as pool:

        def begin(work: Callable[[], object]) -> Future[object]:
            future = pool.submit(work)
            assert reached.wait(PATIENCE)
            return future

        try:
            yield begin
        finally:
            go_on.set()
            failpoint.install(None)


def together(*works: Callable[[], object]) -> list[object]:
    """Run several things at once; return what each returned."""
    gate = threading.Barrier(len(works))

    def run(work: Callable[[], object]) -> object:
        gate.wait(PATIENCE)
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result(PATIENCE) for future in [pool.submit(run, work) for work in works]]


def leased(store: SqlStore, now: float = EPOCH, seconds: float = 50.0) -> Lease:
    lease = store.lease(now, seconds)
    assert lease is not None
    return lease


def reply_to(lease: Lease, size: int = 1) -> Message:
    return Message(RecordDict({"a": ArrayRecord({"w": Array(np.full(size, 3.0))})}), reply_to=lease.message)


def drop(store: SqlStore, message_ids: list[str]) -> None:
    """Pull replies, and remove what nobody refers to after it."""
    store.pull(RUN, message_ids)
    store.runs()


def counted(store: SqlStore) -> int:
    with store._engine.begin() as connection:
        return int(connection.execute(sql.text("SELECT count(*) FROM counted")).scalar_one())


def test_of_two_claimers_one_gets_the_task(two: Two) -> None:
    for mark in range(25):
        (message,) = sent = [instruction(1, mark=mark)]
        two[0].push(RUN, sent)
        found = together(*(partial(one.lease_many, EPOCH, 50, 4) for one in two))
        leases = [lease for some in found if isinstance(some, list) for lease in some]
        assert [lease.message.metadata.message_id for lease in leases] == ids(message), found
        assert two[0].complete(leases[0].token, reply_to(leases[0]), None) is not None
        assert len(two[0].pull(RUN, ids(message))) == 1


def test_claimers_of_many_tasks_share_them_one_of_a_node(two: Two) -> None:
    sent = [instruction(1 + number % 4, mark=number) for number in range(8)]
    two[0].push(RUN, sent)
    found = together(*(partial(one.lease_many, EPOCH, 50, 3) for one in two))
    leases = [lease for some in found if isinstance(some, list) for lease in some]
    leases += two[0].lease_many(EPOCH, 50, 8)
    assert sorted(lease.message.metadata.message_id for lease in leases) == sorted(ids(*sent[:4])), found


def test_a_reply_counts_once_however_often_and_by_whom_it_is_given(two: Two) -> None:
    for mark in range(10):
        message = instruction(1, mark=mark)
        two[0].push(RUN, [message])
        lease = leased(two[0])
        mine = [(lease.token, reply_to(lease), state(mark))]
        found = together(*(partial(one.complete_many, mine) for one in two))
        assert sorted(found, key=str) == [[message.metadata.message_id], [None]]
        assert two[0].complete_many(mine * 2) == [None, None]
        assert two[0].state(RUN, 1) == state(mark)
        assert len(two[1].pull(RUN, ids(message))) == 1
        assert counted(two[0]) == mark + 1


def test_a_token_twice_among_several_counts_once(two: Two) -> None:
    sent = [instruction(node) for node in (1, 2)]
    two[0].push(RUN, sent)
    first, second = two[0].lease_many(EPOCH, 50, 2)
    done = [(one.token, reply_to(one), None) for one in (first, first, second)]
    assert two[1].complete_many([*done, ("x" * 32, reply_to(first), None)]) == [
        ids(*sent)[0],
        None,
        ids(*sent)[1],
        None,
    ]
    assert len(two[0].pull(RUN, ids(*sent))) == 2


def test_replies_are_handed_over_once(two: Two) -> None:
    sent = [instruction(node) for node in (1, 2, 3)]
    for _ in range(10):
        two[0].push(RUN, sent)
        leases = two[0].lease_many(EPOCH, 50, 3)
        two[0].complete_many([(lease.token, reply_to(lease), None) for lease in leases])
        found = together(*(partial(one.pull, RUN, ids(*sent)) for one in two))
        got = [reply.metadata.reply_to_message_id for some in found if isinstance(some, list) for reply in some]
        assert sorted(got) == sorted(ids(*sent)), found


def test_a_lease_that_lapses_and_its_reply_do_not_both_count(two: Two) -> None:
    """Whichever is first: the reply counts, or the task is free again and the reply is refused."""
    for mark in range(20):
        message = instruction(1, mark=mark, ttl=1e6)
        two[0].push(RUN, [message])
        lost = leased(two[0], seconds=10)
        accepted, lapsed = together(
            partial(two[0].complete, lost.token, reply_to(lost), None), partial(two[1].expire, EPOCH + 20)
        )
        assert lapsed == []
        again = two[1].lease(EPOCH + 20, 50)
        assert (accepted == message.metadata.message_id) == (again is None), accepted
        if again is not None:
            assert accepted is None and again.token != lost.token
            assert two[0].complete(again.token, reply_to(again), None) is not None
        assert len(two[0].pull(RUN, ids(message))) == 1


def test_a_claim_and_an_expiry_leave_a_task_with_one_of_them(two: Two) -> None:
    for mark in range(20):
        message, later = instruction(1, ttl=60, mark=mark), instruction(1, ttl=1e6, mark=mark)
        two[0].push(RUN, [message, later])
        # One whose clock is behind would still hand it out.
        lease, answered = together(partial(two[0].lease, EPOCH, 1e6), partial(two[1].expire, LATER))
        assert answered == ids(message)
        (reply,) = two[0].pull(RUN, ids(message))
        assert reply.has_error()
        if isinstance(lease, Lease) and lease.message.metadata.message_id == message.metadata.message_id:
            assert two[0].complete(lease.token, reply_to(lease), None) is None, "it was answered for"
            lease = two[0].lease(LATER, 50)
        assert isinstance(lease, Lease) and lease.message.metadata.message_id == later.metadata.message_id
        assert two[0].complete(lease.token, reply_to(lease), None) is not None
        assert len(two[0].pull(RUN, ids(later))) == 1


def test_a_withdrawal_and_a_reply_do_not_both_win(two: Two) -> None:
    for mark in range(10):
        message = instruction(1, mark=mark)
        two[0].push(RUN, [message])
        lease = leased(two[0])
        together(
            partial(two[0].complete, lease.token, reply_to(lease), None), partial(two[1].forget, RUN, ids(message))
        )
        assert two[0].pull(RUN, ids(message)) == []
        assert two[0].lease(EPOCH, 50) is None
        two[1].push(RUN, [instruction(1, mark=mark)])
        over = leased(two[1])
        assert two[1].complete(over.token, reply_to(over), None) is not None


@pytest.mark.postgres
@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("two", ["postgres"], indirect=True)
def test_a_claim_that_is_not_committed_hides_its_node_and_holds_nobody_up(two: Two) -> None:
    sent = [instruction(node, mark=mark) for mark in (0, 1) for node in (1, 2)]
    two[0].push(RUN, sent)
    out = leased(two[0])
    with stopped_before("complete") as begin:  # takes the lock of those who run beside each other
        future = begin(lambda: two[0].complete(out.token, reply_to(out, 2), None))
        (lease,) = two[1].lease_many(EPOCH, 50, 4)
        assert lease.message.metadata.message_id == ids(*sent)[1]
        assert two[1].complete(lease.token, reply_to(lease), None) is not None
        assert [one.metadata.reply_to_message_id for one in two[1].pull(RUN, ids(*sent))] == [ids(*sent)[1]]
        assert not two[1].arrived(RUN, ids(*sent)), "what is not committed is not there yet"
        assert two[1].holder(out.token) is not None
    assert future.result(PATIENCE) == ids(*sent)[0]
    assert two[1].arrived(RUN, ids(*sent))


@pytest.mark.parametrize("two", DATABASES, indirect=True)
def test_what_only_reads_waits_for_no_writer_and_sees_nothing_of_it(two: Two) -> None:
    message = instruction(1)
    two[0].push(RUN, [message])
    lease = leased(two[0], seconds=10)
    with alone(two[0]._engine) as connection:
        connection.execute(sql.text("UPDATE tasks SET token = NULL, lease_until = NULL, expires_at = 1"))
        connection.execute(sql.text("UPDATE runs SET state = 'stopped'"))
        # Each of these would wait for that one, and this thread for itself: in SQLite for ten seconds, then in vain.
        assert two[1].run(RUN).state == "running"
        assert two[1].holder(lease.token) is not None
        assert two[1].next_deadline() == EPOCH + 10
        assert not two[1].arrived(RUN, ids(message))
        assert two[1].expire(EPOCH + 9) == []
    assert two[1].run(RUN).state == "stopped"
    assert two[1].holder(lease.token) is None


@pytest.mark.parametrize("two", DATABASES, indirect=True)
def test_the_database_refuses_a_second_task_of_a_node_and_a_token_twice(two: Two) -> None:
    two[0].push(RUN, [instruction(1, mark=1), instruction(1, mark=2), instruction(2)])
    lease = leased(two[0])
    lend = "UPDATE tasks SET token = :token WHERE token IS NULL AND node_id = :node"
    for token, node in (("other", 1), (lease.token, 2)):
        with pytest.raises(sql.exc.IntegrityError), two[0]._engine.begin() as connection:
            connection.execute(sql.text(lend), {"token": token, "node": node})


@pytest.mark.postgres
@pytest.mark.parametrize("two", ["postgres"], indirect=True)
def test_a_claim_that_saw_an_old_state_is_made_again(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clock is behind the other's, for which the node's first task is overdue: each would take another one."""
    first, second = instruction(1, ttl=10, mark=1), instruction(1, ttl=1e6, mark=2)
    two[0].push(RUN, [first, second])
    from privfed.runtime import sql_transaction

    true, leases, tries = sql_transaction.secrets.token_hex, [], []

    def token_hex(count: int) -> str:
        tries.append(count)
        if len(tries) == 1:  # it has chosen the first task, and the other one takes the second meanwhile
            leases.append(two[1].lease(EPOCH + 20, 50))
        return true(count)

    monkeypatch.setattr(sql_transaction.secrets, "token_hex", token_hex)
    assert two[0].lease(EPOCH, 50) is None
    (lease,) = leases
    assert lease is not None and lease.message.metadata.message_id == second.metadata.message_id
    assert len(tries) == 2


@pytest.mark.parametrize("two", DATABASES, indirect=True)
def test_a_buffer_that_one_lets_go_while_another_takes_it_up_is_kept(two: Two) -> None:
    for size in (4, 1 << 14):  # a row, and a file
        for mark in range(6):
            old, new = instruction(1, mark=mark), instruction(2, mark=mark)
            two[0].push(RUN, [old, new])
            lease = leased(two[0])
            two[0].complete(lease.token, reply_to(lease, size), None)
            fresh = leased(two[0])
            together(
                partial(drop, two[0], ids(old)), partial(two[1].complete, fresh.token, reply_to(fresh, size), None)
            )
            two[0].runs()
            (reply,) = two[1].pull(RUN, ids(new))
            assert reply.content == reply_to(fresh, size).content
    for store in two:
        store.runs()
    with two[0]._engine.begin() as connection:
        assert connection.execute(sql.text("SELECT count(*) FROM buffers")).scalar() == 0
    assert list(two[0]._arrays) == []


@pytest.mark.postgres
@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("two", ["postgres"], indirect=True)
@pytest.mark.parametrize("size", [4, 1 << 14], ids=["row", "file"])
def test_nobody_removes_a_buffer_that_is_taken_up_and_not_committed_yet(two: Two, size: int) -> None:
    sent = [instruction(node) for node in (1, 2)]
    two[0].push(RUN, sent)
    old, new = two[0].lease_many(EPOCH, 50, 2)
    two[0].complete(old.token, reply_to(old, size), None)
    two[1].pull(RUN, ids(*sent))  # nobody refers to its buffer now, and this one is to remove it
    with stopped_before("complete") as begin:
        future = begin(lambda: two[0].complete(new.token, reply_to(new, size), None))
        assert two[1].pull(RUN, ids(*sent)) == []
        assert two[1].complete(old.token, Message(RecordDict(), reply_to=old.message), None) is None
    assert future.result(PATIENCE) == ids(*sent)[1]
    two[1].runs()
    (reply,) = two[1].pull(RUN, ids(*sent))
    assert reply.content == reply_to(new, size).content
    two[1].runs()
    assert list(two[0]._arrays) == []


def test_what_a_reply_that_is_refused_brought_is_removed(two: Two) -> None:
    message = instruction(1)
    two[0].push(RUN, [message])
    lease = leased(two[0], seconds=10)
    two[0].expire(EPOCH + 10)
    assert two[0].complete(lease.token, reply_to(lease, 1 << 14), NodeState()) is None
    two[0].runs()
    assert list(two[0]._arrays) == []
