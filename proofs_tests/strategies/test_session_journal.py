"""A server that crashes finishes its session, or begins it anew; no node trains or opens a sum twice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privfed import mods
from privfed.apps import ClientApp
from privfed.array import Array
from privfed.context import Context
from privfed.errors import RunFailed
from privfed.grid import LocalGrid, MemoryRecorder, answer
from privfed.message import Message
from privfed.protocols import LightSecAgg, OneShot, SecAgg
from privfed.protocols.session import Identity
from privfed.record import ArrayRecord, MetricRecord, RecordDict
from privfed.runtime.identity import SimulatedIdentities
from privfed.runtime.run_folder import RunFolder
from privfed.runtime.simulation import run_simulation
from privfed.strategies import FedAvg, GroupedStage, SecureStage
from proofs_tests.strategies.crashing_server import NODES, RUN, receive, send

MODEL = ArrayRecord({"w": Array(np.zeros(3, np.float32))})
NONE: dict[str, Any] = {"fraction_evaluate": 0}


class Fleet:
    """Nodes that survive the server: contexts, and how often each trained."""

    def __init__(self, nodes: int = 4, run: int = 0) -> None:
        identities = SimulatedIdentities(range(1, nodes + 1))
        self.identities: dict[int, Identity] = {node: identities(node) for node in range(1, nodes + 1)}
        self.run = run
        self.contexts = {node: Context(run, node) for node in range(1, nodes + 1)}
        self.trained = dict.fromkeys(self.contexts, 0)
        self.app = ClientApp(mods=[mods.secure_aggregation(identity=lambda context: self.identities[context.node_id])])
        self.app.train()(self._train)

    def _train(self, message: Message, context: Context) -> Message:
        self.trained[context.node_id] += 1
        arrays = message.content.array_records["arrays"].map(lambda v: v + v.dtype.type(context.node_id))
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    def lose(self, node: int) -> None:
        """Take from a node all it kept."""
        self.contexts[node] = Context(self.run, node)

    def opened(self) -> set[int]:
        """How many sums each node helped to open, over all nodes."""
        states = [context.mod_state("secure_aggregation").config_records for context in self.contexts.values()]
        return {len(bytes(state["opened"]["marks"])) // 16 for state in states if "opened" in state}


class Crashed(BaseException):
    """The server's process ended; nothing catches it."""


class Recorder(MemoryRecorder):
    def __init__(self, folder: Path, checkpoint: Any = None) -> None:
        super().__init__(checkpoint)
        self.folder = folder

    def journal_path(self, name: str) -> Path | None:
        return self.folder / name


class Server(LocalGrid):
    """Crashes when `left` more replies came in."""

    def __init__(self, fleet: Fleet, recorder: MemoryRecorder, left: int = 1 << 30) -> None:
        super().__init__(fleet.app, fleet.contexts, recorder=recorder)
        self.left, self.asked = left, 0

    def pull_messages(self, message_ids: Any) -> list[Message]:
        # One at a time, as they come in from a network: those taken before the crash are in the journal.
        ids = [one for one in message_ids if one in self._replies][:1]
        if self.left <= 0:
            raise Crashed
        self.left -= len(ids)
        self.asked += len(ids)
        return super().pull_messages(ids)


def crash_and_resume(
    stage: Any, folder: Path, left: int, rounds: int, between: Any = None
) -> tuple[Fleet, Any, Server]:
    """Crash after `left` replies, resume with a new server; returns the fleet, the model and the second server."""
    fleet = Fleet()
    recorder = Recorder(folder)
    with pytest.raises(Crashed):
        FedAvg(**NONE, stage=stage()).start(Server(fleet, recorder, left), MODEL, rounds)
    if between is not None:
        between(fleet)
    server = Server(fleet, Recorder(folder, recorder.checkpoint))
    result = FedAvg(**NONE, stage=stage()).start(server, MODEL, rounds)
    return fleet, result.arrays["w"].view(), server


PROTOCOLS = [SecAgg(threshold=3), LightSecAgg(threshold=3), OneShot(threshold=3)]


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: type(protocol).__name__)
def test_the_session_ends_wherever_the_server_crashes(protocol: Any, tmp_path: Path) -> None:
    replies = 4 * len(protocol.stages)
    for left in range(1, 2 * replies, 3 if isinstance(protocol, SecAgg) else 7):
        make = lambda: SecureStage(protocol, max_weight=8)  # noqa: E731 - one line says it
        fleet, model, server = crash_and_resume(make, tmp_path / str(left), left, 2)
        np.testing.assert_allclose(model, 5.0, atol=1e-3)
        assert set(fleet.trained.values()) == {2}, f"crash after {left} replies: nodes train once a round"
        assert fleet.opened() == {2}
        assert server.asked == 2 * replies - left, "no node is asked again for what the journal has"


