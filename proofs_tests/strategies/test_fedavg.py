"""FedAvg over a plain stage: the exact mean, whoever misbehaves, in whatever order, at O(model) memory."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from privfed.apps import ClientApp
from privfed.array import Array
from privfed.context import Context
from privfed.errors import QuorumError, RunFailed
from privfed.grid import Checkpoint, LocalGrid, MemoryRecorder
from privfed.message import Message
from privfed.record import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from privfed.strategies import FedAvg
from privfed.strategies.cohort import cohort_size

Reply = Callable[[Message, int], RecordDict]


def app_of(reply: Reply) -> ClientApp:
    """Answer train and evaluate with `reply(message, node)`."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(reply(message, context.node_id), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return Message(reply(message, context.node_id), reply_to=message)

    return app


def content(arrays: ArrayRecord, weight: float = 1, **metrics: float) -> RecordDict:
    return RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": weight, **metrics})})


def run(reply: Reply, nodes: int, initial: ArrayRecord, rounds: int = 1, **arguments: Any) -> tuple[Any, LocalGrid]:
    grid = LocalGrid(app_of(reply), nodes, seed=7)
    arguments.setdefault("fraction_evaluate", 0.0)
    return FedAvg(**arguments).start(grid, initial, num_rounds=rounds), grid


FLOATS = hnp.arrays(np.float64, (3, 4), elements=st.floats(-1e6, 1e6))
WEIGHTS = st.integers(1, 10**6)


@given(st.lists(st.tuples(FLOATS, WEIGHTS), min_size=2, max_size=6), FLOATS)
@settings(max_examples=40, deadline=None)
def test_mean_is_numpys_weighted_average(replies: list[tuple[np.ndarray, int]], start: np.ndarray) -> None:
    result, _ = run(
        lambda m, node: content(ArrayRecord([replies[node - 1][0]]), replies[node - 1][1]),
        len(replies),
        ArrayRecord([start]),
    )
    expected = np.average([x for x, _ in replies], axis=0, weights=[w for _, w in replies])
    np.testing.assert_allclose(result.arrays.to_numpy_ndarrays()[0], expected, rtol=1e-12, atol=1e-8)


@pytest.mark.parametrize(
    "dtype", ["float16", "float32", "float64", "bfloat16", "int8", "uint8", "int32", "int64", "uint64"]
)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (5,), (2, 3)])
def test_every_dtype_and_shape_keeps_dtype_and_shape(dtype: str, shape: tuple[int, ...]) -> None:
    def make(value: float) -> Array:
        full = np.full(shape, value, np.float32)
        return Array.from_float32_as_bfloat16(full) if dtype == "bfloat16" else Array(full.astype(dtype))

    model = ArrayRecord({"a": make(1), "b": Array(np.ones(2, np.float32))})
    result, _ = run(
        lambda m, node: content(ArrayRecord({"a": make(2 * node), "b": Array(np.ones(2, np.float32))})), 3, model
    )
    assert result.arrays["a"] == make(4)  # the mean of 2, 4, 6


def test_integer_means_are_rounded() -> None:
    result, _ = run(
        lambda m, node: content(ArrayRecord([np.array([node, 10], np.int32)])), 4, ArrayRecord([np.zeros(2, np.int32)])
    )
    assert result.arrays["0"] == Array(np.array([2, 10], np.int32))  # 2.5 rounds to even


def bad_replies() -> Iterator[tuple[str, Callable[[RecordDict], RecordDict | None], str]]:
    def arrays(value: Any) -> Callable[[RecordDict], RecordDict]:
        return lambda good: RecordDict({"arrays": ArrayRecord(value), "metrics": good["metrics"]})

    def weight(value: Any) -> Callable[[RecordDict], RecordDict]:
        return lambda good: RecordDict({"arrays": good["arrays"], "metrics": MetricRecord({"num-examples": value})})

    yield "exception", lambda good: None, "CLIENT_APP_RAISED_EXCEPTION ZeroDivisionError"
    yield "nan", arrays([np.array([1.0, math.nan])]), "NaN or infinity"
    yield "inf", arrays([np.array([1.0, -math.inf])]), "NaN or infinity"
    yield "shape", arrays([np.zeros(3)]), "shape"
    yield "broadcastable shape", arrays([np.zeros(1)]), "shape"
    yield "dtype", arrays([np.zeros(2, np.float32)]), "dtype"
    yield "keys", arrays({"other": Array(np.zeros(2))}), "keys differ"
    yield "extra key", arrays([np.zeros(2), np.zeros(2)]), "keys differ"
    yield "negative weight", weight(-4), "weight 'num-examples' is -4"
    yield "nan weight", weight(math.nan), "weight 'num-examples' is nan"
    yield "infinite weight", weight(math.inf), "weight 'num-examples' is inf"
    yield "absurd weight", weight(1e300), "not in [0, 2^53]"
    yield "list weight", weight([1, 2]), "is missing"
    yield "missing weight", lambda good: RecordDict({"arrays": good["arrays"]}), "is missing"
    yield "missing arrays", lambda good: RecordDict({"metrics": good["metrics"]}), "0 ArrayRecords"
    yield (
        "nan metric",
        lambda good: RecordDict({**good, "m": MetricRecord({"loss": math.nan})}),
        "metric 'loss' is not finite",
    )


