"""A federation in this process: the same Link, Store and apps as a deployment, with threads for nodes."""

from __future__ import annotations

import os
import secrets
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from privfed.apps import ClientApp, ServerApp
from privfed.context import Context, UserConfig, check_user_config
from privfed.errors import RunFailed, RunStopped
from privfed.grid import Checkpoint, MemoryRecorder, Recorder, answer
from privfed.message import Message
from privfed.record import ArrayRecord
from privfed.runtime.link import Link, LinkGrid, Traffic
from privfed.runtime.run_folder import RunFolder
from privfed.runtime.store import Lease, NodeState
from privfed.runtime.transport import MemoryTransport, Transport

ENGINES = ("threads",)
NodeConfig = Mapping[str, object] | Callable[[int], Mapping[str, object]]


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run left behind. status: "completed" or "stopped". rounds: metrics of every committed round.

    run_dir: the run folder, or None. traffic: messages and array bytes of the run.
    """

    run_id: int
    status: str
    checkpoint: Checkpoint | None
    traffic: Traffic
    run_dir: Path | None = None
    events: Sequence[tuple[str, Mapping[str, object]]] = field(default=(), repr=False)

    @property
    def arrays(self) -> ArrayRecord:
        """The last committed model (empty when the app committed none)."""
        return self.checkpoint.arrays if self.checkpoint is not None else ArrayRecord()

    @property
    def rounds(self) -> tuple[Mapping[str, object], ...]:
        return self.checkpoint.metrics if self.checkpoint is not None else ()


class Worker:
    """Runs one ClientApp on whatever tasks come, for any node of the run."""

    def __init__(
        self,
        transport: Transport,
        app: ClientApp,
        context_of: Callable[[Message, NodeState], Context],
        log: Callable[[Message, Exception], None],
    ) -> None:
        self._transport = transport
        self._app = app
        self._context_of = context_of
        self._log = log

    def run(self) -> None:
        """Serve until the transport is closed."""
        while (lease := self._transport.receive(timeout=None)) is not None:
            self.serve(lease)

    def serve(self, lease: Lease) -> None:
        """Answer one task; its state is committed with the reply, or not at all when the app fails."""
        context = self._context_of(lease.message, lease.state)
        failed = threading.Event()

        def log(fault: Exception) -> None:
            failed.set()
            self._log(lease.message, fault)

        reply = answer(self._app, lease.message, context, log)
        keep = not failed.is_set() and not reply.has_error()
        self._transport.reply(lease, reply, NodeState(context.state, context.mod_states) if keep else None)


def run_simulation(
    server_app: ServerApp,
    client_app: ClientApp,
    num_nodes: int,
    *,
    run_config: Mapping[str, object] | None = None,
    node_config: NodeConfig | None = None,
    engine: str = "threads",
    seed: int | None = None,
    run_dir: str | Path | RunFolder | None = None,
    threads: int | None = None,
    insecure_test_randomness: int | None = None,
) -> RunResult:
    """Run apps over `num_nodes` simulated nodes (ids 1..n, node_config "partition-id" 0..n-1 and "num-partitions").

    node_config: settings for every node, or a function of the partition that returns them.
    seed: drives data, partition, initial model and client training; the same seed gives the same bits at any thread
    count. Masks and noise come from the operating system all the same, unless `insecure_test_randomness` seeds the
    noise; every epsilon of the run is then infinite. run_dir: a folder for the run; None writes nothing.

    Raises RunFailed when the run fails, and ValueError for a bad argument.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if type(num_nodes) is not int or num_nodes < 1:
        raise ValueError(f"num_nodes must be a whole number >= 1, got {num_nodes!r}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be >= 1, got {threads}")
    settings = check_user_config(run_config or {}, "run_config")
    recorder, folder = _recorder(run_dir, settings, num_nodes, seed, insecure_test_randomness)
    simulation = _Simulation(client_app, num_nodes, settings, node_config, seed, recorder)
    if folder is not None:
        folder.begin()
    try:
        simulation.run(server_app, threads or os.cpu_count() or 1)
    except BaseException as fault:
        state, reason = _ending(fault)
        if folder is not None:
            folder.end(state, reason)
        if isinstance(fault, RunStopped):
            return simulation.result("stopped", folder)
        if isinstance(fault, RunFailed) or not isinstance(fault, Exception):
            raise
        raise RunFailed(reason) from fault
    if folder is not None:
        folder.end("completed")
    return simulation.result("completed", folder)


