"""q-FedAvg: nodes that do badly count more [LSBS20]."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from privfed.record import ArrayRecord, MetricRecord, RecordDict
from privfed.strategies.exchange import Exchange
from privfed.strategies.strategy import Strategy, add_update
from privfed.strategies.view import Updates, View

if TYPE_CHECKING:
    from privfed.strategies.strategy import _Run


class QFedAvg(Strategy):
    """Weigh each node's update by its loss F to the power q, with the step size the paper derives.

    With L = 1 / client_learning_rate and D = -L * update, the model moves by
    -sum(F^q D) / sum(q F^(q-1) ||D||^2 + L F^q).
    q = 0 is the unweighted mean. train_loss_key: the metric that holds F, the node's loss on the model it received;
    a node that reports none > 0 is excluded. Nodes' losses and single updates are needed, so only PlainStage will do.
    Not robust: the loss is the node's own word, and a large one takes over the mean.
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
        logs = np.log([self._loss(metrics) for metrics in view.metrics])
        squares = np.array([float(np.linalg.norm(row.astype(np.float64))) for row in view.rows]) ** 2 * lipschitz**2
        # both sums over the greatest F^q, so that no loss, however large or small, leaves the range of float64
        greatest = self.q * logs.max()
        powers = np.exp(self.q * logs - greatest)
        steps = lipschitz * powers
        if self.q:
            # an infinite denominator is a step that does not move the model
            with np.errstate(over="ignore", invalid="ignore"):
                steps = steps + np.where(squares > 0, self.q * np.exp((self.q - 1) * logs - greatest) * squares, 0.0)
        move = np.zeros(view.rows.shape[1])
        for power, row in zip(powers, view.rows, strict=True):
            move += power * lipschitz * row
        return add_update(arrays, np.asarray(move / steps.sum()))

    def _loss(self, metrics: MetricRecord) -> float:
        loss = metrics[self.train_loss_key]
        assert not isinstance(loss, list)  # as the objection has seen to
        return float(loss)

    def _objection(self, metrics: MetricRecord) -> str | None:
        loss = metrics.get(self.train_loss_key)
        if isinstance(loss, int | float) and loss > 0:
            return None
        return f"{self.train_loss_key}={loss!r}, and q-FedAvg needs a loss > 0"

    def _exchange(
        self, run: _Run, server_round: int, kind: str, content: RecordDict, cohort: tuple[int, ...]
    ) -> Exchange:
        exchange = super()._exchange(run, server_round, kind, content, cohort)
        return replace(exchange, objection=self._objection) if kind == "train" else exchange
