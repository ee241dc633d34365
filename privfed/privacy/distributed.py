"""Distributed differential privacy: parameters for noise of which every node adds a share [AKL21, KLS21].

`solve_noise` and `calibrate_noise` choose the lattice on which the nodes of a round encode their updates; what is done
with it is in `privfed.privacy.share`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from privfed.privacy.accountant import Accountant
from privfed.privacy.events import Event
from privfed.privacy.share import (
    BETA,
    LARGEST_NORM,
    LARGEST_VARIANCE,
    MAX_BITS,
    MECHANISMS,
    SKELLAM,
    UP,
    NoiseParameters,
    above_zero,
    whole,
    wrap_bound,
)

__all__ = ["MECHANISMS", "NoiseParameters", "calibrate_noise", "solve_noise", "wrap_bound"]

LARGEST_GROWTH = 2.0
"""Largest factor by which rounding may lengthen an update before a setting is refused."""
_LEAST_NOISE, _MOST_NOISE = 2.0**-10, 2.0**20
_PRECISION = 1e-5  # relative, of a calibrated noise multiplier


def _fitted(draft: NoiseParameters, wrap_probability: float) -> NoiseParameters:
    """Return the draft with the finest scale that keeps the wrap probability and the sampler's range."""
    spread = draft.noise_multiplier * draft.clip / math.sqrt(draft.honest)
    top = min(LARGEST_NORM / draft.clip, math.sqrt(LARGEST_VARIANCE) / spread) / UP**4
    fits = replace(draft, scale=top)
    if fits.wrap_probability <= wrap_probability:
        return fits
    low, high = math.log(top) - 120, math.log(top)
    for _ in range(64):
        middle = (low + high) / 2
        trial = replace(draft, scale=math.exp(middle))
        low, high = (middle, high) if trial.wrap_probability <= wrap_probability else (low, middle)
    return replace(draft, scale=math.exp(low))


def _draft(wrap_probability: float, arguments: dict[str, Any]) -> Callable[[float, int], NoiseParameters]:
    """Return a function from noise multiplier and bits to fitted parameters, however coarse their lattice."""
    if not 0 < wrap_probability < 1:
        raise ValueError(f"wrap_probability: must be in (0, 1), not {wrap_probability}")

    def fitted(noise_multiplier: float, bits: int) -> NoiseParameters:
        # The smallest scale that is valid whatever the clip; it is replaced at once.
        above_zero("clip", arguments["clip"])
        above_zero("noise_multiplier", noise_multiplier)
        tiny = 2.0**-40 / max(arguments["clip"], noise_multiplier * arguments["clip"])
        draft = NoiseParameters(noise_multiplier=noise_multiplier, bits=bits, scale=tiny, **arguments)
        return _fitted(draft, wrap_probability)

    return fitted


def _refuse_coarse(found: NoiseParameters, fitted: Callable[[float, int], NoiseParameters]) -> NoiseParameters:
    """Return the parameters, or refuse a lattice so coarse that rounding outweighs the update."""
    if found.growth <= LARGEST_GROWTH:
        found.check()
        return found
    enough = next(
        (b for b in range(found.bits + 1, MAX_BITS + 1) if fitted(found.noise_multiplier, b).growth <= LARGEST_GROWTH),
        None,
    )
    advice = f"{enough} bits suffice" if enough is not None else "no ring is large enough"
    raise ValueError(
        f"bits: in a ring of {found.bits} bits the clip of {found.clip:g} is {found.clip * found.scale:.3g} lattice "
        f"steps over {found.padded} coordinates, and rounding makes it {found.growth:.3g} times longer (at most "
        f"{LARGEST_GROWTH:g}); {advice}"
    )


def solve_noise(
    *,
    clip: float,
    noise_multiplier: float,
    nodes: int,
    dimension: int,
    bits: int = 20,
    max_dropped: int = 0,
    max_colluding: int = 0,
    wrap_probability: float = 1e-6,
    beta: float = BETA,
    mechanism: str = SKELLAM,
    drop_levels: tuple[int, ...] = (),
) -> NoiseParameters:
    """Choose the finest lattice at which a round's sum wraps with at most `wrap_probability`.

    Raises ValueError, with the numbers and the bits that would do, when nobody honest is left, when rounding to the
    lattice would more than double the sensitivity, or when `NoiseParameters.check` does.
    """
    arguments = {
        "clip": clip, "nodes": nodes, "dimension": dimension, "max_dropped": max_dropped,
        "max_colluding": max_colluding, "beta": beta, "mechanism": mechanism,
        "drop_levels": drop_levels,
    }  # fmt: skip
    fitted = _draft(wrap_probability, arguments)
    return _refuse_coarse(fitted(noise_multiplier, bits), fitted)


def calibrate_noise(
    *,
    epsilon: float,
    delta: float,
    rounds: int = 1,
    clip: float,
    nodes: int,
    dimension: int,
    bits: int = 20,
    max_dropped: int = 0,
    max_colluding: int = 0,
    wrap_probability: float = 1e-6,
    beta: float = BETA,
    unit: str = "client",
    relation: str = "add_remove",
    observer: str = "server",
    sampled: Callable[[Event], Event] | None = None,
    mechanism: str = SKELLAM,
    drop_levels: tuple[int, ...] = (),
) -> NoiseParameters:
    """Choose the least noise, and its lattice, with which `rounds` rounds are certified to cost at most `epsilon`.

    sampled: a sampler's `event`; it saves something against observer "output" only. Raises ValueError, with numbers,
    when no noise that fits the ring is enough.
    """
    arguments = {
        "clip": clip, "nodes": nodes, "dimension": dimension, "max_dropped": max_dropped,
        "max_colluding": max_colluding, "beta": beta, "mechanism": mechanism,
        "drop_levels": drop_levels,
    }  # fmt: skip
    fitted = _draft(wrap_probability, arguments)
    above_zero("epsilon", epsilon)
    whole("rounds", rounds, 1)
    if not 0 < delta < 1:
        raise ValueError(f"delta: must be in (0, 1), not {delta}")

    def spent(noise_multiplier: float) -> float:
        event: Event = fitted(noise_multiplier, bits).event
        event = sampled(event) if sampled is not None else event
        return Accountant(unit, relation, observer).step(event, rounds).epsilon(delta).upper

    low, high = math.log(_LEAST_NOISE), math.log(_MOST_NOISE)
    if not spent(_MOST_NOISE) <= epsilon:
        raise ValueError(
            f"epsilon: {nodes} nodes, {dimension} coordinates and {bits} bits cost {spent(_MOST_NOISE):.4g} or more "
            f"in {rounds} rounds at delta {delta:g}, more than {epsilon:g}; use more bits, fewer rounds or more epsilon"
        )
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (low, middle) if spent(math.exp(middle)) <= epsilon else (middle, high)
    noise_multiplier = math.exp(high)
    if not spent(noise_multiplier) <= epsilon:
        raise RuntimeError(f"noise multiplier {noise_multiplier} is not certified after all")
    return _refuse_coarse(fitted(noise_multiplier, bits), fitted)
