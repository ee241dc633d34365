"""A federation in one process: deterministic, honest about failure, and consistent however it ends."""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed import (
    Array,
    ArrayRecord,
    ClientApp,
    ConfigRecord,
    Context,
    ErrorCode,
    Grid,
    Message,
    MetricRecord,
    RecordDict,
    RunFailed,
    ServerApp,
    run_simulation,
    wire,
)
from privfed.errors import RunStopped
from privfed.grid import Checkpoint
from privfed.runtime import simulation
from privfed.runtime.run_folder import RunFolder, RunFolderError

Handler = Callable[[Message, Context], Message]


def client(handler: Handler) -> ClientApp:
    app = ClientApp()
    app.train()(handler)
    return app


def questions(grid: Grid, number: int = 1, **config: int) -> list[Message]:
    content = RecordDict({"config": ConfigRecord({"round": number, **config})})
    return [Message(content, node, "train") for node in grid.get_node_ids()]


def echo(message: Message, context: Context) -> Message:
    return Message(RecordDict({"m": MetricRecord({"node": context.node_id})}), reply_to=message)


def training(message: Message, context: Context) -> Message:
    """Keep a momentum in the node's state, draw from the seed, return distinct arrays."""
    number = message.content.config_records["config"]["round"]
    assert isinstance(number, int)
    kept = context.state.array_records.get("momentum")
    momentum = kept["v"].view() if kept is not None else np.zeros(7)
    momentum = 0.9 * momentum + context.rng("train", number).standard_normal(7)
    context.state["momentum"] = ArrayRecord({"v": Array(momentum)})
    context.mod_state("count")["n"] = ConfigRecord({"seen": number})
    return Message(RecordDict({"arrays": ArrayRecord({"w": Array(momentum)})}), reply_to=message)


def rounds(total: int, stop_before: int = 0) -> Callable[[Grid, Context], str]:
    """Return a main function that averages, commits every round, and can break off before one."""

    def main(grid: Grid, context: Context) -> str:
        found = grid.recorder.restore()
        weights = found.arrays["w"].view() if found is not None else np.zeros(7)
        metrics = list(found.metrics) if found is not None else []
        for number in range(len(metrics) + 1, total + 1):
            if number == stop_before:
                raise KeyboardInterrupt
            replies = list(grid.stream(questions(grid, number), timeout=60, ordered=True))
            weights = weights + np.mean([one.content.array_records["arrays"]["w"].view() for one in replies], axis=0)
            context.state["server"] = ConfigRecord({"rounds": number})
            metrics.append({"round": number, "norm": float(np.linalg.norm(weights)), "epsilon": float("inf")})
            grid.recorder.commit(Checkpoint(number, ArrayRecord({"w": Array(weights)}), metrics=tuple(metrics)))
        return f"{context.state.config_records['server']['rounds']} rounds"

    return main


def test_same_seed_same_bits_at_any_thread_count() -> None:
    results = [run_simulation(rounds(3), client(training), 11, seed=4, threads=threads) for threads in (1, 2, 7)]
    assert len({result.arrays["w"].digest for result in results}) == 1
    assert all(result.rounds == results[0].rounds for result in results)
    other = run_simulation(rounds(3), client(training), 11, seed=5)
    assert other.arrays != results[0].arrays


def test_what_main_returns_and_commits_is_the_result() -> None:
    result = run_simulation(rounds(2), client(training), 3, seed=1)
    assert (result.status, result.result, len(result.rounds), result.run_dir) == ("completed", "2 rounds", 2, None)
    assert result.metrics == result.rounds
    assert result.traffic.messages_down == result.traffic.messages_up == 6
    assert result.traffic.bytes_up == 6 * 7 * 8


