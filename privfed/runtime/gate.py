"""The gate of a listener: no request is read before its sender is known, speaks our protocol and may ask at all."""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import logging
import secrets
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import Any, TypeAlias, cast

import grpc
import grpc.aio
from structlog.contextvars import bind_contextvars

from privfed.errors import PrivfedError
from privfed.failpoint import reach
from privfed.runtime.authority import utc_now
from privfed.runtime.certificate import CertificateError, Peer
from privfed.runtime.credentials import Trust, certificate_of
from privfed.runtime.handshake import CALLER, NODE, STORAGE, TERM, Refused, agree, greeting
from privfed.runtime.oidc import TokenRefused, Tokens, bearer
from privfed.runtime.patience import storage_fault
from privfed.runtime.roster import Roster

log = logging.getLogger("privfed.superlink")
Handler: TypeAlias = "grpc.RpcMethodHandler[bytes, bytes]"
Context = grpc.aio.ServicerContext[bytes, bytes]
Unary = Callable[[Peer, bytes], Awaitable[bytes]]
Streaming = Callable[[Peer, bytes, Context], Awaitable[None]]
Receiving = Callable[[Peer, AsyncIterator[bytes], Context], Awaitable[bytes]]
Conversing = Callable[[Peer, AsyncIterator[bytes], Context], Awaitable[None]]
MAX_NODE = 1 << 62
MAX_KNOWN = 20_000
REQUEST_SECONDS = 60.0
MAX_REASON, MAX_REASONS = 300, 8
"""Different refusals that are told apart at a time; whoever is turned away must not fill a log."""
_TURNED_AWAY = frozenset(
    {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.FAILED_PRECONDITION}
)


class Denied(PrivfedError):
    """A request that is refused, with the status that says how."""

    def __init__(self, text: str, code: grpc.StatusCode = grpc.StatusCode.PERMISSION_DENIED) -> None:
        self.code = code
        super().__init__(text)


def malformed(fault: Exception) -> Denied:
    """Return the refusal of a request that does not decode."""
    return Denied(str(fault), grpc.StatusCode.INVALID_ARGUMENT)


