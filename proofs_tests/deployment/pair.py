"""Two SuperLinks as processes that share a PostgreSQL database and a folder: one serves, the other passes calls on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from privfed import failpoint
from privfed.runtime.run_folder import RunFolder
from proofs_tests.deployment.test_page import free_ports
from proofs_tests.deployment.waiting import eventually

LEASE_SECONDS = 2.0


class Member:
    """One `privfed superlink --shared`, at addresses of its own."""

    def __init__(self, folder: Path, name: str, database: str, isolation: str) -> None:
        self.home = folder / name
        self.home.mkdir()
        self.points = self.home / "points"
        self.points.mkdir()
        self.fleet, self.control, self.monitor = (f"127.0.0.1:{port}" for port in free_ports(3))
        words = ["superlink", "--insecure", "--home", str(self.home), "--fleet", self.fleet, "--control", self.control]
        words += ["--database", database, "--shared", str(folder / "shared"), "--isolation", isolation]
        words += ["--lease-seconds", str(LEASE_SECONDS), "--monitor", self.monitor]
        self._command = [sys.executable, "-m", "privfed.cli.main", *words]
        self._from = 0
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._from = len(self.output)
        with (self.home / "output.txt").open("ab") as output:
            self.process = subprocess.Popen(
                self._command,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, failpoint.VARIABLE: str(self.points)},
            )

    def serves(self) -> bool:
        """Whether it holds the term, by what it said since it was started."""
        alive = self.process is not None and self.process.poll() is None
        return alive and "serving {" in self.output[self._from :]

    def stands_by(self) -> bool:
        """Whether it knows of another one that serves, by what it said since it was started."""
        alive = self.process is not None and self.process.poll() is None
        said = self.output[self._from :]
        return alive and "stands by" in said and "serving {" not in said

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()

    def metric(self, name: str) -> float:
        """Return one of the numbers its monitor shows; -1 when it does not show it."""
        try:
            with urllib.request.urlopen(f"http://{self.monitor}/metrics", timeout=5) as answer:
                found = re.search(rf"^privfed_{name} (\S+)$", answer.read().decode(), re.M)
        except OSError:
            return -1.0
        return float(found[1]) if found else -1.0

    def die_at(self, moment: str) -> None:
        """Have it end, as by kill -9, when it next reaches a failpoint."""
        (self.points / f"superlink.{moment}").touch()

    def await_death(self) -> None:
        """Wait until a failpoint has ended it."""
        assert self.process is not None
        assert self.process.wait(60) == -signal.SIGKILL, self.output
        assert not list(self.points.iterdir()), "it died of that"

    @property
    def output(self) -> str:
        path = self.home / "output.txt"
        return path.read_text() if path.exists() else ""


class Pair:
    """A context: both run inside it; `active` serves."""

    def __init__(self, folder: Path, database: str, isolation: str = "inline") -> None:
        self.folder = folder
        self.active, self.other = (Member(folder, name, database, isolation) for name in ("a", "b"))

    def __enter__(self) -> Pair:
        self.active.start()
        self.await_service(self.active)
        self.other.start()
        eventually(self.other.stands_by, 30)
        return self

    def __exit__(self, *fault: object) -> None:
        for member in (self.active, self.other):
            if member.process is not None and member.process.poll() is None:
                member.signal(signal.SIGKILL)

    def await_service(self, member: Member) -> None:
        deadline = time.monotonic() + 40
        while not member.serves():
            assert time.monotonic() < deadline, member.output
            time.sleep(0.05)

    def change(self) -> None:
        """Note that the other one serves now."""
        self.active, self.other = self.other, self.active

    @property
    def fleets(self) -> tuple[str, str]:
        """Both addresses for nodes, in either order."""
        return f"{self.active.fleet},{self.other.fleet}", f"{self.other.fleet},{self.active.fleet}"

    @property
    def controls(self) -> tuple[str, str]:
        """Both addresses for users, in either order."""
        return f"{self.active.control},{self.other.control}", f"{self.other.control},{self.active.control}"

    def run(self, name: str) -> RunFolder:
        (found,) = (self.folder / "shared").glob(f"term-*/runs/{name}")
        return RunFolder.open(found)

    def round(self, name: str) -> int:
        """Return the last committed round, whoever serves."""
        try:
            return self.run(name).recorded_status.round
        except Exception:  # noqa: BLE001 - the folder is being handed over
            return -1
