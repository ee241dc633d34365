"""Runs of a federation whose processes are killed again and again, and what is to be seen of it afterwards: nothing.

    python -m proofs_tests.deployment.kill_campaign --kills 1000 --runs 51 --seed 1

A kill is a failpoint (a moment before or after a commit or a send) or SIGKILL at a sampled time, of the SuperLink, a
SuperNode, the SuperExec, the ServerApp's or a ClientApp's process. A third of the runs each: an app with state; the
same under secure aggregation and a privacy plan with seeded noise; the same with real noise, charged to ledgers.
With --together N there are N kills before the next round is awaited: the later ones meet what recovers.

Recovery is the time from the kill to the run's next committed round; whatever was killed and has no launcher of its
own is started again at once. It contains the start of Python, the nodes' pauses before they connect, and the round.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from privfed import run_simulation
from privfed.grid import Checkpoint
from privfed.privacy.ledger import Ledger
from privfed.runtime.app_folder import AppFolder
from privfed.runtime.audit_log import verify_log
from privfed.runtime.run_folder import ENDED, RunFolder
from proofs_tests.deployment.kill_federation import Federation, Program
from proofs_tests.deployment.small_node import fresh
from proofs_tests.deployment.stateful_app import write_app
from proofs_tests.deployment.waiting import eventually

RANDOMNESS = 5
APPS = ("server-app", "client-app")
KINDS = ("plain", "seeded", "charged")
ROUNDS = 4000
"""More than any number of kills takes; a run is asked to stop after its last one."""
STRIKE_SECONDS = 1.5
"""How long a failpoint may take to be reached before the process is killed from outside instead."""
HOT = {
    "superlink": ("push", "lease", "complete", "pull", "file", "round", "event", "offer", "grid-answer", "answer"),
    "node": ("begin", "commit", "settle", "audit-line", "send"),
    "server-app": ("call",),
    "client-app": ("taken", "reply"),
}
SECURE = ("journal", "charge")
COLD = {
    "superlink": ("release", "expire", "run", "chunk", "run-state"),
    "node": ("hello", "query", "download"),
    "superexec": ("hello", "start", "launched", "ended"),
    "client-app": ("ready",),
}
"""Moments that are reached when something starts: another process is killed first."""


@dataclass
class Tally:
    """What a campaign has seen."""

    kills: Counter[str] = field(default_factory=Counter)
    recoveries: list[float] = field(default_factory=list)
    runs: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    acknowledged: int = 0
    charges: int = 0
    faults: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Return the figures, a line each."""
        found = sorted(self.recoveries) or [0.0]
        by = Counter[str]()
        for name, count in self.kills.items():
            by[name.partition(".")[0].partition(" ")[0]] += count
        points = {name for name in self.kills if "." in name}
        lines = [
            f"{sum(self.kills.values())} kills ({', '.join(f'{n} {name}' for name, n in sorted(by.items()))}), "
            f"{sum(self.kills[name] for name in points)} at {len(points)} failpoints, over {sum(self.runs.values())} "
            f"runs ({', '.join(f'{n} {kind}' for kind, n in sorted(self.runs.items()))}), {self.rounds} rounds",
            f"recovery: median {found[len(found) // 2]:.2f} s, p95 {found[int(0.95 * (len(found) - 1))]:.2f} s, "
            f"largest {found[-1]:.2f} s",
            f"{self.acknowledged} results acknowledged in committed rounds, {self.charges} charges in ledgers",
            f"load {os.getloadavg()[0]:.1f}; {len(self.faults)} faults",
        ]
        return "\n".join([*lines, *self.faults])


