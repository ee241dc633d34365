"""Federated analytics: one question to all nodes, one sum back."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from privfed.errors import PlanRefused, QuorumError, RunFailed
from privfed.grid import Grid
from privfed.record import ArrayRecord, ConfigRecord, ConfigValue, MetricRecord, RecordDict
from privfed.strategies.cohort import wait_for_nodes
from privfed.strategies.exchange import Exchange
from privfed.strategies.stage import PlainStage, Stage
from privfed.strategies.view import Outcome, Sum
from privfed.update import PLAN

if TYPE_CHECKING:
    from privfed.plan import PrivacyPlan


@dataclass(frozen=True, slots=True)
class Answer:
    """totals: float64 arrays, the sums over the nodes that answered. nodes: how many did. excluded: node -> cause.

    Under a privacy plan totals carry noise of the standard deviation `stddev` in every entry, at most; nodes is the
    planned cohort, a public constant, excluded is empty, and privacy says what was spent: epsilon, delta and their
    terms.
    """

    totals: dict[str, NDArray[np.float64]]
    nodes: int
    excluded: dict[int, str]
    stddev: float = 0.0
    privacy: dict[str, object] = field(default_factory=dict)


class FedAnalytics:
    """Ask every node for arrays of known shapes and learn their sum: counts, histograms, moments.

    stage: PlainStage() sees every node's answer; SecureStage(protocol, max_value=...) only the sum, and max_value must
    cover every entry a node may answer. min_nodes: fewer answers than this are an error, not a result. A minimum is no
    differential privacy: a sum over few nodes can say a lot about one of them.

    privacy: a PrivacyPlan, or None. Under one a node's whole answer to a query, all arrays together, is clipped to the
    plan's L2 bound; the sum is noised, by the server or by the nodes, and charged to the run's ledger before anybody
    reads it. `rounds` of the plan is how many queries its budget is for (None: one); a run's queries and its training
    share one ledger, and so one plan. A question that was answered under a SecureStage and central noise is not
    answered twice in a run.

    Raises PlanRefused for a plan that is for rounds of training (correlated noise, a clip that adapts), or that the
    stage cannot keep.
    """

    def __init__(self, *, stage: Stage | None = None, min_nodes: int = 2, privacy: PrivacyPlan | None = None) -> None:
        if min_nodes < 2:
            raise ValueError(f"min_nodes must be >= 2: a sum over one node is its answer, got {min_nodes}")
        self.stage = stage if stage is not None else PlainStage()
        self.min_nodes = min_nodes
        self.privacy = privacy
        self._asked = 0
        if privacy is not None:
            if privacy.correlation is not None or privacy.adaptive is not None:
                raise PlanRefused(
                    "privacy: correlation and adaptive are about the rounds of a training, and every query is a "
                    "question of its own; leave them out"
                )
            self.stage.check_privacy(privacy)

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
        Raises QuorumError when fewer than min_nodes answers are valid, RunFailed when their sum leaves the range of
        float64; under a plan RunFailed when the budget does not cover the query, before anything is sent, and
        PlanRefused for a cohort or size that the plan does not suit.
        """
        template = ArrayRecord(
            {name: ArrayRecord([np.zeros(shape)])["0"] for name, shape in shapes.items()},
        )
        content = RecordDict({"arrays": template})
        content["config"] = ConfigRecord(dict(config or {}))
        nodes = tuple(wait_for_nodes(grid, self.min_nodes, timeout))
        self._asked += 1
        exchange = Exchange(
            grid=grid,
            round=self._asked,
            kind=f"query.{action}" if action else "query",
            content=content,
            nodes=nodes,
            deadline=time.monotonic() + timeout,
            model=template,
            arrays_key="arrays",
            weight_key=None,
            metrics_function=lambda contents, key: MetricRecord(),
        )
        if self.privacy is not None:
            return self._ask_privately(exchange, self.privacy)
        outcome = self.stage.collect(exchange)
        self._judge(exchange, outcome, self.min_nodes)
        if not isinstance(outcome.view, Sum):
            raise QuorumError(outcome.valid, self.min_nodes, "query")
        excluded = {exclusion.node: exclusion.cause for exclusion in outcome.excluded}
        return Answer(_totals(outcome.view, template), outcome.valid, excluded)

    def _ask_privately(self, exchange: Exchange, plan: PrivacyPlan) -> Answer:
        """Authorise, draw, ask, charge, and only then noise or unmask, as in a round of training."""
        from privfed.strategies.release import open_release

        model, number = exchange.model, exchange.round
        release = open_release(plan, exchange.grid, model, len(exchange.nodes), 1, purpose="query")
        try:
            release.authorise(number)
            cohort = release.draw(exchange.nodes, number)
            content = exchange.content
            content[PLAN] = release.instruction(number)
            asked = release.prepare(replace(exchange, content=content, nodes=cohort))
            outcome = self.stage.collect(asked) if cohort else Outcome()
            # A small cohort drawn by chance is part of the mechanism; nodes of the cohort that fail are not.
            self._judge(asked, outcome, min(self.min_nodes, len(cohort)))
            said = release.charge(number, outcome.view)
        finally:
            release.close()
        view = release.view()
        return Answer(_totals(view, model), round(release.denominator), {}, release.stddev, said)

    def _judge(self, exchange: Exchange, outcome: Outcome, quorum: int) -> None:
        """Report the query; fail it when too few answers count."""
        asked = len(exchange.nodes)
        exchange.grid.recorder.report("query", nodes=asked, valid=outcome.valid, excluded=asked - outcome.valid)
        if outcome.valid < quorum:
            causes = {exclusion.node: exclusion.cause for exclusion in outcome.excluded}
            raise QuorumError(outcome.valid, quorum, f"query: {causes}" if causes else "query")


def _totals(view: Sum, template: ArrayRecord) -> dict[str, NDArray[np.float64]]:
    """Return the sums, by name and in shape."""
    total, at, totals = view.mean * view.weight, 0, {}
    if not np.isfinite(total).all():
        raise RunFailed(
            "query: the sum of the answers leaves the range of float64, so some node's answer is no measurement; ask "
            "through SecureStage(protocol, max_value=...), which bounds every entry"
        )
    for name, array in template.items():
        size = array.view().size
        totals[name] = np.asarray(total[at : at + size]).reshape(array.shape)
        at += size
    return totals
