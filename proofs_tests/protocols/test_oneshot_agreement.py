"""What a one-shot session agrees on: a threshold that opens one sum, facts that fit, and a committee."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from privfed.protocols.errors import LocalError, TooFewSurvivors
from privfed.protocols.oneshot import OneShot, agreement, draw_committee, sampler, sharing
from privfed.protocols.session import Session
from proofs_tests.protocols.oneshot_cohort import Cohort, roster_of

# --- parameters


@pytest.mark.parametrize(
    ("members", "corrupt", "least"), [(2, 0, 2), (3, 0, 2), (4, 0, 3), (5, 1, 4), (10, 3, 7), (9, 2, 6), (4, 2, 4)]
)
def test_threshold_lets_only_one_set_be_opened(members: int, corrupt: int, least: int) -> None:
    """2t > m + corrupt, and the refusal names the least threshold."""
    assert agreement.resolve_threshold(least, members, corrupt) == least
    with pytest.raises(LocalError, match=f"threshold >= {least}|at least"):
        agreement.resolve_threshold(least - 1, members, corrupt)
    assert 2 * least > members + corrupt >= 2 * (least - 1)


def test_thresholds_as_shares_and_solved() -> None:
    assert agreement.resolve_threshold(0.67, 10, 0) == 7
    assert agreement.resolve_threshold(1.0, 3, 1) == 3
    solved = agreement.resolve_threshold(None, 30, 0)
    assert 2 * solved > 30 + 10
    with pytest.raises(LocalError, match="exceeds the 4 members"):
        agreement.resolve_threshold(5, 4, 0)
    with pytest.raises(LocalError, match="members"):
        agreement.resolve_threshold(1500, 2048, 0)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"threshold": 1}, "threshold"),
        ({"threshold": 1.5}, "threshold"),
        ({"threshold": 2, "committee": (3, 1)}, "committee"),
        ({"threshold": 2, "committee": (0, 1)}, "committee"),
        ({"threshold": 2, "committee": b"\1\3"}, "committee"),
        ({"threshold": 2, "corrupt": -1}, "corrupt"),
        ({"threshold": 2, "slots": 4}, "slots"),
    ],
)
def test_bad_parameters_are_named(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OneShot(**parameters)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"nodes": (1,)}, "at least two"),
        ({"nodes": (2, 1)}, "ascending"),
        ({"nodes": (1, 1, 2)}, "ascending"),
        ({"nodes": tuple(range(1, 12338))}, "12336 fit the share field"),
        ({"nodes": (1, 2, 1 << 63)}, "2\\^63"),
        ({"dimension": -1}, "dimension"),
        ({"bits": 0}, "bits"),
        ({"bits": 50}, "noise"),
        ({"nodes": tuple(range(1, 1012)), "bits": 42}, "noise of n=1011"),
        ({"binding": b""}, "binding"),
        ({"round": -1}, "round"),
        ({"action": "x" * 65}, "action"),
        ({"nodes": (1, 2, 4)}, "committee"),
    ],
)
def test_a_session_that_does_not_fit_is_refused_before_anything_is_sent(facts: dict[str, Any], message: str) -> None:
    base: dict[str, Any] = {"run": 1, "round": 1, "action": "train", "nodes": (1, 2, 3), "dimension": 4, "bits": 20}
    with pytest.raises(LocalError, match=message):
        OneShot(0.9, committee=(1, 2, 3) if message == "committee" else None).server(Session(**(base | facts)))


@pytest.mark.parametrize("threshold", [None, 2, 0.5])
def test_a_committee_of_nobody_is_refused(threshold: int | float | None) -> None:
    with pytest.raises(LocalError, match="committee= has 0 members"):
        OneShot(threshold, committee=()).server(Session(1, 1, "train", (1, 2, 3), 4, 20))


def test_secrets_of_the_largest_cohort_fit_half_the_share_field() -> None:
    assert sharing.MAX_NODES * sampler.CUT < sharing.PRIME / 2 < (sharing.MAX_NODES + 1) * sampler.CUT


@pytest.mark.parametrize("corrupt", range(6))
def test_every_committee_has_two_honest_members(corrupt: int) -> None:
    """Were it one, o and then p, sums o + p + A and p + A over one model would differ by the input of o alone."""
    members = tuple(range(1, corrupt + 3))
    with pytest.raises(LocalError, match="two honest ones" if corrupt else "2 to"):
        OneShot(corrupt + 1 if corrupt else 2, committee=members[:-1], corrupt=corrupt).agree(session_of(10))
    least = OneShot(corrupt + 2, committee=members, corrupt=corrupt).agree(session_of(10))
    assert least.threshold - corrupt == 2, "and so two honest members open"


def session_of(nodes: int) -> Session:
    return Session(1, 1, "train", tuple(range(1, nodes + 1)), 4, 20, bytes(32))


def test_every_sum_holds_two_honest_inputs() -> None:
    with pytest.raises(LocalError, match="fewer than two honest"):
        Cohort(4, OneShot(4, corrupt=3))
    cohort = Cohort(5, OneShot(3, committee=(1, 2, 3), corrupt=1), bits=20)
    with pytest.raises(TooFewSurvivors) as raised:
        cohort.run({"send": {3, 4, 5}})
    assert (raised.value.have, raised.value.threshold) == (2, 3)


# --- committee


def test_committee_is_the_same_for_everyone_and_uniform() -> None:
    """5 of 20 over 2000 seeds: each node 500 times; a fair draw exceeds 6 standard deviations at rate 4e-8."""
    roster = roster_of(range(1, 21))
    counts = np.zeros(20)
    for index in range(2000):
        seed = hashlib.sha256(str(index).encode()).digest()
        drawn = draw_committee(roster, 5, seed)
        if index < 5:
            assert drawn == draw_committee(list(reversed(roster)), 5, seed)
            assert len(set(drawn)) == 5
            assert list(drawn) == sorted(drawn)
        counts[np.array(drawn) - 1] += 1
    assert np.abs(counts - 500).max() < 6 * (2000 * 0.25 * 0.75) ** 0.5
    for size, seed in ((1, bytes(32)), (21, bytes(32)), (5, b"short")):
        with pytest.raises(ValueError, match=r"size|seed"):
            draw_committee(roster, size, seed)


def test_a_committee_may_come_as_a_list() -> None:
    """That is how it travels in a configuration."""
    members: Any = [1, 2, 4]
    listed = OneShot(2, committee=members)
    assert listed == OneShot(2, committee=(1, 2, 4))
    assert hash(listed) == hash(OneShot(2, committee=(1, 2, 4)))
