"""Peers that were good once: recorded connections sent again, certificates that expire, and hands that never shake."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from privfed import run_simulation
from privfed.runtime import credentials, gate
from privfed.runtime.app_folder import AppFolder
from privfed.runtime.control import ControlClient
from privfed.runtime.handshake import NetworkError
from proofs_tests.deployment.hostile_wire import Wire
from proofs_tests.deployment.local_link import EXAMPLES, LocalLink, nodes_at
from proofs_tests.deployment.proxy import Recorder
from proofs_tests.deployment.small_node import fresh
from proofs_tests.deployment.test_roles import Members
from proofs_tests.deployment.waiting import eventually


@pytest.fixture
def link(tmp_path: Path) -> Iterator[LocalLink]:
    with LocalLink(tmp_path) as link:
        yield link


def test_whole_connections_sent_again_change_no_model(link: LocalLink) -> None:
    """All that two nodes said in a run, byte for byte, on new connections, in that run and while the next one goes."""
    rounds = 3
    app = AppFolder.open(EXAMPLES / "minimal")
    server, client = fresh(app.path)
    expected = run_simulation(server, client, 2, run_config={**app.config, "num-rounds": rounds}, seed=1).checkpoint
    recorder = Recorder(link.fleet)
    with nodes_at(recorder.address, 2):
        first = link.submit(EXAMPLES / "minimal", 2, num_rounds=rounds)
        assert link.wait(first).state == "completed"
    recorder.close()
    assert sum(map(len, recorder.said)) > 3_000
    answers = link.link.fleet.answers
    assert answers == 2 * rounds
    for said in recorder.said:
        wire = Wire(link.fleet)
        wire.send(said)
        wire.hear(0.3)
        wire.close()
    eventually(lambda: not link.link.dispatcher.sessions)
    assert link.link.fleet.answers == answers, "none of them was counted again"
    with nodes_at(link.fleet, 2):
        second = link.submit(EXAMPLES / "minimal", 2, num_rounds=rounds)
        for said in recorder.said:
            wire = Wire(link.fleet)
            wire.send(said)
            wire.close()
        assert link.wait(second, 60).state == "completed"
    for name in (first, second):
        assert link.folder(name).restore() == expected


def test_recorded_connections_under_tls_do_not_get_past_the_handshake(tmp_path: Path) -> None:
    members = Members(tmp_path / "keys")
    with LocalLink(tmp_path / "home", members.join("link", "main")) as link:
        recorder = Recorder(link.control)
        olga = members.join("operator", "olga")
        with ControlClient(recorder.address, olga) as control:
            assert control.runs() == ()
        recorder.close()
        for said in recorder.said:
            wire = Wire(link.control)
            wire.send(said)
            heard = wire.hear(0.5)
            assert b"privfed-protocol" not in heard and len(heard) < 8_000, "an alert, not an answer"
            wire.close()
        with ControlClient(link.control, olga) as control:
            assert control.runs() == ()


def test_a_certificate_that_expires_while_it_is_in_use_is_refused_with_its_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = Members(tmp_path / "keys")
    olga = members.join("operator", "olga")
    with (
        LocalLink(tmp_path / "home", members.join("link", "main")) as link,
        ControlClient(link.control, olga) as control,
    ):
        assert control.runs() == ()
        later = credentials.utc_now() + datetime.timedelta(days=3650)
        for module in (credentials, gate):
            monkeypatch.setattr(module, "utc_now", lambda: later)
        with pytest.raises(NetworkError, match=r"expired on \d{4}-\d\d-\d\d"):
            control.runs()


def test_hundreds_of_hands_that_never_shake_keep_nobody_out(tmp_path: Path) -> None:
    members = Members(tmp_path / "keys")
    with LocalLink(tmp_path / "home", members.join("link", "main")) as link:
        olga = members.join("operator", "olga")
        stuck = [Wire(address) for address in (link.fleet, link.control) for _ in range(150)]
        for number, wire in enumerate(stuck):
            wire.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[: number % 12])
        began = time.monotonic()
        with ControlClient(link.control, olga) as control:
            assert control.runs() == ()
        assert time.monotonic() - began < 5
        for wire in stuck:
            wire.close()
