"""The release of a round under a privacy plan: authorise, draw, charge, then add noise, in this order."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

import numpy as np

from privfed.context import derived_rng
from privfed.errors import PlanRefused, RunFailed
from privfed.grid import Grid
from privfed.plan import PrivacyPlan
from privfed.privacy.filters import Budget, BudgetExceeded
from privfed.privacy.ledger import Ledger, LedgerError, Terms
from privfed.privacy.mechanisms import LatticeSum
from privfed.record import ArrayRecord, ConfigRecord
from privfed.strategies.view import Float64s, RandomBytes, Sum, Unreleased
from privfed.update import dimension


class Release:
    """Spend a plan's budget, round by round. population: the public number of nodes.

    With `insecure_test_randomness` cohorts and noise come from that seed, and every epsilon is infinite.
    """

    def __init__(self, plan: PrivacyPlan, grid: Grid, model: ArrayRecord, population: int, num_rounds: int) -> None:
        self._size = dimension(model)
        if self._size == 0:
            raise ValueError("initial_arrays hold no elements, so there is nothing a privacy plan could protect")
        self.plan = plan
        self.population = plan.population if plan.population is not None else population
        self.denominator = plan.cohorts.expected_size(self.population)
        if not self.denominator > 0:
            raise PlanRefused("sampler: its expected cohort is empty, so the sum has no denominator")
        self.noise_multiplier = plan.resolve(num_rounds)
        self._run = str(grid.run_id)
        self._seed = grid.recorder.insecure_test_randomness
        self._ledger = None if self._seed is not None else self._open(grid)
        self._noised: Float64s | None = None

    def _open(self, grid: Grid) -> Ledger:
        plan, path = self.plan, grid.recorder.ledger_path
        budget = Budget(plan.epsilon if plan.epsilon is not None else float("inf"), plan.delta)
        terms = Terms(f"run {self._run}", budget, plan.unit, plan.relation, plan.observer)
        if path is None:
            return Ledger.create(None, terms)
        try:
            return Ledger.resume(path, terms)
        except LedgerError as cause:
            raise PlanRefused(f"the privacy ledger of this run cannot be charged: {cause}") from cause

    def close(self) -> None:
        """Close the ledger."""
        if self._ledger is not None:
            self._ledger.close()

    def authorise(self, server_round: int) -> None:
        """Refuse the round, before anything is sent, when the budget does not cover it."""
        if self._ledger is None:
            return
        after = self._ledger.preview(self.plan.event(self.noise_multiplier))
        if not after <= self._ledger.limit:
            refusal = BudgetExceeded(
                self._ledger.terms.owner, self._ledger.spent, after, self._ledger.limit, self._ledger.measure
            )
            raise RunFailed(f"round {server_round} was not started: {refusal}") from refusal

    def draw(self, nodes: Sequence[int], server_round: int) -> tuple[int, ...]:
        """Draw a private cohort."""
        try:
            return tuple(self.plan.cohorts.sample(nodes, self._random("cohort", server_round)))
        except ValueError as cause:
            raise RunFailed(f"round {server_round}: no cohort could be drawn: {cause}") from cause

    def instruction(self) -> ConfigRecord:
        """Return what the nodes are told of the plan."""
        instruction = ConfigRecord({"clip": float(self.plan.clip)})
        instruction.update(self.plan.terms)
        return instruction

    def charge(self, server_round: int, view: Unreleased | None) -> dict[str, object]:
        """Charge the ledger, only then add the noise; return what may be said about it. view None: an empty cohort."""
        epsilon = float("inf")
        if self._ledger is not None:
            transcript = hashlib.sha256(f"{self._run}:{server_round}:".encode() + os.urandom(32)).hexdigest()
            event = self.plan.event(self.noise_multiplier)
            epsilon = self._ledger.charge(event, run=self._run, round=server_round, transcript=transcript).spent
        random = self._random("noise", server_round)
        if view is None:
            nobody = LatticeSum(self._size, sensitivity=self.plan.clip)
            self._noised = nobody.release(noise_multiplier=self.noise_multiplier, random=random)[0]
        else:
            self._noised = view.release(self.noise_multiplier, random)
        return {
            "epsilon": epsilon,
            "delta": self.plan.delta,
            **self.plan.terms,
            "clip": self.plan.clip,
            "noise-multiplier": self.noise_multiplier,
            "cohort": self.denominator,
            "budget": self.plan.epsilon if self.plan.epsilon is not None else "none",
        }

    def view(self) -> Sum:
        """Return the released mean: the noised sum over the public cohort size."""
        if self._noised is None:
            raise RuntimeError("nothing has been charged in this round")
        mean, self._noised = self._noised, None
        return Sum(np.asarray(mean / self.denominator), self.denominator)

    def _random(self, purpose: str, server_round: int) -> RandomBytes:
        if self._seed is None:
            return os.urandom
        return derived_rng(self._seed, "insecure", purpose, server_round).bytes
