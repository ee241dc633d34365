"""Clipping bounds the joint norm of what leaves, for every dtype, and changes nothing else."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed import mods
from privfed.array import Array
from privfed.context import Context
from privfed.message import Error, ErrorCode, Message
from privfed.record import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from privfed.update import PLAN, UPDATE, flatten, norm, subtract

DTYPES = ["float16", "float32", "float64", "bfloat16", "int8", "uint8", "int32", "int64", "uint64"]
SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (7,), (2, 3)]


def array_of(dtype: str, values: np.ndarray) -> Array:
    if dtype == "bfloat16":
        return Array.from_float32_as_bfloat16(values.astype(np.float32))
    return Array(values.astype(dtype))


@st.composite
def records(draw: st.DrawFn) -> tuple[ArrayRecord, ArrayRecord]:
    """A model and a reply that fits it."""
    old, new = ArrayRecord(), ArrayRecord()
    for index in range(draw(st.integers(1, 4))):
        dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(SHAPES))
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        scale = draw(st.sampled_from([0.0, 1.0, 100.0]))
        for record in (old, new):
            record[str(index)] = array_of(
                dtype, np.rint(rng.uniform(0, 100, shape)) if "int" in dtype else rng.normal(0, scale, shape)
            )
    return old, new


def ask(
    mod: Any, received: ArrayRecord, reply: ArrayRecord, kind: str = "train", plan: float | None = None, **more: Any
) -> Message:
    content = RecordDict({"arrays": received})
    if plan is not None:
        content[PLAN] = ConfigRecord({"clip": plan})
    request = Message(content, 1, kind)
    answer = RecordDict({"arrays": reply, "metrics": MetricRecord({"num-examples": 3}), **more})
    return mod(request, Context(node_id=1), lambda message, context: Message(answer, reply_to=message))


@given(records(), st.floats(1e-3, 1e3))
@settings(max_examples=150, deadline=None)
def test_the_norm_of_what_leaves_is_at_most_the_bound(pair: tuple[ArrayRecord, ArrayRecord], bound: float) -> None:
    received, reply = pair
    before = subtract(reply, received)
    answer = ask(mods.clip(bound), received, reply).content
    after = answer.array_records["arrays"]
    assert UPDATE in answer
    assert norm(after) <= bound
    assert np.linalg.norm(flatten(after)) <= bound * (1 + 1e-12)
    assert list(after) == list(received)
    assert [array.shape for array in after.values()] == [array.shape for array in received.values()]
    assert answer["metrics"] == MetricRecord({"num-examples": 3})
    if norm(before) <= bound:
        assert after == before
    else:  # the direction is kept, but for rounding
        scale = bound / norm(before)
        coarse = max(
            {"float16": 8e-3, "bfloat16": 6e-2, "float32": 1e-6}.get(one.dtype, 1e-12) for one in after.values()
        )
        for name, array in after.items():
            slack = 1.0 if array.dtype == "int64" else 1e-7 * (array.dtype == "float16")
            wanted = before[name].compute().astype(np.float64) * scale
            assert np.all(np.abs(array.compute() - wanted) <= coarse * np.abs(wanted) + slack)


def test_zero_dimensional_arrays_count_and_are_clipped() -> None:
    received = ArrayRecord([np.array(0.0), np.zeros(2)])
    after = ask(mods.clip(1.0), received, ArrayRecord([np.array(1000.0), np.array([3.0, 4.0])])).content["arrays"]
    assert isinstance(after, ArrayRecord)
    assert after["0"].shape == ()
    assert float(after["0"].view()) == pytest.approx(1, abs=1e-4)
    assert norm(after) <= 1.0


def test_a_zero_update_and_a_short_one_are_left_alone() -> None:
    received = ArrayRecord([np.full(9, 0.5)])
    assert ask(mods.clip(1.0), received, received).content["arrays"] == ArrayRecord([np.zeros(9)])
    assert ask(mods.clip(4.0), received, ArrayRecord([np.zeros(9)])).content["arrays"] == ArrayRecord(
        [np.full(9, -0.5)]
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_nan_and_infinity_are_refused(value: float, dtype: str) -> None:
    received = ArrayRecord({"a": array_of(dtype, np.zeros(3))})
    reply = ArrayRecord({"a": array_of(dtype, np.array([0.0, value, 1.0]))})
    answer = ask(mods.clip(1.0), received, reply)
    assert answer.error == Error(ErrorCode.MOD_FAILED_PRECONDITION, "UpdateError")


def test_huge_and_tiny_values_keep_a_true_norm() -> None:
    received = ArrayRecord([np.zeros(2)])
    for size in (1e300, 1e200, 1e-200, 1e-300):
        after = ask(mods.clip(size), received, ArrayRecord([np.array([3 * size, 4 * size])])).content["arrays"]
        assert isinstance(after, ArrayRecord)
        np.testing.assert_allclose(after["0"].view(), [0.6 * size, 0.8 * size], rtol=1e-12)


@pytest.mark.parametrize(
    "reply",
    [
        ArrayRecord([np.zeros(3)]),
        ArrayRecord([np.zeros(2, np.float32)]),
        ArrayRecord({"b": Array(np.zeros(2))}),
        ArrayRecord(),
    ],
)
def test_a_reply_that_does_not_fit_the_model_is_refused(reply: ArrayRecord) -> None:
    assert ask(mods.clip(1.0), ArrayRecord([np.zeros(2)]), reply).has_error()


def test_bool_has_no_difference() -> None:
    assert ask(mods.clip(1.0), ArrayRecord([np.zeros(2, bool)]), ArrayRecord([np.ones(2, bool)])).has_error()


def test_unsigned_and_extreme_integers() -> None:
    received = ArrayRecord([np.array([5, 250], np.uint8)])
    after = ask(mods.clip(1e6), received, ArrayRecord([np.array([250, 5], np.uint8)])).content["arrays"]
    assert after == ArrayRecord([np.array([245, -245], np.int64)])
    top = ArrayRecord([np.array([2**63], np.uint64)])
    assert ask(mods.clip(1.0), ArrayRecord([np.array([0], np.uint64)]), top).has_error()
    low, high = ArrayRecord([np.array([-(2**63)])]), ArrayRecord([np.array([2**63 - 1])])
    assert ask(mods.clip(1.0), low, high).has_error()


def test_the_plan_bounds_as_well() -> None:
    received, reply = ArrayRecord([np.zeros(4)]), ArrayRecord([np.full(4, 10.0)])
    for bound, plan, expected in [(None, 2.0, 2.0), (1.0, 2.0, 1.0), (3.0, 2.0, 2.0)]:
        after = ask(mods.clip(bound), received, reply, plan=plan).content["arrays"]
        assert isinstance(after, ArrayRecord)
        assert norm(after) == pytest.approx(expected)
    assert ask(mods.clip(), received, reply).has_error()
    assert ask(mods.clip(1.0), received, reply, plan=math.nan).has_error()


def test_clipping_twice_is_clipping_to_the_smaller_bound() -> None:
    received, reply = ArrayRecord([np.zeros(4)]), ArrayRecord([np.arange(4.0)])
    once = ask(mods.clip(0.5), received, reply).content.array_records["arrays"]
    for outer, inner in [(0.5, 2.0), (2.0, 0.5)]:
        twice = ask(mods.compose(mods.clip(outer), mods.clip(inner)), received, reply).content.array_records["arrays"]
        np.testing.assert_allclose(flatten(twice), flatten(once), rtol=1e-12)


def test_other_messages_and_errors_pass() -> None:
    received = ArrayRecord([np.zeros(2)])
    evaluate = ask(mods.clip(1.0), received, ArrayRecord([np.full(2, 9.0)]), kind="evaluate")
    assert evaluate.content["arrays"] == ArrayRecord([np.full(2, 9.0)])
    request = Message(RecordDict({"arrays": received}), 1, "train")
    failed = Message(Error(2, "KeyError"), reply_to=request)
    assert mods.clip(1.0)(request, Context(), lambda m, c: failed) is failed
    action = ask(mods.clip(1.0), received, ArrayRecord([np.full(2, 9.0)]), kind="train.warm_up")
    assert norm(action.content.array_records["arrays"]) <= 1.0


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf])
def test_a_bound_must_be_finite_and_positive(bound: float) -> None:
    with pytest.raises(ValueError, match="max_norm"):
        mods.clip(bound)


def test_message_size_changes_nothing_and_notes_both_ways(caplog: pytest.LogCaptureFixture) -> None:
    received, reply = ArrayRecord([np.zeros(2)]), ArrayRecord([np.ones(2)])
    with caplog.at_level("INFO", logger="privfed.mods"):
        answer = ask(mods.message_size(), received, reply)
    assert answer.content["arrays"] == reply
    assert [record.getMessage() for record in caplog.records] == [
        "node 1 received train: 23 bytes, 17 of them arrays",
        "node 1 replies train: 50 bytes, 17 of them arrays",
    ]
