"""What is made when it is first asked for is made once, however many threads ask at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest

from privfed.cli.node_mod import _once
from privfed.protocols.keys import signing_public
from privfed.protocols.session import Identity
from privfed.runtime import identity
from privfed.runtime.identity import SimulatedIdentities

T = TypeVar("T")
THREADS = 8


def at_once(ask: Callable[[int], T]) -> list[T]:
    """Ask from several threads at one moment."""
    ready = threading.Barrier(THREADS)

    def go(number: int) -> T:
        ready.wait(20)
        return ask(number)

    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(go, range(THREADS)))


def test_all_nodes_of_a_simulation_know_the_same_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(key: bytes) -> bytes:
        time.sleep(0.001)  # so that others ask meanwhile
        return signing_public(key)

    monkeypatch.setattr(identity, "signing_public", slow)
    found: list[Identity] = at_once(SimulatedIdentities(range(THREADS)))
    assert all(one.roster == found[0].roster for one in found)
    assert all(signing_public(one.secret_key) == found[0].roster[one.node] for one in found)


def test_runs_of_a_node_share_what_counts_its_budget() -> None:
    made = []

    def make() -> object:
        time.sleep(0.01)
        made.append(object())
        return made[-1]

    get = _once(make)
    assert set(at_once(lambda _: get())) == set(made)
    assert len(made) == 1
