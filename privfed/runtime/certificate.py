"""X.509 certificates of a federation: who a peer is, in a form every TLS stack checks.

One authority signs all of them. A certificate's subject says the peer's common name ("node-7", "user-alice",
"link-main"), its role as the organisational unit, and its plain name as the organisation. Keys are ECDSA: P-384 for
the authority, P-256 for TLS. A node's signing identity (Ed25519) is another key, listed in the roster, never in TLS.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from privfed.errors import PrivfedError

USERS = ("operator", "submitter", "viewer")
ROLES = ("node", "link", *USERS)
"""Operators run the federation, submitters also start and stop runs of their own, viewers look."""

NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?")
_CLOCK_SLACK = datetime.timedelta(minutes=10)
MAX_PEM = 64 * 1024


class CertificateError(PrivfedError):
    """A certificate, key or roster that must not be trusted; says which, why and what to do."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end of a connection. node_id: of a node, else None. serial: of the certificate.

    through: serial of the SuperLink's certificate that passed the call on, if one did.
    """

    role: str
    name: str
    node_id: int | None = None
    serial: int = 0
    expires: datetime.datetime | None = None
    through: int = 0

    @property
    def common_name(self) -> str:
        """The certificate's common name."""
        if self.role == "node":
            return f"node-{self.node_id}"
        return f"{'link' if self.role == 'link' else 'user'}-{self.name}"


def check_name(name: str) -> str:
    """Return the name, or raise ValueError: a name is a label that is safe in files, logs and certificates."""
    if not NAME.fullmatch(name):
        raise ValueError(f"name {name!r}: use 1-63 of a-z, 0-9, '.', '_', '-', beginning and ending with a-z or 0-9")
    return name


def new_key(curve: ec.EllipticCurve | None = None) -> ec.EllipticCurvePrivateKey:
    """Return a fresh ECDSA key from the operating system's randomness."""
    return ec.generate_private_key(curve or ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key as PKCS#8 PEM, unencrypted: the file's mode protects it."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def read_key(pem: bytes, where: str) -> ec.EllipticCurvePrivateKey:
    """Read an ECDSA private key. Raises CertificateError naming the file."""
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError) as cause:
        raise CertificateError(f"{where} is no private key in PEM: {cause}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateError(f"{where} holds a {type(key).__name__}, not an ECDSA key")
    return key


def read_certificate(pem: bytes, where: str) -> x509.Certificate:
    """Read one certificate. Raises CertificateError naming its source."""
    try:
        if len(pem) > MAX_PEM:
            raise ValueError(f"{len(pem)} bytes are too many for a certificate")
        return x509.load_pem_x509_certificate(pem)
    except ValueError as cause:
        raise CertificateError(f"{where} is no certificate in PEM: {cause}") from None


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """Return a certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def fingerprint(certificate: x509.Certificate) -> str:
    """Return the SHA-256 of a certificate in hex, for people to compare by telephone."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def _subject(common: str, role: str, name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, common),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, name),
        ]
    )


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def self_signed(
    key: ec.EllipticCurvePrivateKey, federation: str, now: datetime.datetime, days: int
) -> x509.Certificate:
    """Return the authority's own certificate."""
    name = _subject(f"authority-{federation}", "authority", federation)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SLACK)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return builder.sign(key, hashes.SHA384())


def issue(
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    public_key: ec.EllipticCurvePublicKey,
    peer: Peer,
    hosts: Sequence[str],
    now: datetime.datetime,
    days: int,
) -> x509.Certificate:
    """Return a peer's certificate. hosts: DNS names and addresses of a link; others have none.

    It ends when the authority's does, at the latest.
    """
    ends = min(now + datetime.timedelta(days=days), authority.not_valid_after_utc)
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH] + ([ExtendedKeyUsageOID.SERVER_AUTH] if peer.role == "link" else [])
    builder = (
        x509.CertificateBuilder()
        .subject_name(_subject(peer.common_name, peer.role, peer.name))
        .issuer_name(authority.subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SLACK)
        .not_valid_after(ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
    )
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
    return builder.sign(authority_key, hashes.SHA384())


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def read_peer(certificate: x509.Certificate) -> Peer:
    """Return whom a certificate names. Raises CertificateError unless it is one this module makes."""
    values = {}
    for oid in (NameOID.COMMON_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME, NameOID.ORGANIZATION_NAME):
        found = certificate.subject.get_attributes_for_oid(oid)
        if len(found) != 1 or not isinstance(found[0].value, str):
            raise CertificateError("the certificate's subject is not of a federation: it needs one CN, OU and O each")
        values[oid] = found[0].value
    common, role, name = values.values()
    if role not in ROLES or not NAME.fullmatch(name):
        raise CertificateError(f"the certificate names no role or name of a federation: {role!r}, {name!r}")
    node_id = None
    if role == "node":
        number = re.fullmatch(r"node-([1-9][0-9]{0,18})", common)
        if number is None:
            raise CertificateError(f"the certificate's common name {common!r} is no node's")
        node_id = int(number[1])
    peer = Peer(role, name, node_id, certificate.serial_number, certificate.not_valid_after_utc)
    if peer.common_name != common:
        raise CertificateError(f"the certificate's common name {common!r} is not that of {role} {name!r}")
    return peer


def check_issued(
    certificate: x509.Certificate, authority: x509.Certificate, now: datetime.datetime, where: str
) -> None:
    """Raise CertificateError unless the authority signed the certificate and it is valid now; dates are named."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        raise CertificateError(f"{where} was not issued by this federation's authority") from None
    starts, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < starts:
        raise CertificateError(f"{where} is valid from {starts:%Y-%m-%d %H:%M} UTC on: check this machine's clock")
    if now > ends:
        raise CertificateError(f"{where} expired on {ends:%Y-%m-%d %H:%M} UTC: have the authority issue a new one")
