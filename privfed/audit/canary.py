"""Audit a privacy plan by its own runs: does a canary in every round show more than the claimed epsilon allows?

The attacker sees every released model and chooses the canary: in one world a node sends the largest update the plan
lets through, always in the same direction, in the other world what the relation puts in its place. The score is the
matched filter over the releases; under a Gaussian-like plan with full participation no attack is better. From m runs
of each world follows a lower bound on epsilon [NHB+23]. Below the claim it proves nothing new; above it, the noise is
not what was claimed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from privfed.apps import ClientApp, Mod
from privfed.array import Array
from privfed.audit.privacy import epsilon_gdp, mu_lower
from privfed.context import Context
from privfed.grid import Checkpoint, LocalGrid, MemoryRecorder
from privfed.message import Message
from privfed.plan import PrivacyPlan
from privfed.record import ArrayRecord, RecordDict
from privfed.strategies import FedAvg
from privfed.strategies.stage import PlainStage, Stage

Float64s = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class CanaryAudit:
    """What an audit found. claimed: the run's certified epsilon at delta; lower: what the attack shows at the least.

    mu: lower bound in Gaussian terms. scores: of the runs with and without the canary, 1 and 0 on average.
    """

    claimed: float
    lower: float
    mu: float
    delta: float
    significance: float
    runs: int
    scores: tuple[Float64s, Float64s] = field(repr=False)

    @property
    def holds(self) -> bool:
        """Whether the attack shows no more than was claimed."""
        return self.lower <= self.claimed


def audit_plan(
    plan: PrivacyPlan,
    *,
    mods: Sequence[Mod],
    stage: Callable[[], Stage] = PlainStage,
    nodes: int = 10,
    rounds: int = 5,
    dimension: int = 16,
    runs: int = 100,
    significance: float = 1e-3,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CanaryAudit:
    """Run the plan 2 * runs times over `nodes` nodes in this process, half of them with the canary, and compare.

    mods: the ClientApp's, e.g. `[mods.clip()]`. stage: makes the stage of a run. significance: with this probability
    at most the lower bound is above the truth, if the mechanism is Gaussian (a sum of Skellam shares nearly is).
    progress: called with (runs done, runs in all). Raises ValueError for runs < 2 or a plan that draws cohorts.
    """
    if runs < 2:
        raise ValueError(f"runs must be >= 2, got {runs}")
    if plan.sampler is not None:
        raise ValueError("sampler: the audit is of plans with full participation; leave the sampler out")
    away = {"replace_one": -1.0}.get(plan.relation, 0.0)
    setting = _Setting(plan, mods, stage, nodes, rounds, dimension)
    found: tuple[list[float], list[float]] = ([], [])
    claimed = 0.0
    for index in range(2 * runs):
        side = index % 2
        score, epsilon = setting.run(1.0 if side == 0 else away)
        found[side].append((score - away) / (1.0 - away))
        claimed = max(claimed, epsilon)
        progress(index + 1, 2 * runs)
    inside, outside = (np.array(scores) for scores in found)
    lower = epsilon_gdp(inside, outside, threshold=0.5, significance=significance, delta=plan.delta)
    counts = int((outside >= 0.5).sum()), runs, int((inside < 0.5).sum()), runs
    mu = mu_lower(*counts, significance)
    return CanaryAudit(claimed, lower, mu, plan.delta, significance, runs, (inside, outside))


def power(mu: float, runs: int, claimed_mu: float, significance: float = 1e-3) -> float:
    """Return the chance that an audit of so many runs a side finds more than `claimed_mu` in a mechanism of `mu`."""
    from scipy.special import ndtr
    from scipy.stats import binom

    rate = float(ndtr(-mu / 2))
    errors = np.arange(runs + 1)
    chances = binom.pmf(errors, runs, rate)
    likely = errors[chances > 1e-12]
    total = 0.0
    for fp in likely:
        for fn in likely:
            if mu_lower(int(fp), runs, int(fn), runs, significance) > claimed_mu:
                total += float(chances[fp] * chances[fn])
    return total


class _Setting:
    """One plan's runs."""

    def __init__(
        self,
        plan: PrivacyPlan,
        mods: Sequence[Mod],
        stage: Callable[[], Stage],
        nodes: int,
        rounds: int,
        dimension: int,
    ) -> None:
        self._plan, self._mods, self._stage = plan, list(mods), stage
        self._nodes, self._rounds, self._size = nodes, rounds, dimension
        self._direction = np.ones(dimension) / math.sqrt(dimension)
        # When the canary takes part: in every round, or in every turn of its own.
        turns = np.arange(1, rounds + 1) % plan.separation == 1 % plan.separation
        encoder = np.eye(rounds) if plan.correlation is None else plan.correlation.encoder(rounds)
        signal = encoder @ turns.astype(np.float64)
        self._filter = encoder.T @ signal / float(signal @ signal)

    def run(self, strength: float) -> tuple[float, float]:
        """Return the score and the claimed epsilon of a run in which the canary sends strength * (largest update)."""
        app = ClientApp(mods=list(self._mods))
        reach = 1e3 * self._plan.clip * strength

        @app.train()
        def train(message: Message, context: Context) -> Message:
            (name, model), *_ = message.content.array_records.items()
            moved = reach * self._direction if context.node_id == 1 else np.zeros(self._size)
            arrays = ArrayRecord({"w": Array(np.asarray(model["w"].compute() + moved))})
            return Message(RecordDict({name: arrays}), reply_to=message)

        recorder = _Models()
        grid = LocalGrid(app, self._nodes, recorder=recorder)
        strategy = FedAvg(stage=self._stage(), privacy=self._plan, fraction_evaluate=0.0, min_train_nodes=1)
        start = ArrayRecord({"w": Array(np.zeros(self._size))})
        result = strategy.start(grid, start, num_rounds=self._rounds)
        cohort = [float(str(one["cohort"])) for one in recorder.told]
        clips = [float(str(one["clip"])) for one in recorder.told]
        models = np.array([arrays["w"].compute() for arrays in recorder.models])
        seen = np.diff(models, axis=0) @ self._direction * np.array(cohort) / np.array(clips)
        return float(seen @ self._filter), float(result.epsilon or 0.0)


class _Models(MemoryRecorder):
    """Keeps every committed model, as an observer of the releases does."""

    def __init__(self) -> None:
        super().__init__()
        self.models: list[ArrayRecord] = []

    def commit(self, checkpoint: Checkpoint) -> None:
        self.models.append(checkpoint.arrays)
        super().commit(checkpoint)

    @property
    def told(self) -> list[dict[str, object]]:
        """What was said of each round's privacy."""
        metrics = self.checkpoint.metrics if self.checkpoint is not None else ()
        return [dict(one["privacy"]) for one in metrics]  # type: ignore[call-overload]  # a mapping under a plan
