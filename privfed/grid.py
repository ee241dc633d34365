"""The Grid: how a server app reaches the nodes; and the Recorder: how a run remembers what it has done."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from privfed.apps import Mod, wrap
from privfed.context import Context
from privfed.message import Error, ErrorCode, Message
from privfed.record import ArrayRecord, RecordDict

MAX_MOD_THREADS = 256


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed round: the model, the strategy's own state, and the metrics of every round so far.

    metrics[r] are the metrics of round r + 1; values are numbers, strings, or lists and dicts of them.
    """

    round: int
    arrays: ArrayRecord
    state: RecordDict = field(default_factory=RecordDict)
    metrics: tuple[Mapping[str, object], ...] = ()


class Recorder(Protocol):
    """What a run keeps. The runtime gives one that writes a run folder; `MemoryRecorder` keeps things in memory."""

    @property
    def ledger_path(self) -> Path | None:
        """Where the privacy ledger of the run lives; None keeps it in memory."""
        ...

    def journal_path(self, name: str) -> Path | None:
        """Where a secure session's journal lives, so that it outlives this process; None keeps it in memory."""
        ...

    @property
    def insecure_test_randomness(self) -> int | None:
        """A seed for noise in bit-identity tests. Not None means every epsilon of this run is infinite."""
        ...

    def restore(self) -> Checkpoint | None:
        """Return the last committed checkpoint of a resumed run."""
        ...

    def commit(self, checkpoint: Checkpoint) -> None:
        """Persist a round, atomically, before the next one starts. Raises when the run was asked to stop."""
        ...

    def report(self, event: str, **fields: object) -> None:
        """Note progress: "round-start", "replies", "stage", "excluded", ... with plain fields."""
        ...


