"""Buffered asynchronous aggregation with LightSecAgg: stale updates are weighted by integers, one buffer at a time.

The roster is fixed for the run and every node has an identity. A node that has trained on some version of the model
contributes once for it: masked update, sealed shares of the mask, and its signature under that version. When the
server's buffer is full, the holders sign the buffer's entries, then each adds the shares up with weights that it
computes itself from the signed versions. A node's versions only rise, so each (node, version) mask is opened at most
once; 2 U > n + T makes any two confirmed buffers share an honest signer who would have noticed. Holders see which
nodes are in the buffer and how stale they are; no privacy amplification follows from buffering.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from privfed.protocols import codec, graph, keys
from privfed.protocols.codec import Reader
from privfed.protocols.errors import SERVER, DecodeError, LocalError, RemoteError
from privfed.protocols.lightsecagg import messages
from privfed.protocols.lightsecagg.client import CODED, check_peers, deviation
from privfed.protocols.lightsecagg.code import Code
from privfed.protocols.lightsecagg.exact import Words, words
from privfed.protocols.lightsecagg.messages import Advertisement
from privfed.protocols.lightsecagg.secret import Secrets
from privfed.protocols.packed import vector_bytes
from privfed.protocols.session import Buffer, Identity, Policy, Random, os_random

JOIN, ROSTER, CONTRIBUTION, BUFFER, SIGNED, OPEN, OPENED = range(0x40, 0x47)
_NEVER = (1 << 63) - 2
_MARK_BYTES = 16
SPREAD = 256
"""How many times the least weight the largest may be: weights far apart are digits of the sum, which tell its parts."""


@dataclass(frozen=True, slots=True)
class BufferTerms:
    """What is fixed for a run. weights: by staleness; an update older than the table is refused. goal: buffer size.

    nodes: ascending ids. Updates live in Z_2^bits: weight * update, summed over a buffer, must not wrap around.
    per_version: updates of a version that a buffer holds if it holds any; None: privacy + 2. A server that makes models
    up could else give every node a version of its own, all but one without a gradient, and the sum would be one update.
    1 trusts the server to send the models it says.
    """

    run: int
    nodes: tuple[int, ...]
    dimension: int
    bits: int
    threshold: int
    privacy: int
    weights: tuple[int, ...] = (1,)
    goal: int = 2
    per_version: int | None = None

    def __post_init__(self) -> None:
        n = len(self.nodes)
        if list(self.nodes) != sorted(set(self.nodes)) or not self.nodes or self.nodes[0] < 1:
            raise LocalError("nodes must be distinct ids above 0, ascending")
        if 2 * self.threshold <= n + self.privacy:
            raise LocalError(f"2 threshold > n + privacy must hold, got {self.threshold}, {n}, {self.privacy}")
        if not self.weights or not all(1 <= weight < 1 << 32 for weight in self.weights):
            raise LocalError("weights must be integers of 1 or more, the freshest first")
        if max(self.weights) > SPREAD * min(self.weights):
            raise LocalError(
                f"weights must lie within a factor of {SPREAD}, or the sum shows its parts; got {self.weights}"
            )
        if not 2 <= self.goal <= n or not 1 <= self.bits <= 64 or self.dimension < 0 or self.run < 0:
            raise LocalError(f"goal must be between 2 and {n}, bits between 1 and 64, dimension and run 0 or more")
        if self.goal < self.privacy + 2:
            raise LocalError(
                f"goal must be at least privacy + 2 = {self.privacy + 2}: a buffer of {self.goal} updates may hold one "
                f"honest node's and {self.goal - 1} that collude with the server"
            )
        if not 1 <= self.alike <= self.goal:
            raise LocalError(f"per_version must be between 1 and the goal of {self.goal}, got {self.per_version}")
        Code(n, self.threshold, self.privacy, self.bits)

    @property
    def alike(self) -> int:
        """Updates of a version that a buffer holds if it holds any."""
        return self.privacy + 2 if self.per_version is None else self.per_version

    def alone(self, versions: Iterable[int]) -> set[int]:
        """Return the versions of which there are too few for a buffer."""
        return {version for version, count in Counter(versions).items() if count < self.alike}

    def digest(self) -> bytes:
        numbers = [self.run, self.dimension, self.bits, self.threshold, self.privacy, self.goal, self.alike]
        numbers += [len(self.weights), *self.weights]
        packed = b"".join(codec.u64(number) for number in numbers)
        return keys.digest(b"lightsecagg buffered terms", packed, codec.node_list(self.nodes))

    @property
    def code(self) -> Code:
        return Code(len(self.nodes), self.threshold, self.privacy, self.bits)

    @property
    def sealed_size(self) -> int:
        return vector_bytes(self.code.share_size(self.dimension), self.bits) + messages.TAG

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

    def signed(self, context: bytes, key: bytes) -> bool:
        return keys.verified(key, self.signature, *self._statement(context))

    def sign(self, context: bytes, secret_key: bytes) -> Entry:
        return replace(self, signature=keys.sign(secret_key, *self._statement(context)))

    def _statement(self, context: bytes) -> tuple[bytes, bytes]:
        numbers = codec.u64(self.node) + codec.u64(self.version)
        return b"lightsecagg version", context + numbers + self.binding

    def encode(self) -> bytes:
        return codec.u64(self.version) + self.binding + self.signature

    @classmethod
    def decode(cls, node: int, raw: memoryview) -> Entry:
        reader = Reader(raw)
        return cls(node, reader.number(8), bytes(reader.take(32)), bytes(reader.take(messages.SIGNATURE)))


def read_buffer(reader: Reader) -> tuple[int, tuple[Entry, ...]]:
    """Current version and entries, as confirmed and opened."""
    current = reader.number(8)
    return current, tuple(Entry.decode(node, raw) for node, raw in reader.table(Entry.SIZE).items())


def listing(current: int, entries: tuple[Entry, ...]) -> bytes:
    """A buffer as it is confirmed and opened."""
    return codec.u64(current) + codec.table((entry.node, entry.encode()) for entry in entries)


def buffer_statement(context: bytes, current: int, entries: tuple[Entry, ...]) -> tuple[bytes, bytes]:
    """What holders sign, label and text: this run's keys, the current version, and every entry."""
    return b"lightsecagg buffer", context + listing(current, entries)


