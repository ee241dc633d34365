"""Random compositions over all events, relations and observers: lower <= truth <= upper, the truth to 28 digits."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Sequence

import pytest
from mpmath import mpf

from privfed.privacy import events as ev
from privfed.privacy.accountant import Accountant
from proofs_tests.privacy import oracle, oracle_exact
from proofs_tests.privacy.soundness_case import WAYS, Case, drawn

FARTHEST = 500.0  # losses beyond are not asked for


class Truth:
    """The larger delta of two directions, near one epsilon; Gaussian noise is added where inversion needs it."""

    def __init__(self, cases: Sequence[tuple[Case, int]], extra: float, near: float) -> None:
        self.sides = []
        for side in (0, 1):
            laws = [(case.laws[side], count) for case, count in cases]
            self.sides.append(solved(laws, extra, near))

    @property
    def everywhere(self) -> bool:
        """Say whether delta is exact at every epsilon, and not only near one."""
        return all(isinstance(side, oracle_exact.Counted) for side in self.sides)

    def delta(self, epsilon: float) -> mpf:
        return max(side.delta(epsilon) for side in self.sides)


def solved(laws: list[tuple[oracle.Law, int]], mu: float, near: float) -> oracle_exact.Counted | oracle.Inverted:
    """Count outcomes where that is possible, else invert moments; Unresolved."""
    try:
        return oracle_exact.Counted(laws, mu)
    except oracle_exact.TooMany:
        return oracle.Inverted(laws, mu, near)


def check(seed: int) -> None:
    """Ask for epsilon at a random delta, and for delta there and at a random epsilon; compare with the truth."""
    rng = random.Random(seed)
    cases, relation, observer = drawn(rng)
    delta = 10.0 ** rng.uniform(-12 if rng.random() < 0.8 else -30, -2)
    tol = 1e-3 if len(cases) < 3 else 1e-2  # what is wrong shows at any width; narrow brackets of many parts take long
    # Moments that do not vanish cannot be inverted: Gaussian noise beside the cases smooths them, more if need be.
    for extra in (0.0, rng.choice([1.0, 1.5]), 3.0, 6.0):
        accountant = Accountant(relation=relation, observer=observer, tol=tol)
        for case, count in cases:
            accountant.step(case.event, count)
        if extra:
            accountant.step(ev.Gaussian(WAYS[relation] / extra))
        found = accountant.epsilon(delta)
        near = min(found.estimate, FARTHEST)
        try:
            truth = Truth(cases, extra, near)
            break
        except oracle.Unresolved:
            continue
    else:
        raise AssertionError(f"the oracle resolves no variant of {[(case.event, n) for case, n in cases]}")
    what = [(case.event, n) for case, n in cases], relation, observer, extra
    assert 0 <= found.lower <= found.estimate <= found.upper, (what, found)
    tight = all(case.tight for case, _ in cases)
    if found.upper < math.inf:
        assert truth.delta(found.upper) <= delta, (what, delta, found)
    elif tight:
        assert truth.delta(FARTHEST) > delta, (what, delta, found)
    if found.lower > 0 and tight:
        assert truth.delta(min(found.lower, FARTHEST)) >= delta, (what, delta, found)
    spot = near * rng.uniform(0.0, 1.0)
    spots = [near, spot, -0.3 * spot] if truth.everywhere else [near]
    if rng.random() < 0.2 and not truth.everywhere:
        with contextlib.suppress(oracle.Unresolved):  # far from the saddle moments may last too long: near it is asked
            truth, spots = Truth(cases, extra, spot), [spot]
    for at in spots:
        back, exact = accountant.delta(at), truth.delta(at)
        assert exact <= back.upper, (what, at, exact, back)
        assert not tight or back.lower <= exact, (what, at, exact, back)
        if at == near and tight and "effort" not in back.method and "Renyi" not in back.method:
            assert back.lower >= exact * mpf("0.98"), (what, at, exact, back)


@pytest.mark.parametrize("seed", range(40))
def test_brackets_hold_the_truth(seed: int) -> None:
    check(seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(40, 640))
def test_brackets_hold_the_truth_at_length(seed: int) -> None:
    check(seed)
