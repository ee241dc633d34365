"""One run of a federation: it waits for its nodes, serves its server app, and goes on after a crash."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from structlog.contextvars import bound_contextvars

from privfed.context import Context, shared_settings
from privfed.errors import PrivfedError, RunFailed, RunStopped
from privfed.failpoint import around
from privfed.grid import Checkpoint, Grid
from privfed.message import SERVER_NODE_ID
from privfed.runtime.app_process import LaunchLost, NobodyLaunches
from privfed.runtime.channel import ChannelError
from privfed.runtime.disk import append, write_atomically
from privfed.runtime.federation_link import FederationLink
from privfed.runtime.launcher import Launcher
from privfed.runtime.link import LinkGrid
from privfed.runtime.patience import GivenUp, Patience, PatientGrid, PatientRecorder, storage_fault
from privfed.runtime.run_folder import ENDED, RunFolder, Snapshot
from privfed.runtime.store import NodeState, StoreError

log = logging.getLogger("privfed.superlink")
SHOWN = ("run", "round-start", "round-end", "stage", "replies", "excluded", "ended")
MAX_RESTARTS = 5
"""Restarts of a ServerApp's process in a row without a committed round."""
_PATIENCE = 1.0
REPEAT_SECONDS = 60.0
"""Between two lines of the log about the same wait."""


class Interrupted(Exception):
    """The SuperLink shuts down; the run goes on when it is back."""


