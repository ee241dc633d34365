"""A member's key folder, and what it makes of it: TLS for gRPC, a signing identity, and judgement of peers.

key.pem          TLS key (0600)            identity.key   a node's Ed25519 seed (0600)
certificate.pem  issued by the authority   ca.pem         the authority's certificate
roster.json      the signed roster: nodes, their signing keys, revoked certificates
"""

from __future__ import annotations

import datetime
import os
import socket
import ssl
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privfed.decoder import json_decoder
from privfed.protocols.session import Identity
from privfed.runtime import certificate as cert
from privfed.runtime.authority import Answer, utc_now
from privfed.runtime.certificate import CertificateError, Peer
from privfed.runtime.disk import write_atomically
from privfed.runtime.roster import Roster, verify_roster

if TYPE_CHECKING:
    import grpc

WARNING_DAYS = 30
# gRPC has no setting for the least TLS version. These suites of TLS 1.2 need an RSA certificate, and ours are ECDSA, so
# nothing can be negotiated below TLS 1.3, whose suites are always on.
_NO_TLS_1_2 = "ECDHE-RSA-AES256-GCM-SHA384"


def require_tls_1_3() -> None:
    """Make TLS 1.3 the least gRPC speaks in this process; gRPC reads this once, before its first TLS connection."""
    os.environ["GRPC_SSL_CIPHER_SUITES"] = _NO_TLS_1_2
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # a peer that is turned away is no line on stderr


def speaks_tls_1_2(host: str, port: int, folder: Path) -> bool:
    """Return whether a listener lets a member in by TLS 1.2: gRPC may have been set up before `require_tls_1_3`."""
    context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    context.check_hostname = False  # this asks which versions are spoken, and the chain is checked all the same
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    try:
        with socket.create_connection((host, port), timeout=10) as raw, context.wrap_socket(raw, server_hostname=host):
            return True
    except OSError:
        return False


@dataclass(frozen=True, slots=True)
class Expiry:
    """A warning: what expires when."""

    what: str
    date: datetime.datetime

    def __str__(self) -> str:
        return f"{self.what} expires on {self.date:%Y-%m-%d}: have the authority issue a new one"


class Trust:
    """Judges the certificates of peers: the authority's signature, dates, revocation. Threads may share it."""

    def __init__(self, authority: x509.Certificate, roster: Roster) -> None:
        self.authority = authority
        self.roster = roster

    def authenticate(self, pem: bytes, now: datetime.datetime | None = None) -> Peer:
        """Return the peer a certificate names. Raises CertificateError with the cause, and the date of an expiry."""
        certificate = cert.read_certificate(pem, "the peer's certificate")
        cert.check_issued(certificate, self.authority, now or utc_now(), "the peer's certificate")
        peer = cert.read_peer(certificate)
        if self.roster.is_revoked(peer.serial):
            raise CertificateError(f"the certificate of {peer.common_name} is revoked")
        return peer


def certificate_of(context: grpc.ServicerContext | grpc.aio.ServicerContext[Any, Any]) -> bytes:
    """Return the certificate shown by the other end of a gRPC call over mutual TLS. Raises CertificateError."""
    found = context.auth_context().get("x509_pem_cert") or ()
    chain = [bytes(one) for one in found if isinstance(one, bytes)]
    if len(chain) != 1:
        raise CertificateError("the peer showed no certificate")
    return chain[0]


