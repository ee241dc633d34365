"""What the server tells every node of a round of distributed noise, and what a node accepts of it.

The instruction travels as the ConfigRecord `privfed.plan` of the training message, the same for every node, and so is
part of what a secure-aggregation session is bound to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.errors import PlanRefused
from privfed.plan import SHARED, joint_clip
from privfed.privacy.accountant import Accountant
from privfed.privacy.distributed import NoiseParameters
from privfed.privacy.events import event_from_json
from privfed.record import ConfigRecord, ConfigValue

_FLOATS = {"clip": "clip", "noise-multiplier": "noise_multiplier", "scale": "scale", "beta": "beta"}
_COUNTS = {
    "nodes": "nodes", "dimension": "dimension", "bits": "bits", "max-dropped": "max_dropped",
    "max-colluding": "max_colluding",
}  # fmt: skip
_TEXTS = ("unit", "relation", "observer")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One round's distributed noise. seed: 32 public bytes that rotate the update. insecure: the run's noise is a
    test's, worth nothing. clip: L2 bound on an update. bit_weight: above 0 under adaptive clipping; the parameters are
    then for the update with its bit, divided by `joint`.
    """

    parameters: NoiseParameters
    seed: bytes
    unit: str = "client"
    relation: str = "zero_out"
    observer: str = "server"
    insecure: bool = False
    clip: float = 0.0
    bit_weight: float = 0.0

    def __post_init__(self) -> None:
        if not self.clip:
            object.__setattr__(self, "clip", self.parameters.clip)
        if not (math.isfinite(self.clip) and self.clip > 0 and math.isfinite(self.bit_weight) and self.bit_weight >= 0):
            raise ValueError(
                f"clip and bit_weight must be finite, above 0 and at least 0: {self.clip}, {self.bit_weight}"
            )
        if self.parameters.clip != (1.0 if self.bit_weight else self.clip):
            raise ValueError(f"clip: {self.clip} is not that of the parameters, {self.parameters.clip}")

    @property
    def joint(self) -> float:
        """The L2 bound on an update and its bit together."""
        return joint_clip(self.clip, self.bit_weight)

    def prepare(self, update: NDArray[Any], length: float, within: bool | None = None) -> NDArray[Any]:
        """Return what is encoded of an update of norm `length`: itself, or with its bit and over the joint bound.

        update: float32 or float64[dimension]; so is what is returned. within: what the bit says, where the update was
        clipped before it came; None: that follows from `length`.
        """
        if not self.bit_weight:
            return update
        short = length <= self.clip
        within = short if within is None else within
        vector = np.empty(update.size + 1, update.dtype)
        np.multiply(update, (1.0 if short else self.clip / length) / self.joint, out=vector[:-1])
        vector[-1] = self.bit_weight / self.joint * (0.5 if within else -0.5)
        return vector

    def to_config(self) -> ConfigRecord:
        """Return the instruction as a record."""
        values: dict[str, ConfigValue] = {
            "mechanism": self.parameters.mechanism,
            "seed": self.seed,
            "insecure": self.insecure,
        }
        values |= {name: float(getattr(self.parameters, field)) for name, field in _FLOATS.items()}
        values |= {name: int(getattr(self.parameters, field)) for name, field in _COUNTS.items()}
        values["clip"] = self.clip
        if self.bit_weight:
            values["bit-weight"] = self.bit_weight
        if self.parameters.drop_levels:
            values["drop-levels"] = list(self.parameters.drop_levels)
        return ConfigRecord(values | {name: str(getattr(self, name)) for name in _TEXTS})

    @classmethod
    def from_config(cls, config: ConfigRecord) -> Instruction:
        """Read what `to_config` wrote. Raises PlanRefused for anything else, central noise included."""
        mechanism = config.get("mechanism")
        if mechanism not in SHARED:
            raise PlanRefused(f"mechanism {mechanism!r}: this node adds its own noise, {' or '.join(SHARED)}")
        try:
            numbers = {field: config[name] for name, field in (*_FLOATS.items(), *_COUNTS.items())}
            if any(type(numbers[field]) is not float for field in _FLOATS.values()):
                raise TypeError("a number that should be a float is none")
            if any(type(numbers[field]) is not int for field in _COUNTS.values()):
                raise TypeError("a count that should be an int is none")
            seed, insecure = config["seed"], config["insecure"]
            if not isinstance(seed, bytes) or len(seed) != 32 or not isinstance(insecure, bool):
                raise TypeError("the seed is no 32 bytes, or insecure no bool")
            texts = {name: config[name] for name in _TEXTS}
            if any(not isinstance(text, str) for text in texts.values()):
                raise TypeError("unit, relation and observer are texts")
            clip, weight = float(str(numbers["clip"])), config.get("bit-weight", 0.0)
            if not isinstance(weight, float):
                raise TypeError("the bit's weight is no float")
            levels = config.get("drop-levels", [])
            if not isinstance(levels, list):
                raise TypeError("the drop levels are no list")
            chosen: dict[str, Any] = {**numbers, "clip": 1.0 if weight else clip, "mechanism": mechanism}
            chosen["drop_levels"] = tuple(levels)
            parameters = NoiseParameters(**chosen)
            parameters.check()
            terms = {name: str(text) for name, text in texts.items()}
            return cls(parameters, seed, **terms, insecure=insecure, clip=clip, bit_weight=weight)
        except (KeyError, TypeError, ValueError) as cause:
            raise PlanRefused(f"the plan in the message is malformed: {cause}") from cause


