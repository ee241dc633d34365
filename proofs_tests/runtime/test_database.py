"""Databases of the durable store: migrated, tied to their arrays, safe under many workers and a killed server."""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sql
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory

from privfed import Message, RecordDict, wire
from privfed.runtime import migrations
from privfed.runtime.database import NEWEST, DatabaseError, open_database
from privfed.runtime.sql_schema import tables
from privfed.runtime.sqlstore import SqlStore
from proofs_tests.runtime.store_case import EPOCH, RUN, ids, instruction, running, state

BOTH = ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)]


def where(name: str, path: Path) -> Path | str:
    if name == "sqlite":
        return path / "link.db"
    from proofs_tests.runtime.postgres import server

    return server().database()


@pytest.mark.parametrize("name", BOTH)
def test_the_migrations_make_the_tables_the_code_uses(name: str, tmp_path: Path) -> None:
    engine = open_database(where(name, tmp_path))
    with engine.begin() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, tables) == []
        assert context.get_current_revision() == NEWEST
    engine.dispose()


def migrate_to(revision: str, engine: sql.Engine) -> None:
    """Migrate an empty database as the version that ended with this revision did."""
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    scripts = ScriptDirectory.from_config(config)
    with engine.begin() as connection:
        options = {"fn": lambda before, context: scripts._upgrade_revs(revision, before)}
        context = MigrationContext.configure(connection, opts=options)
        with Operations.context(context):
            context.run_migrations()
        assert context.get_current_revision() == revision


@pytest.mark.parametrize("name", BOTH)
def test_tasks_of_the_version_before_go_on(name: str, tmp_path: Path) -> None:
    """Queued, out, withdrawn while out, and answered ones: handed out, completed and pulled by this version."""
    place = where(name, tmp_path)
    engine = sql.create_engine(place if isinstance(place, str) else f"sqlite:///{place}")
    migrate_to("0003", engine)
    queued, out, gone, done, behind = (instruction(node, mark=node, ttl=1e9) for node in (1, 2, 3, 4, 2))
    reply = Message(RecordDict(), reply_to=done)
    with engine.begin() as connection:
        connection.execute(tables.tables["runs"].insert().values(run_id=RUN, state="running", reason=""))
        for node in (1, 2, 3, 4):
            connection.execute(tables.tables["nodes"].insert().values(run_id=RUN, node_id=node))
        for message in (queued, out, gone, done, behind):
            token = {id(out): "a" * 32, id(gone): "b" * 32}.get(id(message))
            row = {
                "run_id": RUN,
                "node_id": message.metadata.dst_node_id,
                "message_id": message.metadata.message_id,
                "envelope": wire.encode(message)[0],
                "expires_at": message.metadata.expires_at,
                "token": token,
                "lease_until": EPOCH + 50 if token else None,
                "withdrawn": message is gone,
                "reply": wire.encode(reply)[0] if message is done else None,
            }
            connection.execute(tables.tables["tasks"].insert().values(**row))
    engine.dispose()
    store = SqlStore(tmp_path, place if isinstance(place, str) else None)
    assert [one.message.metadata.message_id for one in store.lease_many(EPOCH, 50, 9)] == ids(queued)
    assert [one.metadata.reply_to_message_id for one in store.pull(RUN, ids(done, out))] == ids(done)
    answers = [(token * 32, Message(RecordDict(), reply_to=one), None) for token, one in (("a", out), ("b", gone))]
    assert store.complete_many(answers) == [*ids(out), None]
    assert [one.message.metadata.message_id for one in store.lease_many(EPOCH, 50, 9)] == ids(behind)
    store.close()


@pytest.mark.parametrize("name", BOTH)
def test_a_database_of_a_newer_version_is_refused_and_left_alone(name: str, tmp_path: Path) -> None:
    place = where(name, tmp_path)
    engine = open_database(place)
    with engine.begin() as connection:
        connection.execute(sql.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(DatabaseError, match=r"9999.*newer"):
        open_database(place)
    with engine.begin() as connection:
        assert connection.execute(sql.text("SELECT version_num FROM alembic_version")).scalar() == "9999"
    engine.dispose()


def test_what_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "link.db").write_bytes(b"this is not a database" * 100)
    with pytest.raises(DatabaseError, match=r"link\.db cannot be opened"):
        open_database(tmp_path / "link.db")
    with pytest.raises(DatabaseError, match="host/name"):
        open_database("mysql://u:secret@host/name")
    with pytest.raises(DatabaseError) as refusal:
        open_database("postgresql+psycopg://u:secret@127.0.0.1:1/name")
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize("name", BOTH)
def test_a_database_is_tied_to_its_arrays(name: str, tmp_path: Path) -> None:
    url = where(name, tmp_path)
    database = url if isinstance(url, str) else None
    store = running(SqlStore(tmp_path / "a", database))
    store.put_states(RUN, {1: state(1, 40_000)})
    store.close()
    SqlStore(tmp_path / "a", database).close()
    for folder in ("empty", "other"):
        home = tmp_path / folder
        home.mkdir()
        if folder == "other":
            SqlStore(home).close()
            (home / "link.db").unlink()
        if database is None:
            shutil.copy(tmp_path / "a" / "link.db", home / "link.db")
        with pytest.raises(DatabaseError, match="belongs to this database"):
            SqlStore(home, database)
    again = SqlStore(tmp_path / "a", database)
    assert again.state(RUN, 1) == state(1, 40_000)
    again.close()


