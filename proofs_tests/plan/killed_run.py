"""A run under distributed noise that writes down every sum it is about to open, for a test that kills it.

    python killed_run.py FOLDER

FOLDER gets ledger.jsonl and opened.log, one session number a line, written through before any node is asked to open.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from privfed.grid import MemoryRecorder
from privfed.plan import PrivacyPlan
from privfed.protocols import SecAgg
from privfed.ring import SECURE
from privfed.strategies import FedAvg, SecureStage
from proofs_tests.plan.network import NONE, Network, app_of, model

LAST = 3


class Telling(Network):
    """Notes a session before its last stage is sent."""

    def __init__(self, place: Path, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._log = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._noted: set[int] = set()

    def push_messages(self, messages: Any) -> list[str]:
        batch = list(messages)
        for message in batch:
            head = message.content.config_records[SECURE]
            if head["stage"] == LAST and head["number"] not in self._noted:
                self._noted.add(int(str(head["number"])))
                os.write(self._log, f"{head['number']}\n".encode())
                os.fsync(self._log)
        return super().push_messages(batch)


def main(folder: Path) -> None:
    recorder = MemoryRecorder()
    recorder.ledger_path = folder / "ledger.jsonl"
    plan = PrivacyPlan(clip=1.0, noise_multiplier=2.0, mechanism="skellam", max_dropped=1)
    strategy = FedAvg(stage=SecureStage(SecAgg(threshold=0.6)), privacy=plan, **NONE)
    grid = Telling(folder / "opened.log", app_of(), 5, recorder=recorder)
    strategy.start(grid, model(10), 10_000)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
