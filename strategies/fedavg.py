"""Federated averaging: the weighted mean of the nodes' models [MMR+17]."""

from __future__ import annotations

from typing import ClassVar

from privfed.record import ArrayRecord
from privfed.strategies.strategy import Strategy, add_update
from privfed.strategies.view import Sum, View


class FedAvg(Strategy):
    """Replace the model by the mean of the nodes' models, weighted by `weighted_by_key`.

    Under PlainStage replies are streamed: memory is O(model). Under a privacy plan every node weighs the same and the
    noised sum of clipped updates is divided by the plan's public cohort size.
    """

    linear: ClassVar[bool] = True

    def update(self, server_round: int, arrays: ArrayRecord, view: View) -> ArrayRecord:
        """Add the mean update."""
        if not isinstance(view, Sum):
            raise TypeError(f"FedAvg needs Sum, got {type(view).__name__}")
        return add_update(arrays, view.mean)
