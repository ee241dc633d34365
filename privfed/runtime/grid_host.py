"""The other end of a RemoteGrid: takes the calls of a server app's process and makes them on the real Grid.

Calls run in threads of their own, since a server app may wait in several at once. What the app's process sends is not
trusted further than its run: it names messages, and the Grid it is given knows no other run.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

from privfed.context import Context
from privfed.errors import RunFailed, RunStopped
from privfed.failpoint import around
from privfed.grid import Grid
from privfed.message import Message
from privfed.record import RecordDict
from privfed.runtime.capsule import take_state
from privfed.runtime.channel import Channel, ChannelError, Packet, large_buffers
from privfed.runtime.remote_grid import KEPT, KINDS, pack_checkpoint, read_checkpoint
from privfed.wire import Buffer

MAX_CALLS = 512
PULL_BYTES = 1 << 28
"""Array bytes after which a packet of replies is full."""
MAX_TEXT = 10_000
"""Characters of what a call raised that are told."""
_SLICE_SECONDS = 2.0


class GridHost:
    """One server app's process, its Grid and its Context."""

    def __init__(self, channel: Channel, grid: Grid, context: Context) -> None:
        self._channel = channel
        self._grid = grid
        self._context = context
        self._gone = False
        self._at_work: set[Future[None]] = set()
        self._kept: dict[str, dict[bytes, Buffer]] = {}
        self._calls: Mapping[str, Callable[[Packet], Packet]] = {
            "nodes": self._nodes,
            "push": self._push,
            "pull": self._pull,
            "wait": self._wait,
            "forget": self._forget,
            "restore": self._restore,
            "commit": self._commit,
            "report": self._report,
        }

    def head(self) -> dict[str, Any]:
        """Return what the app's process must know of the Grid and its recorder before it starts."""
        recorder = self._grid.recorder
        ledger = None if recorder.ledger_path is None else str(recorder.ledger_path.resolve())
        told = {"ledger": ledger, "insecure": recorder.insecure_test_randomness}
        grid = {"run": self._grid.run_id, "seed": self._grid.seed, "shared": self._grid.shared.hex()}
        return {"grid": grid, **told}

    def serve(self) -> object:
        """Answer calls until the app ends; return its result.

        Raises RunFailed with the reason, RunStopped as the app did; OSError when the disk refused what it keeps;
        ChannelError when its process dies.
        """
        pool = ThreadPoolExecutor(MAX_CALLS, thread_name_prefix="privfed-grid")
        try:
            while True:
                packet = self._channel.receive({k: v for kept in self._kept.values() for k, v in kept.items()})
                if packet.head.get("op") != "call":
                    return self._ended(packet)
                if packet.head.get("name") in KEPT:
                    self._kept[packet.head["name"]] = large_buffers(packet)
                call = pool.submit(self._answer, packet)
                if packet.head.get("name") != "wait":
                    self._at_work.add(call)
                    call.add_done_callback(self._at_work.discard)
        finally:
            self._gone = True
            pool.shutdown(wait=False, cancel_futures=True)

    def settle(self) -> None:
        """Wait for calls that the process had made before it ended; call it when the process is dead.

        A push or a commit that was done after the next attempt began would hand out its messages in that one, or move
        the round it goes on from: nodes would do a round twice, or forget one.
        """
        for call in list(self._at_work):
            with contextlib.suppress(CancelledError):
                call.exception()

    def _ended(self, packet: Packet) -> object:
        take_state(self._context, packet, 0)
        head = packet.head
        if head.get("op") == "result":
            return head.get("value")
        text = str(head.get("text", ""))
        if head.get("kind") == "stopped":
            raise RunStopped(text)
        if head.get("kind") == "disk" and type(head.get("errno")) is int:
            raise OSError(head["errno"], text)  # its ledger or a journal: the run waits, and is taken up again
        if head.get("kind") == "raised":
            raise RunFailed(f"the ServerApp raised {head.get('name')}: {text}")
        raise RunFailed(text)

    def _answer(self, packet: Packet) -> None:
        number, name = packet.head.get("id"), str(packet.head.get("name"))
        try:
            call = self._calls.get(name)
            if call is None:
                raise ChannelError(f"there is no call {name[:100]!r}")
            answer = call(packet)
            answer = Packet({"op": "answer", "id": number, **answer.head}, answer.values)
        except Exception as fault:  # noqa: BLE001 - raised again in the app's process
            answer = _raised(number, fault)
        try:
            with around("grid-answer"):
                self._channel.send(answer)
        except ChannelError:
            self._gone = True
        except Exception as fault:  # noqa: BLE001 - an answer that cannot travel; without one the app waits for ever
            with contextlib.suppress(ChannelError), around("grid-answer"):
                self._channel.send(_raised(number, ValueError(f"the answer to {name!r}: {fault}")))

    def _nodes(self, packet: Packet) -> Packet:
        del packet
        return Packet({"nodes": list(self._grid.get_node_ids())})

    def _push(self, packet: Packet) -> Packet:
        messages = [packet.message(place) for place in range(len(packet.values))]
        return Packet({"ids": self._grid.push_messages(messages)})

    def _pull(self, packet: Packet) -> Packet:
        replies: list[Message] = []
        size = 0
        for message_id in packet.head["ids"]:
            if size >= PULL_BYTES:
                return Packet({"more": True}, replies)
            for reply in self._grid.pull_messages([message_id]):
                replies.append(reply)
                size += _array_bytes(reply)
        return Packet({"more": False}, replies)

    def _wait(self, packet: Packet) -> Packet:
        ids, timeout = packet.head["ids"], packet.head["timeout"]
        ends = None if timeout is None else time.monotonic() + float(timeout)
        while not self._gone:
            left = _SLICE_SECONDS if ends is None else min(_SLICE_SECONDS, ends - time.monotonic())
            if self._grid.wait(ids, max(0.0, left)):
                return Packet({"arrived": True})
            if ends is not None and time.monotonic() >= ends:
                break
        return Packet({"arrived": False})

    def _forget(self, packet: Packet) -> Packet:
        self._grid.forget(packet.head["ids"])
        return Packet()

    def _restore(self, packet: Packet) -> Packet:
        del packet
        checkpoint = self._grid.recorder.restore()
        if checkpoint is None:
            return Packet()
        return Packet(*pack_checkpoint(checkpoint))

    def _commit(self, packet: Packet) -> Packet:
        checkpoint = read_checkpoint(packet)
        take_state(self._context, packet, 2)
        self._grid.recorder.commit(checkpoint)
        return Packet()

    def _report(self, packet: Packet) -> Packet:
        fields = {str(name): value for name, value in packet.head["fields"].items()}
        self._grid.recorder.report(str(packet.head["event"]), **fields)
        return Packet()


def _raised(number: object, fault: Exception) -> Packet:
    known = next((name for name, kind in KINDS.items() if type(fault) is kind), None)
    told = _reason(fault) if known is not None else f"{type(fault).__name__}: {fault}"
    return Packet({"op": "raise", "id": number, "kind": known or "PrivfedError", "text": told[:MAX_TEXT]})


def _reason(fault: Exception) -> str:
    return fault.reason if isinstance(fault, RunFailed) else str(fault)


def _array_bytes(reply: Message) -> int:
    content = reply.content if reply.has_content() else RecordDict()
    return sum(array.nbytes for record in content.array_records.values() for array in record.values())