BAD = list(bad_replies())


@pytest.mark.parametrize(("spoil", "cause"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_bad_reply_is_excluded_with_node_cause_and_count(
    spoil: Callable[[RecordDict], RecordDict | None], cause: str
) -> None:
    def reply(message: Message, node: int) -> RecordDict:
        good = content(ArrayRecord([np.full(2, float(node))]))
        made = spoil(good) if node == 2 else good
        if made is None:
            raise ZeroDivisionError("a secret of this client")
        return made

    result, grid = run(reply, 4, ArrayRecord([np.zeros(2)]))
    np.testing.assert_array_equal(result.arrays.to_numpy_ndarrays()[0], [8 / 3, 8 / 3])
    (excluded,) = result.rounds[0]["train-replies"]["excluded"]
    assert excluded["node"] == 2
    assert cause in excluded["cause"]
    assert "secret" not in excluded["cause"]
    assert result.rounds[0]["train-replies"]["valid"] == 3
    events = [fields for name, fields in grid.recorder.events if name == "excluded"]
    assert [event["node"] for event in events] == [2]


def test_below_quorum_the_round_fails_and_the_model_is_unchanged() -> None:
    def reply(message: Message, node: int) -> RecordDict:
        if message.content["config"]["server-round"] == 2 and node != 1:
            raise ValueError
        return content(ArrayRecord([np.full(2, float(node))]))

    recorder = MemoryRecorder()
    grid = LocalGrid(app_of(reply), 4, recorder=recorder)
    with pytest.raises(
        QuorumError, match=r"1 valid replies, 2 are needed.*train round 2.*3 x CLIENT_APP_RAISED.*ValueError"
    ):
        FedAvg(fraction_evaluate=0).start(grid, ArrayRecord([np.zeros(2)]), num_rounds=3)
    assert recorder.checkpoint is not None
    assert recorder.checkpoint.round == 1
    assert recorder.checkpoint.arrays == ArrayRecord([np.full(2, 2.5)])


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_all_clients_failing_fails_the_run(kind: str) -> None:
    def reply(message: Message, node: int) -> RecordDict:
        if message.metadata.message_type == kind:
            raise KeyError
        return content(ArrayRecord([np.zeros(1)]))

    with pytest.raises(RunFailed, match=f"{kind} round 1.*KeyError"):
        run(reply, 3, ArrayRecord([np.zeros(1)]), fraction_evaluate=1.0)


def test_without_an_evaluate_handler_the_error_says_what_to_do() -> None:
    app = ClientApp()
    app.train()(lambda message, context: Message(content(ArrayRecord([np.zeros(1)])), reply_to=message))
    with pytest.raises(QuorumError, match="fraction_evaluate=0"):
        FedAvg().start(LocalGrid(app, 3), ArrayRecord([np.zeros(1)]))


def test_weights_that_sum_to_zero_fail_the_round() -> None:
    with pytest.raises(QuorumError, match="all weights are 0"):
        run(lambda m, node: content(ArrayRecord([np.ones(1)]), 0), 3, ArrayRecord([np.zeros(1)]))


def test_waiting_for_nodes_has_a_deadline() -> None:
    grid = LocalGrid(app_of(lambda m, node: content(ArrayRecord([np.zeros(1)]))), 1)
    with pytest.raises(RunFailed, match="1 nodes are connected, min_available_nodes=2"):
        FedAvg().start(grid, ArrayRecord([np.zeros(1)]), timeout=0.05)


class SilentGrid(LocalGrid):
    """Node 2 never answers."""

    def push_messages(self, messages: Any) -> list[str]:
        batch = list(messages)
        super().push_messages(m for m in batch if m.metadata.dst_node_id != 2)
        return [m.metadata.message_id for m in batch]

    def wait(self, message_ids: Any, timeout: float | None) -> bool:
        assert timeout is not None, "every wait has a deadline"
        return super().wait(message_ids, timeout)


def test_a_node_that_never_answers_is_excluded() -> None:
    grid = SilentGrid(app_of(lambda m, node: content(ArrayRecord([np.full(1, float(node))]))), 3)
    result = FedAvg(fraction_evaluate=0).start(grid, ArrayRecord([np.zeros(1)]), num_rounds=1, timeout=5)
    assert result.rounds[0]["train-replies"]["excluded"] == [{"node": 2, "cause": "no reply before the deadline"}]
    assert result.arrays == ArrayRecord([np.full(1, 2.0)])


class ForgingGrid(LocalGrid):
    """Every reply says it is from node 1."""

    def pull_messages(self, message_ids: Any) -> list[Message]:
        return [message.with_metadata(src_node_id=1) for message in super().pull_messages(message_ids)]


def test_a_reply_counts_for_the_node_that_was_asked() -> None:
    def reply(message: Message, node: int) -> RecordDict:
        return content(ArrayRecord([np.full(1, math.nan if node == 3 else float(node))]))

    grid = ForgingGrid(app_of(reply), 4)
    result = FedAvg(fraction_evaluate=0).start(grid, ArrayRecord([np.zeros(1)]), num_rounds=1)
    assert [one["node"] for one in result.rounds[0]["train-replies"]["excluded"]] == [3]


@pytest.mark.parametrize("value", [1e308, -1e308])
def test_a_sum_out_of_range_fails_the_round_and_says_so(value: float) -> None:
    with pytest.raises(RunFailed, match=r"round 1.*leaves the range of float64"):
        run(lambda m, node: content(ArrayRecord([np.full(1, value)]), 100), 3, ArrayRecord([np.zeros(1)]))


class ShuffledGrid(LocalGrid):
    """Replies arrive one at a time, in an order of its own."""

    def __init__(self, *arguments: Any, order: int) -> None:
        super().__init__(*arguments)
        self._order = np.random.default_rng(order)

    def pull_messages(self, message_ids: Any) -> list[Message]:
        ids = [one for one in message_ids if one in self._replies]
        return super().pull_messages([ids[self._order.integers(len(ids))]]) if ids else []


def test_the_result_does_not_depend_on_arrival() -> None:
    values = np.random.default_rng(1).normal(size=(30, 50)).astype(np.float32) * 10.0 ** np.arange(30)[:, None]
    app = app_of(lambda m, node: content(ArrayRecord([values[node - 1].astype(np.float32)]), node))
    results = {
        FedAvg(fraction_evaluate=0)
        .start(ShuffledGrid(app, 30, order=order), ArrayRecord([np.zeros(50, np.float32)]), num_rounds=2)
        .arrays["0"]
        .digest
        for order in range(5)
    }
    assert len(results) == 1


def test_resume_continues_bit_identically() -> None:
    def reply(message: Message, node: int) -> RecordDict:
        (weights,) = message.content["arrays"].to_numpy_ndarrays()
        return content(ArrayRecord([weights + np.float32(node) / 7]), node, loss=float(weights[0]))

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        return MetricRecord({"first": float(arrays.to_numpy_ndarrays()[0][0])})

    def start(recorder: MemoryRecorder, rounds: int) -> Any:
        grid = LocalGrid(app_of(reply), 9, recorder=recorder, seed=3)
        strategy = FedAvg(fraction_train=0.4, fraction_evaluate=0.4)
        return strategy.start(grid, ArrayRecord([np.ones(4, np.float32)]), rounds, evaluate_fn=evaluate)

    whole = start(MemoryRecorder(), 6)
    first = MemoryRecorder()
    start(first, 2)
    resumed = start(MemoryRecorder(first.checkpoint), 6)
    assert resumed == whole
    assert resumed.arrays["0"].digest == whole.arrays["0"].digest
    assert set(whole.evaluate_metrics_serverapp) == set(range(7))


def test_each_start_of_a_run_begins_anew_and_only_the_one_that_was_cut_off_resumes() -> None:
    app = app_of(lambda m, node: content(m.content.array_records["arrays"].map(lambda x: x + 1.0)))
    grid = LocalGrid(app, 2)
    recorder = grid.recorder
    assert isinstance(recorder, MemoryRecorder)
    for start in (5.0, 7.0):
        result = FedAvg(fraction_evaluate=0).start(grid, ArrayRecord([np.full(1, start)]), 2)
        assert result.arrays == ArrayRecord([np.full(1, start + 2)])
    again = LocalGrid(app, 2, recorder=MemoryRecorder(recorder.checkpoint))
    with pytest.raises(RunFailed, match="cut off in start 2"):
        FedAvg(fraction_evaluate=0).start(again, ArrayRecord([np.full(1, 5.0)]), 2)


def test_a_finished_run_is_returned_as_it_was() -> None:
    checkpoint = Checkpoint(3, ArrayRecord([np.full(1, 5.0)]))
    grid = LocalGrid(
        app_of(lambda m, node: content(ArrayRecord([np.zeros(1)]))), 2, recorder=MemoryRecorder(checkpoint)
    )
    assert FedAvg().start(grid, ArrayRecord([np.zeros(1)]), num_rounds=3).arrays == checkpoint.arrays


def test_metrics_are_weighted_means_and_lists_go_element_by_element() -> None:
    def reply(message: Message, node: int) -> RecordDict:
        made = content(ArrayRecord([np.zeros(1)]), node, loss=float(node))
        made["more"] = MetricRecord({"confusion": [node, 0], **({"rare": 5.0} if node == 3 else {})})
        return made

    result, _ = run(reply, 3, ArrayRecord([np.zeros(1)]))
    metrics = result.train_metrics_clientapp[1]
    assert metrics["loss"] == pytest.approx((1 + 4 + 9) / 6)
    assert metrics["confusion"] == pytest.approx([14 / 6, 0])
    assert metrics["rare"] == 5.0
    assert "num-examples" not in metrics


def test_metric_functions_and_configurations_are_used() -> None:
    seen: list[Any] = []

    def reply(message: Message, node: int) -> RecordDict:
        seen.append((message.metadata.message_type, dict(message.content["settings"])))
        return RecordDict({"weights": ArrayRecord([np.ones(1)]), "m": MetricRecord({"n": 1})})

    strategy = FedAvg(
        weighted_by_key="n",
        arrayrecord_key="weights",
        configrecord_key="settings",
        train_metrics_aggr_fn=lambda contents, key: MetricRecord({key: len(contents)}),
    )
    grid = LocalGrid(app_of(reply), 2)
    result = strategy.start(
        grid, ArrayRecord([np.zeros(1)]), 1, 60, ConfigRecord({"lr": 0.1}), ConfigRecord({"batch": 8})
    )
    assert result.train_metrics_clientapp == {1: MetricRecord({"n": 2})}
    assert seen[0] == ("train", {"lr": 0.1, "server-round": 1})
    assert seen[-1] == ("evaluate", {"batch": 8, "server-round": 1})


@pytest.mark.parametrize(
    ("available", "fraction", "least", "expected"),
    [
        (20, 1.0, 2, 20),
        (19, 1.0, 2, 19),
        (10, 1.0, 2, 10),
        (9, 1.0, 2, 9),
        (40, 0.05, 2, 2),
        (39, 0.05, 2, 2),
        (20, 0.05, 2, 2),
        (3, 0.5, 5, 3),
    ],
)
def test_cohort_size(available: int, fraction: float, least: int, expected: int) -> None:
    assert cohort_size(available, fraction, least) == expected


def test_cohorts_follow_the_seed_and_change_with_the_round() -> None:
    def cohorts(seed: int) -> list[tuple[int, int]]:
        seen: list[tuple[int, int]] = []

        def reply(message: Message, node: int) -> RecordDict:
            seen.append((message.content["config"]["server-round"], node))
            return content(ArrayRecord([np.zeros(1)]))

        grid = LocalGrid(app_of(reply), 40, seed=seed)
        FedAvg(fraction_train=0.2, fraction_evaluate=0).start(grid, ArrayRecord([np.zeros(1)]), 3)
        return seen

    first = cohorts(1)
    assert first == cohorts(1)
    assert first != cohorts(2)
    assert len({tuple(node for r, node in first if r == n) for n in (1, 2, 3)}) == 3


def test_every_node_gets_the_same_content_object() -> None:
    seen = []

    def reply(message: Message, node: int) -> RecordDict:
        seen.append(message.content)
        return content(ArrayRecord([np.zeros(1)]))

    run(reply, 5, ArrayRecord([np.zeros(1)]))
    assert len({id(one) for one in seen}) == 1


def test_memory_is_of_the_model_and_not_of_the_number_of_nodes() -> None:
    model = ArrayRecord([np.zeros(1_000_000, np.float32)])
    value = np.ones(1_000_000, np.float32)

    def peak(nodes: int) -> int:
        tracemalloc.start()
        run(lambda m, node: content(ArrayRecord([value * np.float32(node)])), nodes, model)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    few, many = peak(20), peak(60)
    assert many < few + 8_000_000  # 40 more replies of 4 MB each
    assert many < 64_000_000 + 8 * 4_000_000


def test_constructor_refuses_nonsense() -> None:
    for arguments, name in [
        ({"fraction_train": 1.5}, "fraction_train"),
        ({"fraction_evaluate": -0.1}, "fraction_evaluate"),
        ({"min_train_nodes": 0}, "min_train_nodes"),
        ({"arrayrecord_key": "privfed.x"}, "arrayrecord_key"),
    ]:
        with pytest.raises(ValueError, match=name):
            FedAvg(**arguments)
    grid = LocalGrid(app_of(lambda m, node: content(ArrayRecord([np.zeros(1)]))), 2)
    with pytest.raises(ValueError, match="bool"):
        FedAvg().start(grid, ArrayRecord([np.zeros(1, bool)]))
    with pytest.raises(ValueError, match="timeout"):
        FedAvg().start(grid, ArrayRecord([np.zeros(1)]), timeout=0)
