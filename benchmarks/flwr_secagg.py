"""Flower's own secure aggregation, driven in this process: its workflow as the server, its mod on every node.

Nothing of it is replaced: `SecAggPlusWorkflow` runs over a grid that hands every message to `secaggplus_mod` and times
it. The app on a node returns a model that is ready, so no training is counted; a node that drops vanishes before it
sends its masked vector. Messages are copied between server and node, which is not counted, and not serialised.
"""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np


class InProcessGrid:
    """What the workflow needs of a grid. client: CPU seconds in the mod, all nodes and stages together."""

    def __init__(self, nodes: list[int], gone: set[int], arrays: list[Any]) -> None:
        from flwr.app import Context, RecordDict

        self._gone, self._arrays = gone, arrays
        self._contexts = {node: Context(1, node, {}, RecordDict(), {}) for node in nodes}
        self.client = self.transport = 0.0

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Any]:
        from flwr.client.mod import secaggplus_mod
        from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage

        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            stage = message.content.config_records[RECORD_KEY_CONFIGS][Key.STAGE]
            if node in self._gone and stage in (Stage.COLLECT_MASKED_VECTORS, Stage.UNMASK):
                continue
            start = time.process_time()
            copied = self._copied(message)
            middle = time.process_time()
            replies.append(secaggplus_mod(copied, self._contexts[node], self._train))
            self.transport += middle - start
            self.client += time.process_time() - middle
        return replies

    def _copied(self, message: Any) -> Any:
        from flwr.app import ConfigRecord, Message, RecordDict

        content = RecordDict(dict(message.content))
        for name, record in message.content.config_records.items():
            content[name] = ConfigRecord(dict(record))
        return Message(content=content, metadata=message.metadata)

    def _train(self, message: Any, context: Any) -> Any:
        from flwr.app import Message
        from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
        from flwr.compat.common import recorddict_compat as compat

        result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters(self._arrays), 1, {})
        return Message(compat.fitres_to_recorddict(result, keep_input=True), reply_to=message)


class ReadyStrategy:
    """Asks every node and takes the sum as it is: no cost of a strategy is counted."""

    def __init__(self, nodes: list[int], parameters: Any) -> None:
        self._nodes, self._parameters = nodes, parameters
        self.aggregate: Any = None

    def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> list[Any]:
        from flwr.common import FitIns

        return [(SimpleNamespace(node_id=node), FitIns(self._parameters, {})) for node in self._nodes]

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> tuple[Any, dict[str, Any]]:
        self.aggregate = results[0][1].parameters
        return self.aggregate, {}


def session(n: int, dimension: int, drop: float, threshold: int) -> dict[str, float]:
    """Return CPU seconds of one client (the mean) and of the server in one session over the full graph."""
    import logging

    from flwr.app import ConfigRecord, Context, RecordDict
    from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
    from flwr.compat.common import recorddict_compat as compat
    from flwr.server.compat.legacy_context import LegacyContext
    from flwr.server.workflow import SecAggPlusWorkflow
    from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1  # what its messages are stamped with
    logging.getLogger("flwr").setLevel(logging.ERROR)
    nodes = list(range(1, n + 1))
    arrays = [np.random.default_rng(0).normal(size=dimension).astype(np.float32)]
    parameters = ndarrays_to_parameters(arrays)
    grid = InProcessGrid(nodes, set(nodes[: int(n * drop)]), arrays)
    strategy: Any = ReadyStrategy(nodes, parameters)
    manager: Any = SimpleNamespace(num_available=lambda: n)
    state = RecordDict()
    state[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: 1})
    state[MAIN_PARAMS_RECORD] = compat.parameters_to_arrayrecord(parameters, keep_input=True)
    context = LegacyContext(Context(1, 0, {}, state, {}), strategy=strategy, client_manager=manager)
    workflow = SecAggPlusWorkflow(num_shares=1.0, reconstruction_threshold=threshold / n, max_weight=1.0)
    start = time.process_time()
    workflow(grid, context)  # type: ignore[arg-type]  # it asks nothing else of a grid
    whole = time.process_time() - start
    if strategy.aggregate is None:
        raise RuntimeError("flwr's workflow halted: its log says why")
    found = parameters_to_ndarrays(strategy.aggregate)[0]
    np.testing.assert_allclose(found, arrays[0], atol=1e-2)
    return {"client": grid.client / n, "server": whole - grid.client - grid.transport}
