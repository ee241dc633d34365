"""Several processes claim and answer the tasks of one queue: each task is handed out once, and its answer counts once.

    python -m proofs_tests.runtime.claim_campaign --claims 1000000 --workers 8 --database sqlite
    python -m proofs_tests.runtime.claim_campaign --claims 1000000 --workers 8 --database postgres --folder /dev/shm

Every worker may take any task, so all of them are after the same ones all the time, as many at once as a SuperLink
takes for its nodes. What each claimed it notes in a file of its own, and the notes are compared with what was pushed,
and with what the database counted, when all is over. folder: where the files are, PostgreSQL's too; on a disk in memory
the commits cost no time, and the claims are the same.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from privfed.message import Message
from privfed.record import ConfigRecord, RecordDict
from privfed.runtime.sql_schema import counted, sql, tasks
from privfed.runtime.sqlstore import SqlStore

RUN = 7
NODES = 512
QUEUE = 4 * NODES
"""Tasks that are in the queue at a time at most, some for each node; more are pushed when half of them are answered."""
AT_ONCE = 32
"""Tasks that a worker claims in a transaction at most, as many as a SuperLink that has nodes waiting."""
_IDLE_SECONDS = 0.02
_PULL_SECONDS = 0.05
_REPORT = 10_000
_NUMBER = np.dtype("<u4")


@dataclass(frozen=True)
class Claims:
    """What came of it. missing: tasks nobody claimed; twice: tasks that were handed out, or counted, more than once.

    answered: replies that were pulled. counted: rows of the table of those that were taken. cpu_seconds: of all the
    processes but PostgreSQL's.
    """

    pushed: int
    claimed: int
    answered: int
    counted: int
    missing: int
    twice: int
    by: tuple[int, ...]
    seconds: float
    cpu_seconds: float

    def summary(self) -> str:
        """Return the figures in a line."""
        return (
            f"{self.claimed} claims of {self.pushed} tasks by {len(self.by)} processes in {self.seconds:.0f} s, "
            f"CPU {self.cpu_seconds:.0f} s ({', '.join(map(str, self.by))}): {self.twice} twice, "
            f"{self.missing} missing, {self.answered} answers pulled, {self.counted} counted; "
            f"load {os.getloadavg()[0]:.1f}"
        )


def instruction(number: int) -> Message:
    """Return the task of a number."""
    content = RecordDict({"c": ConfigRecord({"number": number})})
    return Message(content, 1 + number % NODES, "train").with_metadata(run_id=RUN)


def work(folder: Path, database: str | None, notes: Path, at_once: int) -> None:
    """Claim and answer tasks until the standard input ends; note the number of each."""
    store = SqlStore(folder, database)
    over = os.dup(sys.stdin.fileno())
    os.set_blocking(over, False)
    with notes.open("ab") as file:
        while True:
            leases = store.lease_many(time.time(), 1e9, at_once)
            if not leases:
                if _is_over(over):
                    break
                time.sleep(_IDLE_SECONDS)
                continue
            replies = [Message(lease.message.content, reply_to=lease.message) for lease in leases]
            done = [(lease.token, reply, None) for lease, reply in zip(leases, replies, strict=True)]
            if store.complete_many(done) != [lease.message.metadata.message_id for lease in leases]:
                raise AssertionError("an answer is not taken from the one the task was handed to")
            numbers = [int(str(reply.content.config_records["c"]["number"])) for reply in replies]
            file.write(np.array(numbers, _NUMBER).tobytes())
    store.close()


def _is_over(descriptor: int) -> bool:
    try:
        return os.read(descriptor, 1) == b""
    except BlockingIOError:
        return False


def claim(
    folder: Path, database: str | None, claims: int, workers: int, seconds: float = math.inf, at_once: int = AT_ONCE
) -> Claims:
    """Push so many tasks, or as many as there is time for, let the workers claim them, and count."""
    store = SqlStore(folder, database)
    store.create_run(RUN, range(1, NODES + 1))
    store.set_run_state(RUN, "running")
    begun, answered = time.monotonic(), np.zeros(claims, np.int64)
    notes = [folder / f"notes-{worker}" for worker in range(workers)]
    me = [sys.executable, "-m", __spec__.name if __spec__ else "proofs_tests.runtime.claim_campaign", "--work"]
    processes = [
        subprocess.Popen([*me, str(folder), database or "", str(note), str(at_once)], stdin=subprocess.PIPE)
        for note in notes
    ]
    queue = min(QUEUE, max(32, claims // 10))  # of a few claims, too, no worker gets most before the others look
    try:
        while not all(note.exists() for note in notes):
            _check(processes)
            time.sleep(_IDLE_SECONDS)
        begun = time.monotonic()
        pushed = 0
        waiting: set[str] = set()
        while waiting or (pushed < claims and time.monotonic() < begun + seconds):
            if len(waiting) <= queue // 2 and pushed < claims and time.monotonic() < begun + seconds:
                numbers = range(pushed, min(claims, pushed + queue - len(waiting)))
                messages = [instruction(number) for number in numbers]
                waiting |= {message.metadata.message_id for message in messages}
                assert store.push(RUN, messages) == []
                pushed = numbers.stop
                if numbers.start // _REPORT != pushed // _REPORT:
                    sys.stderr.write(f"{pushed} of {claims} in {time.monotonic() - begun:.0f} s\n")
            _pull(store, waiting, answered, processes)
    finally:
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
    codes = [process.wait(60) for process in processes]
    assert codes == [0] * workers, codes
    with store._engine.begin() as connection:
        rows = int(connection.execute(sql.select(sql.func.count()).select_from(counted)).scalar_one())
        left = int(connection.execute(sql.select(sql.func.count()).select_from(tasks)).scalar_one())
    assert left == 0, f"{left} tasks are left"
    store.close()
    found = [np.fromfile(note, _NUMBER) for note in notes]
    times, answered = np.bincount(np.concatenate(found), minlength=pushed), answered[:pushed]
    return Claims(
        pushed=pushed,
        claimed=int(times.sum()),
        answered=int(answered.sum()),
        counted=rows,
        missing=int((times == 0).sum() + (answered == 0).sum()),
        twice=int((times > 1).sum() + (answered > 1).sum()) + max(0, len(times) - pushed),
        by=tuple(len(one) for one in found),
        seconds=time.monotonic() - begun,
        cpu_seconds=sum(os.times()[:4]),
    )


def _pull(store: SqlStore, waiting: set[str], answered: np.ndarray, processes: list[subprocess.Popen[bytes]]) -> None:
    """Pull the answers that have arrived, or wait a little."""
    replies = store.pull(RUN, waiting) if store.arrived(RUN, waiting) else []
    for reply in replies:
        waiting.discard(reply.metadata.reply_to_message_id)
        answered[int(str(reply.content.config_records["c"]["number"]))] += 1
    if not replies:
        _check(processes)
    time.sleep(_PULL_SECONDS)


def _check(processes: list[subprocess.Popen[bytes]]) -> None:
    assert all(process.poll() is None for process in processes), "a worker has ended"


def main() -> None:
    """Run a campaign, or be one of its workers."""
    if sys.argv[1:2] == ["--work"]:
        work(Path(sys.argv[2]), sys.argv[3] or None, Path(sys.argv[4]), int(sys.argv[5]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--claims", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--database", choices=["sqlite", "postgres"], default="sqlite")
    parser.add_argument("--at-once", type=int, default=AT_ONCE, help="Tasks a worker claims at a time [%(default)s]")
    parser.add_argument("--minutes", type=float, default=math.inf, help="Stop after so long [when all are claimed]")
    parser.add_argument("--folder", type=Path, help="Make the files there [default: the system's temporary folder]")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        url = None
        if asked.database == "postgres":
            from proofs_tests.runtime.postgres import Postgres

            url = Postgres(asked.folder).database()
        found = claim(Path(folder), url, asked.claims, asked.workers, 60 * asked.minutes, asked.at_once)
    sys.stdout.write(f"{asked.database}: {found.summary()}\n")
    sys.exit(bool(found.twice or found.missing or found.counted != found.pushed))


if __name__ == "__main__":
    main()
