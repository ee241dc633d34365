"""The session that the attacks on LightSecAgg start from, and how they look at a refusal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from privfed.audit.rehearsal import Rehearsal, Role, Run
from privfed.protocols.errors import RemoteError
from privfed.protocols.lightsecagg import LightSecAgg

ACTIVE = Rehearsal(LightSecAgg(), dimension=5, nodes=(3, 4, 5, 6), bits=16, active=True)
PASSIVE = replace(ACTIVE, active=False)
# The points of small order of Curve25519 and their non-canonical forms, as in RFC 7748 and Wycheproof.
LOW_ORDER = [
    bytes(32),
    (1).to_bytes(32, "little"),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    (2**255 - 20).to_bytes(32, "little"),
    (2**255 - 19).to_bytes(32, "little"),
    (2**255 - 18).to_bytes(32, "little"),
]


def role(run: Run, stage: str, node: int = 3) -> Role:
    at = run.lab.protocol.stages.index(stage)
    return next(r for r in run.roles() if r.stage == at and r.node == node)


def refusal(action: Callable[[], object]) -> tuple[str, tuple[int, ...]]:
    with pytest.raises(RemoteError) as caught:
        action()
    return caught.value.deviation, caught.value.culprits


def remade(honest: Role, *body: bytes) -> bytes:
    """A request of the same kind and session with another body."""
    return honest.request[:33] + b"".join(body)
