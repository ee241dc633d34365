"""The SuperLink: a long-lived process that serves nodes, users and its operator, on a listener each."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from concurrent.futures import ThreadPoolExecutor

from privfed.runtime.audit_log import AuditLog, own_key
from privfed.runtime.certificate import USERS, CertificateError
from privfed.runtime.control_service import ControlService
from privfed.runtime.dispatch import Dispatcher
from privfed.runtime.federation import Federation
from privfed.runtime.federation_link import FederationLink
from privfed.runtime.fleet_service import FleetService
from privfed.runtime.gate import Gate, TokenGate
from privfed.runtime.launcher import Launcher
from privfed.runtime.listeners import RELOAD_SECONDS, Listeners, SuperLinkError, SuperLinkOptions
from privfed.runtime.node_register import NodeRegister
from privfed.runtime.sqlstore import SqlStore
from privfed.runtime.term_folder import publish

__all__ = ["SuperLink", "SuperLinkError", "SuperLinkOptions"]

log = logging.getLogger("privfed.superlink")
STORE_THREADS = 8
REFUSALS_SECONDS = 60.0
"""Between two notes in the audit log of how often callers were turned away for a reason; the first is noted at once."""


class SuperLink:
    """Everything of one SuperLink. launcher: runs server apps. listeners: those it has listened with already."""

    def __init__(self, options: SuperLinkOptions, launcher: Launcher, listeners: Listeners | None = None) -> None:
        self.options = options
        self.listeners = listeners or Listeners(options)
        home = options.home
        self.name = options.credentials.peer.name if options.credentials is not None else "insecure"
        trust = options.credentials.trust if options.credentials is not None else None
        self._state = state = options.state or home
        if options.tenure is None:
            self._store = SqlStore(state, options.database, options.arrays)
        else:
            self._store = SqlStore(state, options.tenure.url, fence=options.tenure.fence)
            self._share_roster()
        self.link = FederationLink(self._store)
        self.link.busy_seconds = self._store.busy_seconds
        self.register = NodeRegister(state / "nodes.json", trust)
        self.federation = Federation(state, self.link, launcher, self.register.approved)
        self.audit = AuditLog(home / "audit.jsonl", own_key(home / "audit.key"))
        self.federation.noted = self.audit.record
        self.federation.insecure_test_randomness = options.insecure_test_randomness
        term = options.tenure.mark if options.tenure is not None else None
        self._gates = {"fleet": Gate(trust, {"node"}, term), "control": Gate(trust, USERS, term)}
        if options.tokens is not None:
            self._gates["token-control"] = TokenGate(options.tokens, USERS, term)
        self._started = time.monotonic()

    @property
    def addresses(self) -> dict[str, str]:
        """Where it listens: "fleet", "control", and what else there is."""
        return self.listeners.addresses

    async def start(self) -> None:
        """Listen, and go on with the runs that were open."""
        options = self.options
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(STORE_THREADS, thread_name_prefix="privfed-store")
        self.dispatcher = Dispatcher(self.link, self._threads, self.federation.progress, self.federation.nodes_changed)
        sessions = self.dispatcher.sessions
        self.federation.connected = lambda: {node: one.waits_for for node, one in list(sessions.items())}
        incoming = options.home / "incoming"
        self.fleet = FleetService(
            self.name, self.dispatcher, self.register, self.federation, incoming, options.limits, options.credentials
        )
        decide = self._take_roster, self.fleet.reconsider, self.audit
        self._control = control = ControlService(self.federation, self.register, self.dispatcher, *decide)
        self._tasks = [asyncio.create_task(self.dispatcher.run()), asyncio.create_task(self._part_with_expired())]
        self.listeners.roster_changed, self.listeners.renewed = self._roster_changed, self._renewed
        # Before anybody is served: a node would be told that a run that is not there has ended.
        count = self.federation.take_up()
        handlers = {
            listener: (self.fleet if listener == "fleet" else control).handlers(gate)
            for listener, gate in self._gates.items()
        }
        self.listeners.values = self.values
        await self.listeners.serve(handlers)
        await self.listeners.tell_health("")
        self.audit.record("superlink-started", name=self.name, runs=count, insecure=options.credentials is None)
        log.info("serving %s; %d runs go on", self.addresses, count)

    async def _part_with_expired(self) -> None:
        noted = time.monotonic()
        while True:
            self.fleet.part_with_expired()
            over = time.monotonic() - noted >= REFUSALS_SECONDS
            noted = time.monotonic() if over else noted
            if refused := self._refused(new=not over):
                await self.dispatcher.in_thread(functools.partial(self._note_refusals, refused))
            await asyncio.sleep(RELOAD_SECONDS)

    def _refused(self, *, new: bool) -> list[tuple[str, str, int]]:
        """Return who was turned away and is not noted: listener, reason, how often. new: for a reason not noted yet."""
        gates = self._gates.items()
        return [(name, *told) for name, gate in gates for told in gate.take_reasons(new=new).items()]

    def _note_refusals(self, refused: list[tuple[str, str, int]]) -> None:
        for listener, reason, count in refused:
            self._note("callers-refused", listener=listener, reason=reason, count=count)

    def _note(self, event: str, **fields: str | int) -> None:
        """Write what nobody waits for into the audit log, if the disk takes it."""
        try:
            self.audit.record(event, **fields)
        except OSError as fault:
            log.warning("the audit log lacks %s: %s", event, fault)

    def _renewed(self) -> None:
        if self.options.credentials is not None:
            peer = self.options.credentials.peer
            expires = f"{peer.expires:%Y-%m-%d}" if peer.expires is not None else ""
            note = functools.partial(self._note, "certificate-renewed", serial=f"{peer.serial:x}", expires=expires)
            self._loop.run_in_executor(self._threads, note)

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
        if self.options.credentials is not None:
            version = self.options.credentials.trust.roster.version
            self._loop.run_in_executor(self._threads, functools.partial(self._note, "roster-taken", version=version))
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
            "storage_refuses": float(bool(self.link.trouble)),
            "runs_open": self.federation.open_runs(),
            "answers_total": self.fleet.answers,
            "bytes_received_total": self.fleet.bytes_up,
            "bytes_sent_total": self.fleet.bytes_down,
            "refusals_total": sum(gate.refusals for gate in self._gates.values()),
            "uptime_seconds": time.monotonic() - self._started,
        }

    async def stop(self) -> None:
        """End in good order: runs are let go of and go on after a restart."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.dispatcher.hang_up_all()  # these calls end at no other time: there would be no end to wait for
        await self.listeners.stop()
        await asyncio.get_running_loop().run_in_executor(None, self.federation.close)
        self._control.close()
        self._threads.shutdown(wait=True)
        self._store.close()
        self._note_refusals(self._refused(new=False))
        self._note("superlink-ended")
        self.audit.close()
        if self.options.tenure is not None:
            await asyncio.get_running_loop().run_in_executor(None, self.options.tenure.resign)
        self.listeners.close()
