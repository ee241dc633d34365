"""A secure histogram and mean: every node holds a few wines, the server learns only sums over all nodes."""

import numpy as np
from sklearn.datasets import load_wine

from privfed import ArrayRecord, ClientApp, Context, Grid, Message, RecordDict, SecureStage, ServerApp
from privfed.mods import secure_aggregation
from privfed.protocols import SecAgg
from privfed.strategies import FedAnalytics

client = ClientApp(mods=[secure_aggregation()])
server = ServerApp()
RANGE = (11.0, 15.0)


def alcohol(context: Context) -> np.ndarray:
    """Return the alcohol content of this node's wines, in percent."""
    nodes, mine = int(context.node_config["num-partitions"]), int(context.node_config["partition-id"])
    return np.asarray(load_wine().data[mine::nodes, 0])


@client.query("alcohol")
def describe(message: Message, context: Context) -> Message:
    values = alcohol(context)
    bins = message.content["arrays"]["histogram"].shape[0]
    histogram = np.histogram(values, bins, RANGE)[0].astype(float)
    moments = np.array([len(values), values.sum()])
    arrays = ArrayRecord([histogram, moments])
    arrays = ArrayRecord({"histogram": arrays["0"], "moments": arrays["1"]})
    return Message(RecordDict({"arrays": arrays}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    bins = int(context.run_config["bins"])
    stage = SecureStage(SecAgg(threshold=0.6), max_value=1024.0)
    analytics = FedAnalytics(stage=stage, min_nodes=5)
    answer = analytics.query(grid, {"histogram": (bins,), "moments": (2,)}, action="alcohol")
    count, total = answer.totals["moments"]
    edges = np.linspace(*RANGE, bins + 1)
    for left, right, number in zip(edges, edges[1:], answer.totals["histogram"], strict=False):
        print(f"{left:5.2f} - {right:5.2f} %  {'#' * round(number)} {number:.0f}")
    print(f"mean alcohol of {count:.0f} wines on {answer.nodes} nodes: {total / count:.3f} %")
