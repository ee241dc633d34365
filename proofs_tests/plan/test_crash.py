"""Whatever is killed when: the ledger is never below what was opened, and a resumed round is paid for once."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privfed.context import Context
from privfed.grid import MemoryRecorder
from privfed.plan import PrivacyPlan
from privfed.privacy.ledger import Ledger
from privfed.protocols import SecAgg
from privfed.strategies import FedAvg, SecureStage
from proofs_tests.plan.network import NONE, Network, app_of, flat, model, update_of

ROOT = Path(__file__).resolve().parents[2]


def test_kill_9_never_leaves_the_ledger_below_what_was_opened(tmp_path: Path) -> None:
    chance = random.Random(7)
    opened = 0
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        command = [sys.executable, "-m", "proofs_tests.plan.killed_run", str(folder)]
        log = folder / "opened.log"
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as child:
            while not (log.exists() and log.stat().st_size) and child.poll() is None:
                time.sleep(0.01)
            time.sleep(chance.random() / 5)
            assert child.poll() is None
            child.kill()
        sessions, charged = log.read_text().splitlines(), Ledger.read(folder / "ledger.jsonl").entries
        assert len(charged) >= len(set(sessions))
        assert len(charged) <= len(set(sessions)) + 1  # and is above by the round that was cut off at most
        opened += len(sessions)
    assert opened >= 5


class Kept(MemoryRecorder):
    """Keeps the session's journal and the ledger in a folder."""

    def __init__(self, folder: Path, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.folder, self.ledger_path = folder, folder / "ledger.jsonl"

    def journal_path(self, name: str) -> Path | None:
        return self.folder / name


@pytest.mark.parametrize("dies", [2, 3])
def test_a_resumed_round_is_paid_for_once(tmp_path: Path, dies: int) -> None:
    nodes, size = 10, 2000
    contexts = {
        node: Context(node_id=node, node_config={"partition-id": node - 1, "num-partitions": nodes})
        for node in range(1, nodes + 1)
    }
    plan = PrivacyPlan(clip=1.0, noise_multiplier=1.5, mechanism="skellam", max_dropped=2)

    def start(recorder: Kept, **arguments: Any) -> Any:
        strategy = FedAvg(stage=SecureStage(SecAgg(threshold=0.6)), privacy=plan, **NONE)
        return strategy.start(Network(app_of(), contexts, recorder=recorder, **arguments), model(size), 1)

    recorder = Kept(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        start(recorder, dies=dies)
    charged = len(Ledger.read(recorder.ledger_path).entries)
    assert charged == (1 if dies == 3 else 0)
    assert recorder.checkpoint is not None
    assert recorder.checkpoint.round == 0
    result = start(Kept(tmp_path, checkpoint=recorder.checkpoint))
    entries = Ledger.read(recorder.ledger_path).entries
    assert len(entries) == 1
    noise = flat(result.arrays) * nodes - sum(update_of(node, size, 1.0) for node in contexts)
    planned = 1.5**2 * nodes / (nodes - 2)
    assert abs(np.mean(noise**2) / planned - 1) < 5.6 * math.sqrt(2 / size)
