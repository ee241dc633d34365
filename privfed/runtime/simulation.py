"""Simulation: the Link of a deployment, its nodes in this process."""

from __future__ import annotations

import functools
import math
import os
import secrets
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from privfed.apps import CallNext, ServerApp
from privfed.context import Context, UserConfig, check_user_config
from privfed.errors import RunFailed, RunStopped
from privfed.grid import Checkpoint, Grid, MemoryRecorder
from privfed.message import SERVER_NODE_ID, Message
from privfed.record import ArrayRecord
from privfed.runtime.engine import ENGINES, Assignment, ThreadEngine, execute
from privfed.runtime.identity import SimulatedIdentities
from privfed.runtime.link import Link, LinkGrid, Traffic
from privfed.runtime.run_folder import Listener, RunFolder
from privfed.runtime.store import NodeState, StoreError
from privfed.runtime.transport import MemoryTransport

NodeConfig = Mapping[str, Any] | Callable[[int], Mapping[str, Any]]
MOMENT = 1.0
"""Seconds a run waits before its folder says for what."""
Main = ServerApp | Callable[[Grid, Context], object]


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run left behind.

    status: "completed", or "stopped" when it was asked to stop. result: what the server app's main function returned.
    checkpoint: the last committed round. run_dir: None when nothing was written. events: what was reported, when
    nothing was written.
    """

    run_id: int
    status: str
    checkpoint: Checkpoint | None = None
    traffic: Traffic = field(default_factory=Traffic)
    run_dir: Path | None = None
    result: Any = None
    seed: int | None = None
    events: Sequence[tuple[str, Mapping[str, object]]] = field(default=(), repr=False)

    @property
    def arrays(self) -> ArrayRecord:
        """The last committed model (empty when the app committed none)."""
        return self.checkpoint.arrays if self.checkpoint is not None else ArrayRecord()

    @property
    def rounds(self) -> tuple[Mapping[str, object], ...]:
        """The metrics of every committed round, in order."""
        return self.checkpoint.metrics if self.checkpoint is not None else ()

    metrics = rounds


def run_simulation(
    server_app: Main,
    client_app: CallNext,
    num_nodes: int,
    *,
    run_config: Mapping[str, Any] | None = None,
    node_config: NodeConfig | None = None,
    engine: str = "threads",
    seed: int | None = None,
    run_dir: str | Path | RunFolder | None = None,
    resume: bool = False,
    threads: int | None = None,
    insecure_test_randomness: int | None = None,
    on_event: Listener | None = None,
) -> RunResult:
    """Run a federation of `num_nodes` nodes, ids 1 to n, in this process.

    run_config: the settings every app sees. node_config: added to each node's "partition-id" (0 to n - 1) and
    "num-partitions"; a mapping for all, or a function of the partition. seed: of data, initial model and training;
    same seed, same bits, whatever `threads` is (default: one per core). Masks and noise come from the operating
    system all the same, unless `insecure_test_randomness` seeds the noise in a test; every epsilon is then infinite.
    run_dir: the folder the run is written to; None writes nothing. resume: go on with the run in that folder from
    its last committed round. on_event: called with each event's name and fields, in the thread that reports it.

    Raises RunFailed with the reason when the run fails, ValueError for a bad argument, RunFolderError for a folder
    that is in use or damaged. KeyboardInterrupt stops the run and is raised again.
    """
    if isinstance(num_nodes, bool) or not isinstance(num_nodes, int) or num_nodes < 1:
        raise ValueError(f"num_nodes must be a whole number >= 1, got {num_nodes!r}")
    if engine not in ENGINES:
        raise ValueError(f"engine {engine!r} does not exist: use one of {', '.join(map(repr, ENGINES))}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be >= 1, got {threads}")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ValueError(f"seed must be an int or None, got {seed!r}")
    settings = check_user_config(run_config or {}, "run_config")
    asked: dict[str, Any] = {"run-config": settings, "nodes": num_nodes, "seed": seed}
    recorder = _recorder(run_dir, resume, asked, insecure_test_randomness, on_event)
    identities = SimulatedIdentities(range(1, num_nodes + 1))
    nodes = tuple(range(1, num_nodes + 1))
    assignment = Assignment(_node_configs(num_nodes, node_config), settings, seed, identities, nodes=nodes)
    run = _Run(num_nodes, assignment, recorder)
    return run.execute(server_app, client_app, min(num_nodes, threads or os.cpu_count() or 1))


class _Memory(MemoryRecorder):
    """Keeps events and the last checkpoint in memory, and passes events on."""

    def __init__(self, insecure_test_randomness: int | None, listener: Listener | None) -> None:
        super().__init__(insecure_test_randomness=insecure_test_randomness)
        self._listener = listener

    def report(self, event: str, **fields: object) -> None:
        super().report(event, **fields)
        if self._listener is not None:
            self._listener(event, fields)


def _recorder(
    run_dir: str | Path | RunFolder | None,
    resume: bool,
    asked: Mapping[str, Any],
    insecure: int | None,
    listener: Listener | None,
) -> RunFolder | _Memory:
    if run_dir is None:
        if resume:
            raise ValueError("resume needs run_dir: the folder of the run to go on with")
        return _Memory(insecure, listener)
    if not isinstance(run_dir, RunFolder):
        if resume:
            run_dir = RunFolder.open(Path(run_dir))
            for name, value in asked.items():
                if run_dir.config.get(name) != value:
                    raise ValueError(f"the run to resume has {name} {run_dir.config.get(name)!r}, not {value!r}")
        else:
            run_dir = RunFolder.create(Path(run_dir), asked)
    run_dir.insecure_test_randomness = insecure
    run_dir.journals = False  # simulated nodes end with this process: no session of theirs outlives it
    run_dir.listener = listener or run_dir.listener
    return run_dir


def _node_configs(num_nodes: int, extra: NodeConfig | None) -> Callable[[int], UserConfig]:
    def configure(node_id: int) -> UserConfig:
        given = extra(node_id - 1) if callable(extra) else extra or {}
        own: UserConfig = {"partition-id": node_id - 1, "num-partitions": num_nodes}
        return own | check_user_config(given, f"node_config of node {node_id}")

    configure(1)
    return configure


class WatchedGrid(LinkGrid):
    """Writes into the run's folder which replies it waits for, when that takes longer than a moment."""

    def wait(self, message_ids: Iterable[str], timeout: float | None) -> bool:
        ids = message_ids if isinstance(message_ids, dict | set | frozenset) else set(message_ids)
        moment = MOMENT if timeout is None else min(MOMENT, timeout)
        if super().wait(ids, moment):
            return True
        if moment == timeout:
            return False
        folder = self.recorder
        assert isinstance(folder, RunFolder)
        folder.note_wait(f"waits for replies of nodes: {len(ids)} are out")
        try:
            return super().wait(ids, None if timeout is None else timeout - moment)
        finally:
            folder.note_wait("")


