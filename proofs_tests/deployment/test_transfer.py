"""Large models: once for all nodes, never twice for one, and on from where a connection was cut."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from privfed import ArrayRecord, Message, MetricRecord, RecordDict
from privfed.runtime import frame
from privfed.runtime.fleet import FleetClient, FleetOptions, Task
from privfed.runtime.frame import chunk_size
from proofs_tests.deployment.local_link import LocalLink
from proofs_tests.deployment.proxy import CuttingProxy

SIZE = 12_000_000
"""Bytes of the model."""
SLACK = 100_000
APP = """
import numpy as np
from privfed import ArrayRecord, ClientApp, ConfigRecord, Message, RecordDict, ServerApp

client, server = ClientApp(), ServerApp()

@client.train()
def train(message, context):
    return Message(message.content, reply_to=message)

@server.main()
def main(grid, context):
    model = ArrayRecord([np.random.default_rng(1).random(SIZE // 4, np.float32)])
    for _ in range(2):
        for reply in grid.send_and_receive([Message(RecordDict({"a": model}), node, "train") for node in (1, 2)]):
            assert reply.content["a"] == model or reply.content["a"].to_numpy_ndarrays()[0][0] == 5
""".replace("SIZE", str(SIZE))
MANIFEST = """
[project]
name = "large"
[tool.privfed.app.components]
serverapp = "large_app:server"
clientapp = "large_app:client"
"""


def write_app(folder: Path) -> None:
    folder.mkdir()
    (folder / "large_app.py").write_text(APP)
    (folder / "pyproject.toml").write_text(MANIFEST)


@pytest.fixture
def link(tmp_path: Path) -> Iterator[LocalLink]:
    write_app(tmp_path / "app")
    with LocalLink(tmp_path / "home") as link:
        yield link


def echo(task: Task) -> Message:
    """Return a reply as large as the task, of other bytes."""
    model = task.message.content["a"].to_numpy_ndarrays()[0]
    model[0] = 5
    return Message(RecordDict({"a": ArrayRecord([model]), "m": MetricRecord({"n": 1})}), reply_to=task.message)


def received(client: FleetClient) -> Task:
    task = client.receive(20)
    assert task is not None
    return task


def test_a_model_is_kept_once_and_a_node_that_has_it_is_not_sent_it_again(link: LocalLink, tmp_path: Path) -> None:
    clients = [FleetClient(link.fleet, None, node) for node in (1, 2)]
    name = link.submit(tmp_path / "app", 2)
    for number in range(2):
        tasks = [received(client) for client in clients]
        arrays = [
            file for file in (tmp_path / "home" / "arrays").rglob("*") if file.is_file() and file.name != "marker"
        ]
        assert len(arrays) == 1
        assert link.link.fleet.bytes_down < 2 * SIZE + SLACK, number
        for client, task in zip(clients, tasks, strict=True):
            assert client.reply(task.token, Message(task.message.content, reply_to=task.message))
    # The replies are what was sent: nothing had to be uploaded.
    assert link.link.fleet.bytes_up == 0
    assert link.wait(name).state == "completed"
    for client in clients:
        client.close()


@pytest.fixture(params=[64, 6, 3])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of a chunk of the model: 1 MiB, 2 MB and 4 MB (the largest that is taken)."""
    monkeypatch.setattr(frame, "CHUNKS", request.param)
    monkeypatch.setattr(frame, "LARGEST_SENT", frame.MAX_CHUNK)
    return chunk_size(SIZE)


def test_an_upload_that_is_cut_sends_at_most_one_chunk_again(link: LocalLink, tmp_path: Path, chunk: int) -> None:
    proxy = CuttingProxy(link.fleet, [5_000_000, 4_000_000])
    client, other = FleetClient(proxy.address, None, 1), FleetClient(link.fleet, None, 2)
    name = link.submit(tmp_path / "app", 2)
    for _ in range(2):
        assert client.reply((task := received(client)).token, echo(task))
        assert other.reply((task := received(other)).token, echo(task))
    assert link.wait(name).state == "completed"
    assert proxy.connections >= 3
    assert 2 * SIZE <= proxy.bytes_up <= 2 * SIZE + 2 * chunk + SLACK
    assert not [file for file in (tmp_path / "home" / "incoming").rglob("*") if file.is_file()]
    for one in (client, other):
        one.close()
    proxy.close()


def test_a_download_that_is_cut_sends_at_most_one_chunk_again(link: LocalLink, tmp_path: Path, chunk: int) -> None:
    proxy = CuttingProxy(link.fleet, [5_000_000, 4_000_000], downwards=True)
    client, other = FleetClient(proxy.address, None, 1), FleetClient(link.fleet, None, 2)
    name = link.submit(tmp_path / "app", 2)
    for _ in range(2):
        for one in (client, other):
            task = received(one)
            assert one.reply(task.token, Message(task.message.content, reply_to=task.message))
    assert link.wait(name).state == "completed"
    assert proxy.connections >= 3
    assert SIZE <= proxy.bytes_down <= SIZE + 2 * chunk + SLACK
    for one in (client, other):
        one.close()
    proxy.close()


def test_a_node_that_restarts_goes_on_with_what_it_holds_and_what_it_had_fetched(
    link: LocalLink, tmp_path: Path
) -> None:
    cache = str(tmp_path / "cache")
    first, other = FleetClient(link.fleet, None, 1, FleetOptions(cache=cache)), FleetClient(link.fleet, None, 2)
    name = link.submit(tmp_path / "app", 2)
    held = received(first)
    first.close()
    again = FleetClient(link.fleet, None, 1, FleetOptions(cache=cache, holding=(held.token,)))
    assert again.receive(0.5) is None  # it holds the only one: nothing is handed out twice
    assert again.reply(held.token, echo(held)) is True
    assert again.reply(held.token, echo(held)) is True
    task = received(other)
    assert other.reply(task.token, Message(task.message.content, reply_to=task.message))
    lost = received(again)
    again.close()
    forgetful = FleetClient(link.fleet, None, 1, FleetOptions(cache=cache))
    redone = received(forgetful)
    assert redone.message.metadata == lost.message.metadata and redone.token != lost.token
    assert forgetful.reply(lost.token, echo(lost)) is False
    assert forgetful.reply(redone.token, echo(redone)) is True
    task = received(other)
    assert other.reply(task.token, Message(task.message.content, reply_to=task.message))
    assert link.wait(name).state == "completed"
    assert link.link.fleet.bytes_down < 2 * SIZE + SLACK
    for one in (forgetful, other):
        one.close()


def test_a_damaged_upload_is_asked_for_again_and_never_counted(link: LocalLink, tmp_path: Path) -> None:
    client = FleetClient(link.fleet, None, 1)
    other = FleetClient(link.fleet, None, 2)
    link.submit(tmp_path / "app", 2)
    task = received(client)
    inbox = tmp_path / "home" / "incoming" / "1"
    reply = echo(task)
    good = reply.content["a"].to_numpy_ndarrays()[0].tobytes()
    inbox.mkdir(parents=True)
    # As if the disk had changed what arrived: the first half is there, and wrong.
    digest = next(iter(reply.content.array_records["a"].values())).digest
    (inbox / f"{digest.hex()}.part").write_bytes(bytes(SIZE // 2))
    assert client.reply(task.token, reply) is True
    stored = list((tmp_path / "home" / "arrays").rglob(digest.hex()[2:]))
    assert not stored or stored[0].read_bytes() == good
    for one in (client, other):
        one.close()


def test_a_node_uploads_for_two_runs_at_once(link: LocalLink, tmp_path: Path) -> None:
    """Both replies are announced before either is uploaded, and one is the other's model with another weight."""
    clients = [FleetClient(link.fleet, None, node) for node in (1, 2)]
    names = [link.submit(tmp_path / "app", 2) for _ in range(2)]
    for _ in range(2):
        work = [(client, received(client)) for client in clients for _ in names]
        announced = threading.Barrier(len(work))

        def answer(client: FleetClient, task: Task, mark: int, announced: threading.Barrier = announced) -> bool:
            reply = echo(task)
            model = reply.content["a"].to_numpy_ndarrays()[0]
            model[1] = mark
            reply = Message(RecordDict({"a": ArrayRecord([model])}), reply_to=task.message)
            announced.wait(20)
            return client.reply(task.token, reply)

        with ThreadPoolExecutor(len(work)) as pool:
            assert all(pool.map(answer, *zip(*work, strict=True), range(len(work))))
    for name in names:
        row = link.wait(name)
        assert row.state == "completed", row.reason
    assert link.link.fleet.bytes_up < 8 * SIZE + SLACK  # nothing was sent twice
    for client in clients:
        client.close()