def accept_answer(folder: Path, document: bytes) -> Peer:
    """Put the authority's answer into a key folder, after checking that it answers this folder's key.

    A folder that knew another authority refuses: joining another federation takes another folder.
    """
    try:
        answer = json_decoder(Answer).decode(document)
    except (msgspec.MsgspecError, UnicodeError) as cause:
        raise CertificateError(f"the answer does not decode: {cause}") from None
    authority = cert.read_certificate(answer.authority.encode(), "the answer's authority certificate")
    certificate = cert.read_certificate(answer.certificate.encode(), "the answer's certificate")
    cert.check_issued(certificate, authority, utc_now(), "the answer's certificate")
    peer = cert.read_peer(certificate)
    roster = verify_roster(answer.roster.encode(), authority)
    key = cert.read_key(_read(folder / "key.pem"), str(folder / "key.pem"))
    if key.public_key() != certificate.public_key():
        raise CertificateError(f"the answer is for another key than {folder / 'key.pem'}")
    known = folder / "ca.pem"
    if known.exists() and cert.read_certificate(known.read_bytes(), str(known)) != authority:
        raise CertificateError(f"{folder} belongs to another federation: use another folder")
    if (folder / "roster.json").exists():
        held = verify_roster(_read(folder / "roster.json"), authority)
        verify_roster(answer.roster.encode(), authority, newer_than=held)
    write_atomically(known, answer.authority.encode())
    write_atomically(folder / "roster.json", answer.roster.encode())
    write_atomically(folder / "certificate.pem", answer.certificate.encode())
    del roster
    return peer


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as cause:
        raise CertificateError(f"{path}: {cause.strerror}; make keys with `privfed keys`") from None


