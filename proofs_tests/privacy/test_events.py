"""Events are values with one JSON text each, and refuse what they cannot mean."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privfed.privacy import events as ev

positive = st.floats(0, 1e6, allow_nan=False) | st.just(math.inf)
rates = st.floats(0, 1)
counts = st.integers(0, 10**6)
plain = st.one_of(
    st.builds(ev.Gaussian, positive),
    st.builds(ev.Laplace, positive),
    st.builds(ev.MatrixGaussian, positive, positive),
    st.builds(ev.DiscreteGaussian, positive, st.integers(0, 50), st.none() | st.integers(0, 99)),
    st.builds(ev.DiscreteLaplace, positive, st.integers(0, 50)),
    st.builds(ev.Skellam, positive, st.integers(0, 50)),
    st.builds(ev.RandomizedResponse, rates, st.integers(2, 99)),
    st.builds(ev.Exponential, positive),
    st.builds(ev.AboveThreshold, positive),
    st.builds(ev.PureDP, positive),
    st.builds(ev.ApproximateDP, positive, rates),
    st.builds(ev.ZCDP, positive),
    st.builds(ev.Unaccounted, st.text(max_size=8)),
    st.builds(
        ev.DistributedSkellam, positive, positive, positive, st.integers(1, 9), counts, st.integers(2, 2**40), rates
    ),
    st.builds(
        ev.DistributedDiscreteGaussian, positive, positive, positive, st.integers(1, 9), counts, st.integers(2, 99)
    ),
)


def nested(inner: st.SearchStrategy[ev.Event]) -> st.SearchStrategy[ev.Event]:
    return st.one_of(
        st.builds(ev.PoissonSampled, rates, inner),
        st.builds(ev.FixedSizeSampled, st.integers(0, 9), st.integers(9, 99), inner),
        st.builds(ev.TruncatedPoisson, rates, st.integers(1, 99), st.integers(1, 99), inner),
        st.builds(ev.RandomAllocation, st.integers(1, 99), inner),
        st.builds(ev.Central, inner),
        st.builds(ev.Composed, st.lists(st.tuples(inner, counts), max_size=3).map(tuple)),
    )


events = st.recursive(plain, nested, max_leaves=4)


@given(events)
def test_json_is_canonical_and_round_trips(event: ev.Event) -> None:
    text = event.to_json()
    assert ev.event_from_json(text) == event
    assert ev.event_from_json(json.loads(text)) == event
    assert ev.event_from_json(text).to_json() == text
    assert hash(ev.event_from_json(text)) == hash(event)


BAD: list[tuple[Any, tuple[Any, ...], str]] = [
    (ev.Gaussian, (-1.0,), "noise_multiplier"),
    (ev.Gaussian, (math.nan,), "noise_multiplier"),
    (ev.Gaussian, ("1",), "noise_multiplier"),
    (ev.Laplace, (-0.1,), "noise_multiplier"),
    (ev.PoissonSampled, (1.1, ev.Gaussian(1)), "rate"),
    (ev.PoissonSampled, (-0.1, ev.Gaussian(1)), "rate"),
    (ev.PoissonSampled, (0.1, 1.0), "inner"),
    (ev.FixedSizeSampled, (11, 10, ev.Gaussian(1)), "sample_size"),
    (ev.TruncatedPoisson, (0.1, 10, 0, ev.Gaussian(1)), "cap"),
    (ev.RandomAllocation, (0, ev.Gaussian(1)), "rounds"),
    (ev.ApproximateDP, (1.0, 1.5), "delta"),
    (ev.RandomizedResponse, (0.5, 1), "categories"),
    (ev.DiscreteGaussian, (1.0, 1.5), "sensitivity"),
    (ev.Composed, (((ev.Gaussian(1), -1),),), "count"),
    (ev.Composed, ([],), "parts"),
]


@pytest.mark.parametrize(("kind", "values", "name"), BAD)
def test_bad_values_name_the_argument(kind: Any, values: tuple[Any, ...], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}:"):
        kind(*values)


BAD_TEXTS = [
    "[]",
    "{}",
    '{"event":"Gaussian"}',
    '{"event":"Gaussian","noise_multiplier":NaN}',
    '{"event":"Gaussian","noise_multiplier":1,"extra":2}',
    '{"event":"Gaussian","noise_multiplier":1,"noise_multiplier":2}',
    '{"event":"Nothing"}',
    '{"event":"PoissonSampled","inner":3,"rate":0.1}',
    '{"event":"Composed","parts":[[1]]}',
    '{"event":"Central","inner":' * 40 + '{"event":"Gaussian","noise_multiplier":1.0}' + "}" * 40,
]


@pytest.mark.parametrize("text", BAD_TEXTS)
def test_bad_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        ev.event_from_json(text)
