"""Find the least noise, or the most rounds, that a budget allows: certified, and rounded to the safe side."""

from __future__ import annotations

import math
from collections.abc import Callable

from privfed.privacy.accountant import Accountant
from privfed.privacy.argument import number, whole
from privfed.privacy.bound import Bound
from privfed.privacy.closed_form import root
from privfed.privacy.events import Event


def calibrate(
    plan: Callable[[float], Event],
    *,
    count: int = 1,
    epsilon: float,
    delta: float,
    unit: str = "client",
    relation: str = "add_remove",
    observer: str = "output",
    tol: float = 1e-4,
) -> float:
    """Return the least parameter at which `count` times plan(parameter) is certified to cost at most epsilon.

    plan: parameter (such as a noise multiplier) -> event; a larger parameter must cost less. tol: of the bracket with
    which the result is certified; the result exceeds the true minimum by about that much, relatively.
    ValueError if no parameter suffices.
    """
    found = calibrate_bound(
        plan, count=count, epsilon=epsilon, delta=delta, unit=unit, relation=relation, observer=observer, tol=tol
    )
    return found.upper


def calibrate_bound(
    plan: Callable[[float], Event],
    *,
    count: int = 1,
    epsilon: float,
    delta: float,
    unit: str = "client",
    relation: str = "add_remove",
    observer: str = "output",
    tol: float = 1e-4,
) -> Bound:
    """Return the same parameter from both sides: at `lower` the budget is surely exceeded, at `upper` surely kept.

    `lower` is 0 for plans with Renyi bounds: what they cost at least is not known. Where other parts are mixed with
    them, `upper` keeps the budget by the moments of all parts, and the accountant may certify a little less than that.
    """
    epsilon = number("epsilon", epsilon, 0, math.inf, above=True, below=True)
    delta = number("delta", delta, 0, 1, below=True)
    count = whole("count", count, 1)
    tol = number("tol", tol, 0, 1, above=True, below=True)

    def at(parameter: float) -> Accountant:
        return Accountant(unit, relation, observer).step(plan(parameter), count)

    def excess(log_parameter: float) -> float:
        value = at(math.exp(log_parameter)).plan.rough_epsilon(delta)
        return math.log(value / epsilon) if 0 < value < math.inf else (-50.0 if value == 0 else 50.0)

    centre = _located(excess)
    move = tol / 4
    upper = math.exp(centre)
    for _ in range(40):
        # Also as the accountant answers by default: who calibrates by one must be allowed to spend by the other.
        if max(at(upper).epsilon(delta, tol=tol).upper, at(upper).epsilon(delta).upper) <= epsilon:
            break
        upper, move = math.exp(centre + move), move * 1.7
    else:
        raise ValueError(f"epsilon: no parameter near {math.exp(centre):g} is certified to cost at most {epsilon}")
    lower, move = 0.0, tol / 4
    while lower == 0 and move < 1:  # where only an upper bound is proved, no parameter is surely too small
        near = math.exp(centre - move)
        lower = near if at(near).epsilon(delta, tol=tol).lower > epsilon else 0.0
        move *= 2
    return Bound(lower, min(max(math.exp(centre), lower), upper), upper, "root of the estimate, certified", "")


def _located(decreasing: Callable[[float], float]) -> float:
    """Return the logarithm of the parameter where the excess vanishes, starting from 1."""
    low = high = 0.0
    width = 0.5
    if decreasing(0.0) > 0:
        while decreasing(high) > 0:
            low, high, width = high, high + width, 2 * width
            if high > 60:
                raise ValueError("epsilon: no parameter up to exp(60) costs so little")
    else:
        while decreasing(low) <= 0:
            high, low, width = low, low - width, 2 * width
            if low < -60:
                raise ValueError("epsilon: even a parameter of exp(-60) costs less; the plan does not spend")
    return root(decreasing, low, high, 1e-11)


def calibrate_steps(
    event: Event,
    *,
    epsilon: float,
    delta: float,
    unit: str = "client",
    relation: str = "add_remove",
    observer: str = "output",
    most: int = 10**9,
) -> int:
    """Return how often the event fits the budget: the largest certified count, at most `most`; 0 if not even once."""
    epsilon = number("epsilon", epsilon, 0, math.inf, above=True)
    delta, most = number("delta", delta, 0, 1, below=True), whole("most", most, 1)

    def fits(count: int) -> bool:
        accountant = Accountant(unit, relation, observer).step(event, count)
        return accountant.epsilon(delta).upper <= epsilon

    if not fits(1):
        return 0
    low, high = 1, 2
    while high < most and fits(high):
        low, high = high, high * 2
    high = min(high, most)
    if high == most and fits(most):
        return most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
