"""Turn zCDP, Renyi and Gaussian guarantees into (epsilon, delta), always on the safe side.

Any order gives a valid bound, so a numerical search over orders can only cost tightness, not truth.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from scipy import optimize, special

from privfed.privacy.argument import number

_MARGIN = 1e-12  # relative; covers the few roundings of these formulas
_SMALLEST_ORDER, _LARGEST_ORDER = 1 + 1e-7, 1e9


def checked_delta(delta: float) -> float:
    """Return delta; ValueError unless it is inside (0, 1)."""
    return number("delta", delta, 0, 1, above=True, below=True)


def renyi_epsilon(divergence: float, order: float, delta: float) -> float:
    """Return epsilon for a Renyi divergence at one order above 1 [BBG+20, Thm 21]; never below 0."""
    checked_delta(delta)
    number("order", order, 1, math.inf, above=True, below=True)
    value = divergence + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
    return max(0.0, value + _MARGIN * (abs(value) + 1))


def zcdp_epsilon(rho: float, delta: float) -> float:
    """Return epsilon of rho-zCDP: the best Renyi order [CKS20, Cor 13]."""
    checked_delta(delta)
    if rho == 0:
        return 0.0
    if rho == math.inf:
        return math.inf

    def at(log_excess: float) -> float:
        order = 1 + math.exp(log_excess)
        return order * rho + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)

    low, high = math.log(_SMALLEST_ORDER - 1), math.log(_LARGEST_ORDER)
    guess = math.log(math.sqrt(-math.log(delta) / rho) + 1e-9)
    bounds = max(low, guess - 5), min(high, guess + 5)
    best = optimize.minimize_scalar(at, bounds=bounds, method="bounded", options={"xatol": 1e-10})
    order = 1 + math.exp(float(best.x))
    return renyi_epsilon(order * rho, order, delta)


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Return delta(epsilon) of mu-GDP, exactly up to rounding [BW18, Thm 8]."""
    if mu == 0:
        return 0.0
    first = special.log_ndtr(mu / 2 - epsilon / mu)
    second = epsilon + special.log_ndtr(-mu / 2 - epsilon / mu)
    return float(math.exp(first) * -math.expm1(min(0.0, second - first)))


def gdp_epsilon(mu: float, delta: float) -> float:
    """Return epsilon of mu-GDP, rounded up."""
    checked_delta(delta)
    if mu == math.inf:
        return math.inf
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    high = mu * mu / 2 + mu * math.sqrt(-2 * math.log(delta)) + 1e-9
    return largest(lambda epsilon: gaussian_delta(mu, epsilon) > delta, high) * (1 + 1e-11)


def largest(holds: Callable[[float], bool], above: float) -> float:
    """Return, by bisection to full precision, the last point of [0, above] up to which a monotone claim holds."""
    low, high = 0.0, above
    while True:
        middle = (low + high) / 2
        if not low < middle < high or high - low <= 1e-13 * high:
            return high
        if holds(middle):
            low = middle
        else:
            high = middle
