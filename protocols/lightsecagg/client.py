"""A node's part in LightSecAgg: what it checks, what it keeps, what it answers, once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from privfed.protocols import codec, graph, keys
from privfed.protocols.codec import Reader
from privfed.protocols.errors import SERVER, DecodeError, LocalError, RemoteError
from privfed.protocols.lightsecagg import messages
from privfed.protocols.lightsecagg.code import Code
from privfed.protocols.lightsecagg.exact import Words, words
from privfed.protocols.lightsecagg.messages import Advertisement, Terms
from privfed.protocols.lightsecagg.secret import Secrets
from privfed.protocols.packed import vector_bytes
from privfed.protocols.session import Buffer, Identity, Policy, Random, Source

_STEPS = (messages.ADVERTISE, messages.SHARE, messages.MASK, messages.CONFIRM, messages.REVEAL)


CODED = 4
"""A node makes room for shares of all together so many times `Policy.max_dimension` entries."""


def deviation(name: str, detail: str) -> RemoteError:
    return RemoteError(name, (SERVER,), detail)


@dataclass(frozen=True, slots=True)
class Kept:
    """What a node remembers between steps. requests: those it answered, which fix all the rest."""

    root: bytes = field(repr=False)
    requests: tuple[bytes, ...] = ()

    def encode(self) -> bytes:
        count = codec.u8(len(self.requests))
        return self.root + count + b"".join(codec.blob(request) for request in self.requests)

    @classmethod
    def decode(cls, kept: bytes) -> Kept:
        def read(reader: Reader) -> Kept:
            root = bytes(reader.take(32))
            return cls(root, tuple(bytes(reader.blob()) for _ in range(reader.number(1))))

        try:
            return codec.decode(kept, read)
        except DecodeError as error:
            raise LocalError("kept state is not from this protocol: start a new session") from error


def check_terms(
    terms: Terms, node: int, expected: tuple[int, int], policy: Policy, roster: Mapping[int, bytes] | None
) -> None:
    """Refuse a session below the node's floors; `expected`: the threshold and privacy it wants for this cohort."""
    session = terms.session
    n = len(session.nodes)
    if node not in session.nodes:
        raise deviation("foreign-session", f"node {node} is not among the session's nodes")
    policy.check_facts(session)
    floors = (
        ("cohort-too-small", "cohort", n, policy.min_cohort),
        ("too-few-neighbours", "neighbours", n - 1, policy.min_neighbours),
        ("threshold-too-low", "threshold", terms.threshold, max(2, policy.min_threshold)),
        ("modulus-too-small", "bits", session.bits, policy.min_bits),
        ("round-not-rising", "round", session.round, policy.min_round),
    )
    for name, what, asked, floor in floors:
        if asked < floor:
            raise deviation(name, f"the {what} asked for is {asked}, this node's policy demands {floor}")
    corrupt = graph.count(n, policy.corrupt)
    if terms.privacy < corrupt:
        detail = f"the session hides from {terms.privacy} colluding nodes, this node's policy assumes {corrupt} of {n}"
        raise deviation("privacy-too-low", detail)
    if (terms.threshold, terms.privacy) != expected:
        detail = f"threshold {terms.threshold} and privacy {terms.privacy} were asked for, {expected} are set"
        raise deviation("parameters-differ", detail)
    code = Code(n, terms.threshold, terms.privacy, session.bits)
    if n * code.share_size(session.dimension) > CODED * policy.max_dimension:
        detail = f"{n} shares of {code.share_size(session.dimension)} entries, this node codes {CODED} vectors' worth"
        raise deviation("dimension-too-large", detail)
    if roster is not None and (strangers := [other for other in session.nodes if other not in roster]):
        raise deviation("foreign-node", f"nodes {strangers} are not on the roster")


def check_peers(
    peers: Mapping[int, Advertisement],
    nodes: tuple[int, ...],
    roster: Mapping[int, bytes] | None,
    own: Advertisement,
) -> None:
    """Refuse keys that their nodes did not sign, for this session and this model."""
    holder: dict[bytes, int] = {}
    for peer, seen in peers.items():
        if peer not in nodes:
            raise deviation("foreign-node", f"node {peer} is not in the session")
        if roster is not None and seen.verify_key != roster[peer]:
            raise RemoteError("unknown-identity", (SERVER, peer), f"node {peer}'s key is not the roster's")
        if not seen.signed_by(peer):
            raise RemoteError("bad-signature", (SERVER, peer), f"node {peer} did not sign these keys")
        if seen.binding != own.binding:
            detail = f"node {peer} was given another model or configuration"
            raise deviation("inconsistent-model", detail)
        if seen.digest != own.digest:
            raise deviation("inconsistent-session", f"node {peer} was asked to join under other terms")
        for key in {seen.public_key, seen.verify_key}:
            if holder.setdefault(key, peer) != peer:
                raise RemoteError("duplicate-key", (holder[key], peer), "two nodes have the same key")


