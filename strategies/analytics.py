"""Federated analytics: one question to all nodes, one sum back."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privfed.errors import QuorumError
from privfed.grid import Grid
from privfed.record import ArrayRecord, ConfigRecord, ConfigValue, MetricRecord, RecordDict
from privfed.strategies.cohort import wait_for_nodes
from privfed.strategies.exchange import Exchange
from privfed.strategies.stage import PlainStage, Stage
from privfed.strategies.view import Sum


@dataclass(frozen=True, slots=True)
class Answer:
    """totals: float64 arrays, the sums over the nodes that answered. nodes: how many did. excluded: node -> cause."""

    totals: dict[str, NDArray[np.float64]]
    nodes: int
    excluded: dict[int, str]


class FedAnalytics:
    """Ask every node for arrays of known shapes and learn their sum: counts, histograms, moments.

    stage: PlainStage() sees every node's answer; SecureStage(protocol, max_value=...) only the sum, and max_value must
    cover every entry a node may answer. min_nodes: fewer answers than this are an error, not a result. A minimum is no
    differential privacy: a sum over few nodes can say a lot about one of them.
    """

    def __init__(self, *, stage: Stage | None = None, min_nodes: int = 2) -> None:
        if min_nodes < 2:
            raise ValueError(f"min_nodes must be >= 2: a sum over one node is its answer, got {min_nodes}")
        self.stage = stage if stage is not None else PlainStage()
        self.min_nodes = min_nodes

    def query(
        self,
        grid: Grid,
        shapes: Mapping[str, tuple[int, ...]],
        config: Mapping[str, ConfigValue] | None = None,
        *,
        action: str = "",
        timeout: float = 600.0,
    ) -> Answer:
        """Send one query and return the sums, in float64.

        shapes: name -> shape of each array a node answers with, as float64, in an ArrayRecord named "arrays".
        action: the handler, `@app.query(action)`; "" is the default one. timeout: seconds.
        Raises QuorumError when fewer than min_nodes answers are valid.
        """
        template = ArrayRecord(
            {name: ArrayRecord([np.zeros(shape)])["0"] for name, shape in shapes.items()},
        )
        content = RecordDict({"arrays": template})
        content["config"] = ConfigRecord(dict(config or {}))
        nodes = tuple(wait_for_nodes(grid, self.min_nodes, timeout))
        exchange = Exchange(
            grid=grid,
            round=1,
            kind=f"query.{action}" if action else "query",
            content=content,
            nodes=nodes,
            deadline=time.monotonic() + timeout,
            model=template,
            arrays_key="arrays",
            weight_key=None,
            metrics_function=lambda contents, key: MetricRecord(),
        )
        outcome = self.stage.collect(exchange)
        grid.recorder.report("query", nodes=len(nodes), valid=outcome.valid, excluded=len(nodes) - outcome.valid)
        excluded = {exclusion.node: exclusion.cause for exclusion in outcome.excluded}
        if outcome.valid < self.min_nodes or not isinstance(outcome.view, Sum):
            raise QuorumError(outcome.valid, self.min_nodes, f"query: {excluded}" if excluded else "query")
        total, at, totals = outcome.view.mean * outcome.view.weight, 0, {}
        for name, array in template.items():
            size = array.view().size
            totals[name] = np.asarray(total[at : at + size]).reshape(array.shape)
            at += size
        return Answer(totals, outcome.valid, excluded)
