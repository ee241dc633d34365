"""LightSecAgg [SHY+22]: masks are coded among the nodes beforehand, and one decoding opens their sum.

The server's work does not depend on how many nodes vanish. `threshold` = U nodes must stay to the end; the server
together with any `privacy` = T nodes learns nothing but the sum. Before any share of a mask is used, U nodes sign the
same set of survivors, and 2 U > n + T, so that no second sum can be opened.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from privfed.protocols import codec, graph
from privfed.protocols.errors import LocalError
from privfed.protocols.lightsecagg.client import LightSecAggClient
from privfed.protocols.lightsecagg.code import MAX_NODES
from privfed.protocols.lightsecagg.messages import Terms
from privfed.protocols.lightsecagg.server import STAGES, LightSecAggServer
from privfed.protocols.session import Identity, Policy, Random, Session, os_random

CORRUPT, DROPOUT = 1 / 3, 0.1
"""What `threshold=None` provides for: shares of the cohort that collude with the server, and that vanish."""


@dataclass(frozen=True)
class LightSecAgg:
    """Parameters of LightSecAgg.

    threshold: nodes that must answer the last stage, a count or a share of the cohort (rounded up); None: the least
    that protects against a third of corrupt nodes while a tenth may vanish. privacy: colluding nodes that learn
    nothing, at most and by default 2 threshold - n - 1; with 0, the server alone learns nothing.
    liars: nodes whose wrong sums of shares are noticed, however they agree among one another: a session goes on only
    while threshold + liars nodes answer. With 0 and exactly `threshold` answers one node can shift the sum unnoticed.
    Each node uploads n / (threshold - privacy) vectors of shares beside its masked input.
    Raises LocalError (from `resolve`, `server` and `client` steps) for cohorts these parameters do not suit.
    """

    threshold: int | float | None = None
    privacy: int | None = None
    liars: int = 0

    def __post_init__(self) -> None:
        if self.threshold is not None and not isinstance(self.threshold, int | float):
            raise ValueError(f"threshold must be a count, a share or None, got {self.threshold!r}")
        if isinstance(self.threshold, float) and not 0 < self.threshold <= 1:
            raise ValueError(f"threshold as a share must be in (0, 1], got {self.threshold}")
        if isinstance(self.threshold, int) and self.threshold < 2:
            raise ValueError(f"threshold must be at least 2 nodes, got {self.threshold}")
        if self.privacy is not None and (not isinstance(self.privacy, int) or self.privacy < 0):
            raise ValueError(f"privacy must be a number of nodes, got {self.privacy!r}")

        if not isinstance(self.liars, int) or isinstance(self.liars, bool) or self.liars < 0:
            raise ValueError(f"liars must be a number of nodes, got {self.liars!r}")

    @property
    def stages(self) -> tuple[str, ...]:
        return STAGES

    def resolve(self, n: int) -> tuple[int, int]:
        """Threshold and privacy for a cohort of n nodes. Raises LocalError when there are none."""
        if not 2 <= n <= MAX_NODES:
            raise LocalError(f"LightSecAgg needs between 2 and {MAX_NODES} nodes, got {n}: group them")
        if self.threshold is None:
            threshold = graph.solve_full_graph(n, CORRUPT, DROPOUT, True).threshold  # there is one from 2 nodes on
        elif isinstance(self.threshold, float):
            threshold = max(2, math.ceil(self.threshold * n - 1e-9))
        else:
            threshold = self.threshold
        most = 2 * threshold - n - 1
        privacy = most if self.privacy is None else self.privacy
        if threshold > n or most < 0 or privacy > most:
            raise LocalError(
                f"threshold {threshold} and privacy {privacy} do not suit {n} nodes: threshold <= n and "
                f"2 threshold > n + privacy must hold, so set threshold between {(n + privacy) // 2 + 1} and {n}"
            )
        if threshold + self.liars > n:
            raise LocalError(
                f"threshold {threshold} and {self.liars} liars need {threshold + self.liars} answers of {n} nodes: "
                "lower one of them, or use more nodes"
            )
        return threshold, privacy

    def withstands(self, session: Session) -> int:
        """Return how many nodes of a session may collude with its server and learn no more than the sum."""
        return self.resolve(len(session.nodes))[1]

    def server(self, session: Session, *, random: Random = os_random) -> LightSecAggServer:
        """Start a session. Raises LocalError when the session or the parameters cannot work."""
        if any(a >= b for a, b in pairwise((0, *session.nodes))):
            raise LocalError("session.nodes must be distinct ids above 0, ascending")
        if not 1 <= session.bits <= 64:
            raise LocalError(f"session.bits must be between 1 and 64, got {session.bits}")
        if not 0 <= session.dimension <= codec.MAX_DIMENSION:
            raise LocalError(f"session.dimension must be between 0 and {codec.MAX_DIMENSION}")
        if session.run < 0 or session.round < 0 or len(session.binding) != 32:
            raise LocalError("session needs a run and a round of 0 or more and a binding of 32 bytes")
        if len(session.action.encode()) > codec.MAX_ACTION:
            raise LocalError(f"session.action must have at most {codec.MAX_ACTION} bytes, got {session.action!r}")
        threshold, privacy = self.resolve(len(session.nodes))
        return LightSecAggServer(Terms(session, threshold, privacy), random, self.liars)

    def client(
        self,
        node: int,
        *,
        identity: Identity | None = None,
        policy: Policy = Policy(),
        random: Random = os_random,
    ) -> LightSecAggClient:
        """Take part as `node`. Without an identity the server is trusted to relay keys unchanged: semi-honest only.

        A policy that requires active security refuses that, and sessions that would not notice lying reveals.
        """
        return LightSecAggClient(node, self.resolve, policy, identity, random, self.liars)
