"""Robust strategies: the model does not depend on the order in which replies arrive, however many rows tie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from privfed.apps import ClientApp
from privfed.context import Context
from privfed.grid import LocalGrid
from privfed.message import Message
from privfed.record import ArrayRecord, MetricRecord, RecordDict
from privfed.strategies import (
    RFA,
    Bulyan,
    CenteredClipping,
    FedAvg,
    FedMedian,
    FedTrimmedAvg,
    FLTrust,
    Krum,
    MultiKrum,
    NearestNeighborMixing,
    Pace,
    Strategy,
    rules,
)
from privfed.strategies.view import Updates

NONE: dict[str, Any] = {"fraction_evaluate": 0.0}
NODES = 11


class ArrivalGrid(LocalGrid):
    """Replies arrive one at a time, in an order of its own."""

    def __init__(self, app: ClientApp, order: int) -> None:
        super().__init__(app, NODES, seed=1)
        self._order = np.random.default_rng(order)

    def pull_messages(self, message_ids: Any) -> list[Message]:
        ids = [one for one in message_ids if one in self._replies]
        return super().pull_messages([ids[self._order.integers(len(ids))]]) if ids else []


def tied_app() -> ClientApp:
    """Updates on a coarse grid: many pairs are equally far apart, and some rows are equal."""
    values = np.random.default_rng(7).integers(-1, 2, size=(NODES, 3)).astype(np.float32)
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        received = message.content.array_records["arrays"]["0"].numpy()
        arrays = ArrayRecord([received + values[context.node_id - 1]])
        return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 3})}), reply_to=message)

    return app


MAKES: dict[str, Callable[..., Strategy]] = {
    "FedMedian": lambda **a: FedMedian(**a),
    "FedTrimmedAvg": lambda **a: FedTrimmedAvg(beta=0.2, **a),
    "RFA": lambda **a: RFA(**a),
    "Krum": lambda **a: Krum(num_malicious_nodes=2, **a),
    "MultiKrum": lambda **a: MultiKrum(num_malicious_nodes=2, num_nodes_to_select=5, **a),
    "Bulyan": lambda **a: Bulyan(num_malicious_nodes=2, **a),
    "CenteredClipping": lambda **a: CenteredClipping(radius=0.5, **a),
    "NNM+Krum": lambda **a: NearestNeighborMixing(Krum(num_malicious_nodes=2), num_malicious_nodes=2, **a),
    "NNM+median": lambda **a: NearestNeighborMixing(FedMedian(), num_malicious_nodes=2, **a),
    "FLTrust": lambda **a: FLTrust(train=lambda number, arrays: ArrayRecord([np.ones(3, np.float32)]), **a),
}


@pytest.mark.parametrize("pace", [Pace(), Pace(over_selection=1.0)])
@pytest.mark.parametrize("name", sorted(MAKES))
def test_the_model_does_not_depend_on_arrival(name: str, pace: Pace) -> None:
    digests = set()
    for order in range(6):
        strategy = MAKES[name](pace=pace, **NONE)
        result = strategy.start(ArrivalGrid(tied_app(), order), ArrayRecord([np.zeros(3, np.float32)]), num_rounds=2)
        digests.add(result.arrays["0"].digest)
    assert len(digests) == 1


def test_the_grid_does_shuffle() -> None:
    """A strategy that takes the first reply that comes gives itself away: the property can fail."""

    class First(FedAvg):
        needs = Updates

        def update(self, server_round: int, arrays: ArrayRecord, view: Any) -> ArrayRecord:
            return ArrayRecord([np.asarray(view.rows[0])])

    seen = set()
    for order in range(6):
        strategy = First(fraction_train=0.5, pace=Pace(over_selection=1.0), **NONE)
        found = strategy.start(ArrivalGrid(tied_app(), order), ArrayRecord([np.zeros(3, np.float32)]), num_rounds=1)
        seen.add(found.arrays["0"].digest)
    assert len(seen) > 1


@pytest.mark.parametrize("name", sorted(name for name, law in rules.LAWS.items() if not law.permutation))
def test_rules_whose_ties_are_natural_depend_on_the_order_of_rows(name: str) -> None:
    """What the table says of them is true, and why rows must come in the order of node ids."""
    law, f = rules.LAWS[name], 1
    X = np.random.default_rng(7).integers(-1, 2, size=(NODES, 3)).astype(np.float64)
    results = {
        tuple(np.round(law.apply(X[np.random.default_rng(seed).permutation(NODES)], f), 9)) for seed in range(40)
    }
    assert len(results) > 1
