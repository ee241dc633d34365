"""A PostgreSQL server of the tests' own: a fresh cluster on a socket in its folder, gone when the process ends."""

from __future__ import annotations

import atexit
import contextlib
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import sqlalchemy as sql

PLACES = ("/usr/lib/postgresql", "/usr/local/pgsql", "/opt/homebrew/opt")


def binary(name: str) -> str:
    """Return the path of a PostgreSQL program; the newest version wins."""
    found = [path for place in PLACES for path in sorted(Path(place).glob(f"*/bin/{name}"))]
    found += [Path(path) for path in [shutil.which(name)] if path is not None]
    if not found:
        raise RuntimeError(f"no {name} here: install PostgreSQL, e.g. 'apt-get install postgresql'")
    return str(found[0] if len(found) == 1 else max(found[:-1] or found, key=str))


class Postgres:
    """A running server; it keeps PostgreSQL's own durable settings. place: where its folder is made."""

    def __init__(self, place: Path | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="privfed-pg-", dir=place))
        self._as: list[str] = []
        if os.geteuid() == 0:  # PostgreSQL does not run as root
            user = pwd.getpwnam("postgres")
            os.chown(self.folder, user.pw_uid, user.pw_gid)
            self._as = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        self._run(binary("initdb"), "-D", f"{self.folder}/data", "-U", "privfed", "-A", "trust", "--no-sync")
        self._process: subprocess.Popen[bytes] | None = None
        self.start()
        atexit.register(self.remove)

    def _run(self, *command: str) -> None:
        done = subprocess.run([*self._as, *command], cwd=self.folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def url(self, name: str) -> str:
        # Not a port: whoever looks for a free one may find it taken by the time it listens.
        return f"postgresql+psycopg://privfed@/{name}?host={self.folder}"

    def start(self) -> None:
        """Start the server and wait until it answers."""
        command = [binary("postgres"), "-D", f"{self.folder}/data", "-c", "listen_addresses=", "-k", str(self.folder)]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._as, *command], cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
        engine = sql.create_engine(self.url("postgres"))
        deadline = time.monotonic() + 30
        while True:
            try:
                with engine.connect():
                    break
            except sql.exc.OperationalError:
                assert time.monotonic() < deadline, (self.folder / "log").read_text()
                time.sleep(0.05)
        engine.dispose()

    def kill(self) -> None:
        """Kill the postmaster; its backends notice and go."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        # A new postmaster does not start while a backend of the old one holds the shared memory.
        deadline = time.monotonic() + 30
        while subprocess.run(["pgrep", "-g", str(self._process.pid)], capture_output=True, check=False).returncode == 0:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Have the server and all its backends say nothing for a while; connections to it stay open."""
        assert self._process is not None
        own = self._process.pid
        found = subprocess.run(["pgrep", "-P", str(own)], capture_output=True, text=True, check=True).stdout.split()
        processes = [own, *map(int, found)]
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        try:
            yield
        finally:
            for process in processes:
                os.kill(process, signal.SIGCONT)

    def database(self) -> str:
        """Make an empty database; return its URL."""
        name = f"d{secrets.token_hex(6)}"
        engine = sql.create_engine(self.url("postgres"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(sql.text(f"CREATE DATABASE {name}"))
        engine.dispose()
        return self.url(name)

    def remove(self) -> None:
        """Stop the server and drop its files."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(30)
        shutil.rmtree(self.folder, ignore_errors=True)


@cache
def server() -> Postgres:
    """Return this process's server."""
    return Postgres()
