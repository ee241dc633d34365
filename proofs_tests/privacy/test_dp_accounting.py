"""Events survive the way to dp-accounting and back; what has no counterpart is refused."""

from __future__ import annotations

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from privfed.adapters.dp_accounting import from_dp_event, to_dp_event
from privfed.privacy import events as ev
from privfed.privacy.accountant import Accountant

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


def test_what_a_multiplier_means_under_replacement() -> None:
    """Both libraries take noise relative to C; dp-accounting's RDP accountant forgets that a replacement moves 2C."""
    relation = dp_accounting.NeighboringRelation.REPLACE_ONE
    event = to_dp_event(ev.Gaussian(2.0))
    ours = Accountant(relation="replace_one").step(ev.Gaussian(2.0), 3).epsilon(1e-6)
    theirs = PLDAccountant(relation).compose(event, 3).get_epsilon(1e-6)
    assert theirs == pytest.approx(ours.upper, rel=1e-6)
    assert RdpAccountant(neighboring_relation=relation).compose(event, 3).get_epsilon(1e-6) < 0.5 * ours.lower
