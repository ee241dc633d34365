"""The neighbour graph: solved parameters against exact integer arithmetic, the drawn graph, and the beacon."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.protocols import graph, shamir
from privfed.protocols.errors import RemoteError

VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "secaggplus_parameters.json").read_text())

LEAK, FAIL = Fraction(1, 2**41), Fraction(1, 2**20)


@pytest.mark.parametrize(("n", "adversarial", "dropout", "active", "k", "t"), VECTORS["rows"])
def test_parameters_agree_with_the_published_rows(
    n: int, adversarial: float, dropout: float, active: bool, k: int, t: int
) -> None:
    assert graph.solve_parameters(n, adversarial, dropout, active) == graph.Parameters(k, t)


def below(n: int, marked: int, drawn: int, t: int) -> Fraction:
    """P[fewer than t marked among `drawn` of n], in integers."""
    ways = sum(math.comb(marked, x) * math.comb(n - marked, drawn - x) for x in range(min(t, drawn + 1)))
    return Fraction(ways, math.comb(n, drawn))


def oracle(n: int, corrupt: int, gone: int, active: bool) -> graph.Parameters:
    """The rule word for word: every even k, every t, exact fractions."""
    bad = corrupt + gone
    for k in range(2, n - 1, 2):
        gaps = Fraction(n * (n - k - 1), 2) * Fraction(math.comb(bad, k), math.comb(n, k))
        if gaps >= LEAK:
            continue
        c = next(c for c in range(k + 1) if n * (1 - below(n, corrupt, k, c + 1)) <= LEAK)
        for t in range(2, k + 1):
            private = 2 * t > k + c if active else n * (1 - below(n, corrupt, k, t)) <= LEAK
            if private and n * below(n, n - gone, k, t) <= FAIL:
                return graph.Parameters(k, t)
    return graph.INFEASIBLE


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(0, 60), st.integers(0, 60), st.booleans())
def test_parameters_agree_with_exact_arithmetic(n: int, percent: int, gone: int, active: bool) -> None:
    if percent + (2 if active else 1) * gone > 90:
        expected = graph.INFEASIBLE
    else:
        expected = oracle(n, percent * n // 100, gone * n // 100, active)
    assert graph.solve_parameters(n, percent / 100, gone / 100, active) == expected


def test_the_two_gap_bound_holds_for_every_set_of_lost_nodes() -> None:
    """Counted over all sets: a ring lattice splits at most as often as the union bound says, and not never."""
    n, k = 12, 4
    around = graph.neighbours(range(1, n + 1), k, bytes(32))
    for lost in (5, 6, 7):
        split = sum(not connected(around, set(gone)) for gone in combinations(around, lost))
        bound = Fraction(n * (n - k - 1), 2) * Fraction(math.comb(lost, k), math.comb(n, k))
        assert 0 < Fraction(split, math.comb(n, lost)) <= bound


def connected(around: dict[int, tuple[int, ...]], gone: set[int]) -> bool:
    left = set(around) - gone
    reached, front = set(), {min(left)}
    while front:
        reached |= front
        front = {b for a in front for b in around[a]} & left - reached
    return reached == left


def test_a_million_nodes_are_solved() -> None:
    assert graph.solve_parameters(10**6, 0.05, 0.05, True) == graph.Parameters(74, 52)


def test_the_research_table_of_large_graphs() -> None:
    assert graph.solve_parameters(100, 0.05, 0.05, False) == graph.Parameters(12, 6)
    assert graph.solve_parameters(100, 0.05, 0.05, True) == graph.Parameters(16, 11)


@pytest.mark.parametrize(
    ("n", "adversarial", "dropout", "name"),
    [(0, 0.1, 0.1, "n"), (10, -0.1, 0.1, "adversarial"), (10, 0.1, 1.1, "dropout"), (9, math.nan, 0, "adv")],
)
def test_arguments_out_of_range_are_named(n: int, adversarial: float, dropout: float, name: str) -> None:
    for solve in (graph.solve_parameters, graph.solve_full_graph):
        with pytest.raises(ValueError, match=name):
            solve(n, adversarial, dropout, False)


@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 60), st.booleans())
def test_full_graph_thresholds_are_exactly_the_safe_and_available_ones(
    n: int, corrupt: int, gone: int, active: bool
) -> None:
    allowed = graph.full_graph_thresholds(n, corrupt, gone, active)
    for t in range(n + 2):
        safe = t > corrupt and t >= 2 and (not active or 2 * t > n + corrupt)
        assert (t in allowed) == (safe and t <= n - gone)


def test_the_full_graph_of_a_third_corrupt_needs_more_than_two_thirds() -> None:
    assert graph.solve_full_graph(99, 1 / 3, 0.1, True) == graph.Parameters(98, 67)
    assert graph.solve_full_graph(100, 1 / 3, 0.1, False) == graph.Parameters(99, 34)
    assert not graph.solve_full_graph(100, 1 / 3, 0.4, True).feasible


ROSTER = st.sets(st.integers(1, 2**62), min_size=3, max_size=30).map(sorted)


@settings(max_examples=60, deadline=None)
@given(ROSTER, st.data(), st.binary(min_size=32, max_size=32))
def test_the_graph_is_symmetric_regular_and_the_same_for_everyone(
    nodes: list[int], data: st.DataObject, seed: bytes
) -> None:
    evens = list(range(2, len(nodes), 2))
    degree = data.draw(st.sampled_from([*evens, len(nodes) - 1]))
    around = graph.neighbours(nodes, degree, seed)
    assert sorted(around) == nodes
    for node, others in around.items():
        assert len(set(others)) == degree and list(others) == sorted(others) and node not in others
        assert all(node in around[other] for other in others)
    assert graph.neighbours(nodes[::-1], degree, seed) == around
    node = data.draw(st.sampled_from(nodes))
    assert graph.neighbours_of(node, nodes, degree, seed) == around[node]


def test_the_graph_moves_with_the_seed_and_with_the_roster() -> None:
    nodes = list(range(1, 31))
    first = graph.neighbours(nodes, 4, bytes(32))
    assert graph.neighbours(nodes, 4, bytes(31) + b"\1") != first
    other = graph.neighbours([*nodes[:-1], 31], 4, bytes(32))
    assert {a: b for a, b in other.items() if a != 31} != {a: b for a, b in first.items() if a != 30}


def test_every_pair_is_as_likely_neighbours_as_any_other() -> None:
    """Chi-square over the 45 pairs of 10 nodes, 2000 fixed seeds, false alarm 10^-6: 99.9999 % quantile of 44."""
    tally = dict.fromkeys(combinations(range(1, 11), 2), 0)
    for trial in range(2000):
        for a, others in graph.neighbours(range(1, 11), 4, trial.to_bytes(32, "big")).items():
            for b in others:
                tally[min(a, b), max(a, b)] += 1
    expected = 2000 * 10 * 4 / len(tally)
    assert sum((seen - expected) ** 2 / expected for seen in tally.values()) < 103.4


@pytest.mark.parametrize("degree", [0, 3, 10, 11, -2])
def test_a_degree_that_is_no_regular_graph_is_refused(degree: int) -> None:
    with pytest.raises(ValueError, match="degree"):
        graph.neighbours(range(1, 11), degree, bytes(32))


def test_bad_rosters_and_seeds_are_refused() -> None:
    for nodes in ([1, 1, 2], [0, 1, 2]):
        with pytest.raises(ValueError, match="nodes"):
            graph.neighbours(nodes, 2, bytes(32))
    with pytest.raises(ValueError, match="seed"):
        graph.neighbours([1, 2, 3], 2, bytes(31))
    with pytest.raises(ValueError, match="node 9"):
        graph.neighbours_of(9, [1, 2, 3], 2, bytes(32))


CONTRIBUTIONS = {node: bytes([node]) * 32 for node in (1, 2, 3)}


def commitments(context: bytes = b"session") -> dict[int, bytes]:
    return {node: graph.beacon_commitment(context, node, value) for node, value in CONTRIBUTIONS.items()}


def test_the_beacon_needs_every_contribution_and_depends_on_each() -> None:
    seed = graph.beacon_seed(b"session", commitments(), CONTRIBUTIONS)
    assert len(seed) == 32
    for node in CONTRIBUTIONS:
        rest = {other: value for other, value in CONTRIBUTIONS.items() if other != node}
        with pytest.raises(RemoteError) as caught:
            graph.beacon_seed(b"session", commitments(), rest)
        assert (caught.value.deviation, caught.value.culprits) == ("beacon-unopened", (node,))
        changed = {**CONTRIBUTIONS, node: bytes(32)}
        opened = {
            **commitments(),
            node: graph.beacon_commitment(b"session", node, bytes(32)),
        }
        assert graph.beacon_seed(b"session", opened, changed) != seed


def test_the_beacon_names_who_opened_something_else() -> None:
    with pytest.raises(RemoteError) as caught:
        graph.beacon_seed(b"session", commitments(), {**CONTRIBUTIONS, 2: bytes(32)})
    assert (caught.value.deviation, caught.value.culprits) == ("beacon-mismatch", (2,))
    with pytest.raises(RemoteError) as caught:
        graph.beacon_seed(b"other session", commitments(), CONTRIBUTIONS)
    assert caught.value.deviation == "beacon-mismatch"


def test_a_copied_commitment_cannot_be_opened() -> None:
    """Node 4 repeats node 1's commitment, to cancel or double its contribution: the commitment names node 1."""
    copied = {**commitments(), 4: commitments()[1]}
    with pytest.raises(RemoteError) as caught:
        graph.beacon_seed(b"session", copied, {**CONTRIBUTIONS, 4: CONTRIBUTIONS[1]})
    assert (caught.value.deviation, caught.value.culprits) == ("beacon-mismatch", (4,))