def _ending(fault: BaseException) -> tuple[str, str]:
    if isinstance(fault, RunStopped):
        return "stopped", str(fault)
    if isinstance(fault, KeyboardInterrupt):
        return "stopped", "interrupted"
    if isinstance(fault, RunFailed):
        return "failed", fault.reason
    return "failed", f"the ServerApp raised {type(fault).__name__}: {fault}"


def _recorder(
    run_dir: str | Path | RunFolder | None,
    settings: UserConfig,
    nodes: int,
    seed: int | None,
    insecure: int | None,
) -> tuple[Recorder, RunFolder | None]:
    if run_dir is None:
        return MemoryRecorder(insecure_test_randomness=insecure), None
    if not isinstance(run_dir, RunFolder):
        asked: dict[str, Any] = {"run-config": settings, "nodes": nodes, "seed": seed}
        run_dir = RunFolder.create(Path(run_dir), asked)
    run_dir.insecure_test_randomness = insecure
    return run_dir, run_dir


class _Simulation:
    def __init__(
        self,
        client_app: ClientApp,
        nodes: int,
        settings: UserConfig,
        node_config: NodeConfig | None,
        seed: int | None,
        recorder: Recorder,
    ) -> None:
        self._app = client_app
        self._nodes = nodes
        self._settings = settings
        self._node_config = node_config or {}
        self._seed = seed
        self._recorder = recorder
        self._run_id = secrets.randbits(62) + 1
        self._link = Link()
        self._link.create_run(self._run_id, range(1, nodes + 1))

    def run(self, server_app: ServerApp, threads: int) -> None:
        grid = LinkGrid(self._link, self._run_id, self._recorder, self._seed)
        context = Context(self._run_id, 0, run_config=dict(self._settings), seed=self._seed)
        worker = Worker(MemoryTransport(self._link), self._app, self._context, self._log)
        workers = [
            threading.Thread(target=worker.run, name=f"node-worker-{place}", daemon=True) for place in range(threads)
        ]
        self._link.set_run_state(self._run_id, "running")
        for thread in workers:
            thread.start()
        try:
            server_app(grid, context)
        finally:
            self._link.close()
            for thread in workers:
                thread.join(timeout=5.0)
        self._link.set_run_state(self._run_id, "completed")

    def _context(self, message: Message, state: NodeState) -> Context:
        node = message.metadata.dst_node_id
        given = self._node_config(node - 1) if callable(self._node_config) else self._node_config
        config = {"partition-id": node - 1, "num-partitions": self._nodes, **check_user_config(given, "node_config")}
        return Context(self._run_id, node, config, state.app, dict(self._settings), self._seed, state.mods)

    def _log(self, message: Message, fault: Exception) -> None:
        # The text of an app's error stays on the node; in a simulation the node's log is the run's.
        text = "".join(traceback.format_exception(fault)).rstrip().replace("\n", " | ")
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        self._recorder.report("client-error", node=node, message_type=kind, traceback=text)

    def result(self, status: str, folder: RunFolder | None) -> RunResult:
        events = self._recorder.events if isinstance(self._recorder, MemoryRecorder) else ()
        traffic = self._link.traffic(self._run_id)
        return RunResult(
            self._run_id, status, self._recorder.restore(), traffic, folder.path if folder else None, tuple(events)
        )