@dataclass(frozen=True, slots=True)
class PlanLimits:
    """What a node accepts of a plan, whatever the server asks.

    max_epsilon: most that all of this node's contributions to one run may cost at `delta` against the server, as
    counted by the node itself; None: any. min_noise_multiplier: least noise of a round over the clip. max_clip: largest
    clip. corrupt: share of a cohort that may collude with the server; a plan that counts on more honest noise is
    refused. min_nodes: least cohort that a plan may be for.
    """

    max_epsilon: float | None = None
    delta: float = 1e-5
    min_noise_multiplier: float = 0.0
    max_clip: float = math.inf
    corrupt: float = 0.0
    min_nodes: int = 2

    def __post_init__(self) -> None:
        if self.max_epsilon is not None and not self.max_epsilon > 0:
            raise ValueError(f"max_epsilon must be > 0 or None, got {self.max_epsilon}")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must be in (0, 1), got {self.delta}")
        if not self.min_noise_multiplier >= 0 or not self.max_clip > 0:
            raise ValueError(
                f"min_noise_multiplier must be >= 0 and max_clip > 0, got {self.min_noise_multiplier}, {self.max_clip}"
            )
        if not 0 <= self.corrupt < 1:
            raise ValueError(f"corrupt must be a share of the cohort in [0, 1), got {self.corrupt}")

    def check(self, instruction: Instruction) -> None:
        """Raise PlanRefused, naming the limit, for a round that this node takes no part in."""
        asked = instruction.parameters
        if instruction.unit != "client" or instruction.relation not in ("zero_out", "replace_one"):
            terms = f"unit {instruction.unit!r}, relation {instruction.relation!r}"
            raise PlanRefused(f"{terms}: distributed noise proves nothing of that kind")
        if asked.noise_multiplier < self.min_noise_multiplier:
            raise PlanRefused(
                f"noise multiplier {asked.noise_multiplier:g} is below this node's least, {self.min_noise_multiplier:g}"
            )
        if instruction.clip > self.max_clip:
            raise PlanRefused(f"clip {instruction.clip:g} is above this node's largest, {self.max_clip:g}")
        if asked.nodes < self.min_nodes:
            raise PlanRefused(f"a cohort of {asked.nodes} nodes is below this node's least, {self.min_nodes}")
        colluding = math.ceil(self.corrupt * asked.nodes * (1 - 2.0**-40))
        if asked.max_colluding < colluding:
            raise PlanRefused(
                f"the plan provides for {asked.max_colluding} colluding nodes, this node assumes {colluding} of "
                f"{asked.nodes}"
            )

    def check_spending(self, relation: str, spent: Iterable[tuple[str, int]]) -> None:
        """Raise PlanRefused when a run's contributions, pairs (event as JSON, count), cost more than allowed."""
        if self.max_epsilon is None:
            return
        epsilon = cost(relation, tuple(spent), self.delta)
        if not epsilon <= self.max_epsilon:
            raise PlanRefused(
                f"with this round epsilon would be {epsilon:.4g} at delta {self.delta:g}, more than this node's "
                f"{self.max_epsilon:g}"
            )


@lru_cache(maxsize=256)
def cost(relation: str, spent: tuple[tuple[str, int], ...], delta: float) -> float:
    """Return the certified epsilon, against the server, of events given as JSON with their counts."""
    accountant = Accountant(unit="client", relation=relation, observer="server")
    for event, count in spent:
        accountant.step(event_from_json(event), count)
    return accountant.epsilon(delta).upper
