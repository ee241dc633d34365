"""Opening the durable store's database: SQLite in a file, or PostgreSQL by its URL; migrated to this version first."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from privfed.errors import AppError, PrivfedError
from privfed.runtime.sql_schema import sql

BUSY_SECONDS = 10.0
POSTGRES = "postgresql+psycopg://"
# Whoever holds this lock in PostgreSQL writes alone, as whoever holds SQLite's write lock does.
_WRITER = 0x7072_6976_6665_6401
_MIGRATOR = _WRITER + 1
_ALONE = sql.text("SELECT pg_advisory_xact_lock(:lock)")
_BESIDE = sql.text("SELECT pg_advisory_xact_lock_shared(:lock)")
_READS = "privfed_reads"
_LOOK_AGAIN_SECONDS = 0.0005
_SILENCE = {
    "connect_timeout": 10,
    "keepalives_idle": 15,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
"""After how long a connection to a machine that says nothing any more ends: seconds, and the last in milliseconds."""
NEWEST = "0004"
"""The newest of the migrations."""


class DatabaseError(PrivfedError):
    """A database that cannot be used: says which, why, and what to do."""


def open_database(where: Path | str) -> sql.Engine:
    """Open a SQLite file (a path), or a PostgreSQL database (postgresql+psycopg://...), and migrate it.

    Commits survive a power cut: WAL and synchronous=FULL in SQLite, PostgreSQL's own settings there.
    Raises DatabaseError when it cannot be opened, or was written by a newer version; AppError without the driver.
    """
    engine = _postgres(where) if isinstance(where, str) else _sqlite(where)
    try:
        _migrate(engine)
    except DatabaseError:
        engine.dispose()
        raise
    except sql.exc.SQLAlchemyError as cause:
        engine.dispose()
        reason = str(getattr(cause, "orig", None) or cause).strip().splitlines()[0]
        raise DatabaseError(f"{describe(engine)} cannot be opened: {reason}") from cause
    return engine


def describe(engine: sql.Engine) -> str:
    """Return the database's address without its password."""
    return engine.url.render_as_string(hide_password=True)


def _sqlite(path: Path) -> sql.Engine:
    engine = sql.create_engine(f"sqlite:///{path}", connect_args={"timeout": BUSY_SECONDS})

    @sql.event.listens_for(engine, "connect")
    def prepare(connection: Any, record: object) -> None:
        del record
        connection.isolation_level = None  # SQLAlchemy begins transactions below, not the driver
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")

    @sql.event.listens_for(engine, "begin")
    def begin(connection: sql.Connection) -> None:
        if connection.get_execution_options().get(_READS):
            connection.exec_driver_sql("BEGIN")
        else:
            # A deferred transaction that reads first and then writes can fail with "database is locked".
            _take_write_lock(connection)

    return engine


def _take_write_lock(connection: sql.Connection) -> None:
    """Begin a SQLite transaction that writes, as soon as the others let it.

    SQLite itself looks again after up to 100 ms, and most transactions take less than one: it would sleep while nobody
    writes.
    """
    driver = connection.connection.driver_connection
    assert driver is not None
    deadline = time.monotonic() + BUSY_SECONDS
    driver.execute("PRAGMA busy_timeout = 0")
    try:
        while time.monotonic() < deadline:
            try:
                driver.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as fault:
                if fault.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                    break
            time.sleep(_LOOK_AGAIN_SECONDS)
        connection.exec_driver_sql("BEGIN IMMEDIATE")  # once more, and its fault is raised as those of others are
    finally:
        driver.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1e3:.0f}")


def _postgres(url: str) -> sql.Engine:
    if not url.startswith(POSTGRES):
        raise DatabaseError(f"database {url.split('@')[-1]!r}: give a path, or {POSTGRES}user:password@host/name")
    try:
        import psycopg  # noqa: F401 - asked for by its dialect; found out here, with the fix
    except ImportError:
        raise AppError("PostgreSQL needs its driver: pip install 'privfed[postgres]'") from None
    told = sql.make_url(url).query
    # A connection that died with its server is found out before it is used; one to a server that vanished ends in time.
    return sql.create_engine(
        url,
        pool_pre_ping=True,
        pool_size=8,
        max_overflow=24,
        isolation_level="READ COMMITTED",
        connect_args={name: value for name, value in _SILENCE.items() if name not in told},
    )


def is_postgres(engine: sql.Engine) -> bool:
    """Return whether the engine speaks to PostgreSQL."""
    return engine.dialect.name == "postgresql"


@contextlib.contextmanager
def alone(engine: sql.Engine, *, shared: bool = False) -> Iterator[sql.Connection]:
    """Open a transaction that no other writer runs beside, in this process or another.

    shared: in PostgreSQL others that say so run beside it.
    """
    with engine.begin() as connection:
        if is_postgres(engine):
            connection.execute(_BESIDE if shared else _ALONE, {"lock": _WRITER})
        yield connection


def reader(engine: sql.Engine) -> sql.Engine:
    """Return the engine for transactions that only read: they wait for no writer, and see what was last committed."""
    return engine.execution_options(**{_READS: True})


def _migrate(engine: sql.Engine) -> None:
    """Bring the tables to this version, once, whoever else opens the database."""
    if _version(engine) == NEWEST:
        return  # nobody waits for a library that has nothing to do
    from alembic.config import Config
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    scripts = ScriptDirectory.from_config(config)
    with engine.begin() as connection:
        if is_postgres(engine):
            connection.execute(sql.select(sql.func.pg_advisory_xact_lock(_MIGRATOR)))
        context = MigrationContext.configure(connection, opts={"fn": _steps(scripts)})
        before = context.get_current_revision()
        if before is not None and before not in {script.revision for script in scripts.walk_revisions()}:
            raise DatabaseError(
                f"{describe(engine)} has version {before}, which this privfed does not know: it was written by a newer "
                "one; upgrade this privfed, or restore a copy from before"
            )
        if before != scripts.get_current_head():
            from alembic.operations import Operations

            with Operations.context(context):
                context.run_migrations()


def _version(engine: sql.Engine) -> str | None:
    """Return the last migration of a database; None for one that has none yet."""
    with engine.begin() as connection:
        if not sql.inspect(connection).has_table("alembic_version"):
            return None
        found = connection.execute(sql.text("SELECT version_num FROM alembic_version")).scalar()
        return None if found is None else str(found)


def _steps(scripts: Any) -> Any:
    def upgrade(revision: Any, context: object) -> Any:
        del context
        return scripts._upgrade_revs("head", revision)

    return upgrade
