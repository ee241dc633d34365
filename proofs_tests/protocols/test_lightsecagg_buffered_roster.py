"""Who may be in a buffered run, and under which terms: what is refused before anything is masked."""

from __future__ import annotations

from dataclasses import replace

import pytest

from privfed.audit.rehearsal import identities, stream
from privfed.protocols import codec, keys
from privfed.protocols.errors import LocalError, RemoteError, TooFewSurvivors
from privfed.protocols.lightsecagg.buffer import BufferedServer
from privfed.protocols.lightsecagg.buffered import BufferedNode
from privfed.protocols.lightsecagg.messages import Advertisement
from privfed.protocols.session import Policy
from proofs_tests.protocols.buffered_run import TERMS, Run, update


def test_the_roster_is_checked_and_fixed() -> None:
    run = Run()
    node = run.nodes[1]
    assert node.settle(run.kept[1], run.roster) == run.kept[1]
    fresh, _ = node.join()
    with pytest.raises(RemoteError, match="swapped-key"):
        node.settle(fresh, run.roster)
    with pytest.raises(RemoteError, match="second-roster"):
        node.settle(run.kept[1], run.roster + b"\0")
    known = identities(TERMS.nodes, impostor=3)
    other = BufferedServer(TERMS, random=stream("other server"))
    nodes = {name: BufferedNode(TERMS, who, random=stream(f"o{name}")) for name, who in known.items()}
    kept = {}
    for name, part in nodes.items():
        kept[name], message = part.join()
        other.join(name, message)
    with pytest.raises(RemoteError, match="unknown-identity by server, node 3"):
        nodes[1].settle(kept[1], other.settle())


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"threshold": 3}, "threshold"),
        ({"weights": ()}, "weights"),
        ({"weights": (1, 0)}, "weights"),
        ({"goal": 1}, "goal"),
        ({"nodes": (2, 1, 3, 4, 5)}, "nodes"),
        ({"bits": 65}, "bits"),
        ({"per_version": 0}, "per_version"),
        ({"per_version": 4}, "per_version"),
    ],
)
def test_terms_that_cannot_be_safe_are_refused(change: dict[str, object], name: str) -> None:
    with pytest.raises(LocalError, match=name):
        replace(TERMS, **change)  # type: ignore[arg-type]  # names checked by replace


@pytest.mark.parametrize(
    "policy",
    [
        Policy(min_cohort=4),
        Policy(min_threshold=5),
        Policy(min_bits=33),
        Policy(min_neighbours=5),
        Policy(min_round=8),
        Policy(corrupt=0.4),
        Policy(nodes=(1, 2, 3, 4)),
    ],
)
def test_a_node_joins_no_run_below_its_floors(policy: Policy) -> None:
    with pytest.raises(LocalError, match="policy"):
        BufferedNode(TERMS, identities(TERMS.nodes)[1], policy)


def test_a_roster_with_strangers_or_too_few_is_refused() -> None:
    run = Run()
    node = replace(run.nodes[1], random=stream("node 1"))  # so that its keys are the roster's
    fresh, _ = node.join()
    table = codec.decode(memoryview(run.roster)[33:], lambda r: r.table(Advertisement.SIZE))

    def refused(rows: dict[int, bytes]) -> str:
        with pytest.raises(RemoteError) as caught:
            node.settle(fresh, run.roster[:33] + codec.table(rows.items()))
        return caught.value.deviation

    rows = {name: bytes(raw) for name, raw in table.items()}
    assert refused({**rows, 9: rows[2]}) == "foreign-node"
    assert refused({name: rows[name] for name in (1, 2, 3)}) == "cohort-too-small"
    assert refused({**rows, 2: rows[3]}) == "unknown-identity"
    assert node.settle(fresh, run.roster)


def test_nothing_is_done_before_the_roster_settles() -> None:
    run = Run()
    fresh, _ = run.nodes[1].join()
    with pytest.raises(LocalError, match="settled"):
        run.nodes[1].contribute(fresh, 1, bytes(32), update(1, 1))
    with pytest.raises(LocalError, match="kept"):
        run.nodes[1].settle(fresh + b"\0", run.roster)


def test_identities_must_be_the_rosters() -> None:
    known = identities((*TERMS.nodes, 6))
    with pytest.raises(LocalError, match="roster"):
        BufferedNode(TERMS, known[6])
    with pytest.raises(LocalError, match="roster"):
        BufferedNode(TERMS, identities((1, 2, 3))[1])
    with pytest.raises(LocalError, match="identity"):
        BufferedNode(TERMS, replace(known[1], secret_key=bytes(32)))


def test_who_may_join() -> None:
    run, known = Run(), identities(TERMS.nodes)
    _, message = run.nodes[1].join()
    for node in (1, 9):
        with pytest.raises(RemoteError, match=f"foreign-node by node {node}"):
            run.server.join(node, message)
    server = BufferedServer(TERMS, roster=known[1].roster, random=stream("another"))
    with pytest.raises(TooFewSurvivors):
        server.settle()
    with pytest.raises(RemoteError, match="bad-signature by node 2"):
        server.join(2, message)
    forged = replace(known[2], secret_key=b"e" * 32)
    forged = replace(forged, roster={**forged.roster, 2: keys.signing_public(b"e" * 32)})
    with pytest.raises(RemoteError, match="unknown-identity by node 2"):
        server.join(2, BufferedNode(TERMS, forged, random=stream("forged")).join()[1])
    server.join(1, message)
    with pytest.raises(RemoteError, match="foreign-node by node 1"):
        server.join(1, message)
    with pytest.raises(RemoteError, match="foreign-node by node 1: it is not on the settled roster"):
        server.contribute(1, message)


def test_a_buffer_holds_two_more_than_may_collude() -> None:
    with pytest.raises(LocalError, match="goal must be at least privacy"):
        replace(TERMS, goal=TERMS.privacy + 1)
    assert replace(TERMS, goal=TERMS.privacy + 2).goal == 3


def test_weights_far_apart_would_be_digits_of_the_sum() -> None:
    replace(TERMS, weights=(256, 3, 1))
    for weights in ((1, 257), (1 << 16, 1), (2, 513)):
        with pytest.raises(LocalError, match="factor of 256"):
            replace(TERMS, weights=weights)
