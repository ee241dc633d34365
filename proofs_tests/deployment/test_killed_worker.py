"""An app's process that is killed by anybody while it is at work is replaced."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

from privfed import Context, Message, RecordDict
from privfed.runtime.confinement import Limits
from privfed.runtime.launcher import ProcessLauncher
from proofs_tests.deployment import odd_app
from proofs_tests.deployment.waiting import eventually


def test_a_worker_killed_from_outside_is_replaced_and_its_message_answered(tmp_path: Path) -> None:
    """What was asked is asked again of a process with the same state: no failure, no gap, nothing counted twice."""
    made, journal, hold = (
        ProcessLauncher(tmp_path / "w", Limits(writable=(str(tmp_path),))),
        tmp_path / "journal",
        tmp_path / "hold",
    )
    context = Context(node_id=1, node_config={"journal": str(journal), "hold": str(hold)})
    ask = Message(RecordDict(), 1, "train")
    worker = made.client(odd_app.write(tmp_path / "app"), tmp_path / "log.txt")
    first = worker.execute(ask, context).content.metric_records["metrics"]["pid"]
    hold.touch()

    def kill() -> None:
        """Kill it while it holds the second message; its successor is held until then."""
        eventually(lambda: len(journal.read_text().split()) == 2)
        os.kill(int(str(first)), signal.SIGKILL)
        hold.unlink()

    killer = threading.Thread(target=kill)
    killer.start()
    again = worker.execute(ask, context).content.metric_records["metrics"]
    killer.join()
    assert again["pid"] != first
    assert again["seen"] == 2
    worker.close()
    made.close()
