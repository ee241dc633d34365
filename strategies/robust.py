"""Strategies that withstand Byzantine nodes: each applies one rule of `privfed.strategies.rules` to all updates.

They ignore the weights nodes claim, which would be a lever. Under GroupedStage the rows are group means, and the number
of nodes to tolerate is the number of groups to tolerate: f nodes spoil at most f groups. What a rule cannot promise for
the rows that are there (Krum needs n >= 2 f + 3, Bulyan n >= 4 f + 3, others n > 2 f) fails the round with the numbers,
before any node is asked when the cohort or its groups are too few, and afterwards when too few have answered. A node
whose reply held what no rule can use is one of the f: where the rows that are left need it, f is lowered by as many
nodes, so that none can stop training by sending NaN.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from privfed.errors import RunFailed
from privfed.record import ArrayRecord, RecordDict
from privfed.strategies import rules
from privfed.strategies.cohort import cohort_size
from privfed.strategies.exchange import Exchange
from privfed.strategies.guard import Refusal, Screened, count
from privfed.strategies.strategy import Strategy, add_update
from privfed.strategies.view import GroupMeans, Outcome, Updates, View

if TYPE_CHECKING:
    from privfed.strategies.strategy import _Run

Rows: TypeAlias = NDArray[np.float32] | Screened
"""A plain array, or rows that a rule of `privfed.strategies.rules` makes block by block as it reads them."""


def count_rows(rows: Rows) -> int:
    """Return how many rows there are."""
    return rows.rows.count if isinstance(rows, Screened) else len(rows)


class RobustStrategy(Strategy, ABC):
    """Add `aggregate(rows)` to the model. A subclass of a few lines makes any rule a strategy."""

    needs: ClassVar[type[View]] = Updates
    unbounded: ClassVar[str] = (
        "its rule chooses among the updates, and one node may change the choice: the result then moves by the distance "
        "between two other nodes' updates, which no clip bounds by one node's share of the mean"
    )
    share: ClassVar[str] = ""
    """The argument that says how many nodes to tolerate, for messages; empty when there is none to lower."""
    spoiled = 0
    """How many nodes of the round at hand are known to be Byzantine, their replies left out."""

    @abstractmethod
    def aggregate(self, rows: NDArray[np.float32]) -> NDArray[Any]:
        """Return one row from n rows, which are in the order of node ids (or group numbers)."""

    def least_rows(self) -> tuple[int, str]:
        """Return how many rows the rule needs for what it is to tolerate, and the formula that says so."""
        return 1, "1"

    def tolerated(self, n: int) -> int | None:
        """Return how many Byzantine rows of n the rule withstands; None when it does not say."""
        return None

    def update(self, server_round: int, arrays: ArrayRecord, view: View) -> ArrayRecord:
        """Add what the rule makes of the updates."""
        if not isinstance(view, Updates):
            raise TypeError(f"{type(self).__name__} needs Updates, got {type(view).__name__}")
        self.spoiled = view.spoiled
        least, formula = self.least_rows()
        if isinstance(view, GroupMeans) and len(view.rows) < least:
            raise Refusal(f"needs n >= {formula} = {least} rows, got n = {len(view.rows)} groups that ended")
        return add_update(arrays, np.asarray(self.aggregate(view.rows), np.float64))

    def _exchange(
        self, run: _Run, server_round: int, kind: str, content: RecordDict, cohort: tuple[int, ...]
    ) -> Exchange:
        group_size = getattr(self.stage, "group_size", 1)
        counted = len(cohort)
        if self.pace.over_selection and group_size == 1:  # the round closes when as many as wanted have answered
            wanted = cohort_size(len(run.grid.get_node_ids()), self.fraction_train, self.min_train_nodes)
            counted = min(counted, wanted)
        rows = max(1, counted // group_size)
        least, formula = self.least_rows()
        if kind == "train" and rows < least:
            source = f"{counted} nodes" + (f" in groups of {group_size}" if group_size > 1 else "")
            remedies = ["make the groups smaller"] if group_size > 1 else []
            remedies += ["ask more nodes", *([f"lower {self.share}"] if self.share else [])]
            raise RunFailed(
                f"round {server_round}: {type(self).__name__} needs n >= {formula} = {least} rows, got n = {rows} "
                f"({source}); {' or '.join(remedies)}"
            )
        return super()._exchange(run, server_round, kind, content, cohort)

    def _judge(self, exchange: Exchange, outcome: Outcome, quorum: int, metrics: dict[str, object] | None) -> None:
        """Say in the round's metrics how many Byzantine nodes it withstands: as many as it withstands rows."""
        view = outcome.view
        if isinstance(view, Updates) and len(view.rows):
            self.spoiled = view.spoiled
            tolerated = self.tolerated(len(view.rows))
            if tolerated is not None:
                outcome.notes["tolerated"] = tolerated
        super()._judge(exchange, outcome, quorum, metrics)


