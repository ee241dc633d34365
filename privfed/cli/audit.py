"""`privfed audit`: what runs show of a canary, beside what was claimed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from privfed.apps import Mod
    from privfed.plan import PrivacyPlan
    from privfed.strategies.stage import Stage


@click.group()
def audit() -> None:
    """Audit privacy plans by experiment. A passed audit proves nothing; a failed one proves a fault."""


@audit.command()
@click.option("--epsilon", type=float, default=8.0, show_default=True, help="The budget the plan claims to keep.")
@click.option("--delta", type=float, default=1e-5, show_default=True)
@click.option("--clip", type=float, default=1.0, show_default=True, help="L2 bound on a node's update.")
@click.option("--mechanism", type=click.Choice(["gaussian", "skellam", "discrete_gaussian"]), default="gaussian")
@click.option("--relation", type=click.Choice(["add_remove", "replace_one", "zero_out"]), help="[default: the plan's]")
@click.option("--nodes", type=click.IntRange(2), default=10, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option(
    "--runs", type=click.IntRange(2), default=150, show_default=True, help="With the canary; as many without."
)
@click.option("--significance", type=float, default=1e-3, show_default=True, help="Chance of a false alarm, at most.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
def canary(
    epsilon: float,
    delta: float,
    clip: float,
    mechanism: str,
    relation: str | None,
    nodes: int,
    rounds: int,
    runs: int,
    significance: float,
    form: str,
) -> None:
    """Run a plan many times, with a canary in every round and without; bound what an observer could have learned.

    Every run takes all nodes. Exit code 3: the attack shows more than was claimed.
    """
    from privfed.audit.canary import audit_plan, power
    from privfed.privacy.closed_form import gaussian_mu

    plan, mods, stage = _setting(epsilon, delta, clip, mechanism, relation, nodes)
    found = audit_plan(
        plan,
        mods=mods,
        stage=stage,
        nodes=nodes,
        rounds=rounds,
        runs=runs,
        significance=significance,
        progress=_progress,
    )
    mu = gaussian_mu(found.claimed, delta)
    facts = {
        "claimed-epsilon": found.claimed,
        "shown-epsilon": found.lower,
        "delta": delta,
        **plan.terms,
        "runs": 2 * runs,
        "significance": significance,
        "power-at-half-the-noise": power(2 * mu, runs, mu, significance),
        "holds": found.holds,
    }
    if form == "json":
        click.echo(json.dumps(facts))
    else:
        for name, value in facts.items():
            click.echo(f"{name:<24} {value:.4g}" if isinstance(value, float) else f"{name:<24} {value}")
    if not found.holds:
        raise click.exceptions.Exit(3)


def _setting(
    epsilon: float, delta: float, clip: float, mechanism: str, relation: str | None, nodes: int
) -> tuple[PrivacyPlan, list[Mod], Callable[[], Stage]]:
    from privfed import mods
    from privfed.plan import PrivacyPlan
    from privfed.protocols import SecAgg
    from privfed.strategies import PlainStage, SecureStage

    plan = PrivacyPlan(clip=clip, epsilon=epsilon, delta=delta, mechanism=mechanism, relation=relation or "")
    if not plan.distributed:
        return plan, [mods.clip()], PlainStage
    threshold = nodes // 2 + 1
    return plan, [mods.secure_aggregation(), mods.distributed_dp()], lambda: SecureStage(SecAgg(threshold=threshold))


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty() and (done % 10 == 0 or done == total):
        click.echo(f"\r{done} of {total} runs", nl=done == total, err=True)
