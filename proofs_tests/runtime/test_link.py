"""The Link under threads: nobody misses a wake-up, every reply counts once, and the store does not matter."""

from __future__ import annotations

import functools
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from privfed import (
    Array,
    ArrayRecord,
    ClientApp,
    ConfigRecord,
    Context,
    ErrorCode,
    Message,
    MetricRecord,
    RecordDict,
    run_simulation,
)
from privfed.runtime import link as link_module
from privfed.runtime.engine import Assignment, ThreadEngine, execute
from privfed.runtime.link import Link, LinkGrid
from privfed.runtime.run_folder import RunFolder
from privfed.runtime.store import Lease, NodeState, StoreError
from privfed.runtime.transport import MemoryTransport
from proofs_tests.runtime.store_case import EPOCH, NAMES, RUN, STORES, close, ids, instruction


@pytest.fixture(params=NAMES)
def link(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Link]:
    # Whoever is not woken sleeps longer than any test waits.
    monkeypatch.setattr(link_module, "MAX_WAIT", 1e4)
    found = Link(STORES[request.param](tmp_path))
    found.create_run(RUN, range(1, 5))
    found.set_run_state(RUN, "running")
    yield found
    close(found.store)


def now(node: int, **options: float) -> Message:
    return instruction(node, at=time.time(), **options)


def worker_app() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        kept = context.state.array_records.get("kept")
        before = kept["w"].view() if kept is not None else np.zeros(20_000)
        drawn = before + context.rng("train", str(message.content.config_records["c"]["mark"])).standard_normal(20_000)
        context.state["kept"] = ArrayRecord({"w": Array(drawn)})
        return Message(
            RecordDict({"a": context.state["kept"], "m": MetricRecord({"sum": drawn.sum()})}), reply_to=message
        )

    return app


def engine(link: Link, threads: int) -> ThreadEngine:
    assignment = Assignment(lambda node: {"partition-id": node - 1}, {}, seed=3)
    run = functools.partial(execute, worker_app(), assignment=assignment, log=lambda message, fault: None)
    return ThreadEngine(MemoryTransport(link), run, threads, link.close)


def test_the_store_and_the_threads_do_not_change_a_bit(tmp_path: Path) -> None:
    totals = set()
    for name, threads in (("memory", 1), ("memory", 3), ("sqlite", 2)):
        link = Link(STORES[name](tmp_path / f"{name}{threads}"))
        link.create_run(RUN, range(1, 5))
        link.set_run_state(RUN, "running")
        workers = engine(link, threads)
        workers.start()
        grid, total = LinkGrid(link, RUN), np.zeros(20_000)
        for mark in range(2):
            sent = [instruction(node, at=time.time(), mark=mark) for node in grid.get_node_ids()]
            for reply in grid.stream(sent, timeout=60, window=3, ordered=True):
                total += reply.content.array_records["a"]["w"].view()
        link.set_run_state(RUN, "completed")
        link.close()
        assert workers.stop()
        close(link.store)
        totals.add(total.tobytes())
    assert len(totals) == 1


def test_waiting_ends_with_a_reply_a_timeout_or_the_run(link: Link) -> None:
    message = now(1)
    link.push(RUN, [message])
    started = time.monotonic()
    assert not link.wait(RUN, ids(message), 0.05)
    assert not link.wait(RUN, ids(message), 0)
    assert time.monotonic() - started < 5

    def reply() -> None:
        lease = link.lease(10)
        assert lease is not None
        link.complete(lease, Message(RecordDict(), reply_to=message), None)

    thread = threading.Thread(target=reply)
    thread.start()
    assert link.wait(RUN, ids(message), 30)
    thread.join()
    assert link.lease(0.01) is None
    link.push(RUN, [now(2)])
    threading.Timer(0.05, lambda: link.set_run_state(RUN, "stopped", "asked")).start()
    with pytest.raises(StoreError, match="has ended"):
        link.wait(RUN, ["never"], None)


def test_closing_releases_everybody(link: Link) -> None:
    found: list[Lease | None] = []
    threads = [threading.Thread(target=lambda: found.append(link.lease(None))) for _ in range(3)]
    for thread in threads:
        thread.start()
    threading.Timer(0.05, link.close).start()
    with pytest.raises(StoreError, match="has ended"):
        link.wait(RUN, ["never"], 60)
    for thread in threads:
        thread.join(10)
    assert found == [None] * 3


def test_a_wait_wakes_when_its_message_expires(link: Link) -> None:
    message = now(1, ttl=0.2)
    link.push(RUN, [message])
    started = time.monotonic()
    assert link.wait(RUN, ids(message), 60)
    assert 0.1 < time.monotonic() - started < 5
    assert link.pull(RUN, ids(message))[0].has_error()


@pytest.mark.parametrize("name", NAMES)
def test_a_reply_past_its_time_does_not_count_even_when_nobody_has_looked(name: str, tmp_path: Path) -> None:
    clock = [EPOCH]
    link = Link(STORES[name](tmp_path), clock=lambda: clock[0])
    link.create_run(RUN, [1])
    link.set_run_state(RUN, "running")
    message = instruction(1, ttl=10)
    link.push(RUN, [message])
    lease = link.lease(5)
    assert lease is not None
    clock[0] += 10
    assert not link.complete(lease, Message(RecordDict(), reply_to=message), NodeState())
    assert link.pull(RUN, ids(message))[0].error.code == ErrorCode.MESSAGE_UNAVAILABLE
    close(link.store)


