"""What every node runs: train on its own digits, clip the update, and send it masked."""

from task import partition, train

from privfed import ArrayRecord, ClientApp, Context, Message, MetricRecord, RecordDict
from privfed.mods import clip, secure_aggregation

# Outermost first: masking is the last to touch an update, clipping comes before it.
app = ClientApp(mods=lambda context: [secure_aggregation(), clip(float(context.run_config["clip"]))])


@app.train()
def train_round(message: Message, context: Context) -> Message:
    config = context.run_config
    nodes, mine = int(context.node_config["num-partitions"]), int(context.node_config["partition-id"])
    rows, labels = partition(context.seed, nodes)[mine]
    (weights,) = message.content["arrays"].to_numpy_ndarrays()
    weights = train(weights, rows, labels, int(config["local-steps"]), float(config["learning-rate"]))
    metrics = MetricRecord({"num-examples": len(labels)})
    return Message(RecordDict({"arrays": ArrayRecord([weights]), "metrics": metrics}), reply_to=message)
