"""The ports of a SuperLink, and what else is one to a process: the lock on its home, its monitor, its certificates.

What is served on a port can change while it listens: a SuperLink that stands by passes calls on there, and serves them
itself once it is its turn.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from privfed.errors import PrivfedError
from privfed.runtime.certificate import CertificateError
from privfed.runtime.credentials import Credentials, speaks_tls_1_2
from privfed.runtime.disk import write_atomically
from privfed.runtime.fleet_service import FleetLimits
from privfed.runtime.handshake import is_loopback, server_options
from privfed.runtime.monitor import Monitor
from privfed.runtime.oidc import Tokens
from privfed.runtime.tenure import Tenure

log = logging.getLogger("privfed.superlink")
Handlers = Mapping[str, grpc.GenericRpcHandler]
"""What is served, by listener: "fleet", "control", and "token-control" if there is one."""
SERVICES = {"fleet": "privfed.Fleet", "control": "privfed.Control", "token-control": "privfed.Control"}
GRACE_SECONDS = 2.0
SPARE_FILES = 256
RELOAD_SECONDS = 5.0


class SuperLinkError(PrivfedError):
    """A SuperLink that must not or cannot start: says why."""


@dataclass(frozen=True, slots=True)
class SuperLinkOptions:
    """Where a SuperLink listens and keeps things. Addresses are "host:port"; port 0 lets the system choose.

    database: the URL of a PostgreSQL database instead of the file `link.db` in home. arrays: the URL of a bucket
    instead of the folder `arrays` in home.
    tenure: the right to serve, where several SuperLinks share that database. state: the folder of its term, where
    everything is that a successor goes on with [home]. advertise: the host by which the others reach this one, where it
    is not the one it listens at.
    token_control: where users connect who have bearer tokens and no certificates; tokens: judges them.
    credentials: None is unencrypted and without identities, on loopback only unless `force_insecure`.
    insecure_test_randomness: seeds the noise of privacy plans in tests, on loopback only; every epsilon is infinite.
    """

    home: Path
    fleet: str = "127.0.0.1:7810"
    control: str = "127.0.0.1:7811"
    monitor: str | None = None
    token_control: str | None = None
    tokens: Tokens | None = None
    database: str | None = None
    arrays: str | None = None
    tenure: Tenure | None = None
    state: Path | None = None
    advertise: str | None = None
    credentials: Credentials | None = None
    force_insecure: bool = False
    insecure_test_randomness: int | None = None
    limits: FleetLimits = field(default_factory=FleetLimits)

    @property
    def listens(self) -> dict[str, str]:
        """The addresses of the listeners for callers, by name."""
        found = {"fleet": self.fleet, "control": self.control}
        if self.token_control is not None:
            found["token-control"] = self.token_control
        return found


class _Exchange(grpc.GenericRpcHandler):
    """Serves what is current when a call comes in."""

    def __init__(self, current: grpc.GenericRpcHandler) -> None:
        self.current = current

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        return self.current.service(handler_call_details)


class Listeners:
    """Everything a SuperLink listens with.

    addresses: by listener, once it listens; "monitor" among them. values, fault: what the monitor shows.
    roster_changed: called when the credentials have a newer roster; renewed: when they have another certificate.
    """

    def __init__(self, options: SuperLinkOptions) -> None:
        self.options = options
        open_ = [address for address in options.listens.values() if not is_loopback(address)]
        if options.insecure_test_randomness is not None and open_:
            raise SuperLinkError(
                f"insecure_test_randomness is for tests on this machine: {', '.join(open_)} can be reached by others, "
                "and its noise would not protect what they hold; leave it out, or listen on 127.0.0.1"
            )
        if options.credentials is None:
            for address in (options.fleet, options.control):
                if not is_loopback(address) and not options.force_insecure:
                    raise SuperLinkError(
                        f"{address} can be reached by others, and without keys anybody may do anything there: "
                        f"give --keys (see `privfed keys`), or listen on 127.0.0.1"
                    )
        if (options.tokens is None) != (options.token_control is None):
            raise SuperLinkError("tokens need an address to be shown at, and that address a policy for tokens")
        if options.tokens is not None and options.credentials is None:
            raise SuperLinkError("bearer tokens are shown to nobody who has no keys: give --keys")
        options.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = _take_lock(options.home / "lock")
        self.addresses: dict[str, str] = {}
        self.values: Callable[[], Mapping[str, float]] = dict
        self.fault = "it is starting"
        self.roster_changed: Callable[[], None] = lambda: None
        self.renewed: Callable[[], None] = lambda: None
        self._exchanges: dict[str, _Exchange] = {}
        self._servers: list[grpc.aio.Server] = []
        self._health: list[tuple[health.aio.HealthServicer, str]] = []
        self._monitor = Monitor(lambda: self.values(), lambda: self.fault)
        self._watching: asyncio.Task[None] | None = None

    async def serve(self, handlers: Handlers) -> None:
        """Serve this from now on; the first time, begin to listen. Raises SuperLinkError."""
        if self._exchanges:
            for listener, exchange in self._exchanges.items():
                exchange.current = handlers[listener]
            return
        options = self.options
        # One that stands by has a connection to pass on over for each it takes.
        _allow_files(options.limits.nodes * (1 if options.tenure is None else 2))
        self._watching = asyncio.create_task(self._watch_credentials())
        for listener, address in options.listens.items():
            exchange = self._exchanges[listener] = _Exchange(handlers[listener])
            self.addresses[listener] = await self._listen(listener, address, exchange)
        if options.monitor is not None:
            host, _, port = options.monitor.rpartition(":")
            self.addresses["monitor"] = f"{host}:{await self._monitor.start(host, int(port))}"
        write_atomically(options.home / "addresses.json", json.dumps(self.addresses).encode())

    async def _listen(self, listener: str, address: str, handler: grpc.GenericRpcHandler) -> str:
        server = grpc.aio.server(options=server_options())
        servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        server.add_generic_rpc_handlers((handler,))
        host = address.rpartition(":")[0]
        credentials = self.options.credentials
        try:
            if credentials is None:
                port = server.add_insecure_port(address)
            else:
                mutual = listener != "token-control"
                port = server.add_secure_port(address, credentials.server_credentials(mutual=mutual))
        except RuntimeError as fault:
            raise SuperLinkError(f"cannot listen on {address}: {fault}") from None
        await server.start()
        self._servers.append(server)
        if credentials is not None:
            target = host.strip("[]") if not is_everywhere(host) else "localhost"
            if await asyncio.to_thread(speaks_tls_1_2, target, port, credentials.folder):
                raise SuperLinkError(
                    f"{address} would speak TLS 1.2: gRPC was used in this process before the SuperLink; call "
                    "privfed.runtime.credentials.require_tls_1_3() first of all"
                )
        for service in ("", SERVICES[listener]):
            self._health.append((servicer, service))
        return f"{host}:{port}"

    async def tell_health(self, fault: str) -> None:
        """Say on every listener whether calls are served: they are unless there is a fault."""
        self.fault = fault
        states = health_pb2.HealthCheckResponse
        for servicer, service in self._health:
            await servicer.set(service, states.NOT_SERVING if fault else states.SERVING)

    async def _watch_credentials(self) -> None:
        """Take up renewed certificates and rosters, and warn of what expires."""
        credentials = self.options.credentials
        told: set[str] = set()
        seen = credentials.trust.roster.version if credentials is not None else 0
        shown = credentials.peer.serial if credentials is not None else 0
        while credentials is not None:
            try:
                await asyncio.to_thread(credentials.reload)
                # A handshake may have read the files before this did.
                if credentials.trust.roster.version != seen:
                    seen = credentials.trust.roster.version
                    self.roster_changed()
                if credentials.peer.serial != shown:
                    shown = credentials.peer.serial
                    self.renewed()
            except CertificateError as fault:
                log.warning("the new certificates are not used: %s", fault)
            for warning in credentials.warnings():
                if str(warning) not in told:
                    told.add(str(warning))
                    log.warning("%s", warning)
            await asyncio.sleep(RELOAD_SECONDS)

    async def stop(self) -> None:
        """Listen no more; calls under way have a moment to end."""
        self.fault = "it is stopping"
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await asyncio.gather(*(server.stop(GRACE_SECONDS) for server in self._servers))
        await self._monitor.stop()

    def close(self) -> None:
        """Let another process have the home."""
        os.close(self._lock)


def is_everywhere(host: str) -> bool:
    """Return whether a host to listen at means every address of the machine."""
    return host.strip("[]") in ("", "0.0.0.0", "::", "*")


def _take_lock(path: Path) -> int:
    held = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        raise SuperLinkError(f"another SuperLink uses {path.parent}: stop it, or give another --home") from None
    return held


def _allow_files(connections: int) -> None:
    """Let the process have a socket for every node, as far as the system allows; say so when it does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + SPARE_FILES
    if soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        if allowed < wanted:
            log.warning("the system allows %d open files: that is %d connections", allowed, allowed - SPARE_FILES)
