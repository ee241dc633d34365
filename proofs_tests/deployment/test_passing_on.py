"""A SuperLink that passes calls on: callers see what they would see at the other, and nobody speaks for another."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from privfed import ArrayRecord, run_simulation
from privfed.runtime.control import ControlClient, Listing
from privfed.runtime.credentials import Credentials
from privfed.runtime.fleet import FleetClient, FleetOptions
from privfed.runtime.frame import Hello, Waiting, Welcome, pack, unpack_down
from privfed.runtime.handshake import CALLER, TERM, NetworkError, agree, greeting
from privfed.runtime.oidc import Tokens
from privfed.runtime.run_folder import ENDED, RunFolder
from proofs_tests.deployment.identity_provider import bearer_of, place, token
from proofs_tests.deployment.local_link import nodes_at
from proofs_tests.deployment.local_pair import LocalPair
from proofs_tests.deployment.small_node import fresh
from proofs_tests.deployment.stateful_app import write_source
from proofs_tests.deployment.test_roles import Members
from proofs_tests.deployment.waiting import eventually

pytestmark = pytest.mark.postgres
RUNS, SESSION = "/privfed.Control/Runs", "/privfed.Fleet/Session"
HELLO = pack(Hello(slots=1, holding=(), runs=()))
LARGE = """
import numpy as np
from privfed import ArrayRecord, ClientApp, MetricRecord, Message, RecordDict, ServerApp
from privfed.strategies import FedAvg

client, server = ClientApp(), ServerApp()

@client.train()
def train(message, context):
    (weight,) = message.content["arrays"].to_numpy_ndarrays()
    arrays = ArrayRecord([weight + context.rng("train").random(weight.shape, np.float32)])
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

@server.main()
def main(grid, context):
    strategy = FedAvg(fraction_evaluate=0.0)
    strategy.start(grid, ArrayRecord([np.zeros(3_000_000, np.float32)]), num_rounds=context.run_config["num-rounds"])
"""


class Guarded:
    """A pair under mutual TLS, and who may call it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.members = Members(folder)
        self.links = self.members.join("link", "first"), self.members.join("link", "second")
        self.node, self.other = self.members.join("node", "a"), self.members.join("node", "b")
        self.gone, self.thief = self.members.join("node", "c"), self.members.join("link", "third")
        self.olga, self.vera = self.members.join("operator", "olga"), self.members.join("viewer", "vera")
        self.stranger = Members(folder / "other", "other").join("operator", "olga")
        for name in ("c", "third"):
            self.members.authority.revoke(name)
        for link in self.links:
            (link.folder / "roster.json").write_bytes(self.members.authority.roster_document)
            link.reload()
        (folder / "oidc").mkdir()
        self.pair = LocalPair(folder, self.links, Tokens(place(folder / "oidc")))


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    found = Guarded(tmp_path_factory.mktemp("pair"))
    with found.pair:
        yield found


def certificate(one: Credentials) -> bytes:
    return (one.folder / "certificate.pem").read_bytes()


def told(
    address: str, who: Credentials, method: str, request: bytes, extra: Iterable[tuple[str, str | bytes]] = ()
) -> tuple[grpc.StatusCode, str]:
    """Make a call by hand; return how it is refused, or OK with the number of frames."""
    with grpc.secure_channel(address, who.channel_credentials()) as channel:
        call = channel.stream_stream(method)(iter([request]), metadata=(*greeting(), *extra), timeout=20)
        try:
            return grpc.StatusCode.OK, str(len(list(call)))
        except grpc.RpcError as fault:
            return fault.code(), fault.details()


