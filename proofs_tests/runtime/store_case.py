"""Every store, and small messages, for tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from privfed import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from privfed.runtime.memory_store import MemoryStore
from privfed.runtime.sqlstore import SqlStore
from privfed.runtime.store import NodeState, Store


def postgres_store(path: Path) -> Store:
    from proofs_tests.runtime.postgres import server

    return SqlStore(path, server().database())


STORES: dict[str, Callable[[Path], Store]] = {
    "memory": lambda path: MemoryStore(),
    "sqlite": SqlStore,
    "postgres": postgres_store,
}
NAMES = ["memory", "sqlite", pytest.param("postgres", marks=pytest.mark.postgres)]
EPOCH = 1_000.0
RUN = 5


def close(store: Store) -> None:
    if isinstance(store, SqlStore):
        store.close()


def instruction(node: int, *, ttl: float = 100.0, at: float = EPOCH, mark: int = 0) -> Message:
    content = RecordDict({"c": ConfigRecord({"mark": mark})})
    return Message(content, node, "train", ttl=ttl).with_metadata(created_at=at, run_id=RUN)


def state(mark: int, size: int = 3) -> NodeState:
    arrays = ArrayRecord({"w": Array(np.full(size, mark, np.float32))})
    return NodeState(RecordDict({"a": arrays}), {"mod": RecordDict({"c": ConfigRecord({"mark": mark})})})


def running(store: Store, nodes: int = 3) -> Store:
    store.create_run(RUN, range(1, nodes + 1))
    store.set_run_state(RUN, "running")
    return store


def ids(*messages: Message) -> list[str]:
    return [message.metadata.message_id for message in messages]
