"""The server's part in SecAgg and SecAgg+: relay, add, unmask [BIK+17, figure 4]."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from privfed.protocols import keys
from privfed.protocols.codec import Reader, decode, decode_vector, node_list
from privfed.protocols.errors import DecodeError, LocalError, RemoteError, TooFewSurvivors
from privfed.protocols.graph import neighbours
from privfed.protocols.prg import Words, add_masks, reduce, word
from privfed.protocols.secagg.messages import (
    ADVERTISE,
    CONFIRM,
    MASK,
    OF_MASK_KEY,
    OF_SELF_SEED,
    REVEAL,
    ROW_BYTES,
    SHARE,
    STAGE_NAMES,
    Advertisement,
    Terms,
    check_head,
    encode_advertisements,
    encode_sealed,
    encode_signatures,
    head,
    read_head,
    read_masked,
    read_revealed,
    read_sealed,
)
from privfed.protocols.secagg.neighbourhood import able, is_full, least_survivors
from privfed.protocols.secagg.unmasking import Secrets, recover, unmask
from privfed.protocols.session import Buffer, Random, RingSum
from privfed.protocols.shamir import decode_share

_KINDS = {name: kind for kind, name in STAGE_NAMES.items()}


class SecAggServer:
    """One session. `receive` a stage's replies in any order, `close` it, send `outbound`; at the end read `result`."""

    def __init__(self, terms: Terms, stages: tuple[str, ...], random: Random, threads: int, corrupt: int = 0) -> None:
        self._terms = terms
        self._corrupt = corrupt
        self._bound = terms.digest()
        self._stages = stages
        self._at = 0
        self._threads = threads
        self._seed = bytes(32) if terms.active or not terms.degree else random(32)
        self._rows: dict[int, Advertisement] = {}
        self._used: set[bytes] = set()
        self._graph: dict[int, tuple[int, ...]] = {}
        self._sealed: dict[int, dict[int, bytes]] = {}
        self._masked: set[int] = set()
        self._signatures: dict[int, bytes] = {}
        self._openers: set[int] = set()
        self._revealed: dict[int, dict[int, tuple[int, bytes]]] = {}
        kind = np.dtype(word(terms.session.bits)).newbyteorder("<")
        self._total: Words = np.zeros(terms.session.dimension, dtype=kind)
        self._result: RingSum | None = None
        self.culprits: tuple[int, ...] = ()
        """Nodes whose shares were wrong and were left out."""

    @property
    def stage(self) -> str:
        return self._stages[self._at] if self._at < len(self._stages) else ""

    @property
    def result(self) -> RingSum | None:
        return self._result

    @property
    def threshold(self) -> int:
        """Nodes that must answer at the end (on a sparse graph: of every node's neighbours)."""
        return self._terms.threshold

    def outbound(self) -> dict[int, Buffer]:
        """Return the requests of the open stage, by node."""
        if self.stage == "advertise":
            return dict.fromkeys(self._terms.session.nodes, self._terms.encode())
        if self.stage == "share":
            return dict.fromkeys(self._rows, self._share_request())
        if self.stage == "mask":
            return self._relays()
        if self.stage == "confirm":
            return dict.fromkeys(sorted(self._masked), head(CONFIRM, self._bound) + node_list(self._masked))
        if self.stage == "reveal":
            body = head(REVEAL, self._bound) + node_list(self._masked)
            if self._terms.active:
                body += encode_signatures(self._signatures)
            return dict.fromkeys(sorted(self._openers), body)
        raise LocalError("the session is over: read `result`")

    def _relays(self) -> dict[int, Buffer]:
        """Return to every node who of its holders shared, and the shares that are for it."""
        start, senders = head(MASK, self._bound), sorted(self._sealed.items())
        full = is_full(self._terms, tuple(self._rows))
        everyone = node_list(self._sealed) if full else b""
        relays: dict[int, Buffer] = {}
        for node in self._sealed:
            live = everyone or node_list(holder for holder in self._holders(node) if holder in self._sealed)
            texts = {sender: rows[node] for sender, rows in senders if node in rows}
            relays[node] = start + live + encode_sealed(texts)
        return relays

    def _holders(self, node: int) -> tuple[int, ...]:
        if is_full(self._terms, tuple(self._rows)):
            return tuple(self._rows)
        return tuple(self._sealed[node]) if self._terms.active else self._graph[node]

    def receive(self, node: int, reply: Buffer) -> None:
        """Take one node's reply. Raises RemoteError naming the node; the state is then unchanged."""
        kind = _KINDS.get(self.stage, 0)
        asked, answered = self._parties()
        if node not in asked or node in answered:
            raise RemoteError("unexpected-reply", (node,), f"no reply of this node is due at stage {self.stage!r}")
        check_head(reply, self._bound, node)
        try:
            self._take(kind, node, reply)
        except DecodeError as fault:
            raise RemoteError("malformed", (node,), str(fault)) from None

    def _parties(self) -> tuple[Collection[int], Collection[int]]:
        """Return who was asked at the open stage, and who answered."""
        parties: dict[str, tuple[Collection[int], Collection[int]]] = {
            "advertise": (self._terms.session.nodes, self._rows),
            "share": (self._rows, self._sealed),
            "mask": (self._sealed, self._masked),
            "confirm": (self._masked, self._signatures),
            "reveal": (self._openers, self._revealed),
        }
        return parties.get(self.stage, ((), ()))

    def _take(self, kind: int, node: int, reply: Buffer) -> None:
        if kind == ADVERTISE:
            row = decode(reply, lambda r: Advertisement.of(self._body(r, kind).take(ROW_BYTES)))
            self._check_keys(node, row)
            self._rows[node] = row
        elif kind == SHARE:
            self._take_sealed(node, decode(reply, lambda r: read_sealed(self._body(r, kind))))
        elif kind == MASK:
            packed = decode(reply, lambda r: read_masked(self._body(r, kind)))
            vector = decode_vector(packed, len(self._total), self._terms.session.bits)
            np.add(self._total, vector, out=self._total)
            self._masked.add(node)
        elif kind == CONFIRM:
            self._signatures[node] = decode(reply, lambda r: bytes(self._body(r, kind).take(64)))
        elif kind == REVEAL:
            self._take_revealed(node, decode(reply, lambda r: read_revealed(self._body(r, kind))))

    def _check_keys(self, node: int, row: Advertisement) -> None:
        # Every honest node would abort on them: better that one node is left out.
        for key in (row.seal_key, row.mask_key):
            if keys.is_low_order(key):
                raise RemoteError("low-order-key", (node,), "it advertises a point of low order")
        if row.seal_key == row.mask_key or self._used & {row.seal_key, row.mask_key}:
            raise RemoteError("duplicate-key", (node,), "its keys are not two new ones")
        self._used |= {row.seal_key, row.mask_key}

    def _body(self, reader: Reader, kind: int) -> Reader:
        read_head(reader, kind, self._bound)
        return reader

    def _take_sealed(self, node: int, rows: dict[int, bytes]) -> None:
        others = set(self._rows) - {node}
        chosen = self._terms.active and not is_full(self._terms, tuple(self._rows))
        due = others if is_full(self._terms, tuple(self._rows)) else set(self._graph.get(node, ()))
        if (chosen and (len(rows) > self._terms.degree or not set(rows) <= others)) or (
            not chosen and set(rows) != due
        ):
            raise RemoteError("wrong-holders", (node,), "its shares are not for its neighbours")
        self._sealed[node] = rows

    def _take_revealed(self, node: int, rows: dict[int, tuple[int, bytes]]) -> None:
        due = {sender for sender, texts in self._sealed.items() if node in texts}
        if is_full(self._terms, tuple(self._rows)):
            due.add(node)
        if set(rows) != due:
            raise RemoteError("wrong-shares", (node,), "it reveals other shares than the ones it holds")
        for owner, (which, _) in rows.items():
            if which != (OF_SELF_SEED if owner in self._masked else OF_MASK_KEY):
                raise RemoteError("wrong-shares", (node,), f"its share of node {owner} is of the other secret")
        if decode_share(b"".join(share for _, share in rows.values()), len(rows)) is None:
            raise RemoteError("bad-share", (node,), "it reveals a share with an entry outside the field")
        self._revealed[node] = rows

    def close(self) -> None:
        """End the open stage. Raises TooFewSurvivors, or RemoteError when shares do not fit their commitments."""
        stage, full = self.stage, is_full(self._terms, tuple(self._rows))
        if not stage:
            raise LocalError("the session is over: read `result`")
        have = len(self._parties()[1])
        need = self._terms.threshold if full or stage == "advertise" else 2
        if have < need:
            raise TooFewSurvivors(have, need, stage)
        if stage == "advertise" and not full and not self._terms.active:
            self._graph = neighbours(tuple(self._rows), self._terms.degree, self._seed)
        if stage == "share":
            self._leave_out()
        if stage == ("confirm" if self._terms.active else "mask"):
            self._choose_openers(stage)
        if stage == "mask" and self._terms.active and not full:
            least = least_survivors(self._terms, self._corrupt)
            if len(self._masked) < least:  # nodes would refuse: the graph may be split
                raise TooFewSurvivors(len(self._masked), least, stage)
        if stage == "reveal":
            self._finish()
        self._at += 1

    def _leave_out(self) -> None:
        """Go on with the nodes that have enough live neighbours, as if the others had not shared."""
        kept = able({node: self._holders(node) for node in self._sealed}, self._terms.threshold)
        self._sealed = {node: rows for node, rows in self._sealed.items() if node in kept}
        if len(self._sealed) < self._terms.threshold:
            raise TooFewSurvivors(len(self._sealed), self._terms.threshold, "share")

    def _choose_openers(self, stage: str) -> None:
        """Ask for shares only those who will answer, and only when they suffice for every secret."""
        there = set(self._signatures) if self._terms.active else set(self._masked)
        need = self._terms.threshold
        holding = {node: self._holders(node) for node in self._sealed}
        if self._terms.active:
            # A node opens nothing unless `need` of its own holders confirmed.
            self._openers = {node for node in there if sum(holder in there for holder in holding[node]) >= need}
        else:
            self._openers = there
        fewest = min(sum(holder in self._openers for holder in holders) for holders in holding.values())
        if fewest < need:
            raise TooFewSurvivors(fewest, need, stage)

    def _finish(self) -> None:
        holders_of = {owner: [n for n in self._revealed if owner in self._revealed[n]] for owner in self._sealed}
        secrets: Secrets = recover(self._terms, self._rows, self._masked, self._revealed, holders_of)
        self.culprits = secrets.culprits
        plus, minus = unmask(self._rows, self._view(), secrets, self._edges())
        add_masks(self._total, plus, minus, threads=self._threads)
        reduce(self._total, self._terms.session.bits)
        self._result = RingSum(self._total.astype(np.uint64, copy=False), frozenset(self._masked))

    def _share_request(self) -> bytes:
        drawn = self._seed if not is_full(self._terms, tuple(self._rows)) else bytes(32)
        return head(SHARE, self._bound) + drawn + encode_advertisements(self._rows)

    def _view(self) -> bytes:
        return keys.digest(b"secagg view", self._bound, self._share_request())

    def _edges(self) -> dict[int, set[int]]:
        """For every node that dropped before masking: the survivors that masked with it."""
        gone = set(self._sealed) - self._masked
        if is_full(self._terms, tuple(self._rows)):
            return {node: set(self._masked) for node in gone}
        chose = {node: set(rows) for node, rows in self._sealed.items()}
        return {node: {peer for peer in self._masked if peer in chose[node] or node in chose[peer]} for node in gone}
