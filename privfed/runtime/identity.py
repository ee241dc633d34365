"""Identities of simulated nodes: fresh keys for one run, over one roster, all in this process."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence

from privfed.protocols.keys import signing_public
from privfed.protocols.session import Identity


class SimulatedIdentities:
    """Makes every node's identity on first use. A deployment loads a node's own key and the signed roster instead."""

    def __init__(self, nodes: Sequence[int]) -> None:
        self._nodes = nodes
        self._keys: dict[int, bytes] = {}
        self._roster: dict[int, bytes] = {}
        self._making = threading.Lock()  # nodes run in threads, and all must know the same keys

    def __call__(self, node: int) -> Identity:
        """Return the identity of a node of the run."""
        with self._making:
            if not self._roster:
                self._keys = {one: secrets.token_bytes(32) for one in self._nodes}
                self._roster = {one: signing_public(key) for one, key in self._keys.items()}
        return Identity(node, self._keys[node], self._roster)