class Campaign:
    """Kills processes of one federation, run after run."""

    def __init__(self, place: Federation, kind: str, rng: random.Random, tally: Tally, together: int = 1) -> None:
        self.place, self.kind, self.rng, self.tally, self.together = place, kind, rng, tally, together
        self.app = write_app(place.folder / "app", "plain" if kind == "plain" else "masked")

    def run(self, kills: int) -> None:
        """Submit a run, kill so often, let it end, and check what it left."""
        seed = self.rng.randrange(1 << 30)
        folder = self._submit(seed)
        eventually(lambda: folder.recorded_status.round >= 1 or self._restart(), 60, self.place.link)
        for first in range(0, kills, self.together):
            self._strike(folder, min(self.together, kills - first))
        reached = folder.recorded_status.round
        folder.request_stop()
        eventually(lambda: folder.recorded_status.state in ENDED or self._restart(), 60, self.place.link)
        self.tally.runs[self.kind] += 1
        self._check(folder, seed, reached)

    def _submit(self, seed: int) -> RunFolder:
        while True:
            try:
                return self.place.submit(self.app, seed, ROUNDS)
            except Exception as fault:  # noqa: BLE001 - the SuperLink is starting
                sys.stderr.write(f"not submitted yet: {fault}\n")
                time.sleep(0.2)

    def _strike(self, folder: RunFolder, kills: int) -> None:
        """Kill something so often, start it again, and wait for the next round."""
        names: list[str] = []
        for _ in range(kills):
            self._restart()
            time.sleep(self.rng.random() * 0.15)
            armed = self._arm() if self.rng.random() < 0.6 else None
            name, began = self._await(armed) if armed is not None else (None, 0.0)
            if name is None:
                name, began = self._kill()
            names.append(name)
        reached = folder.recorded_status.round
        self._restart()
        try:
            eventually(lambda: folder.recorded_status.round > reached or self._restart(), 60)
        except AssertionError:
            raise AssertionError(f"after {names} run {folder.name} stands still: {self.outputs()}") from None
        self.tally.kills.update(names)
        self.tally.recoveries.append(time.monotonic() - began)

    def _restart(self) -> bool:
        """Start again whatever has no launcher of its own."""
        for program in self.place.programs:
            if program.is_dead():
                self.place.restart(program)
        return False

    def _arm(self) -> Path:
        roles = dict(HOT)
        if self.kind != "plain":
            roles["server-app"] = (*HOT["server-app"], *(SECURE if self.kind == "charged" else SECURE[:1]))
        cold = self.rng.random() < 0.25
        role = self.rng.choice(list(COLD if cold else roles))
        step = self.rng.choice((COLD if cold else roles)[role])
        path = self.place.points / f"{role}.{self.rng.choice(['before', 'after'])}-{step}"
        path.write_text(str(1 if cold else self.rng.randrange(1, 6)))
        if cold:  # it is reached when something starts again
            name, _ = self._kill(self._opposite(role))
            self.tally.kills[name] += 1
            self._restart()
        return path

    def _opposite(self, role: str) -> str:
        if role == "superlink":
            return self.rng.choice(["node", "superlink"])
        return {"superexec": "client-app", "client-app": "client-app"}.get(role, role)

    def _await(self, armed: Path) -> tuple[str | None, float]:
        deadline = time.monotonic() + (3 if armed.name.split("-")[-1] in ("hello", "launched") else 1) * STRIKE_SECONDS
        while armed.exists():
            if time.monotonic() > deadline:
                armed.unlink(missing_ok=True)
                break
            self._restart()
            time.sleep(0.003)
        else:
            return armed.name, time.monotonic()
        return None, 0.0

    def _kill(self, role: str | None = None) -> tuple[str, float]:
        role = role or self.rng.choice(
            ["superlink", "superlink", "node", "node", "superexec", "server-app", "client-app"]
        )
        place = self.place
        if role in APPS:
            parents = [place.link] if role == "server-app" else [*place.nodes[:2], place.superexec]
            workers = [pid for parent in parents if not parent.is_dead() for pid in parent.children()]
            if workers:
                os.kill(self.rng.choice(workers), signal.SIGKILL)
                return f"{role} killed", time.monotonic()
            role = "node"
        of: dict[str, list[Program]] = {"superlink": [place.link], "node": place.nodes, "superexec": [place.superexec]}
        self.rng.choice(of[role]).kill()
        return f"{role} killed", time.monotonic()

    def outputs(self) -> str:
        return "\n".join(f"== {one.name}\n{one.output[-3000:]}" for one in self.place.programs)

    def _check(self, folder: RunFolder, seed: int, reached: int) -> None:
        """See that the run is as if nothing had happened."""
        found = folder.restore()
        assert found is not None and found.round >= reached
        self.tally.rounds += found.round
        self.tally.acknowledged += 3 * found.round
        status = folder.recorded_status
        fault = self._fault(folder, found, seed)
        if fault or status.state != "stopped":
            self.tally.faults.append(f"{self.kind} run {folder.name} seed {seed}: {status.state}: {fault}")

    def _fault(self, folder: RunFolder, found: Checkpoint, seed: int) -> str:
        if [one["round"] for one in found.metrics] != list(range(1, found.round + 1)):
            return "a round is missing or twice"
        replies = [dict(one["train-replies"]) for one in found.metrics] if self.kind == "plain" else []
        if any(one["valid"] != 3 for one in replies):
            return "a round has fewer than its three results"
        if self.kind == "charged":
            return self._ledger_fault(folder, found)
        server, _ = fresh(self.app)
        _, client = fresh(self.app)
        config = {**AppFolder.open(self.app).config, "num-rounds": found.round}
        randomness = RANDOMNESS if self.kind == "seeded" else None
        calm = run_simulation(server, client, 3, run_config=config, seed=seed, insecure_test_randomness=randomness)
        expected = calm.checkpoint
        if expected is None or expected.arrays != found.arrays:
            return "the model is another one"
        return "" if expected.metrics == found.metrics else "the metrics are others"

    def _ledger_fault(self, folder: RunFolder, found: Checkpoint) -> str:
        """Compare what was charged with what was released: every committed round, at the least."""
        ledger = Ledger.read(folder.ledger_path)
        self.tally.charges += len(ledger.entries)
        if {entry.round for entry in ledger.entries} < set(range(1, found.round + 1)):
            return "a round was released and not charged"
        true = Ledger.create(None, ledger.terms)
        for number in range(1, found.round + 1):
            true.charge(ledger.entries[0].event, run="true", round=number, transcript="00" * 32)
        said = found.metrics[-1]["privacy"]
        assert isinstance(said, dict)
        if not ledger.spent >= true.spent or not ledger.spent >= float(str(said["epsilon"])):
            return f"the ledger has {ledger.spent}, {true.spent} was spent and {said['epsilon']} told"
        return ""

    def audits(self) -> None:
        """See that the audit logs of all hold, after all that."""
        for path in self.place.folder.glob("*/audit*/audit.jsonl"):
            verify_log(path)
        verify_log(self.place.folder / "home" / "audit.jsonl")


