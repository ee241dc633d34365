"""The one-shot protocol: exact sums under every dropout pattern, the inputs it takes, and vectors."""

from __future__ import annotations

import hashlib
import json
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.protocols import secure_sum
from privfed.protocols.errors import LocalError, TooFewSurvivors
from privfed.protocols.oneshot import OneShot, draw_committee
from privfed.protocols.session import Identity, Policy, Session
from proofs_tests.protocols.oneshot_cohort import Cohort, roster_of, secret_key

VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "oneshot.json").read_text())


def outcome(cohort: Cohort, leaves: dict[int, str]) -> tuple[int, int] | frozenset[int]:
    """What must happen when each node leaves before its stage: the survivors, or (have, threshold)."""
    agreed = cohort.protocol.agree(cohort.session)
    stages = cohort.protocol.stages

    def there(stage: str) -> set[int]:
        return {
            node
            for node in cohort.session.nodes
            if node not in leaves or stages.index(leaves[node]) > stages.index(stage)
        }

    if len(there("send") & set(agreed.committee)) < agreed.threshold:
        return len(there("send") & set(agreed.committee)), agreed.threshold
    if len(there("send")) < agreed.fewest_survivors:
        return len(there("send")), agreed.fewest_survivors
    for stage in ("confirm", "open"):
        have = len(there(stage) & set(agreed.committee))
        if have < agreed.threshold:
            return have, agreed.threshold
    return frozenset(there("send"))


def check(cohort: Cohort, leaves: dict[int, str]) -> None:
    dropped = {stage: {node for node in leaves if leaves[node] == stage} for stage in cohort.protocol.stages}
    expected = outcome(cohort, leaves)
    if isinstance(expected, frozenset):
        result = cohort.run(dropped)
        assert result.survivors == expected
        assert np.array_equal(result.total, cohort.expected(expected))
        assert (cohort.server.stage, cohort.server.outbound()) == ("", {})
    else:
        with pytest.raises(TooFewSurvivors) as raised:
            cohort.run(dropped)
        assert (raised.value.have, raised.value.threshold) == expected
        assert cohort.server.result is None
        assert cohort.server.stage == ""


def patterns(n: int) -> list[dict[int, str]]:
    """Each node stays or leaves before one of the stages: 4^n patterns."""
    return [
        {node: stage for node, stage in enumerate(leaving, 1) if stage}
        for leaving in product(("", "send", "confirm", "open"), repeat=n)
    ]


@pytest.mark.parametrize(("n", "threshold"), [(2, 2), (3, 2), (3, 3), (4, 3)])
def test_every_dropout_pattern(n: int, threshold: int) -> None:
    for leaves in patterns(n):
        check(Cohort(n, OneShot(threshold)), leaves)


def test_every_dropout_pattern_with_a_committee() -> None:
    for leaves in patterns(4):
        check(Cohort(4, OneShot(2, committee=(1, 2, 4))), leaves)


@pytest.mark.parametrize(("n", "threshold"), [(5, 3), (5, 4), (6, 4)])
def test_dropout_patterns_up_to_symmetry(n: int, threshold: int) -> None:
    for leaves in patterns(n):
        stages = [leaves.get(node, "~") for node in range(1, n + 1)]
        if stages == sorted(stages):
            check(Cohort(n, OneShot(threshold)), leaves)


@pytest.mark.long
@pytest.mark.parametrize(("n", "threshold"), [(5, 3), (6, 4), (6, 6)])
def test_every_dropout_pattern_of_more_nodes(n: int, threshold: int) -> None:
    for leaves in patterns(n):
        check(Cohort(n, OneShot(threshold)), leaves)


@given(st.data())
@settings(max_examples=5, deadline=None)
def test_random_dropouts_of_sixty_nodes(data: st.DataObject) -> None:
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    committee = tuple(sorted(generator.choice(np.arange(1, 61), 15, replace=False).tolist()))
    choices = generator.choice(["", "send", "confirm", "open"], 60, p=[0.8, 0.1, 0.05, 0.05])
    leaves = {node: str(stage) for node, stage in enumerate(choices, 1) if stage}
    check(Cohort(60, OneShot(9, committee=committee), dimension=2500), leaves)


