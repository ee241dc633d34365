"""The tables of the durable store, and how SQLite is told to be one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from privfed.errors import AppError

try:
    import sqlalchemy as sql
except ImportError:  # pragma: no cover - the extra is installed wherever tests run
    raise AppError("the durable store needs SQLAlchemy: pip install 'privfed[link]'") from None

__all__ = ["buffers", "counted", "holds", "nodes", "open_database", "runs", "sql", "states", "tasks"]

BUSY_SECONDS = 30.0

tables = sql.MetaData()
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
    sql.Column("id", sql.Integer, primary_key=True, autoincrement=True),
    sql.Column("run_id", sql.BigInteger, nullable=False),
    sql.Column("node_id", sql.BigInteger, nullable=False),
    sql.Column("message_id", sql.Text, nullable=False, index=True),
    sql.Column("envelope", sql.LargeBinary, nullable=False),
    sql.Column("expires_at", sql.Float, nullable=False, index=True),
    sql.Column("token", sql.String(32), index=True),  # of the lease, while the task is out
    sql.Column("lease_until", sql.Float),
    sql.Column("withdrawn", sql.Boolean, nullable=False, default=False),  # while it was out
    sql.Column("reply", sql.LargeBinary),
    sql.Index("tasks_of_node", "run_id", "node_id"),
)
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


def open_database(path: Path) -> sql.Engine:
    """Open or create a SQLite file: commits survive a power cut, transactions take the write lock first."""
    engine = sql.create_engine(f"sqlite:///{path}", connect_args={"timeout": BUSY_SECONDS})

    @sql.event.listens_for(engine, "connect")
    def prepare(connection: Any, record: object) -> None:
        del record
        connection.isolation_level = None  # SQLAlchemy begins transactions below, not the driver
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")

    @sql.event.listens_for(engine, "begin")
    def begin(connection: sql.Connection) -> None:
        # A deferred transaction that reads first and then writes can fail with "database is locked".
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    tables.create_all(engine)
    return engine
