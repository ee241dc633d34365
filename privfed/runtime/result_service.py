"""Serves the results of runs to their submitters and to operators."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from privfed.errors import PrivfedError, WireError
from privfed.failpoint import around
from privfed.runtime.audit_log import AuditLog
from privfed.runtime.certificate import Peer
from privfed.runtime.federation import Federation
from privfed.runtime.frame import pack, unpack
from privfed.runtime.gate import Context, Denied, malformed
from privfed.runtime.result import ResultPart, ResultQuery, ResultRows, Results

InThread = Callable[[Callable[[], Any]], Awaitable[Any]]
Owns = Callable[[Peer, str], Awaitable[None]]


class ResultService:
    """owns: raises Denied unless a peer may have what a run has made. in_thread: runs what blocks."""

    def __init__(self, federation: Federation, owns: Owns, in_thread: InThread, audit: AuditLog) -> None:
        self._federation = federation
        self._owns = owns
        self._in_thread = in_thread
        self._audit = audit
        self._results = Results()

    async def rows(self, peer: Peer, request: bytes) -> bytes:
        """List the results of a run."""
        try:
            asked = unpack(request, ResultQuery)
        except WireError as fault:
            raise malformed(fault) from None
        await self._owns(peer, asked.name)

        def collect() -> bytes:
            folder = self._federation.find(asked.name)
            status = folder.recorded_status
            files = self._results.list(folder, asked.models, operator=peer.role == "operator")
            facts = {"run": folder.name, "models": asked.models, "by": peer.common_name}
            self._audit.record("results-asked", **facts)
            return pack(ResultRows(run=folder.name, state=status.state, round=status.round, files=files))

        answer: bytes = await self._done(collect)
        return answer

    async def part(self, peer: Peer, request: bytes, context: Context) -> None:
        """Send a file, or the rest of it."""
        try:
            asked = unpack(request, ResultPart)
        except WireError as fault:
            raise malformed(fault) from None
        await self._owns(peer, asked.run)
        operator = peer.role == "operator"
        found = await self._done(lambda: self._results.read(self._federation.find(asked.run), asked, operator=operator))
        while (piece := await self._in_thread(lambda: bytes(next(found, b"")))) != b"":
            with around("result-part"):
                await context.write(piece)

    async def _done(self, work: Callable[[], Any]) -> Any:
        try:
            return await self._in_thread(work)
        except PrivfedError as fault:
            raise Denied(str(fault), grpc.StatusCode.INVALID_ARGUMENT) from None