@dataclass(frozen=True, slots=True)
class Memory:
    """What a node keeps between calls; persist `encode()` before a reply leaves.

    contributed: its own last version. opened: the last version opened, per node. confirmed: hash of the one buffer
    it signed and has not opened yet. current: the version of the last buffer it signed. models: version -> hash of the
    model it stands for, as this node was given it or confirmed it, while an update of that version may have a weight.
    given: 16 bytes of every model it contributed an update of.
    """

    root: bytes = field(repr=False)
    roster: bytes = b""
    contributed: int = -1
    current: int = -1
    confirmed: bytes = bytes(32)
    opened: Mapping[int, int] = field(default_factory=dict)
    models: Mapping[int, bytes] = field(default_factory=dict)
    given: bytes = b""

    def knows(self, binding: bytes) -> bool:
        """Whether this node contributed an update of the model."""
        mark = binding[:_MARK_BYTES]
        return any(self.given[at : at + _MARK_BYTES] == mark for at in range(0, len(self.given), _MARK_BYTES))

    def encode(self) -> bytes:
        numbers = codec.u64(self.contributed + 1) + codec.u64(self.current + 1)
        opened = codec.table((node, codec.u64(version)) for node, version in self.opened.items())
        models = codec.table((version + 1, binding) for version, binding in self.models.items())
        return self.root + self.confirmed + numbers + codec.blob(self.roster) + opened + models + codec.blob(self.given)

    @classmethod
    def decode(cls, kept: bytes) -> Memory:
        def read(reader: Reader) -> Memory:
            root, confirmed = bytes(reader.take(32)), bytes(reader.take(32))
            contributed, current = reader.number(8) - 1, reader.number(8) - 1
            roster = bytes(reader.blob())
            opened = {node: int.from_bytes(raw, "big") for node, raw in reader.table(8).items()}
            models = {version - 1: bytes(raw) for version, raw in reader.table(32).items()}
            return cls(root, roster, contributed, current, confirmed, opened, models, bytes(reader.blob()))

        try:
            return codec.decode(kept, read)
        except DecodeError as error:
            raise LocalError("kept state is not from this protocol: join the run anew") from error


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
        if self.identity.roster[node] != keys.signing_public(self.identity.secret_key):
            raise LocalError(f"the identity is not the one that the roster holds for node {node}")
        floors = (
            (terms.goal, self.policy.min_cohort, "goal"),
            (terms.threshold, max(2, self.policy.min_threshold), "threshold"),
            (terms.bits, self.policy.min_bits, "bits"),
            (len(terms.nodes) - 1, self.policy.min_neighbours, "neighbours"),
            (terms.run, self.policy.min_round, "run"),
            (terms.privacy, graph.count(len(terms.nodes), self.policy.corrupt), "privacy"),
        )
        for value, floor, name in floors:
            if value < floor:
                raise LocalError(f"{name} of the run is {value}, this node's policy demands {floor}")
        self._check_facts()

    def _check_facts(self) -> None:
        """Refuse terms of another run, ring or model than the node knows of, and vectors it has no room for."""
        terms, policy = self.terms, self.policy
        for name in ("run", "bits", "dimension", "nodes"):
            known, told = getattr(policy, name), getattr(terms, name)
            if known not in (None, told):
                raise LocalError(f"{name} of the run is {told}, this node's policy has {known}")
        entries = max(terms.dimension, -(-len(terms.nodes) * terms.code.share_size(terms.dimension) // CODED))
        if entries > policy.max_dimension:
            raise LocalError(
                f"dimension of the run is {terms.dimension}, this node's ceiling is {policy.max_dimension}"
            )

    @property
    def node(self) -> int:
        return self.identity.node

    def _secrets(self, memory: Memory) -> Secrets:
        return Secrets(memory.root, self.terms.digest())

    def _advertisement(self, memory: Memory) -> Advertisement:
        own, digest = self.identity.roster[self.node], self.terms.digest()
        unsigned = Advertisement(self._secrets(memory).public_key(), own, digest, bytes(32), b"")
        return unsigned.sign(self.node, self.identity.secret_key)

    def join(self) -> tuple[bytes, bytes]:
        """Draw this run's keys and announce them."""
        memory = Memory(self.random(32))
        return memory.encode(), messages.sealed(JOIN, self.terms.digest(), self._advertisement(memory).encode())

    def _peers(self, roster: bytes) -> dict[int, Advertisement]:
        rows = messages.body(roster, ROSTER, self.terms.digest(), lambda r: r.table(Advertisement.SIZE))
        return {node: Advertisement.decode(raw) for node, raw in rows.items()}

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
        return memory, keys.digest(b"lightsecagg context", memory.roster)

    def _mask(self, memory: Memory, version: int) -> Secrets:
        return self._secrets(memory).version(version)

    def _channel(self, memory: Memory, context: bytes, peer: int, version: int) -> keys.Channel:
        """A channel for one version only, so that each key seals one text."""
        place = keys.digest(b"lightsecagg version context", context, codec.u64(version))
        return self._secrets(memory).channel(peer, self._peers(memory.roster)[peer].public_key, place)

    def contribute(self, kept: bytes, version: int, binding: bytes, vector: Words) -> tuple[bytes, bytes]:
        """Mask an update trained on `version` and share the mask. A version and a model are used once, versions rise.

        Two buffers over updates of one model would differ by what a single node sent. binding: hash of the model it was
        trained on; this node confirms no buffer in which the version is another one.
        """
        memory, context = self._settled(kept)
        terms, bits = self.terms, self.terms.bits
        if not memory.contributed < version < _NEVER or len(binding) != 32:
            raise LocalError(f"version must exceed {memory.contributed}, the last contributed; got {version}")
        if memory.models.get(version, binding) != binding:
            raise deviation("inconsistent-model", f"version {version} was another model in a buffer this node signed")
        if memory.knows(binding):
            raise deviation("repeated-model", f"version {version} is a model this node gave an update of before")
        given = np.asarray(vector)
        if given.shape != (terms.dimension,) or given.dtype not in (np.uint32, np.uint64):
            raise LocalError(f"the update must be uint32 or uint64 of shape ({terms.dimension},)")
        if bits < 64 and terms.dimension and int(given.max()) >> bits:
            raise LocalError(f"the update has an entry of 2^{bits} or more: quantise into the ring first")
        entry = Entry(self.node, version, binding, b"").sign(context, self.identity.secret_key)
        holders = [node for node in self._peers(memory.roster) if node != self.node]
        rows = []
        for node, share in zip(holders, self._shares(memory, version, holders), strict=True):
            text = bytes(messages.encode_vector(share, bits))
            channel = self._channel(memory, context, node, version)
            rows.append((node, channel.seal(self.node, node, text)))
        masked = self._mask(memory, version).mask(terms.dimension, bits)
        masked += given.astype(words(bits))
        masked &= words(bits)((1 << bits) - 1)
        reply = messages.sealed(
            CONTRIBUTION,
            terms.digest(),
            entry.encode(),
            messages.encode_table(rows),
            messages.encode_vector(masked, bits),
        )
        models = {**memory.models, version: binding}
        marks = memory.given + binding[:_MARK_BYTES]
        return replace(memory, contributed=version, models=models, given=marks).encode(), reply

    def _shares(self, memory: Memory, version: int, holders: list[int]) -> Words:
        code, dimension, bits = self.terms.code, self.terms.dimension, self.terms.bits
        secrets = self._mask(memory, version)
        noise = secrets.noise(code.noise_size(dimension), bits)
        places = [self.terms.nodes.index(node) for node in holders]
        return code.encode(secrets.mask(dimension, bits), noise, places)

    def _check_buffer(self, memory: Memory, context: bytes, current: int, entries: tuple[Entry, ...]) -> None:
        """Refuse entries that are stale, alone in their version, opened before, unsigned, or of another model."""
        peers = self._peers(memory.roster)
        bindings = dict(memory.models)
        if current <= memory.current:
            raise deviation("version-not-rising", f"a buffer at version {memory.current} was signed before")
        if len(entries) < max(self.terms.goal, self.policy.min_cohort, self.policy.min_survivors):
            raise deviation("cohort-too-small", f"the buffer holds {len(entries)} updates")
        if alone := self.terms.alone(entry.version for entry in entries):
            detail = (
                f"fewer than {self.terms.alike} updates of version {min(alone)}: its model may be made for one node"
            )
            raise deviation("lonely-version", detail)
        for entry in entries:
            if entry.node not in peers:
                raise deviation("foreign-node", f"node {entry.node} is not in the run")
            if not self.terms.weight(current, entry.version):
                raise deviation("too-stale", f"version {entry.version} has no weight at version {current}")
            if entry.version <= memory.opened.get(entry.node, -1):
                raise deviation("opened-before", f"a mask of node {entry.node} would be opened again")
            if not entry.signed(context, self.identity.roster[entry.node]):
                raise RemoteError("bad-signature", (SERVER, entry.node), "the version is not signed")
            if bindings.setdefault(entry.version, entry.binding) != entry.binding:
                raise deviation("inconsistent-model", f"version {entry.version} stands for two models")

    def confirm(self, kept: bytes, request: Buffer) -> tuple[bytes, bytes]:
        """Sign a buffer: from here on its (node, version) pairs count as opened."""
        memory, context = self._settled(kept)
        try:
            current, entries = messages.body(request, BUFFER, self.terms.digest(), read_buffer)
        except DecodeError as error:
            raise deviation("malformed-request", str(error)) from error
        self._check_buffer(memory, context, current, entries)
        statement = buffer_statement(context, current, entries)
        models = {**memory.models, **{entry.version: entry.binding for entry in entries}}
        oldest = current + 2 - len(self.terms.weights)  # what is older has no weight in any later buffer
        after = replace(
            memory,
            current=current,
            models={version: binding for version, binding in models.items() if version >= oldest},
            confirmed=keys.digest(*statement),
            opened={**memory.opened, **{entry.node: entry.version for entry in entries}},
        )
        signature = keys.sign(self.identity.secret_key, *statement)
        return after.encode(), messages.sealed(SIGNED, self.terms.digest(), signature)

    def open(self, kept: bytes, request: Buffer) -> tuple[bytes, bytes]:
        """Add up the weighted shares of the buffer that this node signed, once, when U nodes signed it."""
        memory, context = self._settled(kept)
        size = self.terms.sealed_size

        def read(reader: Reader) -> tuple[int, tuple[Entry, ...], messages.Table, messages.Table]:
            return *read_buffer(reader), reader.table(messages.SIGNATURE), reader.table(size)

        try:
            current, entries, signed, shares = messages.body(request, OPEN, self.terms.digest(), read)
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
        if keys.digest(*statement) != memory.confirmed:
            raise deviation("unconfirmed-buffer", "this is not the buffer the node signed, or it was opened")
        peers, terms = self._peers(memory.roster), self.terms
        for node, signature in signed.items():
            if node not in peers:
                raise deviation("foreign-node", f"node {node} is not in the run")
            if not keys.verified(self.identity.roster[node], signature, *statement):
                raise RemoteError("split-buffer", (SERVER, node), f"node {node} did not sign this buffer")
        if len(signed) < terms.threshold:
            raise deviation("too-few-confirmations", f"{len(signed)} of {terms.threshold} signed the buffer")
        if tuple(shares) != tuple(entry.node for entry in entries if entry.node != self.node):
            raise deviation("wrong-shares", "the shares to add up are not exactly the buffer's")
        kind, length = words(terms.bits), terms.code.share_size(terms.dimension)
        total: Words = np.zeros(length, dtype=kind)
        for entry in entries:
            if entry.node == self.node:
                share = self._shares(memory, entry.version, [self.node])[0]
            else:
                channel = self._channel(memory, context, entry.node, entry.version)
                text = channel.open(entry.node, self.node, shares[entry.node])
                share = codec.decode_vector(text, length, terms.bits)
            total += share * kind(terms.weight(current, entry.version) % (1 << terms.bits))
        total &= kind((1 << terms.bits) - 1)
        return total
