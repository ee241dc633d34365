"""The statements of the durable store that run for every task: built once, since that takes as long as running them."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from privfed.runtime.sql_schema import counted, holds, nodes, runs, sql, states, tasks


class Asked(NamedTuple):
    """What a lease is asked for: of one run ("run"), of some nodes ("nodes"); of all otherwise."""

    run: bool
    nodes: bool


def _its(name: str) -> sql.BindParameter[Any]:
    """Return a parameter; a name of its own, since an UPDATE has those of the columns for itself."""
    return sql.bindparam(f"its_{name}")


RUN = sql.select(runs).where(runs.c.run_id == _its("run"))
NODE = sql.select(nodes.c.node_id).where((nodes.c.run_id == _its("run")) & (nodes.c.node_id == _its("node")))
STATE = sql.select(states.c.envelope).where((states.c.run_id == _its("run")) & (states.c.node_id == _its("node")))
PUSHED = sql.select(tasks.c.id).where(
    (tasks.c.message_id == _its("message")) & (tasks.c.run_id == _its("run")) & ~tasks.c.withdrawn
)
PUSH = tasks.insert()
OF_TOKEN = sql.select(tasks).where(tasks.c.token == _its("token"))
LEND = tasks.update().where(tasks.c.id == _its("task")).values(token=_its("token"), lease_until=_its("until"))
ANSWER = tasks.update().where(tasks.c.id == _its("task")).values(reply=_its("reply"), token=None, lease_until=None)
COUNT = counted.insert()
REPLY = sql.select(tasks.c.reply).where(tasks.c.id == _its("task"))
DROP = tasks.delete().where(tasks.c.id == _its("task"))
HELD = sql.select(holds.c.digest).where(holds.c.holder == _its("holder"))


@cache
def _free(asked: Asked) -> sql.ColumnElement[bool]:
    """Return what holds of a task that may be handed out "now": none of its node's is out."""
    other = tasks.alias("other")
    same_node = (other.c.run_id == tasks.c.run_id) & (other.c.node_id == tasks.c.node_id)
    out = sql.exists().where(same_node & other.c.token.is_not(None))
    free = tasks.c.reply.is_(None) & tasks.c.token.is_(None) & (tasks.c.expires_at > _its("now")) & ~out
    if asked.run:
        free &= tasks.c.run_id == _its("run")
    if asked.nodes:
        free &= tasks.c.node_id.in_(sql.bindparam("its_nodes", expanding=True))
    return free


@cache
def first_free(asked: Asked) -> sql.Select[Any]:
    """Select the first task that may be handed out."""
    return sql.select(tasks).where(_free(asked)).order_by(tasks.c.id).limit(1)


@cache
def free_node(asked: Asked) -> sql.Select[Any]:
    """Select and lock, in PostgreSQL, a node with such a task that nobody else has locked."""
    here = (nodes.c.run_id == tasks.c.run_id) & (nodes.c.node_id == tasks.c.node_id)
    place = sql.select(tasks.c.run_id, tasks.c.node_id).join(nodes, here).where(_free(asked))
    return place.order_by(tasks.c.id).limit(1).with_for_update(of=nodes, skip_locked=True)


@cache
def first_free_of_node(asked: Asked) -> sql.Select[Any]:
    """Select and lock the first such task of a node."""
    mine = (tasks.c.run_id == sql.bindparam("found_run")) & (tasks.c.node_id == sql.bindparam("found_node"))
    return first_free(asked).where(mine).with_for_update(of=tasks)
