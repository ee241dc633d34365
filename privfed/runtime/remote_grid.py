"""A server app's Grid and Recorder in its own process: every call is a packet to the process that holds the Link.

Calls carry numbers, so several threads of the app may wait at once. What a call raises on the other side it raises
here, as the same class where the app may act on it.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from privfed.context import Context
from privfed.errors import PrivfedError, RunFailed, RunStopped
from privfed.failpoint import around
from privfed.grid import Checkpoint, Grid
from privfed.message import Message
from privfed.record import RecordDict
from privfed.runtime.capsule import state_of
from privfed.runtime.channel import MAX_HEAD, Channel, ChannelError, Packet, large_buffers
from privfed.runtime.store import StoreError

PUSH_BYTES = 1 << 28
"""Array bytes after which a batch of instructions goes out and the next one begins."""
MAX_RESULT = MAX_HEAD // 2
"""Characters of a result of `main` that is told."""
KEPT = ("push", "commit")
"""Calls whose large buffers the other side keeps until the next call of the same name: a model that was committed, and
sent to some nodes, is not sent again for the others."""
KINDS: dict[str, type[Exception]] = {
    "StoreError": StoreError,
    "RunStopped": RunStopped,
    "RunFailed": RunFailed,
    "ValueError": ValueError,
    "TypeError": TypeError,
    "PrivfedError": PrivfedError,
}
"""What a call may raise on both sides; anything else arrives as a PrivfedError that names its class."""


def as_plain(value: object) -> tuple[Any, bool]:
    """Return a result as data that travels, and whether it could be told; None and False otherwise, or if too large."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return None, False
    return (json.loads(text), True) if len(text) <= MAX_RESULT else (None, False)


class Caller:
    """Sends numbered calls and hands each answer to the thread that waits for it."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._numbers = itertools.count(1)
        self._waiting: dict[int, queue.SimpleQueue[Packet]] = {}
        self._lock = threading.Lock()
        self._there: dict[str, set[bytes]] = {}
        self._sending = threading.Lock()

    def call(self, name: str, head: Mapping[str, Any] | None = None, values: Sequence[Any] = ()) -> Packet:
        """Make a call and wait for its answer. Raises what it raised on the other side."""
        answer: queue.SimpleQueue[Packet] = queue.SimpleQueue()
        number = next(self._numbers)
        with self._lock:
            self._waiting[number] = answer
        try:
            with around("call"):
                self._send(Packet({"op": "call", "id": number, "name": name, **(head or {})}, values))
            packet = answer.get()
        finally:
            with self._lock:
                del self._waiting[number]
        if packet.head["op"] == "raise":
            raise KINDS.get(packet.head["kind"], PrivfedError)(packet.head["text"])
        return packet

    def _send(self, packet: Packet) -> None:
        """Send a call; large buffers that the last call of a kind that is kept has brought there are not sent again."""
        name = packet.head["name"]
        if name not in KEPT:
            self._channel.send(packet)
            return
        with self._sending:
            self._channel.send(packet, frozenset().union(*self._there.values()))
            self._there[name] = set(large_buffers(packet))

    def dispatch(self, inbox: queue.SimpleQueue[Packet]) -> None:
        """Hand out answers, for ever."""
        while True:
            packet = inbox.get()
            with self._lock:
                waiting = self._waiting.get(packet.head.get("id", 0))
            if waiting is not None:
                waiting.put(packet)

    def finish(self, head: dict[str, Any], context: Context) -> None:
        """Tell how the app ended, with what it keeps."""
        with around("result"):
            self._channel.send(Packet(head, (state_of(context),)))


class RemoteRecorder:
    """The recorder of a run that another process keeps."""

    def __init__(self, caller: Caller, context: Context, head: Mapping[str, Any]) -> None:
        self._caller = caller
        self._context = context
        self.ledger_path = Path(head["ledger"]) if head["ledger"] is not None else None
        self.insecure_test_randomness: int | None = head["insecure"]

    def journal_path(self, name: str) -> Path | None:
        # An app that runs as another user cannot write into the run's folder: its sessions stay in memory.
        if self.ledger_path is None or not os.access(self.ledger_path.parent, os.W_OK):
            return None
        return self.ledger_path.parent / "sessions" / name

    def restore(self) -> Checkpoint | None:
        packet = self._caller.call("restore")
        if not packet.values:
            return None
        return read_checkpoint(packet)

    def commit(self, checkpoint: Checkpoint) -> None:
        head, values = pack_checkpoint(checkpoint)
        self._caller.call("commit", head, (*values, state_of(self._context)))

    def report(self, event: str, **fields: object) -> None:
        self._caller.call("report", {"event": event, "fields": fields})


class RemoteGrid(Grid):
    """The Grid of a run whose Link is in another process."""

    def __init__(self, caller: Caller, context: Context, head: Mapping[str, Any]) -> None:
        self._caller = caller
        self.run_id = head["grid"]["run"]
        self.seed = head["grid"]["seed"]
        self.shared = bytes.fromhex(head["grid"]["shared"])
        self.recorder = RemoteRecorder(caller, context, head)

    def get_node_ids(self) -> Sequence[int]:
        return list(self._caller.call("nodes").head["nodes"])

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids: list[str] = []
        batch: list[Message] = []
        size, seen = 0, set[int]()
        for message in messages:
            arrays = _arrays(message)
            size += sum(array.nbytes for array in arrays if id(array) not in seen)  # what they share travels once
            seen |= set(map(id, arrays))
            batch.append(message)
            if size >= PUSH_BYTES:
                ids += self._push(batch)
                batch, size, seen = [], 0, set()
        return ids + (self._push(batch) if batch else [])

    def _push(self, messages: Sequence[Message]) -> list[str]:
        return list(self._caller.call("push", values=messages).head["ids"])

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies: list[Message] = []
        ids = list(message_ids)
        while True:  # a packet holds as many replies as fit its size
            packet = self._caller.call("pull", {"ids": ids})
            replies += [packet.message(place) for place in range(len(packet.values))]
            if not packet.head["more"]:
                return replies

    def wait(self, message_ids: Iterable[str], timeout: float | None) -> bool:
        return bool(self._caller.call("wait", {"ids": list(message_ids), "timeout": timeout}).head["arrived"])

    def forget(self, message_ids: Iterable[str]) -> None:
        self._caller.call("forget", {"ids": list(message_ids)})


def _arrays(message: Message) -> list[Any]:
    return [array for record in message.content.array_records.values() for array in record.values()]


def pack_checkpoint(checkpoint: Checkpoint) -> tuple[dict[str, Any], tuple[RecordDict, RecordDict]]:
    """Return a checkpoint as a head and two values."""
    head = {"round": checkpoint.round, "metrics": [dict(one) for one in checkpoint.metrics]}
    return head, (RecordDict({"arrays": checkpoint.arrays}), checkpoint.state)


def read_checkpoint(packet: Packet) -> Checkpoint:
    """Take apart what `pack_checkpoint` made. Raises ChannelError for anything else."""
    try:
        number, metrics = int(packet.head["round"]), tuple(dict(one) for one in packet.head["metrics"])
        arrays = packet.records(0).array_records["arrays"]
    except (KeyError, TypeError, ValueError) as fault:
        raise ChannelError(f"a checkpoint does not decode: {fault!r}") from None
    return Checkpoint(number, arrays, packet.records(1), metrics)