def test_groups_are_taken_up_as_well(tmp_path: Path) -> None:
    make = lambda: GroupedStage(SecAgg(threshold=2), 2, max_weight=8)  # noqa: E731 - one line says it
    for left in (5, 14, 18, 22, 26):  # in the beacon, and at every stage of the sessions
        fleet, model, _ = crash_and_resume(make, tmp_path / str(left), left, 1)
        np.testing.assert_allclose(model, 2.5, atol=1e-3)
        assert set(fleet.trained.values()) == {1}
        assert fleet.opened() == {1}


def test_a_node_that_lost_its_state_makes_the_session_begin_anew(tmp_path: Path) -> None:
    """At mask time nothing is open: the round is repeated under fresh keys, and the first session stays shut."""
    make = lambda: SecureStage(SecAgg(threshold=4), max_weight=8)  # noqa: E731 - one line says it
    fleet, model, _ = crash_and_resume(make, tmp_path, 10, 1, lambda fleet: fleet.lose(4))
    np.testing.assert_allclose(model, 2.5, atol=1e-3)
    assert fleet.opened() == {1}
    assert set(fleet.trained.values()) == {2}, "all had trained by then; a new session asks anew"


def test_a_sum_that_some_opened_is_not_opened_anew(tmp_path: Path) -> None:
    make = lambda: SecureStage(SecAgg(threshold=4), max_weight=8)  # noqa: E731 - one line says it
    with pytest.raises(RunFailed, match="nodes open one sum of the same model and action"):
        crash_and_resume(make, tmp_path, 14, 1, lambda fleet: fleet.lose(4))


def test_a_damaged_or_foreign_journal_is_not_taken_up(tmp_path: Path) -> None:
    def spoil(fleet: Fleet) -> None:
        (path,) = tmp_path.iterdir()
        raw = path.read_bytes()
        path.write_bytes(raw[:60] + bytes([raw[60] ^ 1]) + raw[61:])

    make = lambda: SecureStage(SecAgg(threshold=3), max_weight=8)  # noqa: E731 - one line says it
    fleet, model, _ = crash_and_resume(make, tmp_path, 6, 1, spoil)
    np.testing.assert_allclose(model, 2.5, atol=1e-3)
    assert fleet.opened() == {1}


def test_journals_of_past_rounds_do_not_pile_up(tmp_path: Path) -> None:
    server = Server(Fleet(), Recorder(tmp_path))
    FedAvg(**NONE, stage=SecureStage(SecAgg(threshold=3), max_weight=8)).start(server, MODEL, 3)
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600


def run_server(fleet: Fleet, folder: Path, kill_after: int) -> bool:
    """Serve a server's process from the fleet; SIGKILL it after so many replies. Returns whether it ended by itself."""
    script = Path(__file__).with_name("crashing_server.py")
    command = [sys.executable, str(script), str(folder), "2", "3"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        while (request := receive(process.stdout)) is not None:
            node = request.metadata.dst_node_id
            reply = answer(fleet.app, request, fleet.contexts[node])
            if not kill_after:
                process.kill()
                return False
            kill_after -= 1
            send(process.stdin, reply)
        return process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait(timeout=60)
        process.stdin.close()
        process.stdout.close()


@pytest.mark.parametrize("kill_after", [10, 15, 27])
def test_a_killed_server_process_takes_up_its_session(kill_after: int, tmp_path: Path) -> None:
    fleet, folder = Fleet(len(NODES), RUN), tmp_path / "run"
    assert not run_server(fleet, folder, kill_after)
    assert run_server(fleet, folder, 1 << 30)
    checkpoint = RunFolder.open(folder).restore()
    assert checkpoint is not None
    np.testing.assert_allclose(checkpoint.arrays["w"].view(), 5.0, atol=1e-3)
    assert set(fleet.trained.values()) == {2}
    assert fleet.opened() == {2}


def test_a_simulation_writes_no_journal(tmp_path: Path) -> None:
    """Its nodes end with the process, so that no session could be finished."""
    fleet = Fleet()

    def main(grid: Any, context: Context) -> None:
        FedAvg(**NONE, stage=SecureStage(SecAgg(threshold=2), max_weight=8)).start(grid, MODEL, 1)

    run_simulation(main, fleet.app, 4, run_dir=tmp_path / "run")
    assert not (tmp_path / "run" / "sessions").exists()
