"""Nodes that keep their own budgets: each counts what its updates cost it, and refuses before it is overspent.

The server would go on for ever; two nodes have set themselves a smaller epsilon, and drop out of the run when it is
spent. Their refusal is all the server learns.
"""

import numpy as np

from privfed import ArrayRecord, ClientApp, Context, Grid, Message, MetricRecord, PrivacyPlan, RecordDict, ServerApp
from privfed.mods import clip, privacy_budget
from privfed.strategies import FedAvg

DELTA = 1e-5


def mods(context: Context) -> list[object]:
    """Return a node's mods, outermost first. Its budget would be in its policy.toml; here it depends on the node."""
    cautious = int(context.node_config["partition-id"]) < 2
    return [privacy_budget(epsilon=4.0 if cautious else 8.0, delta=DELTA, observer="output"), clip()]


client = ClientApp(mods=mods)
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    (weights,) = message.content["arrays"].to_numpy_ndarrays()
    target = np.full(weights.shape, float(context.node_config["partition-id"]))
    arrays = ArrayRecord([weights + 0.5 * (target - weights)])
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    plan = PrivacyPlan(clip=1.0, noise_multiplier=float(config["noise-multiplier"]), delta=DELTA, relation="zero_out")
    strategy = FedAvg(fraction_evaluate=0.0, privacy=plan, min_train_nodes=2)
    result = strategy.start(grid, ArrayRecord([np.zeros(3)]), num_rounds=int(config["num-rounds"]))
    print(f"the run's own ledger: epsilon {result.epsilon:.3f} at delta {DELTA:g} (observer output)")
