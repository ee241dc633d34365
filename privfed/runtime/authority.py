"""The federation authority: a folder that issues certificates, keeps the roster and revokes.

    ca.pem        the authority's certificate, public: everybody trusts it
    ca.key        its private key (mode 0600): keep this folder off the network, back it up
    roster.json   the signed roster, public
    issued.jsonl  every certificate issued, one a line

Private keys of nodes and users are made where they are used: `make_request` leaves a request to be carried to the
authority, and `Authority.answer` answers it without ever seeing a private key.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from privfed.decoder import json_decoder
from privfed.runtime import certificate as cert
from privfed.runtime.certificate import CertificateError, Peer
from privfed.runtime.disk import write_atomically
from privfed.runtime.roster import Member, Revocation, Roster, sign_roster, verify_roster

AUTHORITY_DAYS = 3650
CERTIFICATE_DAYS = 365
_PROOF = b"privfed certificate request v1\0"
MAX_REQUEST = 1 << 20


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is carried to the authority. identity, proof: of a node; hosts: of a link. All text or hex, no secret."""

    role: str
    name: str
    csr: str
    hosts: tuple[str, ...] = ()
    identity: str = ""
    proof: str = ""


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is carried back: a certificate, the authority's, and the signed roster. No secret."""

    certificate: str
    authority: str
    roster: str


