"""`privfed supernode` as a process of its own, that can be killed and started again in the same folder."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from privfed import failpoint


class NodeProcess:
    """A node over loopback, without keys unless it is given some. options: more of the command line."""

    def __init__(
        self, folder: Path, address: str, node_id: int, options: Sequence[str] = (), keys: Path | None = None
    ) -> None:
        self.folder, self.options = folder, list(options)
        self.failpoints = folder.with_name(f"{folder.name}-failpoints")
        self._command = [sys.executable, "-m", "privfed.cli.main", "supernode", "--superlink", address]
        self._command += ["--insecure", "--node-id", str(node_id)] if keys is None else ["--keys", str(keys)]
        self._command += ["--data", str(folder)]
        self._process: subprocess.Popen[bytes] | None = None

    def arm(self, moment: str) -> None:
        """Have the next process that gets there end itself at a moment, "node.before-send" for one."""
        self.failpoints.mkdir(parents=True, exist_ok=True)
        (self.failpoints / moment).touch()

    def start(self, *more: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "output.txt").open("ab") as output:
            self._process = subprocess.Popen(
                [*self._command, *self.options, *more],
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, failpoint.VARIABLE: str(self.failpoints)},
            )

    @property
    def output(self) -> str:
        path = self.folder / "output.txt"
        return path.read_text() if path.exists() else ""

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.process.wait()

    def end(self) -> int:
        """Ask it to end; return its exit status."""
        self.process.terminate()
        return self.process.wait(40)

    def resident_kib(self) -> int:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1])
        raise AssertionError("the process is gone")

    def workers(self) -> list[int]:
        """Return the processes whose parent is this one."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[1]) == self.pid:
                found.append(int(path.parent.name))
        return found

    def __enter__(self) -> NodeProcess:
        self.start()
        return self

    def __exit__(self, *fault: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()


@contextlib.contextmanager
def nodes_in(folder: Path, addresses: Sequence[str]) -> Iterator[list[NodeProcess]]:
    """Run node 1 at the first address, and so on; they run apps in themselves, and do not wait when they are to end."""
    options = ["--isolation", "inline", "--drain-seconds", "1"]
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(NodeProcess(folder / f"node-{number}", address, number, options))
            for number, address in enumerate(addresses, 1)
        ]


def alive(pid: int) -> bool:
    """Return whether a process is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
