"""A node's memory against a model of it: whole or not at all, answered once, and never forgetting what a mod did."""

from __future__ import annotations

import sqlite3
import stat
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from privfed.runtime import node_store
from privfed.runtime.node_blob import LARGE, NodeStoreError
from privfed.runtime.node_store import Kept, MessageReused, NodeStore, ReplyGone, StateGone, Unsent
from privfed.runtime.store import NodeState

RUN, NODE = (1 << 64) - 5, 3


def ask(number: int = 0, run: int = RUN) -> Message:
    content = RecordDict({"q": ConfigRecord({"number": number})})
    return Message(content, NODE, "train").with_metadata(run_id=run)


def answer(message: Message, number: int, size: int = 4) -> Message:
    arrays = ArrayRecord({"w": Array(np.full(size, number % 251, np.uint8))})
    return Message(RecordDict({"a": arrays}), reply_to=message)


def kept(number: int, size: int = 4) -> Kept:
    """State of an app and its mod, and of a mod of the node, all told apart by the number."""
    arrays = ArrayRecord({"w": Array(np.full(size, number % 251, np.uint8))})
    app = NodeState(RecordDict({"app": arrays}), {"clip": RecordDict({"c": ConfigRecord({"n": number})})})
    return Kept(app, {"mask": RecordDict({"m": ConfigRecord({"n": number})})})


def numbers(state: Message | Kept) -> tuple[int, int]:
    """Return what the app's state and the node's mod remember; 0 for nothing."""
    assert isinstance(state, Kept)
    app = state.app.app.array_records.get("app")
    mod = state.mods.get("mask", RecordDict()).config_records.get("m")
    clip = state.app.mods.get("clip", RecordDict()).config_records.get("c")
    seen = int(app["w"].view()[0]) if app is not None else 0
    assert seen == (clip["n"] if clip is not None else 0), "an app and its mods go together"
    return seen, int(str(mod["n"])) if mod is not None else 0


def of(message: Message, token: str = "t") -> Unsent:
    return Unsent(message.metadata.run_id, NODE, message.metadata.message_id, token)


def test_state_and_reply_survive_without_being_closed(tmp_path: Path) -> None:
    store, message = NodeStore(tmp_path / "s"), ask()
    assert numbers(store.begin(message, "t1")) == (0, 0)
    reply = answer(message, 7, LARGE)
    store.commit(message, "t1", reply, kept(7, LARGE + 1))
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o700
    store._held.close()  # as a killed process lets go of its lock, and of nothing else
    again = NodeStore(tmp_path / "s")
    assert again.unsent() == [of(message, "t1")]
    assert again.answer(of(message)).content == reply.content
    assert numbers(again.begin(ask(), "t2")) == (7, 7)
    again.close()
    store.close()


def test_a_folder_has_one_process(tmp_path: Path) -> None:
    store = NodeStore(tmp_path)
    with pytest.raises(NodeStoreError, match="another process"):
        NodeStore(tmp_path)
    store.close()
    NodeStore(tmp_path).close()


def test_a_redelivery_gets_the_stored_reply_under_its_new_lease(tmp_path: Path) -> None:
    store, message = NodeStore(tmp_path), ask()
    store.begin(message, "t1")
    store.commit(message, "t1", answer(message, 1), kept(1))
    found = store.begin(message.with_metadata(delivered_at=5.0), "t2")
    assert isinstance(found, Message)
    assert found.content == answer(message, 1).content
    assert store.unsent() == [of(message, "t2")]
    with pytest.raises(MessageReused):
        store.begin(message.with_content(ask(9).content), "t3")
    store.close()


def test_an_older_message_is_neither_run_again_nor_answered_again(tmp_path: Path) -> None:
    store, first, second = NodeStore(tmp_path), ask(1), ask(2)
    for number, message in enumerate((first, second), 1):
        store.begin(message, "t")
        store.commit(message, "t", answer(message, number), kept(number))
        store.settle(of(message), True)
    with pytest.raises(ReplyGone):
        store.begin(first, "t")
    assert isinstance(store.begin(second, "t"), Message)
    store.close()