@dataclass(slots=True)
class Credentials:
    """A loaded key folder. Certificates are read again when their file changes, so a renewal needs no restart."""

    folder: Path
    peer: Peer
    trust: Trust
    certificate: x509.Certificate
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _stamp: tuple[int, ...] = field(default=(), repr=False)

    @classmethod
    def load(cls, folder: Path, *, now: datetime.datetime | None = None) -> Credentials:
        """Load and check a key folder. Raises CertificateError naming the file, the cause and an expiry's date."""
        folder = Path(folder)
        authority = cert.read_certificate(_read(folder / "ca.pem"), str(folder / "ca.pem"))
        cert.check_issued(authority, authority, now or utc_now(), str(folder / "ca.pem"))
        certificate = cert.read_certificate(_read(folder / "certificate.pem"), str(folder / "certificate.pem"))
        cert.check_issued(certificate, authority, now or utc_now(), str(folder / "certificate.pem"))
        key_path = folder / "key.pem"
        if cert.read_key(_read(key_path), str(key_path)).public_key() != certificate.public_key():
            raise CertificateError(f"{key_path} does not belong to certificate.pem")
        if key_path.stat().st_mode & 0o077:
            raise CertificateError(f"{key_path} can be read by others: chmod 600 {key_path}")
        peer = cert.read_peer(certificate)
        roster = verify_roster(_read(folder / "roster.json"), authority)
        if roster.is_revoked(peer.serial):
            raise CertificateError(f"{folder / 'certificate.pem'} is revoked")
        return cls(folder, peer, Trust(authority, roster), certificate, _stamp=_stamp(folder))

    def check(self) -> None:
        """Raise CertificateError when the certificates in force are not valid now, naming the date."""
        authority = self.trust.authority
        for name, one in (("ca.pem", authority), ("certificate.pem", self.certificate)):
            cert.check_issued(one, authority, utc_now(), str(self.folder / name))

    def warnings(self, now: datetime.datetime | None = None) -> list[Expiry]:
        """Return what expires within 30 days."""
        soon = (now or utc_now()) + datetime.timedelta(days=WARNING_DAYS)
        dates = {"certificate.pem": self.certificate, "ca.pem": self.trust.authority}
        return [
            Expiry(str(self.folder / name), one.not_valid_after_utc)
            for name, one in dates.items()
            if one.not_valid_after_utc < soon
        ]

    def reload(self) -> bool:
        """Read the folder again if a file of it has changed; return whether it has. What is wrong changes nothing.

        Raises CertificateError when the new files are not acceptable; the old ones stay in force.
        """
        with self._lock:
            stamp = _stamp(self.folder)
            if stamp == self._stamp:
                return False
            fresh = Credentials.load(self.folder)
            if fresh.peer.common_name != self.peer.common_name:
                raise CertificateError(f"{self.folder} now holds the certificate of {fresh.peer.common_name}")
            self.peer, self.certificate, self._stamp = fresh.peer, fresh.certificate, stamp
            if fresh.trust.roster.version >= self.trust.roster.version:
                self.trust.roster = fresh.trust.roster
            return True

    def take_roster(self, document: bytes) -> bool:
        """Keep a newer signed roster that a peer handed on; return whether it was newer. Raises CertificateError."""
        with self._lock:
            roster = verify_roster(document, self.trust.authority, newer_than=self.trust.roster)
            if roster.version == self.trust.roster.version:
                return False
            write_atomically(self.folder / "roster.json", document)
            self.trust.roster = roster
            self._stamp = _stamp(self.folder)
            return True

    @property
    def roster_document(self) -> bytes:
        """The signed roster, to hand on."""
        return _read(self.folder / "roster.json")

    def identity(self) -> Identity:
        """Return a node's signing identity and the roster it trusts. Raises CertificateError for another role."""
        if self.peer.node_id is None:
            raise CertificateError(f"{self.peer.common_name} is no node: only nodes sign in secure aggregation")
        path = self.folder / "identity.key"
        seed = _read(path)
        if len(seed) != 32 or path.stat().st_mode & 0o077:
            raise CertificateError(f"{path} must hold 32 bytes and be readable by its owner alone")
        keys = self.trust.roster.keys
        public = Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()
        if keys.get(self.peer.node_id) != public:
            raise CertificateError(f"{path} is not the key the roster lists for node {self.peer.node_id}")
        return Identity(self.peer.node_id, seed, keys)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Return mutual TLS 1.3 for a client: trusts this federation's authority and nobody else."""
        require_tls_1_3()
        import grpc

        credentials: grpc.ChannelCredentials = grpc.ssl_channel_credentials(
            root_certificates=_read(self.folder / "ca.pem"),
            private_key=_read(self.folder / "key.pem"),
            certificate_chain=_read(self.folder / "certificate.pem"),
        )
        return credentials

    def server_credentials(self, *, mutual: bool = True) -> grpc.ServerCredentials:
        """Return TLS 1.3 for a server; a renewed certificate is taken up by the next handshake.

        mutual: clients must show a certificate; False is for listeners that know their clients by tokens.
        """
        require_tls_1_3()
        import grpc

        held = self._configuration(), self._stamp

        def fetch() -> Any:
            nonlocal held
            try:
                self.reload()
            except CertificateError:
                return None  # keep what is in force; the owner of this object reports it
            if held[1] == self._stamp:
                return None
            held = self._configuration(), self._stamp
            return held[0]

        credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
            held[0], fetch, require_client_authentication=mutual
        )
        return credentials

    def _configuration(self) -> Any:
        import grpc

        pair = (_read(self.folder / "key.pem"), _read(self.folder / "certificate.pem"))
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=_read(self.folder / "ca.pem"))


@dataclass(frozen=True, slots=True)
class BearerToken:
    """A user without a certificate: a folder with the authority's `ca.pem` and a bearer token in `token`."""

    folder: Path

    @classmethod
    def holds(cls, folder: Path) -> bool:
        """Return whether a folder is one of a token and not of keys."""
        return (folder / "token").exists() and not (folder / "key.pem").exists()

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Return TLS that trusts this federation's authority and shows the token with every call."""
        require_tls_1_3()
        import grpc

        token = _read(self.folder / "token").decode("ascii", errors="replace").strip()
        tls = grpc.ssl_channel_credentials(root_certificates=_read(self.folder / "ca.pem"))
        credentials: grpc.ChannelCredentials = grpc.composite_channel_credentials(
            tls, grpc.access_token_call_credentials(token)
        )
        return credentials


def _stamp(folder: Path) -> tuple[int, ...]:
    marks: list[int] = []
    for name in ("certificate.pem", "key.pem", "roster.json"):
        try:
            status = (folder / name).stat()
        except OSError:
            marks += [0, 0]
            continue
        marks += [status.st_mtime_ns, status.st_ino]
    return tuple(marks)
