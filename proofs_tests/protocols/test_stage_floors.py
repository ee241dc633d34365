"""Floors of a node hold at every stage, also where an honest server would have ended the session before."""

from __future__ import annotations

import pytest

from privfed.audit.rehearsal import Rehearsal
from privfed.protocols import LightSecAgg, OneShot, SecAgg, codec
from privfed.protocols.errors import RemoteError
from privfed.protocols.lightsecagg import messages
from privfed.protocols.oneshot.messages import Bundle
from privfed.protocols.session import Policy

NODES = (1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize(("stage", "deviation"), [(0, "cohort-too-small"), (2, "too-few-survivors")])
def test_a_cohort_that_shrank_below_the_floor_is_refused(stage: int, deviation: str) -> None:
    """At the first stage six nodes are promised; then one does not advertise, or gives no input."""
    lab = Rehearsal(SecAgg(threshold=2), nodes=NODES, policy=Policy(min_cohort=6))
    assert lab.run().result is not None
    with pytest.raises(RemoteError) as raised:
        lab.run(vanish={6: stage})
    assert raised.value.deviation == deviation


def test_a_member_opens_no_sum_with_fewer_than_two_honest_inputs() -> None:
    """With two corrupt nodes it takes four survivors; the server's own check is not the member's."""
    run = Rehearsal(OneShot(5, corrupt=2), nodes=NODES, active=True).run()
    role = next(role for role in run.roles() if role.name == "confirm" and role.node == 1)
    whole = Bundle.decode(role.request, 1)
    assert role.step(Bundle(whole.survivors[:4], whole.headers[:4], whole.boxes[:4]).encode())
    with pytest.raises(RemoteError, match="cohort-too-small"):
        role.step(Bundle(whole.survivors[:3], whole.headers[:3], whole.boxes[:3]).encode())


def test_nobody_survives_that_did_not_share() -> None:
    """Node 6 advertised and shared nothing: it is not among the survivors that a node signs."""
    run = Rehearsal(LightSecAgg(threshold=5), nodes=NODES, active=True).run(vanish={6: 1})
    role = next(role for role in run.roles() if role.name == "confirm" and role.node == 1)
    _, body = messages.parted(role.request, messages.CONFIRM)
    assert codec.decode(body, codec.Reader.nodes) == NODES[:5]
    with pytest.raises(RemoteError, match="foreign-node"):
        role.step(messages.sealed(messages.CONFIRM, role.request[1:33], codec.node_list(NODES)))
