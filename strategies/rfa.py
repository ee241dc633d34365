"""RFA: the geometric median of the updates [PKH22]."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.strategies import rules
from privfed.strategies.robust import RobustStrategy


class RFA(RobustStrategy):
    """Add the geometric median of the updates, unweighted and converged; it withstands any minority."""

    def aggregate(self, rows: NDArray[np.float32]) -> NDArray[Any]:
        """Return the geometric median."""
        return np.asarray(rules.geometric_median(rows))
