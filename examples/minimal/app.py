"""The smallest app: every node holds one number, and the federation learns their mean."""

import numpy as np

from privfed import ArrayRecord, ClientApp, Context, Grid, Message, MetricRecord, RecordDict, ServerApp
from privfed.strategies import FedAvg

client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    (weight,) = message.content["arrays"].to_numpy_ndarrays()
    target = float(context.node_config["partition-id"])
    arrays = ArrayRecord([weight + 0.5 * (target - weight)])
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    strategy = FedAvg(fraction_evaluate=0.0)
    result = strategy.start(grid, ArrayRecord([np.zeros(1)]), num_rounds=int(context.run_config["num-rounds"]))
    print("weight:", result.arrays.to_numpy_ndarrays()[0])
