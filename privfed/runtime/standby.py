"""A SuperLink whose turn it is not: it listens, passes calls on to the one that serves, and waits to take over."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path

from privfed.runtime.listeners import SERVICES, Listeners, SuperLinkError, SuperLinkOptions, is_everywhere
from privfed.runtime.relay import Relay
from privfed.runtime.tenure import Holder, Tenure
from privfed.runtime.term_folder import take_folder

log = logging.getLogger("privfed.superlink")
WAITING = "no SuperLink serves"


class Standby:
    """Serves through another SuperLink. Raises SuperLinkError when the others could not reach this one."""

    def __init__(self, options: SuperLinkOptions, tenure: Tenure, listeners: Listeners) -> None:
        for address in options.listens.values():
            if options.advertise is None and is_everywhere(address.rpartition(":")[0]):
                raise SuperLinkError(
                    f"{address} is every address of this machine: say by which name the other SuperLinks reach it, "
                    "--advertise HOST"
                )
        self._options, self._tenure, self._listeners = options, tenure, listeners
        self._relay = Relay(options)

    async def start(self) -> None:
        """Listen, and begin to wait."""
        self._loop = asyncio.get_running_loop()
        self._listeners.values = self._relay.values
        await self._listeners.serve(self._relay.handlers())
        await self._listeners.tell_health(WAITING)
        self._tenure.addresses = _reached(self._listeners.addresses, self._options.advertise)
        log.info("listening at %s", self._listeners.addresses)

    async def await_turn(self, shared: Path) -> Path:
        """Wait until no other SuperLink serves; return the folder of the term that begins. Raises TenureError."""
        turn: Future[Path] = Future()
        turn.set_running_or_notify_cancel()

        def wait() -> None:
            try:
                turn.set_result(take_folder(shared, self._tenure.await_turn(self._see)))
            except BaseException as fault:  # noqa: BLE001 - whoever awaits it is told
                turn.set_exception(fault)

        # No thread of the loop's: a database that does not answer must not keep the process from ending.
        threading.Thread(target=wait, name="privfed-turn", daemon=True).start()
        return await asyncio.wrap_future(turn)

    def _see(self, holder: Holder | None) -> None:
        asyncio.run_coroutine_threadsafe(self._follow(holder), self._loop)

    async def _follow(self, holder: Holder | None) -> None:
        self._relay.follow(holder)
        await self._listeners.tell_health("" if holder is not None else WAITING)


def _reached(addresses: Mapping[str, str], advertise: str | None) -> dict[str, str]:
    """Return the addresses by which others reach listeners. advertise: the host, instead of the one listened at."""
    found = {listener: address for listener, address in addresses.items() if listener in SERVICES}
    if advertise is None:
        return found
    return {listener: f"{advertise}:{address.rpartition(':')[2]}" for listener, address in found.items()}
