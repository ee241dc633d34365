"""The durable store: SQLite or PostgreSQL for what is small, content-addressed files for large arrays.

Every method is one transaction that takes the write lock first (SQLite: BEGIN IMMEDIATE; PostgreSQL: an advisory lock),
but for leases in PostgreSQL, which lock a node and skip those that others have locked. A buffer is written in the
transaction that first refers to it, and its file is removed in a transaction after the one that dropped the last
reference, so neither a crash nor a rolled-back transaction loses a buffer that is referred to.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from privfed import wire
from privfed.errors import WireError
from privfed.failpoint import around, reach
from privfed.message import Message
from privfed.record import RecordDict
from privfed.runtime import sql_statement as statement
from privfed.runtime.array_folder import Buffer
from privfed.runtime.array_store import ArrayStore, open_arrays
from privfed.runtime.database import DatabaseError, alone, describe, is_postgres, open_database
from privfed.runtime.sql_schema import buffers, counted, facts, holds, nodes, runs, sql, states, tasks
from privfed.runtime.sql_statement import Asked, first_free, first_free_of_node, free_node
from privfed.runtime.store import (
    Holder,
    Lease,
    NodeState,
    RunInfo,
    StoreError,
    check_running,
    check_transition,
    expired_reply,
    pack_states,
    unknown_node_reply,
    unpack_states,
)

LARGE = 1 << 16
"""Buffers of at least this many bytes are files."""


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
        path = Path(path)
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._engine = open_database(path / "link.db" if database is None else database)
        try:
            self._arrays = open_arrays(path, arrays)
            self._know_arrays()
            self._doomed: set[bytes] = set(self._arrays)
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

    @contextmanager
    def _transaction(self, step: str = "") -> Iterator[_Transaction]:
        """Do all of it, durably, or nothing. step: its name among the failpoints; nothing for one that only reads."""
        with alone(self._engine) as connection:
            self._fence(connection)
            transaction = _Transaction(connection, self._arrays)
            self._doomed -= transaction.sweep(self._doomed)
            yield transaction
            if step:
                reach(f"before-{step}")
        if step:
            reach(f"after-{step}")
        self._doomed |= transaction.dropped

    def create_run(self, run_id: int, node_ids: Sequence[int]) -> None:
        with self._transaction("create-run") as work:
            if work.run(run_id, missing_ok=True) is not None:
                raise StoreError(f"run {run_id} exists already")
            work.do(runs.insert().values(run_id=run_id, state="pending", reason=""))
            rows = [{"run_id": run_id, "node_id": node} for node in node_ids]
            if rows:
                work.connection.execute(nodes.insert(), rows)

    def run(self, run_id: int) -> RunInfo:
        with self._transaction() as work:
            return work.known(run_id)

    def runs(self) -> list[RunInfo]:
        with self._transaction() as work:
            return [RunInfo(*row) for row in work.do(sql.select(runs).order_by(runs.c.run_id))]

    def set_run_state(self, run_id: int, state: str, reason: str = "") -> None:
        with self._transaction("run-state") as work:
            check_transition(work.known(run_id).state, state)
            work.do(runs.update().where(runs.c.run_id == run_id).values(state=state, reason=reason))
            if state != "running":
                work.drop_tasks([row.id for row in work.do(sql.select(tasks.c.id).where(tasks.c.run_id == run_id))])
            if state == "completed":
                work.do(counted.delete().where(counted.c.run_id == run_id))

    def nodes(self, run_id: int) -> Sequence[int]:
        with self._transaction() as work:
            work.known(run_id)
            found = sql.select(nodes.c.node_id).where(nodes.c.run_id == run_id).order_by(nodes.c.node_id)
            return [row.node_id for row in work.do(found)]

    def push(self, run_id: int, messages: Iterable[Message]) -> list[str]:
        answered = []
        with self._transaction("push") as work:
            check_running(work.known(run_id))
            for message in messages:
                data = message.metadata
                again = {"its_message": data.message_id, "its_run": run_id}
                if work.do(statement.PUSHED, again).first() is not None:
                    raise StoreError(f"the message {data.message_id} was pushed already")
                task = work.add_task(run_id, message)
                if not work.has_node(run_id, data.dst_node_id):
                    work.answer(task, unknown_node_reply(message))
                    answered.append(data.message_id)
        return answered

    def lease(
        self, now: float, seconds: float, run_id: int | None = None, nodes: Collection[int] | None = None
    ) -> Lease | None:
        asked = Asked(run_id is not None, nodes is not None)
        given = {"its_now": now, "its_run": run_id, "its_nodes": None if nodes is None else list(nodes)}
        given = {name: value for name, value in given.items() if value is not None}
        if is_postgres(self._engine):
            with around("lease"), self._engine.begin() as connection:
                self._fence(connection)
                return _Transaction(connection, self._arrays).claim_locked(asked, given, now + seconds)
        with self._transaction("lease") as work:
            row = work.do(first_free(asked), given).first()
            return None if row is None else work.hand_out(row, now + seconds)

    def complete(self, token: str, reply: Message, state: NodeState | None) -> str | None:
        with self._transaction("complete") as work:
            row = work.do(statement.OF_TOKEN, {"its_token": token}).first()
            if row is None:
                return None
            if row.withdrawn:
                work.drop_tasks([row.id])
                return None
            work.answer(row.id, reply)
            row_of = {"run_id": row.run_id, "node_id": row.node_id, "message_id": row.message_id}
            work.do(statement.COUNT, {"token": token, **row_of})
            if state is not None:
                work.put_state(row.run_id, row.node_id, state)
            return str(row.message_id)

    def holder(self, token: str) -> Holder | None:
        with self._transaction() as work:
            done = work.do(sql.select(counted).where(counted.c.token == token)).first()
            if done is not None:
                return Holder(done.run_id, done.node_id, done.message_id, True)
            row = work.do(sql.select(tasks).where((tasks.c.token == token) & ~tasks.c.withdrawn)).first()
            return None if row is None else Holder(row.run_id, row.node_id, row.message_id, False)

    def release(self, node_id: int, holding: Collection[str] = ()) -> int:
        out = (tasks.c.node_id == node_id) & tasks.c.token.is_not(None) & tasks.c.token.not_in(holding)
        with self._transaction("release") as work:
            work.drop_tasks([row.id for row in work.do(sql.select(tasks.c.id).where(out & tasks.c.withdrawn))])
            return int(work.do(tasks.update().where(out).values(token=None, lease_until=None)).rowcount)

    def pull(self, run_id: int, message_ids: Iterable[str]) -> list[Message]:
        with self._transaction("pull") as work:
            found = work.answered(run_id)
            chosen = [found[one] for one in dict.fromkeys(message_ids) if one in found]
            replies = [work.message(work.reply(task)) for task in chosen]
            work.drop_tasks(chosen)
            return replies

    def arrived(self, run_id: int, message_ids: Iterable[str]) -> bool:
        with self._transaction() as work:
            return not work.answered(run_id).keys().isdisjoint(message_ids)

    def forget(self, run_id: int, message_ids: Iterable[str]) -> None:
        with self._transaction("forget") as work:
            work.known(run_id)
            for message_id in message_ids:
                mine = (tasks.c.run_id == run_id) & (tasks.c.message_id == message_id)
                for row in work.do(sql.select(tasks.c.id, tasks.c.token).where(mine).with_for_update()).all():
                    if row.token is None:
                        work.drop_tasks([row.id])
                    else:  # its node stays taken until the worker is done
                        work.change_task(row.id, withdrawn=True)

    def expire(self, now: float) -> list[str]:
        lapsed = tasks.c.token.is_not(None) & (tasks.c.lease_until <= now)
        overdue = tasks.c.reply.is_(None) & ~tasks.c.withdrawn & (tasks.c.expires_at <= now)
        with self._transaction("expire") as work:
            work.drop_tasks([row.id for row in work.do(sql.select(tasks.c.id).where(lapsed & tasks.c.withdrawn))])
            work.do(tasks.update().where(lapsed).values(token=None, lease_until=None))
            answered = []
            for row in work.do(sql.select(tasks.c.id, tasks.c.message_id, tasks.c.envelope).where(overdue)).all():
                work.answer(row.id, expired_reply(Message.restore(wire.peek(row.envelope), RecordDict())))
                answered.append(row.message_id)
            return answered

    def next_deadline(self) -> float:
        waiting = tasks.c.reply.is_(None) & ~tasks.c.withdrawn
        with self._transaction() as work:
            overdue = work.do(sql.select(sql.func.min(tasks.c.expires_at)).where(waiting)).scalar()
            lapsed = work.do(sql.select(sql.func.min(tasks.c.lease_until))).scalar()
            return min((found for found in (overdue, lapsed) if found is not None), default=math.inf)

    def state(self, run_id: int, node_id: int) -> NodeState:
        with self._transaction() as work:
            work.known(run_id)
            return work.state(run_id, node_id)

    def states(self, run_id: int) -> Mapping[int, NodeState]:
        with self._transaction() as work:
            work.known(run_id)
            found = sql.select(states.c.node_id).where(states.c.run_id == run_id).order_by(states.c.node_id)
            return {row.node_id: work.state(run_id, row.node_id) for row in work.do(found).all()}

    def put_states(self, run_id: int, given: Mapping[int, NodeState]) -> None:
        with self._transaction() as work:
            work.known(run_id)
            for node_id, state in given.items():
                if not work.has_node(run_id, node_id):
                    raise StoreError(f"run {run_id} has no node {node_id}")
                work.put_state(run_id, node_id, state)


class _Transaction:
    """Rows, envelopes and the buffers they hold, inside one transaction."""

    def __init__(self, connection: sql.Connection, arrays: ArrayStore) -> None:
        self.connection = connection
        self.dropped: set[bytes] = set()
        self._arrays = arrays

    def do(self, what: sql.Executable, given: Mapping[str, object] | None = None) -> Any:
        return self.connection.execute(what, given)

    def run(self, run_id: int, *, missing_ok: bool = False) -> RunInfo | None:
        row = self.do(statement.RUN, {"its_run": run_id}).first()
        if row is None and not missing_ok:
            raise StoreError(f"there is no run {run_id}")
        return None if row is None else RunInfo(*row)

    def known(self, run_id: int) -> RunInfo:
        info = self.run(run_id)
        if info is None:
            raise StoreError(f"there is no run {run_id}")
        return info

    def has_node(self, run_id: int, node_id: int) -> bool:
        return self.do(statement.NODE, {"its_run": run_id, "its_node": node_id}).first() is not None

    def add_task(self, run_id: int, message: Message) -> int:
        envelope, parts = wire.encode(message)
        data = message.metadata
        row = {"run_id": run_id, "node_id": data.dst_node_id, "message_id": data.message_id, "withdrawn": False}
        inserted = self.do(statement.PUSH, {**row, "envelope": envelope, "expires_at": data.expires_at})
        task = int(inserted.inserted_primary_key[0])
        self._hold(f"task {task}", parts)
        return task

    def hand_out(self, row: Any, until: float) -> Lease:
        token = secrets.token_hex(16)
        self.do(statement.LEND, {"its_task": row.id, "its_token": token, "its_until": until})
        return Lease(token, self.message(row.envelope), self.state(row.run_id, row.node_id), until)

    def claim_locked(self, asked: Asked, given: Mapping[str, object], until: float) -> Lease | None:
        """Hand out a task in PostgreSQL: lock a node nobody else is looking at, then see again what is free."""
        while True:
            node = self.do(free_node(asked), given).first()
            if node is None:
                return None
            # The search may have begun before somebody else's claim of this node ended; this statement begins now, and
            # no other claim of the node can.
            mine = {"found_run": node.run_id, "found_node": node.node_id}
            row = self.do(first_free_of_node(asked), {**given, **mine}).first()
            if row is not None:
                return self.hand_out(row, until)

    def change_task(self, task: int, **values: object) -> None:
        self.do(tasks.update().where(tasks.c.id == task).values(**values))

    def answer(self, task: int, reply: Message) -> None:
        envelope, parts = wire.encode(reply)
        self._hold(f"reply {task}", parts)
        self._release(f"task {task}")
        self.do(statement.ANSWER, {"its_task": task, "its_reply": envelope})

    def answered(self, run_id: int) -> dict[str, int]:
        self.known(run_id)
        done = (tasks.c.run_id == run_id) & tasks.c.reply.is_not(None)
        return {row.message_id: row.id for row in self.do(sql.select(tasks.c.id, tasks.c.message_id).where(done))}

    def reply(self, task: int) -> bytes:
        return bytes(self.do(statement.REPLY, {"its_task": task}).scalar_one())

    def drop_tasks(self, task_ids: Iterable[int]) -> None:
        for task in task_ids:
            self._release(f"task {task}")
            self._release(f"reply {task}")
            self.do(statement.DROP, {"its_task": task})

    def message(self, envelope: bytes) -> Message:
        value = wire.decode(envelope, _Buffers(self.connection, self._arrays))
        if not isinstance(value, Message):
            raise WireError("the store holds records where a message should be")
        return value

    def state(self, run_id: int, node_id: int) -> NodeState:
        row = self.do(statement.STATE, {"its_run": run_id, "its_node": node_id}).first()
        if row is None:
            return NodeState()
        packed = wire.decode(row.envelope, _Buffers(self.connection, self._arrays))
        if not isinstance(packed, RecordDict):
            raise WireError("the store holds a message where records should be")
        return unpack_states(packed).get(node_id, NodeState())

    def put_state(self, run_id: int, node_id: int, state: NodeState) -> None:
        holder = f"state {run_id} {node_id}"
        before = {row.digest for row in self.do(sql.select(holds.c.digest).where(holds.c.holder == holder))}
        here = (states.c.run_id == run_id) & (states.c.node_id == node_id)
        self.do(states.delete().where(here))
        self.do(holds.delete().where(holds.c.holder == holder))
        if not state.is_empty():
            envelope, parts = wire.encode(pack_states({node_id: state}))
            self.do(states.insert().values(run_id=run_id, node_id=node_id, envelope=envelope))
            self._hold(holder, parts)
        self._drop_unheld(before)

    def _hold(self, holder: str, parts: Mapping[bytes, Buffer]) -> None:
        for digest, buffer in parts.items():
            if len(buffer) >= LARGE:
                self._arrays.write(digest, buffer)
            elif self.do(sql.select(buffers.c.digest).where(buffers.c.digest == digest)).first() is None:
                self.do(buffers.insert().values(digest=digest, data=bytes(buffer)))
            self.do(holds.insert().values(holder=holder, digest=digest))

    def _release(self, holder: str) -> None:
        digests = {row.digest for row in self.do(statement.HELD, {"its_holder": holder})}
        if digests:
            self.do(holds.delete().where(holds.c.holder == holder))
            self._drop_unheld(digests)

    def _held(self, digest: bytes) -> bool:
        return self.do(sql.select(holds.c.holder).where(holds.c.digest == digest).limit(1)).first() is not None

    def _drop_unheld(self, digests: Iterable[bytes]) -> None:
        for digest in digests:
            if not self._held(digest):
                self.do(buffers.delete().where(buffers.c.digest == digest))
                self.dropped.add(digest)

    def sweep(self, doomed: Iterable[bytes]) -> set[bytes]:
        """Remove the files of buffers that nobody held when this transaction began."""
        done = set(doomed)
        for digest in done:
            if not self._held(digest):
                self._arrays.remove(digest)
        return done


class _Buffers(Mapping[bytes, Buffer]):
    """The buffers of the store, read when asked for."""

    def __init__(self, connection: sql.Connection, arrays: ArrayStore) -> None:
        self._connection = connection
        self._arrays = arrays

    def __getitem__(self, digest: bytes) -> Buffer:
        found = sql.select(buffers.c.data).where(buffers.c.digest == digest)
        data = self._connection.execute(found).scalar_one_or_none()
        if data is not None:
            return bytes(data)
        try:
            return self._arrays.read(digest)
        except FileNotFoundError:
            raise KeyError(digest) from None

    def __iter__(self) -> Iterator[bytes]:
        yield from self._connection.execute(sql.select(buffers.c.digest)).scalars()
        yield from self._arrays

    def __len__(self) -> int:
        return sum(1 for _ in self)
