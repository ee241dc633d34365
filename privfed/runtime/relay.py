"""What a SuperLink that stands by does with calls: it passes them on to the one that serves, frame by frame.

It lets in whom the other would let in, by the same gates, and opens no frame. A caller has a connection of its own on
the far side, so that limits, flow control and a slow reader are the caller's there too. The call carries the mark of
the term it is meant for, which is in the database that both share, and the certificate that its caller proved to have.
The far side believes this of a SuperLink of this authority alone (`Gate`), and judges that certificate as if it had
come by itself. A bearer token is passed on as it is.

A call is passed on once: a gate without a term takes none that was, and only a SuperLink that does not pass on has one.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import grpc
import grpc.aio

from privfed.failpoint import around
from privfed.runtime.certificate import USERS, Peer
from privfed.runtime.credentials import Credentials, certificate_of
from privfed.runtime.gate import Context, Denied, Gate, TokenGate
from privfed.runtime.handshake import CALLER, NODE, TERM, channel_options, spoken
from privfed.runtime.listeners import SERVICES, Handlers, SuperLinkOptions
from privfed.runtime.tenure import Holder

log = logging.getLogger("privfed.superlink")
Call: TypeAlias = "grpc.aio.StreamStreamCall[bytes, bytes]"
Carried = tuple[tuple[str, str | bytes], ...]
_TOKEN = "authorization"
_UNTOLD = grpc.StatusCode.INTERNAL, "Internal error from Core"
"""What gRPC says of a call whose end met a frame on its way there, until it has looked how the call has ended."""
_UNTOLD_SECONDS = 1.0
_OVER = "the SuperLink that served serves no more: try again"


@dataclass(slots=True, eq=False)
class _Line:
    """A caller's connection to the SuperLink that serves. calls: under way. cut: that one serves no more."""

    channel: grpc.aio.Channel
    calls: set[Call] = field(default_factory=set)
    cut: bool = False


class Relay:
    """Passes calls on to whoever serves."""

    def __init__(self, options: SuperLinkOptions) -> None:
        self._credentials = options.credentials
        self._most = options.limits.nodes
        trust = options.credentials.trust if options.credentials is not None else None
        self._gates = {"fleet": Gate(trust, {"node"}), "control": Gate(trust, USERS)}
        if options.tokens is not None:
            self._gates["token-control"] = TokenGate(options.tokens, USERS)
        self._holder: Holder | None = None
        self._lines: dict[tuple[str, bytes], _Line] = {}
        self._calls = 0

    def handlers(self) -> Handlers:
        """Return what to serve on each listener."""
        return {listener: _Service(self, listener, gate) for listener, gate in self._gates.items()}

    def values(self) -> dict[str, float]:
        """Return what the monitor shows."""
        return {
            "connections_passed_on": len(self._lines),
            "calls_passed_on_total": self._calls,
            "refusals_total": sum(gate.refusals for gate in self._gates.values()),
        }

    def follow(self, holder: Holder | None) -> None:
        """Pass on to this one from now on; what goes to another one is cut. None: nobody serves."""
        if holder == self._holder:
            return
        self._holder = holder
        lines, self._lines = self._lines, {}
        for line in lines.values():
            line.cut = True
            for call in line.calls:
                call.cancel()

    async def pass_on(
        self, listener: str, method: str, peer: Peer, requests: AsyncIterator[bytes], context: Context
    ) -> None:
        """Have a call served by the SuperLink that serves."""
        holder = self._holder
        address = holder.addresses.get(listener, "") if holder is not None else ""
        if holder is None:
            raise Denied("no SuperLink serves now; one does within seconds: try again", grpc.StatusCode.UNAVAILABLE)
        if not address:
            raise Denied(f"{holder.owner} serves, and has no {listener} listener", grpc.StatusCode.UNAVAILABLE)
        who, carried = self._introduce(listener, peer, holder, context)
        line = self._line((listener, who), address)
        begin = cast(Any, line.channel).stream_stream(method)
        call: Call = begin(metadata=carried, timeout=context.time_remaining())
        self._calls += 1
        line.calls.add(call)
        try:
            await _converse(call, requests, context, f"{holder.owner}, which serves at {address},")
        except asyncio.CancelledError:
            if not line.cut:
                raise
            raise Denied(_OVER, grpc.StatusCode.UNAVAILABLE) from None
        finally:
            line.calls.discard(call)
            if not line.calls and not line.cut:
                del self._lines[listener, who]  # which closes it: `close` would look through all that this loop does

    def _introduce(self, listener: str, peer: Peer, holder: Holder, context: Context) -> tuple[bytes, Carried]:
        """Return what tells this caller from others, and the metadata that says who calls."""
        told = cast("tuple[tuple[str, str | bytes], ...]", context.invocation_metadata() or ())
        carried: Carried = (*spoken(told), (TERM, holder.mark))
        if listener == "token-control":
            return peer.common_name.encode(), (*carried, *(pair for pair in told if pair[0] == _TOKEN))
        if self._credentials is None:
            return peer.common_name.encode(), (*carried, *(pair for pair in told if pair[0] == NODE))
        shown = certificate_of(context)
        return shown, (*carried, (CALLER, shown))

    def _line(self, key: tuple[str, bytes], address: str) -> _Line:
        """Return the caller's connection, a new one if it has none. Raises Denied when there are too many."""
        line = self._lines.get(key)
        if line is None:
            if len(self._lines) >= self._most:
                raise Denied(f"{self._most} callers are connected", grpc.StatusCode.RESOURCE_EXHAUSTED)
            line = self._lines[key] = _Line(_dial(address, self._credentials))
        return line


