"""What a SuperLink serves to nodes: the session that pushes tasks, large buffers both ways, answers, and runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import grpc
import grpc.aio

from privfed.errors import WireError
from privfed.failpoint import around
from privfed.mapped import let_go
from privfed.message import SERVER_NODE_ID, Message
from privfed.runtime.authority import utc_now
from privfed.runtime.blob import BlobError, BlobFolder
from privfed.runtime.certificate import Peer
from privfed.runtime.credentials import Credentials
from privfed.runtime.dispatch import MAX_SLOTS, Dispatcher, Session
from privfed.runtime.frame import (
    CHUNK,
    Answer,
    Buffer,
    Ended,
    Grant,
    Hello,
    Part,
    Progress,
    RosterQuery,
    RunQuery,
    Stalled,
    Verdict,
    Waiting,
    Want,
    Welcome,
    chunk,
    chunk_size,
    pack,
    read_chunk,
    unpack,
)
from privfed.runtime.gate import Context, Denied, Gate, malformed
from privfed.runtime.node_register import NodeRegister
from privfed.runtime.store import Holder

log = logging.getLogger("privfed.superlink")
SERVICE = "privfed.Fleet"
HELLO_SECONDS = 10.0
STALL_SECONDS = 60.0
MAX_HELD = 4096
MAX_REASON = 100
HEAR_SECONDS = 1.0
"""Between two things that a node says of itself."""


@dataclass(frozen=True, slots=True)
class FleetLimits:
    """What nodes may ask for: connections, bytes of one reply on its way, bytes of all."""

    nodes: int = 10_000
    reply_bytes: int = 16 << 30
    total_bytes: int = 64 << 30


class Runs(Protocol):
    """What the service must know of runs (`privfed.runtime.federation`)."""

    def grant(self, run_id: int, node: int) -> Grant | None: ...

    def has_ended(self, run_id: int) -> bool: ...

    def archive(self, digest: bytes, node: int) -> Path | None: ...


class FleetService:
    """Serves nodes that passed the gate and the register."""

    def __init__(
        self,
        name: str,
        dispatcher: Dispatcher,
        register: NodeRegister,
        runs: Runs,
        incoming: Path,
        limits: FleetLimits = FleetLimits(),
        credentials: Credentials | None = None,
    ) -> None:
        self.name = name
        self._credentials = credentials
        self.dispatcher = dispatcher
        self._register = register
        self._runs = runs
        self._incoming = incoming
        self._limits = limits
        self._inboxes: dict[int, BlobFolder] = {}
        # What each node was asked to upload, for each task: a node answers for several runs at a time.
        self._expected: dict[int, dict[str, dict[bytes, int]]] = {}
        self._waiting = 0
        self._news = asyncio.Event()
        self.bytes_up = self.bytes_down = self.answers = 0

    def handlers(self, gate: Gate) -> grpc.GenericRpcHandler:
        """Return the service for a gRPC server."""
        methods = {
            "Session": gate.conversing(self._session),
            "Answer": gate.unary("answer", self._answer),
            "Send": gate.conversing(self._receive),
            "Fetch": gate.conversing(self._fetch),
            "Upload": gate.receiving("upload", self._upload),  # of protocol 1
            "Download": gate.streaming(self._download),  # of protocol 1
            "Run": gate.unary("run", self._run),
            "Roster": gate.streaming(self._roster),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def _session(self, peer: Peer, frames: AsyncIterator[bytes], context: Context) -> None:
        try:
            first = await asyncio.wait_for(anext(aiter(frames)), HELLO_SECONDS)
            hello = unpack(first, Hello)
        except (TimeoutError, StopAsyncIteration):
            raise Denied(f"no greeting came within {HELLO_SECONDS:g} s", grpc.StatusCode.DEADLINE_EXCEEDED) from None
        except WireError as fault:
            raise malformed(fault) from None
        node = _node(peer)
        if not 1 <= hello.slots <= MAX_SLOTS or len(hello.holding) > MAX_HELD or len(hello.runs) > MAX_HELD:
            raise Denied(f"a node takes 1 to {MAX_SLOTS} tasks at a time", grpc.StatusCode.INVALID_ARGUMENT)
        if len(self.dispatcher.sessions) + self._waiting >= self._limits.nodes:
            raise Denied(f"{self._limits.nodes} nodes are connected", grpc.StatusCode.RESOURCE_EXHAUSTED)
        self._waiting += 1
        try:
            await self._await_approval(peer, context)
        finally:
            self._waiting -= 1
        session = Session(node, peer.name, hello.slots, (peer.serial, peer.through), expires=peer.expires)
        session.queue.put_nowait(self._welcome(node))
        try:
            await self.dispatcher.join(session, hello.holding)
            hearing = asyncio.create_task(_hear(session, frames))
            try:
                await self._push(session, hello, context)
            finally:
                hearing.cancel()
        finally:
            self.dispatcher.leave(session)
            if node not in self.dispatcher.sessions:
                self._expected.pop(node, None)

    async def _await_approval(self, peer: Peer, context: Context) -> None:
        told = ""
        while True:
            news = self._news
            reason = await self.dispatcher.in_thread(lambda: self._register.greet(peer))
            if not reason:
                return
            if reason != told:
                told = reason
                with around("offer"):
                    await context.write(pack(Waiting(reason=reason)))
            await news.wait()
            for whose, serial in ((peer.common_name, peer.serial), ("the SuperLink that passes it on", peer.through)):
                if self._is_revoked((serial,)):
                    raise Denied(f"the certificate of {whose} is revoked", grpc.StatusCode.UNAUTHENTICATED)

    def _is_revoked(self, serials: tuple[int, ...]) -> bool:
        roster = self._credentials.trust.roster if self._credentials is not None else None
        return roster is not None and any(roster.is_revoked(serial) for serial in serials)

    def reconsider(self) -> None:
        """Look again at the nodes that wait for approval."""
        self._news.set()
        self._news = asyncio.Event()

    def _welcome(self, node: int) -> Welcome:
        roster = self._credentials.trust.roster.version if self._credentials is not None else 0
        return Welcome(node_id=node, link=self.name, roster=roster)

    def roster_changed(self) -> None:
        """Tell every node that there is a newer roster, and hang up on those it revokes."""
        self.reconsider()
        for session in list(self.dispatcher.sessions.values()):
            session.queue.put_nowait(None if self._is_revoked(session.serials) else self._welcome(session.node_id))

    def part_with_expired(self) -> None:
        """Hang up on nodes whose certificate has expired since they connected."""
        for session in list(self.dispatcher.sessions.values()):
            if session.expires is not None and session.expires < utc_now():
                log.warning("node %d: its certificate expired on %s", session.node_id, f"{session.expires:%Y-%m-%d}")
                session.queue.put_nowait(None)

    async def _roster(self, peer: Peer, request: bytes, context: Context) -> None:
        self._served(peer)
        try:
            query = unpack(request, RosterQuery)
        except WireError as fault:
            raise malformed(fault) from None
        credentials = self._credentials
        if credentials is None or credentials.trust.roster.version <= query.version:
            return
        document = await self.dispatcher.in_thread(lambda: credentials.roster_document)
        for at in range(0, len(document), CHUNK):
            with around("roster"):
                await context.write(document[at : at + CHUNK])

    async def _push(self, session: Session, hello: Hello, context: Context) -> None:
        for run_id in hello.runs:
            if self._runs.has_ended(run_id):
                session.queue.put_nowait(Ended(run_id=run_id))
        while (frame := await session.queue.get()) is not None:
            with around("offer"):
                await context.write(pack(frame))

    async def _run(self, peer: Peer, request: bytes) -> bytes:
        node = self._served(peer)
        try:
            query = unpack(request, RunQuery)
        except WireError as fault:
            raise malformed(fault) from None
        grant = await self.dispatcher.in_thread(lambda: self._runs.grant(query.run_id, node))
        if grant is None:
            raise Denied(f"node {node} has no part in a run {query.run_id}", grpc.StatusCode.NOT_FOUND)
        return pack(grant)

    def _served(self, peer: Peer) -> int:
        """Return the id of a node that is served. Raises Denied for one that is not connected or not approved."""
        node = _node(peer)
        if node not in self.dispatcher.sessions:
            raise Denied(f"node {node} has no session here", grpc.StatusCode.UNAVAILABLE)
        return node

    async def _answer(self, peer: Peer, request: bytes) -> bytes:
        node = self._served(peer)
        try:
            answer = unpack(request, Answer)
        except WireError as fault:
            raise malformed(fault) from None
        holder = await self.dispatcher.in_thread(lambda: self.dispatcher.link.holder(answer.token))
        if holder is None:  # it came too late
            await self.dispatcher.in_thread(lambda: self.dispatcher.link.put_down(answer.token, node))
            return self._done(node, answer.token, Verdict(counted=False))
        if holder.node_id != node:
            raise Denied(f"node {node} answers for another node")
        if holder.counted:  # and the node was not told
            return self._done(node, answer.token, Verdict(counted=True))
        verdict = await self.dispatcher.in_thread(lambda: self._settle(node, holder, answer))
        if verdict.missing:
            return pack(verdict)
        self.answers += 1
        return self._done(node, answer.token, verdict)

    def _done(self, node: int, token: str, verdict: Verdict) -> bytes:
        """Expect nothing more of a task."""
        self._expected.get(node, {}).pop(token, None)
        self.dispatcher.finished(node, token)
        return pack(verdict)

    def _settle(self, node: int, holder: Holder, answer: Answer) -> Verdict:
        """Count a reply that is all here; else say what is missing."""
        sent = self.dispatcher.outbox.of_task(answer.token)
        outside = {part.digest: part for part in answer.parcel.outside()}
        inbox = self._inbox(node) if outside else {}
        found: dict[bytes, Buffer] = {digest: sent[digest] for digest in outside if digest in sent}
        found |= {digest: inbox[digest] for digest in outside if digest in inbox}
        missing = [part for digest, part in outside.items() if digest not in found]
        if missing:
            return self._ask(node, answer.token, missing)
        try:
            reply = answer.parcel.open(found)
        except WireError as fault:
            if not outside:
                raise malformed(fault) from None
            self._inbox(node).drop(outside)
            return self._ask(node, answer.token, list(outside.values()))
        _check(reply, node, holder)
        counted = self.dispatcher.link.count(answer.token, holder.run_id, reply)
        if node in self._inboxes:
            self._inboxes[node].drop(outside)
        return Verdict(counted=counted)

    def _inbox(self, node: int) -> BlobFolder:
        if node not in self._inboxes:
            self._inboxes[node] = BlobFolder(self._incoming / str(node), self._limits.reply_bytes)
        return self._inboxes[node]

    def _ask(self, node: int, token: str, parts: list[Part]) -> Verdict:
        inbox = self._inbox(node)
        self._expected.setdefault(node, {})[token] = {part.digest: part.size for part in parts}
        missing = tuple(Progress(digest=part.digest, size=inbox.arrived(part.digest)) for part in parts)
        return Verdict(counted=False, missing=missing)

    async def _upload(self, peer: Peer, frames: AsyncIterator[bytes], context: Context) -> bytes:
        del context
        async for _ in self._take(peer, frames):
            pass
        return b""

    async def _receive(self, peer: Peer, frames: AsyncIterator[bytes], context: Context) -> None:
        async for kept in self._take(peer, frames):
            with around("kept"):
                await context.write(pack(kept))

    async def _take(self, peer: Peer, frames: AsyncIterator[bytes]) -> AsyncIterator[Progress]:
        """Keep the chunks a node was asked for; yield what is here of a buffer after each."""
        node = self._served(peer)
        expected = self._expected.get(node)
        if not expected:
            raise Denied(f"node {node} was not asked for anything", grpc.StatusCode.OUT_OF_RANGE)
        iterator = aiter(frames)
        while True:
            try:
                frame = await asyncio.wait_for(anext(iterator), STALL_SECONDS)
                digest, offset, total, data = read_chunk(frame)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise Denied("the upload stands still", grpc.StatusCode.DEADLINE_EXCEEDED) from None
            except WireError as fault:
                raise malformed(fault) from None
            if all(asked.get(digest) != total for asked in list(expected.values())):
                raise Denied("a buffer that was not asked for, or of another size", grpc.StatusCode.INVALID_ARGUMENT)
            self.bytes_up += len(data)
            await self._keep(node, digest, offset, total, data)
            yield Progress(digest=digest, size=offset + len(data))

    async def _keep(self, node: int, digest: bytes, offset: int, total: int, data: memoryview) -> None:
        if sum(inbox.size for inbox in self._inboxes.values()) > self._limits.total_bytes:
            raise Denied("too many bytes are on their way: try again", grpc.StatusCode.RESOURCE_EXHAUSTED)
        try:
            await self.dispatcher.in_thread(lambda: self._inbox(node).add(digest, offset, total, data))
        except BlobError as fault:
            raise Denied(str(fault), grpc.StatusCode.OUT_OF_RANGE) from None
        except OSError as fault:  # a full disk: the node keeps its reply and tries again
            raise Denied(f"cannot keep the upload: {fault.strerror}", grpc.StatusCode.RESOURCE_EXHAUSTED) from None

    async def _fetch(self, peer: Peer, frames: AsyncIterator[bytes], context: Context) -> None:
        iterator = aiter(frames)
        try:
            request = await asyncio.wait_for(anext(iterator), STALL_SECONDS)
            async for frame in self._give(peer, request, chunk_size):
                with around("chunk"):
                    await context.write(frame)
                await asyncio.wait_for(anext(iterator), STALL_SECONDS)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise Denied("the download stands still", grpc.StatusCode.DEADLINE_EXCEEDED) from None

    async def _download(self, peer: Peer, request: bytes, context: Context) -> None:
        async for frame in self._give(peer, request, lambda total: CHUNK):
            with around("chunk"):
                await context.write(frame)

    async def _give(self, peer: Peer, request: bytes, size: Callable[[int], int]) -> AsyncIterator[bytes]:
        """Yield the chunks a node asks for. size: bytes of a chunk of a buffer of so many."""
        node = self._served(peer)
        try:
            want = unpack(request, Want)
        except WireError as fault:
            raise malformed(fault) from None
        for part in want.parts:
            source = self._source(node, part.digest)
            total = len(source)
            if part.size > total:
                raise Denied("that buffer is shorter", grpc.StatusCode.OUT_OF_RANGE)
            step = size(total)
            for at in range(part.size, total, step):
                frame = await self.dispatcher.in_thread(_cut(source, part.digest, at, step))
                self.bytes_down += len(frame)
                yield frame

    def _source(self, node: int, digest: bytes) -> memoryview:
        found = self.dispatcher.outbox.find(node, digest)
        if found is not None:
            return memoryview(found).cast("B")
        path = self._runs.archive(digest, node)
        if path is not None:
            return memoryview(path.read_bytes())
        raise Denied("this node was not sent that buffer", grpc.StatusCode.NOT_FOUND)


def _cut(source: memoryview, digest: bytes, at: int, size: int) -> Callable[[], bytes]:
    def cut() -> bytes:
        piece = source[at : at + size]
        frame = chunk(digest, at, len(source), piece)
        let_go(piece)
        return frame

    return cut


async def _hear(session: Session, frames: AsyncIterator[bytes]) -> None:
    """Note what a node says its tasks wait for; what a newer one says besides is not understood, and no fault."""
    with contextlib.suppress(grpc.aio.BaseError):  # the node is gone
        async for frame in frames:
            with contextlib.suppress(WireError):
                session.waits_for = _readable(unpack(frame, Stalled).reason)
            await asyncio.sleep(HEAR_SECONDS)


def _readable(reason: str) -> str:
    """Return what a node says as it may be shown to users."""
    return "".join(letter for letter in reason if letter.isascii() and letter.isprintable())[:MAX_REASON]


def _node(peer: Peer) -> int:
    if peer.node_id is None:
        raise Denied(f"{peer.common_name} is no node")
    return peer.node_id


def _check(reply: Message, node: int, holder: Holder) -> None:
    """Raise Denied unless the message answers the task it was given for."""
    data = reply.metadata
    told: Mapping[str, tuple[object, object]] = {
        "source": (data.src_node_id, node),
        "destination": (data.dst_node_id, SERVER_NODE_ID),
        "run": (data.run_id, holder.run_id),
        "task": (data.reply_to_message_id, holder.message_id),
    }
    for what, (said, true) in told.items():
        if said != true:
            raise Denied(f"the reply names {what} {said}, the task {true}", grpc.StatusCode.INVALID_ARGUMENT)