def test_only_a_superlink_passes_on_and_only_what_stands_by_itself(guarded: Guarded) -> None:
    pair = guarded.pair
    term = (TERM, pair.mark)

    def runs(
        who: Credentials, *extra: tuple[str, str | bytes], address: str = pair.serving["control"]
    ) -> tuple[grpc.StatusCode, str]:
        return told(address, who, RUNS, pack(Listing(limit=1)), extra)

    def session(who: Credentials, *extra: tuple[str, str | bytes]) -> tuple[grpc.StatusCode, str]:
        return told(pair.serving["fleet"], who, SESSION, HELLO, extra)

    codes = grpc.StatusCode
    link, olga = guarded.links[1], (CALLER, certificate(guarded.olga))
    assert runs(link, term, olga) == (codes.OK, "1"), "what a SuperLink does"
    # Who is none speaks for nobody, not even for itself, at the one that serves and at the one that passes on.
    for who, name in ((guarded.node, "node-1 is a node"), (guarded.vera, "user-vera is a viewer")):
        for address in (pair.serving["control"], pair.passing["control"]):
            for extra in ((term, olga), (term,), (olga,), (term, (CALLER, certificate(who)))):
                refused = f"{name} and passes on the call of another: only a SuperLink may"
                assert runs(who, *extra, address=address) == (codes.PERMISSION_DENIED, refused)
    claimed = session(guarded.node, term, (CALLER, certificate(guarded.other)))
    assert claimed == (
        codes.PERMISSION_DENIED,
        "node-1 is a node and passes on the call of another: only a SuperLink may",
    )
    # A SuperLink that was revoked passes nothing on.
    assert runs(guarded.thief, term, olga) == (codes.UNAUTHENTICATED, "the certificate of link-third is revoked")
    # Whom it passes on is judged as at the door.
    gone = session(link, term, (CALLER, certificate(guarded.gone)))
    assert gone == (codes.UNAUTHENTICATED, "the certificate of node-3 is revoked")
    assert session(guarded.gone) == gone
    code, text = runs(link, term, (CALLER, certificate(guarded.stranger)))
    assert code == codes.UNAUTHENTICATED and "was not issued by this federation's authority" in text
    code, text = runs(link, term, (CALLER, b"\x00nothing"))
    assert code == codes.UNAUTHENTICATED and "is no certificate in PEM" in text
    code, text = runs(link, term, (CALLER, certificate(guarded.node)))
    assert code == codes.PERMISSION_DENIED and text == runs(guarded.node)[1]
    code, text = runs(link, term, (CALLER, certificate(guarded.links[0])))
    assert code == codes.PERMISSION_DENIED and "link-first is a link; this listener serves" in text
    # Half a word is none.
    for extra in ((term,), (olga,)):
        code, text = runs(link, *extra)
        assert code == codes.UNAUTHENTICATED and "without its term or its caller's certificate" in text
    code, text = runs(link)
    assert code == codes.PERMISSION_DENIED and "link-second is a link; this listener serves" in text
    # Of another term, or by a SuperLink that does not know this one: it has no part in the database.
    for mark in ("0", pair.mark.partition("-")[0], pair.mark[:-1], pair.mark + "0"):
        code, text = runs(link, (TERM, mark), olga)
        assert code == codes.UNAVAILABLE and "another term" in text


def test_what_was_passed_on_is_not_passed_on_again(guarded: Guarded) -> None:
    pair = guarded.pair
    passed = (TERM, pair.mark), (CALLER, certificate(guarded.olga))
    for link in guarded.links:
        code, text = told(pair.passing["control"], link, RUNS, pack(Listing(limit=1)), passed)
        assert code == grpc.StatusCode.UNAVAILABLE and "takes no call that another one passes on" in text
    before = pair.listeners[1].values()["calls_passed_on_total"]
    assert told(pair.passing["control"], guarded.olga, RUNS, pack(Listing(limit=1)))[0] == grpc.StatusCode.OK
    assert pair.listeners[1].values()["calls_passed_on_total"] == before + 1


def test_the_one_that_passes_on_says_what_the_other_says(guarded: Guarded) -> None:
    pair = guarded.pair
    asked = pack(Listing(limit=1))
    cases: list[tuple[str, Credentials, str, bytes, tuple[tuple[str, str], ...]]] = [
        ("control", guarded.olga, RUNS, b"\xff", ()),
        ("control", guarded.node, RUNS, asked, ()),
        ("control", guarded.vera, "/privfed.Control/Node", b"", ()),
        ("control", guarded.olga, "/privfed.Control/Nothing", b"", ()),
        ("control", guarded.olga, "/privfed.Fleet/Session", HELLO, ()),
        ("fleet", guarded.gone, SESSION, HELLO, ()),
        ("fleet", guarded.olga, SESSION, HELLO, ()),
        ("fleet", guarded.node, "/privfed.Fleet/Run", b"", ()),
        ("fleet", guarded.node, "/privfed.Fleet/Send", b"", ()),
    ]
    for listener, *call in cases:
        there, here = (told(where[listener], *call) for where in (pair.serving, pair.passing))
        assert there[0] == here[0] != grpc.StatusCode.OK and here[1].endswith(there[1]), call
    with (
        pytest.raises(NetworkError, match="cannot be reached"),
        ControlClient(pair.passing["control"], guarded.stranger) as control,
    ):
        control.runs()
    # Oversize is refused before anybody is asked, and the version by both.
    code, _ = told(pair.passing["control"], guarded.olga, RUNS, bytes(5 << 20))
    assert code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
    with grpc.secure_channel(pair.passing["control"], guarded.olga.channel_credentials()) as channel:
        call = channel.stream_stream(RUNS)(iter([b""]), metadata=greeting(7, 9, "9.0.0"), timeout=20)
        with pytest.raises(grpc.RpcError, match="speaks protocol 7 to 9"):
            list(call)
        call = channel.stream_stream(RUNS)(iter([asked]), metadata=greeting(), timeout=20)
        assert len(list(call)) == 1 and agree(call.initial_metadata(), "it") == 2


def test_a_refusal_that_meets_a_frame_on_its_way_is_still_told(guarded: Guarded) -> None:
    """The other one ends the call while the frame is on its way, which gRPC alone would call an internal error."""
    for _ in range(150):
        code, text = told(guarded.pair.passing["fleet"], guarded.node, "/privfed.Fleet/Send", b"")
        assert code == grpc.StatusCode.UNAVAILABLE and text.endswith("node 1 has no session here"), text


