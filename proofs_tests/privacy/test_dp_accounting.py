"""Events survive the way to dp-accounting and back; what has no counterpart is refused."""

from __future__ import annotations

import pytest

from privfed.adapters.dp_accounting import from_dp_event, to_dp_event
from privfed.privacy import events as ev

SHARED = [
    ev.Gaussian(1.5),
    ev.Laplace(2.0),
    ev.RandomizedResponse(0.2, 3),
    ev.ZCDP(0.1),
    ev.PoissonSampled(0.1, ev.Gaussian(1.0)),
    ev.FixedSizeSampled(10, 100, ev.Gaussian(1.0)),
    ev.TruncatedPoisson(0.1, 100, 20, ev.Gaussian(1.0)),
]


@pytest.mark.parametrize("event", SHARED)
def test_round_trip(event: ev.Event) -> None:
    assert from_dp_event(to_dp_event(event)) == event
    composed = from_dp_event(to_dp_event(ev.Composed(((event, 3),))))
    assert composed == ev.Composed(((ev.Composed(((event, 3),)), 1),))


@pytest.mark.parametrize("event", [ev.Skellam(4.0), ev.RandomAllocation(4, ev.Gaussian(1.0)), ev.PureDP(1.0)])
def test_no_counterpart_is_refused(event: ev.Event) -> None:
    with pytest.raises(ValueError, match=r"^event:"):
        to_dp_event(event)
