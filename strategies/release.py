"""The release of a round under a privacy plan: authorise, draw, charge, and only then noise or unmask, in order."""

from __future__ import annotations

import hashlib
import hmac
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np

from privfed.context import derived_rng
from privfed.distributed import Instruction
from privfed.errors import PlanRefused, RunFailed
from privfed.failpoint import around
from privfed.grid import Grid, Recorder
from privfed.plan import PrivacyPlan, joint_clip, tracked
from privfed.privacy.events import Event
from privfed.privacy.filters import Budget, BudgetExceeded
from privfed.privacy.ledger import Ledger, LedgerError, Terms
from privfed.privacy.mechanisms import LatticeSum
from privfed.privacy.sampling import AvailabilitySampler, Sampler
from privfed.record import ArrayRecord, ConfigRecord
from privfed.strategies.exchange import Exchange, SharedNoise
from privfed.strategies.view import Float64s, RandomBytes, Sum, Unreleased, Updates
from privfed.update import dimension

Seen = Sum | Updates | Unreleased | None

_KEPT: WeakKeyDictionary[Recorder, Ledger] = WeakKeyDictionary()
"""Ledgers of runs that write no file: all that a run releases is charged to one of them, whoever releases it."""


def open_release(
    plan: PrivacyPlan, grid: Grid, model: ArrayRecord, population: int, num_rounds: int, *, purpose: str = "train"
) -> CentralRelease | SharedRelease:
    """Return the release that a plan asks for. population: the nodes connected, unless the plan says how many.

    All releases of a run share its ledger, so they must be under the same terms: PlanRefused otherwise. purpose: of
    what is released, "train" or "query"; the charges of each are told apart.
    """
    if plan.correlation is not None:
        from privfed.strategies.correlated import MatrixRelease

        return MatrixRelease(plan, grid, model, population, num_rounds, purpose)
    kind = SharedRelease if plan.distributed else CentralRelease
    return kind(plan, grid, model, population, num_rounds, purpose)


