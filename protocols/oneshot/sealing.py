"""Keys of the one-shot protocol: boxes sealed to the roster's identities, and streams of pseudorandom bytes.

A client's single message must reach members it never spoke to, so boxes are sealed to the members' identity
keys: an Ed25519 key pair is mapped to its X25519 form (one curve, two models), for which joint use with
signatures is proven safe [Tho21]. The sender's side of the exchange is a key that lives for one session, so
that a box's key, which binds the session's digest and both nodes, seals once.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from itertools import count

from privfed.protocols import prg
from privfed.protocols.codec import u64
from privfed.protocols.errors import LocalError
from privfed.protocols.keys import KEY_BYTES, Channel, agree, derive, signing_public
from privfed.protocols.oneshot.ciphertext import Keystream
from privfed.protocols.session import Identity

_FIELD = (1 << 255) - 19


def keystream(label: bytes, secret: bytes) -> Keystream:
    """Stream of a labelled secret or public value: the i-th call reads from the i-th derived seed."""
    calls = count()
    return lambda size: prg.keystream(derive(secret, b"oneshot " + label, u64(next(calls)), prg.SEED_BYTES), size)


@lru_cache(maxsize=4096)
def exchange_form(identity_key: bytes) -> bytes:
    """X25519 form of an Ed25519 public key: u = (1 + y) / (1 - y). Raises LocalError if it has none."""
    y = int.from_bytes(identity_key, "little") & ((1 << 255) - 1)
    if len(identity_key) != KEY_BYTES or y >= _FIELD or y == 1:
        raise LocalError("the roster holds a key that is no Ed25519 public key")
    return ((1 + y) * pow(1 - y, -1, _FIELD) % _FIELD).to_bytes(32, "little")


def seal_box(secret_key: bytes, digest: bytes, identity: Identity, receiver: int, text: bytes) -> bytes:
    """Seal a text for a member, once a session key and receiver: len(text) + 16 bytes.

    Raises RemoteError "low-order-key" when the roster's key makes the secret predictable.
    """
    shared = agree(secret_key, receiver, exchange_form(identity.roster[receiver]))
    return Channel(shared, digest).seal(identity.node, receiver, text)


def open_box(box: bytes, public_key: bytes, digest: bytes, sender: int, identity: Identity) -> bytes:
    """Open what `sender` sealed for us under its session key. RemoteError "bad-share" for anything else."""
    own = hashlib.sha512(identity.secret_key).digest()[:KEY_BYTES]
    return Channel(agree(own, sender, public_key), digest).open(sender, identity.node, box)


def check_identity(identity: Identity | None, node: int) -> Identity:
    """Return the identity; LocalError if it is missing, another node's, or not the one in its roster."""
    if identity is None:
        raise LocalError(
            f"node {node} needs identity=: shares are sealed to, and answers signed by, the keys of a roster"
        )
    if identity.node != node:
        raise LocalError(f"identity= is that of node {identity.node}, not of node {node}")
    if identity.roster.get(node) != signing_public(identity.secret_key):
        raise LocalError(f"the roster of identity= does not hold node {node}'s own public key")
    return identity
