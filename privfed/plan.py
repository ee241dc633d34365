"""The privacy plan of a run: what is protected, against whom, how, and how much may be spent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from privfed.errors import PlanRefused

if TYPE_CHECKING:
    from privfed.privacy.events import Event
    from privfed.privacy.sampling import Sampler


@dataclass(frozen=True, slots=True)
class PrivacyPlan:
    """Client-level central differential privacy: nodes clip, the server adds noise to the sum of their updates.

    clip: the L2 bound C on one node's update, all arrays together. noise_multiplier: standard deviation of the noise
    over C; None: the least that keeps `rounds` rounds (None: the run's) within `epsilon` at `delta`.
    epsilon: the budget; None: spending is recorded and not limited. sampler: who takes part, from
    `privfed.privacy.sampling`; None: whoever is there, with no amplification. population: the public number of nodes;
    None: those connected when the run starts. The sum is divided by the sampler's expected size, a public constant.

    The server that adds the noise sees the sum without it, so observer must be "output": the guarantee is about what
    is released, the models and the metrics, not about the server. Raises ValueError naming the argument, PlanRefused
    for a claim that central noise cannot support.
    """

    clip: float
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float = 1e-5
    rounds: int | None = None
    sampler: Sampler | None = None
    population: int | None = None
    unit: str = "client"
    relation: str = "add_remove"
    observer: str = "output"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.clip) and self.clip > 0):
            raise ValueError(f"clip must be finite and > 0, got {self.clip}")
        if self.noise_multiplier is None and self.epsilon is None:
            raise ValueError("noise_multiplier: give it, or an epsilon to calibrate it to")
        if self.noise_multiplier is not None and not (
            math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0
        ):
            raise ValueError(f"noise_multiplier must be finite and > 0, got {self.noise_multiplier}")
        if self.epsilon is not None and not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise ValueError(f"epsilon must be finite and > 0, got {self.epsilon}")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must be in (0, 1), got {self.delta}")
        for name, count in (("rounds", self.rounds), ("population", self.population)):
            if count is not None and count < 1:
                raise ValueError(f"{name} must be >= 1, got {count}")
        if self.relation not in ("add_remove", "replace_one", "zero_out"):
            raise ValueError(f"relation must be add_remove, replace_one or zero_out, got {self.relation!r}")
        if self.unit != "client":
            raise PlanRefused(f"unit {self.unit!r}: clipping a node's whole update protects clients and nothing else")
        if self.observer != "output":
            raise PlanRefused(
                f"observer {self.observer!r}: the server adds the noise and sees the sum before it, so only observer "
                "'output' is protected"
            )

    @property
    def terms(self) -> dict[str, str]:
        """What every epsilon of this plan is about: unit, relation, observer."""
        return {"unit": self.unit, "relation": self.relation, "observer": self.observer}

    @property
    def cohorts(self) -> Sampler:
        """The sampler in force."""
        if self.sampler is not None:
            return self.sampler
        from privfed.privacy.sampling import AvailabilitySampler

        return AvailabilitySampler()

    def event(self, noise_multiplier: float) -> Event:
        """Return what one round costs; `Central` says that the server, which adds the noise, is not the observer."""
        from privfed.privacy.events import Central, Gaussian

        return self.cohorts.event(Central(Gaussian(noise_multiplier)))

    def resolve(self, num_rounds: int) -> float:
        """Return the noise multiplier for a run of so many rounds, rounded up so that the budget is kept."""
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        if self.epsilon is None:
            raise ValueError("epsilon: needed to calibrate the noise")
        from privfed.privacy.calibration import calibrate

        count = self.rounds if self.rounds is not None else max(1, num_rounds)
        return float(
            calibrate(
                self.event,
                count=count,
                epsilon=self.epsilon,
                delta=self.delta,
                unit=self.unit,
                relation=self.relation,
                observer=self.observer,
            )
        )
