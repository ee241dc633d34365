"""Buffered asynchronous aggregation with LightSecAgg: stale updates are weighted by integers, one buffer at a time.

The roster is fixed for the run and every node has an identity. A node that has trained on some version of the model
contributes once for it: masked update, sealed shares of the mask, and its signature under that version. When the
server's buffer is full, the holders sign the buffer's entries, then each adds the shares up with weights that it
computes itself from the signed versions. A node's versions only rise, so each (node, version) mask is opened at most
once; 2 U > n + T makes any two confirmed buffers share an honest signer who would have noticed. Holders see which
nodes are in the buffer and how stale they are; no privacy amplification follows from buffering.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from privfed.protocols.errors import SERVER, DecodeError, LocalError, RemoteError
from privfed.protocols.lightsecagg import messages, seal
from privfed.protocols.lightsecagg.client import check_peers, deviation
from privfed.protocols.lightsecagg.code import Code
from privfed.protocols.lightsecagg.exact import Words, words
from privfed.protocols.lightsecagg.messages import Advertisement, Reader
from privfed.protocols.session import Buffer, Identity, Policy, Random, os_random

JOIN, ROSTER, CONTRIBUTION, BUFFER, SIGNED, OPEN, OPENED = range(0x40, 0x47)
_HEAD = b"privfed lightsecagg buffered v1\0"
_NEVER = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class BufferTerms:
    """What is fixed for a run. weights: by staleness; an update older than the table is refused. goal: buffer size.

    nodes: ascending ids. Updates live in Z_2^bits: weight * update, summed over a buffer, must not wrap around.
    """

    run: int
    nodes: tuple[int, ...]
    dimension: int
    bits: int
    threshold: int
    privacy: int
    weights: tuple[int, ...] = (1,)
    goal: int = 2

    def __post_init__(self) -> None:
        n = len(self.nodes)
        if list(self.nodes) != sorted(set(self.nodes)) or not self.nodes or self.nodes[0] < 1:
            raise LocalError("nodes must be distinct ids above 0, ascending")
        if 2 * self.threshold <= n + self.privacy:
            raise LocalError(f"2 threshold > n + privacy must hold, got {self.threshold}, {n}, {self.privacy}")
        if not self.weights or not all(1 <= weight < 1 << 32 for weight in self.weights):
            raise LocalError("weights must be integers of 1 or more, the freshest first")
        if not 2 <= self.goal <= n or not 1 <= self.bits <= 64 or self.dimension < 0 or self.run < 0:
            raise LocalError(f"goal must be between 2 and {n}, bits between 1 and 64, dimension and run 0 or more")
        Code(n, self.threshold, self.privacy, self.bits)

    def digest(self) -> bytes:
        numbers = [self.run, self.dimension, self.bits, self.threshold, self.privacy, self.goal]
        numbers += [len(self.weights), *self.weights]
        packed = b"".join(number.to_bytes(8, "big") for number in numbers)
        return hashlib.sha256(_HEAD + packed + messages.encode_nodes(self.nodes)).digest()

    @property
    def code(self) -> Code:
        return Code(len(self.nodes), self.threshold, self.privacy, self.bits)

    @property
    def sealed_size(self) -> int:
        return self.code.share_size(self.dimension) * messages.entry_bytes(self.bits) + messages.TAG

    def weight(self, current: int, version: int) -> int:
        """Weight of an update of `version` in a buffer opened at version `current`; 0 when it has none."""
        staleness = current - version
        return self.weights[staleness] if 0 <= staleness < len(self.weights) else 0


@dataclass(frozen=True, slots=True)
class Entry:
    """A contribution as the holders see it. binding: hash of the model the version stands for."""

    node: int
    version: int
    binding: bytes
    signature: bytes

    SIZE = 8 + 32 + messages.SIGNATURE

    def statement(self, context: bytes) -> bytes:
        numbers = self.node.to_bytes(8, "big") + self.version.to_bytes(8, "big")
        return _HEAD + b"version" + context + numbers + self.binding

    def encode(self) -> bytes:
        return self.version.to_bytes(8, "big") + self.binding + self.signature

    @classmethod
    def decode(cls, node: int, raw: memoryview) -> Entry:
        reader = Reader(raw)
        return cls(node, reader.number(8), bytes(reader.take(32)), bytes(reader.take(messages.SIGNATURE)))


def read_buffer(reader: Reader) -> tuple[int, tuple[Entry, ...]]:
    """Current version and entries, as confirmed and opened."""
    current = reader.number(8)
    return current, tuple(Entry.decode(node, raw) for node, raw in reader.table(Entry.SIZE))


def buffer_statement(context: bytes, current: int, entries: tuple[Entry, ...]) -> bytes:
    """What holders sign: this run's keys, the current version, and every entry."""
    table = messages.encode_table(tuple((entry.node, entry.encode()) for entry in entries))
    return _HEAD + b"buffer" + context + current.to_bytes(8, "big") + table


