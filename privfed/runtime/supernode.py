"""A node: takes tasks from its SuperLink, runs apps on them, and loses nothing it has answered.

A task's way: receive -> ask the store whether it was answered before -> run the app inside the node's own mods ->
commit reply and state in one transaction -> send -> note whether it was counted. Tasks of one run come one after the
other, runs go side by side. Whatever stops the process, at the next start it sends again what it had committed, under
the same lease, and what it had not committed is handed out again by the SuperLink.
"""

from __future__ import annotations

import ctypes
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from structlog.contextvars import bound_contextvars

from privfed.apps import CallNext
from privfed.context import Context, UserConfig
from privfed.errors import PrivfedError
from privfed.failpoint import around
from privfed.message import Error, ErrorCode, Message
from privfed.protocols.session import Identity
from privfed.runtime.app_process import NobodyLaunches
from privfed.runtime.bundle import Bundle, BundleError, open_bundle
from privfed.runtime.disk import disk_fault
from privfed.runtime.engine import Assignment, execute
from privfed.runtime.handshake import NetworkError
from privfed.runtime.launcher import Launcher, Worker
from privfed.runtime.node_store import Kept, NodeStore, Unsent
from privfed.runtime.store import Lease, NodeState
from privfed.runtime.taken import note_taken, taken_up
from privfed.runtime.task import Fleet, RunGrant, Task

logger = logging.getLogger("privfed.node")
T = TypeVar("T")
_RECEIVE_SECONDS = 1.0
_PAUSE_SECONDS = 1.0
_TRIES = 5
_OWED_SECONDS = 15.0
"""Between two tries to hand in an answer that the SuperLink did not take."""
_SWEEP_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """How a node runs apps.

    node_config: its own settings, over "partition-id" (its place among the run's nodes) and "num-partitions".
    identity: the node's signing key and roster. wrap: puts the node's own mods around an app. approve: raises for an
    app the node does not run. task_seconds: the longest a task may take. drain_seconds: how long a stopping node lets
    tasks finish. idle_seconds: after which a run's worker is ended. keep_seconds: how long the state of a run that
    ended is kept, in case the run is resumed. remind: called now and then, to say what must be done before long.
    """

    node_config: UserConfig = field(default_factory=dict)
    identity: Callable[[int], Identity | None] = lambda node_id: None
    wrap: Callable[[CallNext], CallNext] | None = None
    approve: Callable[[RunGrant, Bundle], None] | None = None
    task_seconds: float = 3600.0
    drain_seconds: float = 30.0
    idle_seconds: float = 600.0
    keep_seconds: float = 7 * 86_400.0
    remind: Callable[[], None] = lambda: None