@dataclass(frozen=True)
class LightSecAggClient:
    """One node's part in one session. expect: cohort size -> (threshold, privacy). liars: of LightSecAgg."""

    node: int
    expect: Callable[[int], tuple[int, int]] = field(repr=False)
    policy: Policy
    identity: Identity | None = field(repr=False)
    random: Random = field(repr=False)
    liars: int = 0

    def __post_init__(self) -> None:
        if self.identity is None and self.policy.require_active:
            raise LocalError("the policy requires active security: give this node an identity")
        if self.identity is not None:
            own = self.identity.roster.get(self.node)
            if self.identity.node != self.node or own != keys.signing_public(self.identity.secret_key):
                raise LocalError(f"the identity is not the one that the roster holds for node {self.node}")

    def step(self, kept: bytes, request: Buffer, source: Source) -> tuple[bytes, Buffer]:
        """Answer one request. `kept` is b"" before the first.

        Raises RemoteError, which ends the session for this node: nothing kept from before may be used again.
        """
        state = Kept.decode(kept) if kept else Kept(self.random(32))
        stage = len(state.requests)
        if stage == len(_STEPS):
            raise deviation("session-over", "this node has opened its one sum of the session")
        try:
            view = _View(self, state, request)
            reply = (view.advertise, view.share, view.mask, view.confirm, view.reveal)[stage](source)
        except DecodeError as error:
            known = bytes(request[:1]) and request[0] in _STEPS
            name = "out-of-order" if known and request[0] != _STEPS[stage] else "malformed-request"
            raise deviation(name, str(error)) from error
        # The last request carries all shares and is not needed again: its hash ends the session.
        record = bytes(request) if stage + 1 < len(_STEPS) else keys.digest(b"lightsecagg done", request)
        return Kept(state.root, (*state.requests, record)).encode(), reply


