"""A node's policy file: what it may say, and how approvals are written into it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from privfed.runtime.policy import TEMPLATE, NodePolicy, Outward, PolicyError, approve_in_file

DIGEST = "ab" * 32


def test_the_default_runs_nothing_and_the_template_is_valid(tmp_path: Path) -> None:
    policy = NodePolicy()
    assert policy.apps.bundles == policy.apps.signers == ()
    path = tmp_path / "policy.toml"
    path.write_text(TEMPLATE)
    strict = NodePolicy.load(path)
    assert strict.secure_aggregation.required
    assert strict.privacy.max_epsilon_per_run == 8.0
    assert strict.privacy.observer == "server"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[app]\n", "app"),
        ("[apps]\nsigner = []\n", "signer"),
        ('[apps]\nbundles = "x"\n', "apps.bundles"),
        ("[privacy]\nmax-epsilon-per-run = -1.0\n", "max-epsilon-per-run must be"),
        ("[privacy]\nmax-epsilon-per-run = nan\n", "max-epsilon-per-run must be"),
        ("[privacy]\ndelta = 1.0\n", "delta must be"),
        ('[privacy]\nplans = ["centrall"]\n', "centrall"),
        ("[privacy]\nmin-cohort = 0\n", "min-cohort must be"),
        ("[secure-aggregation]\ncorrupt = 1.0\n", "corrupt must be"),
        ("[limits]\ntask-seconds = 0\n", "task-seconds must be"),
        ("[mods]\nclip = inf\n", "clip must be"),
        ("[apps\n", "line 1"),
    ],
)
def test_a_bad_policy_names_the_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(PolicyError, match=message) as refusal:
        NodePolicy.load(path)
    assert str(path) in str(refusal.value)


def test_a_missing_policy_says_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="privfed policy new"):
        NodePolicy.load(tmp_path / "policy.toml")


@pytest.mark.parametrize(
    "before",
    [
        "",
        TEMPLATE,
        '[apps]\nsigners = ["user-a"]\n',
        f'# mine\n[apps]\nbundles = [ "{"cd" * 32}" ]  # one\n[privacy]\ndelta = 1e-6\n',
        "[apps]\nbundles = [\n]\n",
        "[privacy]\ndelta = 1e-6\n[mods]\nclip = 2.0",
    ],
)
def test_an_approval_changes_nothing_else(tmp_path: Path, before: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(before)
    held = NodePolicy.load(path)
    assert approve_in_file(path, DIGEST)
    assert not approve_in_file(path, DIGEST)
    after = NodePolicy.load(path)
    assert set(after.apps.bundles) == {*held.apps.bundles, DIGEST}
    assert after.apps.signers == held.apps.signers
    assert (after.privacy, after.mods, after.limits) == (held.privacy, held.mods, held.limits)
    for line in before.splitlines():
        if line.strip().startswith("#"):
            assert line in path.read_text()


def test_an_approval_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("apps = { bundles = [] }\n")
    before = path.read_text()
    with pytest.raises(PolicyError, match="by hand"):
        approve_in_file(path, DIGEST)
    assert path.read_text() == before
    assert tomllib.loads(before)


def test_names_that_may_not_leave_are_named() -> None:
    outward = Outward(records=("arrays", "metrics"), metrics=("loss*",))
    assert outward.foreign(["arrays", "privfed.secure.reply"], ["loss", "loss-2"]) == []
    assert outward.foreign(["arrays", "rows"], ["age"]) == ["rows", "age"]
