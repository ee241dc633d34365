"""A node's part in SecAgg and SecAgg+. Steps are numbered as in [BIK+17, figure 4]."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from privfed.protocols import keys
from privfed.protocols.codec import Reader, decode, encode_vector, node_list
from privfed.protocols.errors import SERVER, DecodeError, LocalError, RemoteError
from privfed.protocols.graph import count
from privfed.protocols.prg import SEED_BYTES, Words, add_masks, draws, reduce
from privfed.protocols.secagg.messages import (
    ADVERTISE,
    CONFIRM,
    MASK,
    MASKED_AT,
    OF_MASK_KEY,
    OF_SELF_SEED,
    REVEAL,
    SHARE,
    STAGE_NAMES,
    WHOLE_WORDS,
    Advertisement,
    Kept,
    Terms,
    check_head,
    encode_revealed,
    encode_sealed,
    head,
    read_advertisements,
    read_head,
    read_sealed,
    read_signatures,
    room_for_masked,
)
from privfed.protocols.secagg.neighbourhood import (
    fallen_out,
    holders,
    in_degree_limit,
    is_full,
    least_survivors,
    least_threshold,
)
from privfed.protocols.session import Buffer, Identity, Policy, Random, Source
from privfed.protocols.shamir import MAX_THRESHOLD, SHARE_BYTES, P, decode_share, encode_share, split

_KINDS = {name: kind for kind, name in STAGE_NAMES.items()}


def pair_seed(mask_secret: X25519PrivateKey, peer: int, peer_key: bytes, node: int, view: bytes, culprit: int) -> bytes:
    """Return the seed of the mask that two nodes share; both ends, and the server after a drop, get the same."""
    shared = keys.agree(mask_secret, peer, peer_key, culprit)
    return keys.derive(shared, b"pair mask", view + keys.node_bytes(*sorted((node, peer))), SEED_BYTES)


def self_seed(secret: bytes, node: int, view: bytes) -> bytes:
    """Return the seed of a node's own mask."""
    return keys.derive(secret, b"self mask", view + keys.node_bytes(node), SEED_BYTES)


def refuse(deviation: str, detail: str) -> RemoteError:
    """Return the error that names a deviation of the server."""
    return RemoteError(deviation, (SERVER,), detail)


