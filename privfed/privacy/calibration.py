"""Find the least noise, or the most rounds, that a budget allows: certified, and rounded to the safe side."""

from __future__ import annotations

import math
from collections.abc import Callable

from privfed.privacy.accountant import Accountant
from privfed.privacy.argument import number, whole
from privfed.privacy.bound import Bound
from privfed.privacy.events import Event

TOL = 1e-3  # the accountant's own
_PRECISE = 1e-9  # of the root of the estimate, relative
_DIGITS = 1e-7  # of the excess: two values closer than this say nothing about the slope
_ONE_MORE = 1e-3  # of the excess; one secant's step from there leads to about its square, and no one need look
_TRIES = 80
_FARTHEST = 60.0
_FAR = 50.0  # stands for the excess where epsilon is 0 or infinite
_MARGIN = 0.45  # of tol: how far above the estimate an upper bound may lie; it refines to 0.4
_SHARP = 1e-11  # the same where the bound is the estimate but for rounding


def calibrate(
    plan: Callable[[float], Event],
    *,
    count: int = 1,
    epsilon: float,
    delta: float,
    unit: str = "client",
    relation: str = "add_remove",
    observer: str = "output",
    tol: float = TOL,
) -> float:
    """Return the least parameter at which `count` times plan(parameter) is certified to cost at most epsilon.

    plan: parameter (such as a noise multiplier) -> event; a larger parameter must cost less. tol: of the accountant
    that is to certify the spending; the result exceeds the true minimum by about that much, relatively, or less. One
    with the default tol certifies it as well. ValueError if no parameter suffices.
    """
    search = _Search(plan, whole("count", count, 1), epsilon, delta, (unit, relation, observer), tol)
    return search.certified(search.root(hurried=True))


def calibrate_bound(
    plan: Callable[[float], Event],
    *,
    count: int = 1,
    epsilon: float,
    delta: float,
    unit: str = "client",
    relation: str = "add_remove",
    observer: str = "output",
    tol: float = TOL,
) -> Bound:
    """Return the same parameter from both sides: at `lower` the budget is surely exceeded, at `upper` surely kept.

    `lower` is 0 for plans with Renyi bounds: what they cost at least is not known. Where other parts are mixed with
    them, `upper` keeps the budget by the moments of all parts, and the accountant may certify a little less than that.
    """
    search = _Search(plan, whole("count", count, 1), epsilon, delta, (unit, relation, observer), tol)
    upper = search.certified(search.root(hurried=True))
    root = search.root()
    lower = search.exceeded(root)
    return Bound(lower, min(max(math.exp(root), lower), upper), upper, "root of the estimate, certified", "")


class _Search:
    """Look for the parameter at which a plan costs epsilon: by its estimate first, then by what is certified."""

    def __init__(
        self,
        plan: Callable[[float], Event],
        count: int,
        epsilon: float,
        delta: float,
        terms: tuple[str, str, str],
        tol: float,
    ) -> None:
        self._plan, self._count, self._terms = plan, count, terms
        self._epsilon = number("epsilon", epsilon, 0, math.inf, above=True, below=True)
        self._delta = number("delta", delta, 0, 1, below=True)
        self._tol = number("tol", tol, 0, 1, above=True, below=True)
        self._slope = -1.0  # of log epsilon over the logarithm of the parameter, near the root
        self._side: int | None = None  # the direction that costs more near the root
        self._last: tuple[float, Accountant] | None = None

    def _at(self, parameter: float) -> Accountant:
        if self._last is not None and self._last[0] == parameter:
            return self._last[1]
        unit, relation, observer = self._terms
        accountant = Accountant(unit, relation, observer, tol=self._tol)
        self._last = parameter, accountant.step(self._plan(parameter), self._count)
        return accountant

    def _excess(self, log_parameter: float) -> float:
        value = self._at(math.exp(log_parameter)).plan.rough_epsilon(self._delta, self._side)
        return math.log(value / self._epsilon) if 0 < value < math.inf else (-_FAR if value == 0 else _FAR)

    def root(self, hurried: bool = False) -> float:
        """Return the logarithm of the parameter at which the estimate is epsilon.

        By secants, as log epsilon is nearly linear in it; by halves of the bracket that was seen where they stray.
        hurried: where the certified bound is wider anyway, take the last step without asking for the excess there.
        """
        here, excess = 0.0, self._excess(0.0)
        low, high = (0.0, math.inf) if excess > 0 else (-math.inf, 0.0)
        leap, stuck = 0.5, 0
        before: tuple[float, float] | None = None
        for _ in range(_TRIES):
            if abs(excess) <= _PRECISE or high - low <= _PRECISE * 1e-3:
                break
            if before is not None and abs(excess) < _DIGITS and abs(excess) > abs(before[1]) / 10:
                break  # as near as the digits of the estimate allow
            if before is not None and max(abs(excess), abs(before[1])) < _FAR and abs(excess - before[1]) > _DIGITS:
                self._slope = min((excess - before[1]) / (here - before[0]), -1e-3)
                if hurried and abs(excess) <= _ONE_MORE * self._tol / TOL and not self._at(math.exp(here)).plan.sharp:
                    return min(max(here - excess / self._slope, low), high)
            before = here, excess
            there = here - excess / self._slope
            if math.isinf(low) or math.isinf(high):
                there = min(max(there, here - leap), here + leap)
                leap *= 2
            elif not low < there < high or stuck > 2:
                there, stuck = (low + high) / 2, 0
            if not -_FARTHEST < there < _FARTHEST:
                raise ValueError(
                    f"epsilon: no parameter up to exp({_FARTHEST:g}) costs so little"
                    if there > 0
                    else f"epsilon: even a parameter of exp(-{_FARTHEST:g}) costs less; the plan does not spend"
                )
            if self._side is None and abs(excess) < 1:
                self._side = self._at(math.exp(here)).plan.costlier(self._delta)
            here, width = there, high - low
            excess = self._excess(here)
            low, high = (here, high) if excess > 0 else (low, here)
            stuck = stuck + 1 if high - low > width / 2 else 0
        return here

    def certified(self, root: float) -> float:
        """Return a parameter, little above the root, at which the accountant certifies the budget."""
        plan = self._at(math.exp(root)).plan
        move = (_MARGIN * self._tol if not plan.sharp else _SHARP) / -self._slope
        for _ in range(40):
            parameter = math.exp(root + move)
            accountant = self._at(parameter)
            upper = max(accountant.epsilon(self._delta, tol=tol).upper for tol in {self._tol, TOL})
            if upper <= self._epsilon:
                return parameter
            over = math.log(upper / self._epsilon) if upper < math.inf else 1.0
            move = max(move + 1.1 * over / -self._slope, 1.3 * move)
        raise ValueError(f"epsilon: no parameter near {math.exp(root):g} is certified to cost at most {self._epsilon}")

    def exceeded(self, root: float) -> float:
        """Return a parameter, little below the root, at which the budget is surely exceeded; 0 if none is known."""
        plan = self._at(math.exp(root)).plan
        if plan.renyi:
            return 0.0
        move = (_MARGIN * self._tol if not plan.sharp else _SHARP) / -self._slope
        while move < 1:
            parameter = math.exp(root - move)
            if self._at(parameter).epsilon(self._delta).lower > self._epsilon:
                return parameter
            move *= 1.6
        return 0.0


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
