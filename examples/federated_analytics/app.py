"""A secure histogram and mean: every node holds a few wines, the server learns only sums, with noise if asked."""

import numpy as np
from sklearn.datasets import load_wine

from privfed import ArrayRecord, ClientApp, Context, Grid, Message, PrivacyPlan, RecordDict, SecureStage, ServerApp
from privfed.mods import clip, distributed_dp, secure_aggregation
from privfed.protocols import SecAgg
from privfed.strategies import FedAnalytics

RANGE, MIDDLE = (11.0, 15.0), 13.0


def chain(context: Context) -> list[object]:
    """Return the mods, outermost first. Under a plan a node's whole answer is clipped; "skellam": it adds noise too."""
    inner = {"none": [], "central": [clip()], "skellam": [distributed_dp()]}
    return [secure_aggregation(), *inner[str(context.run_config["privacy"])]]


client = ClientApp(mods=chain)
server = ServerApp()


def alcohol(context: Context) -> np.ndarray:
    """Return the alcohol content of this node's wines, in percent."""
    nodes, mine = int(context.node_config["num-partitions"]), int(context.node_config["partition-id"])
    return np.asarray(load_wine().data[mine::nodes, 0])


@client.query("alcohol")
def describe(message: Message, context: Context) -> Message:
    values = alcohol(context)
    bins = message.content["arrays"]["histogram"].shape[0]
    histogram = np.histogram(values, bins, RANGE)[0].astype(float)
    moments = np.array([len(values), (values - MIDDLE).sum()])  # about the middle: as short as can be
    arrays = ArrayRecord([histogram, moments])
    arrays = ArrayRecord({"histogram": arrays["0"], "moments": arrays["1"]})
    return Message(RecordDict({"arrays": arrays}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    bins, privacy = int(config["bins"]), str(config["privacy"])
    plan = None
    if privacy != "none":
        noise = {"mechanism": "skellam", "bits": 24} if privacy == "skellam" else {"relation": "zero_out"}
        plan = PrivacyPlan(clip=float(config["clip"]), epsilon=float(config["epsilon"]), **noise)
    stage = SecureStage(SecAgg(threshold=0.6), max_value=1024.0)
    analytics = FedAnalytics(stage=stage, min_nodes=5, privacy=plan)
    answer = analytics.query(grid, {"histogram": (bins,), "moments": (2,)}, action="alcohol")
    count, total = answer.totals["moments"]
    edges = np.linspace(*RANGE, bins + 1)
    for left, right, number in zip(edges, edges[1:], answer.totals["histogram"], strict=False):
        print(f"{left:5.2f} - {right:5.2f} %  {'#' * max(0, round(number))} {number:.0f}")
    print(f"mean alcohol of {count:.0f} wines on {answer.nodes} nodes: {MIDDLE + total / count:.3f} %")
    if plan is not None:
        spent = answer.privacy
        print(
            f"noise of standard deviation {answer.stddev:.2f}: epsilon = {spent['epsilon']:.4f} at delta = {plan.delta}"
        )
