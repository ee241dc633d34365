"""What a node knows of a session without the server, and what it fixed itself: no protocol joins any other."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privfed.audit.rehearsal import identities, stream
from privfed.protocols import LightSecAgg, OneShot, SecAgg, SecAggPlus
from privfed.protocols.errors import SERVER, LocalError, RemoteError
from privfed.protocols.lightsecagg.buffered import BufferedNode, BufferTerms
from privfed.protocols.secagg.messages import Terms
from privfed.protocols.session import FACTS, Policy, Protocol, Session
from privfed.protocols.shamir import P

NODES = tuple(range(1, 11))
SESSION = Session(7, 5, "train", NODES, 4, 32, b"m" * 32)
KNOWN = Policy(run=7, round=5, action="train", bits=32, dimension=4, binding=b"m" * 32)
OTHER: dict[str, Any] = {"run": 8, "round": 6, "action": "evaluate", "bits": 16, "dimension": 5}
PROTOCOLS: list[Protocol] = [
    SecAgg(threshold=6),
    SecAgg(threshold=8, mode="active"),
    SecAggPlus(neighbours=4, threshold=3),
    LightSecAgg(threshold=8),
    OneShot(threshold=7),
]


def no_input() -> Any:
    raise AssertionError("the input was asked for")


def refusal(protocol: Protocol, request: Any, policy: Policy = Policy(), node: int = 1) -> str:
    """Return the deviation a node names at its first request, "" when it joins."""
    client = protocol.client(node, identity=identities(NODES)[node], policy=policy, random=stream("facts"))
    try:
        client.step(b"", request, no_input if not isinstance(protocol, OneShot) else lambda: np.zeros(4, np.uint64))
    except RemoteError as fault:
        assert SERVER in fault.culprits
        return fault.deviation
    return ""


def asked(protocol: Protocol, session: Session) -> Any:
    return protocol.server(session, random=stream("server")).outbound()[1]


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=repr)
@pytest.mark.parametrize("fact", FACTS)
def test_another_fact_is_another_session(protocol: Protocol, fact: str) -> None:
    """The server opens a session that is right but for one fact; only a node that knows nothing of it joins."""
    told = replace(SESSION, **{fact: OTHER[fact]})
    assert refusal(protocol, asked(protocol, SESSION), KNOWN) == ""
    assert refusal(protocol, asked(protocol, told), KNOWN) == f"wrong-{fact}"
    alone = Policy(**{fact: getattr(SESSION, fact)})
    assert refusal(protocol, asked(protocol, told), alone) == f"wrong-{fact}"
    assert refusal(protocol, asked(protocol, SESSION), alone) == ""


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=repr)
def test_another_model_is_another_session(protocol: Protocol) -> None:
    told = replace(SESSION, binding=bytes(32))
    assert refusal(protocol, asked(protocol, told), KNOWN) == "inconsistent-model"


@given(st.sampled_from(FACTS), st.integers(0, 2**40), st.integers(0, 2**40))
def test_facts_are_compared_as_they_are(fact: str, known: int, told: int) -> None:
    """A fact 0 is a fact: only None is none."""
    if fact == "action":
        session, policy = replace(SESSION, action=str(told)), Policy(action=str(known))
    else:
        session = replace(SESSION, **{fact: told})  # type: ignore[arg-type]  # the numbers among the facts
        policy = Policy(max_dimension=2**41, **{fact: known})  # type: ignore[arg-type]  # likewise
    if known == told:
        policy.check_facts(session)
    else:
        with pytest.raises(RemoteError, match=f"wrong-{fact}"):
            policy.check_facts(session)


# --- vectors that nobody has room for


BOMBS = [SecAgg(threshold=6), SecAggPlus(neighbours=4, threshold=3), LightSecAgg(threshold=8), OneShot(threshold=7)]


def bomb(protocol: Protocol, dimension: int) -> bytes:
    """A server's own memory need not hold the vector it names: put the number into an honest request."""
    request = bytearray(asked(protocol, SESSION))
    at = request.index((4).to_bytes(8, "big") + bytes((32,)) + SESSION.binding)
    if isinstance(protocol, LightSecAgg):  # its request carries the digest of its terms
        from privfed.protocols.lightsecagg import messages

        terms = messages.Terms(replace(SESSION, dimension=dimension), 8, 5)
        return messages.sealed(messages.ADVERTISE, terms.digest(), terms.encode())
    request[at : at + 8] = dimension.to_bytes(8, "big")
    return bytes(request)


