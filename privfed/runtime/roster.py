"""The signed roster: which nodes a federation has, their signing keys, and which certificates are revoked.

The authority signs it, so a SuperLink can hand it on and cannot change it: secure aggregation trusts these keys and no
others. Versions rise by one with every change; who holds a version refuses an older one.
"""

from __future__ import annotations

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from privfed.decoder import json_decoder
from privfed.runtime.certificate import CertificateError

MAX_BYTES = 64 << 20
_LABEL = b"privfed roster v1\0"


class Member(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A node: its id, name, Ed25519 public key (hex) and the serial of its certificate (hex)."""

    node: int
    name: str
    identity: str
    serial: str


class Revocation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A certificate that is not to be trusted any more."""

    serial: str
    subject: str
    date: str
    reason: str = ""


class Roster(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The nodes of a federation at one version. nodes: ascending ids."""

    federation: str
    version: int
    nodes: tuple[Member, ...] = ()
    revoked: tuple[Revocation, ...] = ()
    last_node: int = 0

    def __post_init__(self) -> None:
        ids = [member.node for member in self.nodes]
        if ids != sorted(set(ids)) or (ids and not 0 < ids[0] <= ids[-1] <= self.last_node < 1 << 62):
            raise ValueError("the roster's node ids must be positive, ascending and distinct")
        keys = [member.identity for member in self.nodes]
        if len(set(keys)) != len(keys):
            raise ValueError("two nodes of the roster have the same signing key")
        if any(len(bytes.fromhex(key)) != 32 or key != key.lower() for key in keys):
            raise ValueError("a signing key of the roster is not 64 lower-case hex digits")

    @property
    def keys(self) -> dict[int, bytes]:
        """Ed25519 public keys by node, as `privfed.protocols.session.Identity` takes them."""
        return {member.node: bytes.fromhex(member.identity) for member in self.nodes}

    def is_revoked(self, serial: int) -> bool:
        """Return whether a certificate is on the revocation list."""
        return any(int(one.serial, 16) == serial for one in self.revoked)


class _Signed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    roster: str
    signature: str


def sign_roster(roster: Roster, key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return the roster as a signed document (JSON, of text and hex)."""
    text = msgspec.json.encode(roster, order="sorted")
    signature = key.sign(_LABEL + text, ec.ECDSA(hashes.SHA384()))
    return msgspec.json.format(msgspec.json.encode(_Signed(text.decode(), signature.hex()))) + b"\n"


def verify_roster(document: bytes, authority: x509.Certificate, *, newer_than: Roster | None = None) -> Roster:
    """Return the roster of a signed document.

    newer_than: the roster held so far; one of another federation or an older version is refused.
    Raises CertificateError with the cause.
    """
    public = authority.public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    try:
        if len(document) > MAX_BYTES:
            raise ValueError(f"{len(document)} bytes are too many")
        signed = json_decoder(_Signed).decode(document)
        public.verify(bytes.fromhex(signed.signature), _LABEL + signed.roster.encode(), ec.ECDSA(hashes.SHA384()))
        roster = json_decoder(Roster).decode(signed.roster)
    except InvalidSignature:
        raise CertificateError("the roster was not signed by this federation's authority") from None
    except (msgspec.MsgspecError, ValueError) as cause:
        raise CertificateError(f"the roster does not decode: {cause}") from None
    if newer_than is not None:
        if roster.federation != newer_than.federation:
            raise CertificateError(f"the roster is of federation {roster.federation!r}, not {newer_than.federation!r}")
        if roster.version < newer_than.version:
            raise CertificateError(
                f"the roster has version {roster.version}, older than {newer_than.version} held here"
            )
    return roster