@dataclass(frozen=True, slots=True)
class Memory:
    """What a node keeps between calls; persist `encode()` before a reply leaves.

    contributed: its own last version. opened: the last version opened, per node. confirmed: hash of the one buffer
    it signed and has not opened yet. current: the version of the last buffer it signed.
    """

    root: bytes = field(repr=False)
    roster: bytes = b""
    contributed: int = -1
    current: int = -1
    confirmed: bytes = bytes(32)
    opened: Mapping[int, int] = field(default_factory=dict)

    def encode(self) -> bytes:
        numbers = (self.contributed + 1, self.current + 1, len(self.roster))
        return b"".join(
            (
                self.root,
                self.confirmed,
                *(number.to_bytes(8, "big") for number in numbers),
                self.roster,
                messages.encode_table(tuple((k, v.to_bytes(8, "big")) for k, v in sorted(self.opened.items()))),
            )
        )

    @classmethod
    def decode(cls, kept: bytes) -> Memory:
        try:
            reader = Reader(kept)
            root, confirmed = bytes(reader.take(32)), bytes(reader.take(32))
            contributed, current = reader.number(8) - 1, reader.number(8) - 1
            roster = bytes(reader.take(reader.number(8)))
            opened = {node: int.from_bytes(raw, "big") for node, raw in reader.table(8)}
            reader.end()
        except DecodeError as error:
            raise LocalError("kept state is not from this protocol: join the run anew") from error
        return cls(root, roster, contributed, current, confirmed, opened)