@pytest.mark.parametrize("protocol", BOMBS, ids=repr)
@pytest.mark.parametrize("dimension", [2**33, 2**36, 2**28 + 1])
def test_a_vector_beyond_the_ceiling_is_refused_and_makes_no_room(protocol: Protocol, dimension: int) -> None:
    """2^33 entries would be 32 GiB, at a stage at which no input exists yet."""
    request = bomb(protocol, dimension)
    tracemalloc.start()
    try:
        assert refusal(protocol, request) == "dimension-too-large"
        assert refusal(protocol, request, KNOWN) == "wrong-dimension"
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


def test_the_ceiling_is_the_nodes() -> None:
    for protocol in PROTOCOLS:
        assert refusal(protocol, asked(protocol, SESSION), Policy(max_dimension=4)) == (
            # 10 shares of ceil(4 / (3 * 4)) * 4 entries are more than four vectors of 4 entries
            "dimension-too-large" if isinstance(protocol, LightSecAgg) else ""
        )
        assert refusal(protocol, asked(protocol, SESSION), Policy(max_dimension=3)) == "dimension-too-large"
    with pytest.raises(ValueError, match="max_dimension"):
        Policy(max_dimension=-1)


def test_the_room_for_lightsecaggs_shares_is_bounded_too() -> None:
    """With privacy = threshold - 1 every node uploads a whole vector to every other: 10 vectors, not 4."""
    wide = LightSecAgg(threshold=8, privacy=5)  # 10 / 3 vectors
    session = replace(SESSION, dimension=1200)
    assert refusal(wide, asked(wide, session), Policy(max_dimension=1200)) == ""
    narrow = LightSecAgg(threshold=6, privacy=1)
    tight = LightSecAgg(threshold=10, privacy=9)
    assert refusal(narrow, asked(narrow, session), Policy(max_dimension=1200)) == ""
    assert refusal(tight, asked(tight, session), Policy(max_dimension=1200)) == "dimension-too-large"
    assert refusal(tight, asked(tight, session), Policy(max_dimension=3000)) == ""


# --- a buffered run is the node's own: its facts are checked before it joins


@pytest.mark.parametrize(
    ("policy", "name"),
    [
        (Policy(run=2), "run"),
        (Policy(bits=32), "bits"),
        (Policy(dimension=7), "dimension"),
        (Policy(max_dimension=7), "dimension"),
        (Policy(max_dimension=19), "dimension"),  # 4 shares of 21 entries
    ],
)
def test_a_buffered_run_of_other_facts_is_not_joined(policy: Policy, name: str) -> None:
    terms = BufferTerms(run=1, nodes=(1, 2, 3, 4), dimension=20, bits=16, threshold=3, privacy=1, goal=3)
    BufferedNode(terms, identities(terms.nodes)[1], Policy(run=1, bits=16, dimension=20))
    with pytest.raises(LocalError, match=name):
        BufferedNode(terms, identities(terms.nodes)[1], policy)


# --- parameters that a node fixed itself


def terms_of(degree: int, threshold: int, active: bool = False) -> bytes:
    return Terms(SESSION, degree, threshold, active).encode()


