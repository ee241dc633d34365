"""The command line as a new user types it: real processes, a home of its own, and messages a person can act on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Shell:
    """Runs `privfed` with its own home."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.env = {**os.environ, "PRIVFED_HOME": str(self.home), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "privfed.cli.main", *words]

    def __call__(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*words),
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == code, f"{words}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def runs(self) -> list[dict[str, object]]:
        rows = json.loads(self("ls", "--format", "json").stdout)
        assert isinstance(rows, list)
        return rows


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


@pytest.fixture
def slow_app(tmp_path: Path) -> Path:
    """An app whose rounds take a while, whose nodes keep state, and whose clients may be told to fail."""
    folder = tmp_path / "slow"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "slow"\n[tool.privfed.app.components]\nserverapp = "slow_app:server"\n'
        'clientapp = "slow_app:client"\n[tool.privfed.app.config]\nnum-rounds = 6\npause = 0.0\nfail = false\n'
        "[tool.privfed.app.simulation]\nnodes = 4\n"
    )
    (folder / "slow_app.py").write_text(
        "import time\nimport numpy as np\n"
        "from privfed import ArrayRecord, ClientApp, Message, MetricRecord, RecordDict, ServerApp\n"
        "from privfed.strategies import FedAvg\n"
        "client, server = ClientApp(), ServerApp()\n"
        "@client.train()\n"
        "def train(message, context):\n"
        "    time.sleep(context.run_config['pause'])\n"
        "    if context.run_config['fail']:\n"
        "        raise RuntimeError('secret text of a node')\n"
        "    seen = int(context.state.get('seen', MetricRecord({'n': 0}))['n']) + 1\n"
        "    context.state['seen'] = MetricRecord({'n': seen})\n"
        "    round_ = message.content['config']['server-round']\n"
        "    weights = message.content['arrays'].to_numpy_ndarrays()[0]\n"
        "    weights += seen * context.rng('train', round_).normal(size=weights.shape)\n"
        "    metrics = MetricRecord({'num-examples': context.node_id, 'seen': seen})\n"
        "    return Message(RecordDict({'arrays': ArrayRecord([weights]), 'metrics': metrics}), reply_to=message)\n"
        "@server.main()\n"
        "def main(grid, context):\n"
        "    rounds = context.run_config['num-rounds']\n"
        "    FedAvg(fraction_evaluate=0.0).start(grid, ArrayRecord([np.zeros(5)]), num_rounds=rounds)\n"
    )
    return folder


def last_model(shell: Shell, name: str) -> bytes:
    from privfed.runtime.run_folder import RunFolder

    checkpoint = RunFolder.open(shell.home / "runs" / name).restore()
    assert checkpoint is not None
    return b"".join(bytes(array.data) for array in checkpoint.arrays.values())


def test_version_and_help(shell: Shell) -> None:
    assert shell("--version").stdout.startswith("privfed, version ")
    text = shell("--help").stdout
    for name in ("new", "run", "ls", "log", "stop", "report", "privacy"):
        assert name in text
        assert "Usage" in shell(name, "--help").stdout


@pytest.mark.parametrize("template", ["numpy", "sklearn"])
def test_new_app_runs_as_it_is(shell: Shell, template: str) -> None:
    shell("new", "my-app", "--template", template)
    out = shell("run", "my-app", "--nodes", "5", "-c", "num-rounds=2", "--seed", "3").stdout
    assert "round 2" in out
    assert "completed after 2 rounds" in out
    (row,) = shell.runs()
    assert (row["state"], row["round"], row["app"]) == ("completed", 2, "my-app")
    folder = shell.home / "runs" / str(row["run"])
    assert folder.stat().st_mode & 0o777 == 0o700
    for name in ("format", "config.json", "versions.json", "status.json", "metrics.jsonl", "log.txt"):
        assert (folder / name).is_file(), name
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert "round-end" in shell("log", str(row["run"])[:12]).stdout
    page = Path(shell("report", str(row["run"])).stdout.strip()).read_text()
    assert page.startswith("<!doctype html>")
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")


def test_json_lines(shell: Shell, slow_app: Path) -> None:
    lines = [json.loads(line) for line in shell("run", str(slow_app), "--format", "json").stdout.splitlines()]
    assert lines[0]["event"] == "run"
    assert lines[-1] == {**lines[-1], "event": "ended", "state": "completed", "rounds": 6}


