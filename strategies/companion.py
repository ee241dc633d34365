"""Strategies whose arrays travel with companions: more arrays that are averaged with the model and are not part of it.

A companion is read off the same mean as the model, so such a strategy needs no more than the sum: it streams, and it
runs under secure aggregation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from privfed.record import ArrayRecord, ConfigRecord, RecordDict
from privfed.strategies.exchange import Exchange
from privfed.strategies.strategy import Strategy
from privfed.strategies.view import Float64s, Sum, View
from privfed.update import dimension

if TYPE_CHECKING:
    from privfed.strategies.strategy import _Run


class CompanionStrategy(Strategy, ABC):
    """Send the model with `companions(arrays)` and average both; the subclass reads their mean change in `apply`.

    equal: every node weighs the same, whatever it claims.
    """

    unbounded: ClassVar[str] = (
        "beside its update every node sends arrays or weights of its own, which the plan's clip does not bound"
    )
    equal = False

    @abstractmethod
    def companions(self, arrays: ArrayRecord) -> ArrayRecord:
        """Return the arrays that travel with the model; their names must not be the model's."""

    @abstractmethod
    def apply(self, arrays: ArrayRecord, model: Float64s, beside: Float64s, weight: float) -> ArrayRecord:
        """Return the next model from the mean change of the model and of the companions, and the total weight."""

    def configure(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord) -> RecordDict:
        """Send model and companions in one record."""
        beside = self.companions(arrays)
        clash = sorted(arrays.keys() & beside.keys())
        if clash:
            raise ValueError(f"initial_arrays: {type(self).__name__} keeps the names {clash} for itself")
        return super().configure(server_round, ArrayRecord({**arrays, **beside}), config)

    def update(self, server_round: int, arrays: ArrayRecord, view: View) -> ArrayRecord:
        """Split the mean and apply it."""
        if not isinstance(view, Sum):
            raise TypeError(f"{type(self).__name__} needs Sum, got {type(view).__name__}")
        size = dimension(arrays)
        return self.apply(arrays, view.mean[:size], view.mean[size:], view.weight)

    def _exchange(
        self, run: _Run, server_round: int, kind: str, content: RecordDict, cohort: tuple[int, ...]
    ) -> Exchange:
        exchange = super()._exchange(run, server_round, kind, content, cohort)
        if kind != "train":
            return exchange
        whole = content.array_records[self.arrayrecord_key]
        return replace(exchange, model=whole, weight_key=None if self.equal else exchange.weight_key)
