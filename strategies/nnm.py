"""Nearest-neighbour mixing before any robust rule [AFGGPS23]: what makes rules hold when nodes' data differ."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.record import RecordDict
from privfed.strategies import rules
from privfed.strategies.robust import RobustStrategy


class NearestNeighborMixing(RobustStrategy):
    """Replace each update by the mean of its n - f nearest, then apply the rule of `strategy`.

    Sampling, keys, stage and all else are those given here; of `strategy` only the rule is used.
    """

    def __init__(self, strategy: RobustStrategy, *, num_malicious_nodes: int, **arguments: Any) -> None:
        if not isinstance(strategy, RobustStrategy):
            raise ValueError(f"strategy must be a robust one, got {type(strategy).__name__}")
        if num_malicious_nodes < 0:
            raise ValueError(f"num_malicious_nodes must be >= 0, got {num_malicious_nodes}")
        super().__init__(**arguments)
        self.strategy = strategy
        self.num_malicious_nodes = num_malicious_nodes

    def least_rows(self) -> tuple[int, str]:
        """Return 2f + 1, or what the rule needs if that is more."""
        return max((2 * self.num_malicious_nodes + 1, "2f + 1"), self.strategy.least_rows())

    def aggregate(self, rows: NDArray[np.float32]) -> NDArray[Any]:
        """Return what the rule makes of the mixed rows."""
        mixed = rules.nearest_neighbor_mixing(rows, self.num_malicious_nodes)
        return self.strategy.aggregate(np.asarray(mixed, np.float32))

    def save(self) -> RecordDict:
        """Return the rule's own state."""
        return self.strategy.save()

    def load(self, state: RecordDict) -> None:
        """Take up the rule's own state."""
        self.strategy.load(state)
