"""Federated metrics: their weighted mean over the nodes that reported them."""

from __future__ import annotations

import math
from collections.abc import Callable

from privfed.record import MetricRecord, RecordDict

MetricsFunction = Callable[[list[RecordDict], str], MetricRecord]
"""(contents without arrays, weight key) -> metrics; weight key "" means equal weights."""


def metrics_of(content: RecordDict) -> MetricRecord:
    """Merge the MetricRecords of a reply; the first of two equal keys counts."""
    merged = MetricRecord()
    for record in content.metric_records.values():
        for key, value in record.items():
            if key not in merged:
                merged[key] = value
    return merged


def is_finite_metric(value: int | float | list[int] | list[float]) -> bool:
    """Return whether a metric holds no NaN and no infinity."""
    return all(math.isfinite(item) for item in value) if isinstance(value, list) else math.isfinite(value)


def average_metrics(contents: list[RecordDict], weight_key: str) -> MetricRecord:
    """Return each metric's weighted mean over the replies that have it; lists element by element.

    Lists whose lengths differ between replies have no mean and are left out, as is the weight itself.
    """
    sums: dict[str, float | list[float]] = {}
    totals: dict[str, float] = {}
    uneven: set[str] = set()
    for content in contents:
        metrics = metrics_of(content)
        weight = metrics.get(weight_key, 1) if weight_key else 1
        scale = float(weight) if not isinstance(weight, list) else 1.0
        for key, value in metrics.items():
            if key == weight_key:
                continue
            old = sums.get(key)
            if isinstance(value, list):
                if old is not None and not (isinstance(old, list) and len(old) == len(value)):
                    uneven.add(key)
                    continue
                start = old if isinstance(old, list) else [0.0] * len(value)
                sums[key] = [a + scale * b for a, b in zip(start, value, strict=True)]
            elif isinstance(old, list):
                uneven.add(key)
                continue
            else:
                sums[key] = (old or 0.0) + scale * value
            totals[key] = totals.get(key, 0.0) + scale
    result = MetricRecord()
    for key, total in sums.items():
        if key in uneven or not totals[key]:
            continue
        result[key] = [item / totals[key] for item in total] if isinstance(total, list) else total / totals[key]
    return result
