"""What every node runs: train on its own digits. Its update leaves clipped, noised and masked."""

from functools import lru_cache

from task import partition, train

from privfed import ArrayRecord, ClientApp, Context, Message, MetricRecord, RecordDict
from privfed.distributed import PlanLimits
from privfed.mods import clip, distributed_dp, secure_aggregation

LIMITS = PlanLimits(max_epsilon=8.0, delta=1e-5)  # the node's own: it counts for itself and stops there


def chain(context: Context) -> list[object]:
    """Return the mods, outermost first."""
    noise = distributed_dp(LIMITS) if context.run_config["mechanism"] == "skellam" else clip()
    return [secure_aggregation(), noise]


app = ClientApp(mods=chain)
parts = lru_cache(maxsize=2)(partition)


@app.train()
def train_round(message: Message, context: Context) -> Message:
    config = context.run_config
    rows, labels = parts(context.seed, int(context.node_config["num-partitions"]))[
        int(context.node_config["partition-id"])
    ]
    (weights,) = message.content["arrays"].to_numpy_ndarrays()
    weights = train(weights, rows, labels, int(config["local-steps"]), float(config["learning-rate"]))
    metrics = MetricRecord({"num-examples": len(labels)})
    return Message(RecordDict({"arrays": ArrayRecord([weights]), "metrics": metrics}), reply_to=message)
