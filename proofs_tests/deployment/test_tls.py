"""Mutual TLS as gRPC speaks it with a federation's credentials: real handshakes over loopback."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from privfed.runtime.authority import Authority, make_request
from privfed.runtime.certificate import CertificateError
from privfed.runtime.credentials import Credentials, accept_answer, certificate_of, require_tls_1_3

require_tls_1_3()
grpc = pytest.importorskip("grpc")


def join(authority: Authority, folder: Path, role: str, name: str) -> Credentials:
    make_request(folder, role, name, ["localhost"] if role == "link" else ())
    _, answer = authority.answer((folder / "request.json").read_bytes())
    accept_answer(folder, msgspec.json.encode(answer))
    return Credentials.load(folder)


class Federation:
    """An authority, a link that says whom it hears, and a node."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority.create(folder / "authority", "test")
        self.link = join(self.authority, folder / "link", "link", "main")
        self.node = join(self.authority, folder / "node", "node", "a")
        self.link.take_roster(self.authority.roster_document)
        self.server = grpc.server(ThreadPoolExecutor(2))
        handler = grpc.unary_unary_rpc_method_handler(self._who)
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t", {"who": handler}),))
        self.port = self.server.add_secure_port("localhost:0", self.link.server_credentials())
        self.server.start()

    def _who(self, request: bytes, context: object) -> bytes:
        try:
            shown = certificate_of(context)  # type: ignore[arg-type]  # of this server
            return self.link.trust.authenticate(shown).common_name.encode()
        except CertificateError as cause:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, str(cause))  # type: ignore[attr-defined]  # of this server
            raise

    def ask(self, credentials: object) -> bytes:
        with grpc.secure_channel(f"localhost:{self.port}", credentials) as channel:
            return bytes(channel.unary_unary("/t/who")(b"", timeout=10))


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    federation = Federation(tmp_path)
    yield federation
    federation.server.stop(None).wait()


def test_a_member_is_heard_by_name(federation: Federation) -> None:
    assert federation.ask(federation.node.channel_credentials()) == b"node-1"


def test_tls_1_2_is_refused(federation: Federation) -> None:
    def shake(version: ssl.TLSVersion) -> str | None:
        context = ssl.create_default_context(cafile=str(federation.folder / "node" / "ca.pem"))
        context.load_cert_chain(federation.folder / "node" / "certificate.pem", federation.folder / "node" / "key.pem")
        context.minimum_version = context.maximum_version = version
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection(("localhost", federation.port), timeout=10) as raw,
            context.wrap_socket(raw, server_hostname="localhost") as wrapped,
        ):
            return wrapped.version()

    assert shake(ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
    with pytest.raises((ssl.SSLError, ConnectionError)):
        shake(ssl.TLSVersion.TLSv1_2)


def test_strangers_are_refused(federation: Federation, tmp_path: Path) -> None:
    other = Authority.create(tmp_path / "other", "test")
    stranger = join(other, tmp_path / "stranger", "node", "a")
    bare = grpc.ssl_channel_credentials((federation.folder / "node" / "ca.pem").read_bytes())
    forged = grpc.ssl_channel_credentials(
        (federation.folder / "node" / "ca.pem").read_bytes(),
        (stranger.folder / "key.pem").read_bytes(),
        (stranger.folder / "certificate.pem").read_bytes(),
    )
    for credentials in (bare, forged, stranger.channel_credentials()):
        with pytest.raises(grpc.RpcError) as refusal:
            federation.ask(credentials)
        assert refusal.value.code() == grpc.StatusCode.UNAVAILABLE


def test_a_revoked_member_is_refused_without_a_restart(federation: Federation) -> None:
    credentials = federation.node.channel_credentials()
    assert federation.ask(credentials) == b"node-1"
    federation.authority.revoke("a")
    federation.link.take_roster(federation.authority.roster_document)
    with pytest.raises(grpc.RpcError) as refusal:
        federation.ask(credentials)
    assert refusal.value.code() == grpc.StatusCode.PERMISSION_DENIED
    assert "revoked" in refusal.value.details()


def test_a_renewed_certificate_is_taken_up_without_a_restart(federation: Federation) -> None:
    before = federation.link.peer.serial
    folder = federation.folder / "link"
    _, answer = federation.authority.answer((folder / "request.json").read_bytes())
    accept_answer(folder, msgspec.json.encode(answer))
    assert federation.ask(federation.node.channel_credentials()) == b"node-1"
    assert federation.link.peer.serial != before
    served = ssl.get_server_certificate(("localhost", federation.port), timeout=10)
    from privfed.runtime.certificate import read_certificate

    assert read_certificate(served.encode(), "served").serial_number == federation.link.peer.serial
