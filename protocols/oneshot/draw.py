"""Drawing a committee from the roster so that nobody chooses it: commit, reveal, and the same members for everyone.

    commit    every node: 32 random bytes, hidden in a commitment
    reveal    every node: the bytes, once it was shown all commitments, its own among them
    members   the seed is the hash of all contributions, which opens every commitment or is none

The seed is uniform as soon as one node that commits is honest: the others are bound before it reveals. Commitments are
not signed, because a server that shows nodes different ones gets different committees, and a node refuses a session
whose committee is not its own. Whoever may end a draw after the last contribution can ask for another one, so a node
draws once for a context; a contribution that is withheld ends it, unless its node's peers hold shares of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from privfed.protocols import codec, keys
from privfed.protocols.codec import Reader
from privfed.protocols.errors import SERVER, DecodeError, LocalError, RemoteError
from privfed.protocols.graph import beacon_commitment, beacon_seed
from privfed.protocols.oneshot.agreement import draw_committee
from privfed.protocols.oneshot.sharing import MAX_COMMITTEE
from privfed.protocols.session import Identity, Random, os_random

CONTRIBUTION_BYTES = 32


@dataclass(frozen=True, slots=True)
class CommitteeDraw:
    """One node's part in one draw. Every step takes what was kept and returns what to keep, before anything is sent.

    size: members. context: what the draw is for, such as a run's id; with the roster and the size it is bound into
    every commitment, so that no contribution serves twice.
    """

    identity: Identity = field(repr=False)
    size: int
    context: bytes
    random: Random = field(default=os_random, repr=False)

    def __post_init__(self) -> None:
        roster = self.identity.roster
        if self.identity.node not in roster:
            raise LocalError(f"node {self.identity.node} is not on the roster")
        most = min(len(roster), MAX_COMMITTEE)
        if not 2 <= self.size <= most:
            raise LocalError(f"size must be between 2 and {most} of the {len(roster)} on the roster, got {self.size}")

    @property
    def bound(self) -> bytes:
        """What a commitment is bound to: context, size and the keys of the roster."""
        roster = codec.table(self.identity.roster.items())
        return keys.digest(b"oneshot draw", self.context, codec.u32(self.size), roster)

    def commit(self, kept: bytes) -> tuple[bytes, bytes]:
        """Return what to keep and the commitment. A second draw for the context is refused."""
        if kept:
            raise RemoteError("second-draw", (SERVER,), "this node draws once for a context")
        contribution = self.random(CONTRIBUTION_BYTES)
        return contribution + codec.table(()), beacon_commitment(self.bound, self.identity.node, contribution)

    def reveal(self, kept: bytes, commitments: Mapping[int, bytes]) -> tuple[bytes, bytes]:
        """Return what to keep and this node's contribution, for one list of commitments that has its own.

        Raises RemoteError: foreign-node, swapped-commitment, cohort-too-small (fewer than the committee has members),
        second-request for another list.
        """
        contribution, known = self._recall(kept)
        if known:
            if known != dict(commitments):
                raise RemoteError("second-request", (SERVER,), "this node revealed to other commitments")
            return kept, contribution
        if foreign := sorted(set(commitments) - set(self.identity.roster)):
            raise RemoteError("foreign-node", (SERVER,), f"nodes {foreign} are not on the roster")
        own = beacon_commitment(self.bound, self.identity.node, contribution)
        if commitments.get(self.identity.node) != own:
            raise RemoteError("swapped-commitment", (SERVER,), "this node's commitment is missing or another")
        if len(commitments) < self.size:
            raise RemoteError("cohort-too-small", (SERVER,), f"{len(commitments)} nodes draw {self.size} members")
        if any(len(value) != CONTRIBUTION_BYTES for value in commitments.values()):
            raise RemoteError("malformed-request", (SERVER,), "a commitment has 32 bytes")
        return contribution + codec.table(commitments.items()), contribution

    def members(self, kept: bytes, contributions: Mapping[int, bytes]) -> tuple[int, ...]:
        """Return the committee, ascending, once every commitment is opened. Raises what `beacon_seed` raises."""
        contribution, commitments = self._recall(kept)
        if not commitments:
            raise LocalError("the draw has no commitments yet: reveal first")
        if contributions.get(self.identity.node, contribution) != contribution:
            raise RemoteError("beacon-mismatch", (SERVER,), "this node's contribution came back changed")
        seed = beacon_seed(self.bound, commitments, contributions)
        return draw_committee(self.identity.roster, self.size, seed)

    def _recall(self, kept: bytes) -> tuple[bytes, dict[int, bytes]]:
        def read(reader: Reader) -> tuple[bytes, dict[int, bytes]]:
            contribution = bytes(reader.take(CONTRIBUTION_BYTES))
            return contribution, {node: bytes(row) for node, row in reader.table(CONTRIBUTION_BYTES).items()}

        try:
            return codec.decode(kept, read)
        except DecodeError as error:
            raise LocalError(f"kept is no state of a draw: commit first ({error})") from error