class SecAggClient:
    """One node. `step` answers one request; it is a function of what was kept, the request and fresh randomness.

    differs: terms -> what in them is not as the parameters this node was made with say, "" when nothing.
    corrupt: the share of the cohort its protocol provides for in active mode. Where parameters come from the server,
    as they do in a message, `policy` is what this node insists on.
    """

    def __init__(
        self,
        node: int,
        stages: tuple[str, ...],
        identity: Identity | None,
        policy: Policy,
        random: Random,
        threads: int,
        differs: Callable[[Terms], str],
        corrupt: float = 0.0,
    ) -> None:
        self._node = node
        self._stages = stages
        self._identity = identity
        self._policy = policy
        self._random = random
        self._threads = threads
        self._differs = differs
        self._corrupt = corrupt

    def step(self, kept: bytes, request: Buffer, source: Source) -> tuple[bytes, Buffer]:
        """Answer one request of the server.

        An identical redelivery gets the stored bytes; another request for an answered stage is refused, because a step
        that runs twice would re-use keys or answer two views. Raises RemoteError naming the deviation.
        """
        state = decode(kept, Kept.read) if kept else None
        mark = keys.digest(b"secagg request", request)
        kind = request[0] if len(request) else 0
        if state is not None and kind == state.stage:
            if keys.same(mark, state.request):
                return kept, state.reply
            raise refuse("second-request", f"another request for stage {STAGE_NAMES[kind]!r}, which was answered")
        answered = [] if state is None else [STAGE_NAMES[state.stage]]
        expected = self._stages[self._stages.index(answered[0]) + 1 :] if answered else self._stages
        if not expected or kind != _KINDS[expected[0]]:
            what = STAGE_NAMES.get(int(kind), f"kind {kind}")
            raise refuse("out-of-order", f"{what!r} came, {expected[0] if expected else 'nothing'!r} was due")
        try:
            after, reply = self._answer(state, int(kind), request, source)
        except DecodeError as fault:
            raise refuse("malformed", str(fault)) from None
        return replace(after, stage=int(kind), request=mark, reply=reply).encode(), reply

    def _answer(self, state: Kept | None, kind: int, request: Buffer, source: Source) -> tuple[Kept, Buffer]:
        if state is None:
            return self._advertise(request)
        terms = decode(state.terms, Terms.read)
        check_head(request, terms.digest(), SERVER)
        if kind == SHARE:
            return self._share(state, terms, request)
        if kind == MASK:
            return self._mask(state, terms, request, source)
        if kind == CONFIRM:
            return self._confirm(state, terms, request)
        return self._reveal(state, terms, request)

    # Round 0: AdvertiseKeys
    def _advertise(self, request: Buffer) -> tuple[Kept, Buffer]:
        terms = decode(request, Terms.read)
        self._check_terms(terms)
        root = self._random(keys.KEY_BYTES)
        bound = terms.digest()
        own = self._advertisement(root, terms)
        kept = Kept(ADVERTISE, bytes(32), b"", root, terms.encode(), bytes(32), b"", {}, {}, (), ())
        return kept, head(ADVERTISE, bound) + own.encode()

    def _check_terms(self, terms: Terms) -> None:
        policy, session = self._policy, terms.session
        cohort = len(session.nodes)
        holding = cohort if is_full(terms, session.nodes) else terms.degree
        active = "confirm" in self._stages
        if self._node not in session.nodes:
            raise refuse("foreign-session", f"node {self._node} is not in the cohort")
        policy.check_facts(session)
        floors = (
            ("cohort-too-small", cohort, policy.min_cohort),
            ("threshold-too-low", terms.threshold, max(policy.min_threshold, 2)),
            ("too-few-neighbours", terms.degree if terms.degree else cohort - 1, policy.min_neighbours),
            ("modulus-too-small", session.bits, policy.min_bits),
            ("stale-round", session.round, policy.min_round),
        )
        for deviation, asked, floor in floors:
            if asked < floor:
                raise refuse(deviation, f"{asked} is asked for, this node's floor is {floor}")
        if terms.threshold > min(holding, MAX_THRESHOLD):
            raise refuse("threshold-too-high", f"{terms.threshold} of {holding} holders")
        if cohort >= P:  # a point is a node's place, and p would be 0, where the secret is
            raise refuse("cohort-too-large", f"{cohort} nodes, shares have {P - 1} points")
        if terms.active != active or (policy.require_active and not active):
            raise refuse("mode-lowered", "the session's mode is not the one this node takes part in")
        safe = least_threshold(terms, self._corrupt_nodes(terms))
        if terms.threshold < safe:
            raise refuse("threshold-too-low", f"{terms.threshold} of {holding} holders, {safe} are the least safe ones")
        if pinned := self._differs(terms):
            raise refuse("parameters-differ", pinned)
        if active and self._identity is None:
            raise LocalError("active mode needs an Identity: this node's signing key and the roster it trusts")

    def _corrupt_nodes(self, terms: Terms) -> int:
        share = max(self._policy.corrupt, self._corrupt) if terms.active else self._policy.corrupt
        return count(len(terms.session.nodes), share)

    def _secrets(self, root: bytes, terms: Terms) -> tuple[bytes, bytes, bytes]:
        bound = terms.digest()
        return (
            keys.derive(root, b"sealing key", bound),
            keys.derive(root, b"mask key", bound),
            keys.derive(root, b"self-mask secret", bound),
        )

    def _advertisement(self, root: bytes, terms: Terms) -> Advertisement:
        seal, mask, own = self._secrets(root, terms)
        bare = Advertisement(
            keys.exchange_public(seal),
            keys.exchange_public(mask),
            keys.digest(b"self-mask commitment", terms.digest(), keys.node_bytes(self._node), own),
        )
        if self._identity is None or not terms.active:
            return bare
        signature = keys.sign(
            self._identity.secret_key, b"secagg advertise", terms.digest(), bare.statement(self._node)
        )
        return replace(bare, signature=signature)

    # Round 1: ShareKeys
    def _share(self, state: Kept, terms: Terms, request: Buffer) -> tuple[Kept, Buffer]:
        bound = terms.digest()

        def read(reader: Reader) -> tuple[bytes, dict[int, Advertisement]]:
            read_head(reader, SHARE, bound)
            return bytes(reader.take(32)), read_advertisements(reader)

        seed, rows = decode(request, read)
        if seed != bytes(32) and (terms.active or is_full(terms, tuple(rows))):
            raise refuse("malformed", "a graph seed where the server draws no graph")
        self._check_view(state, terms, rows)
        view = keys.digest(b"secagg view", bound, bytes(request))
        present = tuple(rows)
        mine = holders(terms, self._node, present, seed, state.root)
        seal, mask, own = self._secrets(state.root, terms)
        sealed: dict[int, bytes] = {}
        agreed: dict[int, bytes] = {}
        inbox: dict[int, bytes] = {}
        if len(mine) < terms.threshold:
            # Too few of the chosen ones are there: this node shares nothing, so that the server leaves it out.
            return replace(state, seed=seed, view=bytes(request)), head(SHARE, bound) + encode_sealed(sealed)
        sealing = keys.load(seal)
        # Drawn from the root, so that a node put back from a backup seals the same shares again and not others under
        # the keys it has used: a key seals one text.
        again = draws(keys.derive(state.root, b"share polynomials", view, SEED_BYTES))
        shares = split([mask, own], [terms.point(holder) for holder in mine], terms.threshold, again)
        for holder, share in zip(mine, shares, strict=True):
            text = encode_share(share.reshape(-1))
            if holder == self._node:
                inbox[holder] = text
                continue
            agreed[holder] = keys.agree(sealing, holder, rows[holder].seal_key)
            sealed[holder] = keys.Channel(agreed[holder], view).seal(self._node, holder, text)
        kept = replace(state, seed=seed, view=bytes(request), agreed=agreed, inbox=inbox)
        return kept, head(SHARE, bound) + encode_sealed(sealed)

    def _check_view(self, state: Kept, terms: Terms, rows: Mapping[int, Advertisement]) -> None:
        everyone = set(terms.session.nodes)
        foreign = [node for node in rows if node not in everyone]
        if foreign:
            raise refuse("foreign-node", f"node {foreign[0]} is not in the cohort")
        if len(rows) < max(self._policy.min_cohort, terms.threshold):
            raise refuse("cohort-too-small", f"{len(rows)} nodes advertised keys")
        if rows.get(self._node) != self._advertisement(state.root, terms):
            raise refuse("swapped-key", "the server relays other keys for this node than it sent")
        used = [key for row in rows.values() for key in (row.seal_key, row.mask_key)]
        if len(set(used)) != len(used):
            raise refuse("duplicate-key", "two of the relayed keys are the same")
        if not terms.active or self._identity is None:
            return
        for node, row in rows.items():
            trusted = self._identity.roster.get(node)
            if trusted is None:
                raise refuse("not-on-roster", f"node {node} is not on the roster of identities")
            if not keys.verified(trusted, row.signature, b"secagg advertise", terms.digest(), row.statement(node)):
                raise refuse("bad-signature", f"the keys of node {node} are not signed by its identity")

    # Round 2: MaskedInputCollection
    def _mask(self, state: Kept, terms: Terms, request: Buffer, source: Source) -> tuple[Kept, Buffer]:
        bound = terms.digest()

        def read(reader: Reader) -> tuple[tuple[int, ...], dict[int, bytes]]:
            read_head(reader, MASK, bound)
            return reader.nodes(), read_sealed(reader)

        live, sealed = decode(request, read)
        rows = _rows_of(state.view)
        view = keys.digest(b"secagg view", bound, state.view)
        self._check_neighbours(state, terms, rows, live, sealed)
        seal, mask, own = self._secrets(state.root, terms)
        sealing, masking = keys.load(seal), keys.load(mask)
        inbox = dict(state.inbox)
        for sender, text in sealed.items():
            shared = state.agreed.get(sender) or keys.agree(sealing, sender, rows[sender].seal_key)
            share = keys.Channel(shared, view).open(sender, self._node, text)
            if decode_share(share, 2) is None:
                raise RemoteError("bad-share", (sender,), "a share with an entry outside the field")
            inbox[sender] = share
        edges = sorted((set(live) | set(sealed)) - {self._node})
        given, bits = self._input(terms, source), terms.session.bits
        message, vector = room_for_masked(bound, len(given), bits)
        vector[:] = given
        plus: list[bytes] = [self_seed(own, self._node, view)]
        minus: list[bytes] = []
        for peer in edges:
            seed = pair_seed(masking, peer, rows[peer].mask_key, self._node, view, peer)
            (plus if self._node < peer else minus).append(seed)
        add_masks(vector, plus, minus, threads=self._threads)
        reduce(vector, bits)
        if bits not in WHOLE_WORDS:
            message[MASKED_AT:] = encode_vector(vector, bits)
        return replace(state, agreed={}, inbox=inbox, edges=tuple(edges)), memoryview(message).toreadonly()

    def _check_neighbours(
        self,
        state: Kept,
        terms: Terms,
        rows: Mapping[int, Advertisement],
        live: tuple[int, ...],
        sealed: Mapping[int, bytes],
    ) -> None:
        present = tuple(rows)
        mine = set(holders(terms, self._node, present, state.seed, state.root))
        senders = set(sealed)
        if not set(live) <= mine or not senders <= set(present) - {self._node}:
            raise refuse("foreign-node", "a node outside the neighbourhood is said to have sent shares")
        if (is_full(terms, present) or not terms.active) and senders != set(live) - {self._node}:
            raise refuse("wrong-neighbours", "the shares relayed are not those of the live neighbours")
        if is_full(terms, present) and self._node not in live:
            raise refuse("wrong-neighbours", "this node sent its shares and is said to be gone")
        if len(live) < terms.threshold:
            raise refuse("too-few-neighbours", f"{len(live)} live neighbours, {terms.threshold} are needed")
        if terms.active and not is_full(terms, present):
            limit = in_degree_limit(len(terms.session.nodes), terms.degree)
            if len(senders) > limit:
                raise refuse("in-degree", f"{len(senders)} nodes chose this one, more than {limit} is no accident")

    def _input(self, terms: Terms, source: Source) -> Words:
        bits, size = terms.session.bits, terms.session.dimension
        given = source()
        if given.shape != (size,) or given.dtype not in (np.dtype(np.uint32), np.dtype(np.uint64)):
            raise LocalError(f"the input must be uint32 or uint64 of length {size}, got {given.dtype}{given.shape}")
        if given.size and int(given.max()) >> bits:
            raise LocalError(f"an input entry needs more than {bits} bits")
        return given

    # Round 3: ConsistencyCheck
    def _confirm(self, state: Kept, terms: Terms, request: Buffer) -> tuple[Kept, Buffer]:
        bound = terms.digest()

        def read(reader: Reader) -> tuple[int, ...]:
            read_head(reader, CONFIRM, bound)
            return reader.nodes()

        survivors = decode(request, read)
        self._check_survivors(state, terms, survivors)
        assert self._identity is not None
        signature = keys.sign(self._identity.secret_key, b"secagg confirm", *_statement(state, bound, survivors))
        return replace(state, survivors=survivors), head(CONFIRM, bound) + signature

    def _check_survivors(self, state: Kept, terms: Terms, survivors: tuple[int, ...]) -> None:
        rows = _rows_of(state.view)
        known = {*state.edges, self._node}
        if not set(survivors) <= set(rows):
            raise refuse("foreign-node", "a survivor that advertised no keys")
        mine = holders(terms, self._node, tuple(rows), state.seed, state.root)
        if set(survivors) & set(mine) - known:
            raise refuse("foreign-node", "a neighbour that was said to have shared nothing survives")
        if self._node not in survivors:
            raise refuse("excluded-survivor", "this node sent its masked input and is said to have dropped out")
        if is_full(terms, tuple(rows)):
            least = terms.threshold
        else:
            least = least_survivors(terms, self._corrupt_nodes(terms)) if terms.active else 2
        floor = max(self._policy.min_cohort, self._policy.min_survivors, least)
        if len(survivors) < floor:
            raise refuse("too-few-survivors", f"{len(survivors)} survivors, {floor} are needed")

    # Round 4: Unmasking
    def _reveal(self, state: Kept, terms: Terms, request: Buffer) -> tuple[Kept, Buffer]:
        bound = terms.digest()

        def read(reader: Reader) -> tuple[tuple[int, ...], dict[int, bytes]]:
            read_head(reader, REVEAL, bound)
            return reader.nodes(), read_signatures(reader) if terms.active else {}

        survivors, signatures = decode(request, read)
        if terms.active:
            self._check_signatures(state, terms, survivors, signatures)
        else:
            self._check_survivors(state, terms, survivors)
        alive = set(survivors)
        revealed = {
            node: (OF_SELF_SEED, share[SHARE_BYTES:]) if node in alive else (OF_MASK_KEY, share[:SHARE_BYTES])
            for node, share in state.inbox.items()
        }
        # One of the two shares of every node leaves, once; what could produce the other is forgotten with it.
        done = replace(state, root=b"", agreed={}, inbox={}, view=b"", edges=(), survivors=())
        return done, head(REVEAL, bound) + encode_revealed(revealed)

    def _check_signatures(
        self, state: Kept, terms: Terms, survivors: tuple[int, ...], signatures: Mapping[int, bytes]
    ) -> None:
        if survivors != state.survivors:
            raise refuse("split-survivors", "other survivors than the ones this node confirmed")
        rows = _rows_of(state.view)
        mine = set(holders(terms, self._node, tuple(rows), state.seed, state.root))
        assert self._identity is not None
        statement = _statement(state, terms.digest(), survivors)
        for node, signature in signatures.items():
            key = self._identity.roster.get(node)
            if node not in survivors or key is None:
                raise refuse("foreign-node", f"node {node} confirms and is no survivor")
            if not keys.verified(key, signature, b"secagg confirm", *statement):
                raise refuse("split-survivors", f"node {node} did not confirm these survivors")
        have = len(mine & set(signatures))
        if have < terms.threshold:
            raise refuse("too-few-confirmations", f"{have} neighbours confirmed, {terms.threshold} are needed")
        least = max(self._policy.min_survivors, self._policy.min_cohort)
        if least > 2 and not is_full(terms, tuple(rows)):  # two honest ones are in any sum that can be opened
            missing = fallen_out(terms, len(signatures), len(survivors), self._corrupt_nodes(terms))
            if len(survivors) - missing < least:
                detail = f"{missing} of {len(survivors)} survivors may not be in the sum, {least} are needed in it"
                detail += "; more neighbours help"
                raise refuse("too-few-survivors", detail)


def _rows_of(view: bytes) -> dict[int, Advertisement]:
    def read(reader: Reader) -> dict[int, Advertisement]:
        reader.take(1 + 32 + 32)
        return read_advertisements(reader)

    return decode(view, read)


def _statement(state: Kept, bound: bytes, survivors: tuple[int, ...]) -> tuple[bytes, bytes, bytes]:
    return bound, keys.digest(b"secagg view", bound, state.view), node_list(survivors)
