"""A committee that nobody chose: the same for everyone, uniform if one node is honest, drawn once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from privfed.audit.rehearsal import identities, stream
from privfed.protocols.errors import SERVER, LocalError, RemoteError
from privfed.protocols.graph import beacon_commitment
from privfed.protocols.oneshot import CommitteeDraw, OneShot
from proofs_tests.protocols.oneshot_cohort import Cohort, refuses

ROSTER = tuple(range(1, 9))
KNOWN = identities(ROSTER)


def draws(label: str, size: int = 3, context: bytes = b"run 1") -> dict[int, CommitteeDraw]:
    return {node: CommitteeDraw(KNOWN[node], size, context, stream(f"{label} {node}")) for node in ROSTER}


def run(parts: dict[int, CommitteeDraw]) -> dict[int, tuple[int, ...]]:
    """An honest draw: node -> the committee it computes."""
    committed = {node: part.commit(b"") for node, part in parts.items()}
    commitments = {node: commitment for node, (_, commitment) in committed.items()}
    revealed = {node: part.reveal(committed[node][0], commitments) for node, part in parts.items()}
    contributions = {node: contribution for node, (_, contribution) in revealed.items()}
    return {node: part.members(revealed[node][0], contributions) for node, part in parts.items()}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 8))
def test_everyone_draws_the_same_members_of_the_roster(label: int, size: int) -> None:
    (members,) = set(run(draws(str(label), size)).values())
    assert len(members) == size
    assert list(members) == sorted(set(members) & set(ROSTER))


def test_one_honest_contribution_makes_it_uniform() -> None:
    """Seven nodes always say the same; node 1 alone is random. 600 draws of 3 of 8, chi-square at 1e-6."""
    fresh = count()
    chosen: Counter[int] = Counter()
    fixed = draws("corrupt")
    for _ in range(600):
        parts = {
            node: replace(part, random=stream(f"corrupt {node}"))
            if node > 1
            else replace(part, random=stream(f"honest {next(fresh)}"))
            for node, part in fixed.items()
        }
        chosen.update(run(parts)[1])
    assert set(chosen) == set(ROSTER)
    # Draws without replacement vary less than independent ones: the test errs on the quiet side.
    assert stats.chisquare([chosen[node] for node in ROSTER]).pvalue > 1e-6


def test_context_size_and_roster_are_in_every_commitment() -> None:
    part = draws("x")[1]
    others = [replace(part, context=b"run 2"), replace(part, size=4)]
    others.append(replace(part, identity=replace(KNOWN[1], roster={**KNOWN[1].roster, 9: bytes(32)})))
    commitments = {one.commit(b"")[1] for one in (replace(o, random=stream("same")) for o in (part, *others))}
    assert len(commitments) == 4


def test_a_server_that_deviates() -> None:
    parts = draws("x")
    committed = {node: part.commit(b"") for node, part in parts.items()}
    kept, own = committed[1]
    all_of_them = {node: commitment for node, (_, commitment) in committed.items()}

    refuses("second-draw", {SERVER}, lambda: parts[1].commit(kept))
    refuses("foreign-node", {SERVER}, lambda: parts[1].reveal(kept, {**all_of_them, 99: bytes(32)}))
    refuses("swapped-commitment", {SERVER}, lambda: parts[1].reveal(kept, {**all_of_them, 1: all_of_them[2]}))
    refuses("swapped-commitment", {SERVER}, lambda: parts[1].reveal(kept, {n: all_of_them[n] for n in (2, 3, 4)}))
    refuses("cohort-too-small", {SERVER}, lambda: parts[1].reveal(kept, {1: own, 2: all_of_them[2]}))
    refuses("malformed-request", {SERVER}, lambda: parts[1].reveal(kept, {**all_of_them, 2: b"short"}))

    after, contribution = parts[1].reveal(kept, all_of_them)
    assert parts[1].reveal(after, all_of_them) == (after, contribution), "a redelivery gets the same bytes"
    refuses("second-request", {SERVER}, lambda: parts[1].reveal(after, {1: own, 2: bytes(32), 3: bytes(32)}))

    honest = {node: parts[node].reveal(kept, all_of_them)[1] for node, (kept, _) in committed.items()}
    refuses("beacon-unopened", {8}, lambda: parts[1].members(after, {n: honest[n] for n in ROSTER[:-1]}))
    refuses("beacon-mismatch", {8}, lambda: parts[1].members(after, {**honest, 8: bytes(32)}))
    refuses("beacon-mismatch", {SERVER}, lambda: parts[1].members(after, {**honest, 1: bytes(32)}))
    refuses("beacon-foreign", {SERVER}, lambda: parts[1].members(after, {**honest, 99: bytes(32)}))
    assert parts[1].members(after, honest) == parts[2].members(parts[2].reveal(committed[2][0], all_of_them)[0], honest)


def test_commitments_chosen_after_a_reveal_are_no_draw() -> None:
    """A corrupt node that waits for the others' bytes is bound by what it committed to before."""
    parts = draws("x")
    committed = {node: part.commit(b"") for node, part in parts.items()}
    all_of_them = {node: commitment for node, (_, commitment) in committed.items()}
    revealed = {node: parts[node].reveal(committed[node][0], all_of_them) for node in ROSTER}
    after = revealed[1][0]
    late = bytes(31) + b"\1"
    swapped = {**all_of_them, 8: beacon_commitment(parts[8].bound, 8, late)}
    refuses("second-request", {SERVER}, lambda: parts[1].reveal(after, swapped))
    contributions = {node: revealed[node][1] for node in ROSTER} | {8: late}
    refuses("beacon-mismatch", {8}, lambda: parts[1].members(after, contributions))


def test_a_step_too_early_is_the_callers_mistake() -> None:
    part = draws("x")[1]
    with pytest.raises(LocalError, match="commit first"):
        part.reveal(b"", {})
    with pytest.raises(LocalError, match="reveal first"):
        part.members(part.commit(b"")[0], {})
    with pytest.raises(LocalError, match="size"):
        replace(part, size=9)
    with pytest.raises(LocalError, match="size"):
        replace(part, size=1)
    with pytest.raises(LocalError, match="roster"):
        replace(part, identity=replace(KNOWN[1], node=99))


def test_a_session_with_the_drawn_committee_runs_and_another_committee_is_refused() -> None:
    members = run(draws("x", size=5))[1]
    own = OneShot(4, committee=members)
    assert Cohort(8, own).run().survivors == frozenset(ROSTER)
    cohort, other = Cohort(8, own), Cohort(8, OneShot(4, committee=tuple(sorted({*ROSTER} - {members[0]}))[:5]))
    assert other.protocol.committee != members
    with pytest.raises(RemoteError, match="foreign-committee"):
        cohort.answer(1, other.server.outbound()[1])