class SuperNode:
    """One node of a federation. folder: `apps/` and `log/` go there; the store and the launcher have their own.

    stopping: set by whoever wants it to stop; its own when there is none.
    """

    def __init__(
        self,
        fleet: Fleet,
        store: NodeStore,
        launcher: Launcher,
        folder: Path,
        options: NodeOptions | None = None,
        stopping: threading.Event | None = None,
    ) -> None:
        self.fleet = fleet
        self.store = store
        self.launcher = launcher
        self.options = options or NodeOptions()
        self.apps, self.logs = folder / "apps", folder / "log"
        for path in (folder, self.apps, self.logs):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.stopping = stopping or threading.Event()
        self.aborting = threading.Event()
        self._lanes: dict[int, _Lane] = {}
        self._over: list[int] = []

    def run(self) -> None:
        """Serve until `stop` is called, then let tasks finish. Raises Refused when the SuperLink never serves it."""
        swept = 0.0
        for unsent in self.store.unsent():
            self._lane(unsent.run_id).put(unsent)
        try:
            while not self.stopping.is_set():
                self._receive()
                self.fleet.report_wait(self._waits_for())
                for run_id in self.fleet.ended():
                    self._end(run_id)
                if self._over or time.monotonic() > swept:
                    swept = time.monotonic() + _SWEEP_SECONDS
                    self._tidy()
                    self.options.remind()
        finally:
            self._drain()

    def _receive(self) -> None:
        task = self.fleet.receive(_RECEIVE_SECONDS)
        if task is not None:
            self._lane(task.message.metadata.run_id).put(task)

    def _waits_for(self) -> str:
        """Say what tasks here wait for, in a few words that any user of the federation may read."""
        at_work = [lane for lane in list(self._lanes.values()) if lane.at_work]
        if at_work and (missing := self.launcher.waits_for()):
            return missing.partition(":")[0]
        return next((lane.waits_for for lane in at_work if lane.waits_for), "")

    def stop(self) -> None:
        """Take no more tasks; `run` returns when those at work are done, or their time is over."""
        self.stopping.set()

    def _lane(self, run_id: int) -> _Lane:
        lane = self._lanes.get(run_id)
        if lane is None or lane.ending or not lane.is_alive():
            lane = self._lanes[run_id] = _Lane(self, run_id, after=lane)
            lane.start()
        return lane

    def _end(self, run_id: int) -> None:
        logger.info("run %d ended", run_id)
        if run_id in self._lanes:
            self._lanes[run_id].end()
        self._over.append(run_id)

    def _tidy(self) -> None:
        """Note which runs are over, and forget what was kept of old ones; while the disk refuses, later."""
        try:
            while self._over:
                self.store.end(self._over[-1], time.time())
                self._over.pop()
            for run_id in self.store.evict(time.time() - self.options.keep_seconds):
                logger.info("forgot what was kept of run %d", run_id)
        except (OSError, sqlite3.OperationalError) as fault:
            logger.debug("the end of runs is noted later: %s", fault)

    def _drain(self) -> None:
        lanes = list(self._lanes.values())
        for lane in lanes:
            lane.end()
        deadline = time.monotonic() + self.options.drain_seconds
        for lane in lanes:
            lane.join(max(0.0, deadline - time.monotonic()))
        self.aborting.set()  # what is cut off now is not answered: another lease will do it again
        self.launcher.close()
        self.fleet.close()
        for lane in lanes:
            lane.join(5.0)
        self._tidy()


