"""Quantised and sparse updates: right on average, small, and unpacked only when they fit the model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.array import Array
from privfed.context import Context
from privfed.message import ErrorCode, Message
from privfed.mods import quantize, sparsify, unpack
from privfed.mods.packing import HOW, PACKED
from privfed.record import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from privfed.update import UPDATE, flatten

MODEL = ArrayRecord({"w": Array(np.ones((3, 5), np.float32)), "b": Array(np.zeros((), np.float32))})


def ask(model: ArrayRecord = MODEL, kind: str = "train") -> Message:
    return Message(RecordDict({"arrays": model}), 1, kind)


def answering(update: np.ndarray, model: ArrayRecord = MODEL):
    def app(message: Message, context: Context) -> Message:
        from privfed.update import split

        parts = split(update, model)
        arrays = ArrayRecord({name: array.replace(array.compute() + parts[name]) for name, array in model.items()})
        return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"loss": 1.0})}), reply_to=message)

    return app


def through(mod, update: np.ndarray, context: Context | None = None) -> Message:
    held = context or Context()
    return unpack()(ask(), held, lambda message, inner: mod(message, inner, answering(update)))


@pytest.mark.parametrize("bits", [1, 2, 3, 7, 8, 12, 16])
def test_quantised_values_are_within_a_step_and_right_on_average(bits: int) -> None:
    """Mean of 400 roundings against the value, 6 standard errors: false alarms below 16 * 2e-9 a case."""
    update = np.linspace(-1, 0.5, 16).astype(np.float32).astype(np.float64)
    replies = [flatten(through(quantize(bits), update).content.array_records["arrays"]) for _ in range(400)]
    step = 2.0 / (2**bits - 1)
    assert np.abs(np.array(replies) - update)[:, :15].max() <= step * 1.001
    error = np.abs(np.mean(replies, axis=0) - update)
    assert (error <= 6 * step / 2 / np.sqrt(400) + 1e-6).all()


@settings(max_examples=80, deadline=None)
@given(
    values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=16, max_size=16),
    share=st.floats(0.01, 1.0),
)
def test_what_sparse_updates_keep_back_is_sent_later(values: list[float], share: float) -> None:
    context, total = Context(), np.zeros(16)
    update = np.array(values)
    rounds = 40
    for _ in range(rounds):
        total += flatten(through(sparsify(share), update, context).content.array_records["arrays"])
    kept = context.mod_state("sparsify")["residual"]
    sent = flatten(MODEL)
    exact = np.float32(sent + update).astype(np.float64) - sent  # the app's weights are float32
    assert np.allclose(total + kept["values"].compute(), rounds * exact, rtol=1e-4, atol=0.05)


def test_sizes() -> None:
    update = np.linspace(-1, 1, 16)
    message = ask()
    packed = quantize(4)(message, Context(), answering(update))
    assert {name: array.shape for name, array in packed.content[PACKED].items()} == {"w": (8,), "b": (1,)}
    sparse = sparsify(0.25)(message, Context(), answering(update))
    assert sparse.content[PACKED]["indices"].shape == (4,)
    assert set(packed.content) == {"metrics", PACKED, HOW, UPDATE}
    other = quantize(4)(ask(kind="evaluate"), Context(), answering(update))
    assert PACKED not in other.content


def test_a_nan_is_not_sent() -> None:
    reply = quantize(4)(ask(), Context(), answering(np.full(16, np.nan)))
    assert reply.error.code == ErrorCode.MOD_FAILED_PRECONDITION


def _tampered(change) -> Message:
    def lie(message: Message, context: Context) -> Message:
        mod = sparsify(0.5) if change[0] == "sparse" else quantize(4)
        reply = mod(message, context, answering(np.linspace(-1, 1, 16)))
        packed, how = dict(reply.content[PACKED]), dict(reply.content[HOW])
        change[1](packed, how)
        content = RecordDict(dict(reply.content))
        content[PACKED], content[HOW] = ArrayRecord(packed), ConfigRecord(how)
        return reply.with_content(content)

    return unpack()(ask(), Context(), lie)


def _set(packed, name: str, array: np.ndarray) -> None:
    packed[name] = Array(array)


@pytest.mark.parametrize(
    "change",
    [
        ("sparse", lambda p, h: _set(p, "indices", np.array([0, 1, 2, 3, 4, 5, 6, 16], np.uint32))),
        ("sparse", lambda p, h: _set(p, "indices", np.array([0, 1, 2, 3, 3, 5, 6, 7], np.uint32))),
        ("sparse", lambda p, h: _set(p, "indices", np.array([1, 0, 2, 3, 4, 5, 6, 7], np.uint32))),
        ("sparse", lambda p, h: _set(p, "indices", np.arange(7, dtype=np.uint32))),
        ("sparse", lambda p, h: _set(p, "indices", np.arange(8, dtype=np.int64))),
        ("sparse", lambda p, h: _set(p, "values", np.full(8, np.nan, np.float32))),
        ("sparse", lambda p, h: _set(p, "values", np.full(8, np.inf, np.float32))),
        ("sparse", lambda p, h: p.pop("values")),
        ("sparse", lambda p, h: h.update(kind="other")),
        ("sparse", lambda p, h: h.update(names=["w"])),
        ("quantized", lambda p, h: h.update(bits=17)),
        ("quantized", lambda p, h: h.update(bits=0)),
        ("quantized", lambda p, h: h.update(bits=5)),
        ("quantized", lambda p, h: h.update(bits=True)),
        ("quantized", lambda p, h: h.update(scales=[1.0])),
        ("quantized", lambda p, h: h.update(scales=[float("inf"), 1.0])),
        ("quantized", lambda p, h: h.update(scales=[-1.0, 1.0])),
        ("quantized", lambda p, h: _set(p, "w", np.zeros(9, np.uint8))),
        ("quantized", lambda p, h: _set(p, "w", np.zeros(8, np.int8))),
        ("quantized", lambda p, h: p.pop("b")),
    ],
)
def test_a_reply_that_does_not_unpack_is_an_error(change) -> None:
    assert not _tampered((change[0], lambda p, h: None)).has_error()
    assert _tampered(change).error.code == ErrorCode.INVALID_REPLY


@pytest.mark.parametrize(
    "make", [lambda: quantize(0), lambda: quantize(17), lambda: sparsify(0.0), lambda: sparsify(1.5)]
)
def test_bad_arguments_are_named(make) -> None:
    with pytest.raises(ValueError, match=r"bits|share"):
        make()