def test_nodes_get_their_partition_settings_and_seed() -> None:
    seen: dict[int, tuple[dict[str, object], dict[str, object], int | None]] = {}

    def handler(message: Message, context: Context) -> Message:
        seen[context.node_id] = (dict(context.node_config), dict(context.run_config), context.seed)
        context.run_config.clear()
        context.node_config.clear()
        return echo(message, context)

    def main(grid: Grid, context: Context) -> None:
        assert list(grid.get_node_ids()) == [1, 2, 3]
        assert (context.node_id, context.run_config, context.seed) == (0, {"lr": 0.5}, 9)
        for _ in range(2):
            grid.send_and_receive(questions(grid), timeout=60)

    options = {"run_config": {"lr": 0.5}, "node_config": lambda partition: {"path": f"p{partition}"}, "seed": 9}
    run_simulation(main, client(handler), 3, **options)
    for node in (1, 2, 3):
        config = {"partition-id": node - 1, "num-partitions": 3, "path": f"p{node - 1}"}
        assert seen[node] == (config, {"lr": 0.5}, 9)


def test_a_handler_that_raises_changes_neither_state_nor_message() -> None:
    def handler(message: Message, context: Context) -> Message:
        record = context.state.config_records.get("n", ConfigRecord({"count": 0}))
        record["count"] = int(str(record["count"])) + 1
        context.state["n"] = record
        context.mod_state("m")["n"] = ConfigRecord({"count": record["count"]})
        round_number = message.content.config_records["config"]["round"]
        message.content.clear()
        if round_number == 2:
            raise ValueError("a secret")
        metrics = MetricRecord({"count": int(str(record["count"])), "mods": len(context.mod_states["m"])})
        return Message(RecordDict({"m": metrics}), reply_to=message)

    def main(grid: Grid, context: Context) -> list[list[object]]:
        counts = []
        for number in (1, 2, 3):
            sent = questions(grid, number)
            replies = list(grid.stream(sent, timeout=60, ordered=True))
            assert all(message.content for message in sent)
            if number == 2:
                assert {(one.error.code, one.error.reason) for one in replies} == {
                    (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "ValueError")
                }
            else:
                counts.append([one.content.metric_records["m"]["count"] for one in replies])
        return counts

    result = run_simulation(main, client(handler), 3)
    assert result.result == [[1, 1, 1], [2, 2, 2]]
    failures = [fields for event, fields in result.events if event == "client-error"]
    assert len(failures) == 3
    assert all("a secret" in str(fields["traceback"]) for fields in failures)


def test_a_reply_and_the_state_do_not_share_records() -> None:
    def handler(message: Message, context: Context) -> Message:
        record = context.state.config_records.get("r", ConfigRecord({"k": 0}))
        context.state["r"] = record
        return Message(RecordDict({"r": record}), reply_to=message)

    def main(grid: Grid, context: Context) -> object:
        for _ in range(2):
            (reply,) = grid.send_and_receive(questions(grid), timeout=60)
            found = reply.content.config_records["r"]["k"]
            reply.content.config_records["r"]["k"] = 99
        return found

    assert run_simulation(main, client(handler), 1).result == 0


