"""What a SuperLink serves to users: operators do all, submitters start and stop runs of their own, viewers look."""

from __future__ import annotations

import asyncio
import functools
import hashlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import grpc
import grpc.aio

from privfed.errors import PrivfedError, WireError
from privfed.failpoint import around
from privfed.runtime.audit_log import AuditLog
from privfed.runtime.bundle import MAX_BUNDLE
from privfed.runtime.certificate import Peer
from privfed.runtime.control import (
    MAX_ROWS,
    Done,
    Follow,
    Listing,
    NodeChange,
    NodeRow,
    NodeRows,
    Piece,
    RosterTaken,
    RunName,
    RunRow,
    RunRows,
    Submit,
)
from privfed.runtime.dispatch import Dispatcher
from privfed.runtime.federation import Asked, Federation
from privfed.runtime.frame import Frame, pack, read_chunk, unpack
from privfed.runtime.gate import Context, Denied, Gate, malformed
from privfed.runtime.node_register import NodeRegister
from privfed.runtime.result_service import ResultService
from privfed.runtime.roster import MAX_BYTES as ROSTER_BYTES
from privfed.runtime.run_folder import ENDED, RunFolder

SERVICE = "privfed.Control"
ARCHIVE_BYTES = MAX_BUNDLE + (8 << 20)
MAX_SETTINGS = 1000
PIECE = 1 << 20
STALL_SECONDS = 30.0
USER_THREADS = 8
_PEEK_SECONDS = 0.1
_FILES = {"log": "log.txt", "events": "events.jsonl"}
F = TypeVar("F", bound=Frame)
T = TypeVar("T")


