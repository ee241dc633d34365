"""Engines: what runs client apps. A task in, a reply and a state out."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from privfed.apps import CallNext
from privfed.context import Context, UserConfig, shared_settings
from privfed.grid import answer
from privfed.message import SERVER_NODE_ID, Error, ErrorCode, Message
from privfed.protocols.session import Identity
from privfed.runtime.store import Lease, NodeState
from privfed.runtime.transport import Transport

ENGINES = ("threads",)
STOP_SECONDS = 5.0
_IDLE_SECONDS = 5.0

Log = Callable[[Message, BaseException], None]
"""Told of each failure of an app, in full; what it is told must not leave the node."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """What every node of a run is given: its own configuration and identity by node id, the settings, and the seed.

    app, nodes: digest of the app's bundle, and the nodes of the run, where the runtime has them.
    """

    node_config: Callable[[int], UserConfig]
    run_config: UserConfig = field(default_factory=dict)
    seed: int | None = None
    identity: Callable[[int], Identity | None] = lambda node_id: None
    app: str = ""
    nodes: tuple[int, ...] = ()

    @property
    def shared(self) -> bytes:
        """Hash of what all nodes are given alike."""
        return shared_settings(self.run_config, self.seed, self.app, self.nodes)


def execute(app: CallNext, lease: Lease, assignment: Assignment, log: Log) -> tuple[Message, NodeState | None]:
    """Run a client app on a task; return its reply, and the state to commit or None when there is none.

    The app works on copies of the message's records and of the node's: a failure changes nothing but the records
    of mods that asked for it (`Context.lasting`).
    """
    before = lease.state.copy()
    message, node_id = lease.message, lease.message.metadata.dst_node_id

    def told(fault: BaseException) -> None:
        log(message, fault)

    context = Context(
        run_id=message.metadata.run_id,
        node_id=node_id,
        node_config=assignment.node_config(node_id),
        state=lease.state.app,
        run_config=dict(assignment.run_config),
        seed=assignment.seed,
        mod_states=lease.state.mods,
        identify=functools.partial(assignment.identity, node_id),
        shared=assignment.shared,
    )
    try:
        reply = answer(app, message.with_content(message.content.copy()), context, told)
    except BaseException as fault:  # noqa: BLE001 - SystemExit in a handler must not end the worker
        told(fault)
        reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, type(fault).__name__), reply_to=message)
    reply = _checked(reply, message)
    if reply.has_error():
        lasting = {name: context.mod_states[name] for name in context.lasting if name in context.mod_states}
        return reply, NodeState(before.app, {**before.mods, **lasting}).copy() if lasting else None
    # A copy: the reply may share records with the state, and the server may change the reply.
    return reply, NodeState(context.state, context.mod_states).copy()


def _checked(reply: Message, message: Message) -> Message:
    """Return the reply, or an error when it does not answer the message it was asked."""
    asked, told = message.metadata, reply.metadata
    if (told.reply_to_message_id, told.src_node_id, told.dst_node_id, told.run_id) == (
        asked.message_id,
        asked.dst_node_id,
        SERVER_NODE_ID,
        asked.run_id,
    ):
        return reply
    return Message(Error(ErrorCode.INVALID_REPLY, "not a reply to this message"), reply_to=message)


class ThreadEngine:
    """Warm worker threads that take tasks from a transport until they are stopped.

    on_fault: called when a worker breaks, which is a fault of the runtime and not of an app.
    """

    def __init__(
        self,
        transport: Transport,
        run: Callable[[Lease], tuple[Message, NodeState | None]],
        threads: int,
        on_fault: Callable[[], None],
    ) -> None:
        self._transport = transport
        self._run = run
        self._on_fault = on_fault
        self._stopping = threading.Event()
        self._fault: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._work, name=f"privfed-worker-{index}", daemon=True) for index in range(threads)
        ]

    def start(self) -> None:
        """Start the workers."""
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        try:
            while not self._stopping.is_set():
                lease = self._transport.receive(_IDLE_SECONDS)
                if lease is not None:
                    self._transport.reply(lease, *self._run(lease))
        except BaseException as fault:  # noqa: BLE001 - kept for the run to report; a worker has nobody to raise to
            self._fault = fault
            self._on_fault()

    @property
    def fault(self) -> BaseException | None:
        """What broke a worker, if anything."""
        return self._fault

    def stop(self, timeout: float = STOP_SECONDS) -> bool:
        """Let workers finish; False when one is still inside an app after `timeout` seconds.

        Close the Link first: such a worker then holds no lease, and what it still produces is dropped.
        """
        self._stopping.set()
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)
