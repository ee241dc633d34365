"""Everything secret in a LightSecAgg session, derived from one 32-byte root per node and session.

A step of a node is a function of what it kept and of the request, so that repeating one repeats its bytes; a nonce is
zero because each sealing key is used for one text: it is derived from both nodes' keys, their direction and the
transcript so far.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from privfed.protocols.errors import RemoteError
from privfed.protocols.lightsecagg.exact import Words, words
from privfed.protocols.session import Buffer

_NONCE = bytes(12)


def derive(secret: bytes, salt: bytes, label: bytes) -> bytes:
    """32 bytes for one purpose: HKDF-SHA256 [RFC5869]."""
    return HKDF(SHA256(), 32, salt, b"privfed lightsecagg v1 " + label).derive(secret)


def uniform(key: bytes, size: int, bits: int) -> Words:
    """Expand a key that is used for nothing else into `size` entries below 2^bits: the AES-256-CTR keystream."""
    kind = np.dtype(words(bits)).newbyteorder("<")
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    drawn: Words = np.frombuffer(bytearray(stream.update(bytes(size * kind.itemsize))), dtype=kind)
    drawn &= words(bits)((1 << bits) - 1)
    return drawn


@dataclass(frozen=True, slots=True)
class Secrets:
    """A node's secrets of one session. root: 32 random bytes, drawn once. digest: of the session's terms."""

    root: bytes = field(repr=False)
    digest: bytes

    def exchange_key(self) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(derive(self.root, self.digest, b"exchange"))

    def signing_key(self) -> bytes:
        """Key of a node without identity, for this session only."""
        return derive(self.root, self.digest, b"sign")

    def mask(self, size: int, bits: int) -> Words:
        return uniform(derive(self.root, self.digest, b"mask"), size, bits)

    def noise(self, size: int, bits: int) -> Words:
        return uniform(derive(self.root, self.digest, b"noise"), size, bits)


@dataclass(frozen=True, slots=True)
class Channel:
    """What two nodes share. context: hash of every key in the session. Opening anything else fails."""

    secret: bytes = field(repr=False)
    context: bytes

    @classmethod
    def between(cls, own: X25519PrivateKey, peer: int, public_key: bytes, context: bytes) -> Channel:
        """Raises RemoteError low-order-key when the peer's key makes the secret predictable [RFC7748]."""
        try:
            secret = own.exchange(X25519PublicKey.from_public_bytes(public_key))
        except ValueError as error:
            raise RemoteError("low-order-key", (peer,), "its public key is a point of low order") from error
        return cls(secret, context)

    def _cipher(self, sender: int, receiver: int) -> tuple[AESGCM, bytes]:
        way = sender.to_bytes(8, "big") + receiver.to_bytes(8, "big")
        return AESGCM(derive(self.secret, self.context, b"seal" + way)), self.context + way

    def seal(self, sender: int, receiver: int, text: Buffer) -> bytes:
        cipher, bound = self._cipher(sender, receiver)
        return cipher.encrypt(_NONCE, text, bound)

    def open(self, sender: int, receiver: int, text: Buffer) -> bytes:
        """Raises RemoteError bad-share (sender or server) when the text is not what the sender sealed."""
        cipher, bound = self._cipher(sender, receiver)
        try:
            return cipher.decrypt(_NONCE, text, bound)
        except InvalidTag as error:
            detail = f"the share of node {sender} for node {receiver} does not open"
            raise RemoteError("bad-share", (0, sender), detail) from error


def sign(secret_key: bytes, statement: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(secret_key).sign(statement)


def verify_key(secret_key: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(secret_key).public_key().public_bytes_raw()


def verified(key: bytes, signature: bytes, statement: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, statement)
    except (InvalidSignature, ValueError):
        return False
    return True