@dataclass(frozen=True)
class BufferedNode:
    """A node of the run: contributor and holder. Every method takes what was kept and returns what to keep."""

    terms: BufferTerms
    identity: Identity = field(repr=False)
    policy: Policy = field(default_factory=Policy)
    random: Random = field(default=os_random, repr=False)

    def __post_init__(self) -> None:
        node, terms = self.identity.node, self.terms
        if node not in terms.nodes or not set(terms.nodes) <= set(self.identity.roster):
            raise LocalError(f"node {node} or some node of the run is not on the roster")
        if self.identity.roster[node] != seal.verify_key(self.identity.secret_key):
            raise LocalError(f"the identity is not the one that the roster holds for node {node}")
        floors = (
            (terms.goal, self.policy.min_cohort, "goal"),
            (terms.threshold, max(2, self.policy.min_threshold), "threshold"),
            (terms.bits, self.policy.min_bits, "bits"),
            (len(terms.nodes) - 1, self.policy.min_neighbours, "neighbours"),
            (terms.run, self.policy.min_round, "run"),
        )
        for value, floor, name in floors:
            if value < floor:
                raise LocalError(f"{name} of the run is {value}, this node's policy demands {floor}")

    @property
    def node(self) -> int:
        return self.identity.node

    def _secrets(self, memory: Memory) -> seal.Secrets:
        return seal.Secrets(memory.root, self.terms.digest())

    def _advertisement(self, memory: Memory) -> Advertisement:
        public = self._secrets(memory).exchange_key().public_key().public_bytes_raw()
        own, digest = self.identity.roster[self.node], self.terms.digest()
        unsigned = Advertisement(public, own, digest, bytes(32), b"")
        return replace(unsigned, signature=seal.sign(self.identity.secret_key, unsigned.statement(self.node)))

    def join(self) -> tuple[bytes, bytes]:
        """Draw this run's keys and announce them."""
        memory = Memory(self.random(32))
        return memory.encode(), messages.sealed(JOIN, self.terms.digest(), self._advertisement(memory).encode())

    def _peers(self, roster: bytes) -> dict[int, Advertisement]:
        rows = messages.whole(roster, ROSTER, self.terms.digest(), lambda r: r.table(Advertisement.SIZE))
        return {node: Advertisement.decode(raw) for node, raw in rows}

    def settle(self, kept: bytes, roster: Buffer) -> bytes:
        """Accept the keys of the run, once. Raises RemoteError when a node did not sign them."""
        memory, own = Memory.decode(kept), bytes(roster)
        if memory.roster:
            if memory.roster == own:
                return kept
            raise deviation("second-roster", "the run's roster is fixed")
        try:
            peers = self._peers(own)
        except DecodeError as error:
            raise deviation("malformed-request", str(error)) from error
        if peers.get(self.node) != self._advertisement(memory):
            raise deviation("swapped-key", "this node's own keys are missing or changed")
        if len(peers) < self.terms.threshold:
            raise deviation("cohort-too-small", f"{len(peers)} nodes joined, {self.terms.threshold} are needed")
        check_peers(peers, self.terms.nodes, self.identity.roster, self._advertisement(memory))
        return replace(memory, roster=own).encode()

    def _settled(self, kept: bytes) -> tuple[Memory, bytes]:
        memory = Memory.decode(kept)
        if not memory.roster:
            raise LocalError("the node has not settled on the run's roster yet")
        return memory, hashlib.sha256(memory.roster).digest()

    def _mask(self, memory: Memory, version: int) -> seal.Secrets:
        """Secrets of the mask of one version."""
        label = b"version" + version.to_bytes(8, "big")
        return seal.Secrets(seal.derive(memory.root, self.terms.digest(), label), self.terms.digest())

    def _seal_context(self, context: bytes, version: int) -> bytes:
        return hashlib.sha256(_HEAD + context + version.to_bytes(8, "big")).digest()

    def contribute(self, kept: bytes, version: int, binding: bytes, vector: Words) -> tuple[bytes, bytes]:
        """Mask an update trained on `version` and share the mask. A version is used once, and versions rise."""
        memory, context = self._settled(kept)
        terms, bits = self.terms, self.terms.bits
        if not memory.contributed < version < _NEVER or len(binding) != 32:
            raise LocalError(f"version must exceed {memory.contributed}, the last contributed; got {version}")
        given = np.asarray(vector)
        if given.shape != (terms.dimension,) or given.dtype not in (np.uint32, np.uint64):
            raise LocalError(f"the update must be uint32 or uint64 of shape ({terms.dimension},)")
        if bits < 64 and terms.dimension and int(given.max()) >> bits:
            raise LocalError(f"the update has an entry of 2^{bits} or more: quantise into the ring first")
        entry = Entry(self.node, version, binding, b"")
        entry = replace(entry, signature=seal.sign(self.identity.secret_key, entry.statement(context)))
        peers, own = self._peers(memory.roster), self._secrets(memory).exchange_key()
        holders = [node for node in peers if node != self.node]
        rows = []
        for node, share in zip(holders, self._shares(memory, version, holders), strict=True):
            place = self._seal_context(context, version)
            channel = seal.Channel.between(own, node, peers[node].public_key, place)
            rows.append((node, channel.seal(self.node, node, messages.encode_vector(share, bits))))
        masked = self._mask(memory, version).mask(terms.dimension, bits)
        masked += given.astype(words(bits))
        masked &= words(bits)((1 << bits) - 1)
        reply = messages.sealed(
            CONTRIBUTION,
            terms.digest(),
            entry.encode(),
            messages.encode_table(tuple(rows)),
            messages.encode_vector(masked, bits),
        )
        return replace(memory, contributed=version).encode(), reply

    def _shares(self, memory: Memory, version: int, holders: list[int]) -> Words:
        code, dimension, bits = self.terms.code, self.terms.dimension, self.terms.bits
        secrets = self._mask(memory, version)
        noise = secrets.noise(code.noise_size(dimension), bits)
        places = [self.terms.nodes.index(node) for node in holders]
        return code.encode(secrets.mask(dimension, bits), noise, places)

    def _check_buffer(self, memory: Memory, context: bytes, current: int, entries: tuple[Entry, ...]) -> None:
        """Refuse entries that are stale, opened before, unsigned, or of two models under one version."""
        peers = self._peers(memory.roster)
        bindings: dict[int, bytes] = {}
        if current <= memory.current:
            raise deviation("version-not-rising", f"a buffer at version {memory.current} was signed before")
        if len(entries) < max(self.terms.goal, self.policy.min_cohort):
            raise deviation("cohort-too-small", f"the buffer holds {len(entries)} updates")
        for entry in entries:
            if entry.node not in peers:
                raise deviation("foreign-node", f"node {entry.node} is not in the run")
            if not self.terms.weight(current, entry.version):
                raise deviation("too-stale", f"version {entry.version} has no weight at version {current}")
            if entry.version <= memory.opened.get(entry.node, -1):
                raise deviation("opened-before", f"a mask of node {entry.node} would be opened again")
            key = self.identity.roster[entry.node]
            if not seal.verified(key, entry.signature, entry.statement(context)):
                raise RemoteError("bad-signature", (SERVER, entry.node), "the version is not signed")
            if bindings.setdefault(entry.version, entry.binding) != entry.binding:
                raise deviation("inconsistent-model", f"version {entry.version} stands for two models")

    def confirm(self, kept: bytes, request: Buffer) -> tuple[bytes, bytes]:
        """Sign a buffer: from here on its (node, version) pairs count as opened."""
        memory, context = self._settled(kept)
        try:
            current, entries = messages.whole(request, BUFFER, self.terms.digest(), read_buffer)
        except DecodeError as error:
            raise deviation("malformed-request", str(error)) from error
        self._check_buffer(memory, context, current, entries)
        statement = buffer_statement(context, current, entries)
        after = replace(
            memory,
            current=current,
            confirmed=hashlib.sha256(statement).digest(),
            opened={**memory.opened, **{entry.node: entry.version for entry in entries}},
        )
        signature = seal.sign(self.identity.secret_key, statement)
        return after.encode(), messages.sealed(SIGNED, self.terms.digest(), signature)

    def open(self, kept: bytes, request: Buffer) -> tuple[bytes, bytes]:
        """Add up the weighted shares of the buffer that this node signed, once, when U nodes signed it."""
        memory, context = self._settled(kept)
        size = self.terms.sealed_size

        def read(reader: Reader) -> tuple[int, tuple[Entry, ...], messages.Table, messages.Table]:
            return *read_buffer(reader), reader.table(messages.SIGNATURE), reader.table(size)

        try:
            current, entries, signed, shares = messages.whole(request, OPEN, self.terms.digest(), read)
            total = self._open(memory, context, current, entries, signed, shares)
        except DecodeError as error:
            raise deviation("malformed-request", str(error)) from error
        reply = messages.sealed(OPENED, self.terms.digest(), messages.encode_vector(total, self.terms.bits))
        return replace(memory, confirmed=bytes(32)).encode(), reply

    def _open(
        self,
        memory: Memory,
        context: bytes,
        current: int,
        entries: tuple[Entry, ...],
        signed: messages.Table,
        shares: messages.Table,
    ) -> Words:
        statement = buffer_statement(context, current, entries)
        if hashlib.sha256(statement).digest() != memory.confirmed:
            raise deviation("unconfirmed-buffer", "this is not the buffer the node signed, or it was opened")
        peers, terms = self._peers(memory.roster), self.terms
        for node, signature in signed:
            if node not in peers:
                raise deviation("foreign-node", f"node {node} is not in the run")
            if not seal.verified(self.identity.roster[node], bytes(signature), statement):
                raise RemoteError("split-buffer", (SERVER, node), f"node {node} did not sign this buffer")
        if len(signed) < terms.threshold:
            raise deviation("too-few-confirmations", f"{len(signed)} of {terms.threshold} signed the buffer")
        given = dict(shares)
        if tuple(given) != tuple(entry.node for entry in entries if entry.node != self.node):
            raise deviation("wrong-shares", "the shares to add up are not exactly the buffer's")
        kind, length = words(terms.bits), terms.code.share_size(terms.dimension)
        total: Words = np.zeros(length, dtype=kind)
        for entry in entries:
            if entry.node == self.node:
                share = self._shares(memory, entry.version, [self.node])[0]
            else:
                place = self._seal_context(context, entry.version)
                own = self._secrets(memory).exchange_key()
                channel = seal.Channel.between(own, entry.node, peers[entry.node].public_key, place)
                text = channel.open(entry.node, self.node, given[entry.node])
                share = messages.decode_vector(text, length, terms.bits)
            total += share * kind(terms.weight(current, entry.version) % (1 << terms.bits))
        total &= kind((1 << terms.bits) - 1)
        return total
