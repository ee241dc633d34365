"""Identities of simulated nodes: fresh keys for one run, over one roster, all in this process."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from functools import cached_property

from privfed.protocols.keys import signing_public
from privfed.protocols.session import Identity


class SimulatedIdentities:
    """Makes every node's identity on first use. A deployment loads a node's own key and the signed roster instead."""

    def __init__(self, nodes: Sequence[int]) -> None:
        self._nodes = nodes

    @cached_property
    def _keys(self) -> dict[int, bytes]:
        return {node: secrets.token_bytes(32) for node in self._nodes}

    @cached_property
    def _roster(self) -> dict[int, bytes]:
        return {node: signing_public(key) for node, key in self._keys.items()}

    def __call__(self, node: int) -> Identity:
        """Return the identity of a node of the run."""
        return Identity(node, self._keys[node], self._roster)
