"""q-FedAvg: nodes that do badly count more [LSBS20]."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from privfed.record import ArrayRecord
from privfed.strategies.strategy import Strategy, add_update
from privfed.strategies.view import Updates, View


class QFedAvg(Strategy):
    """Weigh each node's update by its loss F to the power q, with the step size the paper derives.

    With L = 1 / client_learning_rate and D = -L * update, the model moves by
    -sum(F^q D) / sum(q F^(q-1) ||D||^2 + L F^q).
    q = 0 is the unweighted mean. train_loss_key: the metric that holds F, the node's loss on the model it received,
    which must be > 0. Nodes' losses and single updates are needed, so only PlainStage will do.
    """

    needs: ClassVar[type[View]] = Updates
    unbounded: ClassVar[str] = "updates weigh by powers of the losses that nodes report, which have no bound"

    def __init__(
        self, *, client_learning_rate: float, q: float = 0.1, train_loss_key: str = "train_loss", **arguments: Any
    ) -> None:
        if not (math.isfinite(client_learning_rate) and client_learning_rate > 0):
            raise ValueError(f"client_learning_rate must be finite and > 0, got {client_learning_rate}")
        if not (math.isfinite(q) and q >= 0):
            raise ValueError(f"q must be finite and >= 0, got {q}")
        super().__init__(**arguments)
        if Updates not in self.stage.offers:
            raise ValueError(f"stage: QFedAvg needs every node's loss and update, which {self.stage!r} hides")
        self.client_learning_rate = client_learning_rate
        self.q = q
        self.train_loss_key = train_loss_key

    def update(self, server_round: int, arrays: ArrayRecord, view: View) -> ArrayRecord:
        """Take the fair step."""
        if not isinstance(view, Updates):
            raise TypeError(f"QFedAvg needs Updates, got {type(view).__name__}")
        lipschitz = 1 / self.client_learning_rate
        losses = np.array([self._loss(node, view) for node in range(len(view.rows))])
        squares = np.array([float(np.linalg.norm(row.astype(np.float64))) for row in view.rows]) ** 2 * lipschitz**2
        powers = losses**self.q
        steps = self.q * losses ** (self.q - 1) * squares + lipschitz * powers
        move = np.zeros(view.rows.shape[1])
        for power, row in zip(powers, view.rows, strict=True):
            move += power * lipschitz * row
        return add_update(arrays, np.asarray(move / steps.sum()))

    def _loss(self, index: int, view: Updates) -> float:
        loss = view.metrics[index].get(self.train_loss_key)
        if not isinstance(loss, int | float) or not loss > 0:
            raise ValueError(
                f"node {view.sources[index]} reports {self.train_loss_key}={loss!r}; q-FedAvg needs a loss > 0"
            )
        return float(loss)