def test_workers_that_vanish_or_dawdle_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    link = Link(STORES["memory"](tmp_path), lease_seconds=0.02)
    link.create_run(RUN, range(1, 21))
    link.set_run_state(RUN, "running")
    accepted: list[str] = []

    def work(seed: int) -> None:
        choose = random.Random(seed)
        while (lease := link.lease(None)) is not None:
            if choose.random() < 0.3:
                continue  # the worker vanishes
            if choose.random() < 0.1:
                time.sleep(0.04)
            count = lease.state.app.config_records.get("n", ConfigRecord({"count": 0}))["count"]
            new = NodeState(RecordDict({"n": ConfigRecord({"count": int(str(count)) + 1})}))
            if link.complete(lease, Message(RecordDict(), reply_to=lease.message), new):
                accepted.append(lease.message.metadata.message_id)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    sent = [now(node, mark=mark) for mark in range(5) for node in range(1, 21)]
    replies = list(LinkGrid(link, RUN).stream(sent, timeout=60))
    states = link.states(RUN)
    link.close()
    for thread in threads:
        thread.join(10)
    assert len(replies) == 100
    assert len({reply.metadata.reply_to_message_id for reply in replies}) == 100
    assert sorted(accepted) == sorted(ids(*sent))
    assert {node: state.app.config_records["n"]["count"] for node, state in states.items()} == dict.fromkeys(
        range(1, 21), 5
    )


def test_a_million_nodes_cost_nothing_until_they_are_asked() -> None:
    configured = []

    def node_config(node: int) -> dict[str, int]:
        configured.append(node)
        return {}

    def main(grid: LinkGrid, context: Context) -> int:
        nodes = grid.get_node_ids()
        sent = [Message(RecordDict({"c": ConfigRecord({"mark": 0})}), nodes[place], "train") for place in (0, -1)]
        return len(grid.send_and_receive(sent, timeout=60)) + len(nodes)

    assert run_simulation(main, worker_app(), 1_000_000, seed=1, node_config=node_config).result == 1_000_002
    assert set(configured) == {0, 999_999}


def test_traffic_counts_both_ways(link: Link) -> None:
    array = ArrayRecord({"w": Array(np.zeros(100))})
    message = Message(RecordDict({"a": array}), 1, "train")
    unknown = Message(RecordDict(), 9, "train")
    link.push(RUN, [message, unknown])
    lease = link.lease(5)
    assert lease is not None
    link.complete(lease, Message(RecordDict({"a": array}), reply_to=message), None)
    link.pull(RUN, ids(message, unknown))
    traffic = link.traffic(RUN)
    assert (traffic.messages_down, traffic.messages_up, traffic.bytes_down, traffic.bytes_up) == (2, 1, 800, 800)
    assert traffic.errors == {"error 5 (unknown node)": 1}


SCRIPT = """
import sys, time
import numpy as np
import privfed as pf
from privfed.grid import Checkpoint
client = pf.ClientApp()
@client.train()
def train(message, context):
    number = message.content["c"]["round"]
    kept = context.state["k"]["v"].view() if "k" in context.state else np.zeros(3)
    context.state["k"] = pf.ArrayRecord({"v": pf.Array(kept + context.rng("t", number).standard_normal(3))})
    time.sleep(0.005)
    return pf.Message(pf.RecordDict({"a": context.state["k"]}), reply_to=message)
def main(grid, context):
    found = grid.recorder.restore()
    weights = found.arrays["w"].view() if found else np.zeros(3)
    for number in range(found.round + 1 if found else 1, 15):
        content = pf.RecordDict({"c": pf.ConfigRecord({"round": number})})
        sent = [pf.Message(content, node, "train") for node in grid.get_node_ids()]
        for reply in grid.stream(sent, timeout=60, ordered=True):
            weights = weights + reply.content["a"]["v"].view()
        metrics = tuple({"round": one} for one in range(1, number + 1))
        grid.recorder.commit(Checkpoint(number, pf.ArrayRecord({"w": pf.Array(weights)}), metrics=metrics))
        print(number, flush=True)
run = pf.run_simulation(main, client, 3, seed=8, run_dir=sys.argv[1], resume=sys.argv[2] == "resume")
print(run.arrays["w"].digest.hex())
"""


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_process_leaves_a_run_that_resumes_to_the_same_bits(tmp_path: Path, kind: signal.Signals) -> None:
    def start(name: str, mode: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path / name), mode]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)

    with start("whole", "new") as whole, start("broken", "new") as broken:
        assert broken.stdout is not None
        for line in broken.stdout:
            if line.strip() == "3":
                break
        broken.send_signal(kind)
        broken.communicate(timeout=60)
        expected = whole.communicate(timeout=60)[0].splitlines()[-1]
    assert whole.returncode == 0
    assert broken.returncode != 0
    folder = RunFolder.open(tmp_path / "broken")
    assert folder.status.state == ("stopped" if kind == signal.SIGINT else "failed")
    committed = folder.restore()
    assert committed is not None
    assert 3 <= committed.round < 14
    with start("broken", "resume") as resumed:
        output = resumed.communicate(timeout=60)[0].splitlines()
    assert resumed.returncode == 0
    assert output[-1] == expected
    assert output[0] == str(committed.round + 1)