@given(
    st.integers(2, 6),
    st.sampled_from([1, 2, 2048, 4097, 7000]),
    st.sampled_from([8, 14, 16, 20, 21, 32, 40]),
    st.sampled_from([None, 1]),
)
@settings(max_examples=25, deadline=None)
def test_sums_are_exact_in_the_ring(n: int, dimension: int, bits: int, slots: int | None) -> None:
    cohort = Cohort(n, OneShot(n, slots=slots), dimension=dimension, bits=bits)
    assert np.array_equal(cohort.run().total, cohort.expected(cohort.session.nodes))


@pytest.mark.parametrize(("bits", "slots"), [(21, 2), (14, 3)])
def test_bounded_sums_fill_the_ring(bits: int, slots: int) -> None:
    """Signed sums at both ends of the ring, borrowing from every slot."""
    cohort = Cohort(10, OneShot(6, bounded=True, slots=slots), dimension=5000, bits=bits)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    sums = np.resize([low, high, 0, -1, 1, low + 1], 5000)
    parts = np.random.default_rng(4).integers(-(2**10), 2**10, (4, 5000))
    rows = [*parts, *-parts, sums // 2, sums - sums // 2]
    for node, row in enumerate(rows, 1):
        cohort.inputs[node] = row.view(np.uint64) & np.uint64((1 << bits) - 1)
    assert np.array_equal(cohort.run().total, sums.view(np.uint64) & np.uint64((1 << bits) - 1))


def test_later_drops_stay_in_the_sum_and_the_threshold_suffices() -> None:
    cohort = Cohort(5, OneShot(3))
    result = cohort.run({"confirm": {1}, "open": {2}})
    assert result.survivors == {1, 2, 3, 4, 5}
    assert np.array_equal(result.total, cohort.expected(range(1, 6)))


def test_uint32_and_uint64_inputs_agree() -> None:
    wide, narrow = Cohort(3, OneShot(2), dimension=3000), Cohort(3, OneShot(2), dimension=3000)
    for node in narrow.inputs:
        narrow.inputs[node] = narrow.inputs[node].astype(np.uint32)
    assert np.array_equal(wide.run().total, narrow.run().total)


def test_only_members_are_asked_again() -> None:
    cohort = Cohort(6, OneShot(2, committee=(2, 4, 6)))
    assert set(cohort.server.outbound()) == set(cohort.session.nodes)
    assert len({id(request) for request in cohort.server.outbound().values()}) == 1
    assert set(cohort.until("confirm").server.outbound()) == {2, 4, 6}
    cohort.stage(gone={4})
    cohort.server.close()
    assert set(cohort.server.outbound()) == {2, 6}


def test_upload_is_what_is_promised() -> None:
    """1M coordinates of 2 x 21 bits, 43 members: <= 3.4 bytes a coordinate and 5.4 kB a member."""
    n, d = 43, 1_000_000
    agreed = OneShot(29, bounded=True).agree(Session(1, 1, "train", tuple(range(1, n + 1)), d, 21))
    assert agreed.packing.slots == 2
    cohort = Cohort(43, OneShot(29, bounded=True), dimension=4096, bits=21)
    size = len(cohort.answer(1, cohort.server.outbound()[1]))
    full = size - cohort.protocol.agree(cohort.session).ciphertext_bytes + agreed.ciphertext_bytes
    assert full <= 3.4 * d + 5400 * n


def test_an_empty_vector_has_an_empty_sum() -> None:
    result = Cohort(3, OneShot(2), dimension=0).run({"send": {2}})
    assert result.total.shape == (0,)
    assert result.survivors == {1, 3}


def test_secure_sum_of_integers_and_floats() -> None:
    generator = np.random.default_rng(6)
    integers = {node: generator.integers(-(1 << 38), 1 << 38, (3, 4)) for node in (2, 5, 9)}
    exact = secure_sum(integers, OneShot(2), dropped={"send": {5}, "confirm": set()})
    assert exact.survivors == {2, 9}
    assert np.array_equal(exact.total, integers[2] + integers[9])
    floats = {node: generator.normal(size=5000) for node in (2, 5, 9)}
    rounded = secure_sum(floats, OneShot(2), dropped={"open": {2}})
    assert np.abs(rounded.total - sum(floats.values())).max() <= rounded.error_bound < 1e-6
    assert set(rounded.traffic) == {"send", "confirm", "open"}
    with pytest.raises(TooFewSurvivors, match="1 nodes answered at stage 'open', 2 are needed"):
        secure_sum(floats, OneShot(2), dropped={"open": {2, 9}})


def test_a_drawn_committee_runs() -> None:
    committee = draw_committee(range(1, 11), 4, bytes(32))
    cohort = Cohort(10, OneShot(3, committee=committee))
    gone = next(iter(set(cohort.session.nodes) - set(committee)))
    result = cohort.run({"send": {gone}, "confirm": {committee[0]}})
    assert np.array_equal(result.total, cohort.expected(set(cohort.session.nodes) - {gone}))


# --- what a node takes and shows


def test_inputs_out_of_range_raise_at_the_node() -> None:
    cohort = Cohort(3, OneShot(2))
    request = cohort.server.outbound()[1]
    wrong: tuple[Any, ...] = (
        np.full(5, 1 << 20, dtype=np.uint64),
        np.zeros(4, dtype=np.uint64),
        np.zeros((5, 1), dtype=np.uint64),
        np.zeros(5, dtype=np.int64),
        np.zeros(5),
    )
    for bad in wrong:
        cohort.inputs[1] = bad
        with pytest.raises(LocalError, match="source returned"):
            cohort.answer(1, request)
    assert cohort.kept[1] == b""


def test_a_client_needs_its_own_identity() -> None:
    protocol, roster = OneShot(2), roster_of([1, 2])
    with pytest.raises(LocalError, match="needs identity="):
        protocol.client(1)
    with pytest.raises(LocalError, match="node 2, not of node 1"):
        protocol.client(1, identity=Identity(2, secret_key(2), roster))
    with pytest.raises(LocalError, match="own public key"):
        protocol.client(1, identity=Identity(1, secret_key(2), roster))


def test_secrets_do_not_print() -> None:
    cohort = Cohort(3, OneShot(2))
    cohort.answer(1, cohort.server.outbound()[1])
    shown = repr(cohort.clients[1]) + repr(cohort.identities[1])
    assert secret_key(1).hex() not in shown
    assert repr(secret_key(1)) not in shown
    assert "share" not in shown


# --- vectors


def test_vector_of_a_whole_session() -> None:
    """Every byte on the wire, from fixed keys and randomness."""
    case = VECTORS["session"]
    cohort = Cohort(3, OneShot(2), dimension=case["dimension"], bits=case["bits"], seed=case["seed"])
    transcript = []
    while cohort.server.stage:
        stage = cohort.server.stage
        for node, (asked, replied) in cohort.stage().items():
            transcript.append([stage, node, hashlib.sha256(asked).hexdigest(), hashlib.sha256(replied).hexdigest()])
        cohort.server.close()
    assert OneShot(2).agree(cohort.session).request.hex() == case["invitation"]
    assert OneShot(2).agree(cohort.session).digest.hex() == case["digest"]
    assert transcript == case["transcript"]
    assert cohort.server.result is not None
    assert cohort.server.result.total.tolist() == case["total"]


def test_policy_defaults_suit_a_pair() -> None:
    pair = Cohort(2, OneShot(2), policy=Policy())
    assert np.array_equal(pair.run().total, pair.expected([1, 2]))
    assert list(chain.from_iterable([pair.protocol.stages])) == ["send", "confirm", "open"]
