"""A node's part: one message with its input, then, for members of the committee, a signature and a share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.protocols.errors import SERVER, DecodeError, LocalError, RemoteError
from privfed.protocols.graph import count
from privfed.protocols.keys import KEY_BYTES, exchange_public
from privfed.protocols.oneshot import committee, sharing
from privfed.protocols.oneshot.agreement import Agreement, resume
from privfed.protocols.oneshot.ciphertext import encrypt
from privfed.protocols.oneshot.messages import Attendance, Bundle, Contribution, Invitation, Kept, Quorum
from privfed.protocols.oneshot.ring import N
from privfed.protocols.oneshot.sampler import draw
from privfed.protocols.oneshot.sealing import keystream, seal_box
from privfed.protocols.session import Buffer, Identity, Policy, Random, Session, Source


def _compare(mine: Agreement, theirs: Invitation) -> None:
    """Refuse parameters that are not this node's own."""
    own = mine.invitation
    if theirs.threshold < own.threshold:
        raise RemoteError("threshold-lowered", (SERVER,), f"{theirs.threshold} instead of {own.threshold}")
    if theirs.committee != own.committee:
        raise RemoteError("foreign-committee", (SERVER,), "the committee is not the one this node draws")
    if theirs != own:
        raise RemoteError("parameters-differ", (SERVER,), f"asked for {theirs}, this node runs {own}")


def _check_order(stage: str, request: Buffer) -> None:
    """Refuse another stage's request: each stage is answered once, in order."""
    tags = {"send": Invitation.TAG, "confirm": Bundle.TAG, "open": Quorum.TAG}
    tag = bytes(memoryview(request)[: len(Invitation.TAG)])
    if tag != tags[stage] and tag in tags.values():
        raise RemoteError("out-of-order", (SERVER,), f"this node waits for the request of stage {stage!r}")


def _entries(source: Source, session: Session) -> NDArray[np.unsignedinteger[Any]]:
    entries = source()
    if entries.dtype not in (np.uint32, np.uint64) or entries.shape != (session.dimension,):
        raise LocalError(
            f"source returned {entries.dtype}{entries.shape}; uint32 or uint64 of length {session.dimension} is needed"
        )
    if int(entries.max(initial=0)) >> session.bits:
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
        state = self._recall(kept) if kept else None
        stage = state.stage if state else "send"
        if not stage:
            raise RemoteError("second-request", (SERVER,), "this node has given its last answer of the session")
        _check_order(stage, request)
        try:
            if state is None:
                return self._send(request, source)
            return self._confirm(state, request) if stage == "confirm" else self._open(state, request)
        except DecodeError as error:
            raise RemoteError("malformed-request", (SERVER,), str(error)) from error

    def _recall(self, kept: bytes) -> Kept:
        try:
            return Kept.decode(kept)
        except DecodeError as error:
            raise LocalError(f"kept is no state of this protocol: {error}") from error

    def _agree(self, invitation: Invitation) -> Agreement:
        """Check the invitation against this node's policy and parameters."""
        session, policy = invitation.session, self.policy
        drawn = policy.committee
        if self.node not in (*session.nodes, *(drawn.members if drawn else ())):
            raise RemoteError("foreign-session", (SERVER,), f"node {self.node} is not in the session")
        policy.check_facts(session)
        if {*session.nodes, *(drawn.members if drawn else ())} - set(self.identity.roster):
            raise RemoteError("foreign-node", (SERVER,), "the session holds nodes that the roster does not know")
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
        if drawn is not None and drawn.members != agreement.committee:
            raise RemoteError("foreign-committee", (SERVER,), "the committee is not the one this node saw drawn")
        # Any of the corrupt nodes may sit on a committee that was not drawn: the agreement holds 2t > m + corrupt.
        corrupt = count(max(len(session.nodes), drawn.nodes if drawn else 0), policy.corrupt)
        if invitation.corrupt < corrupt:
            detail = f"safe with {invitation.corrupt} corrupt nodes, this node's policy assumes {corrupt}"
            raise RemoteError("corrupt-too-low", (SERVER,), detail)
        if agreement.threshold < policy.min_threshold:
            raise RemoteError("threshold-too-low", (SERVER,), f"{agreement.threshold} members could open a sum")
        if len(agreement.committee) <= policy.min_neighbours:
            raise RemoteError("committee-too-small", (SERVER,), f"{len(agreement.committee)} members")
        return agreement

    def _send(self, request: Buffer, source: Source) -> tuple[bytes, bytes]:
        agreement = self._agree(Invitation.decode(request))
        if self.node not in agreement.session.nodes:  # a member that gives no input this time
            nothing = sharing.to_wire(np.zeros(N, dtype=np.int64))
            kept = Kept("confirm", agreement.request, nothing)
            return kept.encode(), Attendance(agreement.digest).encode()
        entries = _entries(source, agreement.session)
        # Fresh s and e in every session; s leaves this function only as shares, e not at all.
        secret = draw(N, keystream(b"secret", self.random(32)))
        noise = keystream(b"error", self.random(32))
        ciphertext = encrypt(entries, secret, agreement.packing, agreement.public(), noise)
        own, boxes, public_key = self._share(agreement, secret)
        header = committee.sign_header(agreement.digest, self.identity, public_key)
        # A node that is no member is done.
        kept = Kept("confirm", agreement.request, own, header.encode()) if own else Kept("", agreement.request, b"")
        return kept.encode(), Contribution(header, ciphertext.data, boxes).encode()

    def _share(self, agreement: Agreement, secret: NDArray[np.int8]) -> tuple[bytes, bytes, bytes]:
        """Share the secret: (own share or b"", the others' boxes, the public key they are sealed under)."""
        members = agreement.committee
        fresh = keystream(b"shares", self.random(32))
        shares = sharing.split(secret, agreement.threshold, len(members), fresh)
        secret_key = self.random(KEY_BYTES)
        own, boxes = b"", []
        for member, share in zip(members, shares, strict=True):
            wire = sharing.to_wire(share)
            if member == self.node:
                own = wire
            else:
                boxes.append(seal_box(secret_key, agreement.digest, self.identity, member, wire))
        return own, b"".join(boxes), exchange_public(secret_key)

    def _confirm(self, state: Kept, request: Buffer) -> tuple[bytes, bytes]:
        agreement = resume(Invitation.decode(state.invitation))
        own = state.header, state.share
        signed, share, reply = committee.confirm(agreement, self.identity, self.policy, own, request)
        return Kept("open", state.invitation, share, signed=signed).encode(), reply

    def _open(self, state: Kept, request: Buffer) -> tuple[bytes, bytes]:
        agreement = resume(Invitation.decode(state.invitation))
        reply = committee.open_sum(agreement, self.identity, state.signed, state.share, request)
        return Kept("", state.invitation, b"").encode(), reply
