"""The durable store: SQLite or PostgreSQL for what is small, content-addressed files for large arrays.

Every method that writes is one transaction. In SQLite it takes the write lock first (BEGIN IMMEDIATE). In PostgreSQL
it holds an advisory lock: alone, or shared by those that take replies (`complete`) and hand them over (`pull`), which
lock the rows of their tasks; a lease takes no lock but those of its tasks' rows, and skips what others have locked.
That no node has two tasks out is an index's to refuse. What only reads waits for nobody.

A large buffer is written before the transaction that first refers to it, and again in it if it is gone by then. What
nobody refers to is removed in a transaction after the one that dropped the last reference, and alone. So neither a
crash nor a rolled-back transaction loses a buffer that is referred to.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from privfed import wire
from privfed.failpoint import around, reach
from privfed.message import Message
from privfed.record import RecordDict
from privfed.runtime import sql_statement as statement
from privfed.runtime.array_folder import Buffer
from privfed.runtime.array_store import open_arrays
from privfed.runtime.database import DatabaseError, alone, describe, is_postgres, open_database, reader
from privfed.runtime.sql_schema import counted, facts, nodes, runs, sql, states, tasks
from privfed.runtime.sql_statement import Asked, pieces
from privfed.runtime.sql_transaction import LARGE, Transaction
from privfed.runtime.store import (
    Holder,
    Lease,
    NodeState,
    RunInfo,
    StoreError,
    check_running,
    check_transition,
    expired_reply,
    unknown_node_reply,
)

_OVERTAKEN = {"23505", "40P01"}
"""SQLSTATE of a claim that another one was faster than: not unique, deadlock."""


class SqlStore:
    """A store in a folder: `link.db` and `arrays/`. Safe for threads and for several processes.

    database: the URL of a PostgreSQL database to use instead of `link.db`; processes on several machines may share it
    if they share the folder's `arrays/` too. The database knows the marker of its arrays: with another folder it is
    refused. fence: called at the start of each transaction, and raises in one that must not be. Raises DatabaseError.
    """

    def __init__(
        self,
        path: str | Path,
        database: str | None = None,
        arrays: str | None = None,
        fence: Callable[[sql.Connection], None] = lambda connection: None,
    ) -> None:
        self._fence = fence
        self._lock = threading.Lock()
        self._begun: dict[object, float] = {}
        path = Path(path)
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._engine = open_database(path / "link.db" if database is None else database)
        try:
            self._arrays = open_arrays(path, arrays)
            self._know_arrays()
            self._doomed: set[bytes] = set(self._arrays)
            with self._look() as work:
                self._doomed.update(work.do(statement.UNHELD).scalars())
        except BaseException:
            self._engine.dispose()
            raise

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()

    def _know_arrays(self) -> None:
        """Tie the database to its folder of arrays, or see that it is the one it was tied to."""
        with alone(self._engine) as connection:
            self._fence(connection)
            known = connection.execute(sql.select(facts.c.value).where(facts.c.name == "arrays")).scalar()
            found = self._arrays.marker
            if known is None and (found is None or not any(self._arrays)):
                found = found or self._arrays.mark()
                connection.execute(facts.insert().values(name="arrays", value=found))
            elif found != known:
                raise DatabaseError(
                    f"{describe(self._engine)} keeps its arrays in a folder with marker {known}, and "
                    f"{self._arrays.name} has {found}: give the folder that belongs to this database"
                )

    def busy_seconds(self) -> float:
        """Return for how long the longest transaction is under way: a database that hangs raises nothing."""
        return time.monotonic() - min(list(self._begun.values()), default=time.monotonic())

    @contextmanager
    def _timed(self) -> Iterator[None]:
        mine = object()
        self._begun[mine] = time.monotonic()
        try:
            yield
        finally:
            del self._begun[mine]

    @contextmanager
    def _transaction(self, step: str = "", *, shared: bool = False, times: int = 1) -> Iterator[Transaction]:
        """Do all of it, durably, or nothing. step: its name among the failpoints; nothing for one that only reads.

        shared: others that say so may run beside it, in PostgreSQL. times: how often it is that step, in one commit.
        """
        doomed: set[bytes] = set()
        shared = shared and is_postgres(self._engine)
        try:
            with self._timed(), alone(self._engine, shared=shared) as connection:
                self._fence(connection)
                work = Transaction(connection, self._arrays)
                if not shared and self._doomed:
                    with self._lock:
                        doomed, self._doomed = self._doomed, set()
                    work.sweep(doomed)
                yield work
                work.hold_all()
                for _ in range(times if step else 0):
                    reach(f"before-{step}")
        except BaseException:
            self._doom(doomed)
            raise
        for _ in range(times if step else 0):
            reach(f"after-{step}")
        self._doom(work.dropped)

    @contextmanager
    def _look(self) -> Iterator[Transaction]:
        """See what was last committed; one that reads twice may see two states."""
        with self._timed(), reader(self._engine).connect() as connection:
            self._fence(connection)
            yield Transaction(connection, self._arrays)

    def _doom(self, digests: Iterable[bytes]) -> None:
        """Have buffers removed unless somebody refers to them."""
        with self._lock:
            self._doomed.update(digests)

    @contextmanager
    def _kept(self, given: Iterable[Mapping[bytes, Buffer]]) -> Iterator[None]:
        """Write large buffers before the transaction that refers to them; removed later if it does not."""
        large = {digest: buffer for parts in given for digest, buffer in parts.items() if len(buffer) >= LARGE}
        try:
            try:
                for digest, buffer in large.items():
                    self._arrays.write(digest, buffer)
            except FileNotFoundError:
                with self._look():  # the folder is a successor's: that is the reason to be given
                    raise
            yield
        finally:
            self._doom(large)

    def create_run(self, run_id: int, node_ids: Sequence[int]) -> None:
        with self._transaction("create-run") as work:
            if work.run(run_id) is not None:
                raise StoreError(f"run {run_id} exists already")
            work.do(runs.insert().values(run_id=run_id, state="pending", reason=""))
            work.do_all(nodes.insert(), [{"run_id": run_id, "node_id": node} for node in node_ids])

    def run(self, run_id: int) -> RunInfo:
        with self._look() as work:
            return work.known(run_id)

    def runs(self) -> list[RunInfo]:
        with self._transaction() as work:
            return [RunInfo(*row) for row in work.do(sql.select(runs).order_by(runs.c.run_id))]

    def set_run_state(self, run_id: int, state: str, reason: str = "") -> None:
        with self._transaction("run-state") as work:
            check_transition(work.known(run_id).state, state)
            work.do(runs.update().where(runs.c.run_id == run_id).values(state=state, reason=reason))
            if state != "running":
                work.drop_tasks(work.do(statement.OF_RUN, {"its_run": run_id}).scalars().all())
            if state == "completed":
                work.do(counted.delete().where(counted.c.run_id == run_id))

    def nodes(self, run_id: int) -> Sequence[int]:
        with self._transaction() as work:
            work.known(run_id)
            found = sql.select(nodes.c.node_id).where(nodes.c.run_id == run_id).order_by(nodes.c.node_id)
            return [row.node_id for row in work.do(found)]

    def push(self, run_id: int, messages: Iterable[Message]) -> list[str]:
        sent = list(messages)
        given = {message.metadata.message_id: message for message in sent}
        encoded = {message_id: wire.encode(message) for message_id, message in given.items()}
        with self._kept(parts for _, parts in encoded.values()), self._transaction("push") as work:
            check_running(work.known(run_id))
            again = [row.message_id for row in work.pushed(run_id, given)]
            if again or len(given) < len(sent):
                twice = again or [one.metadata.message_id for one in sent if given[one.metadata.message_id] is not one]
                raise StoreError(f"the message {twice[0]} was pushed already")
            work.add_tasks(run_id, [(given[one].metadata, encoded[one][0]) for one in given])
            known = work.nodes(run_id, {message.metadata.dst_node_id for message in sent})
            astray = {one for one, message in given.items() if message.metadata.dst_node_id not in known}
            if astray or any(parts for _, parts in encoded.values()):
                answers = []
                for row in work.pushed(run_id, given):
                    if row.message_id in astray:
                        answers.append((row.id, wire.encode(unknown_node_reply(given[row.message_id]))))
                    else:
                        work.hold(f"task {row.id}", encoded[row.message_id][1])
                work.answer(answers)
            return [one for one in given if one in astray]

    def lease(
        self, now: float, seconds: float, run_id: int | None = None, nodes: Collection[int] | None = None
    ) -> Lease | None:
        return next(iter(self.lease_many(now, seconds, 1, run_id, nodes)), None)

    def lease_many(
        self, now: float, seconds: float, count: int, run_id: int | None = None, nodes: Collection[int] | None = None
    ) -> list[Lease]:
        asked = Asked(run_id is not None, nodes is not None)
        given: dict[str, object] = {"its_now": now, "its_count": count}
        if run_id is not None:
            given["its_run"] = run_id
        if nodes is not None:
            given["its_nodes"] = list(nodes)
        if not is_postgres(self._engine):
            with self._transaction("lease") as work:
                return work.hand_out(asked, given, now + seconds)
        while True:
            try:
                with around("lease"), self._timed(), self._engine.begin() as connection:
                    self._fence(connection)
                    return Transaction(connection, self._arrays).hand_out(asked, given, now + seconds)
            except sql.exc.DBAPIError as fault:
                if getattr(fault.orig, "sqlstate", None) not in _OVERTAKEN:
                    raise

    def complete(self, token: str, reply: Message, state: NodeState | None) -> str | None:
        return self.complete_many([(token, reply, state)])[0]

    def complete_many(self, done: Sequence[tuple[str, Message, NodeState | None]]) -> list[str | None]:
        encoded = [wire.encode(reply) for _, reply, _ in done]
        counts: list[str | None] = []
        with (
            self._kept(parts for _, parts in encoded),
            self._transaction("complete", shared=True, times=len(done)) as work,
        ):
            out = work.of_tokens([token for token, _, _ in done])
            taken = []
            for (token, _, state), reply in zip(done, encoded, strict=True):
                row = out.pop(token, None)
                counts.append(None if row is None or row.withdrawn else str(row.message_id))
                if row is not None:
                    taken.append((row, reply, state))
            work.drop_tasks([row.id for row, _, _ in taken if row.withdrawn])
            taken = [(row, reply, state) for row, reply, state in taken if not row.withdrawn]
            work.answer([(row.id, reply) for row, reply, _ in taken])
            work.count([row for row, _, _ in taken])
            for row, _, state in taken:
                if state is not None:
                    work.put_state(row.run_id, row.node_id, state)
        return counts

    def holder(self, token: str) -> Holder | None:
        with self._look() as work:
            # In this order: between the two a reply may be counted, and not be taken back.
            row = work.do(statement.OUT, {"its_token": token}).first()
            if row is not None:
                return Holder(row.run_id, row.node_id, row.message_id, False)
            done = work.do(statement.COUNTED, {"its_token": token}).first()
            return None if done is None else Holder(done.run_id, done.node_id, done.message_id, True)

    def release(self, node_id: int, holding: Collection[str] = ()) -> int:
        out = (tasks.c.node_id == node_id) & tasks.c.token.is_not(None) & tasks.c.token.not_in(holding)
        with self._transaction("release") as work:
            work.drop_tasks(work.do(sql.select(tasks.c.id).where(out & tasks.c.withdrawn)).scalars().all())
            return int(work.do(tasks.update().where(out).values(token=None, lease_until=None)).rowcount)

    def put_down(self, token: str, node_id: int) -> bool:
        asked = sql.select(tasks.c.id).where(
            (tasks.c.token == token) & (tasks.c.node_id == node_id) & tasks.c.withdrawn
        )
        with self._look() as work:  # whoever sends tokens that are none keeps nobody from writing
            if work.do(asked).first() is None:
                return False
        with self._transaction("put-down") as work:
            found = work.do(asked).scalars().all()
            work.drop_tasks(found)
            return bool(found)

    def pull(self, run_id: int, message_ids: Iterable[str]) -> list[Message]:
        with self._transaction("pull", shared=True) as work:
            found = work.answered(run_id)
            replies = work.replies([found[one] for one in dict.fromkeys(message_ids) if one in found])
            work.drop_tasks(replies)
            return [work.message(envelope) for envelope in replies.values()]

    def arrived(self, run_id: int, message_ids: Iterable[str]) -> bool:
        with self._look() as work:
            return not work.answered(run_id).keys().isdisjoint(message_ids)

    def forget(self, run_id: int, message_ids: Iterable[str]) -> None:
        with self._transaction("forget") as work:
            work.known(run_id)
            for some in pieces(message_ids):
                rows = work.do(statement.NAMED, {"its_run": run_id, "its_messages": some}).all()
                work.drop_tasks([row.id for row in rows if row.token is None])
                out = [row.id for row in rows if row.token is not None]
                if out:  # their nodes stay taken until the workers are done
                    work.do(statement.WITHDRAW, {"its_tasks": out})

    def expire(self, now: float) -> list[str]:
        if self.next_deadline() > now:
            return []
        given = {"its_now": now}
        with self._transaction("expire") as work:
            work.drop_tasks(work.do(statement.LAPSED_WITHDRAWN, given).scalars().all())
            work.do(statement.REQUEUE_LAPSED, given)
            overdue = work.do(statement.OVERDUE, given).all()
            blank = [Message.restore(wire.peek(row.envelope), RecordDict()) for row in overdue]
            replies = [wire.encode(expired_reply(message)) for message in blank]
            work.answer([(row.id, reply) for row, reply in zip(overdue, replies, strict=True)])
            return [row.message_id for row in overdue]

    def next_deadline(self) -> float:
        with self._look() as work:
            return min((found for found in work.do(statement.DEADLINES).one() if found is not None), default=math.inf)

    def state(self, run_id: int, node_id: int) -> NodeState:
        with self._transaction() as work:
            work.known(run_id)
            return work.state(run_id, node_id)

    def states(self, run_id: int) -> Mapping[int, NodeState]:
        with self._transaction() as work:
            work.known(run_id)
            found = sql.select(states).where(states.c.run_id == run_id).order_by(states.c.node_id)
            return {row.node_id: work.unpack(row) for row in work.do(found).all()}

    def put_states(self, run_id: int, given: Mapping[int, NodeState]) -> None:
        with self._transaction() as work:
            work.known(run_id)
            known = work.nodes(run_id, given)
            for node_id, state in given.items():
                if node_id not in known:
                    raise StoreError(f"run {run_id} has no node {node_id}")
                work.put_state(run_id, node_id, state)
