"""A server in a process of its own, whose nodes live in the one that started it: frames over its pipes.

    python crashing_server.py RUN_FOLDER ROUNDS THRESHOLD

A frame is 8 bytes of length and a message. Each instruction is answered before the next is sent.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from privfed.array import Array
from privfed.grid import Grid
from privfed.message import Message
from privfed.protocols import SecAgg
from privfed.record import ArrayRecord
from privfed.runtime.run_folder import RunFolder
from privfed.strategies import FedAvg, SecureStage
from privfed.wire import dumps, loads

RUN, NODES = 77, (1, 2, 3, 4)


def send(pipe: BinaryIO, message: Message) -> None:
    frame = dumps(message)
    pipe.write(len(frame).to_bytes(8, "big") + frame)
    pipe.flush()


def receive(pipe: BinaryIO) -> Message | None:
    """Return the next message, or None at the end."""
    head = pipe.read(8)
    if len(head) < 8:
        return None
    message = loads(pipe.read(int.from_bytes(head, "big")))
    assert isinstance(message, Message)
    return message


class PipeGrid(Grid):
    def __init__(self, folder: RunFolder) -> None:
        self.recorder, self.run_id = folder, RUN
        self._replies: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        return list(NODES)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            send(sys.stdout.buffer, message)
            reply = receive(sys.stdin.buffer)
            assert reply is not None
            ids.append(message.metadata.message_id)
            self._replies[message.metadata.message_id] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(one) for one in list(message_ids) if one in self._replies]

    def wait(self, message_ids: Iterable[str], timeout: float | None) -> bool:
        return any(one in self._replies for one in message_ids)


def main(path: Path, rounds: int, threshold: int) -> None:
    folder = RunFolder.open(path) if path.exists() else RunFolder.create(path, {})
    folder.begin()
    model = ArrayRecord({"w": Array(np.zeros(3, np.float32))})
    strategy = FedAvg(fraction_evaluate=0, stage=SecureStage(SecAgg(threshold=threshold), max_weight=8))
    strategy.start(PipeGrid(folder), model, rounds)
    folder.end("completed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
