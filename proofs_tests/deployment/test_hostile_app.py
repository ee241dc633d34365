"""An approved app that means harm, in a node and in a SuperLink of their own: what it cannot reach, read or change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from privfed.runtime.confinement import Limits, confine
from privfed.runtime.control import ControlClient, Submission
from privfed.runtime.federation import open_app
from privfed.runtime.run_folder import ENDED, RunFolder
from proofs_tests.deployment import odd_app
from proofs_tests.deployment.kill_federation import Federation
from proofs_tests.deployment.local_link import EXAMPLES
from proofs_tests.deployment.waiting import eventually

TRY = '''
import json, os, socket, signal


def attempt(act):
    try:
        return act() or "done"
    except Exception as fault:
        return type(fault).__name__


def attempts(wanted):
    """Try to read, list, change, move and connect to what was named; tell what worked."""
    found = {}
    for path in wanted["read"]:
        found["read " + path] = attempt(lambda: open(path, "rb").read(1).hex())
    for path in wanted["list"]:
        found["list " + path] = attempt(lambda: ",".join(sorted(os.listdir(path))))
    for path in wanted["write"]:
        found["write " + path] = attempt(lambda: open(path, "ab").write(b"# changed") and None)
    for path in wanted["move"]:
        found["move " + path] = attempt(lambda: os.rename(path, path + ".gone"))
    for path in wanted["connect"]:
        def reach():
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stream:
                stream.connect(path)
        found["connect " + path] = attempt(reach)
    return found
'''
CLIENT = f"""{TRY}
from privfed import ClientApp, ConfigRecord, Message, RecordDict

app = ClientApp()


@app.query("try")
def harm(message, context):
    found = attempts(json.loads(message.content["q"]["wanted"]))
    return Message(RecordDict({{"told": ConfigRecord({{"found": json.dumps(found)}})}}), reply_to=message)
"""
SERVER = f"""{TRY}
from privfed import ConfigRecord, Message, RecordDict, ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    wanted = json.loads(context.run_config["wanted"])
    found = {{"link": attempts(wanted["link"])}}
    nodes = dict(zip("abc", sorted(grid.get_node_ids())))
    for name in "ac":
        content = RecordDict({{"q": ConfigRecord({{"wanted": json.dumps(wanted[name])}})}})
        (reply,) = grid.send_and_receive([Message(content, nodes[name], "query.try")], timeout=60)
        found[name] = json.loads(reply.content["told"]["found"])
    grid.recorder.report("query", found=json.dumps(found))
"""


def confined() -> bool:
    """Whether this system gives a process namespaces and read-only mounts."""
    pid = os.fork()
    if pid == 0:  # pragma: no cover - another process
        try:
            told = confine(Limits())
            os._exit(0 if "network: isolated" in told and "all else: read-only" in told else 1)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def wanted(place: Path, other_run: str) -> dict[str, dict[str, list[str]]]:
    """Return what the app tries at the SuperLink, at a node that starts apps itself, and at one with a superexec."""

    def paths(*names: str) -> list[str]:
        return [str(place / name) for name in names]

    def at_node(name: str) -> dict[str, list[str]]:
        data, keys = f"data-{name}", f"keys-{name}"
        kept = (f"{data}/state/node.db", f"{data}/audit/audit.jsonl", f"{data}/exec.token", f"{keys}/identity.key")
        return {
            "read": paths(*kept, f"{keys}/key.pem"),
            "list": paths(keys, f"{data}/state", f"{data}/log", f"{data}/work"),
            "write": paths("policy.toml", f"{data}/policy.toml", f"{keys}/roster.json", *kept),
            "move": paths(data, keys, "policy.toml"),
            "connect": paths(f"{data}/exec.sock"),
        }

    link = {
        "read": paths("home/link.db", "home/audit.key", "home/nodes.json", f"home/runs/{other_run}/config.json"),
        "list": paths("keys-main", "home/bundles", "home/arrays", f"home/runs/{other_run}"),
        "write": paths("home/audit.jsonl", "keys-main/roster.json", "home/link.db"),
        "move": paths("home", "keys-main"),
        "connect": [],
    }
    return {"link": link, "a": at_node("a"), "c": at_node("c")}


def test_an_approved_app_reaches_nothing_but_its_own(tmp_path: Path) -> None:
    if not confined():
        pytest.skip("this system gives processes no namespaces: nodes say so, and apps should run as another user")
    place = tmp_path / "f"
    app = odd_app.write(tmp_path / "app", client=CLIENT, server=SERVER)
    manifest = app / "pyproject.toml"
    manifest.write_text(manifest.read_text().replace("rounds = 1", 'wanted = ""'))
    with Federation(place, None) as federation, ControlClient(federation.control, federation.user) as control:
        other = control.submit(Submission(open_app(EXAMPLES / "minimal", federation.user), {}, seed=1, nodes=3)).name
        eventually(lambda: control.show(other).state in ENDED)
        tried = wanted(place, other)
        settings = {"wanted": json.dumps(tried)}
        before = {name: (place / name).read_bytes() for name in ("policy.toml", "keys-main/roster.json")}
        run = control.submit(Submission(open_app(app, federation.user), settings, nodes=3)).name
        eventually(lambda: control.show(run).state in ENDED, 60)
        assert control.show(run).state == "completed", (control.show(run), federation.nodes[0].output)
        (told,) = RunFolder.open(place / "home" / "runs" / run).operations
        found = json.loads(told["found"])
        for where, acts in tried.items():
            assert len(found[where]) == sum(map(len, acts.values()))
            for act, came in found[where].items():
                if act.startswith("list"):  # what is covered is empty, but for the app's own
                    assert came.endswith("Error") or came == "done" or (came.startswith("app-") and "," not in came), (
                        act
                    )
                else:
                    assert came.endswith("Error"), f"{where}: {act}: {came}"
        assert before == {name: (place / name).read_bytes() for name in before}
        assert (place / "home" / "link.db").exists() and (place / "data-a" / "state" / "node.db").exists()


ESCAPE = """
import ctypes, os, sys
from pathlib import Path
from privfed.runtime.confinement import Limits, confine

hidden = sys.argv[1]
confine(Limits(hidden=(hidden,)))
libc = ctypes.CDLL(None, use_errno=True)
again = libc.unshare(0x10000000 | 0x20000)  # a user and a mount namespace below the one it is in: it is root there
tried = [libc.umount2(os.fsencode(hidden), 2), libc.mount(None, b"/", None, (1 << 5) | (1 << 12), None)]
tried.append(libc.mount(None, os.fsencode(hidden), None, (1 << 5) | (1 << 12), None))
print(again, tried, os.listdir(hidden))
try:
    Path(hidden).with_name("changed").write_text("x")
except OSError as fault:
    print(type(fault).__name__)
"""


def test_what_is_covered_and_read_only_stays_so_in_a_namespace_below(tmp_path: Path) -> None:
    """A process may always make a user namespace and be root in it; its covers and its read-only mounts come along."""
    if not confined():
        pytest.skip("this system gives processes no namespaces")
    hidden = tmp_path / "hidden"
    (tmp_path / "home").mkdir()
    hidden.mkdir()
    (hidden / "identity.key").write_text("secret")
    told = subprocess.run(
        [sys.executable, "-P", "-c", ESCAPE, str(hidden)], cwd=tmp_path / "home", capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    first, second = told.stdout.splitlines()
    assert first in ("0 [-1, -1, -1] []", "-1 [-1, -1, -1] []")
    assert second == "OSError"
    assert not (tmp_path / "changed").exists()
