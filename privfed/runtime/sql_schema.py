"""The tables of the durable store. A change here needs a migration in `migrations/versions`; a test compares both."""

from __future__ import annotations

from typing import Any

from privfed.errors import AppError

try:
    import sqlalchemy as sql
except ImportError:  # pragma: no cover - the extra is installed wherever tests run
    raise AppError("the durable store needs SQLAlchemy: pip install 'privfed[link]'") from None

__all__ = ["buffers", "counted", "facts", "holds", "nodes", "runs", "sql", "states", "tables", "tasks", "tenures"]

tables = sql.MetaData()
facts = sql.Table(  # what the database knows about itself: "arrays", the marker of the folder its buffers are in
    "facts",
    tables,
    sql.Column("name", sql.String(40), primary_key=True),
    sql.Column("value", sql.Text, nullable=False),
)
tenures = sql.Table(  # which SuperLink serves: "federation"; expires: by the database's clock
    "tenures",
    tables,
    sql.Column("name", sql.String(40), primary_key=True),
    sql.Column("term", sql.BigInteger, nullable=False),
    sql.Column("session", sql.String(40), nullable=False),  # its connections' name
    sql.Column("owner", sql.Text, nullable=False),
    sql.Column("expires", sql.Float, nullable=False),
    sql.Column("addresses", sql.Text, nullable=False, server_default=""),  # where the others reach it, as JSON
)
runs = sql.Table(
    "runs",
    tables,
    sql.Column("run_id", sql.BigInteger, primary_key=True, autoincrement=False),
    sql.Column("state", sql.String(16), nullable=False),
    sql.Column("reason", sql.Text, nullable=False),
)
nodes = sql.Table(
    "nodes",
    tables,
    sql.Column("run_id", sql.BigInteger, primary_key=True),
    sql.Column("node_id", sql.BigInteger, primary_key=True),
)
tasks = sql.Table(
    "tasks",
    tables,
    sql.Column("id", sql.BigInteger().with_variant(sql.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sql.Column("run_id", sql.BigInteger, nullable=False),
    sql.Column("node_id", sql.BigInteger, nullable=False),
    sql.Column("message_id", sql.Text, nullable=False),
    sql.Column("envelope", sql.LargeBinary, nullable=False),
    sql.Column("expires_at", sql.Float, nullable=False),
    sql.Column("token", sql.String(32)),  # of the lease, while the task is out
    sql.Column("lease_until", sql.Float),
    sql.Column("withdrawn", sql.Boolean, nullable=False, default=False),  # while it was out
    sql.Column("reply", sql.LargeBinary),
    sql.Index("tasks_of_run", "run_id", "message_id"),
)
# A task is in the indexes of where it stands, so that none of them grows with what is elsewhere.
_OPEN, _OUT = sql.text("reply IS NULL"), sql.text("token IS NOT NULL")
_QUEUED, _DONE = sql.text("reply IS NULL AND token IS NULL"), sql.text("reply IS NOT NULL")


def _while(condition: sql.TextClause, name: str, *columns: sql.Column[Any], unique: bool = False) -> None:
    sql.Index(name, *columns, unique=unique, sqlite_where=condition, postgresql_where=condition)


_while(_QUEUED, "tasks_queued", tasks.c.id)
_while(_OPEN, "tasks_open", tasks.c.node_id, tasks.c.run_id, tasks.c.id)
_while(_OPEN, "tasks_expiring", tasks.c.expires_at)
_while(_OUT, "tasks_out", tasks.c.node_id, tasks.c.run_id, unique=True)  # of a node at most one is out
_while(_OUT, "tasks_token", tasks.c.token, unique=True)
_while(_OUT, "tasks_lapsing", tasks.c.lease_until)
_while(_DONE, "tasks_done", tasks.c.run_id)
counted = sql.Table(  # leases whose reply was taken, so that a reply sent again is told so
    "counted",
    tables,
    sql.Column("token", sql.String(32), primary_key=True),
    sql.Column("run_id", sql.BigInteger, nullable=False, index=True),
    sql.Column("node_id", sql.BigInteger, nullable=False),
    sql.Column("message_id", sql.Text, nullable=False),
)
states = sql.Table(
    "states",
    tables,
    sql.Column("run_id", sql.BigInteger, primary_key=True),
    sql.Column("node_id", sql.BigInteger, primary_key=True),
    sql.Column("envelope", sql.LargeBinary, nullable=False),
)
buffers = sql.Table(
    "buffers",
    tables,
    sql.Column("digest", sql.LargeBinary(32), primary_key=True),
    sql.Column("data", sql.LargeBinary, nullable=False),
)
holds = sql.Table(  # who refers to which buffer
    "holds",
    tables,
    sql.Column("holder", sql.Text, primary_key=True),
    sql.Column("digest", sql.LargeBinary(32), primary_key=True, index=True),
)