class _View:
    """One step's view of the session: what the answered requests say, and the request at hand."""

    def __init__(self, client: LightSecAggClient, state: Kept, request: Buffer) -> None:
        self.node, self.policy, self.identity = client.node, client.policy, client.identity
        self.roster = client.identity.roster if client.identity is not None else None
        self.expect, self.liars = client.expect, client.liars
        self.requests = (*state.requests, request)
        self.terms = Terms.decode(self.requests[0])
        self.secrets = Secrets(state.root, self.terms.digest())
        self.session = self.terms.session

    def _read(self, kind: int, read: Callable[[Reader], messages.T]) -> messages.T:
        return messages.body(self.requests[kind - 1], kind, self.secrets.digest, read)

    @property
    def signing_key(self) -> bytes:
        return self.secrets.signing_key() if self.identity is None else self.identity.secret_key

    @property
    def code(self) -> Code:
        return Code(len(self.session.nodes), self.terms.threshold, self.terms.privacy, self.session.bits)

    @property
    def context(self) -> bytes:
        """Hash of the terms and of everybody's keys, as this node was shown them."""
        return keys.digest(b"lightsecagg context", self.requests[1])

    def peers(self) -> dict[int, Advertisement]:
        rows = self._read(messages.SHARE, lambda r: r.table(Advertisement.SIZE))
        return {node: Advertisement.decode(raw) for node, raw in rows.items()}

    def _own_advertisement(self) -> Advertisement:
        public, verify_key = self.secrets.public_key(), keys.signing_public(self.signing_key)
        unsigned = Advertisement(public, verify_key, self.secrets.digest, self.session.binding, b"")
        return unsigned.sign(self.node, self.signing_key)

    def advertise(self, source: Source) -> bytes:
        """Join the session under its terms with fresh keys."""
        try:
            expected = self.expect(len(self.session.nodes))
        except LocalError as error:
            raise deviation("parameters-differ", str(error)) from error
        check_terms(self.terms, self.node, expected, self.policy, self.roster)
        assumed = max(1, graph.count(len(self.session.nodes), self.policy.corrupt))
        if self.policy.require_active and self.liars < assumed:
            detail = f"wrong sums of {self.liars} nodes would be noticed, active security wants {assumed}: set liars"
            raise deviation("reveals-unchecked", detail)
        reply = messages.ADVERTISE | messages.REPLY
        return messages.sealed(reply, self.secrets.digest, self._own_advertisement().encode())

    def _subset(self, nodes: tuple[int, ...], of: tuple[int, ...], what: str) -> None:
        """Refuse a set of nodes that grew, lost this node, or is too small to hide in."""
        if strangers := sorted(set(nodes) - set(of)):
            raise deviation("foreign-node", f"nodes {strangers} are among the {what} but were not before")
        if self.node not in nodes:
            raise deviation("left-out", f"node {self.node} is asked although it is not among the {what}")
        floor = max(self.terms.threshold, self.policy.min_cohort, self.policy.min_survivors)
        if len(nodes) < floor:
            raise deviation("cohort-too-small", f"{len(nodes)} {what} are left, {floor} are needed")

    def share(self, source: Source) -> bytes:
        """Code this node's mask into one share per node and seal each for its holder."""
        peers, own = self.peers(), self._own_advertisement()
        self._subset(tuple(peers), self.session.nodes, "advertisers")
        if peers[self.node] != own:
            raise deviation("swapped-key", "this node's own keys came back changed")
        check_peers(peers, self.session.nodes, self.roster, own)
        dimension, bits = self.session.dimension, self.session.bits
        holders = [node for node in peers if node != self.node]
        places = [self.session.nodes.index(node) for node in holders]
        coded = self.code.encode(
            self.secrets.mask(dimension, bits),
            self.secrets.noise(self.code.noise_size(dimension), bits),
            places,
        )
        rows = []
        for node, vector in zip(holders, coded, strict=True):
            channel = self.secrets.channel(node, peers[node].public_key, self.context)
            text = bytes(messages.encode_vector(vector, bits))
            rows.append((node, channel.seal(self.node, node, text)))
        table = messages.encode_table(rows)
        return messages.sealed(messages.SHARE | messages.REPLY, self.secrets.digest, table)

    def _sharers(self) -> tuple[int, ...]:
        return self._read(messages.MASK, Reader.nodes)

    def mask(self, source: Source) -> bytes:
        """Add the mask to the input. Only now is the input asked for."""
        self._subset(self._sharers(), tuple(self.peers()), "sharers")
        dimension, bits = self.session.dimension, self.session.bits
        given = np.asarray(source())
        if given.shape != (dimension,) or given.dtype not in (np.uint32, np.uint64):
            raise LocalError(f"the input must be uint32 or uint64 of shape ({dimension},), got {given.dtype}")
        if bits < 64 and dimension and int(given.max()) >> bits:
            raise LocalError(f"the input has an entry of 2^{bits} or more: quantise into the ring first")
        masked = self.secrets.mask(dimension, bits)
        masked += given.astype(words(bits))
        masked &= words(bits)((1 << bits) - 1)
        reply = messages.MASK | messages.REPLY
        return messages.sealed(reply, self.secrets.digest, messages.encode_vector(masked, bits))

    def survivors(self) -> tuple[int, ...]:
        return self._read(messages.CONFIRM, Reader.nodes)

    def confirm(self, source: Source) -> bytes:
        """Sign the one set of survivors this node will help to open."""
        survivors = self.survivors()
        self._subset(survivors, self._sharers(), "survivors")
        signature = keys.sign(self.signing_key, *messages.confirmation(self.context, survivors))
        return messages.sealed(messages.CONFIRM | messages.REPLY, self.secrets.digest, signature)

    def _check_confirmations(self, rows: messages.Table) -> None:
        survivors, peers = self.survivors(), self.peers()
        statement = messages.confirmation(self.context, survivors)
        for node, signature in rows.items():
            if node not in survivors:
                raise deviation("foreign-node", f"node {node} confirms survivors it is not among")
            if not keys.verified(peers[node].verify_key, signature, *statement):
                detail = f"node {node} did not sign the survivors this node signed"
                raise RemoteError("split-survivors", (SERVER, node), detail)
        if len(rows) < self.terms.threshold:
            detail = f"{len(rows)} nodes confirm these survivors, {self.terms.threshold} are needed"
            raise deviation("too-few-confirmations", detail)

    def reveal(self, source: Source) -> bytes:
        """Add up the survivors' shares, once, when enough nodes agree on who survived."""
        dimension, bits = self.session.dimension, self.session.bits
        size = self.code.share_size(dimension)
        sealed_size = vector_bytes(size, bits) + messages.TAG
        signatures, shares = self._read(messages.REVEAL, lambda r: (r.table(messages.SIGNATURE), r.table(sealed_size)))
        self._check_confirmations(signatures)
        survivors, peers = self.survivors(), self.peers()
        if tuple(shares) != tuple(node for node in survivors if node != self.node):
            raise deviation("wrong-shares", "the shares to add up are not exactly the survivors'")
        total = self._own_share()
        for node, text in shares.items():
            channel = self.secrets.channel(node, peers[node].public_key, self.context)
            total += codec.decode_vector(channel.open(node, self.node, text), size, bits)
        total &= words(bits)((1 << bits) - 1)
        reply = messages.REVEAL | messages.REPLY
        return messages.sealed(reply, self.secrets.digest, messages.encode_vector(total, bits))

    def _own_share(self) -> Words:
        dimension, bits, code = self.session.dimension, self.session.bits, self.code
        noise = self.secrets.noise(code.noise_size(dimension), bits)
        place = self.session.nodes.index(self.node)
        share: Words = code.encode(self.secrets.mask(dimension, bits), noise, [place])[0]
        return share
