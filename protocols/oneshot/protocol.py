"""OneShot: secure aggregation with one message per client, from ring learning with errors.

    (draw)    all nodes:    a beacon draws the committee, once a run, if `committee` is a number
    send      each node:    s, e <- discrete Gaussians; c = a s + e + (q/T) m; a sealed share of s per member
    confirm   each member:  checks the survivors U, adds their shares, signs U
    open      each member:  its share of the sum of the secrets, once t members signed the same U
    server                  sum of c - a (sum of s), rounded

Nodes that are not on the committee send once and may vanish; the server adds n vectors and decrypts once,
whoever drops.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from privfed.protocols.beacon import Beacon
from privfed.protocols.errors import SERVER, LocalError, RemoteError
from privfed.protocols.oneshot.agreement import Agreement, agree
from privfed.protocols.oneshot.client import OneShotClient
from privfed.protocols.oneshot.sealing import check_identity
from privfed.protocols.oneshot.server import STAGES, OneShotServer
from privfed.protocols.session import Drawn, Identity, Policy, Random, Session, os_random

MAX_BITS = 42


@dataclass(frozen=True, slots=True)
class OneShot:
    """Parameters of the one-shot protocol. Every client needs an identity.

    threshold: members t that open a sum: a count, a share of the committee, or None, solved for a third
        corrupt and a tenth gone. 2t > m + corrupt is required of the m members.
    committee: how many members there are, drawn by a beacon once a run; or their ids; or None: every node of the
        session. A member costs each node 5.4 kB.
    corrupt: nodes that may collude with the server; every sum holds at least corrupt + 2 inputs. All of them may be
        members, unless the committee was drawn: then no more than `privfed.protocols.beacon.corrupt_members` says.
    slots: ring entries per coefficient, 1 to 3; None: as many as the noise of n nodes leaves room for. More
        than one need `bounded`.
    bounded: True promises that every signed sum fits the ring's bits, as a quantiser ensures, so that several
        entries share a coefficient: 2 x 21 or 3 x 14 bits for up to 1010 nodes.

    Guarantees: the server and up to `corrupt` nodes learn the sum of the survivors and nothing else about an
    honest input [Hint-RLWE with standard deviation 3.2, docs/oneshot-security.md]. Source: [KP24], [BGLRS25], [KLSS23].
    """

    threshold: int | float | None = None
    committee: tuple[int, ...] | int | Drawn | None = None
    corrupt: int = 0
    slots: int | None = None
    bounded: bool = False

    def __post_init__(self) -> None:
        if self.threshold is not None:
            whole = isinstance(self.threshold, int)
            if (whole and self.threshold < 2) or (not whole and not 0 < self.threshold <= 1):
                raise ValueError(f"threshold must be a count of at least 2 or a share in (0, 1], got {self.threshold}")
        if isinstance(self.committee, int):
            if self.committee < 2 or isinstance(self.committee, bool):
                raise ValueError(f"committee must have at least 2 members, got {self.committee}")
        elif self.committee is not None and not isinstance(self.committee, Drawn):
            if not isinstance(self.committee, tuple | list):  # bytes are numbers too
                raise ValueError(f"committee must be a number or a tuple of ids, got {self.committee!r}")
            ids = tuple(self.committee)
            object.__setattr__(self, "committee", ids)  # a list is welcome; equal parameters must be equal
            if not all(isinstance(node, int) for node in ids) or any(
                low >= high for low, high in zip((0, *ids), ids, strict=False)
            ):
                raise ValueError("committee must hold ascending distinct ids > 0")
        if not isinstance(self.corrupt, int) or self.corrupt < 0:
            raise ValueError(f"corrupt must be a number of nodes, at least 0, got {self.corrupt!r}")
        if self.slots is not None and (not isinstance(self.slots, int) or not 1 <= self.slots <= 3):
            raise ValueError(f"slots must be 1, 2, 3 or None, got {self.slots!r}")
        if not isinstance(self.bounded, bool):
            raise ValueError(f"bounded must be True or False, got {self.bounded!r}")
        if self.slots is not None and self.slots > 1 and not self.bounded:
            raise ValueError(
                f"slots={self.slots} need bounded=True: carries between entries would tell more than a sum"
            )

    @property
    def stages(self) -> tuple[str, ...]:
        """("send", "confirm", "open")."""
        return STAGES

    @property
    def max_bits(self) -> int:
        """Widest ring that the noise of 1010 nodes leaves readable: 42 bits."""
        return MAX_BITS

    @property
    def mode(self) -> str:
        """Always "active": the server may deviate."""
        return "active"

    @property
    def beacon(self) -> Beacon | None:
        """What must be run, once a run and over all of its nodes, before a session: see `with_drawn`."""
        return Beacon(committee=self.committee) if isinstance(self.committee, int) else None

    def with_drawn(self, drawn: Drawn) -> OneShot:
        """Return these parameters with the committee that the beacon drew. Raises LocalError for another size."""
        size = self.committee if isinstance(self.committee, int) else len(drawn.members)
        if size != len(drawn.members):
            raise LocalError(f"a committee of {len(drawn.members)} was drawn in this run, one of {size} is asked for")
        return replace(self, committee=drawn)

    def agree(self, session: Session) -> Agreement:
        """Resolve the parameters for a session. Raises LocalError when they are unsafe or do not fit it."""
        if isinstance(self.committee, int):
            raise LocalError(f"committee={self.committee} is a number: run its beacon first, see OneShot.with_drawn")
        return agree(session, self.threshold, self.committee, self.corrupt, self.slots, self.bounded)

    def withstands(self, session: Session) -> int:
        """Return how many nodes of a session may collude with its server and learn no more than the sum.

        All of them may be on a committee that was not drawn, however many its parameters count.
        """
        agreement = self.agree(session)
        members = len(agreement.committee)
        if isinstance(self.committee, Drawn):
            return agreement.invitation.corrupt
        return max(0, min(2 * agreement.threshold - members - 1, members - 2))

    def server(self, session: Session, *, random: Random = os_random) -> OneShotServer:
        """Start a session on the server, which draws nothing. LocalError when the parameters do not fit."""
        return OneShotServer(self.agree(session))

    def client(
        self,
        node: int,
        *,
        identity: Identity | None = None,
        policy: Policy = Policy(),
        random: Random = os_random,
    ) -> OneShotClient:
        """Start a node's part. Raises LocalError without an identity that is this node's own.

        Where a beacon draws the committee, the node takes part with `Policy.committee`, the one it saw drawn.
        """

        def agree(session: Session) -> Agreement:
            if not isinstance(self.committee, int):
                return self.agree(session)
            if policy.committee is None:
                detail = f"this node saw no committee of {self.committee} drawn in this run"
                raise RemoteError("committee-not-drawn", (SERVER,), detail)
            return self.with_drawn(policy.committee).agree(session)

        return OneShotClient(node, agree, check_identity(identity, node), policy, random)