class _Run:
    """One run over a Link of its own."""

    def __init__(self, num_nodes: int, assignment: Assignment, recorder: RunFolder | _Memory) -> None:
        self.run_id = secrets.randbits(62) + 1
        self.assignment = assignment
        self.recorder = recorder
        self.folder = recorder if isinstance(recorder, RunFolder) else None
        # Workers of this process cannot vanish without it, so a lease lasts as long as its message.
        self.link = Link(lease_seconds=math.inf)
        self.link.create_run(self.run_id, range(1, num_nodes + 1))
        self.context = Context(
            self.run_id, SERVER_NODE_ID, run_config=dict(assignment.run_config), seed=assignment.seed
        )

    def execute(self, server_app: Main, client_app: CallNext, threads: int) -> RunResult:
        """Run to the end; whatever happens, workers stop and the end is noted."""
        kept = self.folder.begin(self.snapshot) if self.folder is not None else {}
        work = functools.partial(execute, client_app, assignment=self.assignment, log=self._log)
        engine = ThreadEngine(MemoryTransport(self.link), work, threads, self.link.close)
        state, reason, result = "failed", "the run broke off", None
        try:
            self._take_up(kept)
            self.link.set_run_state(self.run_id, "running")
            engine.start()
            result = self._serve(server_app, engine)
            state, reason = "completed", ""
        except RunStopped as stop:
            state, reason = "stopped", str(stop)
        except RunFailed as failure:
            reason = failure.reason
            raise
        except KeyboardInterrupt:
            state, reason = "stopped", "interrupted"
            raise
        finally:
            self._end(engine, state, reason)
        return self._result(state, result)

    def _serve(self, server_app: Main, engine: ThreadEngine) -> object:
        settings = self.recorder, self.assignment.seed, self.assignment.shared
        kind = LinkGrid if self.folder is None else WatchedGrid
        grid = kind(self.link, self.run_id, *settings)
        try:
            result = server_app(grid, self.context)
        except (RunFailed, RunStopped):
            raise
        except Exception as fault:
            broken = engine.fault if isinstance(fault, StoreError) else None
            if broken is not None:
                raise RunFailed(f"a worker broke: {type(broken).__name__}: {broken}") from broken
            raise RunFailed(f"the ServerApp raised {type(fault).__name__}: {fault}") from fault
        traffic = self.link.traffic(self.run_id)
        if traffic.errors and not traffic.messages_up:
            causes = "; ".join(f"{count} x {cause}" for cause, count in traffic.errors.most_common(5))
            raise RunFailed(f"no node gave a valid reply: {causes}")
        return result

    def snapshot(self) -> Mapping[int, NodeState]:
        """Return what the nodes and the server app keep."""
        states = self.link.states(self.run_id)
        server = NodeState(self.context.state, self.context.mod_states)
        return states if server.is_empty() else {SERVER_NODE_ID: server.copy(), **states}

    def _take_up(self, states: Mapping[int, NodeState]) -> None:
        server = states.get(SERVER_NODE_ID)
        if server is not None:
            self.context.state, self.context.mod_states = server.app, server.mods
        self.link.put_states(self.run_id, {node: state for node, state in states.items() if node != SERVER_NODE_ID})

    def _log(self, message: Message, fault: BaseException) -> None:
        # The text of an app's error stays on the node; in a simulation the node's log is the run's.
        text = "".join(traceback.format_exception(fault)).rstrip().replace("\n", " | ")
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        self.recorder.report("client-error", node=node, message_type=kind, traceback=text)

    def _end(self, engine: ThreadEngine, state: str, reason: str) -> None:
        self.link.set_run_state(self.run_id, state, reason)
        self.link.close()
        if self.folder is not None:
            self.folder.end(state, reason)
        engine.stop()

    def _result(self, state: str, result: object) -> RunResult:
        memory = self.recorder if isinstance(self.recorder, _Memory) else None
        return RunResult(
            run_id=self.run_id,
            status=state,
            checkpoint=self.recorder.restore(),
            traffic=self.link.traffic(self.run_id),
            run_dir=self.folder.path if self.folder is not None else None,
            result=result,
            seed=self.assignment.seed,
            events=tuple(memory.events) if memory is not None else (),
        )
