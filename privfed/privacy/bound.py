"""What an accountant answers: a bracket around the truth, the best guess in it, and how it was found."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal


@dataclass(frozen=True, slots=True)
class Bound:
    """Enclose a privacy parameter: lower <= truth <= upper. What may be promised is `upper`.

    estimate: the most accurate number, inside the bracket, without a guarantee of its own. method: the engine, and
    whether an effort limit stopped the refinement. proof: the theorem `upper` rests on, and what `lower` covers.
    """

    lower: float
    estimate: float
    upper: float
    method: str
    proof: str

    def __post_init__(self) -> None:
        if not self.lower <= self.estimate <= self.upper:
            raise ValueError(f"lower: {self.lower}, estimate: {self.estimate}, upper: {self.upper} are out of order")

    @property
    def gap(self) -> float:
        """Return (upper - lower) / max(lower, 1e-3); 0 when both are infinite."""
        if self.upper == self.lower:
            return 0.0
        if math.isinf(self.upper):
            return math.inf
        return (self.upper - self.lower) / max(self.lower, 1e-3)


def exact(value: float, method: str, proof: str, slack: float = 0.0) -> Bound:
    """Return a bound of relative half-width `slack` around a closed form."""
    if math.isinf(value):
        return Bound(value, value, value, method, proof)
    return Bound(max(0.0, value * (1 - slack)), value, value * (1 + slack), method, proof)


def printed(value: float, up: bool, digits: int = 6) -> str:
    """Return a bound in few digits, rounded to the side on which it still holds."""
    if not math.isfinite(value):
        return f"{value:g}"
    rounding = ROUND_CEILING if up else ROUND_FLOOR
    return f"{float(Context(prec=digits, rounding=rounding).create_decimal(Decimal(value))):.{digits}g}"
