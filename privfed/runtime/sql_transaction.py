"""Rows, envelopes and the buffers they hold, inside one transaction of the durable store."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from privfed import wire
from privfed.errors import WireError
from privfed.message import Message, Metadata
from privfed.record import RecordDict
from privfed.runtime import sql_statement as statement
from privfed.runtime.array_folder import Buffer
from privfed.runtime.array_store import ArrayStore
from privfed.runtime.database import is_postgres
from privfed.runtime.sql_schema import buffers, sql, states
from privfed.runtime.sql_statement import Asked, pieces
from privfed.runtime.store import Lease, NodeState, RunInfo, StoreError, pack_states, unpack_states

LARGE = 1 << 16
"""Buffers of at least this many bytes are files."""
Encoded = tuple[bytes, Mapping[bytes, Buffer]]
"""An envelope, and the buffers it refers to."""


class Transaction:
    """What the methods of a store are made of. dropped: buffers that lost a reference, perhaps their last one."""

    def __init__(self, connection: sql.Connection, arrays: ArrayStore) -> None:
        self.connection = connection
        self.dropped: set[bytes] = set()
        self._together = statement.TOGETHER if is_postgres(connection.engine) else {}
        self._arrays = arrays
        self._held: dict[tuple[str, bytes], Buffer] = {}

    def do(self, what: sql.Executable, given: Mapping[str, object] | None = None) -> Any:
        """Run a statement."""
        return self.connection.execute(self._together.get(what, what), given)

    def do_all(self, what: sql.Executable, given: Sequence[Mapping[str, object]]) -> None:
        """Run a statement for each of several rows, in one go."""
        if not given:
            return
        if what in self._together:
            self.do(what, {name: [row[name] for row in given] for name in given[0]})
        else:
            self.connection.execute(what, given)

    def run(self, run_id: int) -> RunInfo | None:
        row = self.do(statement.RUN, {"its_run": run_id}).first()
        return None if row is None else RunInfo(*row)

    def known(self, run_id: int) -> RunInfo:
        info = self.run(run_id)
        if info is None:
            raise StoreError(f"there is no run {run_id}")
        return info

    def nodes(self, run_id: int, wanted: Iterable[int]) -> set[int]:
        """Return those of some nodes that the run has."""
        found: set[int] = set()
        for some in pieces(wanted):
            found.update(self.do(statement.NODES, {"its_run": run_id, "its_nodes": some}).scalars())
        return found

    def pushed(self, run_id: int, message_ids: Iterable[str]) -> list[Any]:
        """Return the tasks of those messages that were pushed."""
        found: list[Any] = []
        for some in pieces(message_ids):
            found += self.do(statement.PUSHED, {"its_run": run_id, "its_messages": some})
        return found

    def add_tasks(self, run_id: int, given: Sequence[tuple[Metadata, bytes]]) -> None:
        """Queue tasks in this order."""
        rows = [
            {
                "run_id": run_id,
                "node_id": data.dst_node_id,
                "message_id": data.message_id,
                "withdrawn": False,
                "envelope": envelope,
                "expires_at": data.expires_at,
            }
            for data, envelope in given
        ]
        self.do_all(statement.PUSH, rows)

    def hand_out(self, asked: Asked, given: Mapping[str, object], until: float) -> list[Lease]:
        """Lend what `first_free` finds."""
        rows = self.do(statement.first_free(asked), given).all()
        if not rows:
            return []
        tokens = [secrets.token_hex(16) for _ in rows]
        lent = zip(rows, tokens, strict=True)
        self.do_all(statement.LEND, [{"its_task": row.id, "its_token": one, "its_until": until} for row, one in lent])
        places = {"its_runs": list({row.run_id for row in rows}), "its_nodes": [row.node_id for row in rows]}
        kept = {(row.run_id, row.node_id): row for row in self.do(statement.STATES, places)}
        leases = []
        for row, token in zip(rows, tokens, strict=True):
            found = kept.get((row.run_id, row.node_id))
            state = NodeState() if found is None else self.unpack(found)
            leases.append(Lease(token, self.message(row.envelope), state, until))
        return leases

    def of_tokens(self, tokens: Iterable[str]) -> dict[str, Any]:
        """Return, and lock, the tasks that are out under these tokens."""
        found = {}
        for some in pieces(sorted(set(tokens))):
            found.update({row.token: row for row in self.do(statement.OF_TOKENS, {"its_tokens": some})})
        return found

    def answer(self, replies: Sequence[tuple[int, Encoded]]) -> None:
        """Put replies in the place of tasks."""
        for task, (_, parts) in replies:
            self.hold(f"reply {task}", parts)
        self._let_go(f"task {task}" for task, _ in replies)
        self.do_all(statement.ANSWER, [{"its_task": task, "its_reply": envelope} for task, (envelope, _) in replies])

    def count(self, rows: Iterable[Any]) -> None:
        """Note whose replies were taken."""
        names = ("token", "run_id", "node_id", "message_id")
        self.do_all(statement.COUNT, [{name: getattr(row, name) for name in names} for row in rows])

    def answered(self, run_id: int) -> dict[str, int]:
        """Return the tasks of a run that have a reply, by message."""
        self.known(run_id)
        return {row.message_id: row.id for row in self.do(statement.DONE, {"its_run": run_id})}

    def replies(self, task_ids: Iterable[int]) -> dict[int, bytes]:
        """Return, and lock, the replies that are still there, in the order of the tasks given."""
        found: dict[int, bytes] = {}
        order = list(task_ids)
        for some in pieces(sorted(order)):
            found.update({row.id: bytes(row.reply) for row in self.do(statement.REPLIES, {"its_tasks": some})})
        return {task: found[task] for task in order if task in found}

    def drop_tasks(self, task_ids: Collection[int]) -> None:
        """Forget tasks, their replies, and what they hold."""
        self._let_go(f"{kind} {task}" for task in task_ids for kind in ("task", "reply"))
        for some in pieces(task_ids):
            self.do(statement.DROP, {"its_tasks": some})

    def message(self, envelope: bytes) -> Message:
        value = wire.decode(envelope, _Buffers(self.connection, self._arrays))
        if not isinstance(value, Message):
            raise WireError("the store holds records where a message should be")
        return value

    def state(self, run_id: int, node_id: int) -> NodeState:
        row = self.do(statement.STATE, {"its_run": run_id, "its_node": node_id}).first()
        return NodeState() if row is None else self.unpack(row)

    def unpack(self, row: Any) -> NodeState:
        """Return the state in a row."""
        packed = wire.decode(row.envelope, _Buffers(self.connection, self._arrays))
        if not isinstance(packed, RecordDict):
            raise WireError("the store holds a message where records should be")
        return unpack_states(packed).get(row.node_id, NodeState())

    def put_state(self, run_id: int, node_id: int, state: NodeState) -> None:
        holder = f"state {run_id} {node_id}"
        self.do(states.delete().where((states.c.run_id == run_id) & (states.c.node_id == node_id)))
        self._let_go([holder])
        if not state.is_empty():
            envelope, parts = wire.encode(pack_states({node_id: state}))
            self.do(states.insert().values(run_id=run_id, node_id=node_id, envelope=envelope))
            self.hold(holder, parts)

    def hold(self, holder: str, parts: Mapping[bytes, Buffer]) -> None:
        """Refer to buffers, from the end of the transaction on."""
        self._held.update({(holder, digest): buffer for digest, buffer in parts.items()})

    def hold_all(self) -> None:
        """Keep what is held now. In one order, so that two transactions with the same do not wait for each other."""
        small = {digest: buffer for (_, digest), buffer in self._held.items() if len(buffer) < LARGE}
        for (_, digest), buffer in self._held.items():
            if digest not in small and digest not in self._arrays:
                self._arrays.write(digest, buffer)
        rows = [{"digest": digest, "data": bytes(small[digest])} for digest in sorted(small)]
        self.do_all(statement.KEEP_BUFFER, rows)
        self.do_all(statement.HOLD, [{"holder": holder, "digest": digest} for holder, digest in self._held])
        self._held = {}

    def _let_go(self, holders: Iterable[str]) -> None:
        for some in pieces(holders):
            given = {"its_holders": some}
            digests = set(self.do(statement.HELD, given).scalars())
            if digests:
                self.dropped |= digests
                self.do(statement.LET_GO, given)

    def sweep(self, doomed: Iterable[bytes]) -> None:
        """Remove those buffers that nobody held when this transaction began; it runs alone."""
        for some in pieces(doomed):
            given = {"its_digests": some}
            unheld = set(some) - set(self.do(statement.STILL_HELD, given).scalars())
            if unheld:
                self.do(statement.DROP_BUFFERS, {"its_digests": list(unheld)})
                for digest in unheld:
                    self._arrays.remove(digest)


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
