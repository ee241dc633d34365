"""Two SuperLinks as processes that share a PostgreSQL database and a folder: one serves, the other stands by."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from privfed.runtime.run_folder import RunFolder
from proofs_tests.deployment.local_link import eventually
from proofs_tests.deployment.test_page import free_ports

LEASE_SECONDS = 2.0


class Member:
    """One `privfed superlink --shared`, at addresses of its own."""

    def __init__(self, folder: Path, name: str, database: str) -> None:
        self.home = folder / name
        self.home.mkdir()
        fleet, control = free_ports(2)
        self.fleet, self.control = f"127.0.0.1:{fleet}", f"127.0.0.1:{control}"
        words = ["superlink", "--insecure", "--home", str(self.home), "--fleet", self.fleet, "--control", self.control]
        words += ["--database", database, "--shared", str(folder / "shared"), "--isolation", "inline"]
        words += ["--lease-seconds", str(LEASE_SECONDS)]
        self._command = [sys.executable, "-m", "privfed.cli.main", *words]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        (self.home / "addresses.json").unlink(missing_ok=True)
        with (self.home / "output.txt").open("ab") as output:
            self.process = subprocess.Popen(self._command, stdout=output, stderr=output, start_new_session=True)

    def serves(self) -> bool:
        try:
            json.loads((self.home / "addresses.json").read_text())
        except (OSError, ValueError):
            return False
        return self.process is not None and self.process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()

    @property
    def output(self) -> str:
        return (self.home / "output.txt").read_text()


class Pair:
    """A context: both run inside it; `active` serves."""

    def __init__(self, folder: Path, database: str) -> None:
        self.folder = folder
        self.active, self.other = (Member(folder, name, database) for name in ("a", "b"))

    def __enter__(self) -> Pair:
        self.active.start()
        self.await_service(self.active)
        self.other.start()
        eventually(lambda: "stands by" in self.other.output, 30)
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
    def fleet(self) -> str:
        return f"{self.active.fleet},{self.other.fleet}"

    @property
    def control(self) -> str:
        return f"{self.active.control},{self.other.control}"

    def run(self, name: str) -> RunFolder:
        (found,) = (self.folder / "shared").glob(f"term-*/runs/{name}")
        return RunFolder.open(found)

    def round(self, name: str) -> int:
        """Return the last committed round, whoever serves."""
        try:
            return self.run(name).recorded_status.round
        except Exception:  # noqa: BLE001 - the folder is being handed over
            return -1
