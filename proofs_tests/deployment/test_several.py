"""Several runs of several apps over one federation, users who sign in elsewhere, and what the audit logs say of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec

from privfed import run_simulation
from privfed.runtime.app_folder import AppFolder
from privfed.runtime.audit_log import verify_log
from privfed.runtime.run_folder import ENDED
from proofs_tests.deployment.identity_provider import bearer_of, place, token
from proofs_tests.deployment.kill_campaign import RANDOMNESS
from proofs_tests.deployment.kill_federation import Federation
from proofs_tests.deployment.small_node import fresh
from proofs_tests.deployment.stateful_app import write_app
from proofs_tests.deployment.superlink_process import SuperLinkProcess
from proofs_tests.deployment.test_roles import Members
from proofs_tests.deployment.waiting import eventually

PLAN = ("epsilon", "delta", "noise-multiplier", "cohort")
SAID = {
    "log-opened": {"key"},
    "superlink-started": {"name", "runs", "insecure"},
    "run-submitted": {"run", "app", "archive", "nodes", "by"},
    "run-attempted": {"run", "attempt", "round", "nodes"},
    "round-committed": {"run", "round", "train-nodes", "train-valid", *(f"plan-{name}" for name in PLAN)},
    "run-ended": {"run", "state", "rounds", "reason"},
    "callers-refused": {"listener", "reason", "count"},
    "node-started": {"version", "superlink", "isolation", "policy"},
    "keys-in-use": {"serial", "roster"},
    "app-approved": {"run", "app", "bundle", "reason"},
    "answered": {"run", "round", "kind", "plan", "masked", "reason"},
}
"""All that the logs hold of such runs: no metric, no value of a model, nothing about a single client's data."""


def test_runs_of_two_apps_share_a_federation_and_each_has_the_bits_of_its_simulation(tmp_path: Path) -> None:
    apps = [write_app(tmp_path / "plain"), write_app(tmp_path / "masked", "masked")]
    asked = [(apps[0], 1), (apps[1], 2), (apps[0], 3)]
    with Federation(tmp_path / "f", RANDOMNESS) as federation:
        eventually(lambda: all("connected" in node.output for node in federation.nodes), 60)
        runs = [federation.submit(app, seed, 6) for app, seed in asked]
        eventually(lambda: all(run.recorded_status.state in ENDED for run in runs), 120, federation.link)
        assert [run.recorded_status.state for run in runs] == ["completed"] * 3, federation.link.output
        logs = [*(tmp_path / "f").glob("data-*/audit/audit.jsonl"), tmp_path / "f" / "home" / "audit.jsonl"]
        assert len(logs) == 4
        for path in logs:
            verify_log(path)
            for raw in path.read_bytes().splitlines():
                line = msgspec.json.decode(raw)
                assert set(line["fields"]) <= SAID.get(line["event"], set()), line
        own = [msgspec.json.decode(raw) for raw in logs[-1].read_bytes().splitlines()]
        rounds = [line["fields"] for line in own if line["event"] == "round-committed"]
        charged = [(one["run"], one["round"]) for one in rounds if "plan-epsilon" in one]
        assert charged == [(runs[1].name, number) for number in range(1, 7)], "and the run without a plan has no charge"
    spans = [(run.recorded_status.started, run.recorded_status.updated) for run in runs]
    assert max(start for start, _ in spans) < min(end for _, end in spans), "they ran side by side"
    for run, (app, seed) in zip(runs, asked, strict=True):
        server, _ = fresh(app)
        _, client = fresh(app)
        config = {**AppFolder.open(app).config, "num-rounds": 6}
        simulated = run_simulation(
            server, client, 3, run_config=config, seed=seed, insecure_test_randomness=RANDOMNESS
        ).checkpoint
        assert run.restore() == simulated


def test_users_who_sign_in_elsewhere_use_the_same_commands(tmp_path: Path) -> None:
    """`--oidc` and `--token-control` from the command line to the audit log; a viewer looks, and does not submit."""
    members = Members(tmp_path / "keys")
    members.join("link", "main")
    (tmp_path / "oidc").mkdir()
    policy = place(tmp_path / "oidc")
    options = ["--oidc", str(policy), "--token-control", "127.0.0.1:0"]
    for name, groups in (("vera", ["staff"]), ("adam", ["admins"])):
        bearer_of(tmp_path / "keys", name, token(groups=groups))

    def say(name: str, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "privfed.cli.main", *words]
        there = ["--superlink", link.addresses["token-control"], "--keys", str(tmp_path / "keys" / name)]
        return subprocess.run([*command, *there], capture_output=True, text=True, check=False, env=dict(os.environ))

    app = str(write_app(tmp_path / "app"))
    with SuperLinkProcess(tmp_path / "home", keys=tmp_path / "keys" / "main", options=options) as link:
        assert say("vera", "ls").returncode == 0
        refused = say("vera", "run", app, "--nodes", "3", "--detach")
        assert refused.returncode != 0
        assert "viewer" in refused.stderr
        submitted = say("adam", "run", app, "--nodes", "3", "--detach", "--format", "json")
        assert submitted.returncode == 0, submitted.stderr
        name = json.loads(submitted.stdout)["run"]
        assert re.search(rf"{name}.*pending", say("vera", "ls").stdout)
        assert say("vera", "stop", name).returncode != 0
        assert say("adam", "stop", name).returncode == 0
        lines = [msgspec.json.decode(raw) for raw in (tmp_path / "home" / "audit.jsonl").read_bytes().splitlines()]
    by = [(line["event"], line["fields"]["by"]) for line in lines if "by" in line["fields"]]
    assert by == [("run-submitted", "user-alice.at.example.org"), ("stop-asked", "user-alice.at.example.org")]