class Release(ABC):
    """Spend a plan's budget, round by round.

    With `insecure_test_randomness` cohorts and noise come from that seed, and every epsilon is infinite.
    """

    event: Event
    noise_multiplier: float
    sampler: Sampler
    _noised: Float64s | None = None

    def __init__(
        self, plan: PrivacyPlan, grid: Grid, model: ArrayRecord, population: int, num_rounds: int, purpose: str
    ) -> None:
        self.size = dimension(model)
        if self.size == 0:
            raise ValueError("the arrays hold no elements, so there is nothing a privacy plan could protect")
        self.plan = plan
        self.population = plan.population if plan.population is not None else population
        self.denominator = plan.cohorts.expected_size(self.population)
        if not self.denominator > 0:
            raise PlanRefused("sampler: its expected cohort is empty, so the sum has no denominator")
        self.seed = grid.recorder.insecure_test_randomness
        self.resolve(num_rounds)
        adaptive, self.clip = plan.adaptive, plan.clip
        # Over the clip, and so the same in every round: with it, a round is one event whatever the clip.
        self._relative_weight = adaptive.bit_weight(self.noise_multiplier, self.denominator) if adaptive else 0.0
        self.run = str(grid.run_id) if purpose == "train" else f"{grid.run_id}.{purpose}"
        self._ledger = None if self.seed is not None else self._open(grid)

    @abstractmethod
    def resolve(self, num_rounds: int) -> None:
        """Set the event, the noise multiplier and the sampler of every round."""

    @abstractmethod
    def instruction(self, server_round: int) -> ConfigRecord:
        """Return what the nodes are told of the plan."""

    @abstractmethod
    def prepare(self, exchange: Exchange) -> Exchange:
        """Return the exchange with what the stage must know of the plan."""

    @abstractmethod
    def charge(self, server_round: int, view: Seen) -> dict[str, object]:
        """See that the round is charged, and only then noised; return what may be said. view None: nobody was asked."""

    @property
    @abstractmethod
    def stddev(self) -> float:
        """Standard deviation of the noise on each element of the sum, at most."""

    def view(self) -> Sum:
        """Return the released mean: the noised sum over the public cohort size."""
        if self._noised is None:
            raise RuntimeError("nothing has been charged in this round")
        mean, self._noised = self._noised, None
        return Sum(mean, self.denominator)

    @property
    def bit_weight(self) -> float:
        """Weight of the bit beside an update; 0 unless the clip adapts."""
        return self._relative_weight * self.clip

    def state(self) -> ConfigRecord:
        """Return what a resumed run must know."""
        return ConfigRecord({"population": self.population, "clip": float(self.clip)})

    def restore(self, state: ConfigRecord) -> None:
        """Take up the clip where a run was interrupted."""
        self.clip = float(str(state.get("clip", self.clip)))

    def _keep(self, mean: Float64s) -> dict[str, object]:
        """Keep the noised mean; where the clip adapts, take the bits off and let it follow them."""
        said: dict[str, object] = {"clip": self.clip}
        adaptive = self.plan.adaptive
        if adaptive is not None:
            mean, bits = mean[:-1], float(mean[-1]) / self.bit_weight
            said["within-clip"] = bits + 0.5
            self.clip = adaptive.moved(self.clip, bits + 0.5)
        self._noised = mean
        return said

    def _open(self, grid: Grid) -> Ledger:
        plan, path = self.plan, grid.recorder.ledger_path
        budget = Budget(plan.epsilon if plan.epsilon is not None else float("inf"), plan.delta)
        terms = Terms(f"run {grid.run_id}", budget, plan.unit, plan.relation, plan.observer)
        if path is None:
            ledger = _KEPT.setdefault(grid.recorder, Ledger.create(None, terms))
            if ledger.terms != terms:
                raise PlanRefused(f"the privacy ledger of this run was started under {ledger.terms}, not {terms}")
            return ledger
        try:
            return Ledger.resume(path, terms)
        except LedgerError as cause:
            raise PlanRefused(f"the privacy ledger of this run cannot be charged: {cause}") from cause

    def close(self) -> None:
        """Close the ledger's file."""
        if self._ledger is not None and self._ledger.path is not None:
            self._ledger.close()

    def authorise(self, server_round: int) -> None:
        """Refuse the round, before anything is sent, when the budget does not cover it."""
        if self._ledger is None:
            return
        after = self._ledger.preview(self.event)
        if not after <= self._ledger.limit:
            refusal = BudgetExceeded(
                self._ledger.terms.owner, self._ledger.spent, after, self._ledger.limit, self._ledger.measure
            )
            raise RunFailed(f"round {server_round} was not started: {refusal}") from refusal

    def draw(self, nodes: Sequence[int], server_round: int) -> tuple[int, ...]:
        """Draw a private cohort."""
        try:
            return tuple(self.sampler.sample(nodes, self.random("cohort", server_round)))
        except ValueError as cause:
            raise RunFailed(f"round {server_round}: no cohort could be drawn: {cause}") from cause

    def pay(self, server_round: int, transcript: str) -> float:
        """Charge the ledger for a round; return the epsilon spent so far."""
        if self._ledger is None:
            return float("inf")
        try:
            with around("charge"):
                entry = self._ledger.charge(self.event, run=self.run, round=server_round, transcript=transcript)
        except BudgetExceeded as refusal:
            raise RunFailed(f"round {server_round} was not released: {refusal}") from refusal
        return entry.spent

    def said(self, epsilon: float) -> dict[str, object]:
        """Return what may be said of a round: all of it is public."""
        return {
            "epsilon": epsilon,
            "delta": self.plan.delta,
            **self.plan.terms,
            "noise-multiplier": self.noise_multiplier,
            "cohort": self.denominator,
            "budget": self.plan.epsilon if self.plan.epsilon is not None else "none",
        }

    def random(self, purpose: str, server_round: int) -> RandomBytes:
        """Return the source of a purpose's randomness: the operating system, but in a test that asks for a seed."""
        if self.seed is None:
            return os.urandom
        return derived_rng(self.seed, "insecure", purpose, server_round).bytes


class CentralRelease(Release):
    """The server adds the noise."""

    @property
    def stddev(self) -> float:
        """Standard deviation of the noise on each element of the sum."""
        return self.noise_multiplier * joint_clip(self.clip, self.bit_weight)

    def resolve(self, num_rounds: int) -> None:
        self.noise_multiplier = self.plan.resolve(num_rounds)
        self.event, self.sampler = self.plan.event(self.noise_multiplier), self.plan.cohorts

    def instruction(self, server_round: int) -> ConfigRecord:
        instruction = ConfigRecord({"mechanism": self.plan.mechanism})
        instruction["clip"] = float(self.clip)
        instruction["event"] = self.event.to_json()  # what a round costs, for nodes that keep a ledger of their own
        instruction["insecure"] = self.seed is not None
        if self.bit_weight:
            instruction["bit-weight"] = self.bit_weight
        instruction.update(self.plan.terms)
        return instruction

    def prepare(self, exchange: Exchange) -> Exchange:
        model = tracked(exchange.model, self.bit_weight)
        return replace(exchange, model=model, clip=joint_clip(self.clip, self.bit_weight))

    def charge(self, server_round: int, view: Seen) -> dict[str, object]:
        transcript = hashlib.sha256(f"{self.run}:{server_round}:".encode() + os.urandom(32)).hexdigest()
        epsilon = self.pay(server_round, transcript)
        random = self.random("noise", server_round)
        if isinstance(view, Unreleased):
            noised = view.release(self.noise_multiplier, random)
        else:
            size = self.size + (self.plan.adaptive is not None)
            nobody = LatticeSum(size, sensitivity=joint_clip(self.clip, self.bit_weight))
            noised = nobody.release(noise_multiplier=self.noise_multiplier, random=random)[0]
        return self.said(epsilon) | self._keep(np.asarray(noised / self.denominator))


