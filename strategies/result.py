"""What a run of a strategy returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from privfed.record import ArrayRecord, MetricRecord


@dataclass(slots=True)
class Result:
    """The last model and the metrics of every round, by round number (the server's own also for round 0).

    rounds[r]: everything that was recorded about round r + 1, as committed with its checkpoint.
    epsilon: the certified upper bound spent under the run's privacy plan, or None without a plan.
    """

    arrays: ArrayRecord
    train_metrics_clientapp: dict[int, MetricRecord] = field(default_factory=dict)
    evaluate_metrics_clientapp: dict[int, MetricRecord] = field(default_factory=dict)
    evaluate_metrics_serverapp: dict[int, MetricRecord] = field(default_factory=dict)
    rounds: tuple[Mapping[str, object], ...] = ()
    epsilon: float | None = None