@pytest.mark.parametrize("raised", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_whatever_a_handler_raises_is_an_error_reply_and_the_worker_goes_on(raised: type[BaseException]) -> None:
    def handler(message: Message, context: Context) -> Message:
        if context.node_id == 1:
            raise raised
        return echo(message, context)

    def main(grid: Grid, context: Context) -> list[bool]:
        return [one.has_error() for one in grid.stream(questions(grid), timeout=60, ordered=True)]

    assert run_simulation(main, client(handler), 3, threads=1).result == [True, False, False]


@pytest.mark.parametrize("bad", ["not a message", "an instruction", "another reply"])
def test_a_handler_must_answer_its_message(bad: str) -> None:
    def handler(message: Message, context: Context) -> Message:
        if bad == "not a message":
            return "text"  # type: ignore[return-value]  # the mistake under test
        question = Message(RecordDict(), 7, "train")
        return question if bad == "an instruction" else Message(RecordDict(), reply_to=question)

    with pytest.raises(RunFailed, match="no node gave a valid reply"):
        run_simulation(lambda grid, context: grid.send_and_receive(questions(grid), timeout=60), client(handler), 2)


def test_a_run_whose_nodes_all_fail_fails_with_their_causes() -> None:
    def handler(message: Message, context: Context) -> Message:
        raise ZeroDivisionError

    with pytest.raises(RunFailed, match="no node gave a valid reply: 4 x error 2 \\(ZeroDivisionError\\)"):
        run_simulation(lambda grid, context: grid.send_and_receive(questions(grid), timeout=60), client(handler), 4)


def test_a_main_that_raises_fails_the_run_and_a_run_failure_is_passed_on() -> None:
    def broken(grid: Grid, context: Context) -> None:
        raise LookupError("nothing there")

    with pytest.raises(RunFailed, match="the ServerApp raised LookupError: nothing there"):
        run_simulation(broken, client(echo), 2)

    def failing(grid: Grid, context: Context) -> None:
        raise RunFailed("round 3: no quorum")

    with pytest.raises(RunFailed, match=r"^round 3: no quorum$"):
        run_simulation(failing, client(echo), 2)


def test_messages_to_nobody_and_messages_too_late_are_answered_with_errors() -> None:
    def handler(message: Message, context: Context) -> Message:
        if context.node_id == 1:
            time.sleep(0.4)
        return echo(message, context)

    def main(grid: Grid, context: Context) -> list[int]:
        ask = RecordDict({"config": ConfigRecord({"round": 1})})
        sent = [Message(ask, 1, "train", ttl=0.1), Message(ask, 2, "train"), Message(ask, 77, "train")]
        replies = list(grid.stream(sent, timeout=60, ordered=True))
        return [one.error.code if one.has_error() else -1 for one in replies]

    started = time.monotonic()
    result = run_simulation(main, client(handler), 2, threads=2)
    assert result.result == [ErrorCode.MESSAGE_UNAVAILABLE, -1, ErrorCode.NODE_UNAVAILABLE]
    assert time.monotonic() - started < 5


def test_a_stream_gives_up_at_its_deadline_and_withdraws_what_is_out() -> None:
    release = threading.Event()

    def handler(message: Message, context: Context) -> Message:
        if context.node_id == 1 and message.content.config_records["config"]["round"] == 1:
            release.wait(30)
            context.state["late"] = ConfigRecord({"k": 1})
        return Message(RecordDict({"m": MetricRecord({"late": int("late" in context.state)})}), reply_to=message)

    def main(grid: Grid, context: Context) -> tuple[int, list[object]]:
        first = list(grid.stream(questions(grid, 1), timeout=0.3))
        release.set()
        second = list(grid.stream(questions(grid, 2), timeout=60, ordered=True))
        return len(first), [one.content.metric_records["m"]["late"] for one in second]

    assert run_simulation(main, client(handler), 3, threads=3).result == (2, [0, 0, 0])


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 12), st.integers(1, 14) | st.none(), st.booleans())
def test_a_window_bounds_what_is_out_and_loses_nothing(nodes: int, window: int | None, ordered: bool) -> None:
    out = most = 0
    lock = threading.Lock()

    def counted(grid: Grid) -> object:
        nonlocal out, most
        for message in questions(grid):
            with lock:
                out += 1
                most = max(most, out)
            yield message

    def main(grid: Grid, context: Context) -> list[int]:
        nonlocal out
        found = []
        for reply in grid.stream(counted(grid), timeout=60, window=window, ordered=ordered):
            with lock:
                out -= 1
            found.append(reply.metadata.src_node_id)
        return found

    found = run_simulation(main, client(echo), nodes).result
    assert sorted(found) == list(range(1, nodes + 1))
    if ordered:
        assert found == sorted(found)
    if window is not None:
        assert most <= window


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"num_nodes": 0}, "num_nodes"),
        ({"num_nodes": True}, "num_nodes"),
        ({"engine": "magic"}, "'threads'"),
        ({"threads": 0}, "threads"),
        ({"seed": 1.5}, "seed"),
        ({"resume": True}, "run_dir"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], why: str) -> None:
    given_options = {"num_nodes": 2, **options}
    with pytest.raises(ValueError, match=why):
        run_simulation(rounds(1), client(echo), **given_options)


def test_a_broken_runtime_fails_the_run_instead_of_hanging(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(simulation, "execute", broken)
    with pytest.raises(RunFailed, match="a worker broke: OSError: disk full"):
        run_simulation(lambda grid, context: grid.send_and_receive(questions(grid), timeout=60), client(echo), 2)


def test_workers_end_with_the_run() -> None:
    run_simulation(rounds(1), client(training), 4, threads=4)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("privfed-worker")]