class SharedRelease(Release):
    """The nodes add the noise; the round is charged before the sum is unmasked."""

    _paid: tuple[int, float] | None = None
    _seed: bytes = b""
    _rotation: bytes = b""

    @property
    def stddev(self) -> float:
        """Standard deviation of the noise on each element of the sum, at most: that of every planned node's."""
        scale = joint_clip(self.clip, self.bit_weight) if self.bit_weight else 1.0
        return self.parameters.local_stddev * math.sqrt(self.parameters.nodes) * scale

    def resolve(self, num_rounds: int) -> None:
        sampler, nodes = self.plan.cohorts, round(self.denominator)
        # Whoever is there, but never more than the noise was planned for.
        self.sampler = AvailabilitySampler(nodes) if isinstance(sampler, AvailabilitySampler) else sampler
        self.parameters = self.plan.parameters(nodes, self.size, num_rounds)
        self.noise_multiplier = self.parameters.noise_multiplier
        self.event = self.parameters.event  # a secret cohort saves nothing here: see PrivacyPlan.parameters
        self._rotation = self.random("rotation", 0)(32)

    def state(self) -> ConfigRecord:
        """Return what a resumed run must know."""
        state = super().state()
        state["rotation"] = self._rotation
        return state

    def restore(self, state: ConfigRecord) -> None:
        """Take up clip and seed where a run was interrupted."""
        super().restore(state)
        rotation = state.get("rotation")
        self._rotation = rotation if isinstance(rotation, bytes) else self._rotation

    def draw(self, nodes: Sequence[int], server_round: int) -> tuple[int, ...]:
        """Draw a cohort, or refuse one that cannot add enough noise."""
        cohort, asked = super().draw(nodes, server_round), self.parameters
        if len(cohort) < asked.least_survivors:
            raise RunFailed(
                f"round {server_round} was not started: {len(cohort)} nodes are there, and the plan needs the noise of "
                f"{asked.least_survivors} of {asked.nodes}"
            )
        return cohort

    def instruction(self, server_round: int) -> ConfigRecord:
        # Nobody knows it before the round: whether a coordinate wraps is chance only if updates do not depend on it. A
        # resumed run gives the same, and so finishes the session that a crash cut off.
        self._seed = hmac.digest(self._rotation, server_round.to_bytes(8, "big"), "sha256")
        return Instruction(
            self.parameters,
            self._seed,
            **self.plan.terms,
            insecure=self.seed is not None,
            clip=self.clip,
            bit_weight=self.bit_weight,
        ).to_config()

    def prepare(self, exchange: Exchange) -> Exchange:
        noise = SharedNoise(self.parameters, self._seed, self.denominator, partial(self._pay, exchange.round))
        return replace(exchange, noise=noise, clip=self.clip)

    def _pay(self, server_round: int, session: bytes) -> None:
        transcript = hashlib.sha256(f"{self.run}:{server_round}:".encode() + session).hexdigest()
        self._paid = server_round, self.pay(server_round, transcript)

    def charge(self, server_round: int, view: Seen) -> dict[str, object]:
        if self._paid is None or self._paid[0] != server_round or not isinstance(view, Sum):
            raise RuntimeError(f"round {server_round}: the stage opened no sum that was charged before")
        asked, mean = self.parameters, view.mean
        if self.bit_weight:
            mean *= joint_clip(self.clip, self.bit_weight)  # what nodes sent is over the joint bound
        return {
            **self.said(self._paid[1]),
            **self._keep(mean),
            "mechanism": self.plan.mechanism,
            "max-dropped": asked.max_dropped,
            "max-colluding": asked.max_colluding,
            "bits": asked.bits,
            "wrap-probability": asked.wrap_probability,
        }