class FederationRun:
    """A run in its folder, in a thread of its own.

    available: returns the nodes that are approved and connected. change: notified whenever that may have changed.
    noted: writes an event into the audit log.
    """

    def __init__(
        self,
        folder: RunFolder,
        link: FederationLink,
        launcher: Launcher,
        available: Callable[[], set[int]],
        change: threading.Condition,
        noted: Callable[..., None] = lambda event, **fields: None,
    ) -> None:
        self._noted = noted
        self.folder = folder
        self.config: Mapping[str, Any] = folder.config
        self.run_id = int(self.config["run-id"])
        self.began = self._read_began()
        self._link = link
        self._launcher = launcher
        self._available = available
        self._change = change
        self._closing = False
        self._stopping = False
        self._told = False
        self._asking = self._missing = ""
        self._recorder: PatientRecorder | None = None
        self._ended = threading.Event()
        self._patiently = Patience(folder.name, self._ended)
        folder.listener = self._show
        folder.patiently = self._patiently
        self._events = threading.Lock()
        self._thread = threading.Thread(target=self._work, name=f"privfed-run-{folder.name}", daemon=True)

    @property
    def attempt(self) -> int:
        """How often the app was started."""
        return len(self.began)

    @property
    def commit(self) -> int:
        """The last committed round."""
        return self._recorder.last if self._recorder is not None else 0

    def start(self) -> None:
        """Start, or go on."""
        self._thread.start()

    def request_stop(self) -> None:
        """Ask the run to stop after its current round, or at once when none has begun."""
        self.folder.request_stop()
        with self._change:
            self._stopping = True
            self._change.notify_all()

    def interrupt(self) -> None:
        """Let go of the run, which is not over; close the Link first."""
        with self._change:
            self._closing = True
            self._ended.set()
            self._change.notify_all()

    def join(self, timeout: float) -> bool:
        """Wait for the thread; return whether it is done."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _read_began(self) -> tuple[int, ...]:
        """Return the last committed round when each attempt began."""
        path = self.folder.path / "attempts"
        return tuple(map(int, path.read_text().split())) if path.exists() else ()

    def _show(self, event: str, fields: Mapping[str, object]) -> None:
        """Append an event for those who follow the run."""
        if event in ("asking", "stage", "round-start", "replies"):
            self._asking = f"{fields.get('kind')}, stage {fields.get('stage')}" if event == "asking" else ""
        if event in SHOWN:
            line = msgspec.json.encode({"event": event, **fields}, enc_hook=_plain)
            self._patiently(lambda: self._append_event(line + b"\n"))

    def _append_event(self, line: bytes) -> None:
        with around("event"), self._events:
            append(self.folder.path / "events.jsonl", line)

    def _work(self) -> None:
        with bound_contextvars(run=self.folder.name):
            self._go()

    def _go(self) -> None:
        state, reason = "failed", "the SuperLink broke off"
        try:
            self._serve_until_done()
            state, reason = "completed", ""
        except (Interrupted, GivenUp):
            self.folder.release()
            return
        except RunStopped as fault:
            state, reason = "stopped", str(fault)
        except RunFailed as fault:
            reason = fault.reason
        except Exception as fault:
            log.exception("run %s broke", self.folder.name)
            reason = f"{type(fault).__name__}: {fault}"
        try:
            self._patiently(lambda: self._end(state, reason))
        except Exception as fault:
            if not (self._closing or isinstance(fault, GivenUp)):  # else it ends when the SuperLink is back
                raise

    def _end(self, state: str, reason: str) -> None:
        with contextlib.suppress(StoreError):  # a run that never began is not in the store, or has ended there
            self._link.set_run_state(self.run_id, state, reason)
        if not self._told:
            self._noted("run-ended", run=self.folder.name, state=state, rounds=self.commit, reason=reason[:500])
            # Before the status: who follows the run stops listening when that says that it has ended.
            self._show("ended", {"state": state, "rounds": self.commit, "folder": self.folder.name})
            self._told = True
        self.folder.end(state, reason)
        self._link.on_end(self.run_id)
        log.info("run %s: %s %s", self.folder.name, state, reason)

    def _serve_until_done(self) -> None:
        self._patiently(self._register)
        restarts, reached = 0, -1
        while True:
            try:
                self._patiently(self._serve_once)
                return
            except (LaunchLost, NobodyLaunches) as fault:
                log.warning("run %s: its ServerApp was not started: %s", self.folder.name, fault)
                self.folder.release()
            except RunFailed as fault:
                died = isinstance(fault.__context__, ChannelError)
                restarts = restarts + 1 if self.commit == reached else 0
                reached = self.commit
                if self._closing:
                    raise Interrupted from None
                if not died or restarts >= MAX_RESTARTS:
                    raise
                log.warning("run %s: %s; it goes on from round %d", self.folder.name, fault.reason, reached)
                self._patiently(functools.partial(self.folder.log, f"restarted: {fault.reason}"))
                self.folder.release()

    def _await_nodes(self) -> list[int]:
        """Return the nodes the run begins with: those that are here once there are enough."""
        least = int(self.config["nodes"])
        here: list[int] = []

        def missing() -> str:
            here[:] = sorted(self._available())
            return "" if len(here) >= least else f"nodes: {len(here)} of {least} are connected"

        self._await(missing)
        return here

    def _await(self, missing: Callable[[], str]) -> None:
        """Wait until nothing is missing, and say what is. Raises RunStopped when asked to stop meanwhile.

        Whoever asks is told how it stands now (`waits_for`). The log and the folder are told when it is another thing
        that is missing, and once in a while: a thousand nodes that come one by one are not a thousand lines.
        """
        told, again = "", 0.0
        with self._change:
            while True:
                if self._closing:
                    raise Interrupted
                if self._stopping or (self.folder.path / "stop").exists():
                    done = self.folder.recorded_status.round
                    raise RunStopped(f"stopped {f'after round {done}' if done else 'before it began'}, as asked")
                reason = self._missing = missing()
                if not reason:
                    break
                kind = reason.partition(":")[0]
                if kind != told or time.monotonic() >= again:
                    told, again = kind, time.monotonic() + REPEAT_SECONDS
                    log.info("run %s waits for %s", self.folder.name, reason)
                    self.folder.note_wait(f"waits for {reason}")
                self._change.wait(_PATIENCE)
        if told:
            self.folder.note_wait("")

    def _register(self) -> None:
        """Put a new run into the store; of one that was there, whatever is still out is withdrawn."""
        try:
            info = self._link.run(self.run_id)
        except StoreError:
            nodes = self._await_nodes()
            self._link.create_run(self.run_id, nodes)
            self._show("run", {"name": self.folder.name, "app": self.config["name"], "nodes": len(nodes)})
            return
        if info.state == "running":
            self._link.set_run_state(self.run_id, "stopped", "the SuperLink was restarted")

    def _serve_once(self) -> None:
        """Serve the app, once it can be started; a disk that refuses its process is waited for, too."""
        self._await(self._launcher.waits_for)
        try:
            self._serve()
        except Exception as fault:
            if storage_fault(fault):
                self.folder.release()  # the next attempt goes on from the last committed round
            raise

    def _serve(self) -> None:
        """Serve the app from the last committed round on."""
        seed = self.config["seed"]
        context = Context(self.run_id, SERVER_NODE_ID, run_config=dict(self.config["run-config"]), seed=seed)

        def snapshot() -> Mapping[int, NodeState]:
            server = NodeState(context.state, context.mod_states)
            return {} if server.is_empty() else {SERVER_NODE_ID: server.copy()}

        kept = self._patiently(lambda: self._begin(snapshot)).get(SERVER_NODE_ID)
        self.folder.check_stop()  # one that was asked for while nobody was there to stop
        if kept is not None:
            context.state, context.mod_states = kept.app, kept.mods
        self._recorder = PatientRecorder(self.folder, self._patiently, self.began[-1], self._note_round)
        nodes = tuple(self._link.nodes(self.run_id))
        shared = shared_settings(self.config["run-config"], seed, self.config["bundle"], nodes)
        bare = LinkGrid(self._link, self.run_id, self.folder, seed, shared)
        grid = PatientGrid(bare, self._recorder, self._patiently)
        before = self._link.traffic(self.run_id).messages_up
        self._run_app(grid, context)
        traffic = self._link.traffic(self.run_id)
        if traffic.errors and traffic.messages_up == before:
            causes = "; ".join(f"{count} x {cause}" for cause, count in traffic.errors.most_common(5))
            raise RunFailed(f"no node gave a valid reply: {causes}")

    def _note_round(self, checkpoint: Checkpoint) -> None:
        told = round_facts(checkpoint.metrics[-1] if checkpoint.metrics else {})
        self._noted("round-committed", run=self.folder.name, round=checkpoint.round, **told)

    def _begin(self, snapshot: Snapshot) -> Mapping[int, NodeState]:
        """Begin another attempt; what was out in an earlier one is withdrawn."""
        if self._link.run(self.run_id).state == "running":
            self._link.set_run_state(self.run_id, "stopped", "the ServerApp is started again")
        try:
            kept = self.folder.begin(snapshot, unasked=True)
            began = (*self._read_began(), self.folder.recorded_status.round)
            write_atomically(self.folder.path / "attempts", " ".join(map(str, began)).encode())
        except OSError:
            self.folder.release()
            raise
        self.began = began
        self._link.set_run_state(self.run_id, "running")
        facts = {"run": self.folder.name, "attempt": self.attempt, "round": began[-1]}
        self._noted("run-attempted", **facts, nodes=len(self._link.nodes(self.run_id)))
        return kept

    @property
    def _app(self) -> Path:
        """The unpacked app, beside the folders of runs; these may have moved since the run was submitted."""
        return self.folder.path.parents[1] / "apps" / Path(self.config["app"]).name

    def _run_app(self, grid: Grid, context: Context) -> None:
        try:
            self._launcher.serve(self._app, grid, context, self.folder.path / "server_app.txt")
        except (RunFailed, RunStopped, GivenUp):
            raise
        except (LaunchLost, NobodyLaunches):
            if self._closing:
                raise Interrupted from None
            raise
        except Exception as fault:
            if self._closing:
                raise Interrupted from None
            if storage_fault(fault):
                raise
            what = "" if isinstance(fault, PrivfedError) else f"{type(fault).__name__}: "
            raise RunFailed(f"the ServerApp failed: {what}{fault}") from fault

    def waits_for(self, connected: Mapping[int, str]) -> str:
        """Say what the run waits for now. connected: what each node that is connected waits for itself, as it says."""
        if self.folder.recorded_status.state in ENDED:
            return ""
        if trouble := self._patiently.trouble or self._link.trouble:
            return f"waits for its storage: {trouble}"
        if missing := self._launcher.waits_for() or self._missing:
            return f"waits for {missing}"
        awaited = self._link.waits_for(self.run_id)
        if not awaited.out:
            return self.folder.recorded_status.reason
        nodes = sorted(set(awaited.out.values()))
        text = f"waits for replies of {len(nodes)} nodes"
        if gone := [node for node in nodes if node not in connected]:
            text += f", {len(gone)} of them not connected ({_names(gone)})"
        for reason in sorted({connected.get(node, "") for node in nodes} - {""})[:3]:
            stalled = [node for node in nodes if connected.get(node) == reason]
            text += f", {len(stalled)} of them for {reason} ({_names(stalled)})"
        came, what = awaited.asked - len(awaited.out), self._asking or awaited.kind
        where = f" of round {awaited.group}" if awaited.group.isdecimal() else ""
        return f"{text}: {came} of {awaited.asked} to {what}{where} have come"


def _names(nodes: Sequence[int]) -> str:
    return ", ".join(map(str, nodes[:5])) + (", ..." if len(nodes) > 5 else "")


def round_facts(metrics: Mapping[str, object]) -> dict[str, int | str]:
    """Return what the audit log says of a round: how many were asked and answered, and what the plan has charged.

    metrics: as the app's process tells them, whatever they are.
    """
    found: dict[str, int | str] = {}
    for kind in ("train", "evaluate", "query"):
        replies = _table(metrics.get(f"{kind}-replies"))
        for name in ("nodes", "valid"):
            count = replies.get(name)
            if type(count) is int and 0 <= count < 1 << 53:
                found[f"{kind}-{name}"] = count
    charged = _table(metrics.get("privacy"))
    for name in ("epsilon", "delta", "noise-multiplier", "cohort"):
        number = charged.get(name)
        if isinstance(number, float) or (type(number) is int and abs(number) < 1 << 53):
            found[f"plan-{name}"] = f"{number:.9g}"  # as text: it may be infinite
    return found


def _table(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _plain(value: object) -> object:
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value.item() if hasattr(value, "item") else str(value)
