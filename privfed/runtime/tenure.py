"""Which of several SuperLinks holds a federation: one at a time, for a term, by a row in PostgreSQL.

The row is a lease whose clock is the database's, and it says where its holder is reached by those that pass calls on.
Each new holder raises the term, and the term fences: every transaction of the store sees that it is still the newest
(`Tenure.fence`), and the federation's files are in a folder named after it, which a successor renames (`take_folder`).
So a holder that was frozen and comes back can commit nothing, neither a row nor a file, and ends as soon as it looks.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from privfed.decoder import json_decoder
from privfed.errors import PrivfedError
from privfed.failpoint import around
from privfed.runtime.database import is_postgres, open_database
from privfed.runtime.sql_schema import sql, tenures

log = logging.getLogger("privfed.superlink")
NAME = "federation"
SECONDS = 5.0
LOST = 75
"""Exit status of a SuperLink that another one has replaced (EX_TEMPFAIL): start it again, and it stands by."""
_RENEWALS = 4
_NOW = sql.cast(sql.extract("epoch", sql.func.clock_timestamp()), sql.Float)


class TenureError(PrivfedError):
    """A SuperLink that may not serve: says who does."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who serves. addresses: where each of its listeners is reached ("fleet", "control", "token-control").

    mark: names the term to who can read the row, and to nobody else.
    """

    term: int
    owner: str
    mark: str = field(repr=False)
    addresses: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.owner} serves, term {self.term}"


def end_at_once(reason: str) -> None:
    """End as kill -9 would: whatever was under way belongs to the successor."""
    log.critical("%s; this one ends, and stands by when it is started again", reason)
    logging.shutdown()
    os._exit(LOST)


class Tenure:
    """The right to serve, once `await_turn` returned. url: of the PostgreSQL database. owner: told to whoever waits.

    addresses: to be set before the turn is awaited; told to whoever waits, too.
    seconds: how long the right lasts when its holder is silent; it is renewed four times as often.
    lost: called with the reason when another SuperLink has taken over; it does not return.
    """

    def __init__(
        self, url: str, owner: str = "", seconds: float = SECONDS, lost: Callable[[str], None] = end_at_once
    ) -> None:
        self.owner = owner or socket.gethostname()
        self.addresses: Mapping[str, str] = {}
        self.term = 0
        self.session = f"privfed-{secrets.token_hex(8)}"
        # Sessions of this holder carry its name, so that a successor can end those a frozen holder left open.
        self.url = sql.make_url(url).update_query_dict({"application_name": self.session}).render_as_string(False)
        self._seconds = seconds
        self._lost = lost
        self._over = threading.Event()
        self._engine = open_database(self.url)
        if not is_postgres(self._engine):
            self._engine.dispose()
            raise TenureError("SQLite serves one SuperLink: several share a PostgreSQL database (--database)")

    @property
    def mark(self) -> str:
        """What names this term in calls that another SuperLink passes on."""
        return f"{self.term}-{self.session}"

    def await_turn(self, seen: Callable[[Holder | None], None] = lambda holder: None) -> int:
        """Wait until no other SuperLink serves; return the term that begins.

        seen: called with whoever serves, when that changes. Raises TenureError once this one has resigned.
        """
        told: Holder | str = ""
        while not self._over.is_set():
            holder: Holder | str | None
            try:
                holder = self._try()
            except sql.exc.DBAPIError as fault:
                holder = f"the database fails: {str(fault.orig).splitlines()[0][:200]}"
                # One that serves is given the time to renew before this one looks again.
                self._over.wait(self._seconds / 2)
            if holder is None:
                seen(None)
                log.info("term %d of %s begins", self.term, self.owner)
                self._thread = threading.Thread(target=self._renew, name="privfed-tenure", daemon=True)
                self._thread.start()
                return self.term
            if holder != told:
                log.info("stands by: %s", holder)
                if isinstance(holder, Holder):  # without the database, the last one known may still serve
                    seen(holder)
            told = holder
            self._over.wait(min(1.0, self._seconds / 5))
        raise TenureError("this SuperLink does not wait for its turn any more")

    def _row(self, connection: sql.Connection, *, locked: bool) -> Any:
        found = sql.select(tenures, (tenures.c.expires - _NOW).label("left")).where(tenures.c.name == NAME)
        return connection.execute(found.with_for_update() if locked else found).first()

    def _look(self) -> Any:
        with self._engine.connect() as connection:
            return self._row(connection, locked=False)

    def _lay(self) -> None:
        """Make the row, unless another one does."""
        first = {"name": NAME, "term": 0, "session": "", "owner": "nobody", "expires": 0.0}
        with contextlib.suppress(sql.exc.IntegrityError), around("term-row"), self._engine.begin() as connection:
            connection.execute(tenures.insert().values(**first))

    def _try(self) -> Holder | None:
        """Take over when the holder's time is up; return who holds on, if anyone does."""
        row = self._look()
        if row is None:
            self._lay()
            row = self._look()
        if row.left > 0:
            return _holder(row)
        with around("term-sessions"), self._engine.begin() as connection:
            # A holder frozen inside a transaction would keep its locks for ever.
            theirs = sql.text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = :session"
            )
            connection.execute(theirs, {"session": row.session})
        with around("term"), self._engine.begin() as connection:
            now = self._row(connection, locked=True)
            if now.term != row.term or now.left > 0:
                return _holder(now)
            ours = {"term": now.term + 1, "session": self.session, "owner": self.owner}
            reached = msgspec.json.encode(dict(self.addresses)).decode()
            connection.execute(
                tenures.update()
                .where(tenures.c.name == NAME)
                .values(**ours, addresses=reached, expires=_NOW + self._seconds)
            )
        self.term = row.term + 1
        return None

    def _renew(self) -> None:
        mine = (tenures.c.name == NAME) & (tenures.c.term == self.term)
        told = ""
        while not self._over.wait(self._seconds / _RENEWALS):
            try:
                with around("term-renewal"), self._engine.begin() as connection:
                    found = connection.execute(tenures.update().where(mine).values(expires=_NOW + self._seconds))
            except sql.exc.DBAPIError as fault:
                if not told:
                    told = str(fault.orig).splitlines()[0][:200]
                    log.warning("the term cannot be renewed: %s", told)
                continue
            told = ""
            if not found.rowcount and not self._over.is_set():
                self._lost("another SuperLink has taken over")
                return

    def fence(self, connection: sql.Connection) -> None:
        """Let a transaction go on only in this term; no other term begins before it ends. Raises TenureError."""
        # A key share lock stands beside the renewals, which change no key, and not beside a successor's FOR UPDATE.
        held = sql.select(tenures.c.term).where(tenures.c.name == NAME).with_for_update(read=True, key_share=True)
        term = connection.execute(held).scalar()
        if term != self.term:
            reason = f"another SuperLink has taken over: this is term {term}, not {self.term}"
            self._lost(reason)
            raise TenureError(reason)

    def resign(self) -> None:
        """Let another SuperLink serve at once; one that waits for its turn waits no more."""
        self._over.set()
        mine = (tenures.c.name == NAME) & (tenures.c.session == self.session)
        with contextlib.suppress(sql.exc.DBAPIError), around("term-end"), self._engine.begin() as connection:
            connection.execute(tenures.update().where(mine).values(expires=0.0))
        self._engine.dispose()


def _holder(row: Any) -> Holder:
    try:
        addresses = json_decoder(dict[str, str]).decode(row.addresses or "{}")
    except msgspec.MsgspecError:
        addresses = {}
    return Holder(row.term, row.owner, f"{row.term}-{row.session}", addresses)
