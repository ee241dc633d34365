"""The aggregation stage: it decides what the server can see of a round.

A stage sends the instructions of an exchange, judges the replies, and brings back a view. `PlainStage` sees every
update; stages that hide more offer less, and a strategy that needs more than its stage offers is refused when built.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from privfed.errors import PlanRefused
from privfed.strategies.diagnostic import NormFold, describe_updates
from privfed.strategies.exchange import Exchange
from privfed.strategies.fold import MeanFold, RowFold
from privfed.strategies.intake import Intake
from privfed.strategies.metric import metrics_of
from privfed.strategies.view import Float64s, Outcome, RandomBytes, Sum, Unreleased, Updates, View
from privfed.update import UpdateError, dimension, flatten, subtract

if TYPE_CHECKING:
    from privfed.plan import PrivacyPlan


class Stage(ABC):
    """Bring back a view of a round's replies.

    offers: the views it can give. per_node: whether instructions may differ between nodes.
    """

    offers: ClassVar[frozenset[type[View]]] = frozenset()
    per_node: ClassVar[bool] = False

    @abstractmethod
    def collect(self, exchange: Exchange) -> Outcome:
        """Run a training exchange and return the view that `exchange.need` names."""

    @abstractmethod
    def measure(self, exchange: Exchange) -> Outcome:
        """Run an evaluation exchange and return its metrics."""

    def check_evaluation(self) -> None:
        """Raise ValueError when this stage cannot evaluate as it is set up."""
        return

    def check_privacy(self, plan: PrivacyPlan) -> None:
        """Raise PlanRefused when this stage cannot keep what the plan promises."""
        if plan.distributed:
            raise PlanRefused(
                f"privacy: mechanism {plan.mechanism!r} needs a stage that shows the server nothing but the sum of all "
                f"nodes, and {self!r} shows it more; use SecureStage(protocol)"
            )


class PlainStage(Stage):
    """The server sees every reply, and streams them: a mean needs memory O(model), whatever the number of nodes."""

    offers: ClassVar[frozenset[type[View]]] = frozenset({Sum, Updates})
    per_node: ClassVar[bool] = True

    def __repr__(self) -> str:
        return "PlainStage()"

    def collect(self, exchange: Exchange) -> Outcome:
        """Exclude bad replies with node and cause; fold the others in the order of the nodes."""
        if exchange.clip is not None:
            return self._collect_private(exchange, exchange.clip)
        return self._collect_rows(exchange) if exchange.need is Updates else self._collect_mean(exchange)

    def measure(self, exchange: Exchange) -> Outcome:
        """Aggregate the metrics of valid replies."""
        intake = Intake(exchange)
        weight = sum(reply.weight for reply in intake.evaluate())
        if intake.outcome.valid and weight == 0:
            intake.void("all weights are 0")
        return intake.finish(None)

    def _collect_mean(self, exchange: Exchange) -> Outcome:
        intake = Intake(exchange)
        fold, norms = MeanFold(exchange.model), NormFold(exchange.model)
        for reply in intake.train():
            fold.add(reply.arrays, reply.weight, update=reply.update)
            norms.add(reply.node, reply.arrays, reply.weight, update=reply.update)
        if intake.outcome.valid and fold.weight == 0:
            intake.void("all weights are 0")
        if not intake.outcome.valid:
            return intake.finish(None)
        view = fold.finish()
        intake.outcome.notes["updates"] = norms.finish(view.mean, view.weight)
        return intake.finish(view)

    def _collect_rows(self, exchange: Exchange) -> Outcome:
        intake = Intake(exchange)
        rows = RowFold(exchange.model, len(exchange.nodes))
        metrics = []
        for reply in intake.train():
            if rows.add(reply.node, reply.arrays, reply.weight, update=reply.update):
                metrics.append(metrics_of(reply.metrics))
            else:
                intake.reject(reply.node, "its update is too large for float32")
        view = Updates(rows.rows, tuple(rows.sources), tuple(rows.weights), tuple(metrics), intake.spoiled)
        if exchange.enough is not None:  # they came in the order of arrival
            view = view.ordered()
        intake.outcome.notes["updates"] = describe_updates(view)
        return intake.finish(view)

    def _collect_private(self, exchange: Exchange, clip: float) -> Outcome:
        """Sum clipped updates in integers; an update that is not clipped does not count."""
        from privfed.privacy.mechanisms import LatticeSum

        intake = Intake(exchange)
        total = LatticeSum(dimension(exchange.model), sensitivity=clip)
        for reply in intake.train():
            try:
                update = reply.arrays if reply.update else subtract(reply.arrays, exchange.model)
                total.add(flatten(update, exchange.model))
            except (UpdateError, ValueError):
                intake.reject(reply.node, f"its update is not clipped to {clip:g}: give the ClientApp mods.clip()")

        def release(noise_multiplier: float, random: RandomBytes) -> Float64s:
            return total.release(noise_multiplier=noise_multiplier, random=random)[0]

        return intake.finish(Unreleased(release, total.granularity))
