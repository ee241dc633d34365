"""Errors of the protocols: whose fault it is decides the class.

ProtocolError
├── LocalError            the caller did something wrong; nothing was sent
│   └── RangeError        an input or a sum that does not fit the ring (an OverflowError too)
├── RemoteError           a peer did; `culprits` names the nodes (0 is the server), `deviation` the rule it broke
├── DecodeError           bytes that are no message; drivers turn it into a RemoteError of the sender
└── TooFewSurvivors       nobody's fault: `have` nodes are left, `threshold` are needed
"""

from __future__ import annotations

from collections.abc import Iterable

SERVER = 0


class ProtocolError(Exception):
    """Root of every error a protocol raises."""


class LocalError(ProtocolError):
    """The caller's own mistake: bad parameters, an input out of range, a step out of order."""


class RangeError(LocalError, OverflowError):
    """An input, or a possible sum, does not fit: raised before anything could wrap."""


class RemoteError(ProtocolError):
    """A peer broke the protocol.

    `culprits`: node ids, 0 for the server. `deviation`: short kebab-case name of the broken rule.
    """

    def __init__(self, deviation: str, culprits: Iterable[int], detail: str = "") -> None:
        self.deviation = deviation
        self.culprits = tuple(sorted(set(culprits)))
        who = ", ".join("server" if node == SERVER else f"node {node}" for node in self.culprits)
        super().__init__(f"{deviation} by {who or 'unknown'}" + (f": {detail}" if detail else ""))


class DecodeError(ProtocolError):
    """Bytes that do not encode a message of the expected kind, canonically."""


class TooFewSurvivors(ProtocolError):
    """Fewer nodes answered than the protocol needs; no sum was computed."""

    def __init__(self, have: int, threshold: int, stage: str = "") -> None:
        self.have = have
        self.threshold = threshold
        self.stage = stage
        where = f" at stage {stage!r}" if stage else ""
        super().__init__(f"{have} nodes answered{where}, {threshold} are needed")
