"""The SuperLink: a long-lived process that serves nodes, users and its operator, on a listener each."""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from privfed.errors import PrivfedError
from privfed.runtime.audit_log import AuditLog, own_key
from privfed.runtime.certificate import USERS, CertificateError
from privfed.runtime.control_service import ControlService
from privfed.runtime.credentials import Credentials, speaks_tls_1_2
from privfed.runtime.disk import write_atomically
from privfed.runtime.dispatch import Dispatcher
from privfed.runtime.federation import Federation
from privfed.runtime.federation_link import FederationLink
from privfed.runtime.fleet_service import FleetLimits, FleetService
from privfed.runtime.gate import Gate, TokenGate
from privfed.runtime.handshake import is_loopback, server_options
from privfed.runtime.launcher import Launcher
from privfed.runtime.monitor import Monitor
from privfed.runtime.node_register import NodeRegister
from privfed.runtime.oidc import Tokens
from privfed.runtime.sqlstore import SqlStore
from privfed.runtime.tenure import Tenure
from privfed.runtime.term_folder import publish

log = logging.getLogger("privfed.superlink")
STORE_THREADS = 8
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
    tenure: the right to serve, where several SuperLinks share that database; it began. state: the folder of its term,
    where everything is that a successor goes on with [home].
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
    credentials: Credentials | None = None
    force_insecure: bool = False
    insecure_test_randomness: int | None = None
    limits: FleetLimits = field(default_factory=FleetLimits)


