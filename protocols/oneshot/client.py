"""A node's part: one message with its input, then, for members of the committee, a signature and a share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.protocols.errors import SERVER, DecodeError, LocalError, RemoteError
from privfed.protocols.oneshot import committee, sharing
from privfed.protocols.oneshot.agreement import Agreement
from privfed.protocols.oneshot.ciphertext import encrypt
from privfed.protocols.oneshot.messages import Contribution, Header, Invitation, Reader, number
from privfed.protocols.oneshot.ring import N
from privfed.protocols.oneshot.sampler import draw
from privfed.protocols.oneshot.sealing import KEY_BYTES, SessionKey, keystream, sign
from privfed.protocols.oneshot.sharing import SHARE_BYTES
from privfed.protocols.session import Buffer, Identity, Policy, Random, Session, Source

_SENT, _SIGNED, _DONE = b"kept: sent", b"kept: signed", b"kept: done"


def _compare(mine: Agreement, theirs: Invitation) -> None:
    """Refuse parameters that are not this node's own."""
    own = mine.invitation
    if theirs.threshold < own.threshold:
        raise RemoteError("threshold-lowered", (SERVER,), f"{theirs.threshold} instead of {own.threshold}")
    if theirs.committee != own.committee:
        raise RemoteError("foreign-committee", (SERVER,), "the committee is not the one this node draws")
    if theirs != own:
        raise RemoteError("parameters-differ", (SERVER,), f"asked for {theirs}, this node runs {own}")


def _entries(source: Source, session: Session) -> NDArray[np.unsignedinteger[Any]]:
    entries = source()
    if entries.dtype not in (np.uint32, np.uint64) or entries.shape != (session.dimension,):
        raise LocalError(
            f"source returned {entries.dtype}{entries.shape}; "
            f"uint32 or uint64 of length {session.dimension} is needed"
        )
    if int(entries.max()) >> session.bits:
        raise LocalError(f"source returned an entry of 2^{session.bits} or more")
    return entries


@dataclass(frozen=True, slots=True)
class OneShotClient:
    """One node in one session; everything that lasts is in `kept`.

    agree: resolves a session with this node's own parameters.
    """

    node: int
    agree: Callable[[Session], Agreement] = field(repr=False)
    identity: Identity = field(repr=False)
    policy: Policy
    random: Random = field(repr=False)

    def step(self, kept: bytes, request: Buffer, source: Source) -> tuple[bytes, Buffer]:
        """Answer one request, in the order send, confirm, open.

        Raises RemoteError when the request breaks a rule or comes out of order; `kept` then stays the state.
        """
        try:
            if not kept:
                return self._send(request, source)
            if kept.startswith(_SENT):
                return self._confirm(kept, request)
            if kept.startswith(_SIGNED):
                return self._open(kept, request)
        except DecodeError as error:
            raise RemoteError("malformed-request", (SERVER,), str(error)) from error
        if kept != _DONE:
            raise LocalError("kept is no state of this protocol")
        raise RemoteError("second-request", (SERVER,), "this session's only answer has been given")

    def _agree(self, invitation: Invitation) -> Agreement:
        """Check the invitation against this node's policy and parameters."""
        session, policy = invitation.session, self.policy
        if self.node not in session.nodes:
            raise RemoteError("foreign-session", (SERVER,), f"node {self.node} is not in the session")
        if set(session.nodes) - set(self.identity.roster):
            raise RemoteError(
                "foreign-node", (SERVER,), "the session holds nodes that the roster does not know"
            )
        if session.round < policy.min_round:
            raise RemoteError("stale-round", (SERVER,), f"round {session.round} is below {policy.min_round}")
        if len(session.nodes) < policy.min_cohort:
            raise RemoteError("cohort-too-small", (SERVER,), f"{len(session.nodes)} nodes are in the session")
        if session.bits < policy.min_bits:
            raise RemoteError("modulus-too-small", (SERVER,), f"a ring of {session.bits} bits")
        try:
            agreement = self.agree(session)
        except LocalError as error:
            raise RemoteError("unsafe-session", (SERVER,), str(error)) from error
        _compare(agreement, invitation)
        if agreement.threshold < policy.min_threshold:
            raise RemoteError(
                "threshold-too-low", (SERVER,), f"{agreement.threshold} members could open a sum"
            )
        if len(agreement.committee) <= policy.min_neighbours:
            raise RemoteError("committee-too-small", (SERVER,), f"{len(agreement.committee)} members")
        return agreement

    def _send(self, request: Buffer, source: Source) -> tuple[bytes, bytes]:
        agreement = self._agree(Invitation.decode(request))
        entries = _entries(source, agreement.session)
        # Fresh s and e in every session; s leaves this function only as shares, e not at all.
        secret = draw(N, keystream("secret", self.random(32)))
        noise = keystream("error", self.random(32))
        ciphertext = encrypt(entries, secret, agreement.packing, agreement.public(), noise)
        shares = sharing.split(
            secret, agreement.threshold, len(agreement.committee), keystream("shares", self.random(32))
        )
        key = SessionKey(self.random(KEY_BYTES))
        own, boxes, digest = b"", [], agreement.digest
        for member, share in zip(agreement.committee, shares, strict=True):
            wire = sharing.to_wire(share)
            if member == self.node:
                own = wire
            else:
                boxes.append(key.seal(wire, digest, self.node, member, self.identity.roster[member]))
        content = committee.header_content(self.node, key.public)
        header = Header(digest, key.public, sign(self.identity, "contribution", digest, content))
        kept = _SENT + number(len(agreement.request)) + agreement.request + own
        return kept, Contribution(header, ciphertext.data, b"".join(boxes)).encode()

    def _recall(self, reader: Reader) -> Agreement:
        return self.agree(Invitation.decode(reader.take(reader.number())).session)

    def _confirm(self, kept: bytes, request: Buffer) -> tuple[bytes, bytes]:
        reader = Reader(kept, _SENT)
        agreement = self._recall(reader)
        if self.node not in agreement.committee:
            raise RemoteError(
                "foreign-committee", (SERVER,), f"node {self.node} is no member of the committee"
            )
        own = reader.take(SHARE_BYTES)
        survivors, share, reply = committee.confirm(agreement, self.identity, self.policy, own, request)
        head = _SIGNED + number(len(agreement.request)) + agreement.request
        return head + share + survivors, reply

    def _open(self, kept: bytes, request: Buffer) -> tuple[bytes, bytes]:
        reader = Reader(kept, _SIGNED)
        agreement = self._recall(reader)
        share = reader.take(SHARE_BYTES)
        survivors = reader.rest()
        return _DONE, committee.open_sum(agreement, self.identity, survivors, share, request)
