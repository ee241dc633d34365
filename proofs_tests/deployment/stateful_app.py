"""An app of which every answer weighs in the model: in the clear, under a privacy plan, or under a mask and a plan."""

from __future__ import annotations

from pathlib import Path

APP = """
import numpy as np
from privfed import ArrayRecord, ClientApp, MetricRecord, Message, PrivacyPlan, RecordDict, SecureStage, ServerApp
from privfed.mods import clip, secure_aggregation
from privfed.protocols import SecAgg
from privfed.strategies import FedAvg

KIND = "KIND_"
MODS = {"plain": [], "private": [clip(4.0)], "masked": [secure_aggregation(), clip(4.0)]}
client, server = ClientApp(mods=MODS[KIND]), ServerApp()

@client.train()
def train(message, context):
    # What a node did before weighs in: a round answered twice, or from the wrong state, shows in the model.
    kept = context.state.get("kept", ArrayRecord([np.zeros(40)])).to_numpy_ndarrays()[0]
    (weight,) = message.content["arrays"].to_numpy_ndarrays()
    kept = kept * 0.5 + 0.1 * np.tanh(weight) + context.rng("train").random(40)
    context.state["kept"] = ArrayRecord([kept])
    arrays = ArrayRecord([weight + 0.1 * kept + 0.01 * context.node_config["partition-id"]])
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

@server.main()
def main(grid, context):
    chosen = {}
    if KIND != "plain":
        chosen["privacy"] = PrivacyPlan(clip=4.0, noise_multiplier=1.0, delta=1e-5)
    if KIND == "masked":
        chosen["stage"] = SecureStage(SecAgg(threshold=3))
    strategy = FedAvg(fraction_evaluate=0.0, **chosen)
    strategy.start(grid, ArrayRecord([np.zeros(40)]), num_rounds=context.run_config["num-rounds"])
"""
MANIFEST = """
[project]
name = "NAME"
[tool.privfed.app.components]
serverapp = "NAME_app:server"
clientapp = "NAME_app:client"
[tool.privfed.app.config]
num-rounds = 3
"""


def write_app(folder: Path, kind: str = "plain") -> Path:
    """Write the app. kind: "plain", "private" (the noise of a plan on the plain sum), or "masked" (on a masked one)."""
    return write_source(folder, APP.replace("KIND_", kind), kind)


def write_source(folder: Path, source: str, name: str) -> Path:
    """Write an app of this source, which has a `client` and a `server` and reads num-rounds."""
    folder.mkdir(parents=True)
    (folder / f"{name}_app.py").write_text(source)
    (folder / "pyproject.toml").write_text(MANIFEST.replace("NAME", name))
    return folder
