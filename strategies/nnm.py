"""Nearest-neighbour mixing before any robust rule [AFGGPS23]: what makes rules hold when nodes' data differ."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.record import RecordDict
from privfed.strategies import rules
from privfed.strategies.matrix import dense
from privfed.strategies.robust import CountingStrategy, RobustStrategy, Rows, RuleStrategy, count_rows
from privfed.strategies.stage import PlainStage


class NearestNeighborMixing(CountingStrategy):
    """Replace each update by the mean of its n - f nearest, then apply the rule of `strategy`.

    Sampling, keys, stage and all else are those given here; of `strategy` only the rule is used. A rule with kappa has
    8f/(n-f) (kappa + 1) behind it. The rules of this package read mixed updates block by block and never hold them all;
    a rule of your own gets them as one array.
    """

    def __init__(self, strategy: RobustStrategy, *, num_malicious_nodes: int, **arguments: Any) -> None:
        if not isinstance(strategy, RobustStrategy):
            raise ValueError(f"strategy must be a robust one, got {type(strategy).__name__}")
        if not isinstance(strategy.stage, PlainStage):
            raise ValueError(
                f"strategy: only its rule is used, so that {strategy.stage!r} would hide nothing; give stage= to "
                "NearestNeighborMixing"
            )
        super().__init__(num_malicious_nodes=num_malicious_nodes, **arguments)
        self.strategy = strategy

    def rows_for(self, f: int) -> tuple[int, str]:
        """Return 2f + 1."""
        return 2 * f + 1, "2f + 1"

    def least_rows(self) -> tuple[int, str]:
        """Return 2f + 1, or what the rule needs if that is more."""
        return max(super().least_rows(), self.strategy.least_rows())

    def tolerated(self, n: int) -> int:
        """Return what both the mixing and the rule withstand."""
        own, inner = super().tolerated(n), self.strategy.tolerated(n)
        return own if inner is None else min(own, inner)

    def rule(self, rows: Rows) -> NDArray[Any]:
        """Return what the rule makes of the mixed rows."""
        mixed = rules.lazy_mixing(rows, super().tolerated(count_rows(rows)))
        left = mixed.rows.count
        inner = self.strategy
        inner.spoiled = self.spoiled + count_rows(rows) - left
        if isinstance(inner, RuleStrategy) and type(inner).aggregate is RuleStrategy.aggregate:
            # how many it is to tolerate is for the rule to say, not for the mixing
            return inner.rule(replace(mixed, f=(left - 1) // 2))
        made = dense(mixed.rows).array
        assert made is not None
        return inner.aggregate(np.asarray(made, np.float32))

    def save(self) -> RecordDict:
        """Return the rule's own state."""
        return self.strategy.save()

    def load(self, state: RecordDict) -> None:
        """Take up the rule's own state."""
        self.strategy.load(state)