class _Service(grpc.GenericRpcHandler):
    """All methods of one listener's service."""

    def __init__(self, relay: Relay, listener: str, gate: Gate) -> None:
        self._relay, self._listener, self._gate = relay, listener, gate
        self._prefix = f"/{SERVICES[listener]}/"

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        method = handler_call_details.method
        if not method.startswith(self._prefix):
            return None
        serve = functools.partial(self._relay.pass_on, self._listener, method)
        return self._gate.conversing(serve, greets=False)


def _dial(address: str, credentials: Credentials | None) -> grpc.aio.Channel:
    options = channel_options(swift=True)
    if credentials is None:
        return grpc.aio.insecure_channel(address, options)
    return grpc.aio.secure_channel(address, credentials.channel_credentials(), options)


async def _converse(call: Call, requests: AsyncIterator[bytes], context: Context, far: str) -> None:
    """Carry frames both ways, one at a time each way, until the far side ends the call. Raises Denied as it did."""
    end = _End(call)
    asking = asyncio.create_task(_ask(call, requests))
    greeted = False
    try:
        greeting = spoken(cast(Any, await call.initial_metadata()))
        greeted = bool(greeting)
        if greeted:
            await context.send_initial_metadata(greeting)
        async for frame in call:
            with around("relay"):
                await context.write(frame)
    except grpc.aio.AioRpcError:
        raise _refusal(await end.told(), far, greeted=greeted) from None
    finally:
        asking.cancel()
        call.cancel()


async def _ask(call: Call, requests: AsyncIterator[bytes]) -> None:
    """Hand on what the caller says; the far side says how the call ends."""
    try:
        async for frame in requests:
            await call.write(frame)
        await call.done_writing()
    except (grpc.aio.BaseError, grpc.RpcError, asyncio.InvalidStateError):
        log.debug("a call that is passed on is over")


class _End:
    """How a call ended.

    gRPC calls it an internal error when a frame on its way there met the end, and forgets what the far side said; so
    this notes that as soon as it is known.
    """

    def __init__(self, call: Call) -> None:
        self._said: tuple[grpc.StatusCode, str] | None = None
        self._known = asyncio.Event()
        call.add_done_callback(self._note)

    def _note(self, call: Any) -> None:
        said = _at_once(call.code()), _at_once(call.details()) or ""
        if said != _UNTOLD:
            self._said = said
            self._known.set()

    async def told(self) -> tuple[grpc.StatusCode, str]:
        """Return the status; it may come a moment after the frame has failed."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._known.wait(), _UNTOLD_SECONDS)
        return self._said or _UNTOLD


def _at_once(answer: Coroutine[Any, Any, Any]) -> Any:
    """Return what a coroutine returns that has nothing to wait for."""
    try:
        answer.send(None)
    except StopIteration as end:
        return end.value
    answer.close()
    return None


def _refusal(end: tuple[grpc.StatusCode, str], far: str, *, greeted: bool) -> Denied:
    """Return what the far side said to the caller, or that it cannot be reached."""
    code, text = end
    unreached = code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL) and not greeted
    if unreached or code == grpc.StatusCode.CANCELLED or end == _UNTOLD:
        return Denied(f"{far} cannot be reached: {text}", grpc.StatusCode.UNAVAILABLE)
    return Denied(text, code)
