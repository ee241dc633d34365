"""Mutual TLS at a SuperLink: who may do what, and who may do nothing any more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import msgspec
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from privfed.runtime.audit_log import verify_log
from privfed.runtime.authority import Authority, make_request
from privfed.runtime.control import ControlClient, Submission
from privfed.runtime.credentials import Credentials, accept_answer
from privfed.runtime.federation import open_app
from privfed.runtime.fleet import FleetClient, FleetOptions
from privfed.runtime.gate import MAX_REASONS
from privfed.runtime.handshake import NetworkError, Refused
from privfed.runtime.superlink import SuperLink, SuperLinkError, SuperLinkOptions
from proofs_tests.deployment.local_link import EXAMPLES, FreshLauncher, LocalLink
from proofs_tests.deployment.waiting import eventually


class Members:
    """An authority and whoever joined it."""

    def __init__(self, folder: Path, name: str = "test") -> None:
        self.folder = folder
        self.authority = Authority.create(folder / "authority", name)

    def join(self, role: str, name: str) -> Credentials:
        place = self.folder / name
        make_request(place, role, name, ["127.0.0.1"] if role == "link" else ())
        _, answer = self.authority.answer((place / "request.json").read_bytes())
        accept_answer(place, msgspec.json.encode(answer))
        return Credentials.load(place)


@pytest.fixture
def members(tmp_path: Path) -> Members:
    return Members(tmp_path / "keys")


@pytest.fixture
def link(tmp_path: Path, members: Members) -> Iterator[LocalLink]:
    with LocalLink(tmp_path / "home", members.join("link", "main")) as link:
        yield link


def control(link: LocalLink, credentials: Credentials | None) -> ControlClient:
    return ControlClient(link.control, credentials)


def connected(link: LocalLink, credentials: Credentials) -> tuple[FleetClient, list[str]]:
    statuses: list[str] = []
    return FleetClient(link.fleet, credentials, None, FleetOptions(on_status=statuses.append)), statuses


def test_who_mistakes_a_listener_or_comes_without_keys_is_told_what_to_look_at(
    link: LocalLink, members: Members
) -> None:
    """They were told that a method was not found, and to look whether the SuperLink is running."""
    with (
        ControlClient(link.fleet, members.join("viewer", "vera")) as vera,
        pytest.raises(NetworkError, match="nodes connect where the SuperLink has --fleet, users where it has --con"),
    ):
        list(vera.nodes())
    statuses: list[str] = []
    told = FleetOptions(on_status=statuses.append)
    client = FleetClient(link.control, members.join("node", "hospital-a"), None, told)
    with pytest.raises(Refused, match="nodes connect where the SuperLink has --fleet"):
        client.receive(20)
    client.close()
    with control(link, None) as nobody, pytest.raises(NetworkError, match="serve with keys and this side call without"):
        list(nobody.nodes())


def test_a_node_is_served_only_once_it_is_approved_or_in_the_roster(link: LocalLink, members: Members) -> None:
    node = members.join("node", "hospital-a")
    client, statuses = connected(link, node)
    eventually(lambda: "node 1 waits for approval: the operator runs `privfed node approve 1`" in statuses)
    with control(link, members.join("operator", "olga")) as operator:
        assert [(row.name, row.state, row.connected) for row in operator.nodes()] == [("hospital-a", "waiting", False)]
        operator.approve(1)
        eventually(lambda: "connected to main as node 1" in statuses)
        # A node that joins later is served as soon as the signed roster names it.
        other = members.join("node", "hospital-b")
        second, heard = connected(link, other)
        eventually(lambda: any("waits for approval" in text for text in heard))
        assert operator.hand_roster(members.authority.roster_document) >= 2
        eventually(lambda: "connected to main as node 2" in heard)
    # The first node was handed the roster too: it knows the second's signing key now.
    eventually(lambda: set(node.trust.roster.keys) == {1, 2})
    for one in (client, second):
        one.close()


def test_a_revoked_node_is_cut_off_and_stays_out(link: LocalLink, members: Members) -> None:
    node = members.join("node", "hospital-a")
    with control(link, members.join("operator", "olga")) as operator:
        operator.hand_roster(members.authority.roster_document)
        client, statuses = connected(link, node)
        eventually(lambda: "connected to main as node 1" in statuses)
        members.authority.revoke("hospital-a")
        operator.hand_roster(members.authority.roster_document)
        eventually(lambda: any("the certificate of node-1 is revoked" in text for text in statuses))
        assert not any(row.connected for row in operator.nodes())
        with pytest.raises(NetworkError, match="was not signed"):
            operator.hand_roster(members.authority.roster_document.replace(b"test", b"best"))
    client.close()


def test_roles_bound_what_users_do(link: LocalLink, members: Members) -> None:
    app = Submission(open_app(EXAMPLES / "minimal"), {}, nodes=1)
    with (
        control(link, members.join("submitter", "sam")) as sam,
        control(link, members.join("submitter", "sue")) as sue,
        control(link, members.join("viewer", "vera")) as viewer,
    ):
        name = sam.submit(app).name
        assert [(row.name, row.by) for row in viewer.runs()] == [(name, "user-sam")]
        assert list(viewer.nodes()) == []
        for act in (lambda: viewer.submit(app), lambda: viewer.stop(name), lambda: viewer.resume(name)):
            with pytest.raises(NetworkError, match="user-vera is a viewer"):
                act()
        for user in (sam, viewer):
            for decide in (user.approve, user.revoke):
                with pytest.raises(NetworkError, match="takes the role operator"):
                    decide(1)
            with pytest.raises(NetworkError, match="takes the role operator"):
                user.hand_roster(members.authority.roster_document)
        with pytest.raises(NetworkError, match="user-sue may only do this with runs of its own"):
            sue.stop(name)
        assert sam.stop(name).name == name
        eventually(lambda: sam.show(name).state == "stopped")
        log = link.options.home / "audit.jsonl"
        lines = [msgspec.json.decode(line) for line in log.read_bytes().splitlines()]
        assert [(line["event"], line["fields"].get("by")) for line in lines] == [
            ("log-opened", None),
            ("superlink-started", None),
            ("run-submitted", "user-sam"),
            ("stop-asked", "user-sam"),
            ("run-ended", None),
        ]
        assert verify_log(log, key=link.link.audit.key).lines == len(lines)


def test_no_listener_serves_the_role_of_another(link: LocalLink, members: Members) -> None:
    node, user = members.join("node", "hospital-a"), members.join("operator", "olga")
    with control(link, node) as wrong, pytest.raises(NetworkError, match="node-1 is a node; this listener serves"):
        wrong.runs()
    client, statuses = connected(link, user)
    eventually(lambda: any("user-olga is a operator; this listener serves the roles node" in text for text in statuses))
    client.close()


def test_strangers_do_not_get_past_the_handshake(link: LocalLink, tmp_path: Path) -> None:
    stranger = Members(tmp_path / "other", "other").join("operator", "olga")
    roots = link.options.credentials
    assert roots is not None
    authority = (roots.folder / "ca.pem").read_bytes()
    key, chain = ((stranger.folder / name).read_bytes() for name in ("key.pem", "certificate.pem"))
    for credentials in (
        grpc.ssl_channel_credentials(authority),
        grpc.ssl_channel_credentials(authority, key, chain),
    ):
        for address in (link.fleet, link.control):
            with grpc.secure_channel(address, credentials) as channel, pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary("/privfed.Control/Runs")(b"", timeout=10)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    with control(link, stranger) as user, pytest.raises(NetworkError, match="cannot be reached"):
        user.runs()
    with ControlClient(link.control) as plain, pytest.raises(NetworkError, match="cannot be reached"):
        plain.runs()


def test_load_balancers_are_told_that_every_listener_serves(link: LocalLink, members: Members) -> None:
    """The health protocol of gRPC, at each listener by its own name; it takes a certificate, as everything does."""
    for role, name, address, service in (
        ("node", "hospital-a", link.fleet, "privfed.Fleet"),
        ("viewer", "vera", link.control, "privfed.Control"),
    ):
        credentials = members.join(role, name).channel_credentials()
        with grpc.secure_channel(address, credentials) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for asked in ("", service):
                answer = stub.Check(health_pb2.HealthCheckRequest(service=asked), timeout=10)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.RpcError) as caught:
                stub.Check(health_pb2.HealthCheckRequest(service="other"), timeout=10)
            assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_without_keys_only_loopback_is_served_unless_forced(tmp_path: Path) -> None:
    for where in ({"fleet": "0.0.0.0:0"}, {"control": "0.0.0.0:0"}, {"fleet": "[::]:0"}, {"control": "example.org:1"}):
        with pytest.raises(SuperLinkError, match="without keys anybody may do anything"):
            SuperLink(SuperLinkOptions(tmp_path, **where), FreshLauncher())


@pytest.mark.parametrize("where", [{"fleet": "0.0.0.0:0"}, {"control": "10.1.2.3:0"}, {"token_control": "[::]:0"}])
def test_noise_is_never_seeded_where_others_may_connect(tmp_path: Path, where: dict[str, str]) -> None:
    options = SuperLinkOptions(tmp_path, **where, force_insecure=True, insecure_test_randomness=1)
    with pytest.raises(SuperLinkError, match="insecure_test_randomness is for tests on this machine"):
        SuperLink(options, FreshLauncher())
    assert not (tmp_path / "lock").exists()


def test_the_audit_log_says_who_was_turned_away_how_often_and_which_roster_is_in_use(
    link: LocalLink, members: Members
) -> None:
    app = Submission(open_app(EXAMPLES / "minimal"), {}, nodes=1)
    with (
        control(link, members.join("operator", "olga")) as olga,
        control(link, members.join("viewer", "vera")) as vera,
    ):
        for _ in range(3):
            with pytest.raises(NetworkError, match="user-vera is a viewer"):
                vera.submit(app)
        # It is there before the minute is over, or the SuperLink ends: it may be killed.
        eventually(lambda: b"user-vera is a viewer" in (link.options.home / "audit.jsonl").read_bytes(), 15)
        with pytest.raises(NetworkError, match="user-vera is a viewer"):
            vera.submit(app)
        members.join("node", "hospital-a")
        version = olga.hand_roster(members.authority.roster_document)
        for user in range(12):  # each for another reason: the log must not grow by what strangers do
            with control(link, members.join("viewer", f"v{user}")) as one, pytest.raises(NetworkError):
                one.submit(app)
    link.end()
    lines = [msgspec.json.decode(line) for line in (link.options.home / "audit.jsonl").read_bytes().splitlines()]
    refused = [line["fields"] for line in lines if line["event"] == "callers-refused"]
    assert sum(one["count"] for one in refused) == 16 and len({one["reason"] for one in refused}) <= MAX_REASONS + 1
    assert len(refused) <= 2 * (MAX_REASONS + 1), "each reason at once, and once more for how often"
    assert sum(one["count"] for one in refused if "user-vera is a viewer" in one["reason"]) == 4
    assert {one["listener"] for one in refused} == {"control"}
    assert [line["fields"] for line in lines if line["event"] == "roster-taken"] == [{"version": version}]
    assert {"event": "roster-handed-on", "by": "user-olga"} in [
        {"event": line["event"], "by": line["fields"].get("by")} for line in lines
    ]
