"""The commands of docs/deployment.md, run as they are written, on loopback with ports of the test's own."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from privfed import ArrayRecord

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "deployment.md"
PAIRED = re.compile(r"```sh\n(.*?)```", re.S)
SERVICES = ("privfed superlink", "privfed supernode")


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens at, below those that the system gives to whoever asks for any."""
    ports: list[int] = []
    while len(ports) < count:
        port = 10_000 + secrets.randbelow(20_000)
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            ports += [port] if port not in ports else []
    return ports


class Machine:
    """A folder where the page's commands run, and the services it left running."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "examples").symlink_to(ROOT / "examples")
        (folder / "bin").mkdir()
        program = folder / "bin" / "privfed"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m privfed.cli.main "$@"\n')
        program.chmod(0o755)
        self.env = {
            **os.environ,
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "PRIVFED_HOME": str(folder / "home"),
        }
        self.ports = dict(zip(("7810", "7811", "7812"), free_ports(3), strict=True))
        self.others: dict[str, int] = {}
        self.database = ""
        self.services: list[subprocess.Popen[bytes]] = []

    def here(self, text: str) -> str:
        """Put this machine in place of the page's."""
        for page, port in self.ports.items():
            text = text.replace(f"link.example.org:{page}", f"127.0.0.1:{port}")
        for page, port in self.others.items():
            text = text.replace(page, f"127.0.0.1:{port}")
        text = text.replace("postgresql+psycopg://privfed@db.example.org/privfed", self.database)
        return re.sub(r"--host link(-2)?\.example\.org", "--host 127.0.0.1", text)

    def run(self, text: str) -> str:
        done = subprocess.run(
            ["bash", "-euc", self.here(text)],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}{self.logs()}"
        return done.stdout

    def serve(self, text: str) -> None:
        log = (self.folder / f"service-{len(self.services)}.log").open("wb")
        with log:
            self.services.append(
                subprocess.Popen(
                    ["bash", "-euc", f"exec {self.here(text)}"],
                    cwd=self.folder,
                    env=self.env,
                    stdout=log,
                    stderr=log,
                    stdin=subprocess.DEVNULL,
                )
            )

    def logs(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("service-*.log")))

    def wait_for(self, text: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.logs():
            assert time.monotonic() < deadline, f"no {text!r} in\n{self.logs()}"
            time.sleep(0.1)

    def stop(self) -> None:
        for service in self.services:
            service.send_signal(signal.SIGTERM)
        for service in self.services:
            service.wait(60)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    found = Machine(tmp_path)
    yield found
    found.stop()


def blocks() -> list[str]:
    return re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)


def test_the_page_does_what_it_says(machine: Machine) -> None:
    said: dict[str, str] = {}
    for block in blocks():
        services = [line for line in block.splitlines() if line.startswith(SERVICES)]
        if not services:
            said[block] = machine.run(block)
            continue
        for line in services:
            machine.serve(line)
        if services[0].startswith("privfed superlink"):
            machine.wait_for("serving")
            with urllib.request.urlopen(f"http://127.0.0.1:{machine.ports['7812']}/healthz", timeout=10) as answer:
                assert answer.status == 200
            continue
        deadline = time.monotonic() + 60
        while machine.run("privfed node ls --superlink link.example.org:7811 --keys olga").count("connected") < 2:
            assert time.monotonic() < deadline, machine.logs()
            time.sleep(0.2)
    runs = next(out for block, out in said.items() if "privfed run" in block)
    assert re.search(r"completed after 3 rounds", runs)
    assert re.search(r"completed +round 3 +minimal +user-alice", runs)
    assert ArrayRecord.from_safetensors((machine.folder / "result" / "model.safetensors").read_bytes())
    assert "minimal" in (machine.folder / "report.html").read_text()
    stopped = next(out for block, out in said.items() if "privfed stop" in block)
    assert re.search(r"^\S+: stopped$", stopped, re.M) and "stopped after round" in stopped
    revoked = next(out for block, out in said.items() if "privfed node revoke" in block)
    assert re.search(r"^node 1: revoked$\n1 +revoked +- ", revoked, re.M) and "node 1: approved" in revoked
    audits = next(out for block, out in said.items() if "privfed verify" in block)
    assert "lines hold" in audits
    # The node that was revoked at the page's end is disconnected, and the other is not.
    deadline = time.monotonic() + 60
    while "connected" in re.findall(r"^2 .*$", machine.run(LIST), re.M)[0]:
        assert time.monotonic() < deadline, machine.run(LIST) + machine.logs()
        time.sleep(0.5)
    while "connected" not in re.findall(r"^1 .*$", machine.run(LIST), re.M)[0]:
        assert time.monotonic() < deadline, machine.run(LIST) + machine.logs()
        time.sleep(0.5)


LIST = "privfed node ls --superlink link.example.org:7811 --keys olga"


@pytest.mark.postgres
def test_the_page_has_two_superlinks_stand_in_for_each_other(machine: Machine) -> None:
    from proofs_tests.runtime.postgres import server

    first, second, nodes, run = PAIRED.findall(PAGE.read_text(encoding="utf-8"))
    machine.others = dict(zip(("link-2.example.org:7810", "link-2.example.org:7811"), free_ports(2), strict=True))
    machine.database = server().database()
    before = itertools.takewhile(lambda block: not any(word in block for word in SERVICES), blocks())
    for block in [*before, next(block for block in blocks() if "cat > policy.toml" in block)]:
        machine.run(block)
    machine.run(first)
    for number, line in enumerate(line for line in second.splitlines() if line.startswith(SERVICES)):
        machine.serve(line)
        machine.wait_for(("serving {", "serves, term 1")[number])
    for line in nodes.splitlines():
        if line.startswith(SERVICES):
            machine.serve(line)
    assert "completed after 3 rounds" in machine.run(run)
    # The same at the second one alone, which passes it on.
    alone = run.replace("link.example.org:7811,", "")
    assert alone.count("--superlink link-2.example.org:7811") == 2
    assert machine.run(alone).count("completed  round 3") == 2
    machine.services[0].kill()
    assert machine.run(run).count("completed  round 3") == 3
    machine.wait_for("term 2 of")


def test_every_option_of_the_page_exists() -> None:
    text = PAGE.read_text(encoding="utf-8")
    commands = set(re.findall(r"`?privfed (\w+)", text)) - {"run"}
    known = subprocess.run(
        [sys.executable, "-m", "privfed.cli.main", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for command in commands:
        assert re.search(rf"^  {command} ", known, re.M), command