def test_the_server_cannot_add_contributions_or_leave_all_out() -> None:
    with pytest.raises(RemoteError) as caught:
        graph.beacon_seed(b"session", commitments(), {**CONTRIBUTIONS, 9: bytes(32)})
    assert (caught.value.deviation, caught.value.culprits) == ("beacon-foreign", (0,))
    with pytest.raises(RemoteError) as caught:
        graph.beacon_seed(b"session", {}, {})
    assert caught.value.deviation == "beacon-empty"


def test_a_withheld_contribution_is_recovered_from_shares() -> None:
    """Node 2 shared its contribution when it committed and then withholds it: two others make the same seed."""
    dealt = shamir.split([CONTRIBUTIONS[2]], [1, 2, 3], 2, random=lambda size: bytes(range(1, 1 + size)))
    shown = {node: value for node, value in CONTRIBUTIONS.items() if node != 2}
    recovered = shamir.secret_of(shamir.interpolate(dealt[[0, 2]], [1, 3])[0])
    assert recovered is not None
    seed = graph.beacon_seed(b"session", commitments(), {**shown, 2: recovered})
    assert seed == graph.beacon_seed(b"session", commitments(), CONTRIBUTIONS)
    bent = dealt[[0, 2]].copy()
    bent[0, 0, 0] ^= 1
    wrong = shamir.secret_of(shamir.interpolate(bent, [1, 3])[0]) or bytes(32)
    with pytest.raises(RemoteError) as caught:
        graph.beacon_seed(b"session", commitments(), {**shown, 2: wrong})
    assert (caught.value.deviation, caught.value.culprits) == ("beacon-mismatch", (2,))
