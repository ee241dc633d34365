"""A SuperLink as a process of its own, that can be killed and started again at the same addresses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class SuperLinkProcess:
    """`privfed superlink` in a home folder, without keys unless it is given some."""

    def __init__(
        self, home: Path, isolation: str = "inline", keys: Path | None = None, options: Sequence[str] = ()
    ) -> None:
        self.home = home
        self._keys = ["--insecure"] if keys is None else ["--keys", str(keys)]
        self._isolation = isolation
        self._options = list(options)
        self._process: subprocess.Popen[bytes] | None = None
        self.fleet = self.control = "127.0.0.1:0"
        self.addresses: dict[str, str] = {}

    def start(self) -> None:
        command = [sys.executable, "-m", "privfed.cli.main", "superlink", *self._keys, "--home", str(self.home)]
        command += ["--fleet", self.fleet, "--control", self.control, "--isolation", self._isolation]
        command += self._options
        (self.home / "addresses.json").unlink(missing_ok=True)
        self.home.mkdir(exist_ok=True)
        with (self.home / "output.txt").open("ab") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        deadline = time.monotonic() + 60
        while not (self.home / "addresses.json").exists():
            assert self._process.poll() is None and time.monotonic() < deadline, self.output
            time.sleep(0.02)
        self.addresses = json.loads((self.home / "addresses.json").read_text())
        self.fleet, self.control = self.addresses["fleet"], self.addresses["control"]

    @property
    def output(self) -> str:
        return (self.home / "output.txt").read_text()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """kill -9, as the kernel or a person with a grudge would."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def end(self) -> int:
        """Ask it to end; return its exit status."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(60)

    def __enter__(self) -> SuperLinkProcess:
        self.start()
        return self

    def __exit__(self, *fault: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()


class SuperExecProcess:
    """`privfed superexec` for whoever listens in a folder."""

    def __init__(self, folder: Path, log: Path, python: str = sys.executable, **process: Any) -> None:
        self._log, self._process = log, process
        self._command = [python, "-m", "privfed.cli.main", "superexec", "--connect", f"unix:{folder / 'exec.sock'}"]
        self._command += ["--token-file", str(folder / "exec.token")]

    def __enter__(self) -> SuperExecProcess:
        with self._log.open("ab") as output:
            self.process = subprocess.Popen(self._command, stdout=output, stderr=output, **self._process)
        return self

    def __exit__(self, *fault: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) == 0
