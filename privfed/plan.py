"""The privacy plan of a run: what is protected, against whom, how, and how much may be spent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from privfed.array import Array
from privfed.errors import PlanRefused
from privfed.record import ArrayRecord

if TYPE_CHECKING:
    from privfed.privacy.correlated import Correlation
    from privfed.privacy.distributed import NoiseParameters
    from privfed.privacy.events import Event
    from privfed.privacy.sampling import Sampler

_MOST_CLIP = 2.0**40
CENTRAL, SKELLAM, DISCRETE_GAUSSIAN = "gaussian", "skellam", "discrete_gaussian"
SHARED = (SKELLAM, DISCRETE_GAUSSIAN)
"""Mechanisms in which every node adds a share of the noise; in the central one the server adds it."""
BIT = "privfed.clip-bit"
"""In an update under adaptive clipping: one more element, plus or minus half the plan's "bit-weight"."""


@dataclass(frozen=True, slots=True)
class AdaptiveClip:
    """Let the clip follow a quantile of the norms of the nodes' updates [ATMR21].

    Beside its update every node sends one noised bit: whether its norm is within the clip. After each round the clip is
    multiplied by exp(-learning_rate * (share within - quantile)). bits_stddev: standard deviation of the noise on the
    sum of bits, which are +-1/2; None: a twentieth of the cohort, or the noise multiplier if that is more. The budget
    pays for both together: they are one vector with one L2 bound, so that a round costs the same whatever the clip.
    """

    quantile: float = 0.5
    learning_rate: float = 0.2
    bits_stddev: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.quantile < 1:
            raise ValueError(f"quantile must be in (0, 1), got {self.quantile}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate must be finite and > 0, got {self.learning_rate}")
        if self.bits_stddev is not None and not (math.isfinite(self.bits_stddev) and self.bits_stddev > 0):
            raise ValueError(f"bits_stddev must be finite and > 0, or None, got {self.bits_stddev}")

    def bit_weight(self, noise_multiplier: float, cohort: float) -> float:
        """Return the bit's weight over the clip, so that noise for the joint bound is `bits_stddev` on the bits.

        Raises PlanRefused when the bits alone would spend more than `noise_multiplier` allows.
        """
        from privfed.privacy.adaptive import delta_multiplier

        given = self.bits_stddev
        stddev = given if given is not None else max(cohort / 20, noise_multiplier)
        try:
            return delta_multiplier(noise_multiplier, stddev) / stddev
        except ValueError as cause:
            raise PlanRefused(f"adaptive: {cause}; use more noise on the bits, or leave bits_stddev out") from cause

    def moved(self, clip: float, within: float) -> float:
        """Return the next clip from this one and the noised share of norms within it."""
        step = self.learning_rate * (min(1.0, max(0.0, within)) - self.quantile)
        return min(_MOST_CLIP, max(1 / _MOST_CLIP, clip * math.exp(-step)))


def joint_clip(clip: float, bit_weight: float) -> float:
    """Return the L2 bound on an update and its bit together."""
    return math.hypot(clip, bit_weight / 2) if bit_weight else clip


def tracked(model: ArrayRecord, bit_weight: float) -> ArrayRecord:
    """Return the model as updates look like it: with one more element where they carry a bit."""
    if not bit_weight:
        return model
    return ArrayRecord({**model, BIT: Array(np.zeros(()))})


