"""A whole federation in real processes under mutual TLS, any of which may be killed: by a failpoint or from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from privfed import failpoint
from privfed.runtime.authority import Authority, make_request
from privfed.runtime.control import ControlClient, Submission
from privfed.runtime.credentials import Credentials, accept_answer
from privfed.runtime.federation import open_app
from privfed.runtime.run_folder import RunFolder
from proofs_tests.deployment.waiting import eventually

POLICY = """
[apps]
signers = ["user-alice"]
[privacy]
plans = ["none", "central"]
observer = "output"
LIMITS
[secure-aggregation]
min-cohort = 2
"""


def member(authority: Authority, folder: Path, role: str, name: str) -> Credentials:
    """Make a member's keys and have the authority answer for them."""
    make_request(folder, role, name, ["127.0.0.1"] if role == "link" else ())
    _, answer = authority.answer((folder / "request.json").read_bytes())
    accept_answer(folder, msgspec.json.encode(answer))
    return Credentials.load(folder)


class Program:
    """A `privfed` command that runs until it is killed, and can be started again as it was."""

    def __init__(self, name: str, folder: Path, words: list[str], env: Mapping[str, str]) -> None:
        self.name = name
        self._words, self._env = words, dict(env)
        self._output = folder / f"{name}.txt"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, words: list[str] | None = None) -> None:
        """Start it. words: instead of the ones it was made with, from now on."""
        self._words = words or self._words
        with self._output.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "privfed.cli.main", *self._words],
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, **self._env},
            )

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def output(self) -> str:
        return self._output.read_text() if self._output.exists() else ""

    def is_dead(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def kill(self) -> None:
        """kill -9, as the kernel or a person with a grudge would."""
        if self.process is not None and self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def children(self) -> list[int]:
        """Return the processes of apps that this one has started."""
        found = []
        for path in Path(f"/proc/{self.pid}/task").glob("*/children"):
            try:
                found += [int(one) for one in path.read_text().split()]
            except OSError:
                continue
        return [one for one in found if b"privfed.runtime.worker" in _command(one)]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


class Federation:
    """A context: one SuperLink, three nodes, the third with its apps at a superexec. node_limits: lines of [privacy].

    randomness: seeds the noise of plans, so that models can be compared; None: the noise is real, and charged.
    """

    def __init__(self, folder: Path, randomness: int | None, node_limits: str = "") -> None:
        self.folder = folder
        self.points = folder / "failpoints"
        self.points.mkdir(parents=True)
        authority = Authority.create(folder / "authority", "kills")
        for role, name in (("link", "main"), ("node", "a"), ("node", "b"), ("node", "c"), ("submitter", "alice")):
            member(authority, folder / f"keys-{name}", role, name)
        self.user = Credentials.load(folder / "keys-alice")
        (folder / "keys-main" / "roster.json").write_bytes(authority.roster_document)
        (folder / "policy.toml").write_text(POLICY.replace("LIMITS", node_limits))
        env = {failpoint.VARIABLE: str(self.points), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        seeded = {} if randomness is None else {"PRIVFED_INSECURE_TEST_RANDOMNESS": str(randomness)}
        self.link = Program("superlink", folder, [], {**env, **seeded})
        self.nodes = [Program(f"node-{name}", folder, [], env) for name in "abc"]
        self.superexec = Program("superexec", folder, [], env)
        self.fleet = self.control = "127.0.0.1:0"

    @property
    def programs(self) -> list[Program]:
        return [self.link, *self.nodes, self.superexec]

    def restart(self, program: Program) -> None:
        """Start a program that was killed, as its service manager would, at once."""
        if program is self.link:
            self.start_link()
        else:
            program.start()

    def start_link(self) -> None:
        """Start the SuperLink, again at the addresses it had."""
        place = self.folder / "home"
        told = place / "addresses.json"
        told.unlink(missing_ok=True)
        words = ["superlink", "--keys", str(self.folder / "keys-main"), "--home", str(place)]
        self.link.start([*words, "--fleet", self.fleet, "--control", self.control])

    def find_link(self) -> None:
        """Wait until the SuperLink says where it listens."""
        eventually((self.folder / "home" / "addresses.json").exists, 60, self.link)
        found = json.loads((self.folder / "home" / "addresses.json").read_text())
        self.fleet, self.control = found["fleet"], found["control"]

    def __enter__(self) -> Federation:
        self.start_link()
        self.find_link()
        for name, node in zip("abc", self.nodes, strict=True):
            data = self.folder / f"data-{name}"
            words = ["supernode", "--superlink", self.fleet, "--keys", str(self.folder / f"keys-{name}")]
            words += ["--policy", str(self.folder / "policy.toml"), "--data", str(data)]
            node.start([*words, *(["--isolation", "external"] if name == "c" else [])])
        token = self.folder / "data-c" / "exec.token"
        eventually(token.exists, 60, self.nodes[2])
        words = ["superexec", "--connect", f"unix:{token.with_suffix('.sock')}", "--token-file", str(token)]
        self.superexec.start(words)
        return self

    def __exit__(self, *fault: object) -> None:
        for program in self.programs:
            program.kill()

    def submit(self, app: Path, seed: int, rounds: int) -> RunFolder:
        """Start a run over the three nodes."""
        asked = Submission(open_app(app, self.user), {"num-rounds": str(rounds)}, seed=seed, nodes=3)
        with ControlClient(self.control, self.user) as control:
            return RunFolder.open(self.folder / "home" / "runs" / control.submit(asked).name)