class ControlService:
    """Serves users that passed the gate."""

    def __init__(
        self,
        federation: Federation,
        register: NodeRegister,
        dispatcher: Dispatcher,
        take_roster: Callable[[bytes], int],
        reconsider: Callable[[], None],
        audit: AuditLog,
    ) -> None:
        self._audit = audit
        self._reconsider = reconsider
        self._take_roster = take_roster
        self._federation = federation
        self._register = register
        self._dispatcher = dispatcher
        # Threads of its own: those of the store may all wait for a database that hangs, and users are told so.
        self._threads = ThreadPoolExecutor(USER_THREADS, thread_name_prefix="privfed-control")
        self._results = ResultService(federation, self._own, self._in_thread, audit)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """Let go of its threads."""
        self._threads.shutdown(wait=False)

    def handlers(self, gate: Gate) -> grpc.GenericRpcHandler:
        """Return the service for a gRPC server."""
        methods = {
            "Submit": gate.receiving("submit", self._submit),
            "Resume": gate.unary("resume", self._resume),
            "Stop": gate.unary("stop", self._stop),
            "Show": gate.unary("show", self._show),
            "Runs": gate.unary("runs", self._runs),
            "Nodes": gate.unary("nodes", self._nodes),
            "Node": gate.unary("node", self._node),
            "Roster": gate.receiving("roster-taken", self._roster),
            "Follow": gate.streaming(self._follow),
            "Results": gate.unary("results", self._results.rows),
            "Result": gate.streaming(self._results.part),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def _submit(self, peer: Peer, frames: AsyncIterator[bytes], context: Context) -> bytes:
        del context
        _need(peer, "submitter", "operator")
        iterator = aiter(frames)
        head = _read(await _next(iterator), Submit)
        if not 0 < head.size <= ARCHIVE_BYTES:
            raise Denied(f"an app of {head.size} bytes: at most {MAX_BUNDLE >> 20} MiB can be submitted")
        if len(head.settings) > MAX_SETTINGS:
            raise Denied(f"{len(head.settings)} settings are too many: at most {MAX_SETTINGS}")
        archive = bytearray()
        while len(archive) < head.size:
            try:
                digest, offset, total, data = read_chunk(await _next(iterator))
            except WireError as fault:
                raise malformed(fault) from None
            if (digest, offset, total) != (head.digest, len(archive), head.size):
                raise Denied("the archive's chunks are not in order", grpc.StatusCode.INVALID_ARGUMENT)
            archive += data
        if hashlib.sha256(archive).digest() != head.digest:
            raise Denied("the archive does not have the hash it was announced with", grpc.StatusCode.DATA_LOSS)
        asked = Asked(bytes(archive), head.settings, head.seed, head.nodes, head.keep, peer.common_name)

        def note(folder: RunFolder) -> None:
            facts = {"run": folder.name, "app": folder.config["name"][:200], "archive": head.digest.hex()}
            self._audit.record("run-submitted", **facts, nodes=folder.config["nodes"], by=peer.common_name)

        return await self._done(lambda: self._federation.submit(asked, note))

    async def _done(self, work: Callable[[], RunFolder]) -> bytes:
        try:
            return await self._in_thread(lambda: pack(self._row(work())))
        except PrivfedError as fault:
            raise Denied(str(fault), grpc.StatusCode.INVALID_ARGUMENT) from None

    async def _resume(self, peer: Peer, request: bytes) -> bytes:
        name = _read(request, RunName).name
        await self._own(peer, name)
        return await self._done(lambda: self._noted("run-resumed", peer, self._federation.resume(name)))

    async def _stop(self, peer: Peer, request: bytes) -> bytes:
        name = _read(request, RunName).name
        await self._own(peer, name)
        return await self._done(lambda: self._noted("stop-asked", peer, self._federation.stop(name)))

    def _noted(self, event: str, peer: Peer, folder: RunFolder) -> RunFolder:
        self._audit.record(event, run=folder.name, by=peer.common_name)
        return folder

    async def _own(self, peer: Peer, name: str) -> None:
        """Raise Denied unless the peer is an operator, or the submitter of the run."""
        _need(peer, "submitter", "operator")
        if peer.role == "operator":
            return
        by = await self._in_thread(lambda: self._federation.find(name).config.get("by"))
        if by != peer.common_name:
            raise Denied(f"run {name} was submitted by {by}: {peer.common_name} may only do this with runs of its own")

    async def _show(self, peer: Peer, request: bytes) -> bytes:
        del peer
        name = _read(request, RunName).name
        return await self._done(lambda: self._federation.find(name))

    async def _runs(self, peer: Peer, request: bytes) -> bytes:
        del peer
        limit = min(_read(request, Listing).limit, MAX_ROWS)

        def collect() -> bytes:
            folders = self._federation.folders()[-limit:] if limit > 0 else []
            return pack(RunRows(rows=tuple(self._row(folder) for folder in folders)))

        return await self._in_thread(collect)

    def _row(self, folder: RunFolder) -> RunRow:
        try:
            status, config = folder.recorded_status, folder.config
        except PrivfedError as fault:
            facts = {"app": "?", "state": "broken", "reason": str(fault), "by": "?"}
            return RunRow(name=folder.name, round=0, nodes=0, started=0.0, **facts)
        return RunRow(
            name=folder.name,
            app=config["name"],
            state=status.state,
            round=status.round,
            reason=self._federation.waits_for(folder),
            by=config["by"],
            nodes=config["nodes"],
            started=status.started,
        )

    async def _nodes(self, peer: Peer, request: bytes) -> bytes:
        del peer
        asked = _read(request, Listing)
        entries = await self._in_thread(self._register.entries)
        chosen = [entry for entry in entries if entry.node_id > asked.after][: max(0, min(asked.limit, MAX_ROWS))]
        here = self._dispatcher.sessions
        rows = (
            NodeRow(node_id=one.node_id, name=one.name, state=one.state, connected=one.node_id in here, seen=one.seen)
            for one in chosen
        )
        return pack(NodeRows(rows=tuple(rows)))

    async def _node(self, peer: Peer, request: bytes) -> bytes:
        _need(peer, "operator")
        change = _read(request, NodeChange)

        def decide() -> None:
            (self._register.approve if change.approve else self._register.revoke)(change.node_id)
            event = "node-approved" if change.approve else "node-revoked"
            self._audit.record(event, node=change.node_id, by=peer.common_name)

        try:
            await self._in_thread(decide)
        except PrivfedError as fault:
            raise Denied(str(fault), grpc.StatusCode.INVALID_ARGUMENT) from None
        if not change.approve:
            self._dispatcher.hang_up(change.node_id)
        self._reconsider()
        self._federation.nodes_changed()
        return pack(Done())

    async def _roster(self, peer: Peer, frames: AsyncIterator[bytes], context: Context) -> bytes:
        del context
        _need(peer, "operator")
        document, iterator = bytearray(), aiter(frames)
        while frame := await _next(iterator):
            document += frame
            if len(document) > ROSTER_BYTES:
                raise Denied(f"a roster is at most {ROSTER_BYTES >> 20} MiB")
        version = await self._in_thread(lambda: self._take_roster(bytes(document)))
        audit = functools.partial(self._audit.record, "roster-handed-on", version=version, by=peer.common_name)
        await self._in_thread(audit)
        return pack(RosterTaken(version=version))

    async def _follow(self, peer: Peer, request: bytes, context: Context) -> None:
        del peer
        asked = _read(request, Follow)
        if asked.what not in _FILES or asked.offset < 0:
            raise Denied(f"a run has no {asked.what!r}", grpc.StatusCode.INVALID_ARGUMENT)
        in_thread = self._in_thread
        try:
            folder = await in_thread(lambda: self._federation.find(asked.name))
        except PrivfedError as fault:
            raise Denied(str(fault), grpc.StatusCode.INVALID_ARGUMENT) from None
        path, at, told = folder.path / _FILES[asked.what], asked.offset, ""
        while True:
            status = await in_thread(lambda: folder.recorded_status)
            reason = await in_thread(lambda: self._federation.waits_for(folder))
            data = await in_thread(functools.partial(_piece, path, at))
            at += len(data)
            over = not data and (status.state in ENDED or not asked.follow)
            if data or over or reason != told:
                told = reason
                # What a run waits for is told at once; that it ended, only after all it has written.
                state = status.state if over or status.state not in ENDED else "running"
                with around("piece"):
                    await context.write(pack(Piece(offset=at, data=data, state=state, reason=reason)))
            if over:
                return
            if not data:
                await asyncio.sleep(_PEEK_SECONDS)


def _piece(path: Path, offset: int) -> bytes:
    """Return whole lines from an offset on, at most PIECE bytes (of a longer line: a part)."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(PIECE)
    except FileNotFoundError:
        return b""
    end = data.rfind(b"\n") + 1
    return data[:end] if end or len(data) < PIECE else data


async def _next(iterator: AsyncIterator[bytes]) -> bytes:
    try:
        return await asyncio.wait_for(anext(iterator), STALL_SECONDS)
    except StopAsyncIteration:
        raise Denied("the submission ends before its archive", grpc.StatusCode.INVALID_ARGUMENT) from None
    except TimeoutError:
        raise Denied("the submission stands still", grpc.StatusCode.DEADLINE_EXCEEDED) from None


def _read(data: bytes, kind: type[F]) -> F:
    try:
        return unpack(data, kind)
    except WireError as fault:
        raise malformed(fault) from None


def _need(peer: Peer, *roles: str) -> None:
    if peer.role not in roles:
        raise Denied(f"{peer.common_name} is a {peer.role}: this takes the role {' or '.join(roles)}")