class SuperLink:
    """Everything of one SuperLink. launcher: runs server apps."""

    def __init__(self, options: SuperLinkOptions, launcher: Launcher) -> None:
        self.options = options
        listens = (options.fleet, options.control, options.token_control)
        open_ = [address for address in listens if address and not is_loopback(address)]
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
        home = options.home
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = _take_lock(home / "lock")
        self.name = options.credentials.peer.name if options.credentials is not None else "insecure"
        trust = options.credentials.trust if options.credentials is not None else None
        self._state = state = options.state or home
        if options.tenure is None:
            self._store = SqlStore(state, options.database, options.arrays)
        else:
            self._store = SqlStore(state, options.tenure.url, fence=options.tenure.fence)
            self._share_roster()
        self.link = FederationLink(self._store)
        self.register = NodeRegister(state / "nodes.json", trust)
        self.federation = Federation(state, self.link, launcher, self.register.approved)
        self.audit = AuditLog(home / "audit.jsonl", own_key(home / "audit.key"))
        self.federation.noted = self.audit.record
        self.federation.insecure_test_randomness = options.insecure_test_randomness
        self._gates = {"fleet": Gate(trust, {"node"}), "control": Gate(trust, USERS)}
        self._started = time.monotonic()
        self._servers: list[grpc.aio.Server] = []
        self._fault = "it is starting"
        self.addresses: dict[str, str] = {}

    async def start(self) -> None:
        """Listen, and go on with the runs that were open."""
        options = self.options
        self._loop = asyncio.get_running_loop()
        _allow_files(options.limits.nodes)
        self._threads = ThreadPoolExecutor(STORE_THREADS, thread_name_prefix="privfed-store")
        self.dispatcher = Dispatcher(self.link, self._threads, self.federation.progress, self.federation.nodes_changed)
        sessions = self.dispatcher.sessions
        self.federation.connected = lambda: set(sessions)
        incoming = options.home / "incoming"
        self.fleet = FleetService(
            self.name, self.dispatcher, self.register, self.federation, incoming, options.limits, options.credentials
        )
        decide = self._take_roster, self.fleet.reconsider, self.audit
        control = ControlService(self.federation, self.register, self.dispatcher, *decide)
        self._offering = asyncio.create_task(self.dispatcher.run())
        self._watching = asyncio.create_task(self._watch_credentials())
        # Before anybody is served: a node would be told that a run that is not there has ended.
        count = self.federation.take_up()
        fleet = self.fleet.handlers(self._gates["fleet"])
        self.addresses["fleet"] = await self._listen(options.fleet, fleet, "privfed.Fleet")
        self.addresses["control"] = await self._listen(
            options.control, control.handlers(self._gates["control"]), "privfed.Control"
        )
        if options.tokens is not None and options.token_control is not None:
            gate = self._gates["token-control"] = TokenGate(options.tokens, USERS)
            handlers = control.handlers(gate)
            self.addresses["token-control"] = await self._listen(
                options.token_control, handlers, "privfed.Control", mutual=False
            )
        self._monitor = Monitor(self.values, lambda: self._fault)
        if options.monitor is not None:
            host, _, port = options.monitor.rpartition(":")
            self.addresses["monitor"] = f"{host}:{await self._monitor.start(host, int(port))}"
        write_atomically(options.home / "addresses.json", json.dumps(self.addresses).encode())
        self._fault = ""
        self.audit.record("superlink-started", name=self.name, runs=count, insecure=options.credentials is None)
        log.info("serving %s; %d runs go on", self.addresses, count)

    async def _listen(self, address: str, handlers: grpc.GenericRpcHandler, name: str, *, mutual: bool = True) -> str:
        server = grpc.aio.server(options=server_options())
        servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        server.add_generic_rpc_handlers((handlers,))
        host = address.rpartition(":")[0]
        credentials = self.options.credentials
        try:
            if credentials is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, credentials.server_credentials(mutual=mutual))
        except RuntimeError as fault:
            raise SuperLinkError(f"cannot listen on {address}: {fault}") from None
        await server.start()
        if credentials is not None:
            target = host.strip("[]") if host.strip("[]") not in ("", "0.0.0.0", "::", "*") else "localhost"
            folder = credentials.folder
            if await self.dispatcher.in_thread(lambda: speaks_tls_1_2(target, port, folder)):
                raise SuperLinkError(
                    f"{address} would speak TLS 1.2: gRPC was used in this process before the SuperLink; call "
                    "privfed.runtime.credentials.require_tls_1_3() first of all"
                )
        for service in ("", name):
            await servicer.set(service, health_pb2.HealthCheckResponse.SERVING)
        self._servers.append(server)
        return f"{host}:{port}"

    async def _watch_credentials(self) -> None:
        """Take up renewed certificates and rosters, and warn of what expires."""
        credentials = self.options.credentials
        told: set[str] = set()
        seen = credentials.trust.roster.version if credentials is not None else 0
        while credentials is not None:
            try:
                await self.dispatcher.in_thread(credentials.reload)
                # A handshake may have read the files before this did.
                if credentials.trust.roster.version != seen:
                    seen = credentials.trust.roster.version
                    self._roster_changed()
            except CertificateError as fault:
                log.warning("the new certificates are not used: %s", fault)
            for warning in credentials.warnings():
                if str(warning) not in told:
                    told.add(str(warning))
                    log.warning("%s", warning)
            await asyncio.sleep(RELOAD_SECONDS)

    def _take_roster(self, document: bytes) -> int:
        """Keep a newer signed roster; return its version. Raises PrivfedError."""
        credentials = self.options.credentials
        if credentials is None:
            raise SuperLinkError("this SuperLink runs without keys: it has no use for a roster")
        if credentials.take_roster(document):
            self._loop.call_soon_threadsafe(self._roster_changed)
        return credentials.trust.roster.version

    def _roster_changed(self) -> None:
        log.info("there is a new roster")
        self._share_roster()
        self.federation.nodes_changed()
        self.fleet.roster_changed()

    def _share_roster(self) -> None:
        """Have the newest roster any SuperLink had, and leave it for the next: a revoked node stays revoked."""
        credentials, path = self.options.credentials, self._state / "roster.json"
        if credentials is None or self.options.tenure is None:
            return
        if path.exists():
            try:
                credentials.take_roster(path.read_bytes())
            except CertificateError as fault:
                log.info("the roster kept with the runs is not taken: %s", fault)
        publish(path, credentials.roster_document)

    def values(self) -> dict[str, float]:
        """Return what the monitor shows."""
        return {
            "nodes_connected": len(self.dispatcher.sessions),
            "nodes_approved": len(self.register.approved()),
            "runs_open": self.federation.open_runs(),
            "answers_total": self.fleet.answers,
            "bytes_received_total": self.fleet.bytes_up,
            "bytes_sent_total": self.fleet.bytes_down,
            "refusals_total": sum(gate.refusals for gate in self._gates.values()),
            "uptime_seconds": time.monotonic() - self._started,
        }

    async def stop(self) -> None:
        """End in good order: runs are let go of and go on after a restart."""
        self._fault = "it is stopping"
        for task in (self._offering, self._watching):
            task.cancel()
        await asyncio.gather(self._offering, self._watching, return_exceptions=True)
        await asyncio.gather(*(server.stop(GRACE_SECONDS) for server in self._servers))
        await self._monitor.stop()
        await asyncio.get_running_loop().run_in_executor(None, self.federation.close)
        self._threads.shutdown(wait=True)
        self._store.close()
        self.audit.record("superlink-ended")
        self.audit.close()
        if self.options.tenure is not None:
            await asyncio.get_running_loop().run_in_executor(None, self.options.tenure.resign)
        os.close(self._lock)


def _take_lock(path: Path) -> int:
    held = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        raise SuperLinkError(f"another SuperLink uses {path.parent}: stop it, or give another --home") from None
    return held


def _allow_files(nodes: int) -> None:
    """Let the process have a socket for every node, as far as the system allows; say so when it does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = nodes + SPARE_FILES
    if soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        if allowed < wanted:
            log.warning("the system allows %d open files: about %d nodes can connect", allowed, allowed - SPARE_FILES)