class Issued(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of issued.jsonl. key: SHA-256 of the public key."""

    serial: str
    subject: str
    role: str
    name: str
    key: str
    issued: str
    expires: str


def utc_now() -> datetime.datetime:
    """Return the time, in UTC."""
    return datetime.datetime.now(datetime.UTC)


def write_secret(path: Path, data: bytes) -> None:
    """Write a private key: mode 0600 from the first byte. Raises FileExistsError rather than replace a key."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def make_request(folder: Path, role: str, name: str, hosts: Sequence[str] = ()) -> Path:
    """Make the keys of a new member in `folder` and return the request to carry to the authority.

    The folder gets key.pem (TLS), for a node identity.key (Ed25519, signs in secure aggregation), and request.json.
    Raises ValueError for a bad role, name or host, CertificateError when the folder already holds keys.
    """
    if role not in cert.ROLES:
        raise ValueError(f"role {role!r}: use one of {', '.join(cert.ROLES)}")
    cert.check_name(name)
    if role == "link" and not hosts:
        raise ValueError("hosts: a link needs the host names or addresses nodes and users reach it by")
    if role != "link" and hosts:
        raise ValueError(f"hosts: only a link has them, not a {role}")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if (folder / "key.pem").exists():
        raise CertificateError(f"{folder} already holds keys: renew with its request.json, or use another folder")
    key = cert.new_key()
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    csr = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    identity = proof = ""
    if role == "node":
        seed = secrets.token_bytes(32)
        signer = Ed25519PrivateKey.from_private_bytes(seed)
        identity = signer.public_key().public_bytes_raw().hex()
        proof = signer.sign(_PROOF + csr).hex()
        write_secret(folder / "identity.key", seed)
    write_secret(folder / "key.pem", cert.key_pem(key))
    request = Request(role, name, csr.decode(), tuple(hosts), identity, proof)
    path = folder / "request.json"
    write_atomically(path, msgspec.json.format(msgspec.json.encode(request)) + b"\n")
    return path


def _spki(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def read_request(document: bytes) -> tuple[Request, ec.EllipticCurvePublicKey]:
    """Decode a request and check that its maker holds the keys. Raises CertificateError."""
    try:
        if len(document) > MAX_REQUEST:
            raise ValueError(f"{len(document)} bytes are too many")
        request = json_decoder(Request).decode(document)
        cert.check_name(request.name)
        csr = x509.load_pem_x509_csr(request.csr.encode())
        public = csr.public_key()
        if request.role not in cert.ROLES:
            raise ValueError(f"no role {request.role!r}")
        if bool(request.hosts) != (request.role == "link"):
            raise ValueError("hosts are for a link, and a link needs them")
        if (request.role == "node") != bool(request.identity):
            raise ValueError("a signing identity is for a node, and a node needs one")
        if not csr.is_signature_valid:
            raise ValueError("its signature is wrong")
        if not (isinstance(public, ec.EllipticCurvePublicKey) and isinstance(public.curve, ec.SECP256R1)):
            raise ValueError("its key is not ECDSA P-256")
        if request.role == "node":
            signer = Ed25519PublicKey.from_public_bytes(bytes.fromhex(request.identity))
            signer.verify(bytes.fromhex(request.proof), _PROOF + request.csr.encode())
    except InvalidSignature:
        raise CertificateError("the request's maker does not hold its signing identity") from None
    except (msgspec.MsgspecError, ValueError, UnicodeError) as cause:
        raise CertificateError(f"the request is not acceptable: {cause}") from None
    return request, public


class Authority:
    """An opened authority folder."""

    def __init__(self, folder: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self.folder = folder
        self.certificate = certificate
        self._key = key

    @classmethod
    def create(cls, folder: Path, federation: str, *, days: int = AUTHORITY_DAYS) -> Authority:
        """Make a new authority. Raises CertificateError when the folder holds one."""
        cert.check_name(federation)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if (folder / "ca.key").exists():
            raise CertificateError(f"{folder} already holds an authority: it is not replaced")
        key = cert.new_key(ec.SECP384R1())
        certificate = cert.self_signed(key, federation, utc_now(), days)
        write_secret(folder / "ca.key", cert.key_pem(key))
        authority = cls(folder, certificate, key)
        authority._publish(Roster(federation, 1))
        write_atomically(folder / "ca.pem", cert.certificate_pem(certificate))
        return authority

    @classmethod
    def open(cls, folder: Path) -> Authority:
        """Open an authority. Raises CertificateError naming what is missing or wrong."""
        try:
            certificate = cert.read_certificate((folder / "ca.pem").read_bytes(), str(folder / "ca.pem"))
            key = cert.read_key((folder / "ca.key").read_bytes(), str(folder / "ca.key"))
        except OSError as cause:
            raise CertificateError(
                f"{folder} is no authority: {cause.strerror} ({cause.filename}); make one with `privfed keys init`"
            ) from None
        if key.public_key() != certificate.public_key():
            raise CertificateError(f"{folder}: ca.key does not belong to ca.pem")
        return cls(folder, certificate, key)

    @property
    def roster(self) -> Roster:
        """The current roster."""
        return verify_roster(self.roster_document, self.certificate)

    @property
    def roster_document(self) -> bytes:
        """The current roster, signed."""
        return (self.folder / "roster.json").read_bytes()

    @property
    def issued(self) -> list[Issued]:
        """Every certificate issued, in order."""
        path = self.folder / "issued.jsonl"
        if not path.exists():
            return []
        return [json_decoder(Issued).decode(line) for line in path.read_bytes().splitlines()]

    def answer(self, document: bytes, *, days: int = CERTIFICATE_DAYS) -> tuple[Peer, Answer]:
        """Issue what a request asks for; a node gets the next id, or keeps its own when it renews.

        Raises CertificateError for a request that is malformed, or for a name that another key holds.
        """
        if days < 1:
            raise ValueError(f"days must be >= 1, got {days}")
        request, public = read_request(document)
        now = utc_now()
        with self._locked():
            roster = self.roster
            peer = self._peer(request, roster)
            key = hashlib.sha256(_spki(public)).hexdigest()
            self._check_holder(peer, key, roster, now)
            certificate = cert.issue(self.certificate, self._key, public, peer, request.hosts, now, days)
            self._log(certificate, peer, key, now)  # before anybody can hold it, so that it can be revoked
            if request.role == "node":
                assert peer.node_id is not None
                member = Member(peer.node_id, peer.name, request.identity, f"{certificate.serial_number:x}")
                others = [one for one in roster.nodes if one.node != peer.node_id]
                nodes = tuple(sorted([*others, member], key=lambda one: one.node))
                last = max(roster.last_node, peer.node_id)
                self._publish(msgspec.structs.replace(roster, version=roster.version + 1, nodes=nodes, last_node=last))
        answer = Answer(
            cert.certificate_pem(certificate).decode(),
            cert.certificate_pem(self.certificate).decode(),
            self.roster_document.decode(),
        )
        return cert.read_peer(certificate), answer

    def revoke(self, subject: str, reason: str = "") -> list[Revocation]:
        """Revoke every certificate of a member, by common name ("node-7", "user-alice") or name; return them.

        A revoked node leaves the roster. Raises CertificateError when nothing of that name was issued.
        """
        with self._locked():
            roster, today = self.roster, f"{utc_now():%Y-%m-%d}"
            found = [one for one in self.issued if subject in (one.subject, one.name)]
            subjects = {one.subject for one in found}
            if not found:
                raise CertificateError(f"no certificate was issued to {subject!r}: see `privfed keys roster`")
            if len(subjects) > 1:
                raise CertificateError(f"{subject!r} may be {', '.join(sorted(subjects))}: say which")
            known = {one.serial for one in roster.revoked}
            fresh = [Revocation(one.serial, one.subject, today, reason) for one in found if one.serial not in known]
            self._publish(
                msgspec.structs.replace(
                    roster,
                    version=roster.version + 1,
                    nodes=tuple(one for one in roster.nodes if f"node-{one.node}" not in subjects),
                    revoked=(*roster.revoked, *fresh),
                )
            )
        return fresh

    def _peer(self, request: Request, roster: Roster) -> Peer:
        if request.role != "node":
            return Peer(request.role, request.name)
        for member in roster.nodes:
            if member.name == request.name or member.identity == request.identity:
                if (member.name, member.identity) == (request.name, request.identity):
                    return Peer("node", member.name, member.node)
                raise CertificateError(
                    f"node {member.node} ({member.name}) holds that name or signing key: revoke it first, "
                    "or use another name"
                )
        return Peer("node", request.name, roster.last_node + 1)

    def _publish(self, roster: Roster) -> None:
        write_atomically(self.folder / "roster.json", sign_roster(roster, self._key))

    def _check_holder(self, peer: Peer, key: str, roster: Roster, now: datetime.datetime) -> None:
        """Refuse a name that another key holds: whoever asks for it may be somebody else."""
        for one in self.issued:
            if one.subject != peer.common_name or one.key == key or roster.is_revoked(int(one.serial, 16)):
                continue
            if datetime.datetime.fromisoformat(one.expires) > now:
                raise CertificateError(
                    f"{peer.common_name} holds a certificate with another key until {one.expires[:10]}: "
                    "revoke it first, or use another name"
                )

    def _log(self, certificate: x509.Certificate, peer: Peer, key: str, now: datetime.datetime) -> None:
        line = Issued(
            f"{certificate.serial_number:x}",
            peer.common_name,
            peer.role,
            peer.name,
            key,
            f"{now:%Y-%m-%dT%H:%M:%SZ}",
            f"{certificate.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}",
        )
        with (self.folder / "issued.jsonl").open("ab") as file:
            file.write(msgspec.json.encode(line) + b"\n")
            file.flush()
            os.fsync(file.fileno())

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / ".lock").open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
