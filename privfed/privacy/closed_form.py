"""Gaussian differential privacy in closed form: hockey sticks, their inverse, and the trade-off curve [BW18, DRS22].

All functions keep their relative accuracy down to delta = 1e-300.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from scipy import special

SLACK = 1e-12  # relative; two tails of `log_ndtr` and one logarithm of a difference, each good to 1e-14


def log_ndtr(x: float) -> float:
    """Return log Phi(x)."""
    return float(special.log_ndtr(x))


def log_gaussian_delta(mu: float, epsilon: float) -> float:
    """Return log delta(epsilon) of N(mu, 1) against N(0, 1); -inf where it is 0. [BW18, Thm 8]"""
    if mu == 0:
        return math.log(-math.expm1(epsilon)) if epsilon < 0 else -math.inf
    if mu == math.inf:
        return 0.0
    first = log_ndtr(mu / 2 - epsilon / mu)
    gap = epsilon + log_ndtr(-mu / 2 - epsilon / mu) - first
    return first + math.log(-math.expm1(gap)) if gap < 0 else -math.inf


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Return delta(epsilon) of mu-GDP."""
    return math.exp(log_gaussian_delta(mu, epsilon))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the epsilon at which mu-GDP has this delta; 0 if delta is already met there."""
    if mu == 0:
        return 0.0
    if delta == 0 or mu == math.inf:
        return math.inf
    target = math.log(delta)
    if log_gaussian_delta(mu, 0.0) <= target:
        return 0.0
    high = mu * mu / 2 + mu * (math.sqrt(-2 * target) + 1)
    return root(lambda epsilon: log_gaussian_delta(mu, epsilon) - target, 0.0, high)


def gaussian_mu(epsilon: float, delta: float) -> float:
    """Return the mu whose Gaussian curve passes through (epsilon, delta); the inverse of `gaussian_delta`."""
    target = math.log(delta)
    high = 1.0
    while log_gaussian_delta(high, epsilon) < target:
        high *= 2
    return root(lambda mu: target - log_gaussian_delta(mu, epsilon), 0.0, high)


def root(decreasing: Callable[[float], float], low: float, high: float, xtol: float = 0.0) -> float:
    """Return where a decreasing function crosses 0 in [low, high], to the last digits or `xtol`."""
    f_low, f_high = decreasing(low), decreasing(high)
    side = 0
    for step in range(200):
        if high - low <= max(xtol, 4e-16 * abs(high)) or f_high == 0:
            break
        middle = (low + high) / 2
        if math.isfinite(f_low) and math.isfinite(f_high) and step % 3:
            guess = (low * f_high - high * f_low) / (f_high - f_low)
            middle = guess if low < guess < high else middle
        if not low < middle < high:
            break
        f_middle = decreasing(middle)
        if f_middle > 0:
            low, f_low, f_high = middle, f_middle, f_high / 2 if side == 1 else f_high
            side = 1
        else:
            high, f_high, f_low = middle, f_middle, f_low / 2 if side == -1 else f_low
            side = -1
    return high
