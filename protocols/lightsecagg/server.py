"""The server's part in LightSecAgg: it relays sealed shares, adds masked inputs, and decodes one sum of masks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from privfed.protocols import codec, keys
from privfed.protocols.codec import Reader
from privfed.protocols.errors import DecodeError, LocalError, RemoteError, TooFewSurvivors
from privfed.protocols.lightsecagg import messages
from privfed.protocols.lightsecagg.code import Code
from privfed.protocols.lightsecagg.exact import Words, words
from privfed.protocols.lightsecagg.messages import Advertisement, Terms
from privfed.protocols.packed import vector_bytes
from privfed.protocols.session import Buffer, Random, RingSum

STAGES = ("advertise", "share", "mask", "confirm", "reveal")


class LightSecAggServer:
    """One session. `receive` in any order within a stage, `close` when no more replies are waited for."""

    def __init__(self, terms: Terms, random: Random, liars: int = 0) -> None:
        session = terms.session
        self._terms, self._random, self._digest = terms, random, terms.digest()
        self._code = Code(len(session.nodes), terms.threshold, terms.privacy, session.bits)
        self._needed = terms.threshold + liars
        self._stage = 0
        self._asked: tuple[int, ...] = session.nodes
        self._received: dict[int, bytes] = {}
        self._requests: dict[int, Buffer] = dict.fromkeys(
            session.nodes, messages.sealed(messages.ADVERTISE, self._digest, terms.encode())
        )
        self._keys: dict[int, Advertisement] = {}
        self._shares: dict[int, dict[int, memoryview]] = {}
        self._total: Words = np.zeros(session.dimension, dtype=words(session.bits))
        self._survivors: tuple[int, ...] = ()
        self._context = b""
        self._signatures: dict[int, Buffer] = {}
        self._sums: dict[int, Words] = {}
        self._probe = random(32)
        self._result: RingSum | None = None

    @property
    def stage(self) -> str:
        return STAGES[self._stage] if self._stage < len(STAGES) else ""

    @property
    def result(self) -> RingSum | None:
        return self._result

    def outbound(self) -> dict[int, Buffer]:
        """Requests of the open stage, by node."""
        return dict(self._requests)

    def receive(self, node: int, reply: Buffer) -> None:
        """Take one reply. The same bytes again change nothing.

        Raises RemoteError naming the node, which leaves the session as it was.
        """
        if not self.stage:
            raise RemoteError("session-over", (node,), "the sum has been opened")
        if node not in self._asked:
            raise RemoteError("foreign-node", (node,), f"it was not asked at stage {self.stage!r}")
        mark = keys.digest(b"lightsecagg reply", memoryview(reply))
        if node in self._received:
            if self._received[node] == mark:
                return
            raise RemoteError("second-reply", (node,), f"it answered stage {self.stage!r} before, differently")
        take = (self._advertised, self._shared, self._masked, self._confirmed, self._revealed)[self._stage]
        try:
            kind = (self._stage + 1) | messages.REPLY
            messages.body(reply, kind, self._digest, partial(take, node))
        except DecodeError as error:
            raise RemoteError("malformed-reply", (node,), str(error)) from error
        self._received[node] = mark

    def close(self) -> None:
        """End the stage. Raises TooFewSurvivors, which ends the session."""
        if not self.stage:
            raise LocalError("the session is over")
        answered = tuple(node for node in self._asked if node in self._received)
        if len(answered) < self._needed:
            raise TooFewSurvivors(len(answered), self._needed, self.stage)
        turn: Callable[[], None] = (
            self._ask_shares,
            self._ask_masks,
            self._ask_confirmations,
            self._ask_reveals,
            self._open,
        )[self._stage]
        self._asked, self._received = answered, {}
        self._stage += 1
        turn()

    def _advertised(self, node: int, reader: Reader) -> None:
        given = Advertisement.decode(reader.take(Advertisement.SIZE))
        reader.end()
        session = self._terms.session
        if given.digest != self._digest or given.binding != session.binding:
            raise RemoteError("inconsistent-session", (node,), "it signed another session")
        if not given.signed_by(node):
            raise RemoteError("bad-signature", (node,), "it did not sign its keys")
        for other, theirs in self._keys.items():
            if {given.public_key, given.verify_key} & {theirs.public_key, theirs.verify_key}:
                raise RemoteError("duplicate-key", (node,), f"node {other} has the same key")
        keys.agree(self._probe, node, given.public_key)
        self._keys[node] = given

    def _ask_shares(self) -> None:
        rows = [(node, self._keys[node].encode()) for node in self._asked]
        request = messages.sealed(messages.SHARE, self._digest, messages.encode_table(rows))
        self._context = keys.digest(b"lightsecagg context", request)
        self._requests = dict.fromkeys(self._asked, request)

    def _sealed_size(self) -> int:
        session = self._terms.session
        entries = self._code.share_size(session.dimension)
        return vector_bytes(entries, session.bits) + messages.TAG

    def _shared(self, node: int, reader: Reader) -> None:
        rows = reader.table(self._sealed_size())
        reader.end()
        if tuple(rows) != tuple(other for other in self._asked if other != node):
            raise RemoteError("wrong-shares", (node,), "its shares are not one for each other node")
        self._shares[node] = rows

    def _ask_masks(self) -> None:
        self._ask_nodes(messages.MASK)

    def _ask_nodes(self, kind: int) -> None:
        request = messages.sealed(kind, self._digest, codec.node_list(self._asked))
        self._requests = dict.fromkeys(self._asked, request)

    def _masked(self, node: int, reader: Reader) -> None:
        self._total += self._vector(reader, self._terms.session.dimension)

    def _vector(self, reader: Reader, length: int) -> Words:
        bits = self._terms.session.bits
        raw = reader.take(vector_bytes(length, bits))
        reader.end()
        return codec.decode_vector(raw, length, bits)

    def _ask_confirmations(self) -> None:
        self._survivors = self._asked
        self._shares = {node: self._shares[node] for node in self._survivors}
        self._ask_nodes(messages.CONFIRM)

    def _confirmed(self, node: int, reader: Reader) -> None:
        signature = bytes(reader.take(messages.SIGNATURE))
        reader.end()
        statement = messages.confirmation(self._context, self._survivors)
        if not keys.verified(self._keys[node].verify_key, signature, *statement):
            raise RemoteError("bad-confirmation", (node,), "it did not sign the survivors")
        self._signatures[node] = signature

    def _ask_reveals(self) -> None:
        signed = messages.encode_table([(node, self._signatures[node]) for node in self._asked])
        requests: dict[int, Buffer] = {}
        for holder in self._asked:
            rows = [(node, self._shares[node][holder]) for node in self._survivors if node != holder]
            table = messages.encode_table(rows)
            requests[holder] = messages.sealed(messages.REVEAL, self._digest, signed, table)
        self._requests, self._shares = requests, {}

    def _revealed(self, node: int, reader: Reader) -> None:
        self._sums[node] = self._vector(reader, self._code.share_size(self._terms.session.dimension))

    def _open(self) -> None:
        """Decode the sum of the masks from any `threshold` sums of shares; the further ones must agree."""
        session = self._terms.session
        shares = {session.nodes.index(node): vector for node, vector in self._sums.items()}
        mask = self._code.decode(shares, session.dimension, self._random(self._code.check_bytes(len(shares))))
        if mask is None:
            detail = "the sums of shares contradict one another: some node shared or added up wrongly"
            raise RemoteError("inconsistent-shares", self._sums, detail)
        total = self._total - mask
        total &= words(session.bits)((1 << session.bits) - 1)
        self._requests, self._asked = {}, ()
        self._result = RingSum(total.astype(np.uint64), frozenset(self._survivors))
