"""Keys of the one-shot protocol: signatures of the roster's identities, and boxes that one member can open.

A client's single message must reach members it never spoke to, so boxes are sealed to the members' identity
keys: an Ed25519 key pair is mapped to its X25519 form (one curve, two models), for which joint use with
signatures is proven safe [Tho21]. The sender's side of the exchange is a key that lives for one session. A
box's key binds the session's digest and both nodes, and seals once, so its nonce is zero.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from privfed.protocols.errors import LocalError, RemoteError
from privfed.protocols.oneshot.ciphertext import Keystream
from privfed.protocols.session import Identity

KEY_BYTES = 32
SIGNATURE_BYTES = 64
TAG_BYTES = 16

_FIELD = (1 << 255) - 19
_NONCE = bytes(12)


def keystream(label: str, secret: bytes) -> Keystream:
    """AES-128-CTR keystream of a labelled secret or public value: call it with the bytes wanted next."""
    key = hashlib.sha256(b"privfed oneshot keystream\x00" + label.encode() + b"\x00" + secret).digest()[:16]
    encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    return lambda size: encryptor.update(bytes(size))


@lru_cache(maxsize=4096)
def exchange_public(identity_key: bytes) -> bytes:
    """X25519 form of an Ed25519 public key: u = (1 + y) / (1 - y). Raises LocalError if it has none."""
    y = int.from_bytes(identity_key, "little") & ((1 << 255) - 1)
    if len(identity_key) != KEY_BYTES or y >= _FIELD or y == 1:
        raise LocalError("the roster holds a key that is no Ed25519 public key")
    return ((1 + y) * pow(1 - y, -1, _FIELD) % _FIELD).to_bytes(32, "little")


def _exchange_secret(identity: Identity) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(hashlib.sha512(identity.secret_key).digest()[:32])


def _box(shared: bytes, digest: bytes, sender: int, receiver: int) -> tuple[AESGCM, bytes]:
    info = b"privfed oneshot box\x00" + digest + sender.to_bytes(8, "little") + receiver.to_bytes(8, "little")
    return AESGCM(HKDF(SHA256(), 32, None, info).derive(shared)), info


class SessionKey:
    """A sender's X25519 key for one session; forgotten once its boxes are sealed."""

    def __init__(self, secret: bytes) -> None:
        self._secret = X25519PrivateKey.from_private_bytes(secret)
        self.public = self._secret.public_key().public_bytes_raw()

    def seal(self, plain: bytes, digest: bytes, sender: int, receiver: int, identity_key: bytes) -> bytes:
        """Seal for the holder of an identity key: len(plain) + 16 bytes. LocalError if it has low order."""
        try:
            shared = self._secret.exchange(X25519PublicKey.from_public_bytes(exchange_public(identity_key)))
        except ValueError as error:
            raise LocalError(f"the roster's key of node {receiver} has low order") from error
        aead, context = _box(shared, digest, sender, receiver)
        return aead.encrypt(_NONCE, plain, context)


def open_box(sealed: bytes, public: bytes, digest: bytes, sender: int, identity: Identity) -> bytes:
    """Open what `sender` sealed for us. Raises RemoteError("bad-box") for anything else, low order too."""
    try:
        shared = _exchange_secret(identity).exchange(X25519PublicKey.from_public_bytes(public))
        aead, context = _box(shared, digest, sender, identity.node)
        return aead.decrypt(_NONCE, sealed, context)
    except (ValueError, InvalidTag) as error:
        raise RemoteError("bad-box", (sender,), "its share for us does not open") from error


def _statement(kind: str, digest: bytes, content: bytes) -> bytes:
    return b"privfed oneshot signature\x00" + kind.encode() + b"\x00" + digest + content


def sign(identity: Identity, kind: str, digest: bytes, content: bytes) -> bytes:
    """Sign `content` as a statement of this kind in the session with this digest: 64 bytes."""
    return Ed25519PrivateKey.from_private_bytes(identity.secret_key).sign(_statement(kind, digest, content))


def verify(
    roster: Mapping[int, bytes], node: int, kind: str, digest: bytes, content: bytes, signature: bytes
) -> bool:
    """Check a node's signature against the roster's key."""
    try:
        key = Ed25519PublicKey.from_public_bytes(roster[node])
        key.verify(signature, _statement(kind, digest, content))
    except (KeyError, ValueError, InvalidSignature):
        return False
    return True


def check_identity(identity: Identity | None, node: int) -> Identity:
    """Return the identity; LocalError if it is missing, another node's, or not the one in its roster."""
    if identity is None:
        raise LocalError(
            f"node {node} needs identity=: shares are sealed to, and answers signed by, the keys of a roster"
        )
    if identity.node != node:
        raise LocalError(f"identity= is that of node {identity.node}, not of node {node}")
    public = Ed25519PrivateKey.from_private_bytes(identity.secret_key).public_key().public_bytes_raw()
    if identity.roster.get(node) != public:
        raise LocalError(f"the roster of identity= does not hold node {node}'s own public key")
    return identity
