"""One-shot secure aggregation: one client message, a decryption committee, a server that only adds [RLWE]."""

from __future__ import annotations

from privfed.protocols.beacon import draw_committee
from privfed.protocols.oneshot.protocol import OneShot

__all__ = ["OneShot", "draw_committee"]
