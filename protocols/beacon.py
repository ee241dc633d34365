"""A commit-reveal beacon: it splits a public cohort into groups, or draws a committee from it, and nobody chooses them.

Every node commits to 32 random bytes, is shown all commitments, reveals, and computes seed and groups (or committee)
from what all revealed. A node accepts one list of commitments, before any of its own bytes are known, so the seed is
uniform for it if it is honest itself, whatever everybody else does. A reveal that is missing ends the attempt, and a
server that withholds one after it saw the seed could try again: so a node reveals in at most `ATTEMPTS` beacons of a
run, and the bound on corrupt members is paid for that many seeds at every node (`corrupt_members`), which also covers a
server that shows nodes different lists. Once settled, groups and committee stay for the run.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import comb

from privfed.protocols import codec, keys
from privfed.protocols.codec import Reader
from privfed.protocols.errors import SERVER, DecodeError, LocalError, RemoteError, TooFewSurvivors
from privfed.protocols.graph import SIGMA, beacon_commitment, beacon_seed, count
from privfed.protocols.session import Buffer, Drawn, Identity, Policy, Random, RingSum, Session, Source, os_random

STAGES = ("commit", "reveal", "settle")
COMMIT, REVEAL, SETTLE = range(0x60, 0x63)
COMMITTED, REVEALED, SETTLED = range(1, 4)
ATTEMPTS = 4
"""Beacons of a run in which a node reveals its bytes: the seeds a server can look at before it takes one."""

_ROW = 32 + keys.SIGNATURE_BYTES
Groups = tuple[tuple[int, ...], ...]


def draw_groups(seed: bytes, nodes: tuple[int, ...], group_size: int) -> Groups:
    """Split nodes into random groups of at least `group_size` (one smaller group if there are fewer nodes)."""
    number = max(1, len(nodes) // group_size)
    order = sorted(nodes, key=lambda node: hashlib.sha256(b"privfed groups v1\0" + seed + codec.u64(node)).digest())
    return tuple(sorted(tuple(sorted(order[start::number])) for start in range(number)))


def draw_committee(roster: Mapping[int, bytes] | Sequence[int], size: int, seed: bytes) -> tuple[int, ...]:
    """Draw `size` members uniformly from a roster, the same for everyone who knows the seed.

    seed: 32 bytes of `graph.beacon_seed`, that is, chosen by no one. Draw from those who made it, never from a cohort
    that the server picked after it knew the seed: it would try cohorts until the committee suits it.
    """
    nodes = sorted(roster)
    if not 2 <= size <= len(nodes):
        raise ValueError(f"size must be 2..{len(nodes)}, got {size}")
    if len(seed) != 32:
        raise ValueError(f"seed must be 32 bytes, got {len(seed)}")

    def ticket(node: int) -> bytes:
        return keys.digest(b"oneshot committee", seed, keys.node_bytes(node))

    return tuple(sorted(sorted(nodes, key=ticket)[:size]))


@lru_cache(maxsize=1024)
def corrupt_members(nodes: int, size: int, corrupt: int) -> int:
    """Return the least c with P[more than c of `size` members are corrupt] <= 2^-40; exact.

    Over all nodes and all `ATTEMPTS` seeds that a server can show each of them; `corrupt` of the `nodes` collude.
    """
    limit, total, above = comb(nodes, size), nodes * ATTEMPTS << SIGMA, 0
    for bad in range(min(size, corrupt), 0, -1):
        above += comb(corrupt, bad) * comb(nodes - corrupt, size - bad)
        if above * total > limit:
            return bad
    return 0


def anonymity(nodes: int, size: int, corrupt: float) -> int:
    """Return how many honest nodes a sum over `size` members of a group hides among, itself included; exact.

    A share `corrupt` of the nodes collude with the server; `corrupt_members` bounds those in a group. 0: no one hides.
    """
    return size - corrupt_members(nodes, size, count(nodes, corrupt))


@lru_cache(maxsize=4)
def _settled(context: bytes, commitments: bytes, rows: bytes, group_size: int, committee: int) -> Groups:
    """Open a transcript; all nodes of one process share the work. Raises RemoteError or DecodeError.

    Returns the groups, or the committee as the only one.
    """
    opened = codec.decode(rows, lambda r: r.table(_ROW))
    committed = codec.decode(commitments, lambda r: r.table(32))
    seed = beacon_seed(
        context,
        {node: bytes(row) for node, row in committed.items()},
        {node: bytes(row[:32]) for node, row in opened.items()},
    )
    if committee:
        return (draw_committee(tuple(committed), committee, seed),)
    return draw_groups(seed, tuple(committed), group_size)


@dataclass(frozen=True, slots=True)
class Kept:
    """What a node remembers of beacons: contribution before it is revealed, what was drawn once it is settled.

    group: its own group, or the committee. nodes: how many committed, and so could be drawn.
    """

    phase: int = 0
    attempts: int = 0
    contribution: bytes = field(default=bytes(32), repr=False)
    terms: bytes = b""
    commitments: bytes = b""
    group: tuple[int, ...] = ()
    nodes: int = 0

    def encode(self) -> bytes:
        head = codec.u8(self.phase) + codec.u8(self.attempts) + self.contribution
        return head + codec.blob(self.terms) + codec.blob(self.commitments) + _outcome(self.group, self.nodes)

    @classmethod
    def decode(cls, kept: bytes) -> Kept:
        def read(r: Reader) -> Kept:
            phase, attempts, contribution = r.number(1), r.number(1), bytes(r.take(32))
            return cls(phase, attempts, contribution, bytes(r.blob()), bytes(r.blob()), *_read_outcome(r))

        return codec.decode(kept, read) if kept else cls()


def _outcome(group: tuple[int, ...], nodes: int) -> bytes:
    return codec.u32(nodes) + codec.node_list(group)


def _read_outcome(r: Reader) -> tuple[tuple[int, ...], int]:
    nodes = r.number(4)
    return r.nodes(), nodes


def group_of(kept: bytes) -> tuple[int, ...] | None:
    """Return the settled group in what a node kept of its beacons, or None."""
    state = Kept.decode(kept)
    return state.group if state.phase == SETTLED else None


def group_corrupt(kept: bytes, corrupt: float) -> int:
    """Return how many members of its settled group a node has to take for corrupt: a share of all who were drawn from.

    A group that was drawn holds more of them than its share, now and then: `corrupt_members` of it, but for 2^-40.
    """
    state = Kept.decode(kept)
    return corrupt_members(state.nodes, len(state.group), count(state.nodes, corrupt))


def committee_of(kept: bytes) -> Drawn | None:
    """Return the settled committee in what a node kept of its beacons, or None."""
    state = Kept.decode(kept)
    return Drawn(state.group, state.nodes) if state.phase == SETTLED else None


def _terms(session: Session, group_size: int, committee: int) -> bytes:
    return codec.encode_session(session) + codec.u32(group_size) + codec.u32(committee)


def _read_terms(r: Reader) -> tuple[Session, int, int]:
    session, size, committee = codec.read_session(r), r.number(4), r.number(4)
    if (size == 0) == (committee == 0):
        raise DecodeError("a beacon draws groups or a committee")
    return session, size, committee


def _statement(context: bytes, commitments: bytes) -> tuple[bytes, bytes, bytes]:
    return b"beacon view", context, commitments


def _refuse(deviation: str, detail: str) -> RemoteError:
    return RemoteError(deviation, (SERVER,), detail)


@dataclass(frozen=True, slots=True)
class BeaconClient:
    """One node. What it kept of earlier beacons of the run goes in as `kept` at the first stage.

    group_size, committee: of its `Beacon`; a request for another draw is refused.
    """

    node: int
    identity: Identity | None = field(repr=False)
    policy: Policy
    random: Random = field(repr=False)
    group_size: int
    committee: int

    def step(self, kept: bytes, request: Buffer, source: Source) -> tuple[bytes, Buffer]:
        """Answer one request. Raises RemoteError naming the deviation."""
        del source
        state, raw = Kept.decode(kept), bytes(request)
        try:
            kind = raw[0] if raw else 0
            if kind == COMMIT:
                after, reply = self._commit(state, raw[1:])
            elif kind == REVEAL and state.phase == COMMITTED:
                after, reply = self._reveal(state, raw[1:])
            elif kind == SETTLE and state.phase == REVEALED:
                after, reply = self._settle(state, raw[1:])
            else:
                raise _refuse("out-of-order", f"a beacon request of kind {kind:#x} in phase {state.phase}")
        except DecodeError as fault:
            raise _refuse("malformed", str(fault)) from None
        return after.encode(), reply

    def _check_size(self, size: int, committee: int, nodes: int) -> None:
        """Refuse groups below the floor of a cohort, a committee below that of neighbours, or too few to draw from."""
        least = max(2, self.policy.min_cohort)
        if min(size or nodes, nodes) < least:
            raise _refuse("group-too-small", f"{nodes} nodes, groups of {size or nodes}: this node wants {least}")
        if committee and not max(2, self.policy.min_neighbours + 1) <= committee <= nodes:
            raise _refuse("committee-too-small", f"a committee of {committee} of {nodes} nodes is asked for")

    def _commit(self, state: Kept, terms: bytes) -> tuple[Kept, bytes]:
        session, size, committee = codec.decode(terms, _read_terms)
        if state.phase == SETTLED:  # what was drawn stays for the run; a server that lost it may hear what it is
            return state, codec.u8(SETTLED) + _outcome(state.group, state.nodes)
        self.policy.check_facts(session)
        if self.node not in session.nodes:
            raise _refuse("foreign-session", f"node {self.node} is not in the cohort")
        self._check_size(size, committee, len(session.nodes))
        if self.policy.require_active and self.identity is None:
            raise LocalError("the policy requires active security: give this node an identity")
        if self.identity is not None and (strangers := set(session.nodes) - set(self.identity.roster)):
            raise _refuse("foreign-node", f"nodes {sorted(strangers)} are not on the roster")
        if (size, committee) != (self.group_size, self.committee):
            raise _refuse(
                "parameters-differ", f"groups of {size}, a committee of {committee}: asked for by another draw"
            )
        fresh = self.random(32)
        reply = codec.u8(COMMITTED) + beacon_commitment(keys.digest(b"beacon", terms), self.node, fresh)
        return Kept(COMMITTED, state.attempts, fresh, terms), reply

    def _reveal(self, state: Kept, commitments: bytes) -> tuple[Kept, bytes]:
        session, size, committee = codec.decode(state.terms, _read_terms)
        rows = codec.decode(commitments, lambda r: r.table(32))
        context = keys.digest(b"beacon", state.terms)
        if state.attempts >= ATTEMPTS:
            raise _refuse("beacon-exhausted", f"this node revealed its bytes in {ATTEMPTS} beacons of this run")
        if bytes(rows.get(self.node, b"")) != beacon_commitment(context, self.node, state.contribution):
            raise _refuse("swapped-commitment", "this node's own commitment is missing or changed")
        if not set(rows) <= set(session.nodes):
            raise _refuse("foreign-node", "a node outside the cohort is said to have committed")
        self._check_size(size, committee, len(rows))
        signature = bytes(keys.SIGNATURE_BYTES)
        if self.identity is not None:
            signature = keys.sign(self.identity.secret_key, *_statement(context, commitments))
        after = replace(state, phase=REVEALED, attempts=state.attempts + 1, commitments=commitments)
        return after, state.contribution + signature

    def _settle(self, state: Kept, rows: bytes) -> tuple[Kept, bytes]:
        _, size, committee = codec.decode(state.terms, _read_terms)
        context = keys.digest(b"beacon", state.terms)
        groups = _settled(context, state.commitments, rows, size, committee)
        own = groups[0] if committee else next(group for group in groups if self.node in group)
        if self.identity is not None:
            given = codec.decode(rows, lambda r: r.table(_ROW))
            for member in own:
                statement = _statement(context, state.commitments)
                if not keys.verified(self.identity.roster[member], given[member][32:], *statement):
                    raise RemoteError("split-beacon", (SERVER, member), f"node {member} did not see these commitments")
        reply = keys.digest(b"beacon settled", context, rows)
        return Kept(SETTLED, state.attempts, group=own, nodes=_rows(state.commitments)), reply


def _rows(commitments: bytes) -> int:
    """Return how many nodes committed."""
    return len(codec.decode(commitments, lambda r: r.table(32)))


class BeaconServer:
    """One beacon. After "reveal" `groups` is set; TooFewSurvivors at "reveal": try again without the silent.

    groups: of a committee's draw the committee alone. nodes: how many committed.
    """

    def __init__(self, session: Session, group_size: int, committee: int = 0) -> None:
        if committee > len(session.nodes):
            raise LocalError(f"committee={committee} is more than the {len(session.nodes)} nodes that are there")
        self._terms = _terms(session, group_size, committee)
        self._context, self._size, self._committee = keys.digest(b"beacon", self._terms), group_size, committee
        self._at = 0
        self._asked: tuple[int, ...] = session.nodes
        self._replies: dict[int, bytes] = {}
        self._known: dict[int, tuple[tuple[int, ...], int]] = {}
        self._commitments = b""
        self._request: Buffer = codec.u8(COMMIT) + self._terms
        self.groups: Groups = ()
        self.nodes = 0

    @property
    def drawn(self) -> Drawn:
        """The committee, once it is drawn. Raises LocalError before."""
        if not self._committee or not self.groups:
            raise LocalError("no committee was drawn")
        return Drawn(self.groups[0], self.nodes)

    @property
    def stage(self) -> str:
        return STAGES[self._at] if self._at < len(STAGES) else ""

    @property
    def result(self) -> RingSum | None:
        """A beacon opens no sum."""
        return None

    @property
    def silent(self) -> tuple[int, ...]:
        """Nodes that have not answered the open stage."""
        return tuple(node for node in self._asked if node not in self._replies)

    def outbound(self) -> dict[int, Buffer]:
        """Return the requests of the open stage, by node."""
        return dict.fromkeys(self._asked, self._request)

    def receive(self, node: int, reply: Buffer) -> None:
        """Take one reply. Raises RemoteError naming the node."""
        raw = bytes(reply)
        if node not in self._asked or self._replies.get(node, raw) != raw or not self.stage:
            raise RemoteError("unexpected-reply", (node,), f"no such reply is due at stage {self.stage!r}")
        if self.stage == "commit" and raw[:1] == codec.u8(SETTLED):
            try:
                self._known[node] = codec.decode(raw[1:], _read_outcome)
            except DecodeError as fault:
                raise RemoteError("malformed", (node,), str(fault)) from None
        elif len(raw) != {"commit": 33, "reveal": _ROW, "settle": 32}[self.stage]:
            raise RemoteError("malformed", (node,), f"{len(raw)} bytes at stage {self.stage!r}")
        if self.stage == "reveal" and not self._opens(node, raw[:32]):
            raise RemoteError("beacon-mismatch", (node,), "the revealed bytes do not open the commitment")
        self._replies[node] = raw

    def _opens(self, node: int, contribution: bytes) -> bool:
        rows = codec.decode(self._commitments, lambda r: r.table(32))
        return keys.same(beacon_commitment(self._context, node, contribution), bytes(rows[node]))

    def close(self) -> None:
        """End the stage. Raises TooFewSurvivors."""
        stage, replies = self.stage, self._replies
        if stage == "commit":
            if 2 * len(self._known) > len(replies):
                self.groups, self.nodes = self._agreed()
                self._at = len(STAGES)
                return
            fresh = {node: raw for node, raw in replies.items() if node not in self._known}
            if len(fresh) < max(2, self._committee):
                raise TooFewSurvivors(len(fresh), max(2, self._committee), stage)
            self.nodes = len(fresh)
            self._commitments = codec.table((node, raw[1:]) for node, raw in fresh.items())
            self._asked, self._request = tuple(sorted(fresh)), codec.u8(REVEAL) + self._commitments
        elif stage == "reveal":
            if self.silent:
                raise TooFewSurvivors(len(replies), len(self._asked), stage)
            rows = codec.table(replies.items())
            self.groups = _settled(self._context, self._commitments, rows, self._size, self._committee)
            self._request = codec.u8(SETTLE) + rows
        elif stage != "settle":
            raise LocalError("the beacon is over: read `groups`")
        self._replies, self._at = {}, self._at + 1

    def _agreed(self) -> tuple[Groups, int]:
        """What most members tell: the committee, or disjoint groups, none small and none over a node that has no group.

        Lying nodes could otherwise put a node that has none, and so joins any session, among themselves. Raises
        RemoteError when nothing is left.
        """
        claims = Counter(claim for node, claim in self._known.items() if self._committee or node in claim[0])
        ordered = sorted(claims.items(), key=lambda item: (-item[1], item[0]))
        if self._committee and 2 * ordered[0][1] > len(self._replies):
            return (ordered[0][0][0],), ordered[0][0][1]
        loose, least = set(self._replies) - set(self._known), min(self._size, len(self._asked))
        found: dict[tuple[int, ...], int] = {}
        for (group, nodes), votes in ordered if not self._committee else ():
            taken = loose.union(*found)
            if 2 * votes > len(group) >= least and not taken & set(group):
                found[group] = nodes
        if not found:
            raise RemoteError("split-beacon", self._known, "nodes tell of something that most members do not know")
        return tuple(sorted(found)), next(iter(found.values()))


@dataclass(frozen=True)
class Beacon:
    """A draw of groups of at least `group_size` nodes, or of one committee of `committee` nodes.

    It has the shape of a protocol, so that any driver can run it.
    """

    group_size: int = 0
    committee: int = 0

    def __post_init__(self) -> None:
        if (self.group_size == 0) == (self.committee == 0):
            raise ValueError("a beacon draws groups, group_size=, or a committee, committee=")
        if not isinstance(self.group_size, int) or self.group_size < 2 * (self.committee == 0):
            raise ValueError(f"group_size must be >= 2: a group of one is no group, got {self.group_size}")
        if not isinstance(self.committee, int) or self.committee < 2 * (self.group_size == 0):
            raise ValueError(f"committee must be >= 2: one member alone would open sums, got {self.committee}")

    @property
    def stages(self) -> tuple[str, ...]:
        return STAGES

    @property
    def fewest(self) -> int:
        """Nodes without which nothing can be drawn."""
        return max(2, self.committee)

    @property
    def input_stage(self) -> str:
        """No stage takes an input."""
        return ""

    def server(self, session: Session, *, random: Random = os_random) -> BeaconServer:
        return BeaconServer(session, self.group_size, self.committee)

    def client(
        self,
        node: int,
        *,
        identity: Identity | None = None,
        policy: Policy = Policy(),
        random: Random = os_random,
    ) -> BeaconClient:
        return BeaconClient(node, identity, policy, random, self.group_size, self.committee)