class _Lane(threading.Thread):
    """The tasks of one run, one after the other, and the worker that is warm for them."""

    def __init__(self, node: SuperNode, run_id: int, after: _Lane | None) -> None:
        super().__init__(name=f"privfed-run-{run_id}", daemon=True)
        self.ending = False
        self._after = after
        self._node = node
        self._run_id = run_id
        self._jobs: queue.SimpleQueue[Task | Unsent | None] = queue.SimpleQueue()
        self._grant: RunGrant | None = None
        self._worker: Worker | None = None
        self._owes = self.at_work = False
        self.waits_for = ""
        self._errors: dict[str, Message] = {}

    def put(self, job: Task | Unsent) -> None:
        """Queue a task, or an answer to send again."""
        self._jobs.put(job)

    def end(self) -> None:
        """End after what is queued; a run that is resumed gets another lane, which begins when this one has ended."""
        self.ending = True
        self._jobs.put(None)

    def run(self) -> None:
        if self._after is not None:
            self._after.join()
            self._after = None
        try:
            while True:
                try:
                    job = self._jobs.get(timeout=_OWED_SECONDS if self._owes else self._node.options.idle_seconds)
                except queue.Empty:
                    self._hand_in() if self._owes else self._rest()
                    continue
                if job is None or self._node.aborting.is_set():
                    return
                if not (self._node.stopping.is_set() and isinstance(job, Task)):
                    self._do(job)
                del job  # a model is not kept while there is nothing to do
        finally:
            self._rest()

    def _rest(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None
            give_memory_back()

    def _do(self, job: Task | Unsent) -> None:
        """Do a job; a fault of the node itself costs the task its lease, and not the node its life."""
        task = job.message_id if isinstance(job, Unsent) else job.message.metadata.message_id
        with bound_contextvars(run=self._run_id, node=self._node.fleet.node_id, task=task):
            self.at_work = True
            try:
                self._try(job)
            finally:
                self.at_work = False

    def _try(self, job: Task | Unsent) -> None:
        try:
            if isinstance(job, Unsent):
                self._send(job.message_id, job.token, self._node.store.answer(job))
                return
            if self._owes:
                self._hand_in()
            self._serve(job)
        except NetworkError as fault:
            self._owes = True
            if not self._node.stopping.is_set():
                logger.error("run %d: the SuperLink does not take a reply, which is kept: %s", self._run_id, fault)
        except Exception:
            self._owes = True
            if not self._node.aborting.is_set():
                logger.exception("run %d: an answer was not sent; it stays in the outbox", self._run_id)

    def _hand_in(self) -> None:
        """Send again what was not taken, until it is, or the SuperLink says that nobody waits for it any more."""
        self._owes = False
        try:
            self._send_errors()
            for one in self._node.store.unsent():
                if one.run_id == self._run_id:
                    self._send(one.message_id, one.token, self._node.store.answer(one), tries=1)
        except Exception as fault:  # noqa: BLE001 - whatever it is, what is owed is kept and tried again
            self._owes = True
            logger.warning("run %d: a reply is still not taken: %s", self._run_id, fault)

    def _serve(self, task: Task) -> None:
        reply = self._answer(task)
        if reply is not None:
            self._send(task.message.metadata.message_id, task.token, reply)

    def _answer(self, task: Task) -> Message | None:
        """Return the committed answer to a task; None when there is none to send.

        What keeps the node from answering at all is told to the SuperLink, and nothing is kept of it.
        """
        node, message = self._node, task.message
        try:
            self._check(message)
            reply, after = self._on_disk(lambda: self._begin(task))
            if node.aborting.is_set():
                return None
            if not isinstance(after, Answered):
                self._on_disk(lambda: node.store.commit(message, task.token, reply, after))
        except Exception as fault:
            if node.aborting.is_set() or (node.stopping.is_set() and isinstance(fault, NetworkError)):
                return None
            if isinstance(fault, NobodyLaunches):  # the node stops, or the run has ended: another lease does it again
                logger.info("run %d: a task is put down: %s", self._run_id, fault)
                return None
            logger.exception("run %d: message %s is not answered", self._run_id, message.metadata.message_id)
            self._errors[task.token] = _refusal(message, fault)
            self._send_errors()
            return None
        return reply

    def _send_errors(self) -> None:
        """Tell the SuperLink of tasks that are not answered; raises NetworkError for one it does not take yet."""
        for token, error in list(self._errors.items()):
            self._node.fleet.reply(token, error)
            del self._errors[token]

    def _begin(self, task: Task) -> tuple[Message, Kept | Answered | None]:
        """Answer a task from the store, or by the app. What a full disk cut off is begun anew: none of it has left."""
        kept = self._node.store.begin(task.message, task.token, task.began, task.commit)
        return (kept, Answered()) if isinstance(kept, Message) else self._run_app(task, kept)

    def _check(self, message: Message) -> None:
        node_id = self._node.fleet.node_id
        if node_id and message.metadata.dst_node_id != node_id:
            raise WrongNode(f"the message is for node {message.metadata.dst_node_id}, this is node {node_id}")

    def _on_disk(self, step: Callable[[], T]) -> T:
        """Do something with the store; while the disk does not take it, wait, and send nothing."""
        while True:
            try:
                done = step()
                self.waits_for = ""
                return done
            except (OSError, sqlite3.OperationalError) as fault:
                if self._node.aborting.is_set() or isinstance(fault, ConnectionError | TimeoutError):
                    raise
                if not self.waits_for:
                    logger.error("run %d waits for the disk: %s", self._run_id, disk_fault(fault) or fault)
                self.waits_for = "the node's disk"
            self._node.aborting.wait(_PAUSE_SECONDS)

    def _send(self, message_id: str, token: str, reply: Message, tries: int = _TRIES) -> None:
        node_id = reply.metadata.src_node_id
        for attempt in range(1, tries + 1):
            try:
                with around("send"):
                    counted = self._node.fleet.reply(token, reply)
                break
            except NetworkError as fault:
                if self._node.stopping.is_set() or attempt == tries:
                    raise  # it stays in the outbox
                logger.warning("run %d: a reply was not taken (%s); once more", self._run_id, fault)
                self._node.stopping.wait(_PAUSE_SECONDS)
        sent = Unsent(self._run_id, node_id, message_id, token)
        self._on_disk(lambda: self._node.store.settle(sent, counted))
        if not counted:
            logger.warning("run %d: the reply to message %s came too late", self._run_id, message_id)

    def _run_app(self, task: Task, kept: Kept) -> tuple[Message, Kept | None]:
        options, message = self._node.options, task.message
        try:
            grant, worker = self._ready()
        except (PrivfedError, OSError) as fault:
            if isinstance(fault, NetworkError) or disk_fault(fault):
                raise
            logger.error("run %d: its app does not run here: %s", self._run_id, fault)
            return _refusal(message, fault), None
        began = taken_up(kept.app, kept.mods, message, task.began, task.commit)
        before = began.copy().mods
        mods = dict(began.mods)
        ran = False

        def call(asked: Message, context: Context) -> Message:
            """Run the app with a context of its own: what the node's mods keep is not in it."""
            nonlocal ran
            ran = True
            inner = replace(context, mod_states=mods)
            try:
                answer = worker.execute(asked, inner, self._seconds(task), lambda: not self.ending)
            except NobodyLaunches as fault:
                refused.append(fault)
                raise
            context.state = inner.state
            mods.clear()
            mods.update(inner.mod_states)
            return answer

        wrapped = options.wrap(call) if options.wrap is not None else call
        refused: list[OSError | NobodyLaunches] = []

        def app(asked: Message, context: Context) -> Message:
            """Run what the node puts around the app; a disk that refuses its ledger is no failure of the app."""
            try:
                return wrapped(asked, context)
            except OSError as fault:
                if disk_fault(fault):
                    refused.append(fault)
                raise

        lease = Lease(task.token, message, NodeState(began.app, kept.mods), task.expires_at)
        given = dict(grant.run_config), grant.seed, options.identity, grant.bundle, tuple(grant.nodes)
        assignment = Assignment(self._configure(grant), *given)
        reply, after = execute(app, lease, assignment, self._log)
        if refused:
            raise refused[0]
        if after is None:
            return reply, None
        state, own = NodeState(after.app, before if reply.has_error() else mods), dict(after.mods)
        if ran and not reply.has_error():
            note_taken(own, state, message, task.attempt)
        return reply, Kept(state, own)

    def _seconds(self, task: Task) -> float:
        # Not by when the task expires: that is told by the SuperLink's clock, and this machine's may be hours away.
        return min(self._node.options.task_seconds, max(1.0, task.message.metadata.ttl))

    def _ready(self) -> tuple[RunGrant, Worker]:
        """Return the run's facts and a worker for it. Raises what keeps the app from being run."""
        if self._grant is None:
            self._grant = self._node.fleet.run(self._run_id)
        if self._worker is None:
            bundle = open_bundle(self._node.fleet.bundle(self._grant.bundle))
            if self._node.options.approve is not None:
                self._node.options.approve(self._grant, bundle)
            folder = bundle.unpack(self._node.apps)
            self._worker = self._node.launcher.client(folder, self._node.logs / f"run-{self._run_id}.txt")
            logger.info("run %d (%s): app %s %s", self._run_id, self._grant.name, bundle.name, bundle.digest[:16])
        return self._grant, self._worker

    def _configure(self, grant: RunGrant) -> Callable[[int], UserConfig]:
        def configure(node_id: int) -> UserConfig:
            known = node_id in grant.nodes
            place: UserConfig = {"partition-id": grant.nodes.index(node_id)} if known else {}
            return {**place, "num-partitions": len(grant.nodes), **self._node.options.node_config}

        return configure

    def _log(self, message: Message, fault: BaseException) -> None:
        logger.error("run %d: message %s failed", self._run_id, message.metadata.message_id, exc_info=fault)


def give_memory_back() -> None:
    """Return to the system what the allocator holds of models that are gone, where it can be asked to (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Answered:
    """In place of what is kept with an answer: it is kept already."""


class WrongNode(PrivfedError):
    """A message came to a node it is not for."""


def _refusal(message: Message, fault: Exception) -> Message:
    code = ErrorCode.LOAD_CLIENT_APP_EXCEPTION if isinstance(fault, BundleError | OSError) else ErrorCode.POLICY_REFUSED
    return Message(Error(code, type(fault).__name__), reply_to=message)