@pytest.mark.parametrize(
    ("own", "degree", "threshold", "deviation"),
    [
        (SecAgg(threshold=6), 0, 6, ""),
        (SecAgg(threshold=6), 0, 5, "parameters-differ"),
        (SecAgg(threshold=6), 0, 7, "parameters-differ"),
        (SecAgg(threshold=0.55), 0, 6, ""),
        (SecAgg(threshold=0.55), 0, 7, "parameters-differ"),
        (SecAgg(threshold=3), 4, 3, "parameters-differ"),
        (SecAgg(), 0, 9, ""),
        (SecAgg(), 4, 3, "parameters-differ"),
        (SecAggPlus(neighbours=4, threshold=3), 4, 3, ""),
        (SecAggPlus(neighbours=4, threshold=3), 4, 2, "parameters-differ"),
        (SecAggPlus(neighbours=4, threshold=3), 6, 3, "parameters-differ"),
        (SecAggPlus(neighbours=4, threshold=3), 2, 2, "parameters-differ"),
        (SecAggPlus(neighbours=4, threshold=3), 0, 3, "parameters-differ"),
        (SecAggPlus(neighbours=4), 4, 2, ""),
        (SecAggPlus(neighbours=4), 6, 2, "parameters-differ"),
        (SecAggPlus(threshold=0.75), 4, 3, ""),
        (SecAggPlus(threshold=0.75), 4, 2, "parameters-differ"),
        (SecAggPlus(threshold=0.75), 0, 8, ""),
        (SecAggPlus(threshold=0.75), 0, 7, "parameters-differ"),
        (SecAggPlus(neighbours=10, threshold=6), 0, 6, ""),  # the full graph, for 10 nodes
        (SecAggPlus(neighbours=10, threshold=6), 8, 6, "parameters-differ"),
        (SecAggPlus(), 4, 2, ""),
    ],
    ids=str,
)
def test_secagg_keeps_to_the_parameters_it_was_made_with(
    own: Protocol, degree: int, threshold: int, deviation: str
) -> None:
    assert refusal(own, terms_of(degree, threshold), KNOWN) == deviation


@pytest.mark.parametrize(("threshold", "deviation"), [(8, "parameters-differ"), (None, "")])
def test_and_so_in_active_mode(threshold: int | None, deviation: str) -> None:
    told = asked(SecAgg(threshold=9, mode="active"), SESSION)
    assert refusal(SecAgg(threshold=threshold, mode="active"), told, KNOWN) == deviation
    assert refusal(SecAggPlus(threshold=threshold, mode="active"), told, KNOWN) == deviation
    assert refusal(SecAgg(threshold=9, mode="active"), told, KNOWN) == ""


@pytest.mark.parametrize("protocol", [p for p in PROTOCOLS if not isinstance(p, SecAggPlus)], ids=repr)
def test_every_protocol_compares_the_threshold_with_its_own(protocol: Any) -> None:
    other = replace(protocol, threshold=protocol.threshold + 1)
    assert refusal(protocol, asked(other, SESSION), KNOWN) == "parameters-differ"


@pytest.mark.parametrize(
    ("maker", "parameters"),
    [
        (SecAgg, {"threshold": "5"}),
        (SecAggPlus, {"threshold": b"5"}),
        (SecAggPlus, {"neighbours": 4.0}),
        (LightSecAgg, {"threshold": "5"}),
        (LightSecAgg, {"privacy": 1.0}),
        (OneShot, {"corrupt": 0.0}),
        (OneShot, {"slots": 1.0}),
        (OneShot, {"bounded": 0}),
        (OneShot, {"committee": (1.0, 2.0)}),
    ],
)
def test_a_parameter_of_another_type_is_none(maker: Any, parameters: dict[str, Any]) -> None:
    """They come from the server: 0.0 equals 0, and would pass every comparison until it has to be encoded."""
    with pytest.raises(ValueError, match=next(iter(parameters))):
        maker(**parameters)


# --- terms that are no session's


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("degree", [1, 3, 5, 7, 9, 2**31 + 1])
def test_an_odd_degree_is_no_graph(degree: int, active: bool) -> None:
    """Only even degrees have a Harary graph: an error of the server's, never a bare ValueError two stages later."""
    own = SecAggPlus(mode="active", corrupt=0.0) if active else SecAggPlus()
    assert refusal(own, terms_of(degree, 2, active)) == "malformed"


@pytest.mark.parametrize("threshold", [2048, 2100])
def test_a_threshold_beyond_the_field_is_refused(threshold: int) -> None:
    crowd = replace(SESSION, nodes=tuple(range(1, 2201)))
    assert refusal(SecAgg(), Terms(crowd, 0, threshold, False).encode()) == "threshold-too-high"
    assert refusal(SecAgg(), Terms(crowd, 0, 2047, False).encode()) == ""


def test_more_nodes_than_share_points_are_refused() -> None:
    """Point p would be point 0, which is the secret itself."""
    crowd = replace(SESSION, nodes=tuple(range(1, P + 1)))
    assert refusal(SecAggPlus(), Terms(crowd, 4, 3, False).encode()) == "cohort-too-large"
    assert refusal(SecAggPlus(), Terms(replace(crowd, nodes=crowd.nodes[:-1]), 4, 3, False).encode()) == ""