class RuleStrategy(RobustStrategy, ABC):
    """A strategy by a rule of `privfed.strategies.rules`, which takes rows before they are made.

    Where it does not say otherwise it withstands any minority, of three groups at least: two have none.
    """

    def least_rows(self) -> tuple[int, str]:
        """Return 3 where rows are group means, and 1 where they are nodes' own."""
        return (3, "2f + 1") if getattr(self.stage, "group_size", 1) > 1 else (1, "1")

    def tolerated(self, n: int) -> int | None:
        """Return the greatest minority of n."""
        return (n - 1) // 2

    @abstractmethod
    def rule(self, rows: Rows) -> NDArray[Any]:
        """Return one row from n rows."""

    def aggregate(self, rows: NDArray[np.float32]) -> NDArray[Any]:
        """Return what the rule makes of the rows."""
        return self.rule(rows)


class FedMedian(RuleStrategy):
    """The coordinate-wise median of the updates, unweighted [YCRB18].

    It withstands any minority; kappa = n/(n-2f).
    """

    def rule(self, rows: Rows) -> NDArray[Any]:
        """Return the median."""
        return np.asarray(rules.median(rows))


class FedTrimmedAvg(RuleStrategy):
    """The mean without the beta * n smallest and largest values of each coordinate, unweighted [YCRB18].

    beta is a share in [0, 0.5); the number cut on each side is rounded up, so that a small share never becomes no
    protection at all, and leaves the middle one or two: 3 rows are needed unless beta is 0, which is the plain mean. It
    withstands a share beta of the rows; kappa = f/(n-2f), the least there is, with f rows cut on each side. Rows are
    nodes, and under GroupedStage groups, of which each Byzantine node may spoil one: 0.2 of 10 groups are 2 nodes,
    however many are in a group.
    """

    share = "beta"

    def __init__(self, *, beta: float = 0.2, **arguments: Any) -> None:
        if not 0 <= beta < 0.5:
            raise ValueError(f"beta must be in [0, 0.5), got {beta}")
        super().__init__(**arguments)
        self.beta = beta

    def least_rows(self) -> tuple[int, str]:
        """Return 3, of which the middle one is left, or 1 when nothing is cut."""
        return (3, "2f + 1") if self.beta else (1, "1")

    def tolerated(self, n: int) -> int:
        """Return how many rows are cut on each side."""
        # fewer than n/2 rows are a share beta, so that the middle never has to be cut for them
        return min(math.ceil(self.beta * n - 1e-9), max((n - 1) // 2, 1))

    def rule(self, rows: Rows) -> NDArray[Any]:
        """Return the trimmed mean."""
        return np.asarray(rules.trimmed_mean(rows, self.tolerated(count_rows(rows))))


class CountingStrategy(RuleStrategy, ABC):
    """A strategy by a rule that is told how many nodes to tolerate."""

    share = "num_malicious_nodes"

    def __init__(self, *, num_malicious_nodes: int = 0, **arguments: Any) -> None:
        tolerated = count(num_malicious_nodes, "num_malicious_nodes")
        super().__init__(**arguments)
        self.num_malicious_nodes = tolerated

    @abstractmethod
    def rows_for(self, f: int) -> tuple[int, str]:
        """Return how many rows the rule needs to tolerate f nodes, and the formula."""

    def least_rows(self) -> tuple[int, str]:
        """Return what num_malicious_nodes needs."""
        return self.rows_for(self.num_malicious_nodes)

    def tolerated(self, n: int) -> int:
        """Return f for n rows: the nodes to tolerate, less those left out already where n is too small for all."""
        f = self.num_malicious_nodes
        least = max(0, f - self.spoiled)
        while f > least and n < self.rows_for(f)[0]:
            f -= 1
        return f


class Krum(CountingStrategy):
    """The update whose n - f - 2 nearest others are nearest [BEGS17]; n >= 2f + 3."""

    def rows_for(self, f: int) -> tuple[int, str]:
        """Return 2f + 3."""
        return 2 * f + 3, "2f + 3"

    def rule(self, rows: Rows) -> NDArray[Any]:
        """Return the chosen row."""
        return np.asarray(rules.krum(rows, self.tolerated(count_rows(rows))))


class MultiKrum(CountingStrategy):
    """The unweighted mean of the `num_nodes_to_select` updates of least Krum score [BEGS17]; n >= 2f + 3.

    Of n updates at most n - f are taken, since more would be sure to take in an attacker. The default of 1, which is
    Flower's, is Krum.
    """

    def __init__(self, *, num_malicious_nodes: int = 0, num_nodes_to_select: int = 1, **arguments: Any) -> None:
        selected = count(num_nodes_to_select, "num_nodes_to_select", 1)
        super().__init__(num_malicious_nodes=num_malicious_nodes, **arguments)
        self.num_nodes_to_select = selected

    def rows_for(self, f: int) -> tuple[int, str]:
        """Return 2f + 3."""
        return 2 * f + 3, "2f + 3"

    def rule(self, rows: Rows) -> NDArray[Any]:
        """Return the mean of the chosen rows."""
        n = count_rows(rows)
        f = self.tolerated(n)
        return np.asarray(rules.multi_krum(rows, f, max(1, min(self.num_nodes_to_select, n - f))))


class Bulyan(CountingStrategy):
    """Repeated Krum, then the mean of the values nearest to the median [EGR18]; n >= 4f + 3."""

    def rows_for(self, f: int) -> tuple[int, str]:
        """Return 4f + 3."""
        return 4 * f + 3, "4f + 3"

    def rule(self, rows: Rows) -> NDArray[Any]:
        """Return Bulyan's row."""
        return np.asarray(rules.bulyan(rows, self.tolerated(count_rows(rows))))
