"""Empirical audits: a canary in every round, full participation, claimed epsilon 8 at delta 1e-5, bounds at 99.9 %.

Lower bounds assume a Gaussian trade-off [NHB+23]. An honest plan's bound exceeds the claim with probability below
1e-3 a test (about 1e-6 by `power`). With 150 runs a side, a central plan whose noise is half of what it claims (mu
twice the claimed) is caught with probability 0.9999. Noise of the nodes is a little more than its claim, which is a
Renyi bound, so half of it is caught with probability 0.997; where the plan provides for drops and nobody drops there is
more still, and with 1 of 6 dropped and 1 colluding half of it would be caught with 0.48, so that is not asked. The
short test of a distributed plan makes 100 runs a side and claims no power.

That the canary comes through is seen from the mean scores, with and without it: their difference is 1, within 0.6, six
standard errors or more (false alarms below 1e-8).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from fractions import Fraction
from functools import cache

import pytest

from privfed.apps import Mod
from privfed.audit import CanaryAudit, audit_plan
from privfed.audit.canary import power
from privfed.mods import clip, distributed_dp, secure_aggregation
from privfed.plan import AdaptiveClip, PrivacyPlan
from privfed.privacy import mechanisms, share
from privfed.privacy.adaptive import delta_multiplier
from privfed.privacy.closed_form import gaussian_mu
from privfed.privacy.correlated import Banded, Tree
from privfed.privacy.distributed import calibrate_noise
from privfed.protocols import SecAgg
from privfed.strategies import SecureStage
from privfed.strategies.stage import PlainStage, Stage

log = logging.getLogger(__name__)  # shows the figures under --log-cli-level=INFO
RUNS, ROUNDS = 150, 4
ADAPTIVE = AdaptiveClip(bits_stddev=5.0)  # of bits of ten nodes: nearly all of the budget is the update's
CENTRAL: dict[str, dict[str, object]] = {
    "gaussian": {},
    "replace_one": {"relation": "replace_one"},
    "tree": {"correlation": Tree(), "separation": 2},
    "banded": {"correlation": Banded.square_root(2), "separation": 2},
    "adaptive": {"adaptive": ADAPTIVE},
}
DROPS = {"mechanism": "skellam", "max_dropped": 1}
SHARED: dict[str, dict[str, object]] = {
    "skellam": {"mechanism": "skellam"},
    "skellam with drops": {**DROPS, "max_colluding": 1},
    "discrete gaussian": {"mechanism": "discrete_gaussian"},
    "exact drops": {**DROPS, "exact_drops": True},
    "adaptive": {"mechanism": "skellam", "adaptive": ADAPTIVE},
    "exact drops, adaptive": {**DROPS, "exact_drops": True, "adaptive": ADAPTIVE},
}
CAUGHT = [name for name in SHARED if name != "skellam with drops"]  # with half their noise: see above


def audit(options: dict[str, object], mods: list[Mod], stage: Callable[[], Stage] = PlainStage) -> CanaryAudit:
    plan = PrivacyPlan(clip=1.0, epsilon=8.0, delta=1e-5, **options)  # type: ignore[arg-type]  # of a plan
    return audit_plan(plan, mods=mods, stage=stage, rounds=ROUNDS, runs=RUNS)


def comes_through(found: CanaryAudit) -> bool:
    inside, outside = found.scores
    return abs(inside.mean() - outside.mean() - 1) < 0.6


@pytest.fixture
def halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the noise everywhere, as a bug might."""
    honest = mechanisms.gaussian_variance

    def quarter(noise_multiplier: float, steps: float) -> Fraction:
        return honest(noise_multiplier, steps) / 4

    skellam, gaussian = share.skellam, share.discrete_gaussian_variance
    monkeypatch.setattr(mechanisms, "gaussian_variance", quarter)
    monkeypatch.setattr(share, "skellam", lambda size, variance, random: skellam(size, variance / 4, random))
    monkeypatch.setattr(
        share, "discrete_gaussian_variance", lambda variance, size, random: gaussian(variance / 4, size, random)
    )


def test_the_power_that_is_stated() -> None:
    mu = gaussian_mu(8.0, 1e-5)
    assert power(mu, RUNS, mu) < 1e-5
    assert power(2 * mu, RUNS, mu) > 0.9998
    central = math.sqrt(ROUNDS) / mu
    assert power(2 * mu * central / delta_multiplier(central, 5.0), RUNS, mu) > 0.9998  # its bits cost little
    for mechanism in ("skellam", "discrete_gaussian"):
        shared_mu = 1 / calibrated(1, mechanism)
        assert 0.997 < power(2 * shared_mu, RUNS, mu) < 0.998
    assert 0.4 < power(2 * shared_mu * math.sqrt(4 / 6), RUNS, mu) < 0.55


@pytest.mark.parametrize("name", CENTRAL)
def test_central_plans_show_no_more_than_they_claim(name: str) -> None:
    found = audit(CENTRAL[name], [clip()])
    assert 7.9 < found.claimed <= 8.0
    assert found.lower <= found.claimed
    assert comes_through(found)
    assert found.holds


@pytest.mark.usefixtures("halved")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name == "adaptive")) for name in CENTRAL]
)
def test_half_of_the_central_noise_is_caught(name: str) -> None:
    found = audit(CENTRAL[name], [clip()])
    assert found.claimed <= 8.0
    assert found.lower > found.claimed
    assert not found.holds


@cache
def calibrated(rounds: int, mechanism: str, max_dropped: int = 0, max_colluding: int = 0) -> float:
    """Return the noise multiplier of epsilon 8: once, and not in each run."""
    return calibrate_noise(
        epsilon=8.0, delta=1e-5, rounds=rounds, clip=1.0, nodes=6, dimension=16, relation="zero_out",
        mechanism=mechanism, max_dropped=max_dropped, max_colluding=max_colluding,
    ).noise_multiplier  # fmt: skip


def shared(name: str, rounds: int = 2, runs: int = RUNS) -> CanaryAudit:
    terms = {key: value for key, value in SHARED[name].items() if key not in ("adaptive", "exact_drops")}
    plan = PrivacyPlan(clip=1.0, noise_multiplier=calibrated(rounds, **terms), **SHARED[name])  # type: ignore[arg-type]  # of a plan
    found = audit_plan(
        plan,
        mods=[secure_aggregation(), distributed_dp()],
        stage=lambda: SecureStage(SecAgg(threshold=4)),
        nodes=6,
        rounds=rounds,
        runs=runs,
    )
    log.info("%s: %s", name, found)
    return found


def test_a_distributed_plan_shows_no_more_than_it_claims() -> None:
    found = shared("skellam", rounds=1, runs=100)
    assert 7.9 < found.claimed <= 8.0
    assert comes_through(found)
    assert found.holds


@pytest.mark.long
@pytest.mark.parametrize("name", SHARED)
def test_distributed_plans_show_no_more_than_they_claim(name: str) -> None:
    found = shared(name)
    assert 7.9 < found.claimed <= 8.0
    assert comes_through(found)
    assert found.holds


@pytest.mark.long
@pytest.mark.usefixtures("halved")
@pytest.mark.parametrize("name", CAUGHT)
def test_half_of_the_distributed_noise_is_caught(name: str) -> None:
    found = shared(name)
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
