"""From events to dominating pairs: what an observer's view of one event looks like under each relation.

Under add_remove and zero_out two neighbours keep their roles through a whole run, so there is a pair for each of the
two directions and a run is composed once per direction. replace_one is symmetric: any round may see either role, so
both directions are joined into one pair before anything is composed.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal, cast

import numpy as np

from privfed.privacy import events as ev
from privfed.privacy.atoms import Atoms, Joined, Swapped, Tagged, randomized_response, sampled
from privfed.privacy.pair import ULP, LaplacePair, NormalPair, Pair

Relation = Literal["add_remove", "replace_one", "zero_out"]
Observer = Literal["output", "server"]
RELATIONS = ("add_remove", "replace_one", "zero_out")
OBSERVERS = ("output", "server")
_SAMPLED = (ev.PoissonSampled, ev.FixedSizeSampled, ev.TruncatedPoisson)
RENYI_ONLY = (ev.ZCDP, ev.DistributedNoise)


def checked_terms(relation: str, observer: str) -> None:
    """Raise ValueError for an unknown relation or observer."""
    if relation not in RELATIONS:
        raise ValueError(f"relation: must be one of {', '.join(RELATIONS)}, not {relation!r}")
    if observer not in OBSERVERS:
        raise ValueError(f"observer: must be one of {', '.join(OBSERVERS)}, not {observer!r}")


def simplify(event: ev.Event, count: int, observer: str) -> list[tuple[ev.Event, int]]:
    """Return plain events and counts that cost the same for this observer: compositions opened, samplers resolved."""
    if isinstance(event, ev.Composed):
        return [pair for part, times in event.parts for pair in simplify(part, times * count, observer)]
    if count == 0:
        return []
    if isinstance(event, ev.Central):
        inner = simplify(event.inner, count, observer)
        return [(ev.Unaccounted("the server adds this noise"), count)] if observer == "server" and inner else inner
    if isinstance(event, (*_SAMPLED, ev.RandomAllocation)):
        if _never(event):
            return []
        if observer == "server" or _always(event):
            return simplify(event.inner, count, observer)
        inner = simplify(event.inner, 1, observer)
        if len(inner) != 1 or inner[0][1] != 1:
            raise ValueError(f"event: {type(event).__name__} of several events at once is not supported; sample each")
        if isinstance(inner[0][0], ev.Unaccounted):
            return [(inner[0][0], count)]
        return [(_replaced(event, inner[0][0]), count)]
    return [(event, count)]


def _replaced(event: ev.Event, inner: ev.Event) -> ev.Event:
    values = {name: getattr(event, name) for name in event.fields() if name not in ("event", "inner")}
    kind: Any = type(event)
    return cast(ev.Event, kind(**values, inner=inner))


def _never(event: ev.Event) -> bool:
    rate = getattr(event, "rate", getattr(event, "sample_size", 1))
    return bool(rate == 0)


def _always(event: ev.Event) -> bool:
    if isinstance(event, ev.PoissonSampled):
        return event.rate == 1
    if isinstance(event, ev.FixedSizeSampled):
        return event.sample_size == event.population
    return isinstance(event, ev.RandomAllocation) and event.rounds == 1


def gaussian_mu(event: ev.Event, relation: str) -> float | None:
    """Return sensitivity over standard deviation of a plain Gaussian event, None for other events."""
    if not isinstance(event, (ev.Gaussian, ev.MatrixGaussian)):
        return None
    sensitivity = event.sensitivity if isinstance(event, ev.MatrixGaussian) else 1.0
    distance = sensitivity * (2.0 if relation == "replace_one" else 1.0)
    if distance == 0 or event.noise_multiplier == math.inf:
        return 0.0
    return distance / event.noise_multiplier if event.noise_multiplier > 0 else math.inf


def pairs(event: ev.Event, relation: str) -> tuple[Pair, Pair] | None:
    """Return the dominating pairs (remove, add), one object twice if symmetric; None where nothing is revealed.

    ValueError: the combination has no proof. OverflowError: there is no noise, the cost is infinite.
    """
    return _pairs(event, relation)


@lru_cache(maxsize=512)
def _pairs(event: ev.Event, relation: str) -> tuple[Pair, Pair] | None:
    if isinstance(event, ev.PoissonSampled):
        return _poisson(event.rate, event.inner, relation)
    if isinstance(event, ev.FixedSizeSampled):
        return _fixed_size(event, relation)
    if isinstance(event, ev.TruncatedPoisson):
        return _truncated(event, relation)
    if isinstance(event, ev.RandomAllocation):
        if silent(event.inner):
            return None
        from privfed.privacy.allocation import allocation_pairs

        return allocation_pairs(event, relation)
    plain = _plain(event, relation)
    if isinstance(event, ev.RandomizedResponse) and relation == "zero_out":  # a truth against a uniform report
        return _directed(plain)
    return None if plain is None else (plain, plain)


def _location(event: ev.Event, relation: str, rate: float, antipodal: bool, distance: float) -> Pair | None:
    """Return the pair of additive noise at `distance` times C, sampled at `rate`; None for other events."""
    mu = gaussian_mu(event, relation="add_remove")
    if isinstance(event, ev.Laplace):
        mu = math.inf if event.noise_multiplier == 0 else 1 / event.noise_multiplier
    if mu is not None:
        if mu * distance == math.inf:
            raise OverflowError("no noise")
        kind = LaplacePair if isinstance(event, ev.Laplace) else NormalPair
        return kind(mu * distance, rate, antipodal)
    from privfed.privacy.integer import integer_pair

    return integer_pair(event, rate, antipodal, int(distance))


def _plain(event: ev.Event, relation: str) -> Pair | None:
    """Return the symmetric pair of an unsampled event."""
    distance = 2.0 if relation == "replace_one" else 1.0
    if silent(event):
        return None
    located = _location(event, relation, 1.0, False, distance)
    if located is not None:
        return located
    if isinstance(event, ev.RandomizedResponse):
        return response(event, relation)
    if isinstance(event, ev.Exponential):
        return _bounded_range(event.epsilon)
    if isinstance(event, (ev.PureDP, ev.AboveThreshold, ev.ApproximateDP)):
        if event.epsilon == math.inf or getattr(event, "delta", 0.0) == 1:
            raise OverflowError("no privacy")
        return randomized_response(event.epsilon, getattr(event, "delta", 0.0))
    raise ValueError(f"event: no dominating pair is known for {type(event).__name__}")


def silent(event: ev.Event) -> bool:
    """Say whether the event reveals nothing: infinite noise, zero sensitivity, epsilon 0."""
    if getattr(event, "delta", 0.0):
        return False
    noise = max((getattr(event, name, 0.0) for name in ("noise_multiplier", "sigma", "scale", "variance")), default=0.0)
    if isinstance(event, ev.DistributedNoise):
        return event.clip == 0
    if isinstance(event, ev.RandomizedResponse):
        return event.noise == 1
    lost = getattr(event, "sensitivity", 1) == 0 or getattr(event, "epsilon", 1) == 0 or getattr(event, "rho", 1) == 0
    return bool(noise == math.inf or lost)


def response(event: ev.RandomizedResponse, relation: str) -> Atoms:
    """Return the pair of randomised response: two truths, or a truth and a uniform report under zero_out."""
    k = event.categories
    truth, other = 1 - event.noise + event.noise / k, event.noise / k
    if relation == "add_remove":
        raise ValueError(
            "relation: a missing randomised response is visible, so add_remove protects nothing; use replace_one or "
            "zero_out (against a uniform report)"
        )
    if event.noise == 0:
        raise OverflowError("no noise")
    if relation == "replace_one":
        rest = (k - 2) * other
        masses = [truth, other] + ([rest] if rest else [])
        return Atoms(
            np.array(masses),
            np.array([other, truth, *masses[2:]]),
            spacing=(1 if rest else 2) * math.log(truth / other),
        )
    return Atoms(np.array([truth, (k - 1) * other]), np.array([1 / k, (k - 1) / k]))


def _bounded_range(epsilon: float) -> Atoms:
    """Return the pair with hockey stick (e^(eps/2) - e^(x/2))^2 / (e^eps - 1), the envelope over all bounded ranges.

    Connecting its values at finely spaced losses keeps it dominating [DDR20].
    """
    if epsilon == math.inf:
        raise OverflowError("no privacy")
    edges = np.linspace(-epsilon, epsilon, 2001)
    ratio = np.exp(edges)
    stick = np.expm1((epsilon - edges) / 2) ** 2 * ratio / np.expm1(epsilon)
    slope = np.diff(stick) / np.diff(ratio)
    q = np.diff(np.concatenate(([-1.0], slope, [0.0])))
    return Atoms(q * ratio, q, rounding=1e-11)


def _directed(pair: Pair | None) -> tuple[Pair, Pair] | None:
    return None if pair is None else (pair, Swapped(pair))


def _poisson(rate: float, inner: ev.Event, relation: str) -> tuple[Pair, Pair] | None:
    """Return the pairs of Poisson sampling [ZDW22]; antipodal points are worst under replace_one (Neyman-Pearson)."""
    if silent(inner):
        return None
    if relation == "replace_one":
        located = _location(inner, relation, rate, True, 1.0)
        if located is None:
            raise ValueError(f"relation: Poisson-sampled {type(inner).__name__} has no proof under replace_one")
        return located, located
    located = _location(inner, relation, rate, False, 1.0)
    if located is None:
        if relation == "zero_out" or isinstance(inner, ev.RandomizedResponse):
            raise ValueError(f"relation: Poisson-sampled {type(inner).__name__} has no proof under {relation}")
        base = _plain(inner, relation)
        located = sampled(base, rate) if isinstance(base, Atoms) else None
    return _directed(located)


def _fixed_size(event: ev.FixedSizeSampled, relation: str) -> tuple[Pair, Pair] | None:
    """Return the joined pair of sampling without replacement: the unit, its twin and any stand-in are neighbours."""
    if relation != "replace_one":
        raise ValueError(
            f"relation: FixedSizeSampled is proved under replace_one only, not {relation}; adding or removing a unit "
            "changes who else is drawn"
        )
    if silent(event.inner):
        return None
    rate = event.sample_size / event.population
    located = _location(event.inner, relation, rate, False, 2.0)
    if located is None:
        base = _plain(event.inner, relation)
        located = sampled(base, rate) if isinstance(base, Atoms) else None
    if located is None:
        raise ValueError(f"event: no dominating pair is known for {type(event.inner).__name__}")
    joined = Joined(located)
    return joined, joined


def _truncated(event: ev.TruncatedPoisson, relation: str) -> tuple[Pair, Pair] | None:
    """Return the branches of truncated Poisson sampling, told how many others were drawn.

    With fewer than `cap` others it is Poisson sampling. Otherwise the unit, if drawn, takes the place of another:
    then the two worlds differ by a replacement, and both are within a replacement of the world without it.
    """
    if silent(event.inner):
        return None
    free, crowded, wrong = crowding(event.population - 1, event.rate, event.cap)
    plain = _poisson(event.rate, event.inner, relation)
    if plain is None or crowded == 0:
        return plain
    displaced = _location(event.inner, relation, event.rate, False, 2.0)
    if displaced is None:
        raise ValueError(f"event: no dominating pair is known for truncated sampling of {type(event.inner).__name__}")
    if relation == "replace_one":
        both = Tagged(((free, plain[0]), (crowded, Joined(displaced))), wrong)
        return both, both
    remove = Tagged(((free, plain[0]), (crowded, displaced)), wrong)
    return remove, Tagged(((free, plain[1]), (crowded, Swapped(displaced))), wrong)


def crowding(others: int, rate: float, cap: int) -> tuple[float, float, float]:
    """Return P(X < cap) and P(X >= cap) for a binomial X, and a bound on the relative error of both.

    Masses relative to the largest one are products of ratios; 40 standard deviations out, the rest is below 1e-30.
    """
    if cap > others or rate == 0:
        return 1.0, 0.0, 0.0
    if rate == 1:
        return 0.0, 1.0, 0.0
    mode = min(others, int((others + 1) * rate))
    reach = int(40 * math.sqrt(others * rate * (1 - rate))) + 60
    first, last = max(0, min(mode, cap) - reach), min(others, max(mode, cap) + reach)
    k = np.arange(first, last, dtype=float)
    ratio = (others - k) / (k + 1) * (rate / (1 - rate))
    up = np.cumprod(ratio[mode - first :])
    down = np.cumprod(1 / ratio[: mode - first][::-1])[::-1]
    mass = np.concatenate((down, [1.0], up))
    below, above = float(mass[: cap - first].sum()), float(mass[cap - first :].sum())
    return below / (below + above), above / (below + above), 8 * ULP * (last - first + 8)
