"""An app that does on request what apps do to the processes they run in; tests write it into a folder and launch it."""

from __future__ import annotations

import hashlib
from pathlib import Path

MANIFEST = """
[project]
name = "odd"
[tool.privfed.app.components]
serverapp = "NAME_server:app"
clientapp = "NAME_client:app"
[tool.privfed.app.config]
rounds = 1
"""

CLIENT = '''
import os, signal, socket, subprocess, sys, time
from pathlib import Path
import numpy as np
from privfed import ArrayRecord, Array, ClientApp, ConfigRecord, Context, Message, MetricRecord, RecordDict

app = ClientApp()


def told(message, **values):
    return Message(RecordDict({"told": ConfigRecord(values)}), reply_to=message)


@app.train()
def count(message, context):
    """Count the messages in the state, and in a file of the node's setting."""
    seen = int(context.state.config_records["n"]["seen"]) + 1 if "n" in context.state else 1
    context.state["n"] = ConfigRecord({"seen": seen})
    context.mod_state("own")["n"] = ConfigRecord({"seen": seen})
    journal = context.node_config.get("journal")
    if journal:
        with Path(journal).open("a") as file:
            file.write(message.metadata.message_id + "\\n")
    time.sleep(float(context.node_config.get("seconds", 0)))
    while "hold" in context.node_config and Path(context.node_config["hold"]).exists():
        time.sleep(0.01)
    arrays = ArrayRecord([np.full(4, seen, np.float32)])
    metrics = MetricRecord({"seen": seen, "pid": os.getpid(), "num-examples": 1})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


class SecretError(Exception):
    pass


@app.query("fail")
def fail(message, context):
    context.state["n"] = ConfigRecord({"seen": 99})
    raise SecretError("patient 4711")


@app.query("leave")
def leave(message, context):
    sys.exit("patient 4711")


@app.query("die")
def die(message, context):
    os.kill(os.getpid(), signal.SIGKILL)


@app.query("sleep")
def sleep(message, context):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(context.node_config["pids"]).write_text(f"{os.getpid()} {child.pid}")
    time.sleep(600)


@app.query("mute")
def mute(message, context):
    return None


@app.query("forge")
def forge(message, context):
    return told(message).with_metadata(reply_to_message_id="another")


@app.query("print")
def say(message, context):
    print("out loud")
    print("and louder", file=sys.stderr)
    return told(message)


@app.query("look")
def look(message, context):
    """Tell what the process can see."""
    hidden = context.node_config.get("hidden", "")
    try:
        seen = ",".join(os.listdir(hidden)) if hidden else ""
    except OSError as fault:
        seen = type(fault).__name__
    try:
        socket.create_connection(("127.0.0.1", int(context.node_config.get("port", 9))), 2).close()
        network = "reached"
    except OSError as fault:
        network = type(fault).__name__
    try:
        with open(f"/proc/{context.node_config.get('parent', 1)}/mem", "rb"):
            traced = "opened"
    except OSError as fault:
        traced = type(fault).__name__
    import resource
    return told(
        message,
        traced=traced,
        environment=",".join(sorted(os.environ)),
        folder=os.getcwd(),
        home=os.environ.get("HOME", ""),
        seen=seen,
        network=network,
        core=resource.getrlimit(resource.RLIMIT_CORE)[1],
        files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        memory=resource.getrlimit(resource.RLIMIT_AS)[1],
        session=os.getsid(0) == os.getpid(),
        identity=context.identity() is not None,
        mods=",".join(sorted(context.mod_states)),
        descriptors=len(os.listdir("/proc/self/fd")),
    )


@app.query("grow")
def grow(message, context):
    block = np.ones(1 << 30, np.uint8)
    return told(message, size=block.nbytes)


@app.query("spin")
def spin(message, context):
    while True:
        pass


@app.query("flood")
def flood(message, context):
    return Message(RecordDict({"a": ArrayRecord([np.zeros(1 << 21, np.uint8)])}), reply_to=message)
'''

