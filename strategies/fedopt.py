"""Adaptive optimisers on the server: FedAdagrad, FedAdam, FedYogi [RCZ+21], Algorithm 2.

With D the mean update of a round, m = beta_1 m + (1 - beta_1) D and, coordinate by coordinate,

    Adagrad   v = v + D^2
    Adam      v = beta_2 v + (1 - beta_2) D^2
    Yogi      v = v - (1 - beta_2) D^2 sign(v - D^2)

the model moves by eta m / (sqrt(v) + tau). m and v start at 0, and there is no bias correction, as in the paper. What
is read is the mean alone, so these run under every stage and, as post-processing, under a privacy plan.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from privfed.array import Array
from privfed.record import ArrayRecord, RecordDict
from privfed.strategies.fedavg import FedAvg
from privfed.strategies.strategy import add_update
from privfed.strategies.view import Float64s, Sum, View

MOMENTS = "fedopt"


class FedOpt(FedAvg, ABC):
    """Move the model by an adaptive step.

    eta: the server's learning rate. eta_l: the nodes' learning rate, kept for reference only. tau: how little
    adaptivity there is where updates are small. The other arguments are FedAvg's, by name.
    """

    def __init__(
        self, *, eta: float = 0.1, eta_l: float = 0.1, beta_1: float = 0.0, tau: float = 1e-3, **arguments: Any
    ) -> None:
        for name, value in (("eta", eta), ("eta_l", eta_l), ("tau", tau)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and > 0, got {value}")
        if not 0 <= beta_1 < 1:
            raise ValueError(f"beta_1 must be in [0, 1), got {beta_1}")
        super().__init__(**arguments)
        self.eta, self.eta_l, self.beta_1, self.tau = eta, eta_l, beta_1, tau
        self._moments: tuple[Float64s, Float64s] | None = None

    @abstractmethod
    def second_moment(self, old: Float64s, square: Float64s) -> Float64s:
        """Return the next v from the last one and D^2."""

    def update(self, server_round: int, arrays: ArrayRecord, view: View) -> ArrayRecord:
        """Take one adaptive step."""
        if not isinstance(view, Sum):
            raise TypeError(f"{type(self).__name__} needs Sum, got {type(view).__name__}")
        old = self._moments
        first, second = old if old is not None else (np.zeros_like(view.mean), np.zeros_like(view.mean))
        first = self.beta_1 * first + (1 - self.beta_1) * view.mean
        second = self.second_moment(second, np.square(view.mean))
        moved = add_update(arrays, self.eta * first / (np.sqrt(second) + self.tau))
        self._moments = first, second
        return moved

    def save(self) -> RecordDict:
        """Return both moments."""
        if self._moments is None:
            return RecordDict()
        first, second = self._moments
        return RecordDict({MOMENTS: ArrayRecord({"first": Array(first), "second": Array(second)})})

    def load(self, state: RecordDict) -> None:
        """Take up both moments."""
        record = state.array_records.get(MOMENTS)
        self._moments = (record["first"].numpy(), record["second"].numpy()) if record is not None else None


class FedAdagrad(FedOpt):
    """Adagrad on the server; Flower's defaults."""

    def __init__(self, *, eta: float = 0.1, eta_l: float = 0.1, tau: float = 1e-3, **arguments: Any) -> None:
        super().__init__(eta=eta, eta_l=eta_l, beta_1=0.0, tau=tau, **arguments)

    def second_moment(self, old: Float64s, square: Float64s) -> Float64s:
        """Add up squares."""
        return np.asarray(old + square)


class _Decaying(FedOpt):
    def __init__(self, *, beta_2: float, **arguments: Any) -> None:
        if not 0 <= beta_2 < 1:
            raise ValueError(f"beta_2 must be in [0, 1), got {beta_2}")
        super().__init__(**arguments)
        self.beta_2 = beta_2


class FedAdam(_Decaying):
    """Adam on the server; Flower's defaults."""

    def __init__(
        self,
        *,
        eta: float = 0.1,
        eta_l: float = 0.1,
        beta_1: float = 0.9,
        beta_2: float = 0.99,
        tau: float = 1e-3,
        **arguments: Any,
    ) -> None:
        super().__init__(eta=eta, eta_l=eta_l, beta_1=beta_1, beta_2=beta_2, tau=tau, **arguments)

    def second_moment(self, old: Float64s, square: Float64s) -> Float64s:
        """Average squares with exponential decay."""
        return np.asarray(self.beta_2 * old + (1 - self.beta_2) * square)


class FedYogi(_Decaying):
    """Yogi on the server; Flower's defaults."""

    def __init__(
        self,
        *,
        eta: float = 0.01,
        eta_l: float = 0.0316,
        beta_1: float = 0.9,
        beta_2: float = 0.99,
        tau: float = 1e-3,
        **arguments: Any,
    ) -> None:
        super().__init__(eta=eta, eta_l=eta_l, beta_1=beta_1, beta_2=beta_2, tau=tau, **arguments)

    def second_moment(self, old: Float64s, square: Float64s) -> Float64s:
        """Move towards the square by a fixed share of it."""
        return np.asarray(old - (1 - self.beta_2) * square * np.sign(old - square))