def campaign(
    folder: Path, kills: int, runs: int, seed: int, kinds: tuple[str, ...] = KINDS, together: int = 1
) -> Tally:
    """Kill so often over so many runs; return what was seen. After a fault it goes on in a new federation."""
    tally, rng = Tally(), random.Random(seed)
    due = [(kind, number) for place, kind in enumerate(kinds) for number in range(place, runs, len(kinds))]
    done = 0
    while done < len(due):
        kind = due[done][0]
        place = folder / f"{kind}-{done}"
        with Federation(place, RANDOMNESS if kind == "seeded" else None, LIMITS.get(kind, "")) as federation:
            one = Campaign(federation, kind, rng, tally, together)
            try:
                while done < len(due) and due[done][0] == kind:
                    done += 1
                    one.run(max(1, kills * done // len(due) - sum(tally.kills.values())))
                    sys.stderr.write(f"{done} of {len(due)} runs\n{tally.summary()}\n")
            except AssertionError as fault:
                tally.faults.append(str(fault))
                sys.stderr.write(f"{fault}\n")
            one.audits()
    return tally


LIMITS = {"charged": "max-epsilon-per-run = 1000000.0"}
"""What nodes limit where the noise is real, so that they keep ledgers of their own."""


def main() -> None:
    """Run a campaign from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=51)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--together", type=int, default=1, help="Kills before the next round is awaited")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--folder", type=Path, help="Keep everything here [default: a temporary folder]")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = asked.folder or Path(temporary)
        tally = campaign(place, asked.kills, asked.runs, asked.seed, tuple(asked.kinds), asked.together)
    sys.stdout.write(tally.summary() + "\n")
    sys.stdout.writelines(f"  {count:4} {name}\n" for name, count in sorted(tally.kills.items()))
    sys.exit(bool(tally.faults))


if __name__ == "__main__":
    main()