@pytest.mark.parametrize(
    ("edit", "words", "message"),
    [
        (lambda text: text.replace("num-rounds = 6", "num-rounds = ="), (), "pyproject.toml cannot be read"),
        (lambda text: text.replace("serverapp =", "severapp ="), (), "did you mean 'serverapp'?"),
        (lambda text: text.replace("slow_app:server", "slow_app:sever"), (), "did you mean 'server'?"),
        (lambda text: text.replace("slow_app:server", "slow_ap:server"), (), "cannot be imported: ModuleNotFoundError"),
        (lambda text: text.replace("slow_app:server", "slow_app"), (), '"module:attribute"'),
        (
            lambda text: text.replace("[tool.privfed.app.config]", "[tool.privfed.app.confg]"),
            (),
            "did you mean 'config'?",
        ),
        (lambda text: text, ("-c", "num-round=3"), "did you mean 'num-rounds'?"),
        (lambda text: text, ("-c", "num-rounds=many"), "must be a int"),
        (lambda text: text, ("-c", "num-rounds"), "write -c key=value"),
    ],
)
def test_mistakes_get_one_clear_message(
    shell: Shell, slow_app: Path, edit: Callable[[str], str], words: tuple[str, ...], message: str
) -> None:
    manifest = slow_app / "pyproject.toml"
    manifest.write_text(edit(manifest.read_text()))
    done = shell("run", str(slow_app), *words, code=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_debug_shows_the_traceback(shell: Shell, slow_app: Path) -> None:
    (slow_app / "slow_app.py").write_text("import nothing_of_that_name\n")
    assert "Traceback" not in shell("run", str(slow_app), code=2).stderr
    assert "Traceback" in shell("run", str(slow_app), "--debug", code=1).stderr


def test_all_clients_failing_fails_the_run(shell: Shell, slow_app: Path) -> None:
    done = shell("run", str(slow_app), "-c", "fail=true", code=1)
    assert "the run failed" in done.stderr
    assert "RuntimeError" in done.stderr
    assert "secret text" not in done.stderr
    (row,) = shell.runs()
    assert row["state"] == "failed"
    assert "valid replies" in str(row["reason"])
    assert "secret text of a node" in shell("log", str(row["run"])).stdout


def interrupted(shell: Shell, app: Path, how: signal.Signals) -> str:
    """Start a run, interrupt it after two rounds, and return its name."""
    process = subprocess.Popen(
        shell.command("run", str(app), "--seed", "7", "-c", "pause=0.15"),
        cwd=shell.folder,
        env=shell.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while not process.stdout.readline().startswith("round 2"):
        assert process.poll() is None
    process.send_signal(how)
    process.communicate(timeout=60)
    assert process.returncode != 0
    (row,) = shell.runs()
    assert int(str(row["round"])) >= 2
    return str(row["run"])


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_run_resumes_to_the_same_bits(shell: Shell, slow_app: Path, how: signal.Signals) -> None:
    name = interrupted(shell, slow_app, how)
    assert shell.runs()[0]["state"] == ("stopped" if how == signal.SIGINT else "failed")
    out = shell("run", "--resume", name).stdout
    assert "round 6" in out
    assert "round 1 " not in out
    other = Shell(shell.folder / "other")
    other.folder.mkdir()
    other("run", str(slow_app), "--seed", "7", "--threads", "1")
    assert last_model(shell, name) == last_model(other, str(other.runs()[0]["run"]))


def test_resume_refuses_what_makes_no_sense(shell: Shell, slow_app: Path) -> None:
    shell("run", str(slow_app))
    name = str(shell.runs()[0]["run"])
    assert "nothing left to do" in shell("run", "--resume", name, code=2).stderr
    assert "there is no run" in shell("run", "--resume", "nope", code=2).stderr
    assert "give none of them" in shell("run", str(slow_app), "--resume", name, code=2).stderr


def test_detached_run_is_followed_and_stopped(shell: Shell, slow_app: Path) -> None:
    name = shell("run", str(slow_app), "--detach", "-c", "pause=0.1", "-c", "num-rounds=500").stdout.strip()
    deadline = time.monotonic() + 60
    while not any(int(str(row["round"])) >= 1 for row in shell.runs()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert "running" in shell("ls").stdout
    assert "stopped" in shell("stop", name).stdout
    (row,) = shell.runs()
    assert row["state"] == "stopped"
    assert 1 <= int(str(row["round"])) < 500
    assert "as asked" in shell("log", name, "--follow").stdout