def test_a_session_is_the_other_ones(guarded: Guarded) -> None:
    """A node's session, approval and revocation go through; an operator sees and decides at either."""
    pair = guarded.pair
    statuses: list[str] = []
    node = guarded.members.join("node", "late")
    client = FleetClient(pair.passing["fleet"], node, None, FleetOptions(on_status=statuses.append))
    eventually(lambda: any("approve" in text for text in statuses), 20)
    assert node.peer.node_id is not None
    with ControlClient(pair.passing["control"], guarded.olga) as control:
        control.approve(node.peer.node_id)
        eventually(lambda: any("connected to first as node 4" in text for text in statuses), 20)
        assert [row.node_id for row in control.nodes() if row.connected] == [4]
        assert set(pair.link.dispatcher.sessions) == {4}
        roster = guarded.members.authority
        roster.revoke("late")
        control.hand_roster(roster.roster_document)
    eventually(lambda: any("the certificate of node-4 is revoked" in text for text in statuses), 20)
    assert not pair.link.dispatcher.sessions
    client.close()
    eventually(lambda: pair.listeners[1].values()["connections_passed_on"] == 0, 20)


def test_a_waiting_node_is_told_so_through_either(guarded: Guarded) -> None:
    node = guarded.members.join("node", "patient")
    for where in (guarded.pair.serving, guarded.pair.passing):
        with grpc.secure_channel(where["fleet"], node.channel_credentials()) as channel:
            stream = channel.stream_stream(SESSION)(iter([HELLO]), metadata=greeting(), timeout=20)
            assert isinstance(unpack_down(next(stream)), Waiting | Welcome)
            stream.cancel()


def test_tokens_are_passed_on_as_they_are(guarded: Guarded) -> None:
    address = guarded.pair.passing["token-control"]
    with ControlClient(address, bearer_of(guarded.folder, "bearer", token())) as control:
        assert control.runs() == ()
    for number, (text, cause) in enumerate(((token(exp=1_000_000_000, iat=999_999_000), "expired"), ("x", "signed"))):
        bearer = bearer_of(guarded.folder, f"bad-{number}", text)
        with ControlClient(address, bearer) as control, pytest.raises(NetworkError, match=cause):
            control.runs()


def test_its_health_is_that_calls_are_served(guarded: Guarded) -> None:
    pair = guarded.pair
    with grpc.secure_channel(pair.passing["fleet"], guarded.node.channel_credentials()) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(service="privfed.Fleet"), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    monitor = f"http://{pair.passing['monitor']}"
    with urllib.request.urlopen(f"{monitor}/healthz", timeout=10) as answered:
        assert answered.status == 200
    with urllib.request.urlopen(f"{monitor}/metrics", timeout=10) as answered:
        assert b"privfed_calls_passed_on_total" in answered.read()


def test_a_superlink_that_is_revoked_is_cut_off_and_passes_nothing_on(guarded: Guarded) -> None:
    """The last test of this pair: sessions it had passed on end, too."""
    pair = guarded.pair
    statuses: list[str] = []
    client = FleetClient(pair.passing["fleet"], guarded.node, None, FleetOptions(on_status=statuses.append))
    eventually(lambda: 1 in pair.link.dispatcher.sessions, 20)
    (session,) = pair.link.dispatcher.sessions.values()
    guarded.members.authority.revoke("link-second")
    with ControlClient(pair.serving["control"], guarded.olga) as control:
        control.hand_roster(guarded.members.authority.roster_document)
    eventually(lambda: session not in pair.link.dispatcher.sessions.values(), 20)
    eventually(lambda: any("the certificate of link-second is revoked" in text for text in statuses), 20)
    assert 1 not in pair.link.dispatcher.sessions
    client.close()


def test_large_arrays_pass_both_ways_and_the_model_is_the_same(tmp_path: Path) -> None:
    """12 MB a round to and from each of two nodes, in acknowledged chunks, each byte once."""
    app = write_source(tmp_path / "app", LARGE, "large")
    with LocalPair(tmp_path, None, None) as pair:
        with nodes_at(pair.passing["fleet"], 2):
            name = pair.submit(app, 2, num_rounds=2)
            with ControlClient(pair.passing["control"]) as control:
                eventually(lambda: control.show(name).state in ENDED, 60)
                assert control.show(name).state == "completed"
        assert pair.link.fleet.bytes_up == 4 * 12_000_000
        assert pair.listeners[1].values()["calls_passed_on_total"] > 8
        (folder,) = (tmp_path / "shared").glob(f"term-*/runs/{name}")
        found = RunFolder.open(folder).restore()
    server, client = fresh(app)
    expected = run_simulation(server, client, 2, run_config={"num-rounds": 2}, seed=1).checkpoint
    assert found is not None and expected is not None and found.arrays == expected.arrays
    (weight,) = ArrayRecord(found.arrays).to_numpy_ndarrays()
    assert weight.shape == (3_000_000,) and np.all(weight > 0)
