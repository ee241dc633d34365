"""SecAgg and SecAgg+: every dropout pattern, the plain sum as oracle, and what is refused before a message is sent."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from privfed.protocols import LightSecAgg, SecAgg, SecAggPlus, secure_sum
from privfed.protocols.errors import LocalError, RangeError, TooFewSurvivors
from privfed.protocols.session import Protocol, Session

INPUTS = {node: np.array([node, -3 * node, 1 << 20, 0]) for node in range(1, 7)}


def patterns(nodes: int, stages: int, *, symmetric: bool) -> Iterator[tuple[int, ...]]:
    """For each node the stage before which it vanishes; `stages` means never."""
    if symmetric:
        yield from itertools.combinations_with_replacement(range(stages + 1), nodes)
    else:
        yield from itertools.product(range(stages + 1), repeat=nodes)


def run(protocol: SecAgg, pattern: tuple[int, ...]) -> None:
    """The sum is that of the nodes that reached the stage after masking, or nobody learns anything."""
    stages, nodes = protocol.stages, range(1, len(pattern) + 1)
    dropped = {
        name: {node for node, at in zip(nodes, pattern, strict=True) if at == place}
        for place, name in enumerate(stages)
    }
    inputs = {node: INPUTS[node] for node in nodes}
    left = [sum(at > place for at in pattern) for place in range(len(stages))]
    threshold = protocol.threshold
    assert isinstance(threshold, int)
    masked = {node for node, at in zip(nodes, pattern, strict=True) if at > stages.index("mask")}
    try:
        result = secure_sum(inputs, protocol, dropped=dropped)
    except TooFewSurvivors as few:
        assert min(left) < threshold
        assert few.threshold == threshold
        assert few.have == next(count for count in left if count < threshold)
        return
    assert min(left) >= threshold
    assert result.survivors == masked
    assert np.array_equal(result.total, sum(inputs[node] for node in masked))


@pytest.mark.parametrize("nodes", [2, 3, 4])
def test_every_dropout_pattern(nodes: int) -> None:
    for threshold in range(2, nodes + 1):
        for pattern in patterns(nodes, 4, symmetric=False):
            run(SecAgg(threshold=threshold), pattern)


@pytest.mark.parametrize("nodes", [3, 4, 5, 6])
def test_every_dropout_pattern_up_to_symmetry_active(nodes: int) -> None:
    for pattern in patterns(nodes, 5, symmetric=True):
        run(SecAgg(threshold=nodes, mode="active", corrupt=0.0), pattern)
        run(SecAgg(threshold=nodes // 2 + 1, mode="active", corrupt=0.0), pattern)


@pytest.mark.parametrize("nodes", [2, 3, 4, *(pytest.param(many, marks=pytest.mark.long) for many in (5, 6))])
def test_every_dropout_pattern_active(nodes: int) -> None:
    for pattern in patterns(nodes, 5, symmetric=False):
        run(SecAgg(threshold=nodes // 2 + 1, mode="active", corrupt=0.0), pattern)


@pytest.mark.parametrize(("nodes", "threshold"), [(5, 3), (6, 4)])
def test_dropout_patterns_up_to_symmetry(nodes: int, threshold: int) -> None:
    for pattern in patterns(nodes, 4, symmetric=True):
        run(SecAgg(threshold=threshold), pattern)


@pytest.mark.long
@pytest.mark.parametrize(("nodes", "threshold"), [(5, 3), (6, 4)])
def test_all_dropout_patterns(nodes: int, threshold: int) -> None:
    for pattern in patterns(nodes, 4, symmetric=False):
        run(SecAgg(threshold=threshold), pattern)


@pytest.mark.parametrize("protocol", [SecAgg(threshold=51), SecAggPlus(corrupt=0.05, dropout=0.1)], ids=repr)
@settings(max_examples=2, deadline=None)
@given(st.data())
def test_random_dropouts_of_a_hundred(protocol: SecAgg | SecAggPlus, data: st.DataObject) -> None:
    nodes = range(1, 101)
    inputs = {node: np.full(7, node) for node in nodes}
    gone = data.draw(st.sets(st.integers(1, 100), max_size=8))
    dropped: dict[str, set[int]] = {stage: set() for stage in protocol.stages}
    for node in gone:
        dropped[data.draw(st.sampled_from(protocol.stages))].add(node)
    try:
        result = secure_sum(inputs, protocol, dropped=dropped)
    except TooFewSurvivors:
        assert isinstance(protocol, SecAggPlus)  # a node may lose too many neighbours, never silently
        return
    early = dropped["advertise"] | dropped["share"] | dropped["mask"]
    assert result.survivors == set(nodes) - early
    assert np.array_equal(result.total, sum(inputs[node] for node in result.survivors))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(-(1 << 40), 1 << 40), min_size=3, max_size=3), min_size=2, max_size=5),
    st.sampled_from(["full", "active", "sparse", "light"]),
)
def test_integer_sums_are_exact(rows: list[list[int]], kind: str) -> None:
    inputs = {node + 1: np.array(row) for node, row in enumerate(rows)}
    n = len(rows)
    protocol: Protocol = {
        "full": SecAgg(threshold=2),
        "active": SecAgg(threshold=n, mode="active", corrupt=0.0),
        "sparse": SecAggPlus(neighbours=2, threshold=2),
        "light": LightSecAgg(threshold=n),
    }[kind]
    if kind == "light" and n < 3:
        return
    result = secure_sum(inputs, protocol)
    assert result.total.tolist() == np.sum(rows, axis=0).tolist()
    assert result.error_bound == 0.0


@settings(max_examples=40, deadline=None)
@example([0.0, 5e-324], np.float64)
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=6), st.sampled_from([np.float32, np.float64]))
def test_float_sums_are_within_the_stated_error(values: list[float], dtype: type) -> None:
    inputs = {node + 1: np.array([[value]], dtype=dtype) for node, value in enumerate(values)}
    result = secure_sum(inputs, SecAgg(threshold=2))
    assert result.total.shape == (1, 1)
    exact = sum(np.float64(array[0, 0]) for array in inputs.values())
    assert abs(result.total[0, 0] - exact) <= result.error_bound


def test_shapes_and_empty_inputs() -> None:
    for shape in ((), (0,), (0, 3), (2, 1, 2)):
        inputs = {node: np.full(shape, node) for node in (1, 2, 3)}
        assert np.array_equal(secure_sum(inputs, SecAgg(threshold=2)).total, np.full(shape, 6))


def test_what_is_refused_before_any_message() -> None:
    two = {1: np.array([1]), 2: np.array([2])}
    with pytest.raises(RangeError):
        secure_sum({1: np.array([1 << 62]), 2: np.array([1])}, SecAgg(threshold=2))
    with pytest.raises(LocalError, match="NaN"):
        secure_sum({1: np.array([np.nan]), 2: np.array([1.0])}, SecAgg(threshold=2))
    with pytest.raises(LocalError, match="one shape"):
        secure_sum({1: np.zeros(2), 2: np.zeros(3)}, SecAgg(threshold=2))
    with pytest.raises(LocalError, match="no stage 'unmask'"):
        secure_sum(two, SecAgg(threshold=2), dropped={"unmask": {1}})
    with pytest.raises(LocalError, match="threshold must be between"):
        secure_sum(two, SecAgg(threshold=3))
    with pytest.raises(LocalError, match=r"2 \* threshold > n \+ corrupt"):
        secure_sum({node: np.array([1]) for node in range(1, 10)}, SecAgg(threshold=5, mode="active"))
    with pytest.raises(LocalError, match="no threshold is safe"):
        secure_sum(two, SecAgg(mode="active", corrupt=0.5, dropout=0.5))
    with pytest.raises(LocalError, match=r"connected|corrupt neighbours"):
        SecAggPlus(neighbours=4, threshold=3, mode="active").terms(Session(1, 1, "sum", tuple(range(1, 40)), 1, 32))
    for bad in ({"threshold": 1}, {"threshold": 1.5}, {"mode": "trusting"}, {"corrupt": 1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            SecAgg(**bad)


def test_thresholds_as_count_share_or_solved() -> None:
    session = Session(1, 1, "sum", tuple(range(1, 101)), 1, 32)
    assert SecAgg(threshold=51).terms(session).threshold == 51
    assert SecAgg(threshold=0.505).terms(session).threshold == 51
    assert SecAgg().terms(session).threshold == 34
    active = SecAgg(mode="active").terms(session).threshold
    assert 2 * active > 100 + 33
    sparse = SecAggPlus(corrupt=0.05, dropout=0.05).terms(session)
    assert (sparse.degree, sparse.threshold) == (12, 6)


def test_seed_repeats_every_byte_and_nothing_else_does() -> None:
    inputs = {node: np.array([node]) for node in (1, 2, 3)}
    first, second = (secure_sum(inputs, SecAgg(threshold=2), seed=7) for _ in range(2))
    assert first.traffic == second.traffic
    assert first.total.tolist() == second.total.tolist()


def test_traffic_is_the_vector_and_a_row_a_neighbour() -> None:
    inputs = {node: np.zeros(100_000, np.int64) for node in range(1, 11)}
    traffic = secure_sum(inputs, SecAgg(threshold=6)).traffic
    up = sum(stage.up for stage in traffic.values()) / 10
    assert up <= 1.05 * 100_000 * 32 / 8