class MemoryRecorder:
    """A recorder that writes nothing: unit tests and `run_dir=None`."""

    ledger_path: Path | None = None

    def __init__(self, checkpoint: Checkpoint | None = None, *, insecure_test_randomness: int | None = None) -> None:
        self.checkpoint = checkpoint
        self.events: list[tuple[str, dict[str, object]]] = []
        self.insecure_test_randomness = insecure_test_randomness

    def journal_path(self, name: str) -> Path | None:
        return None

    def restore(self) -> Checkpoint | None:
        return self.checkpoint

    def commit(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def report(self, event: str, **fields: object) -> None:
        self.events.append((event, fields))


class Grid(ABC):
    """Reach the nodes of a run.

    Subclasses provide `get_node_ids`, `push_messages`, `pull_messages` and `wait`; the rest follows.
    """

    recorder: Recorder
    run_id: int = 0
    seed: int | None = None
    shared: bytes = b""
    """Hash of what all nodes of the run are given alike (`privfed.context.shared_settings`); it binds secure sums."""

    @abstractmethod
    def get_node_ids(self) -> Sequence[int]:
        """Return the ids of the connected nodes, ascending."""

    @abstractmethod
    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send instructions; return their message ids."""

    @abstractmethod
    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return, once each, the replies that have arrived to these instructions."""

    @abstractmethod
    def wait(self, message_ids: Iterable[str], timeout: float | None) -> bool:
        """Block until a reply to one of these instructions can be pulled; False on timeout."""

    def forget(self, message_ids: Iterable[str]) -> None:
        """Withdraw instructions nobody waits for any more; a late reply to one is dropped."""
        del message_ids

    def stream(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | None = None,
        window: int | None = None,
        ordered: bool = False,
    ) -> Iterator[Message]:
        """Send instructions and yield the replies.

        timeout: seconds from now, for all of them; what has not arrived by then is not yielded (and is withdrawn).
        window: at most so many instructions are out, or answered and not yet yielded, at a time; None: all at once.
        ordered: yield in the order of `messages`, so that a reduction does not depend on arrival.
        """
        if window is not None and window < 1:
            raise ValueError(f"window must be >= 1, got {window}")
        deadline = None if timeout is None else time.monotonic() + timeout
        source = iter(messages)
        waiting: dict[str, int] = {}
        ready: dict[int, Message] = {}
        following = sent = 0
        exhausted = False
        try:
            while True:
                while not exhausted and (window is None or len(waiting) + len(ready) < window):
                    room = None if window is None else window - len(waiting) - len(ready)
                    batch = _take(source, room)
                    exhausted = room is None or len(batch) < room
                    for message_id in self.push_messages(batch) if batch else ():
                        waiting[message_id] = sent
                        sent += 1
                if not waiting and not ready:
                    return
                remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
                if waiting and not self.wait(waiting, remaining):
                    yield from (ready[position] for position in sorted(ready))
                    return
                for reply in self.pull_messages(waiting):
                    ready[waiting.pop(reply.metadata.reply_to_message_id)] = reply
                while ready and (not ordered or following in ready):
                    position = following if ordered else next(iter(ready))
                    yield ready.pop(position)
                    following += 1
        finally:
            if waiting:
                self.forget(list(waiting))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send instructions and return the replies that arrive within the timeout (seconds)."""
        return list(self.stream(messages, timeout=timeout))


def _take(source: Iterator[Message], room: int | None) -> list[Message]:
    if room is None:
        return list(source)
    batch: list[Message] = []
    for message in source:
        batch.append(message)
        if len(batch) == room:
            break
    return batch


def answer(app: object, message: Message, context: Context, log: Callable[[Exception], None] | None = None) -> Message:
    """Run a client app on one message; a failure becomes an Error that names the exception's class and no more.

    app: a callable (message, context) -> Message. log: gets the exception itself, which must not leave the node.
    """
    try:
        reply = app(message, context)  # type: ignore[operator]  # checked by the except below
        if not isinstance(reply, Message):
            raise TypeError(f"the handler returned {type(reply).__name__}, not a Message")
    except Exception as fault:  # noqa: BLE001 - whatever an app raises is its failure, not the node's
        if log is not None:
            log(fault)
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, type(fault).__name__), reply_to=message)
    return reply


class LocalGrid(Grid):
    """A Grid without a federation: runs the client app in this thread, node by node. For unit tests.

    nodes: a number of nodes (ids 1..n, "partition-id" 0..n-1), or their contexts by id.
    """

    def __init__(
        self,
        client_app: object,
        nodes: int | Mapping[int, Context],
        *,
        recorder: Recorder | None = None,
        seed: int | None = None,
    ) -> None:
        if isinstance(nodes, int):
            nodes = {
                index + 1: Context(
                    node_id=index + 1, node_config={"partition-id": index, "num-partitions": nodes}, seed=seed
                )
                for index in range(nodes)
            }
        self.contexts = dict(nodes)
        self.recorder = recorder if recorder is not None else MemoryRecorder()
        self.seed = seed
        self._app = client_app
        self._replies: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        return sorted(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            context = self.contexts.get(message.metadata.dst_node_id)
            if context is None:
                reply = Message(Error(ErrorCode.NODE_UNAVAILABLE, "unknown node"), reply_to=message)
            else:
                reply = answer(self._app, message, context)
            ids.append(message.metadata.message_id)
            self._replies[message.metadata.message_id] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

    def wait(self, message_ids: Iterable[str], timeout: float | None) -> bool:
        return any(message_id in self._replies for message_id in message_ids)


class ModGrid(Grid):
    """A Grid whose every message goes through server-side mods, each exchange in a thread of its own."""

    def __init__(self, grid: Grid, mods: Sequence[Mod], context: Context) -> None:
        self._grid = grid
        self._mods = list(mods)
        self._context = context
        self._lock = threading.Lock()
        self._replies: dict[str, Message] = {}
        self._arrived = threading.Condition(self._lock)
        self._forgotten: set[str] = set()
        self._pool = ThreadPoolExecutor(MAX_MOD_THREADS, thread_name_prefix="server-mod")
        self.recorder = grid.recorder
        self.run_id = grid.run_id
        self.seed = grid.seed
        self.shared = grid.shared

    def get_node_ids(self) -> Sequence[int]:
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            ids.append(message.metadata.message_id)
            self._pool.submit(self._exchange, message)
        return ids

    def _exchange(self, message: Message) -> None:
        message_id = message.metadata.message_id
        try:
            reply = wrap(self._mods, self._round_trip)(message, self._context)
        except Exception as fault:  # noqa: BLE001 - a failing mod fails this exchange, and says so
            reply = Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, type(fault).__name__), reply_to=message)
        # Whatever a mod sent instead, the caller waits for the id it pushed.
        reply = reply.with_metadata(reply_to_message_id=message_id)
        with self._arrived:
            if message_id not in self._forgotten:
                self._replies[message_id] = reply
                self._arrived.notify_all()

    def _round_trip(self, message: Message, context: Context) -> Message:
        del context
        ids = self._grid.push_messages([message])
        while not self._grid.wait(ids, 1.0):
            if message.metadata.message_id in self._forgotten:
                self._grid.forget(ids)
                return Message(Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, "withdrawn"), reply_to=message)
        return self._grid.pull_messages(ids)[0]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        with self._lock:
            return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

    def wait(self, message_ids: Iterable[str], timeout: float | None) -> bool:
        ids = list(message_ids)
        with self._arrived:
            return self._arrived.wait_for(lambda: any(one in self._replies for one in ids), timeout)

    def forget(self, message_ids: Iterable[str]) -> None:
        with self._lock:
            self._forgotten.update(message_ids)
