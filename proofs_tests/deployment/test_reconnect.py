"""A node whose SuperLink is back goes on at once, however long it had decided to wait."""

from __future__ import annotations

import threading
import time

import pytest

from privfed.runtime import fleet
from privfed.runtime.blob import BlobError
from privfed.runtime.fleet import FleetClient
from privfed.runtime.frame import Welcome
from privfed.runtime.handshake import NetworkError


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


def eventually(check: object) -> None:
    deadline = time.monotonic() + 10
    while not check():  # type: ignore[operator]  # a function
        assert time.monotonic() < deadline
        time.sleep(0.01)
