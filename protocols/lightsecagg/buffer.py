"""The server's part in buffered aggregation: collect contributions, have a buffer confirmed, open its one sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privfed.protocols import codec, keys
from privfed.protocols.codec import Reader
from privfed.protocols.errors import DecodeError, LocalError, RemoteError, TooFewSurvivors
from privfed.protocols.lightsecagg import buffered, messages
from privfed.protocols.lightsecagg.buffered import BufferTerms, Entry, buffer_statement, listing
from privfed.protocols.lightsecagg.exact import Words, words
from privfed.protocols.lightsecagg.messages import Advertisement, T
from privfed.protocols.packed import vector_bytes
from privfed.protocols.session import Buffer, Random, os_random


@dataclass(frozen=True, slots=True)
class WeightedSum:
    """total: uint64[dimension], sum of weight * update mod 2^bits. weights, versions: by node in the sum."""

    total: NDArray[np.uint64]
    weights: dict[int, int]
    versions: dict[int, int]

    @property
    def denominator(self) -> int:
        return sum(self.weights.values())


@dataclass(frozen=True, slots=True)
class _Contribution:
    entry: Entry
    shares: dict[int, memoryview]
    masked: Words


class BufferedServer:
    """One run: join, settle, then contributions at any time and, per buffer, begin, confirmed, ask, opened, finish.

    A reply that breaks a rule raises RemoteError naming its node and changes nothing. roster: identities, when the
    server knows them, so that a wrong key is refused here before the nodes refuse the whole roster.
    """

    def __init__(
        self,
        terms: BufferTerms,
        *,
        roster: Mapping[int, bytes] | None = None,
        random: Random = os_random,
    ) -> None:
        self._terms, self._random, self._digest = terms, random, terms.digest()
        self._roster = roster
        self._probe = random(32)
        self._keys: dict[int, Advertisement] = {}
        self._context = b""
        self._waiting: dict[int, _Contribution] = {}
        self._last: dict[int, int] = {}
        self._current = -1
        self._buffer: dict[int, _Contribution] = {}
        self._signed: dict[int, bytes] = {}
        self._sums: dict[int, Words] | None = None

    @property
    def waiting(self) -> dict[int, int]:
        """Node -> version of the contributions that wait for the next buffer."""
        return {node: c.entry.version for node, c in sorted(self._waiting.items())}

    def ready(self, current: int) -> bool:
        """Whether enough updates have a weight at this version of the model, and company in theirs."""
        return len(self._usable(current)) >= self._terms.goal

    def _usable(self, current: int) -> dict[int, _Contribution]:
        fresh = {n: c for n, c in sorted(self._waiting.items()) if self._terms.weight(current, c.entry.version)}
        alone = self._terms.alone(c.entry.version for c in fresh.values())
        return {node: c for node, c in fresh.items() if c.entry.version not in alone}

    def _read(self, node: int, message: Buffer, kind: int, read: Callable[[Reader], T]) -> T:
        try:
            return messages.body(message, kind, self._digest, read)
        except DecodeError as error:
            raise RemoteError("malformed-reply", (node,), str(error)) from error

    def _member(self, node: int) -> None:
        if node not in self._keys or not self._context:
            raise RemoteError("foreign-node", (node,), "it is not on the settled roster of the run")

    def join(self, node: int, message: Buffer) -> None:
        """Take a node's keys, before the roster settles."""
        given = self._read(node, message, buffered.JOIN, lambda r: Advertisement.decode(r.take(Advertisement.SIZE)))
        if node not in self._terms.nodes or node in self._keys or self._context:
            raise RemoteError("foreign-node", (node,), "it may not join, or not again, or not any more")
        if given.digest != self._digest or not given.signed_by(node):
            raise RemoteError("bad-signature", (node,), "it did not sign its keys for this run")
        if self._roster is not None and self._roster.get(node) != given.verify_key:
            raise RemoteError("unknown-identity", (node,), "its key is not the roster's")
        keys.agree(self._probe, node, given.public_key)
        self._keys[node] = given

    def settle(self) -> bytes:
        """Fix the roster; returns what every node that joined must be given."""
        if len(self._keys) < self._terms.threshold:
            raise TooFewSurvivors(len(self._keys), self._terms.threshold, "join")
        rows = [(node, given.encode()) for node, given in sorted(self._keys.items())]
        roster = messages.sealed(buffered.ROSTER, self._digest, messages.encode_table(rows))
        self._context = keys.digest(b"lightsecagg context", roster)
        return roster

    def contribute(self, node: int, message: Buffer) -> None:
        """Take a masked update with its shares. A later version replaces one that still waits."""
        self._member(node)
        terms = self._terms

        def read(reader: Reader) -> _Contribution:
            entry = Entry.decode(node, reader.take(Entry.SIZE))
            shares = reader.table(terms.sealed_size)
            raw = reader.take(vector_bytes(terms.dimension, terms.bits))
            return _Contribution(entry, shares, codec.decode_vector(raw, terms.dimension, terms.bits))

        given = self._read(node, message, buffered.CONTRIBUTION, read)
        if tuple(given.shares) != tuple(other for other in sorted(self._keys) if other != node):
            raise RemoteError("wrong-shares", (node,), "its shares are not one for each other node")
        if not given.entry.signed(self._context, self._keys[node].verify_key):
            raise RemoteError("bad-signature", (node,), "it did not sign its version")
        if given.entry.version <= self._last.get(node, -1):
            raise RemoteError("version-not-rising", (node,), f"it contributed {self._last[node]} before")
        self._waiting[node] = given
        self._last[node] = given.entry.version

    def begin(self, current: int) -> dict[int, Buffer]:
        """Close a buffer at this version of the model; returns what each node is asked to confirm.

        Updates too stale to have a weight are dropped, and those alone in their version wait. Raises TooFewSurvivors
        when fewer than `goal` remain, and then nothing is dropped.
        """
        if current <= self._current:
            raise LocalError(f"version must exceed {self._current}, that of the last buffer; got {current}")
        usable = self._usable(current)
        if len(usable) < self._terms.goal:
            raise TooFewSurvivors(len(usable), self._terms.goal, "buffer")
        self._current, self._buffer = current, usable
        oldest = current + 2 - len(self._terms.weights)  # what is older has no weight in any later buffer
        left = {n: c for n, c in self._waiting.items() if n not in usable and c.entry.version >= oldest}
        self._waiting, self._signed, self._sums = left, {}, None
        request = messages.sealed(buffered.BUFFER, self._digest, listing(current, self._entries))
        return dict.fromkeys(sorted(self._keys), request)

    @property
    def _entries(self) -> tuple[Entry, ...]:
        return tuple(contribution.entry for contribution in self._buffer.values())

    def confirmed(self, node: int, message: Buffer) -> None:
        """Take a node's signature under the buffer."""
        self._member(node)
        signature = self._read(node, message, buffered.SIGNED, lambda r: bytes(r.take(messages.SIGNATURE)))
        statement = buffer_statement(self._context, self._current, self._entries)
        if not self._buffer or not keys.verified(self._keys[node].verify_key, signature, *statement):
            raise RemoteError("bad-confirmation", (node,), "it did not sign this buffer")
        self._signed[node] = signature

    def ask(self) -> dict[int, Buffer]:
        """Requests to open, for the nodes that signed. Raises TooFewSurvivors: the buffer is lost."""
        if len(self._signed) < self._terms.threshold:
            self._buffer = {}
            raise TooFewSurvivors(len(self._signed), self._terms.threshold, "confirm")
        signed = codec.table(self._signed.items())
        entries = listing(self._current, self._entries)
        requests: dict[int, Buffer] = {}
        for holder in sorted(self._signed):
            rows = [(node, c.shares[holder]) for node, c in self._buffer.items() if node != holder]
            table = messages.encode_table(rows)
            requests[holder] = messages.sealed(buffered.OPEN, self._digest, entries, signed, table)
        self._sums = {}
        return requests

    def opened(self, node: int, message: Buffer) -> None:
        """Take a node's weighted sum of shares."""
        if self._sums is None or node not in self._signed:
            raise RemoteError("foreign-node", (node,), "it was not asked to open a buffer")
        length, bits = self._terms.code.share_size(self._terms.dimension), self._terms.bits
        size = vector_bytes(length, bits)
        vector = self._read(node, message, buffered.OPENED, lambda r: codec.decode_vector(r.take(size), length, bits))
        if node in self._sums and not np.array_equal(self._sums[node], vector):
            raise RemoteError("second-reply", (node,), "it opened this buffer before, differently")
        self._sums[node] = vector

    def finish(self) -> WeightedSum:
        """Decode the weighted sum of the buffer. Raises TooFewSurvivors when too few nodes opened it."""
        sums, terms = self._sums or {}, self._terms
        if len(sums) < terms.threshold:
            raise TooFewSurvivors(len(sums), terms.threshold, "open")
        shares = {terms.nodes.index(node): vector for node, vector in sums.items()}
        random = self._random(terms.code.check_bytes(len(shares)))
        mask = terms.code.decode(shares, terms.dimension, random)
        if mask is None:
            raise RemoteError("inconsistent-shares", sums, "the sums of shares contradict one another")
        kind, total = words(terms.bits), -mask
        versions = {entry.node: entry.version for entry in self._entries}
        weights = {node: terms.weight(self._current, version) for node, version in versions.items()}
        for node, contribution in self._buffer.items():
            total += contribution.masked * kind(weights[node] % (1 << terms.bits))
        total &= kind((1 << terms.bits) - 1)
        self._buffer, self._sums, self._signed = {}, None, {}
        return WeightedSum(total.astype(np.uint64), weights, versions)