@pytest.mark.parametrize("counted", [True, False])
def test_an_older_answer_that_is_not_settled_is_kept_and_sent(tmp_path: Path, counted: bool) -> None:
    """A later answer, counted, says nothing of it: it was taken for counted once, and its reply thrown away."""
    store, first, second, third = NodeStore(tmp_path), ask(1), ask(2), ask(3)
    for number, message in enumerate((first, second), 1):
        store.begin(message, "t")
        store.commit(message, "t", answer(message, number, LARGE), kept(number))
    store.settle(of(second), True)
    store.close()
    store = NodeStore(tmp_path)
    assert store.unsent() == [of(first)]
    assert store.answer(of(first)).content == answer(first, 1, LARGE).content
    assert isinstance(store.begin(first, "t"), Message), "it is handed out again, and does not run again"
    store.settle(of(first), counted)
    assert store.unsent() == []
    assert numbers(store.begin(third, "t")) == (2, 2), "the second was answered with its state, which stays"
    store.commit(third, "t", answer(third, 3), kept(3))
    with pytest.raises(ReplyGone):
        store.begin(first, "t")
    store.close()


def test_what_is_not_counted_takes_the_apps_state_with_it_and_not_the_mods(tmp_path: Path) -> None:
    store, first, second = NodeStore(tmp_path), ask(1), ask(2)
    store.begin(first, "t")
    store.commit(first, "t", answer(first, 1), kept(1))
    store.settle(of(first), True)
    store.begin(second, "t")
    store.commit(second, "t", answer(second, 2), kept(2))
    store.settle(of(second), False)
    store.settle(of(second), False)  # told twice, done once
    assert numbers(store.begin(ask(3), "t")) == (1, 2)
    # The same message comes again after all: its answer counts, and with it the state.
    assert isinstance(store.begin(second, "t2"), Message)
    store.settle(of(second), True)
    assert numbers(store.begin(ask(4), "t")) == (2, 2)
    store.close()


def test_a_failed_message_changes_no_state(tmp_path: Path) -> None:
    store, first, second = NodeStore(tmp_path), ask(1), ask(2)
    store.begin(first, "t")
    store.commit(first, "t", answer(first, 1), kept(1))
    store.begin(second, "t")
    store.commit(second, "t", answer(second, 2), None)
    store.settle(of(second), False)
    assert numbers(store.begin(ask(3), "t")) == (1, 1)
    store.close()


def test_a_resumed_run_goes_back_to_the_state_of_its_round(tmp_path: Path) -> None:
    store = NodeStore(tmp_path)

    def serve(number: int, began: list[int], commit: int) -> tuple[int, int]:
        message = ask(number)
        before = numbers(store.begin(message, "t", began, commit))
        store.commit(message, "t", answer(message, number), kept(number))
        store.settle(of(message), True)
        return before

    assert serve(1, [0], 0) == (0, 0)
    assert serve(2, [0], 1) == (1, 1)
    assert serve(3, [0], 1) == (2, 2)
    # The server died in the round after commit 1, and does it again.
    assert serve(4, [0, 1], 1) == (1, 3)
    assert serve(5, [0, 1], 1) == (4, 4)
    assert serve(6, [0, 1], 2) == (5, 5)
    # A commit the node saw, and a resume at that commit before the node did anything: nothing to undo but that.
    assert serve(7, [0, 1, 2], 2) == (5, 6)
    # A resume at a later commit keeps what was done.
    assert serve(8, [0, 1, 2, 5], 5) == (7, 7)
    # Back to a commit at which the node was not asked: what it had when it was next asked.
    assert serve(9, [0, 1, 2, 5, 4], 4) == (7, 8)
    store.close()


def test_a_node_that_was_not_asked_when_the_run_resumed_goes_back_all_the_same(tmp_path: Path) -> None:
    """Its state is of a round that was done again without it; the task alone, of a later round, does not say so."""
    store, first = NodeStore(tmp_path), ask(1)
    store.begin(first, "t", [0], 3)
    store.commit(first, "t", answer(first, 1), kept(1))
    store.settle(of(first), True)
    assert numbers(store.begin(ask(2), "t", [0, 3, 7], 9)) == (0, 1)
    store.close()


def test_a_run_cannot_go_back_further_than_the_node_remembers(tmp_path: Path) -> None:
    store = NodeStore(tmp_path)
    for commit in range(node_store.KEPT_COMMITS + 2):
        message = ask(commit)
        store.begin(message, "t", [0], commit)
        store.commit(message, "t", answer(message, commit), kept(commit + 1))
    with pytest.raises(StateGone, match="goes back to round 1"):
        store.begin(ask(99), "t", [0, 1], 1)
    assert numbers(store.begin(ask(98), "t", [0, 2], 2)) == (2, node_store.KEPT_COMMITS + 2)
    store.close()


