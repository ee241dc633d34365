"""Buffered aggregation: exact weighted sums of stale updates, and a holder that opens each mask at most once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.audit.rehearsal import identities, stream
from privfed.protocols import codec, keys
from privfed.protocols.errors import LocalError, RemoteError, TooFewSurvivors
from privfed.protocols.lightsecagg import buffered, messages
from privfed.protocols.lightsecagg.buffer import BufferedServer, WeightedSum
from privfed.protocols.lightsecagg.buffered import BufferedNode, BufferTerms, Memory
from privfed.protocols.lightsecagg.exact import Words
from privfed.protocols.lightsecagg.messages import Advertisement
from privfed.protocols.session import Buffer, Policy

TERMS = BufferTerms(
    run=7, nodes=(1, 2, 3, 4, 5), dimension=9, bits=32, threshold=4, privacy=1, weights=(8, 4, 2), goal=3,
    per_version=1,
)  # fmt: skip
BINDINGS = {version: bytes([version]) * 32 for version in range(40)}


@dataclass
class Run:
    """A settled run whose nodes keep their state here."""

    terms: BufferTerms = TERMS
    nodes: dict[int, BufferedNode] = field(default_factory=dict)
    kept: dict[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = identities(self.terms.nodes)
        self.server = BufferedServer(self.terms, roster=known[1].roster, random=stream("server"))
        for node, identity in known.items():
            self.nodes[node] = BufferedNode(self.terms, identity, random=stream(f"node {node}"))
            self.kept[node], message = self.nodes[node].join()
            self.server.join(node, message)
        self.roster = self.server.settle()
        for node in self.nodes:
            self.kept[node] = self.nodes[node].settle(self.kept[node], self.roster)

    def contribute(self, node: int, version: int, vector: Words | None = None) -> bytes:
        given = update(node, version) if vector is None else vector
        self.kept[node], message = self.nodes[node].contribute(self.kept[node], version, BINDINGS[version], given)
        self.server.contribute(node, message)
        return message

    def confirm(self, node: int, request: Buffer) -> None:
        self.kept[node], message = self.nodes[node].confirm(self.kept[node], request)
        self.server.confirmed(node, message)

    def open(self, node: int, request: Buffer) -> None:
        self.kept[node], message = self.nodes[node].open(self.kept[node], request)
        self.server.opened(node, message)

    def buffer(self, current: int, confirm: set[int] | None = None, open: set[int] | None = None) -> WeightedSum:
        for node, request in self.server.begin(current).items():
            if confirm is None or node in confirm:
                self.confirm(node, request)
        for node, request in self.server.ask().items():
            if open is None or node in open:
                self.open(node, request)
        return self.server.finish()


def update(node: int, version: int) -> Words:
    vector: Words = np.random.default_rng(100 * node + version).integers(0, 2**32, 9, dtype=np.uint32)
    return vector


def expected(members: dict[int, int], current: int) -> Words:
    total = np.zeros(9, dtype=np.uint64)
    for node, version in members.items():
        total += update(node, version).astype(np.uint64) * np.uint64(TERMS.weight(current, version))
    return total & np.uint64(2**32 - 1)


def test_two_buffers_with_stale_updates_and_the_least_of_holders() -> None:
    run = Run()
    for node, version in ((1, 3), (2, 5), (4, 4)):
        run.contribute(node, version)
    assert run.server.waiting == {1: 3, 2: 5, 4: 4} and run.server.ready(5) and not run.server.ready(6)
    found = run.buffer(5, open={1, 2, 3, 5})
    np.testing.assert_array_equal(found.total, expected({1: 3, 2: 5, 4: 4}, 5))
    assert (found.weights, found.denominator) == ({1: 2, 2: 8, 4: 4}, 14)
    for node, version in ((1, 5), (3, 6), (5, 6), (2, 7)):
        run.contribute(node, version)
    found = run.buffer(6, confirm={1, 2, 3, 4})
    np.testing.assert_array_equal(found.total, expected({1: 5, 3: 6, 5: 6}, 6))
    assert run.server.waiting == {2: 7}  # trained ahead of this buffer: it waits


@settings(max_examples=15, deadline=None)
@given(st.dictionaries(st.sampled_from(TERMS.nodes), st.integers(0, 2), min_size=3), st.data())
def test_any_buffer_and_any_holders(staleness: dict[int, int], data: st.DataObject) -> None:
    run = Run()
    members = {node: 9 - behind for node, behind in staleness.items()}
    for node, version in members.items():
        run.contribute(node, version)
    holders = set(data.draw(st.permutations(TERMS.nodes))[: data.draw(st.integers(3, 5))])
    if len(holders) < TERMS.threshold:
        with pytest.raises(TooFewSurvivors):
            run.buffer(9, open=holders)
    else:
        np.testing.assert_array_equal(run.buffer(9, open=holders).total, expected(members, 9))


def test_too_few_updates_or_signatures_open_nothing() -> None:
    run = Run()
    run.contribute(1, 1)
    run.contribute(2, 1)
    with pytest.raises(TooFewSurvivors) as caught:
        run.server.begin(1)
    assert (caught.value.have, caught.value.threshold) == (2, 3)
    run.contribute(3, 1)
    with pytest.raises(TooFewSurvivors) as caught:
        run.buffer(1, confirm={1, 2, 3})
    assert (caught.value.have, caught.value.threshold, caught.value.stage) == (3, 4, "confirm")


def filled(current: int = 2) -> tuple[Run, Buffer]:
    """A run with updates of nodes 1, 2, 3 at version 2, and the request to confirm them."""
    run = Run()
    for node in (1, 2, 3):
        run.contribute(node, 2)
    return run, run.server.begin(current)[5]


def rewrite(request: Buffer, current: int | None = None, **change: object) -> bytes:
    """The same buffer with another version, or with its first entry changed."""
    digest = bytes(memoryview(request)[1:33])
    at, entries = messages.body(request, buffered.BUFFER, digest, buffered.read_buffer)
    entries = (replace(entries[0], **change), *entries[1:])  # type: ignore[arg-type]  # names checked by replace
    return messages.sealed(buffered.BUFFER, digest, buffered.listing(at if current is None else current, entries))


def refusal(run: Run, request: Buffer, node: int = 5, step: str = "confirm") -> str:
    with pytest.raises(RemoteError) as caught:
        getattr(run.nodes[node], step)(run.kept[node], request)
    assert 0 in caught.value.culprits
    return caught.value.deviation


def test_a_staleness_the_node_did_not_sign_is_refused() -> None:
    run, request = filled()
    assert refusal(run, rewrite(request, version=1)) == "bad-signature"
    assert refusal(run, rewrite(request, binding=bytes(32))) == "bad-signature"


def test_versions_beyond_the_table_or_in_the_future_are_refused() -> None:
    run, request = filled()
    assert refusal(run, rewrite(request, current=5)) == "too-stale"
    assert refusal(run, rewrite(request, current=1)) == "too-stale"


def test_a_foreign_node_and_a_small_buffer_are_refused() -> None:
    run, request = filled()
    digest = bytes(request[1:33])
    current, entries = messages.body(request, buffered.BUFFER, digest, buffered.read_buffer)

    def listing(rows: tuple[tuple[int, bytes], ...]) -> bytes:
        number = current.to_bytes(8, "big")
        return messages.sealed(buffered.BUFFER, digest, number, messages.encode_table(rows))

    rows = tuple((entry.node, entry.encode()) for entry in entries)
    assert refusal(run, listing((*rows, (9, rows[0][1])))) == "foreign-node"
    assert refusal(run, listing(rows[:2])) == "cohort-too-small"
    assert refusal(run, listing((rows[0], rows[0], rows[1]))) == "malformed-request"


def test_a_mask_is_opened_once_even_in_another_buffer() -> None:
    run, request = filled()
    run.confirm(5, request)
    assert refusal(run, request) == "version-not-rising"
    assert refusal(run, rewrite(request, current=3)) == "opened-before"


def test_one_version_is_one_model() -> None:
    run = Run()
    run.contribute(1, 2)
    run.contribute(2, 2)
    run.kept[3], message = run.nodes[3].contribute(run.kept[3], 2, bytes(32), update(3, 2))
    run.server.contribute(3, message)
    assert refusal(run, run.server.begin(2)[5]) == "inconsistent-model"


def test_a_holder_opens_only_what_it_signed_and_once() -> None:
    run, request = filled()
    for node in (1, 2, 3, 4):
        run.confirm(node, request)
    asked = run.server.ask()
    assert refusal(run, asked[4], node=5, step="open") == "unconfirmed-buffer"
    run.open(4, asked[4])
    assert refusal(run, asked[4], node=4, step="open") == "unconfirmed-buffer"


def parts(request: Buffer) -> tuple[bytes, bytes, messages.Table, messages.Table]:
    """An open request taken apart: head with listing, listing alone, signatures, shares."""
    digest, size = bytes(memoryview(request)[1:33]), TERMS.sealed_size
    (current, entries), signed, shares = messages.body(
        request,
        buffered.OPEN,
        digest,
        lambda r: (buffered.read_buffer(r), r.table(messages.SIGNATURE), r.table(size)),
    )
    return digest, buffered.listing(current, entries), signed, shares


def test_signatures_and_shares_are_checked_before_opening() -> None:
    run, request = filled()
    for node in (1, 2, 3, 4, 5):
        run.confirm(node, request)
    digest, listing, signed, shares = parts(run.server.ask()[5])

    def asked(signed: messages.Table, shares: messages.Table) -> bytes:
        tables = (messages.encode_table(signed.items()), messages.encode_table(shares.items()))
        return messages.sealed(buffered.OPEN, digest, listing, *tables)

    def judged(signed: messages.Table, shares: messages.Table) -> str:
        return refusal(run, asked(signed, shares), step="open")

    assert judged({**signed, 1: signed[2]}, shares) == "split-buffer"
    assert judged({node: signed[node] for node in (1, 2, 3)}, shares) == "too-few-confirmations"
    assert judged({**signed, 8: signed[1]}, shares) == "foreign-node"
    assert judged(signed, {node: shares[node] for node in (1, 2)}) == "wrong-shares"
    assert judged(signed, {**shares, 1: shares[2]}) == "bad-share"
    assert refusal(run, asked(signed, shares) + b"\0", step="open") == "malformed-request"
    run.open(5, asked(signed, shares))


def test_a_version_is_contributed_once() -> None:
    run = Run()
    run.contribute(1, 2)
    for version in (2, 1):
        with pytest.raises(LocalError, match="version"):
            run.contribute(1, version)


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


def test_the_server_names_nodes_that_break_a_rule() -> None:
    run = Run()
    message = run.contribute(1, 2)
    for broken, name in (
        (message[:-1], "malformed-reply"),
        (message + b"\0", "malformed-reply"),
        (message, "version-not-rising"),
    ):
        with pytest.raises(RemoteError, match=f"{name} by node 1"):
            run.server.contribute(1, broken)
    with pytest.raises(RemoteError, match="wrong-shares by node 2"):
        run.server.contribute(2, message)
    _, other = run.nodes[2].contribute(run.kept[2], 2, BINDINGS[2], update(2, 2))
    with pytest.raises(RemoteError, match="bad-signature by node 2"):
        run.server.contribute(2, other[:80] + bytes([other[80] ^ 1]) + other[81:])
    with pytest.raises(RemoteError, match="foreign-node by node 9"):
        run.server.contribute(9, message)
    run.contribute(2, 2)
    run.contribute(3, 2)
    requests = run.server.begin(2)
    _, signature = run.nodes[1].confirm(run.kept[1], requests[1])
    with pytest.raises(RemoteError, match="bad-confirmation by node 2"):
        run.server.confirmed(2, signature)
    with pytest.raises(RemoteError, match="foreign-node by node 1"):
        run.server.opened(1, signature)


def test_a_wrong_share_sum_is_noticed_when_more_than_the_threshold_answer() -> None:
    run, request = filled()
    for node in TERMS.nodes:
        run.confirm(node, request)
    for node, asked in run.server.ask().items():
        _, message = run.nodes[node].open(run.kept[node], asked)
        run.server.opened(node, message if node != 3 else message[:-1] + bytes([message[-1] ^ 1]))
    with pytest.raises(RemoteError, match="inconsistent-shares"):
        run.server.finish()


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


@pytest.mark.parametrize(
    "bad", [np.zeros(8, np.uint32), np.zeros(9, np.int32), np.full(9, 1 << 32, np.uint64)], ids=str
)
def test_updates_that_are_no_ring_vectors_are_the_callers_mistake(bad: Words) -> None:
    with pytest.raises(LocalError, match="update"):
        Run().contribute(1, 1, bad)


def test_a_binding_has_32_bytes() -> None:
    run = Run()
    with pytest.raises(LocalError, match="version"):
        run.nodes[1].contribute(run.kept[1], 1, b"", update(1, 1))


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


def test_buffers_move_forward_and_answers_do_not_change() -> None:
    run, request = filled()
    for node in TERMS.nodes:
        run.confirm(node, request)
    for node, asked in run.server.ask().items():
        run.kept[node], message = run.nodes[node].open(run.kept[node], asked)
        run.server.opened(node, message)
        run.server.opened(node, message)  # the same again changes nothing
        with pytest.raises(RemoteError, match=f"second-reply by node {node}"):
            run.server.opened(node, message[:-1] + bytes([message[-1] ^ 1]))
    np.testing.assert_array_equal(run.server.finish().total, expected({1: 2, 2: 2, 3: 2}, 2))
    for node in (1, 2, 3):
        run.contribute(node, 3)
    with pytest.raises(LocalError, match="version must exceed 2"):
        run.server.begin(2)
    np.testing.assert_array_equal(run.buffer(4).total, expected({1: 3, 2: 3, 3: 3}, 4))


def test_a_version_stays_the_model_it_was_for_a_node() -> None:
    """Two buffers, each of one model for itself, and a version that is another model in the second."""
    run = Run()
    for node in (1, 2, 3):
        run.contribute(node, 3)
    run.buffer(3)
    for node in (4, 5):
        forged = replace(Memory.decode(run.kept[node]), models={}).encode()  # as if it had not seen the first buffer
        _, message = run.nodes[node].contribute(forged, 3, bytes(32), update(node, 3))
        run.server.contribute(node, message)
    run.contribute(1, 4)
    request = run.server.begin(4)[2]
    assert refusal(run, request, node=2) == "inconsistent-model"


def test_a_node_holds_a_buffer_to_the_model_it_trained_on_itself() -> None:
    run = Run()
    run.contribute(5, 2)
    for node in (1, 2, 3):
        run.kept[node], message = run.nodes[node].contribute(run.kept[node], 2, bytes(32), update(node, 2))
        run.server.contribute(node, message)
    rows = run.server.begin(2)[5]
    digest = bytes(rows[1:33])
    current, entries = messages.body(rows, buffered.BUFFER, digest, buffered.read_buffer)
    others = buffered.listing(current, tuple(entry for entry in entries if entry.node != 5))
    assert refusal(run, messages.sealed(buffered.BUFFER, digest, others), node=5) == "inconsistent-model"


def test_a_node_trains_no_version_that_was_another_model_before() -> None:
    run = Run()
    for node in (1, 2, 3):
        run.contribute(node, 3)
    run.buffer(3)
    with pytest.raises(RemoteError, match="inconsistent-model"):
        run.nodes[4].contribute(run.kept[4], 3, bytes(32), update(4, 3))
    assert Memory.decode(run.kept[4]).models == {3: BINDINGS[3]}
    for node in (1, 2, 3):
        run.contribute(node, 9)
    run.buffer(9)
    assert Memory.decode(run.kept[4]).models == {9: BINDINGS[9]}, "what no buffer can hold any more is forgotten"


def test_a_buffer_holds_two_more_than_may_collude() -> None:
    with pytest.raises(LocalError, match="goal must be at least privacy"):
        replace(TERMS, goal=TERMS.privacy + 1)
    assert replace(TERMS, goal=TERMS.privacy + 2).goal == 3


def test_a_model_is_trained_on_once_whatever_its_version_is_called() -> None:
    """Two buffers over updates of one model would differ by what a single node sent."""
    run = Run()
    for node in TERMS.nodes:
        run.contribute(node, 3)
    run.buffer(3)
    run.contribute(1, 20)  # long after, when nothing stale is remembered
    for binding, version in ((BINDINGS[3], 21), (BINDINGS[20], 22)):
        with pytest.raises(RemoteError, match="repeated-model"):
            run.nodes[1].contribute(run.kept[1], version, binding, update(1, version))
    run.contribute(1, 23)


def test_weights_far_apart_would_be_digits_of_the_sum() -> None:
    replace(TERMS, weights=(256, 3, 1))
    for weights in ((1, 257), (1 << 16, 1), (2, 513)):
        with pytest.raises(LocalError, match="factor of 256"):
            replace(TERMS, weights=weights)


def test_a_server_that_makes_a_model_up_for_every_node_does_not_learn_its_update() -> None:
    """Node 1 trains, 2 and 3 are given models without a gradient under other versions: the sum would be 1's update."""
    dead = np.zeros(9, np.uint32)
    for terms in (TERMS, replace(TERMS, per_version=None), replace(TERMS, per_version=2)):
        run = Run(terms)
        run.contribute(1, 3)
        run.contribute(2, 4, dead)
        run.contribute(3, 5, dead)
        if terms.alike == 1:
            np.testing.assert_array_equal(run.buffer(5).total, expected({1: 3}, 5))
            continue
        assert not run.server.ready(5)
        with pytest.raises(TooFewSurvivors):
            run.server.begin(5)
        run.server._terms = replace(terms, per_version=1)
        assert refusal(run, run.server.begin(5)[5]) == "lonely-version"


def test_an_update_alone_in_its_version_waits_for_company_and_not_for_ever() -> None:
    run = Run(replace(TERMS, goal=3, privacy=0, per_version=None))
    for node, version in ((1, 5), (2, 5), (3, 5), (4, 4)):
        run.contribute(node, version)
    found = run.buffer(5)
    assert found.weights == {1: 8, 2: 8, 3: 8}
    assert run.server.waiting == {4: 4}, "it has a weight for one version more"
    for node in (1, 2, 3):
        run.contribute(node, 6)
    run.contribute(5, 4)
    assert run.buffer(6).weights == {1: 8, 2: 8, 3: 8, 4: 2, 5: 2}
    run.contribute(5, 5)
    for node in (1, 2, 3):
        run.contribute(node, 8)
    assert run.buffer(8).weights == {1: 8, 2: 8, 3: 8}
    assert run.server.waiting == {}, "it has a weight in no buffer to come"
