"""The statements of the durable store that run for every task: built once, since that takes as long as running them.

Those with a list ("its_tasks", "its_tokens", ...) take at most `MANY` values of it at a time (`pieces`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple, TypeVar

from privfed.runtime.sql_schema import buffers, counted, holds, nodes, runs, sql, states, tasks

T = TypeVar("T")
MANY = 500
"""Values a statement takes at most: SQLite allows 32,766, and what is prepared once for each length stays little."""


class Asked(NamedTuple):
    """What a lease is asked for: of one run ("run"), of some nodes ("nodes"); of all otherwise."""

    run: bool
    nodes: bool


def pieces(values: Iterable[T]) -> Iterator[list[T]]:
    """Cut a list into those that a statement takes."""
    found = list(values)
    return (found[at : at + MANY] for at in range(0, len(found), MANY))


def _its(name: str) -> sql.BindParameter[Any]:
    """Return a parameter; a name of its own, since an UPDATE has those of the columns for itself."""
    return sql.bindparam(f"its_{name}")


def _one_of(column: sql.Column[Any], name: str) -> sql.ColumnElement[bool]:
    return column.in_(sql.bindparam(f"its_{name}", expanding=True))


_open = tasks.c.reply.is_(None)
_waiting = _open & ~tasks.c.withdrawn
_of_run = tasks.c.run_id == _its("run")

RUN = sql.select(runs).where(runs.c.run_id == _its("run"))
NODES = sql.select(nodes.c.node_id).where((nodes.c.run_id == _its("run")) & _one_of(nodes.c.node_id, "nodes"))
STATE = sql.select(states).where((states.c.run_id == _its("run")) & (states.c.node_id == _its("node")))
STATES = sql.select(states).where(_one_of(states.c.run_id, "runs") & _one_of(states.c.node_id, "nodes"))
PUSHED = sql.select(tasks.c.id, tasks.c.message_id, tasks.c.node_id).where(
    _one_of(tasks.c.message_id, "messages") & _of_run & ~tasks.c.withdrawn
)
PUSH = tasks.insert()
# In the order of their ids, so that two transactions that want the same ones do not wait for each other.
OF_TOKENS = (
    sql.select(tasks.c.id, tasks.c.run_id, tasks.c.node_id, tasks.c.message_id, tasks.c.token, tasks.c.withdrawn)
    .where(tasks.c.token.is_not(None) & _one_of(tasks.c.token, "tokens"))
    .order_by(tasks.c.id)
    .with_for_update()
)
OUT = sql.select(tasks.c.run_id, tasks.c.node_id, tasks.c.message_id).where(
    (tasks.c.token == _its("token")) & ~tasks.c.withdrawn
)
COUNTED = sql.select(counted).where(counted.c.token == _its("token"))
LEND = tasks.update().where(tasks.c.id == _its("task")).values(token=_its("token"), lease_until=_its("until"))
ANSWER = tasks.update().where(tasks.c.id == _its("task")).values(reply=_its("reply"), token=None, lease_until=None)
COUNT = counted.insert()
DONE = sql.select(tasks.c.id, tasks.c.message_id).where(_of_run & tasks.c.reply.is_not(None))
REPLIES = (
    sql.select(tasks.c.id, tasks.c.reply)
    .where(_one_of(tasks.c.id, "tasks") & tasks.c.reply.is_not(None))
    .order_by(tasks.c.id)
    .with_for_update()
)
OF_RUN = sql.select(tasks.c.id).where(_of_run)
NAMED = (
    sql.select(tasks.c.id, tasks.c.token)
    .where(_of_run & _one_of(tasks.c.message_id, "messages"))
    .order_by(tasks.c.id)
    .with_for_update()
)
WITHDRAW = tasks.update().where(_one_of(tasks.c.id, "tasks")).values(withdrawn=True)
DROP = tasks.delete().where(_one_of(tasks.c.id, "tasks"))
_LAPSED = tasks.c.token.is_not(None) & (tasks.c.lease_until <= _its("now"))
LAPSED_WITHDRAWN = sql.select(tasks.c.id).where(_LAPSED & tasks.c.withdrawn)
REQUEUE_LAPSED = tasks.update().where(_LAPSED).values(token=None, lease_until=None)
OVERDUE = sql.select(tasks.c.id, tasks.c.message_id, tasks.c.envelope).where(
    _waiting & (tasks.c.expires_at <= _its("now"))
)
DEADLINES = sql.select(
    sql.select(sql.func.min(tasks.c.expires_at)).where(_waiting).scalar_subquery().label("overdue"),
    sql.select(sql.func.min(tasks.c.lease_until)).where(tasks.c.token.is_not(None)).scalar_subquery().label("lapsed"),
)
HELD = sql.select(holds.c.digest).where(_one_of(holds.c.holder, "holders"))
LET_GO = holds.delete().where(_one_of(holds.c.holder, "holders"))
HOLD = holds.insert()
STILL_HELD = sql.select(holds.c.digest).distinct().where(_one_of(holds.c.digest, "digests"))
DROP_BUFFERS = buffers.delete().where(_one_of(buffers.c.digest, "digests"))
KEEP_BUFFER = sql.text("INSERT INTO buffers (digest, data) VALUES (:digest, :data) ON CONFLICT DO NOTHING")
UNHELD = sql.select(buffers.c.digest).where(~sql.exists().where(holds.c.digest == buffers.c.digest))


TOGETHER: Mapping[sql.Executable, sql.Executable] = {
    LEND: sql.text(
        "UPDATE tasks SET token = its_token, lease_until = its_until FROM unnest(CAST(:its_task AS bigint[]), "
        "CAST(:its_token AS text[]), CAST(:its_until AS float8[])) AS given (its_task, its_token, its_until) "
        "WHERE tasks.id = its_task"
    ),
    ANSWER: sql.text(
        "UPDATE tasks SET reply = its_reply, token = NULL, lease_until = NULL "
        "FROM unnest(CAST(:its_task AS bigint[]), CAST(:its_reply AS bytea[])) AS given (its_task, its_reply) "
        "WHERE tasks.id = its_task"
    ),
    COUNT: sql.text(
        "INSERT INTO counted (token, run_id, node_id, message_id) SELECT * FROM unnest(CAST(:token AS text[]), "
        "CAST(:run_id AS bigint[]), CAST(:node_id AS bigint[]), CAST(:message_id AS text[]))"
    ),
    PUSH: sql.text(
        "INSERT INTO tasks (run_id, node_id, message_id, withdrawn, envelope, expires_at) SELECT * FROM unnest("
        "CAST(:run_id AS bigint[]), CAST(:node_id AS bigint[]), CAST(:message_id AS text[]), "
        "CAST(:withdrawn AS bool[]), CAST(:envelope AS bytea[]), CAST(:expires_at AS float8[]))"
    ),
    OF_TOKENS: sql.text(
        "SELECT id, run_id, node_id, message_id, token, withdrawn FROM tasks WHERE token IS NOT NULL "
        "AND token = ANY(CAST(:its_tokens AS text[])) ORDER BY id FOR UPDATE"
    ),
    STATES: sql.text(
        "SELECT run_id, node_id, envelope FROM states WHERE run_id = ANY(CAST(:its_runs AS bigint[])) "
        "AND node_id = ANY(CAST(:its_nodes AS bigint[]))"
    ),
    HELD: sql.text("SELECT digest FROM holds WHERE holder = ANY(CAST(:its_holders AS text[]))"),
    REPLIES: sql.text(
        "SELECT id, reply FROM tasks WHERE id = ANY(CAST(:its_tasks AS bigint[])) AND reply IS NOT NULL "
        "ORDER BY id FOR UPDATE"
    ),
    DROP: sql.text("DELETE FROM tasks WHERE id = ANY(CAST(:its_tasks AS bigint[]))"),
}
"""What PostgreSQL is asked instead: about many rows, which it would be told one by one, or many values, each of which
would be a parameter. An array is one."""


@cache
def first_free(asked: Asked) -> sql.Select[Any]:
    """Select, and in PostgreSQL lock, some tasks that may be handed out "now": the first of nodes that have none out.

    Tasks that others have locked are left out. Whoever reads an old state may find a task that is not its node's only
    one when it comes to take it; the index `tasks_out` refuses that.
    """
    other = tasks.alias("other")
    same_node = (other.c.node_id == tasks.c.node_id) & (other.c.run_id == tasks.c.run_id)
    out = sql.exists().where(same_node & other.c.token.is_not(None))
    live = other.c.reply.is_(None) & (other.c.expires_at > _its("now"))
    before = sql.exists().where(same_node & live & (other.c.id < tasks.c.id))
    free = _open & tasks.c.token.is_(None) & (tasks.c.expires_at > _its("now")) & ~out & ~before
    if asked.run:
        free &= _of_run
    if asked.nodes:
        free &= _one_of(tasks.c.node_id, "nodes")
    found = sql.select(tasks.c.id, tasks.c.run_id, tasks.c.node_id, tasks.c.envelope).where(free)
    return found.order_by(tasks.c.id).limit(_its("count")).with_for_update(of=tasks, skip_locked=True)