@dataclass(frozen=True, slots=True)
class PrivacyPlan:
    """Client-level differential privacy: nodes clip, and the sum of their updates is noised before anybody uses it.

    clip: the L2 bound C on one node's update, all arrays together. noise_multiplier: standard deviation of the noise
    over C; None: the least that keeps `rounds` rounds (None: the run's) within `epsilon` at `delta`.
    epsilon: the budget; None: spending is recorded and not limited. sampler: who takes part, from
    `privfed.privacy.sampling`; None: whoever is there, with no amplification. population: the public number of nodes;
    None: those connected when the run starts. The sum is divided by the sampler's expected size, a public constant.

    mechanism: who adds the noise.

    - "gaussian": the server, which sees the sum without it. So observer must be "output" (the default): the guarantee
      is about what is released, the models and the metrics. relation: "add_remove" unless said otherwise.
    - "skellam" or "discrete_gaussian": every node adds a share before its update is masked, under a SecureStage.
      observer is "server" unless said otherwise, and relation "zero_out", because a node that is not there adds no
      noise either. max_dropped, max_colluding: nodes of a cohort, counts or shares of it, that may be missing from the
      sum, or tell the observer their noise; the noise of the others is the planned one. bits: the sum is taken modulo
      2^bits, and wraps in a round with at most `wrap_probability`. exact_drops: survivors give away the part of their
      noise that only more drops would have needed [Jiang+24], so that the sum has little more than planned; "skellam"
      only, and the server draws those parts again.

    correlation: how central noise is correlated over the rounds of a run (`privfed.privacy.correlated`: `Tree()`,
    `Banded(...)`); None: not at all. `noise_multiplier` is then of the whole run: standard deviation over C times the
    encoder's sensitivity. The run's length is fixed when it begins (`rounds`, or the run's). separation: under
    correlation, rounds from one participation of a node to the next, at least; nodes take turns accordingly.

    adaptive: None, or how the clip changes from round to round; `clip` is then that of the first.

    Raises ValueError naming the argument, PlanRefused for a claim that the mechanism cannot support.
    """

    clip: float
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float = 1e-5
    rounds: int | None = None
    sampler: Sampler | None = None
    population: int | None = None
    unit: str = "client"
    relation: str = ""
    observer: str = ""
    mechanism: str = CENTRAL
    max_dropped: int | float = 0
    max_colluding: int | float = 0
    bits: int = 20
    wrap_probability: float = 1e-6
    adaptive: AdaptiveClip | None = None
    correlation: Correlation | None = None
    separation: int = 1
    exact_drops: bool = False

    def __post_init__(self) -> None:
        self._check_numbers()
        if self.mechanism not in (CENTRAL, *SHARED):
            raise ValueError(f"mechanism must be {CENTRAL}, {' or '.join(SHARED)}, got {self.mechanism!r}")
        for name, default in (
            ("relation", "zero_out" if self.distributed else "add_remove"),
            ("observer", "server" if self.distributed else "output"),
        ):
            if not getattr(self, name):
                object.__setattr__(self, name, default)
        if self.relation not in ("add_remove", "replace_one", "zero_out"):
            raise ValueError(f"relation must be add_remove, replace_one or zero_out, got {self.relation!r}")
        if self.observer not in ("output", "server"):
            raise PlanRefused(f"observer {self.observer!r}: a plan speaks of 'output' or 'server'")
        if self.unit != "client":
            raise PlanRefused(f"unit {self.unit!r}: clipping a node's whole update protects clients and nothing else")
        self._check_correlation()
        if self.distributed:
            self._check_distributed()
        else:
            self._check_central()

    def _check_numbers(self) -> None:
        if not (math.isfinite(self.clip) and self.clip > 0):
            raise ValueError(f"clip must be finite and > 0, got {self.clip}")
        if self.noise_multiplier is None and self.epsilon is None:
            raise ValueError("noise_multiplier: give it, or an epsilon to calibrate it to")
        for name in ("noise_multiplier", "epsilon"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and > 0, got {value}")
        for name in ("delta", "wrap_probability"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be in (0, 1), got {getattr(self, name)}")
        for name, count in (("rounds", self.rounds), ("population", self.population)):
            if count is not None and count < 1:
                raise ValueError(f"{name} must be >= 1, got {count}")

    def _check_central(self) -> None:
        if self.observer != "output":
            raise PlanRefused(
                f"observer {self.observer!r}: the server adds the noise and sees the sum before it, so only observer "
                "'output' is protected; mechanism='skellam' protects from the server"
            )
        if self.max_dropped or self.max_colluding or self.exact_drops:
            raise PlanRefused(
                "max_dropped, max_colluding, exact_drops: the server adds all of the noise, whoever is missing; they "
                "belong to mechanism='skellam'"
            )

    def _check_correlation(self) -> None:
        if self.separation < 1:
            raise ValueError(f"separation must be >= 1, got {self.separation}")
        if self.correlation is None:
            if self.separation != 1:
                raise ValueError("separation: without a correlation it changes nothing; leave it out")
            return
        if self.distributed:
            raise PlanRefused("correlation: nodes would have to know each other's noise of earlier rounds")
        if self.sampler is not None:
            raise PlanRefused("sampler: under correlated noise nodes take turns, and nothing is amplified by chance")
        if self.adaptive is not None:
            raise PlanRefused("adaptive: noise of earlier rounds was scaled to another clip; give one clip")

    def _check_distributed(self) -> None:
        from privfed.privacy.sampling import PoissonSampler

        for name in ("max_dropped", "max_colluding"):
            value = getattr(self, name)
            if not (value >= 0 and (isinstance(value, int) or value < 1)):
                raise ValueError(f"{name} must be a count >= 0 or a share of the cohort in [0, 1), got {value}")
        if self.exact_drops and self.mechanism != SKELLAM:
            raise PlanRefused(
                f"exact_drops: its parts are too small for {self.mechanism} noise; use mechanism='skellam'"
            )
        if self.relation == "add_remove":
            raise PlanRefused(
                "relation 'add_remove': a node that is not there adds no noise either, so the two worlds differ by "
                "more than its update; use 'zero_out' or 'replace_one'"
            )
        if isinstance(self.sampler, PoissonSampler):
            raise PlanRefused(
                "sampler: the cohort's size sets each node's share of the noise, and PoissonSampler draws it; use "
                "FixedSizeSampler or AvailabilitySampler"
            )

    @property
    def distributed(self) -> bool:
        """Whether the nodes add the noise."""
        return self.mechanism != CENTRAL

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
        """Return what a round of central noise costs; `Central` says that the server, which adds it, is no observer."""
        from privfed.privacy.events import Central, Gaussian

        return self.cohorts.event(Central(Gaussian(noise_multiplier)))

    def resolve(self, num_rounds: int) -> float:
        """Return central noise's multiplier for a run of so many rounds, rounded up so that the budget is kept."""
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        if self.epsilon is None:
            raise ValueError("epsilon: needed to calibrate the noise")
        from privfed.privacy.calibration import calibrate

        terms: dict[str, Any] = {**self.terms}
        count = self._count(num_rounds)
        return float(calibrate(self.event, count=count, epsilon=self.epsilon, delta=self.delta, **terms))

    def parameters(self, nodes: int, dimension: int, num_rounds: int) -> NoiseParameters:
        """Return what a round of `nodes` nodes agrees on under distributed noise.

        dimension: elements of an update, its bit not counted. Under adaptive clipping all of it is for vectors divided
        by the round's joint bound, so their clip is 1. No amplification by sampling is claimed: the server knows the
        cohort, and against others nothing is proved for this noise. Raises PlanRefused, with numbers and what would
        do, for a cohort, a ring or a budget that cannot be served.
        """
        from privfed.privacy import distributed

        dropped = _share(self.max_dropped, nodes)
        levels = sorted({-(-dropped * part // 3) for part in range(4)}) if self.exact_drops and dropped else []
        shared: dict[str, Any] = {
            "clip": self.clip if self.adaptive is None else 1.0,
            "nodes": nodes,
            "dimension": dimension + (self.adaptive is not None),
            "bits": self.bits,
            "max_dropped": dropped,
            "max_colluding": _share(self.max_colluding, nodes),
            "wrap_probability": self.wrap_probability,
            "mechanism": self.mechanism,
            "drop_levels": tuple(levels),
        }
        try:
            if self.noise_multiplier is not None:
                return distributed.solve_noise(noise_multiplier=self.noise_multiplier, **shared)
            shared |= {"epsilon": self.epsilon, "delta": self.delta, "rounds": self._count(num_rounds), **self.terms}
            return distributed.calibrate_noise(**shared)
        except ValueError as cause:
            raise PlanRefused(f"the plan does not suit {nodes} nodes and {dimension} elements: {cause}") from cause

    def _count(self, num_rounds: int) -> int:
        if self.correlation is not None:
            return 1  # the run is one event
        return self.rounds if self.rounds is not None else max(1, num_rounds)


def _share(part: int | float, nodes: int) -> int:
    """Return how many nodes: a count, or a share rounded up, since both are what a plan must withstand."""
    return part if isinstance(part, int) else math.ceil(part * nodes * (1 - 2.0**-40))
