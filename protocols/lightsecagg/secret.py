"""Everything secret of a node in a session, derived from one 32-byte root.

A step of a node is a function of what it kept and of the request, so that repeating one repeats its bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from privfed.protocols import keys, prg
from privfed.protocols.lightsecagg.exact import Words


@dataclass(frozen=True, slots=True)
class Secrets:
    """A node's secrets of one session. root: 32 random bytes, drawn once. digest: of the session's terms."""

    root: bytes = field(repr=False)
    digest: bytes

    def _derive(self, label: bytes, size: int = 32) -> bytes:
        return keys.derive(self.root, b"lightsecagg " + label, self.digest, size)

    def public_key(self) -> bytes:
        return keys.exchange_public(self._derive(b"exchange"))

    def signing_key(self) -> bytes:
        """Key of a node without identity, for this session only."""
        return self._derive(b"sign")

    def channel(self, peer: int, public_key: bytes, context: bytes) -> keys.Channel:
        """What this node shares with a peer, in this context. Raises RemoteError low-order-key."""
        return keys.Channel(keys.agree(self._derive(b"exchange"), peer, public_key), context)

    def mask(self, size: int, bits: int) -> Words:
        return prg.expand(self._derive(b"mask", prg.SEED_BYTES), size, bits)

    def noise(self, size: int, bits: int) -> Words:
        return prg.expand(self._derive(b"noise", prg.SEED_BYTES), size, bits)

    def version(self, number: int) -> Secrets:
        """Secrets of the mask of one version of the model, in a run that has many."""
        return Secrets(self._derive(b"version" + number.to_bytes(8, "big")), self.digest)
