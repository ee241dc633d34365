"""The layout of a masked vector: exact to its bound, never a wrap, bound to everything a node is told."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.array import Array
from privfed.record import ArrayRecord, ConfigRecord, RecordDict
from privfed.ring import REQUEST, SECURE, Layout, RingOverflow, bind

MODEL = ArrayRecord(
    {"w": Array(np.zeros((2, 3), np.float32)), "scalar": Array(np.array(0.5)), "empty": Array(np.zeros(0))}
)


@given(
    st.integers(2, 50),
    st.sampled_from([16, 24, 32, 48, 64]),
    st.floats(1e-3, 1e3),
    st.lists(
        st.tuples(st.integers(0, 100), st.lists(st.floats(-1, 1), min_size=4, max_size=4), st.floats(-3, 7)),
        min_size=1,
        max_size=12,
    ),
)
@settings(max_examples=100, deadline=None)
def test_the_ring_is_exact_to_its_bound(cohort: int, bits: int, top: float, nodes: list[Any]) -> None:
    layout = Layout(bits, max(cohort, len(nodes)), 4, top, 100.0 if bits > 16 else None, (("loss", -3.0, 7.0),))
    assert Layout.from_config(layout.to_config()) == layout
    total = np.zeros(layout.size, np.uint64)
    for weight, update, loss in nodes:
        vector = layout.encode(ArrayRecord([np.array(update) * top]), weight, {"loss": loss})
        assert vector.dtype == (np.uint32 if bits <= 32 else np.uint64)
        assert not np.any(vector.astype(np.uint64) >> np.uint64(bits - 1) >> np.uint64(1))
        total = total + vector
    mask = np.uint64((1 << bits) - 1)
    decoded = layout.decode(total & mask, len(nodes))
    weights = np.array([weight if bits > 16 else 1 for weight, _, _ in nodes], float)
    assert decoded.weight == weights.sum()
    if decoded.weight:
        mean = np.average([np.array(update) * top for _, update, _ in nodes], axis=0, weights=weights)
        assert np.all(np.abs(decoded.total * decoded.scale / decoded.weight - mean) <= decoded.error_bound * (1 + 1e-9))
        loss = np.average([loss for _, _, loss in nodes], weights=weights)
        assert (
            abs(float(str(decoded.metrics["loss"])) - loss)
            <= 10 * len(nodes) / layout.reach * decoded.scale / decoded.weight + 1e-12
        )


def test_what_does_not_fit_the_ring_is_an_error_and_never_wraps() -> None:
    layout = Layout(16, 10, 2, 1.0, None)
    top = layout.encode(ArrayRecord([np.array([1.0, -1.0])]), 1, {})
    total = (10 * top.astype(np.uint64)) & np.uint64(2**16 - 1)
    np.testing.assert_allclose(layout.decode(total, 10).total, [10, -10], rtol=1e-3)
    spoilt = layout.encode(ArrayRecord([np.array([math.nan, 1.0])]), 1, {})
    np.testing.assert_allclose(layout.decode(spoilt.astype(np.uint64), 1).total, [0, 1], rtol=1e-3)
    with pytest.raises(RingOverflow, match="3 elements"):
        layout.encode(ArrayRecord([np.zeros(3)]), 1, {})


@given(
    st.integers(1, 8), st.floats(0, 1e12),
    st.lists(st.floats(-1e12, 1e12) | st.just(-math.inf), min_size=2, max_size=2),
    st.floats(-1e300, 1e300) | st.just(math.inf),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_what_lies_beyond_a_range_is_sent_as_its_end(
    nodes: int, weight: float, update: list[float], loss: float
) -> None:
    """No wrap and no error, whatever the values: the sum is that of the clamped ones, with how many clamped."""
    layout = Layout(32, nodes, 2, 2.0, 10.0, (("loss", -1.0, 3.0),))
    vectors = [layout.encode(ArrayRecord([np.array(update)]), weight, {"loss": loss}) for _ in range(nodes)]
    total = np.sum([vector.astype(np.uint64) for vector in vectors], axis=0) & np.uint64(2**32 - 1)
    decoded = layout.decode(total, nodes)
    beyond = weight > 10 or max(map(abs, update)) > 2 or not -1 <= loss <= 3
    assert decoded.clamped == nodes * beyond
    assert decoded.weight == pytest.approx(nodes * min(weight, 10.0), abs=1e-6)
    if weight > 0.01:
        mean = decoded.total * decoded.scale / decoded.weight
        np.testing.assert_allclose(mean, np.clip(update, -2, 2), atol=1e-3)
        assert float(str(decoded.metrics["loss"])) == pytest.approx(min(max(loss, -1.0), 3.0), abs=1e-3)


@pytest.mark.parametrize("value", [5e-324, 1e-200, 1e200, math.inf, math.nan, 0.0, -1.0])
def test_ranges_from_which_no_scale_follows_are_no_layout(value: float) -> None:
    changes: list[dict[str, Any]] = [
        {"max_value": value}, {"max_weight": value}, {"metrics": (("loss", 0.0, value),)}
    ]  # fmt: skip
    for change in changes:
        with pytest.raises(ValueError, match=r"max_value|max_weight|range"):
            Layout(**{"bits": 32, "cohort": 3, "dimension": 2, "max_value": 1.0, "max_weight": 1.0, **change})


def test_the_binding_covers_everything_a_node_is_told() -> None:
    layout = Layout(32, 3, 6, 1.0, None)
    base = RecordDict({"arrays": MODEL, "config": ConfigRecord({"lr": 0.1, "n": 1})})
    seen = {bind(base, layout, "train")}
    variants = [
        RecordDict({"arrays": MODEL, "config": ConfigRecord({"lr": 0.1, "n": 1.0})}),
        RecordDict({"arrays": MODEL, "config": ConfigRecord({"lr": 0.1})}),
        RecordDict({"other": MODEL, "config": ConfigRecord({"lr": 0.1, "n": 1})}),
        RecordDict({"arrays": MODEL.map(lambda v: v + v.dtype.type(1)), "config": base["config"]}),
        RecordDict({**base, "privfed.plan": ConfigRecord({"clip": 1.0})}),
        RecordDict({"config": base["config"], "arrays": MODEL}),
    ]
    seen |= {bind(one, layout, "train") for one in variants}
    seen |= {bind(base, layout, "evaluate"), bind(base, Layout(32, 4, 6, 1.0, None), "train")}
    seen |= {bind(base, layout, "train", keys=keys) for keys in (("arrays", ""), ("", "arrays"), ("", "loss"))}
    seen |= {bind(base, layout, "train", shared=shared) for shared in (b"a", b"b")}
    seen |= {bind(base, layout, "train", group=group) for group in ("1", "2")}
    assert len(seen) == 16
    session = RecordDict({**base, SECURE: ConfigRecord({"stage": 1}), REQUEST: ArrayRecord()})
    assert bind(session, layout, "train") in seen
