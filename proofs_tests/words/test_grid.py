"""Grid.stream over any Grid, against a schedule of arrivals; LocalGrid and ModGrid."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed import ClientApp, Context, ErrorCode, LocalGrid, Message, RecordDict
from privfed.apps import CallNext
from privfed.grid import Checkpoint, Grid, MemoryRecorder, ModGrid
from privfed.record import ArrayRecord


class ScriptedGrid(Grid):
    """Answers in the order that `lateness` gives (by position of the message); inf: never. Counts what is out."""

    def __init__(self, lateness: Sequence[float]) -> None:
        self.recorder = MemoryRecorder()
        self.lateness = list(lateness)
        self.pushed: list[Message] = []
        self.out: dict[str, tuple[float, Message]] = {}
        self.forgotten: list[str] = []
        self.most = 0

    def get_node_ids(self) -> Sequence[int]:
        return range(1, len(self.lateness) + 1)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            self.out[message.metadata.message_id] = (self.lateness[len(self.pushed)], message)
            self.pushed.append(message)
            ids.append(message.metadata.message_id)
        self.most = max(self.most, len(self.out))
        return ids

    def _next(self, message_ids: Iterable[str]) -> str | None:
        waiting = [
            (self.out[one][0], one) for one in message_ids if one in self.out and self.out[one][0] != float("inf")
        ]
        return min(waiting, key=lambda pair: pair[0])[1] if waiting else None

    def wait(self, message_ids: Iterable[str], timeout: float | None) -> bool:
        assert timeout is None or timeout >= 0
        return self._next(message_ids) is not None

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        found = self._next(message_ids)
        return [] if found is None else [Message(RecordDict(), reply_to=self.out.pop(found)[1])]

    def forget(self, message_ids: Iterable[str]) -> None:
        self.forgotten += message_ids


def instructions(count: int) -> list[Message]:
    return [Message(RecordDict(), node, "train") for node in range(1, count + 1)]


schedules = st.lists(st.integers(0, 9).map(float) | st.just(float("inf")), max_size=9)


@settings(max_examples=200)
@given(schedules, st.none() | st.integers(1, 10), st.booleans())
def test_a_stream_yields_each_reply_once_and_withdraws_the_rest(
    lateness: list[float], window: int | None, ordered: bool
) -> None:
    grid = ScriptedGrid(lateness)
    replies = list(grid.stream(instructions(len(lateness)), timeout=1, window=window, ordered=ordered))
    nodes = [reply.metadata.src_node_id for reply in replies]
    sent = len(grid.pushed)
    answering = [place + 1 for place, late in enumerate(lateness[:sent]) if late != float("inf")]
    assert sorted(nodes) == answering
    if ordered:
        assert nodes == sorted(nodes)
    if window is None or window >= len(lateness):
        assert sent == len(lateness)
    if window is not None:
        assert grid.most <= window
    silent = [message.metadata.message_id for message in grid.pushed if message.metadata.message_id in grid.out]
    assert sorted(grid.forgotten) == sorted(silent)


def test_a_stream_asks_for_messages_only_when_there_is_room() -> None:
    taken = 0

    def source() -> Iterator[Message]:
        nonlocal taken
        for message in instructions(10):
            taken += 1
            yield message

    stream = ScriptedGrid([0.0] * 10).stream(source(), window=3)
    assert taken == 0
    for yielded in range(1, 6):
        next(stream)
        assert taken <= yielded + 3


def test_closing_a_stream_early_withdraws_what_is_out() -> None:
    grid = ScriptedGrid([0.0, 5.0, 6.0])
    stream = grid.stream(instructions(3))
    next(stream)
    stream.close()  # type: ignore[attr-defined]  # a generator
    assert sorted(grid.forgotten) == sorted(grid.out)
    assert len(grid.forgotten) == 2


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_holds_at_least_one(window: int) -> None:
    with pytest.raises(ValueError, match="window"):
        list(ScriptedGrid([]).stream([], window=window))


def test_send_and_receive_is_the_list_of_the_stream() -> None:
    assert len(ScriptedGrid([3.0, 1.0, float("inf")]).send_and_receive(instructions(3), timeout=1)) == 2


def counting() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if context.node_id == 2:
            raise ValueError("private")
        return Message(RecordDict(), reply_to=message)

    return app


def test_a_local_grid_runs_nodes_in_order_with_their_contexts() -> None:
    grid = LocalGrid(counting(), 3, seed=5)
    assert [(c.node_config["partition-id"], c.seed) for c in grid.contexts.values()] == [(0, 5), (1, 5), (2, 5)]
    replies = grid.send_and_receive([*instructions(3), Message(RecordDict(), 9, "train")])
    codes = [reply.error.code if reply.has_error() else None for reply in replies]
    assert codes == [None, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, None, ErrorCode.NODE_UNAVAILABLE]
    assert replies[1].error.reason == "ValueError"


def test_a_failing_server_mod_fails_its_exchange_alone() -> None:
    def mod(message: Message, context: Context, call_next: CallNext) -> Message:
        if message.metadata.dst_node_id == 1:
            raise LookupError("private")
        return call_next(message, context)

    grid = ModGrid(LocalGrid(counting(), 3), [mod], Context())
    replies = list(grid.stream(instructions(3), timeout=30, ordered=True))
    assert [reply.has_error() for reply in replies] == [True, True, False]
    assert (replies[0].error.code, replies[0].error.reason) == (ErrorCode.MOD_FAILED_PRECONDITION, "LookupError")


def test_a_withdrawn_exchange_of_a_server_mod_is_dropped() -> None:
    release = threading.Event()

    def mod(message: Message, context: Context, call_next: CallNext) -> Message:
        release.wait(30)
        return call_next(message, context)

    grid = ModGrid(LocalGrid(counting(), 1), [mod], Context())
    ids = grid.push_messages(instructions(1))
    started = time.monotonic()
    assert not grid.wait(ids, 0.05)
    assert time.monotonic() - started < 5
    grid.forget(ids)
    release.set()
    assert not grid.wait(ids, 0.2)
    assert grid.pull_messages(ids) == []


def test_a_memory_recorder_keeps_the_last_checkpoint_and_the_events() -> None:
    recorder = MemoryRecorder()
    assert recorder.restore() is None
    checkpoint = Checkpoint(1, ArrayRecord())
    recorder.commit(checkpoint)
    recorder.report("round-end", round=1)
    assert recorder.restore() is checkpoint
    assert recorder.events == [("round-end", {"round": 1})]
