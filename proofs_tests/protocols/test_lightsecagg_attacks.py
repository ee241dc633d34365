"""Attacks on LightSecAgg: a server or a node deviates at some step, and honest parties abort naming the deviation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from privfed.audit.rehearsal import Role, Run, identities, stream
from privfed.protocols import codec, keys
from privfed.protocols.errors import LocalError
from privfed.protocols.lightsecagg import LightSecAgg, messages
from privfed.protocols.lightsecagg.messages import Advertisement, Terms
from privfed.protocols.lightsecagg.secret import Secrets
from privfed.protocols.session import Identity, Policy
from proofs_tests.protocols.lightsecagg_rehearsal import ACTIVE, LOW_ORDER, PASSIVE, refusal, remade, role


@pytest.fixture(scope="module")
def run() -> Run:
    """An honest session, every step of which the attacks replay with something changed."""
    return ACTIVE.run()


@pytest.fixture(scope="module")
def passive() -> Run:
    return PASSIVE.run()


# --- advertise: the terms -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "deviation"),
    [
        (Policy(min_cohort=5), "cohort-too-small"),
        (Policy(min_neighbours=4), "too-few-neighbours"),
        (Policy(min_threshold=4), "threshold-too-low"),
        (Policy(min_bits=17), "modulus-too-small"),
        (Policy(min_round=2), "round-not-rising"),
    ],
)
def test_floors_hold(policy: Policy, deviation: str) -> None:
    assert refusal(replace(ACTIVE, policy=policy).run) == (deviation, (0,))


def first_request(protocol: LightSecAgg, **change: object) -> bytes:
    session = replace(ACTIVE.session(), **change)  # type: ignore[arg-type]  # names checked by replace
    terms = Terms(session, *protocol.resolve(len(session.nodes)))
    return messages.sealed(messages.ADVERTISE, terms.digest(), terms.encode())


@pytest.mark.parametrize(
    ("protocol", "change", "deviation"),
    [
        (LightSecAgg(4), {}, "parameters-differ"),
        (LightSecAgg(3, 0), {}, "parameters-differ"),
        (LightSecAgg(), {"bits": 1}, "modulus-too-small"),
        (LightSecAgg(), {"nodes": (4, 5, 6)}, "foreign-session"),
        (LightSecAgg(), {"nodes": (3, 4, 5, 6, 77)}, "foreign-node"),
        (LightSecAgg(), {"dimension": 2**40}, "malformed-request"),
    ],
)
def test_terms_the_node_did_not_agree_to(
    protocol: LightSecAgg, change: dict[str, object], deviation: str, run: Run
) -> None:
    """Lowered or raised parameters, modulus 2, a session of others, and a Sybil that the roster does not have."""
    attacked = role(run, "advertise")
    assert refusal(lambda: attacked.step(first_request(protocol, **change))) == (deviation, (0,))


def test_terms_are_bound_to_their_digest(run: Run) -> None:
    """A server changes the terms behind the digest: the node would sign what the others do not."""
    attacked = role(run, "advertise")
    changed = first_request(LightSecAgg(), dimension=4)
    request = attacked.request[:33] + changed[33:]
    assert refusal(lambda: attacked.step(request))[0] == "malformed-request"


def test_a_cohort_no_parameters_suit_is_the_servers_fault() -> None:
    client = LightSecAgg(4).client(3, random=stream("x"))
    request = first_request(LightSecAgg(3), nodes=(3, 4, 5))
    assert refusal(lambda: client.step(b"", request, lambda: np.zeros(5, np.uint64))) == (
        "parameters-differ",
        (0,),
    )


def test_identities_must_be_the_rosters() -> None:
    known = identities((3, 4, 5))
    roster = known[3].roster
    with pytest.raises(LocalError, match="identity"):
        LightSecAgg().client(3, identity=Identity(3, bytes(32), roster))
    with pytest.raises(LocalError, match="identity"):
        LightSecAgg().client(4, identity=known[3])
    with pytest.raises(LocalError, match="active"):
        LightSecAgg().client(3, policy=Policy(require_active=True))


def test_active_security_wants_lying_reveals_noticed() -> None:
    """As many as the policy assumes to collude, and one at least."""
    nodes = (3, 4, 5, 6, 7, 8, 9)
    known = identities(nodes)
    for liars, corrupt, refused in ((0, 0.0, True), (1, 0.0, False), (1, 2 / 7, True), (2, 2 / 7, False)):
        protocol = LightSecAgg(5, liars=liars)
        policy = Policy(require_active=True, corrupt=corrupt)
        client = protocol.client(3, identity=known[3], policy=policy, random=stream("x"))
        request = first_request(protocol, nodes=nodes)
        if refused:
            told = refusal(partial(client.step, b"", request, lambda: np.zeros(5, np.uint64)))
            assert told == ("reveals-unchecked", (0,))
        else:
            assert client.step(b"", request, lambda: np.zeros(5, np.uint64))[1]


# --- share: the keys ------------------------------------------------------------------------------------------


def advertisements(run: Run) -> dict[int, Advertisement]:
    rows = codec.decode(run.requests[1][3][33:], lambda r: r.table(Advertisement.SIZE))
    return {node: Advertisement.decode(raw) for node, raw in rows.items()}


def shown(run: Run, changed: dict[int, Advertisement | None], node: int = 3) -> tuple[str, tuple[int, ...]]:
    """What the node says to a roster in which some entries are replaced, or missing."""
    attacked = role(run, "share", node)
    rows = {**advertisements(run), **changed}
    table = codec.table((n, a.encode()) for n, a in rows.items() if a is not None)
    return refusal(lambda: attacked.step(remade(attacked, table)))


def test_a_key_the_node_did_not_sign(run: Run) -> None:
    theirs = advertisements(run)
    evil = keys.exchange_public(b"e" * 32)
    assert shown(run, {4: replace(theirs[4], public_key=evil)}) == ("bad-signature", (0, 4))
    assert shown(run, {4: theirs[5]}) == ("unknown-identity", (0, 4))


def test_a_key_signed_by_another_identity(run: Run) -> None:
    theirs = advertisements(run)
    evil = replace(theirs[4], public_key=keys.exchange_public(b"e" * 32), verify_key=keys.signing_public(b"e" * 32))
    assert shown(run, {4: evil.sign(4, b"e" * 32)}) == ("unknown-identity", (0, 4))


def test_the_nodes_own_key_changed(run: Run) -> None:
    own = advertisements(run)[3]
    secret = identities(ACTIVE.nodes)[3].secret_key
    changed = replace(own, public_key=keys.exchange_public(b"e" * 32)).sign(3, secret)
    assert shown(run, {3: changed}) == ("swapped-key", (0,))


@pytest.mark.parametrize("point", LOW_ORDER)
def test_a_peer_offers_a_point_of_low_order(point: bytes, run: Run) -> None:
    secret = identities(ACTIVE.nodes)[4].secret_key
    weak = replace(advertisements(run)[4], public_key=point).sign(4, secret)
    assert shown(run, {4: weak}) == ("low-order-key", (4,))


def test_two_nodes_with_one_key(passive: Run) -> None:
    """Without identities the server could let one node count twice."""
    secrets = Secrets(passive.kept[1][4][0][:32], role(passive, "share").request[1:33])
    twin = advertisements(passive)[4].sign(5, secrets.signing_key())
    assert shown(passive, {5: twin}) == ("duplicate-key", (4, 5))


def test_an_advertisement_is_its_nodes_only(passive: Run) -> None:
    assert shown(passive, {5: advertisements(passive)[4]}) == ("bad-signature", (0, 5))


def test_models_that_differ_are_named(run: Run) -> None:
    """The server gives node 4 another model: its own signature tells the others."""
    session = replace(ACTIVE.session(), binding=b"\x66" * 32)
    other = LightSecAgg().server(session, random=stream("other")).outbound()[4]
    _, reply = ACTIVE.client(4, "one").step(b"", other, lambda: np.zeros(5, np.uint64))
    assert shown(run, {4: Advertisement.decode(memoryview(reply)[33:])}) == ("inconsistent-model", (0,))


def test_terms_that_differ_are_named(run: Run) -> None:
    session = replace(ACTIVE.session(), dimension=6)
    other = LightSecAgg().server(session, random=stream("other")).outbound()[4]
    _, reply = ACTIVE.client(4, "one").step(b"", other, lambda: np.zeros(5, np.uint64))
    assert shown(run, {4: Advertisement.decode(memoryview(reply)[33:])}) == ("inconsistent-session", (0,))


def test_keys_of_an_earlier_round(run: Run) -> None:
    old = advertisements(ACTIVE.run(label="two", round_offset=1))
    assert shown(run, {4: old[4]}) == ("inconsistent-session", (0,))


# --- share, mask, confirm: who is in ---------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["mask", "confirm"])
@pytest.mark.parametrize(
    ("nodes", "deviation"),
    [((3, 4, 5, 9), "foreign-node"), ((4, 5, 6), "left-out"), ((3, 4), "cohort-too-small")],
)
def test_sets_of_nodes_only_shrink_and_not_too_far(
    stage: str, nodes: tuple[int, ...], deviation: str, run: Run
) -> None:
    attacked = role(run, stage)
    assert refusal(lambda: attacked.step(remade(attacked, codec.node_list(nodes)))) == (deviation, (0,))


def test_advertisers_are_few_or_foreign(run: Run) -> None:
    theirs = advertisements(run)
    assert shown(run, {4: None, 5: None}) == ("cohort-too-small", (0,))
    assert shown(run, {9: theirs[4]}) == ("foreign-node", (0,))
    assert shown(run, {3: None}) == ("left-out", (0,))


def test_the_policys_cohort_holds_at_every_stage() -> None:
    """min_cohort 4 of 4 nodes, threshold 3: losing one is enough for the protocol, not for the node."""
    strict = replace(ACTIVE, policy=Policy(min_cohort=4))
    for stage in (0, 1, 2):
        assert refusal(partial(strict.run, vanish={6: stage}))[0] == "cohort-too-small"


@pytest.mark.parametrize("nodes", [(3, 3, 4, 5), (5, 4, 3), (0, 3, 4, 5)])
def test_lists_of_nodes_have_one_encoding(nodes: tuple[int, ...], run: Run) -> None:
    attacked = role(run, "confirm")
    body = codec.u32(len(nodes)) + b"".join(codec.u64(node) for node in nodes)
    assert refusal(lambda: attacked.step(remade(attacked, body)))[0] == "malformed-request"


# --- reveal: what is opened ------------------------------------------------------------------------------------


@dataclass
class Reveal:
    """A reveal request taken apart."""

    honest: Role

    def __post_init__(self) -> None:
        terms = Terms.decode(self.honest.lab.run().requests[0][3])
        size = LightSecAgg().server(terms.session, random=stream("s"))._sealed_size()
        self.signatures, self.shares = codec.decode(
            self.honest.request[33:], lambda r: (r.table(messages.SIGNATURE), r.table(size))
        )

    def refused(self, signatures: Iterable[int], shares: dict[int, memoryview]) -> tuple[str, tuple[int, ...]]:
        return self.told({node: self.signatures[node] for node in signatures}, shares)

    def told(self, signatures: dict[int, memoryview], shares: dict[int, memoryview]) -> tuple[str, tuple[int, ...]]:
        tables = (messages.encode_table(signatures.items()), messages.encode_table(shares.items()))
        return refusal(lambda: self.honest.step(remade(self.honest, *tables)))


def test_too_few_confirm_the_survivors(run: Run) -> None:
    reveal = Reveal(role(run, "reveal"))
    assert reveal.refused((3, 4), reveal.shares) == ("too-few-confirmations", (0,))
    assert reveal.refused((), reveal.shares) == ("too-few-confirmations", (0,))


def test_split_views_of_the_survivors_are_not_opened(run: Run) -> None:
    """The server tells node 3 that all survived and nodes 4, 5, 6 that node 3 did not, to open a difference."""
    fewer = ACTIVE.run(vanish={3: 2})
    reveal = Reveal(role(run, "reveal"))
    other = codec.decode(fewer.requests[4][4][33:], lambda r: (r.table(messages.SIGNATURE), r.rest()))[0]
    for liar in (4, 5, 6):
        told = {**{n: reveal.signatures[n] for n in (3, 4, 5, 6)}, liar: other[liar]}
        assert reveal.told(told, reveal.shares) == ("split-survivors", (0, liar))


def test_a_confirmation_of_the_same_survivors_under_other_keys() -> None:
    """Nodes 3, 4, 5 survive in both; in one session node 6 was shown among the advertisers, in the other not."""
    without, gone_later = ACTIVE.run(vanish={6: 0}), ACTIVE.run(vanish={6: 2})
    reveal = Reveal(role(gone_later, "reveal"))
    other = codec.decode(without.requests[4][4][33:], lambda r: (r.table(messages.SIGNATURE), r.rest()))[0]
    assert reveal.told({**reveal.signatures, 4: other[4]}, reveal.shares) == ("split-survivors", (0, 4))


def test_a_confirmation_by_someone_else(run: Run) -> None:
    reveal = Reveal(role(run, "reveal"))
    swapped = {**reveal.signatures, 4: reveal.signatures[5]}
    assert reveal.told(swapped, reveal.shares) == ("split-survivors", (0, 4))
    assert reveal.told({**reveal.signatures, 9: reveal.signatures[5]}, reveal.shares) == ("foreign-node", (0,))


def test_shares_that_are_not_the_survivors(run: Run) -> None:
    reveal = Reveal(role(run, "reveal"))
    signed = tuple(reveal.signatures)
    fewer = {node: share for node, share in reveal.shares.items() if node != 5}
    assert reveal.refused(signed, fewer) == ("wrong-shares", (0,))
    assert reveal.refused(signed, {**fewer, 7: reveal.shares[5]}) == ("wrong-shares", (0,))
    assert reveal.refused(signed, {3: reveal.shares[4], **reveal.shares}) == ("wrong-shares", (0,))


def test_a_flipped_swapped_or_misdirected_share(run: Run) -> None:
    reveal = Reveal(role(run, "reveal"))
    signed = tuple(reveal.signatures)
    share = bytes(reveal.shares[4])
    flipped = memoryview(bytes([share[0] ^ 1]) + share[1:])
    assert reveal.refused(signed, {**reveal.shares, 4: flipped}) == ("bad-share", (0, 4))
    assert reveal.refused(signed, {**reveal.shares, 4: reveal.shares[5]}) == ("bad-share", (0, 4))
    meant_for_5 = Reveal(role(run, "reveal", 5)).shares[4]
    assert reveal.refused(signed, {**reveal.shares, 4: meant_for_5}) == ("bad-share", (0, 4))
    other_session = Reveal(role(ACTIVE.run(label="two"), "reveal")).shares[4]
    assert reveal.refused(signed, {**reveal.shares, 4: other_session}) == ("bad-share", (0, 4))


def test_a_share_sealed_under_another_roster_of_keys_does_not_open(run: Run) -> None:
    """The transcript is in the sealing key: had the sender seen other advertisers, its share is no share here."""
    fewer = ACTIVE.run(vanish={6: 0})
    sent = codec.decode(fewer.replies[1][4][33:], lambda r: r.table(len(Reveal(role(run, "reveal")).shares[4])))
    reveal = Reveal(role(run, "reveal"))
    assert reveal.refused(tuple(reveal.signatures), {**reveal.shares, 4: sent[3]}) == ("bad-share", (0, 4))


def test_a_sum_is_opened_once(run: Run) -> None:
    opened = role(run, "reveal")
    assert refusal(lambda: opened.after(opened.request)) == ("session-over", (0,))
    for stage in ("advertise", "share", "mask", "confirm"):
        assert refusal(partial(role(run, stage).after, role(run, stage).request))[0] == "out-of-order"


def test_kept_state_of_something_else_is_the_callers_mistake(run: Run) -> None:
    taken = role(run, "mask")
    for kept in (b"x", taken.kept[:-1], taken.kept + b"\0"):
        with pytest.raises(LocalError, match="kept"):
            replace(taken, kept=kept).step(taken.request)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_changed_byte_of_any_request_is_refused(run: Run, data: st.DataObject) -> None:
    """With identities every byte that a node acts upon is signed, sealed, or checked against what it knows."""
    attacked = role(run, data.draw(st.sampled_from(ACTIVE.protocol.stages)), data.draw(st.sampled_from(ACTIVE.nodes)))
    place = data.draw(st.integers(0, len(attacked.request) - 1))
    changed = bytearray(attacked.request)
    changed[place] ^= data.draw(st.integers(1, 255))
    refusal(lambda: attacked.step(bytes(changed)))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(ACTIVE.protocol.stages), st.binary(max_size=300), st.booleans())
def test_arbitrary_bytes_are_refused(run: Run, stage: str, noise: bytes, headed: bool) -> None:
    attacked = role(run, stage)
    refusal(lambda: attacked.step(attacked.request[:33] + noise if headed else noise))


def test_a_step_repeated_from_what_was_kept_repeats_its_bytes(run: Run) -> None:
    """So that a crash between keeping and sending uses no key or nonce for a second text."""
    for taken in run.roles():
        if taken.kept:
            assert taken.step(taken.request) == run.replies[taken.stage][taken.node]
