"""Federated averaging with momentum on the server [HQB19]."""

from __future__ import annotations

from typing import Any

import numpy as np

from privfed.array import Array
from privfed.record import ArrayRecord, RecordDict
from privfed.strategies.fedavg import FedAvg
from privfed.strategies.strategy import add_update
from privfed.strategies.view import Float64s, Sum, View

MOMENTUM = "fedavgm"


class FedAvgM(FedAvg):
    """Move by `server_learning_rate` times a velocity: velocity = server_momentum * velocity + mean update.

    server_momentum is in [0, 1). The other arguments are FedAvg's, by name.
    """

    def __init__(self, *, server_learning_rate: float = 1.0, server_momentum: float = 0.0, **arguments: Any) -> None:
        if not (np.isfinite(server_learning_rate) and server_learning_rate > 0):
            raise ValueError(f"server_learning_rate must be finite and > 0, got {server_learning_rate}")
        if not 0 <= server_momentum < 1:
            raise ValueError(f"server_momentum must be in [0, 1), got {server_momentum}")
        super().__init__(**arguments)
        self.server_learning_rate = server_learning_rate
        self.server_momentum = server_momentum
        self._velocity: Float64s | None = None

    def update(self, server_round: int, arrays: ArrayRecord, view: View) -> ArrayRecord:
        """Take one step with momentum."""
        if not isinstance(view, Sum):
            raise TypeError(f"FedAvgM needs Sum, got {type(view).__name__}")
        old = self._velocity
        velocity = view.mean if old is None else self.server_momentum * old + view.mean
        moved = add_update(arrays, self.server_learning_rate * velocity)
        self._velocity = velocity
        return moved

    def save(self) -> RecordDict:
        """Return the velocity."""
        if self._velocity is None:
            return RecordDict()
        return RecordDict({MOMENTUM: ArrayRecord({"velocity": Array(self._velocity)})})

    def load(self, state: RecordDict) -> None:
        """Take up the velocity."""
        record = state.array_records.get(MOMENTUM)
        self._velocity = record["velocity"].numpy() if record is not None else None
