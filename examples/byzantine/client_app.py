"""What every node runs: train on its own digits. The first few obey an attack that the server names, as a test."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from task import CLASSES, SHAPE, aggregators, partition, train

from privfed import ArrayRecord, ClientApp, Context, Message, MetricRecord, RecordDict
from privfed.apps import CallNext
from privfed.attacks import forgery
from privfed.attacks.client import flip_labels, forge
from privfed.attacks.search import strongest_inner_product, strongest_little

FORGERIES: dict[str, forgery.Attack] = {
    "sign flip": lambda honest: forgery.sign_flip(honest, scale=4.0),
    "ALIE": lambda honest: forgery.little_is_enough(honest, 1.5),
    "IPM": lambda honest: forgery.inner_product(honest, 0.8),
    "mimic": lambda honest: forgery.mimic(honest, None),
}
SEARCHES = {"ALIE searched": strongest_little, "IPM searched": strongest_inner_product}
ATTACKS = ("none", "label flip", *FORGERIES, *SEARCHES)


@lru_cache(maxsize=4)
def honest_updates(
    model: bytes, seed: int, nodes: int, attackers: int, alpha: float, steps: int, rate: float
) -> NDArray[np.float32]:
    """Return what the honest nodes will send: these attackers know everything."""
    weights = np.frombuffer(model, np.float32).reshape(SHAPE)
    parts = partition(seed, nodes, alpha)[attackers:]
    return np.stack([(train(weights, *part, steps, rate) - weights).reshape(-1) for part in parts])


def known(message: Message, context: Context) -> NDArray[np.float32]:
    config, own = context.run_config, message.content["config"]
    return honest_updates(
        message.content["arrays"]["0"].numpy().tobytes(),
        context.seed or 0,
        int(context.node_config["num-partitions"]),
        int(config["attackers"]),
        float(own["alpha"]),
        int(config["local-steps"]),
        float(config["learning-rate"]),
    )


FOUND: dict[tuple[str, str, bytes], forgery.Row] = {}  # the last search: all attackers send its row


def searched(attack: str, rule: str, model: bytes, f: int, honest: NDArray[np.float32]) -> forgery.Row:
    """Return the row of the strength that moves the rule in use farthest: these attackers know the rule too."""
    key = (attack, rule, model)
    if key not in FOUND:
        FOUND.clear()
        FOUND[key] = SEARCHES[attack](honest, f, aggregators(f)[rule]).row
    return FOUND[key]


def byzantine(message: Message, context: Context, call_next: CallNext) -> Message:
    own, f = message.content["config"], int(context.run_config["attackers"])
    name = str(own["attack"])
    if name in SEARCHES and is_byzantine(context):
        rule, model = str(own["rule"]), message.content["arrays"]["0"].numpy().tobytes()

        def attack(honest: NDArray[np.float32]) -> forgery.Row:
            return searched(name, rule, model, f, honest)

        return forge(attack, known)(message, context, call_next)
    if name not in FORGERIES or not is_byzantine(context):
        return call_next(message, context)
    return forge(FORGERIES[name], known)(message, context, call_next)


def is_byzantine(context: Context) -> bool:
    return int(context.node_config["partition-id"]) < int(context.run_config["attackers"])


app = ClientApp(mods=[byzantine])


@app.train()
def train_round(message: Message, context: Context) -> Message:
    config, own = context.run_config, message.content["config"]
    nodes, mine = int(context.node_config["num-partitions"]), int(context.node_config["partition-id"])
    rows, labels = partition(context.seed or 0, nodes, float(own["alpha"]))[mine]
    if own["attack"] == "label flip" and is_byzantine(context):
        labels = flip_labels(labels, CLASSES)
    (weights,) = message.content["arrays"].to_numpy_ndarrays()
    weights = train(weights, rows, labels, int(config["local-steps"]), float(config["learning-rate"]))
    metrics = MetricRecord({"num-examples": len(labels)})
    return Message(RecordDict({"arrays": ArrayRecord([weights]), "metrics": metrics}), reply_to=message)
