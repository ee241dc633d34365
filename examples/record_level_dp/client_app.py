"""What every node runs: DP-SGD on its own digits, within a budget for each of its records that it keeps by itself."""

import torch
from task import load, model, partition, weights
from torch import nn
from torch.utils.data import DataLoader

from privfed import ArrayRecord, ClientApp, Context, Message, MetricRecord, RecordDict
from privfed.adapters.opacus import PrivacyEngine

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    config = context.run_config
    nodes, mine = int(context.node_config["num-partitions"]), int(context.node_config["partition-id"])
    module = model()
    load(module, message.content["arrays"].to_numpy_ndarrays())
    engine = PrivacyEngine(context, epsilon=float(config["epsilon"]), delta=float(config["delta"]))
    private, optimizer, loader = engine.make_private_with_epsilon(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=float(config["learning-rate"])),
        data_loader=DataLoader(
            partition(context.seed, nodes, mine), batch_size=int(config["batch-size"]), shuffle=True
        ),
        epochs=int(config["local-epochs"]),
        rounds=int(config["num-rounds"]),
        max_grad_norm=float(config["clip"]),
    )
    for _ in range(int(config["local-epochs"])):
        for rows, kinds in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(private(rows), kinds).backward()
            optimizer.step()
    spent = engine.get_epsilon().upper  # public: it follows from the settings, not from the data
    metrics = MetricRecord({"num-examples": 1, "epsilon": spent})
    return Message(RecordDict({"arrays": ArrayRecord(list(weights(module))), "metrics": metrics}), reply_to=message)