def test_runs_are_apart_and_forgotten_after_they_ended(tmp_path: Path) -> None:
    store = NodeStore(tmp_path)
    for run in (1, 2):
        message = ask(run, run)
        store.begin(message, "t")
        store.commit(message, "t", answer(message, run, LARGE), kept(run, LARGE + run))
    store.end(1, now=100.0)
    assert store.runs() == [2]
    assert store.evict(before=100.0) == []
    assert store.evict(before=101.0) == [1]
    store.end(2, now=100.0)
    assert numbers(store.begin(ask(5, 2), "t")) == (2, 2)  # resumed: it has not ended
    assert store.evict(before=1e12) == []
    store.close()
    store = NodeStore(tmp_path)  # and after a restart
    with pytest.raises(StateGone, match="run 1 ended and what the node kept of it is gone"):
        store.begin(ask(5, 1), "t")  # else its opened sums could be opened again
    assert store.runs() == [2]
    assert numbers(store.begin(ask(5, 3), "t")) == (0, 0)
    store.close()


def test_nothing_is_left_on_the_disk_of_a_run_that_is_forgotten(tmp_path: Path) -> None:
    store = NodeStore(tmp_path)
    for number in range(1, 8):
        message = ask(number)
        store.begin(message, "t", [0], number)
        store.commit(message, "t", answer(message, number, LARGE), kept(number, LARGE + 1))
        store.settle(of(message), number % 2 == 0)
    store.end(RUN, 0.0)
    store.evict(1.0)
    store.runs()  # the next transaction sweeps
    assert [path for path in (tmp_path / "arrays").rglob("*") if path.is_file()] == []
    database = sqlite3.connect(tmp_path / "node.db")
    for table in ("nodes", "marks", "answers", "blobs", "holds", "buffers"):
        assert database.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,), table  # noqa: S608 - own names
    database.close()
    store.close()


def test_another_format_is_refused(tmp_path: Path) -> None:
    NodeStore(tmp_path).close()
    database = sqlite3.connect(tmp_path / "node.db")
    database.execute("UPDATE facts SET value = '99'")
    database.commit()
    database.close()
    with pytest.raises(NodeStoreError, match="format 99"):
        NodeStore(tmp_path)


def test_a_damaged_array_is_found(tmp_path: Path) -> None:
    store, message = NodeStore(tmp_path), ask()
    store.begin(message, "t")
    store.commit(message, "t", answer(message, 1), kept(1, LARGE))
    (file,) = (path for path in (tmp_path / "arrays").rglob("*") if path.is_file())
    file.write_bytes(b"\1" + file.read_bytes()[1:-1] + b"\2")
    with pytest.raises(NodeStoreError, match="damaged"):
        store.begin(ask(2), "t")
    store.close()


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["serve", "fail", "crash-before", "crash-after", "resume", "advance", "again"]),
        st.booleans(),
        st.sampled_from([4, LARGE]),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=40, deadline=None)
@given(STEPS)
def test_any_history_with_crashes_agrees_with_the_model(steps: list[tuple[str, bool, int]]) -> None:
    """The model: the app's state is what the last counted answer left, or that at a resume's round; mods only grow."""
    with tempfile.TemporaryDirectory() as folder:
        store = NodeStore(folder)
        began, commit, app, mods, number = [0], 0, 0, 0, 0
        marks: dict[int, int] = {}
        ran: set[str] = set()
        last: Message | None = None
        for step, counted, size in steps:
            if step == "resume":
                began.append(commit)
                app = next((marks[at] for at in sorted(marks) if at >= commit), app)
                marks = {at: state for at, state in marks.items() if at < commit}
                continue
            if step == "advance":
                commit += 1
                continue
            if step == "again" and last is not None:
                found = store.begin(last, "again", began, commit)
                assert isinstance(found, Message), "a message never runs twice"
                continue
            number += 1
            last = message = ask(number)
            found = store.begin(message, "t", began, commit)
            marks.setdefault(commit, app)
            assert numbers(found) == (app, mods)
            if step == "crash-before":  # nothing was kept: the message is not known
                last = None
            else:
                ran.add(message.metadata.message_id)
                store.commit(
                    message, "t", answer(message, number, size), None if step == "fail" else kept(number, size)
                )
                if step != "fail":
                    mods = number
            if step.startswith("crash"):
                store.close()
                store = NodeStore(folder)
                assert [one.message_id for one in store.unsent()] == [message.metadata.message_id] * (
                    step == "crash-after"
                )
            if step != "crash-before":
                store.settle(of(message), counted)
                app = number if counted and step != "fail" else app
                assert store.unsent() == []
        assert numbers(store.begin(ask(0), "end", began, commit)) == (app, mods)
        store.close()
