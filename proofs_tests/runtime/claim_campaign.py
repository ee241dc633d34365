"""Several processes claim and answer the tasks of one queue: each task is handed out once, and its answer counts once.

    python -m proofs_tests.runtime.claim_campaign --claims 1000000 --workers 8 --database sqlite
    python -m proofs_tests.runtime.claim_campaign --claims 1000000 --workers 8 --database postgres --folder /dev/shm

Every worker may take any task, so all of them are after the same one all the time. What each claimed it notes in a file
of its own, and the notes are compared with what was pushed when all is over. folder: where the files are; on a disk in
memory the commits cost no time, and the claims are the same.
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
from privfed.runtime.sqlstore import SqlStore

RUN = 7
NODES = 64
BATCH = 8 * NODES
"""Tasks that are in the queue at a time, some for each node."""
_IDLE_SECONDS = 0.005
_NUMBER = np.dtype("<u4")


@dataclass(frozen=True)
class Claims:
    """What came of it. missing: tasks nobody claimed; twice: tasks that were handed out, or counted, more than once."""

    pushed: int
    claimed: int
    answered: int
    missing: int
    twice: int
    by: tuple[int, ...]
    seconds: float

    def summary(self) -> str:
        """Return the figures in a line."""
        return (
            f"{self.claimed} claims of {self.pushed} tasks by {len(self.by)} processes in {self.seconds:.0f} s "
            f"({', '.join(map(str, self.by))}): {self.twice} twice, {self.missing} missing, "
            f"{self.answered} answers pulled; load {os.getloadavg()[0]:.1f}"
        )


def instruction(number: int) -> Message:
    """Return the task of a number."""
    content = RecordDict({"c": ConfigRecord({"number": number})})
    return Message(content, 1 + number % NODES, "train").with_metadata(run_id=RUN)


def work(folder: Path, database: str | None, notes: Path) -> None:
    """Claim and answer tasks until the standard input ends; note the number of each."""
    store = SqlStore(folder, database)
    over = os.dup(sys.stdin.fileno())
    os.set_blocking(over, False)
    with notes.open("ab") as file:
        while True:
            lease = store.lease(time.time(), 1e9)
            if lease is None:
                if _is_over(over):
                    break
                time.sleep(_IDLE_SECONDS)
                continue
            number = lease.message.content.config_records["c"]["number"]
            assert isinstance(number, int)
            reply = Message(RecordDict({"c": ConfigRecord({"number": number})}), reply_to=lease.message)
            if store.complete(lease.token, reply, None) != lease.message.metadata.message_id:
                raise AssertionError(f"the answer to task {number} is not taken from the one it was handed to")
            file.write(number.to_bytes(_NUMBER.itemsize, "little"))
    store.close()


def _is_over(descriptor: int) -> bool:
    try:
        return os.read(descriptor, 1) == b""
    except BlockingIOError:
        return False


def claim(folder: Path, database: str | None, claims: int, workers: int, seconds: float = math.inf) -> Claims:
    """Push so many tasks, or as many as there is time for, let the workers claim them, and count."""
    store = SqlStore(folder, database)
    store.create_run(RUN, range(1, NODES + 1))
    store.set_run_state(RUN, "running")
    begun, answered = time.monotonic(), np.zeros(claims, np.int64)
    notes = [folder / f"notes-{worker}" for worker in range(workers)]
    me = [sys.executable, "-m", __spec__.name if __spec__ else "proofs_tests.runtime.claim_campaign", "--work"]
    processes = [
        subprocess.Popen([*me, str(folder), database or "", str(note)], stdin=subprocess.PIPE) for note in notes
    ]
    try:
        pushed = 0
        while pushed < claims and time.monotonic() < begun + seconds:
            numbers = range(pushed, min(claims, pushed + BATCH))
            _settle(store, [instruction(number) for number in numbers], answered, processes)
            pushed = numbers.stop
            if numbers.start // 10_000 != pushed // 10_000:
                sys.stderr.write(f"{pushed} of {claims} in {time.monotonic() - begun:.0f} s\n")
    finally:
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
    codes = [process.wait(60) for process in processes]
    assert codes == [0] * workers, codes
    store.close()
    found = [np.fromfile(note, _NUMBER) for note in notes]
    times, answered = np.bincount(np.concatenate(found), minlength=pushed), answered[:pushed]
    return Claims(
        pushed=pushed,
        claimed=int(times.sum()),
        answered=int(answered.sum()),
        missing=int((times == 0).sum() + (answered == 0).sum()),
        twice=int((times > 1).sum() + (answered > 1).sum()) + max(0, len(times) - pushed),
        by=tuple(len(one) for one in found),
        seconds=time.monotonic() - begun,
    )


def _settle(
    store: SqlStore, messages: list[Message], answered: np.ndarray, processes: list[subprocess.Popen[bytes]]
) -> None:
    """Push tasks and pull the answers to all of them."""
    waiting = set(store.push(RUN, messages)) | {message.metadata.message_id for message in messages}
    while waiting:
        replies = store.pull(RUN, waiting) if store.arrived(RUN, waiting) else []
        for reply in replies:
            waiting.discard(reply.metadata.reply_to_message_id)
            answered[int(str(reply.content.config_records["c"]["number"]))] += 1
        if not replies:
            assert all(process.poll() is None for process in processes), "a worker has ended"
            time.sleep(0.01)


def main() -> None:
    """Run a campaign, or be one of its workers."""
    if sys.argv[1:2] == ["--work"]:
        work(Path(sys.argv[2]), sys.argv[3] or None, Path(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--claims", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--database", choices=["sqlite", "postgres"], default="sqlite")
    parser.add_argument("--minutes", type=float, default=math.inf, help="Stop after so long [when all are claimed]")
    parser.add_argument("--folder", type=Path, help="Make the files there [default: the system's temporary folder]")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        url = None
        if asked.database == "postgres":
            from proofs_tests.runtime.postgres import server

            url = server().database()
        found = claim(Path(folder), url, asked.claims, asked.workers, 60 * asked.minutes)
    sys.stdout.write(f"{asked.database}: {found.summary()}\n")
    sys.exit(bool(found.twice or found.missing))


if __name__ == "__main__":
    main()