def claim_all(make: Callable[[], SqlStore], workers: int, count: int) -> Counter[str]:
    """Let workers, each with a store of its own, claim and answer until nothing is left."""
    claimed: Counter[str] = Counter()
    lock = threading.Lock()

    def work() -> None:
        store = make()
        while sum(claimed.values()) < count:
            lease = store.lease(EPOCH, 1_000)
            if lease is None:
                time.sleep(0.002)
                continue
            with lock:
                claimed[lease.message.metadata.message_id] += 1
            assert store.complete(lease.token, Message(RecordDict(), reply_to=lease.message), None) is not None
        store.close()

    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(work) for _ in range(workers)]:
            done.result()
    return claimed


def queue(name: str, path: Path, nodes: int, count: int, workers: int) -> None:
    url = where(name, path)
    database = url if isinstance(url, str) else None
    store = running(SqlStore(path, database), nodes)
    sent = [instruction(1 + number % nodes, ttl=1e9) for number in range(count)]
    for start in range(0, count, 5_000):
        store.push(RUN, sent[start : start + 5_000])
    claimed = claim_all(lambda: SqlStore(path, database), workers, count)
    assert set(claimed) == set(ids(*sent))
    assert set(claimed.values()) == {1}
    assert store.lease(EPOCH, 10) is None
    assert len(store.pull(RUN, ids(*sent))) == count
    store.close()


@pytest.mark.parametrize("name", BOTH)
def test_many_workers_claim_each_task_once(name: str, tmp_path: Path) -> None:
    queue(name, tmp_path, nodes=7, count=200, workers=4)


@pytest.mark.postgres
def test_tasks_of_one_node_go_out_one_at_a_time_whoever_asks(tmp_path: Path) -> None:
    from proofs_tests.runtime.postgres import server

    database = server().database()
    store = running(SqlStore(tmp_path, database), 1)
    sent = [instruction(1, mark=mark, ttl=1e9) for mark in range(40)]
    store.push(RUN, sent)
    order: list[str] = []
    out, most = 0, 0
    lock = threading.Lock()

    def work() -> None:
        nonlocal out, most
        mine = SqlStore(tmp_path, database)
        while len(order) < len(sent):
            lease = mine.lease(EPOCH, 1_000)
            if lease is None:
                continue
            with lock:
                out += 1
                most = max(most, out)
                order.append(lease.message.metadata.message_id)
            with lock:
                out -= 1
            mine.complete(lease.token, Message(RecordDict(), reply_to=lease.message), None)
        mine.close()

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(work) for _ in range(6)]:
            done.result()
    assert order == ids(*sent)
    assert most == 1
    store.close()


@pytest.mark.postgres
def test_a_killed_server_loses_nothing_it_acknowledged(tmp_path: Path) -> None:
    from proofs_tests.runtime.postgres import Postgres

    own = Postgres()
    database = own.database()
    store = running(SqlStore(tmp_path, database), 3)
    done: list[str] = []
    for mark in range(3):
        sent = [instruction(node, mark=mark, ttl=1e9) for node in (1, 2, 3)]
        store.push(RUN, sent)
        for _ in sent:
            lease = store.lease(EPOCH, 1_000)
            assert lease is not None
            if store.complete(lease.token, Message(RecordDict(), reply_to=lease.message), state(mark)):
                done.append(lease.message.metadata.message_id)
        own.kill()
        with pytest.raises(sql.exc.OperationalError):
            store.run(RUN)
        own.start()
        assert store.run(RUN).state == "running"
        assert store.states(RUN) == dict.fromkeys((1, 2, 3), state(mark))
    assert {reply.metadata.reply_to_message_id for reply in store.pull(RUN, done)} == set(done)
    store.close()
    own.remove()