def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole = run_simulation(rounds(5), client(training), 6, seed=2)
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_simulation(rounds(5, stop_before=4), client(training), 6, seed=2, run_dir=folder)
    status = RunFolder.open(folder).status
    assert (status.state, status.reason, status.round) == ("stopped", "interrupted", 3)
    resumed = run_simulation(rounds(5), client(training), 6, seed=2, run_dir=folder, resume=True)
    assert resumed.arrays == whole.arrays
    assert resumed.rounds == whole.rounds
    assert resumed.result == whole.result
    assert RunFolder.open(folder).status.state == "completed"
    with pytest.raises(RunFolderError, match="is completed"):
        run_simulation(rounds(5), client(training), 6, seed=2, run_dir=folder, resume=True)
    with pytest.raises(ValueError, match="seed 2, not 3"):
        run_simulation(rounds(5), client(training), 6, seed=3, run_dir=folder, resume=True)


def test_a_stop_request_is_honoured_at_the_next_commit(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", {})
    inner = rounds(5)

    def main(grid: Grid, context: Context) -> object:
        folder.request_stop()
        return inner(grid, context)

    result = run_simulation(main, client(training), 2, seed=1, run_dir=folder)
    assert (result.status, len(result.rounds)) == ("stopped", 1)
    assert folder.status.state == "stopped"


def adding(message: Message, context: Context) -> Message:
    weights = message.content.array_records["arrays"]["w"].view()
    new = Array.adopt(weights + np.float32(context.node_id))
    return Message(RecordDict({"arrays": ArrayRecord({"w": new})}), reply_to=message)


def model_questions(grid: Grid, size: int) -> Iterator[Message]:
    content = RecordDict({"arrays": ArrayRecord({"w": Array(np.zeros(size, np.float32))})})
    return (Message(content, node, "train") for node in grid.get_node_ids())


def test_nothing_is_hashed_or_serialised_inside_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("hashed or serialised")

    monkeypatch.setattr(Array, "digest", property(refuse))
    monkeypatch.setattr(wire, "encode", refuse)
    monkeypatch.setattr(wire, "loads", refuse)
    sent: list[Array] = []
    got: list[Array] = []

    def handler(message: Message, context: Context) -> Message:
        got.append(message.content.array_records["arrays"]["w"])
        return adding(message, context)

    def main(grid: Grid, context: Context) -> int:
        messages = list(model_questions(grid, 10))
        sent.extend(message.content.array_records["arrays"]["w"] for message in messages)
        return sum(reply.has_content() for reply in grid.stream(messages, timeout=60))

    assert run_simulation(main, client(handler), 3).result == 3
    assert {id(array) for array in got} == {id(array) for array in sent}


def test_a_windowed_stream_needs_memory_for_its_window_not_for_all_nodes() -> None:
    size, window = 1 << 18, 4

    def main(grid: Grid, context: Context) -> int:
        total = np.zeros(size)
        tracemalloc.start()
        for reply in grid.stream(model_questions(grid, size), timeout=60, window=window):
            total += reply.content.array_records["arrays"]["w"].view()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert total[0] == sum(range(1, 101))
        return peak

    # The model, the window, and one reply that is being folded or made on each side; 100 replies would be 100 MiB.
    assert run_simulation(main, client(adding), 100, threads=2).result < (1 + window + 4) * 4 * size


def test_events_reach_the_listener() -> None:
    heard: list[tuple[str, object]] = []

    def main(grid: Grid, context: Context) -> None:
        grid.recorder.report("round-start", round=1)
        raise RunStopped("enough")

    result = run_simulation(main, client(echo), 1, on_event=lambda name, fields: heard.append((name, fields["round"])))
    assert heard == [("round-start", 1)]
    assert result.status == "stopped"


def test_server_mods_see_every_exchange() -> None:
    seen: list[str] = []

    def mod(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        reply = call_next(message, context)
        seen.append(message.metadata.message_type)
        return reply

    app = ServerApp(mods=[mod])

    @app.main()
    def main(grid: Grid, context: Context) -> int:
        return len(grid.send_and_receive(questions(grid), timeout=60))

    assert run_simulation(app, client(echo), 5).result == 5
    assert seen == ["train"] * 5
