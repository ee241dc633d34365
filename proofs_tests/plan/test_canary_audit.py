"""Empirical audits: a canary in every round, full participation, claimed epsilon 8 at delta 1e-5, bounds at 99.9 %.

Lower bounds assume a Gaussian trade-off [NHB+23]. An honest plan's bound exceeds the claim with probability below
1e-3 a test (about 1e-6 by `power`). With 150 runs a side, a plan whose noise is half of what it claims (mu twice the
claimed) is caught with probability 0.9999.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction

import pytest

from privfed.apps import Mod
from privfed.audit import CanaryAudit, audit_plan
from privfed.audit.canary import power
from privfed.mods import clip, distributed_dp, secure_aggregation
from privfed.plan import AdaptiveClip, PrivacyPlan
from privfed.privacy import mechanisms, share
from privfed.privacy.closed_form import gaussian_mu
from privfed.privacy.correlated import Banded, Tree
from privfed.protocols import SecAgg
from privfed.strategies import SecureStage
from privfed.strategies.stage import PlainStage, Stage

RUNS = 150
CENTRAL = {
    "gaussian": {},
    "replace_one": {"relation": "replace_one"},
    "tree": {"correlation": Tree(), "separation": 2},
    "banded": {"correlation": Banded.square_root(2), "separation": 2},
}
SHARED = {
    "skellam": {"mechanism": "skellam"},
    "skellam with drops": {"mechanism": "skellam", "max_dropped": 2, "max_colluding": 1},
}


def audit(options: dict[str, object], mods: list[Mod], stage: Callable[[], Stage] = PlainStage) -> CanaryAudit:
    plan = PrivacyPlan(clip=1.0, epsilon=8.0, delta=1e-5, **options)  # type: ignore[arg-type]  # of a plan
    return audit_plan(plan, mods=mods, stage=stage, rounds=4, runs=RUNS)


@pytest.fixture
def halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the noise everywhere, as a bug might."""
    honest = mechanisms.gaussian_variance

    def quarter(noise_multiplier: float, steps: float) -> Fraction:
        return honest(noise_multiplier, steps) / 4

    drawn = share.skellam
    monkeypatch.setattr(mechanisms, "gaussian_variance", quarter)
    monkeypatch.setattr(share, "skellam", lambda size, variance, random: drawn(size, variance / 4, random))


def test_the_power_that_is_stated() -> None:
    mu = gaussian_mu(8.0, 1e-5)
    assert power(mu, RUNS, mu) < 1e-5
    assert power(2 * mu, RUNS, mu) > 0.9998


@pytest.mark.parametrize("name", [*CENTRAL, "adaptive"])
def test_central_plans_show_no_more_than_they_claim(name: str) -> None:
    found = audit(CENTRAL.get(name, {"adaptive": AdaptiveClip()}), [clip()])
    assert 7.9 < found.claimed <= 8.0
    assert found.lower <= found.claimed
    assert found.lower > 2.0  # the attack is not a bad one
    assert found.holds


@pytest.mark.usefixtures("halved")
@pytest.mark.parametrize("name", CENTRAL)
def test_half_of_the_central_noise_is_caught(name: str) -> None:
    found = audit(CENTRAL[name], [clip()])
    assert found.claimed <= 8.0
    assert found.lower > found.claimed
    assert not found.holds


def shared(name: str) -> CanaryAudit:
    return audit(SHARED[name], [secure_aggregation(), distributed_dp()], lambda: SecureStage(SecAgg(threshold=6)))


@pytest.mark.long
@pytest.mark.parametrize("name", SHARED)
def test_distributed_plans_show_no_more_than_they_claim(name: str) -> None:
    found = shared(name)
    assert 7.9 < found.claimed <= 8.0
    assert found.holds


@pytest.mark.long
@pytest.mark.usefixtures("halved")
def test_half_of_the_distributed_noise_is_caught() -> None:
    found = shared("skellam")
    assert found.claimed <= 8.0
    assert not found.holds


def test_bad_arguments_are_named() -> None:
    plan = PrivacyPlan(clip=1.0, epsilon=8.0)
    with pytest.raises(ValueError, match="runs"):
        audit_plan(plan, mods=[clip()], runs=1)


def test_the_command_says_what_it_found() -> None:
    from click.testing import CliRunner

    from privfed.cli.audit import audit as command

    done = CliRunner().invoke(command, ["canary", "--runs", "20", "--rounds", "2", "--format", "json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["holds"] is True
    assert 7.9 < found["claimed-epsilon"] <= 8.0
    assert (found["unit"], found["relation"], found["observer"]) == ("client", "add_remove", "output")