SERVER = '''
import os, signal, time
import numpy as np
from privfed import Array, ArrayRecord, ConfigRecord, Message, RecordDict, RunFailed, ServerApp
from privfed.errors import QuorumError, RunStopped
from privfed.grid import Checkpoint

app = ServerApp()


@app.main()
def main(grid, context):
    what = context.run_config.get("what", "rounds")
    return globals()[what](grid, context)


def ask(grid, kind="train", **config):
    content = RecordDict({"q": ConfigRecord(config)})
    return [Message(content, node, kind) for node in grid.get_node_ids()]


def rounds(grid, context):
    """Sum what nodes count, commit every round, and go on from where the run was."""
    found = grid.recorder.restore()
    total = found.arrays["0"].numpy() if found else np.zeros(4, np.float32)
    metrics = list(found.metrics) if found else []
    for number in range(len(metrics) + 1, int(context.run_config["rounds"]) + 1):
        grid.recorder.report("round-start", round=number)
        replies = list(grid.stream(ask(grid, number=number), timeout=60, ordered=True))
        for reply in replies:
            total = total + reply.content.array_records["arrays"]["0"].numpy()
        context.state["n"] = ConfigRecord({"rounds": number})
        metrics.append({"round": number, "epsilon": float("inf"), "seen": {"valid": len(replies)}})
        state = RecordDict({"s": ConfigRecord({"r": number})})
        grid.recorder.commit(Checkpoint(number, ArrayRecord([total]), state, tuple(metrics)))
    return {"rounds": len(metrics), "total": float(total.sum())}


def plain(grid, context):
    return [1, 2.5, "x", None, {"inf": float("inf")}]


def huge(grid, context):
    return "x" * (1 << 24)


def odd(grid, context):
    return object()


def fails(grid, context):
    raise RunFailed("round 2 had no replies")


def quorum(grid, context):
    raise QuorumError(1, 3, "of 5 nodes")


def breaks(grid, context):
    raise KeyError("weights")


def leaves(grid, context):
    raise SystemExit(3)


def stops(grid, context):
    raise RunStopped("stopped after round 1, as asked")


def dies(grid, context):
    os.kill(os.getpid(), signal.SIGKILL)


def dies_in_a_call(grid, context):
    if context.run_config["call"] == "push":
        grid.push_messages(ask(grid, process=os.getpid()))
    else:
        state = RecordDict({"s": ConfigRecord({"process": os.getpid()})})
        grid.recorder.commit(Checkpoint(1, ArrayRecord([np.zeros(4, np.float32)]), state, ({"round": 1},)))


def waits(grid, context):
    ids = grid.push_messages(ask(grid))
    started = time.monotonic()
    arrived = grid.wait(ids, 0.2)
    grid.forget(ids)
    return [arrived, time.monotonic() - started < 5]


def misuses(grid, context):
    try:
        grid.push_messages(ask(grid) * 2)
    except Exception as fault:
        return [type(fault).__name__, str(fault)]


def facts(grid, context):
    recorder = grid.recorder
    return [grid.run_id, grid.seed, context.seed, str(recorder.ledger_path), recorder.insecure_test_randomness,
            list(grid.get_node_ids()), sorted(os.environ)]
'''


def write(folder: Path, *, client: str = CLIENT, server: str = SERVER, name: str = "") -> Path:
    """Write the app into a new folder and return it. name: of its modules; by default other code has another."""
    name = name or "odd_" + hashlib.sha256((client + server).encode()).hexdigest()[:8]
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(MANIFEST.replace("NAME", name))
    (folder / f"{name}_client.py").write_text(client)
    (folder / f"{name}_server.py").write_text(server)
    return folder


ACTIVE_CLIENT = '''
import numpy as np
from privfed import ArrayRecord, ClientApp, Context, Message, MetricRecord, RecordDict
from privfed.mods import clip, secure_aggregation

app = ClientApp(mods=[secure_aggregation(), clip(1.0)])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Move away from where it was, by a vector of the node's own; refuse to work where the node's key is at hand."""
    at_hand = context.identity() is not None or "secure_aggregation" in context.mod_states
    if context.node_config.get("apart") and at_hand:
        raise PermissionError
    moved = message.content["arrays"].map(lambda values: values + context.rng("step").standard_normal(values.shape))
    return Message(RecordDict({"arrays": moved, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)
'''

ACTIVE_SERVER = """
import numpy as np
from privfed import ArrayRecord, SecureStage, ServerApp
from privfed.protocols import SecAgg
from privfed.strategies import FedAvg

app = ServerApp()


@app.main()
def main(grid, context):
    stage = SecureStage(SecAgg(threshold=3, mode="active"), max_value=1.0)
    strategy = FedAvg(stage=stage, fraction_evaluate=0.0)
    strategy.start(grid, ArrayRecord([np.zeros(50)]), num_rounds=int(context.run_config["rounds"]))
"""
