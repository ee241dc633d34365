"""Two releases together: what one release before speaks is served, and spoken to; a mismatch names both."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from privfed.runtime import fleet, gate
from privfed.runtime.fleet import FleetClient
from privfed.runtime.fleet_service import FleetService
from privfed.runtime.handshake import NEWEST, OLDEST, Refused, agree, greeting
from proofs_tests.deployment.local_link import LocalLink
from proofs_tests.deployment.test_transfer import SIZE, SLACK, echo, received, write_app

OLD = {"Upload", "Download"}
NEW = {"Send", "Fetch"}


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The transfers that a SuperLink was asked for."""
    found: set[str] = set()
    names = {"_upload": "Upload", "_download": "Download", "_receive": "Send", "_fetch": "Fetch"}
    for method, name in names.items():
        true = getattr(FleetService, method)

        @functools.wraps(true)
        async def noted(self: FleetService, *given: object, true: object = true, name: str = name) -> object:
            found.add(name)
            return await true(self, *given)  # type: ignore[operator]  # a method

        monkeypatch.setattr(FleetService, method, noted)
    return found


@pytest.fixture
def link(tmp_path: Path, used: set[str]) -> Iterator[LocalLink]:
    write_app(tmp_path / "app")
    with LocalLink(tmp_path / "home") as link:
        yield link


def run(link: LocalLink, app: Path) -> None:
    """Run two rounds of a large model over two nodes that change it."""
    clients = [FleetClient(link.fleet, None, node) for node in (1, 2)]
    name = link.submit(app, 2)
    for _ in range(2):
        for client in clients:
            task = received(client)
            assert client.reply(task.token, echo(task))
    assert link.wait(name).state == "completed"
    assert 2 * SIZE <= link.link.fleet.bytes_down < 2 * SIZE + SLACK
    assert 2 * SIZE <= link.link.fleet.bytes_up < 4 * SIZE + SLACK
    for client in clients:
        client.close()


def test_this_release_acknowledges_chunks(link: LocalLink, tmp_path: Path, used: set[str]) -> None:
    run(link, tmp_path / "app")
    assert used == NEW


def test_a_node_of_the_release_before_is_served(
    link: LocalLink, tmp_path: Path, used: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = functools.partial(greeting, 1, 1, "0.0.9")
    monkeypatch.setattr(fleet, "greeting", old)
    monkeypatch.setattr(fleet, "agree", lambda metadata, peer: min(1, agree(metadata, peer)))
    run(link, tmp_path / "app")
    assert used == OLD


def test_a_superlink_of_the_release_before_is_spoken_to(
    link: LocalLink, tmp_path: Path, used: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "greeting", functools.partial(greeting, 1, 1, "0.0.9"))
    run(link, tmp_path / "app")
    assert used == OLD


@pytest.mark.parametrize(
    ("low", "high"), [(low, high) for low, high in itertools.product(range(5), repeat=2) if low <= high]
)
def test_the_newest_version_both_speak_is_chosen_or_both_are_named(low: int, high: int) -> None:
    ours, theirs = set(range(OLDEST, NEWEST + 1)), set(range(low, high + 1))
    told = greeting(low, high, "4.5.6")
    if ours & theirs:
        assert agree(told, "link.example.org") == max(ours & theirs)
        return
    with pytest.raises(Refused) as caught:
        agree(told, "link.example.org")
    text = str(caught.value)
    assert f"link.example.org (privfed 4.5.6) speaks protocol {low} to {high}" in text
    assert f"{OLDEST} to {NEWEST}" in text and ("upgrade link" in text) == (high < OLDEST)
