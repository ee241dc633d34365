"""Key agreement, derivation, sealing and signing: thin names over `cryptography`, one purpose a label."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from privfed.protocols.errors import SERVER, RemoteError

VERSION = b"privfed v1 "
KEY_BYTES = 32
SIGNATURE_BYTES = 64
TAG_BYTES = 16
# Each sealing key seals one text: it is derived from both nodes' ephemeral keys, their direction and the transcript.
_NONCE = bytes(12)

_FIELD = (1 << 255) - 19
_ORDER_8 = (
    0x00B8495F16056286FDB1329CEB8D09DA6AC49FF1FAE35616AEB8413B7C7AEBE0,
    0x57119FD0DD4E22D8868E1C58C45C44045BEF839C55B1D0B1248C50A3BC959C5F,
)
_LOW_ORDER = frozenset({0, 1, *_ORDER_8, _FIELD - 1, _FIELD, _FIELD + 1})


def derive(secret: bytes, label: bytes, context: bytes, size: int = 32) -> bytes:
    """Return bytes for one purpose: HKDF-SHA256, info = label and context (a digest and ids) [RFC5869]."""
    return HKDF(SHA256(), size, None, VERSION + label + b"\0" + context).derive(secret)


def digest(label: bytes, *parts: bytes | bytearray | memoryview) -> bytes:
    """Return SHA-256 over the label and the parts, each with its length."""
    state = hashlib.sha256(VERSION + label + b"\0")
    for part in parts:
        state.update(len(part).to_bytes(8, "big"))
        state.update(part)
    return state.digest()


def same(left: bytes, right: bytes) -> bool:
    """Compare without telling by the time where they differ."""
    return hmac.compare_digest(left, right)


def node_bytes(*nodes: int) -> bytes:
    """Return 8 big-endian bytes a node."""
    return b"".join(node.to_bytes(8, "big") for node in nodes)


def exchange_public(secret_key: bytes) -> bytes:
    """Return the X25519 public key of a 32-byte secret key."""
    return X25519PrivateKey.from_private_bytes(secret_key).public_key().public_bytes_raw()


def load(secret_key: bytes) -> X25519PrivateKey:
    """Return a key for many agreements: loading costs as much as agreeing."""
    return X25519PrivateKey.from_private_bytes(secret_key)


def is_low_order(public_key: bytes) -> bool:
    """Return whether an X25519 public key is one of the seven that make every shared secret zero [RFC7748]."""
    return int.from_bytes(public_key, "little") & ((1 << 255) - 1) in _LOW_ORDER


def agree(secret_key: bytes | X25519PrivateKey, peer: int, public_key: bytes, culprit: int | None = None) -> bytes:
    """Return the X25519 shared secret. Raises RemoteError "low-order-key" for a point that makes it predictable."""
    own = load(secret_key) if isinstance(secret_key, bytes) else secret_key
    try:
        return own.exchange(X25519PublicKey.from_public_bytes(public_key))
    except ValueError:
        who = (peer,) if culprit is None else (culprit,)
        raise RemoteError("low-order-key", who, f"the key of node {peer} is a point of low order") from None


@dataclass(frozen=True, slots=True)
class Channel:
    """What two nodes share for sealed texts. context: digest of the transcript; opening under another one fails."""

    secret: bytes = field(repr=False)
    context: bytes

    def seal(self, sender: int, receiver: int, text: bytes) -> bytes:
        """Seal a text for one direction. Call once a direction and context."""
        way = node_bytes(sender, receiver)
        return AESGCM(derive(self.secret, b"seal", self.context + way)).encrypt(_NONCE, text, self.context + way)

    def open(self, sender: int, receiver: int, text: bytes | memoryview) -> bytes:
        """Open a sealed text. Raises RemoteError "bad-share" naming the server and the sender."""
        way = node_bytes(sender, receiver)
        try:
            return AESGCM(derive(self.secret, b"seal", self.context + way)).decrypt(_NONCE, text, self.context + way)
        except InvalidTag:
            detail = f"the sealed text of node {sender} for node {receiver} does not open"
            raise RemoteError("bad-share", (SERVER, sender), detail) from None


def signing_public(secret_key: bytes) -> bytes:
    """Return the Ed25519 public key of a 32-byte secret key."""
    return Ed25519PrivateKey.from_private_bytes(secret_key).public_key().public_bytes_raw()


def sign(secret_key: bytes, label: bytes, *parts: bytes) -> bytes:
    """Return an Ed25519 signature over the digest of the label and the parts."""
    return Ed25519PrivateKey.from_private_bytes(secret_key).sign(digest(label, *parts))


def verified(public_key: bytes, signature: bytes | memoryview, label: bytes, *parts: bytes) -> bool:
    """Return whether the signature is the key's over this label and these parts."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(bytes(signature), digest(label, *parts))
    except (InvalidSignature, ValueError):
        return False
    return True
