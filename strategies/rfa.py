"""RFA: the geometric median of the updates [PKH22]."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.strategies import rules
from privfed.strategies.robust import Rows, RuleStrategy


class RFA(RuleStrategy):
    """Add the geometric median of the updates, unweighted and converged.

    It withstands any minority; kappa = 4 (1 + f/(n-2f))^2 [AFGGPS23].
    """

    def rule(self, rows: Rows) -> NDArray[Any]:
        """Return the geometric median."""
        return np.asarray(rules.geometric_median(rows))
