"""What a node pins although the parameters come from the server: the share of corrupt nodes, in every protocol."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privfed.audit import check_protocol
from privfed.protocols import LightSecAgg, OneShot, SecAgg, SecAggPlus, keys
from privfed.protocols.errors import LocalError, RemoteError
from privfed.protocols.graph import corrupt_quantile
from privfed.protocols.secagg.messages import Terms
from privfed.protocols.secagg.neighbourhood import able, chosen_graph_connected, least_survivors, least_threshold
from privfed.protocols.session import Identity, Policy, Protocol, Session

SPARSE = SecAggPlus(neighbours=2, threshold=2)


@pytest.mark.parametrize(
    "protocol",
    [
        SecAgg(),
        SecAgg(threshold=2),
        SecAgg(mode="active", corrupt=0.0),
        SecAggPlus(),
        SPARSE,
        replace(SPARSE, mode="active", corrupt=0.0, dropout=0.0),
        OneShot(),
    ],
    ids=repr,
)
def test_every_protocol_keeps_the_contract(protocol: Protocol) -> None:
    assert check_protocol(protocol).passed


def session_of(n: int) -> Session:
    return Session(1, 1, "train", tuple(range(1, n + 1)), 2, 32)


def joins(protocol: Protocol, n: int, corrupt: float) -> str:
    """Return "" when a node with this policy joins the session the server opens, or the deviation it names."""
    session, secret = session_of(n), b"k" * 32
    roster = dict.fromkeys(session.nodes, b"r" * 32) | {1: keys.signing_public(secret)}
    client = protocol.client(1, identity=Identity(1, secret, roster), policy=Policy(corrupt=corrupt))
    request = protocol.server(session).outbound()[1]
    try:
        client.step(b"", request, lambda: np.zeros(2, dtype=np.uint64))
    except RemoteError as fault:
        return fault.deviation
    return ""


@pytest.mark.parametrize(
    ("protocol", "most", "deviation"),
    [
        (SecAgg(threshold=6), 0.5, "threshold-too-low"),  # t > corrupt: 6 > 5
        (SecAgg(threshold=6, mode="active", corrupt=0.0), 0.1, "threshold-too-low"),  # 12 > 10 + 1
        (SecAgg(threshold=9, mode="active", corrupt=0.2), 0.7, "threshold-too-low"),  # 18 > 10 + 7
        (SecAggPlus(neighbours=4, threshold=2), 0.1, "threshold-too-low"),  # 1 corrupt of 10 may be a neighbour
        (SecAggPlus(neighbours=6, threshold=6, mode="active", corrupt=0.0, dropout=0.0), 0.5, "threshold-too-low"),
        (LightSecAgg(threshold=8), 0.5, "privacy-too-low"),  # privacy = 2 * 8 - 10 - 1
        (OneShot(threshold=7, corrupt=3), 0.3, "corrupt-too-low"),
    ],
    ids=repr,
)
def test_the_corrupt_share_a_node_insists_on(protocol: Protocol, most: float, deviation: str) -> None:
    """`most` is the largest share, in tenths, with which these parameters are safe for 10 nodes."""
    assert [joins(protocol, 10, tenths / 10) for tenths in range(10)] == [
        "" if tenths / 10 <= most + 1e-9 else deviation for tenths in range(10)
    ]


def test_a_servers_zero_does_not_lower_the_nodes_share() -> None:
    """The protocol a node rebuilds from the request says corrupt=0; its policy does not."""
    weak = SecAgg(threshold=6, mode="active", corrupt=0.0)
    assert joins(weak, 10, 0.0) == ""
    assert joins(weak, 10, 1 / 3) == "threshold-too-low"
    # The other way round: what a node's own parameters provide for, it checks without a policy.
    lab = session_of(10)
    request = weak.server(lab).outbound()[1]
    strict = SecAgg(threshold=7, mode="active", corrupt=1 / 3).client(
        1, identity=Identity(1, b"k" * 32, {}), policy=Policy()
    )
    with pytest.raises(RemoteError, match="threshold-too-low"):
        strict.step(b"", request, lambda: np.zeros(2, dtype=np.uint64))


@pytest.mark.parametrize("corrupt", [-0.1, 1.0])
def test_a_corrupt_share_is_a_share(corrupt: float) -> None:
    with pytest.raises(ValueError, match="corrupt"):
        Policy(corrupt=corrupt)


@given(st.integers(3, 60), st.floats(0, 0.9), st.booleans(), st.data())
def test_the_least_threshold_is_the_rule(n: int, corrupt: float, active: bool, data: st.DataObject) -> None:
    """2t > holders + corrupt holders (active) or t > corrupt holders, and not one less."""
    bad = int(corrupt * n)
    degree = data.draw(st.sampled_from([0, *range(2, n - 1, 2)]))
    terms = Terms(session_of(n), degree, 2, active)
    holding, among = (n, bad) if not degree else (degree, corrupt_quantile(n, bad, degree))
    least = least_threshold(terms, bad)

    def safe(t: int) -> bool:
        return 2 * t > holding + among if active else t > among

    assert safe(least)
    assert not safe(least - 1)


@given(st.dictionaries(st.integers(1, 12), st.sets(st.integers(1, 12), max_size=8), max_size=12), st.integers(1, 4))
def test_who_goes_on_is_the_largest_set_in_which_everyone_can(holding: dict[int, set[int]], threshold: int) -> None:
    left = able(holding, threshold)
    assert all(len(holding[node] & left) >= threshold for node in left)
    for node in set(holding) - left:  # no set with one more works: the rule is monotone, so neither does a larger one
        grown = left | {node}
        assert any(len(holding[other] & grown) < threshold for other in grown)


def test_fewest_survivors_of_a_chosen_graph() -> None:
    terms = Terms(session_of(1000), 52, 37, True)
    least = least_survivors(terms, 50)
    assert chosen_graph_connected(1000, 50 + 1000 - least, 52)
    assert not chosen_graph_connected(1000, 50 + 1000 - (least - 1), 52)
    assert 300 < least < 950


@pytest.mark.parametrize(("n", "corrupt"), [(22, 3), (22, 6), (26, 7), (40, 39), (40, 40)])
def test_two_survivors_are_honest_whatever_the_bound_says_of_one(n: int, corrupt: int) -> None:
    """A single honest node is connected with itself, and its sum is its input."""
    assert least_survivors(Terms(session_of(n), 20, 15, True), corrupt) >= min(corrupt + 2, n + 1)


def test_no_survivors_are_enough_on_a_graph_that_is_too_thin() -> None:
    """Two neighbours of a hundred leave honest nodes apart even when everybody survives: a server may not ask that."""
    assert not chosen_graph_connected(100, 1, 2)
    assert least_survivors(Terms(session_of(100), 2, 2, True), 1) == 101


def test_the_bound_on_a_chosen_graph_is_the_sum_over_cuts() -> None:
    """Against exact binomials; false whenever honest nodes could be apart with more than 2^-41."""
    from fractions import Fraction
    from math import comb

    for n in (6, 12, 20, 40):
        for bad in range(0, n - 1, 3):
            for degree in range(2, n - 1, 4):
                honest, whole = n - bad, comb(n - 1, degree)
                total = Fraction(0)
                for size in range(1, honest // 2 + 1):
                    inside = Fraction(comb(max(n - 1 - (honest - size), 0), degree), whole) ** size
                    outside = Fraction(comb(n - 1 - size, degree), whole) ** (honest - size)
                    total += comb(honest, size) * inside * outside
                assert chosen_graph_connected(n, bad, degree) == (total <= Fraction(1, 1 << 41)), (n, bad, degree)


def test_infeasible_parameters_are_refused_before_any_message() -> None:
    with pytest.raises(LocalError):
        LightSecAgg(threshold=2).server(session_of(10))
