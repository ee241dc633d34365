"""Arrays in a bucket: an S3 server on loopback, and fsspec's own file systems; the same store as with files."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from privfed import Array, ArrayRecord, Message, RecordDict
from privfed.errors import AppError, WireError
from privfed.runtime.array_bucket import ArrayBucket
from privfed.runtime.array_store import ArrayStoreError
from privfed.runtime.database import DatabaseError
from privfed.runtime.fleet import FleetClient
from privfed.runtime.patience import storage_fault
from privfed.runtime.sqlstore import LARGE, SqlStore
from privfed.runtime.store import Store
from proofs_tests.deployment.local_link import LocalLink
from proofs_tests.deployment.s3_server import bucket
from proofs_tests.deployment.test_transfer import echo, received, write_app
from proofs_tests.runtime.store_case import RUN, close, instruction, running
from proofs_tests.runtime.test_store import *  # noqa: F403 - the suite of every store, run here over the fixture below

pytest.importorskip("s3fs", reason="run by make test-s3, where s3fs is installed")
import fsspec

pytestmark = pytest.mark.s3
DIGESTS = [bytes([mark]) * 32 for mark in range(1, 4)]


@pytest.fixture(params=["s3", "file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return bucket()
    return f"file://{tmp_path}/bucket" if request.param == "file" else f"memory://{tmp_path}"


@pytest.fixture
def store(url: str, tmp_path: Path) -> Iterator[Store]:
    found = running(SqlStore(tmp_path / "home", arrays=url))
    yield found
    close(found)


def objects(url: str) -> set[str]:
    files, root = (
        fsspec.core.url_to_fs(url, use_listings_cache=False) if url[:2] == "s3" else fsspec.core.url_to_fs(url)
    )
    return {str(path).removeprefix(root).strip("/") for path in files.find(root)}


def large(mark: float) -> Message:
    content = RecordDict({"a": ArrayRecord([np.full(3_000_000, mark, np.float32)])})
    return Message(content, 1, "train").with_metadata(run_id=RUN)


def test_an_object_is_written_once_read_by_all_and_gone_when_it_is_removed(url: str, tmp_path: Path) -> None:
    first, second = (ArrayBucket(url, tmp_path / name) for name in ("one", "two"))
    assert first.marker is None and not list(first)
    assert second.mark() == first.marker == second.marker
    data = np.random.default_rng(1).bytes(11_000_001)  # more than one part of an upload
    first.write(DIGESTS[0], data)
    second.write(DIGESTS[0], data)
    second.write(DIGESTS[1], b"x" * LARGE)
    assert set(first) == set(DIGESTS[:2]) and DIGESTS[0] in second and DIGESTS[2] not in first
    kept = second.read(DIGESTS[0])
    assert kept == data and first.read(DIGESTS[1]) == b"x" * LARGE
    first.remove(DIGESTS[0])
    first.remove(DIGESTS[0])
    assert set(second) == {DIGESTS[1]} and kept == data
    for missing in (DIGESTS[0], DIGESTS[2]):
        with pytest.raises(FileNotFoundError):
            first.read(missing)
    assert objects(url) == {"marker", f"02/{'02' * 31}"}


def test_a_cache_that_is_full_drops_what_was_used_longest_ago(url: str, tmp_path: Path) -> None:
    arrays = ArrayBucket(url, tmp_path / "cache", budget=2 * LARGE)
    for mark, digest in enumerate(DIGESTS):
        arrays.write(digest, bytes([mark]) * LARGE)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert [arrays.read(digest)[0] for digest in DIGESTS] == [0, 1, 2]
    with pytest.raises(ArrayStoreError, match="cannot hold"):
        arrays.write(bytes(32), bytes(3 * LARGE))


def test_a_database_belongs_to_its_bucket(url: str, tmp_path: Path) -> None:
    close(running(SqlStore(tmp_path / "home", arrays=url)))
    close(SqlStore(tmp_path / "home", arrays=url))
    for other in (url + "-2", None):
        with pytest.raises(DatabaseError, match="give the folder that belongs to this database"):
            SqlStore(tmp_path / "home", arrays=other)


def test_large_arrays_are_in_the_bucket_and_leave_it_when_nobody_needs_them(url: str, tmp_path: Path) -> None:
    store = running(SqlStore(tmp_path / "home", arrays=url))
    store.push(RUN, [large(1), large(1), instruction(2)])
    assert len(objects(url)) == 2 and not (tmp_path / "home" / "arrays").exists()
    close(store)
    store = SqlStore(tmp_path / "home", arrays=url)
    lease = store.lease(0.0, 50.0)
    assert lease is not None and lease.message.content["a"] == large(1).content["a"]
    store.set_run_state(RUN, "stopped")
    store.runs()
    assert objects(url) == {"marker"} and not list((tmp_path / "home" / "cache").iterdir())
    close(store)


def test_a_damaged_object_is_never_taken_for_an_array(url: str, tmp_path: Path) -> None:
    store = running(SqlStore(tmp_path / "home", arrays=url))
    store.push(RUN, [large(1)])
    close(store)
    files, root = fsspec.core.url_to_fs(url)
    (name,) = objects(url) - {"marker"}
    good = files.cat_file(f"{root}/{name}")
    files.pipe_file(f"{root}/{name}", good[:5] + b"?" + good[6:])
    store = SqlStore(tmp_path / "home", arrays=url)
    with pytest.raises(WireError, match="does not have the hash"):
        store.lease(0.0, 50.0)
    close(store)
    files.pipe_file(f"{root}/{name}", good)
    store = SqlStore(tmp_path / "home", arrays=url)
    assert store.lease(0.0, 50.0) is not None
    close(store)


def test_a_bucket_that_is_away_is_a_named_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = bucket()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
    arrays = ArrayBucket(url, tmp_path)
    with pytest.raises(ArrayStoreError) as caught:
        arrays.write(DIGESTS[0], bytes(LARGE))
    assert re.match(r"s3://test-\d+-\d+/federation fails: ", storage_fault(caught.value))
    assert "secret-word" not in str(caught.value)
    with pytest.raises(ArrayStoreError):
        SqlStore(tmp_path / "home", arrays=url)


@pytest.mark.parametrize("url", ["bucket/folder", "s3://user:word@host/x", "nonsense://x"])
def test_a_url_that_is_none_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(AppError, match="--arrays"):
        ArrayBucket(url, tmp_path)


def test_without_the_packages_the_error_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(AppError, match=r"pip install 'privfed\[s3\]'"):
        ArrayBucket("s3://bucket/x", tmp_path)


def test_a_federation_with_its_arrays_in_a_bucket_goes_on_after_a_restart(tmp_path: Path) -> None:
    write_app(tmp_path / "app")
    url = bucket()

    def start() -> LocalLink:
        link = LocalLink(tmp_path / "home")
        link.options = dataclasses.replace(link.options, arrays=url)
        return link

    with start() as link:
        clients = [FleetClient(link.fleet, None, node) for node in (1, 2)]
        name = link.submit(tmp_path / "app", 2)
        tasks = [received(client) for client in clients]
        assert len(objects(url)) == 2  # the marker, and one model for both nodes
        assert clients[0].reply(tasks[0].token, echo(tasks[0]))
        for client in clients:
            client.close()
    with start() as link:
        clients = [FleetClient(link.fleet, None, node) for node in (1, 2)]
        for _ in range(2):
            for client in clients:
                task = received(client)
                assert client.reply(task.token, echo(task))
        assert link.wait(name).state == "completed"
        for client in clients:
            client.close()
    assert objects(url) == {"marker"}


def test_the_command_says_what_is_wrong_with_a_bucket(tmp_path: Path) -> None:
    bucket()
    words = [sys.executable, "-m", "privfed.cli.main", "superlink", "--insecure", "--fleet", "127.0.0.1:0"]
    words += ["--control", "127.0.0.1:0", "--arrays", "s3://there-is-no-such-bucket/x", "--home", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "there-is-no-such-bucket" in done.stderr and "Traceback" not in done.stderr


def test_arrays_of_every_kind_survive_the_bucket(store: Store) -> None:
    rng = np.random.default_rng(3)
    record = ArrayRecord(
        {"f": Array(rng.random((300, 400))), "b": Array(rng.random(200_000) < 0.5), "e": Array(np.zeros((0,)))}
    )
    store.push(RUN, [Message(RecordDict({"a": record}), 1, "train").with_metadata(run_id=RUN)])
    lease = store.lease(0.0, 50.0)
    assert lease is not None and lease.message.content["a"] == record
