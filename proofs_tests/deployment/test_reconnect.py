"""A node whose SuperLink is back goes on at once, however long it had decided to wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from privfed import Message, RecordDict
from privfed.runtime import fleet
from privfed.runtime.blob import BlobError
from privfed.runtime.fleet import FleetClient, FleetOptions
from privfed.runtime.frame import Offer, Welcome, parcel
from privfed.runtime.handshake import NetworkError
from proofs_tests.deployment.local_link import LocalLink
from proofs_tests.deployment.test_page import free_ports
from proofs_tests.deployment.waiting import eventually


def test_a_welcome_ends_the_wait_of_every_caller_and_so_does_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    client = FleetClient("127.0.0.1:1", None, 1)
    monkeypatch.setattr(fleet, "_FIRST_PAUSE", 60.0)
    tried: list[int] = []
    ends: list[object] = []

    def fail_once(caller: int) -> str:
        tried.append(caller)
        if tried.count(caller) == 1:
            raise BlobError("cut off")
        if caller == 3:
            raise BlobError("cut off again")
        return "done"

    def call(caller: int) -> None:
        try:
            ends.append(client._patiently(lambda: fail_once(caller)))
        except NetworkError as fault:
            ends.append(str(fault))

    threads = [threading.Thread(target=call, args=(caller,), daemon=True) for caller in (1, 2, 3)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(tried) == 3)
    client._take(Welcome(node_id=1, link="paper"))
    eventually(lambda: ends == ["done", "done"] and tried.count(3) == 2)
    client.close()
    eventually(lambda: ends[2:] == ["the connection was closed"])
    for thread in threads:
        thread.join(5)


def test_a_task_that_arrives_while_the_node_hangs_up_is_left_for_the_next_connection() -> None:
    client = FleetClient("127.0.0.1:1", None, 1)
    task, _ = parcel(Message(RecordDict(), 1, "train"))
    client.close()
    assert client._take(Offer(token="a" * 32, expires_at=time.time() + 60, began=(0,), commit=0, parcel=task))
    assert not client._fetching


def test_a_superlink_that_is_back_is_asked_as_soon_as_it_can_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "_FIRST_PAUSE", 60.0)
    monkeypatch.setattr(fleet, "MAX_PAUSE", 60.0)
    (port,) = free_ports(1)
    statuses: list[str] = []
    client = FleetClient(f"127.0.0.1:{port}", None, 1, FleetOptions(on_status=statuses.append))
    eventually(lambda: any("cannot be reached" in status for status in statuses))
    time.sleep(0.5)  # it is in its pause now, of half a minute at the least
    with LocalLink(tmp_path, fleet=f"127.0.0.1:{port}") as link:
        eventually(lambda: link.link.dispatcher.sessions, 10)
        client.close()


def test_a_superlink_that_is_there_and_refuses_is_not_asked_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "_FIRST_PAUSE", 0.4)
    asked: list[float] = []

    def refuse(request: object, context: grpc.ServicerContext) -> Iterator[bytes]:
        asked.append(time.monotonic())
        context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        yield b""

    server = grpc.server(ThreadPoolExecutor(2))
    handlers = {"Session": grpc.stream_stream_rpc_method_handler(refuse)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("privfed.Fleet", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    client = FleetClient(f"127.0.0.1:{port}", None, 1)
    time.sleep(2.0)
    client.close()
    server.stop(None).wait()
    # At once, once more because it can be reached, and then after pauses of 0.8 s, 1.6 s and so on at the least.
    assert 2 <= len(asked) <= 6
