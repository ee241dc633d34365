"""What a session and the parameters amount to: threshold, committee, packing and digest, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from privfed.protocols import graph, keys
from privfed.protocols.beacon import corrupt_members
from privfed.protocols.codec import MAX_ACTION, MAX_DIMENSION, MAX_NODE
from privfed.protocols.errors import LocalError
from privfed.protocols.oneshot.ciphertext import Keystream, wire_size
from privfed.protocols.oneshot.messages import Invitation
from privfed.protocols.oneshot.packing import Packing, choose
from privfed.protocols.oneshot.sealing import keystream
from privfed.protocols.oneshot.sharing import MAX_COMMITTEE, MAX_NODES
from privfed.protocols.session import Drawn, Session

_SOLVED_CORRUPT = 1 / 3
_SOLVED_DROPOUT = 0.1


@dataclass(frozen=True)
class Agreement:
    """One session as every honest party sees it."""

    invitation: Invitation
    packing: Packing

    @property
    def session(self) -> Session:
        return self.invitation.session

    @property
    def threshold(self) -> int:
        return self.invitation.threshold

    @property
    def committee(self) -> tuple[int, ...]:
        return self.invitation.committee

    @property
    def fewest_survivors(self) -> int:
        """Inputs that a sum must hold so that at least two of them are honest."""
        return self.invitation.corrupt + 2

    @property
    def coefficients(self) -> int:
        return self.packing.coefficients(self.session.dimension)

    @property
    def ciphertext_bytes(self) -> int:
        return wire_size(self.coefficients)

    @cached_property
    def request(self) -> bytes:
        return self.invitation.encode()

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that bind session and parameters into every key, signature and public polynomial."""
        return keys.digest(b"oneshot session", self.request)

    def public(self) -> Keystream:
        """Keystream of the session's public polynomials: the same for everyone, fresh for every digest."""
        return keystream(b"public", self.digest)

    @cached_property
    def _place(self) -> dict[int, int]:
        return {member: place for place, member in enumerate(self.committee)}

    def box_index(self, node: int, member: int) -> int:
        """Place of a member's box among those of a node, which has none for itself."""
        place = self._place[member]
        return place - (self._place.get(node, place) < place)

    def boxes_of(self, node: int) -> int:
        """Boxes in a node's contribution: one for every member but itself."""
        return len(self.committee) - (node in self.committee)


def check_session(session: Session) -> None:
    """Raise LocalError unless the session's facts can be encoded and shared."""
    nodes = session.nodes
    if len(nodes) < 2 or any(low >= high for low, high in zip((0, *nodes), nodes, strict=False)):
        raise LocalError("session.nodes must be at least two ascending distinct ids > 0")
    if len(nodes) > MAX_NODES:
        raise LocalError(f"session.nodes holds {len(nodes)} nodes; secrets of {MAX_NODES} fit the share field")
    if nodes[-1] > MAX_NODE:
        raise LocalError("session.nodes must be below 2^63")
    if not 0 <= session.dimension <= MAX_DIMENSION:
        raise LocalError(f"session.dimension must be 0..2^36, got {session.dimension}")
    if not 1 <= session.bits <= 64:
        raise LocalError(f"session.bits must be 1..64, got {session.bits}")
    if len(session.binding) != 32:
        raise LocalError(f"session.binding must be 32 bytes, got {len(session.binding)}")
    if not (0 <= session.run < 1 << 64 and 0 <= session.round < 1 << 64):
        raise LocalError("session.run and session.round must be 0..2^64 - 1")
    if len(session.action.encode()) > MAX_ACTION:
        raise LocalError(f"session.action must be at most {MAX_ACTION} bytes")


def resolve_threshold(threshold: int | float | None, members: int, corrupt: int) -> int:
    """Turn a count, a share of the committee or None (solved for 1/3 corrupt, 1/10 gone) into a count.

    Raises LocalError unless m >= corrupt + 2, t <= m, 2t > m + corrupt, and float64 can share among so many. So at
    least two honest members open every sum: a single one could be the difference of that sum and the next.
    """
    if not 2 <= members <= MAX_COMMITTEE:
        raise LocalError(f"committee= has {members} members; 2 to {MAX_COMMITTEE} can hold shares")
    if threshold is None:
        t = graph.solve_full_graph(members, _SOLVED_CORRUPT, _SOLVED_DROPOUT, True).threshold
        t = max(t, (members + corrupt) // 2 + 1)
    else:
        t = math.ceil(threshold * members) if isinstance(threshold, float) else threshold
    if members < corrupt + 2:
        raise LocalError(f"committee= has {members} members, {corrupt} of them corrupt: two honest ones are needed")
    if not t <= members:
        raise LocalError(f"threshold={t} exceeds the {members} members of the committee")
    if 2 * t <= members + corrupt:
        raise LocalError(
            f"threshold={t} lets {corrupt} corrupt of {members} members open two different sums: "
            f"2t > m + corrupt needs threshold >= {(members + corrupt) // 2 + 1}"
        )
    return t


def agree(
    session: Session,
    threshold: int | float | None,
    committee: tuple[int, ...] | Drawn | None,
    corrupt: int,
    slots: int | None,
    bounded: bool,
) -> Agreement:
    """Resolve the parameters for a session. Raises LocalError when they are unsafe or do not fit it.

    Of a committee that was drawn, no more members are corrupt than `corrupt_members` says, and members need not be in
    the session; of another one all corrupt nodes may be members.
    """
    check_session(session)
    inside = corrupt
    if isinstance(committee, Drawn):
        members = committee.members
        if corrupt > committee.nodes or not 2 <= len(members) <= committee.nodes:
            raise LocalError(f"corrupt={corrupt} or the committee is more than the {committee.nodes} it was drawn from")
        inside = corrupt_members(committee.nodes, len(members), corrupt)
    else:
        members = session.nodes if committee is None else committee
        if not set(members) <= set(session.nodes):
            raise LocalError("committee= names nodes that are not in session.nodes")
    if len(session.nodes) < corrupt + 2:
        raise LocalError(f"corrupt={corrupt} leaves fewer than two honest of {len(session.nodes)} nodes")
    t = resolve_threshold(threshold, len(members), inside)
    packing = choose(session.bits, len(session.nodes), slots, bounded)
    return Agreement(Invitation(session, t, corrupt, members, packing.slots, packing.bounded), packing)


def resume(invitation: Invitation) -> Agreement:
    """Return the agreement of an invitation that this node accepted before."""
    session = invitation.session
    return Agreement(invitation, choose(session.bits, len(session.nodes), invitation.slots, invitation.bounded))