class Gate:
    """Lets peers of certain roles in. trust None: there are no certificates, and peers are who they say they are.

    term: the mark of the one this SuperLink holds; others of this authority that know it may pass on calls. None: no
    call that was passed on is taken, so none is passed on twice.
    """

    def __init__(self, trust: Trust | None, roles: Collection[str], term: str | None = None) -> None:
        self._trust = trust
        self._term = term
        self._roles = frozenset(roles)
        self._known: OrderedDict[bytes, tuple[Roster, Peer]] = OrderedDict()
        self.refusals = 0
        self._reasons: Counter[str] = Counter()
        self._taken: set[str] = set()

    def take_reasons(self, *, new: bool = False) -> dict[str, int]:
        """Return why callers were turned away since the last call, and how often; from the loop that serves them.

        new: only for reasons that were not taken since all were; the others wait, so that few are told at a time.
        """
        found = {reason: count for reason, count in self._reasons.items() if not (new and reason in self._taken)}
        for reason in found:
            del self._reasons[reason]
        self._taken = self._taken | found.keys() if new else set()
        return found

    def _note(self, fault: Denied) -> None:
        if fault.code in _TURNED_AWAY:
            reason = str(fault)[:MAX_REASON].encode(errors="replace").decode()
            told = self._taken | self._reasons.keys()
            known = reason in told or len(told) < MAX_REASONS
            self._reasons[reason if known else "for other reasons"] += 1

    def admit(self, context: Context) -> Peer:
        """Return who calls. Raises Denied."""
        metadata = cast("tuple[tuple[str, str | bytes], ...]", context.invocation_metadata() or ())
        try:
            agree(metadata, "the caller")
        except Refused as fault:
            raise Denied(str(fault), grpc.StatusCode.FAILED_PRECONDITION) from None
        peer = self._identify(context, dict(metadata))
        if peer.role not in self._roles:
            wanted = " or ".join(sorted(self._roles))
            raise Denied(f"{peer.common_name} is a {peer.role}; this listener serves the roles {wanted}")
        return peer

    def _identify(self, context: Context, metadata: dict[str, str | bytes]) -> Peer:
        if self._trust is None:
            self._check_term(metadata)
            return self._claimed(metadata)
        try:
            peer = self._judge(certificate_of(context), self._trust)
            if TERM in metadata or CALLER in metadata:
                return self._passed_on(peer, metadata, self._trust)
            return peer
        except CertificateError as fault:
            raise Denied(str(fault), grpc.StatusCode.UNAUTHENTICATED) from None

    def _passed_on(self, by: Peer, metadata: dict[str, str | bytes], trust: Trust) -> Peer:
        """Return whose call a SuperLink passes on: it is judged as if it had come itself."""
        if by.role != "link":
            raise Denied(f"{by.common_name} is a {by.role} and passes on the call of another: only a SuperLink may")
        self._check_term(metadata)
        shown = metadata.get(CALLER)
        if not isinstance(shown, bytes) or TERM not in metadata:
            text = f"{by.common_name} passes on a call without its term or its caller's certificate"
            raise Denied(text, grpc.StatusCode.UNAUTHENTICATED)
        caller = self._judge(shown, trust)
        bind_contextvars(through=by.common_name)
        return dataclasses.replace(caller, through=by.serial)

    def _check_term(self, metadata: dict[str, str | bytes]) -> None:
        """Raise Denied for a call that was passed on to another term than this one."""
        if TERM not in metadata:
            return
        if self._term is None:
            text = "this SuperLink does not hold the term, and takes no call that another one passes on"
            raise Denied(text, grpc.StatusCode.UNAVAILABLE)
        named = metadata[TERM]
        if not (isinstance(named, str) and hmac.compare_digest(named.encode(), self._term.encode())):
            text = "the call was passed on to another term than this SuperLink's"
            raise Denied(text, grpc.StatusCode.UNAVAILABLE)

    def _judge(self, pem: bytes, trust: Trust) -> Peer:
        """Judge a certificate; once for many calls, until the roster changes or it expires."""
        known = self._known.get(pem)
        if known is not None and known[0] is trust.roster:
            expires = known[1].expires
            if expires is not None and utc_now() < expires:
                return known[1]
        peer = trust.authenticate(pem)
        self._known[pem] = (trust.roster, peer)
        self._known.move_to_end(pem)
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        return peer

    def _claimed(self, metadata: dict[str, str | bytes]) -> Peer:
        if "node" not in self._roles:
            return Peer("operator", "local")
        text = metadata.get(NODE, "")
        if not (isinstance(text, str) and text.isascii() and text.isdecimal() and 0 < int(text[:20]) < MAX_NODE):
            raise Denied("a node without a certificate must say its id", grpc.StatusCode.UNAUTHENTICATED)
        return Peer("node", f"node-{int(text)}", int(text))

    async def _enter(self, context: Context, *, greets: bool) -> Peer:
        try:
            peer = self.admit(context)
        except Denied:
            self.refusals += 1
            greets = True
            raise
        finally:
            if greets:
                await context.send_initial_metadata(greeting())
        return peer

    def unary(self, step: str, serve: Unary) -> Handler:
        """Return a handler of one request with one answer. step: the answer's name among the failpoints."""

        async def handle(requests: AsyncIterator[bytes], context: Context) -> bytes:
            async def read(peer: Peer) -> bytes:
                return await serve(peer, await _only(requests))

            return _sending(step, await self._guarded(context, read), context)

        # As a stream, since gRPC reads the one request of a unary call whole before it asks who sends it.
        return cast(Handler, grpc.stream_unary_rpc_method_handler(cast(Any, handle)))

    def streaming(self, serve: Streaming) -> Handler:
        """Return a handler of one request with a stream of answers."""

        async def handle(requests: AsyncIterator[bytes], context: Context) -> None:
            async def read(peer: Peer) -> None:
                await serve(peer, await _only(requests), context)

            await self._guarded(context, read)

        return cast(Handler, grpc.stream_stream_rpc_method_handler(cast(Any, handle)))

    def receiving(self, step: str, serve: Receiving) -> Handler:
        """Return a handler of a stream of requests with one answer. step: as for `unary`."""

        async def handle(requests: AsyncIterator[bytes], context: Context) -> bytes:
            answer: bytes = await self._guarded(context, lambda peer: serve(peer, requests, context))
            return _sending(step, answer, context)

        return cast(Handler, grpc.stream_unary_rpc_method_handler(cast(Any, handle)))

    def conversing(self, serve: Conversing, *, greets: bool = True) -> Handler:
        """Return a handler of a stream of requests with a stream of answers.

        greets: this side says what it speaks; else `serve` passes on what another one says.
        """

        async def handle(requests: AsyncIterator[bytes], context: Context) -> None:
            await self._guarded(context, lambda peer: serve(peer, requests, context), greets=greets)

        return cast(Handler, grpc.stream_stream_rpc_method_handler(cast(Any, handle)))

    async def _guarded(self, context: Context, serve: Callable[[Peer], Awaitable[Any]], *, greets: bool = True) -> Any:
        try:
            peer = await self._enter(context, greets=greets)
            bind_contextvars(peer=peer.common_name)  # for this request alone: it has a task of its own
            return await serve(peer)
        except Denied as fault:
            self._note(fault)
            await context.abort(fault.code, str(fault))
        except PrivfedError as fault:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(fault))
        except grpc.aio.AbortError:
            raise
        except grpc.aio.BaseError:  # the peer is gone, and nobody is left to be told
            log.debug("a peer went away")
            return b""
        except Exception as fault:
            text = storage_fault(fault)
            if text:  # a named state: the peer keeps what it has, and tries again
                await context.abort(grpc.StatusCode.UNAVAILABLE, f"{STORAGE}: {text}")
            mark = secrets.token_hex(4)
            log.exception("a request failed; the peer was told the reference %s", mark)
            await context.abort(grpc.StatusCode.INTERNAL, f"the SuperLink failed; its log has the cause under {mark}")


async def _only(requests: AsyncIterator[bytes]) -> bytes:
    """Return the request of a call that has one. Raises Denied when there is none, or it does not come."""
    try:
        return await asyncio.wait_for(anext(aiter(requests)), REQUEST_SECONDS)
    except StopAsyncIteration:
        raise Denied("a call without a request", grpc.StatusCode.INVALID_ARGUMENT) from None
    except TimeoutError:
        raise Denied("the request stands still", grpc.StatusCode.DEADLINE_EXCEEDED) from None


def _sending(step: str, answer: bytes, context: Context) -> bytes:
    """Return an answer that gRPC sends when the handler returns; it calls back when that is done."""
    reach(f"before-{step}")
    context.add_done_callback(cast(Any, lambda _: reach(f"after-{step}")))
    return answer


class TokenGate(Gate):
    """Lets users in by bearer tokens, where nobody shows a certificate."""

    def __init__(self, tokens: Tokens, roles: Collection[str], term: str | None = None) -> None:
        super().__init__(None, roles, term)
        self._tokens = tokens

    def _identify(self, context: Context, metadata: dict[str, str | bytes]) -> Peer:
        self._check_term(metadata)
        try:
            return self._tokens.authenticate(bearer(metadata))
        except TokenRefused as fault:
            raise Denied(str(fault), grpc.StatusCode.UNAUTHENTICATED) from None
