"""The files of `privfed new`. PACKAGE and APPNAME are replaced."""

from __future__ import annotations

_MANIFEST = """[project]
name = "APPNAME"
version = "0.1.0"
requires-python = ">=3.11"
dependencies = ["privfed"{dependencies}]

[tool.privfed.app]
name = "APPNAME"

[tool.privfed.app.components]
serverapp = "PACKAGE.server_app:app"
clientapp = "PACKAGE.client_app:app"

# What `privfed run . -c key=value` may change, with the defaults.
[tool.privfed.app.config]
{config}

[tool.privfed.app.simulation]
nodes = 10
"""

_NUMPY_TASK = '''"""The model and the data: linear regression on points around a line that all nodes share."""

import numpy as np

from privfed import Context

WEIGHTS = np.array([2.0, -1.0, 0.5])


def load_data(context: Context) -> tuple[np.ndarray, np.ndarray]:
    """Make this node's own examples; the same for every round."""
    rng = context.rng("data")
    features = rng.normal(size=(50, 3))
    return features, features @ WEIGHTS + 0.1 * rng.normal(size=50)


def train(weights: np.ndarray, features: np.ndarray, targets: np.ndarray, steps: int, rate: float) -> np.ndarray:
    """Take gradient steps on the mean squared error."""
    for _ in range(steps):
        weights = weights - rate * 2 * features.T @ (features @ weights - targets) / len(targets)
    return weights


def loss(weights: np.ndarray, features: np.ndarray, targets: np.ndarray) -> float:
    return float(np.mean((features @ weights - targets) ** 2))
'''

_NUMPY_CLIENT = '''"""What every node runs."""

from PACKAGE.task import load_data, loss, train

from privfed import ArrayRecord, ClientApp, Context, Message, MetricRecord, RecordDict

app = ClientApp()


@app.train()
def train_round(message: Message, context: Context) -> Message:
    weights = message.content["arrays"].to_numpy_ndarrays()[0]
    features, targets = load_data(context)
    weights = train(weights, features, targets, context.run_config["local-steps"], context.run_config["learning-rate"])
    metrics = MetricRecord({"loss": loss(weights, features, targets), "num-examples": len(targets)})
    return Message(RecordDict({"arrays": ArrayRecord([weights]), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate_round(message: Message, context: Context) -> Message:
    weights = message.content["arrays"].to_numpy_ndarrays()[0]
    features, targets = load_data(context)
    metrics = MetricRecord({"loss": loss(weights, features, targets), "num-examples": len(targets)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
'''

_NUMPY_SERVER = '''"""What the server runs."""

import numpy as np

from privfed import ArrayRecord, Context, Grid, ServerApp
from privfed.strategies import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    FedAvg().start(grid, ArrayRecord([np.zeros(3)]), num_rounds=context.run_config["num-rounds"])
'''

_SKLEARN_TASK = '''"""The model and the data: softmax regression on scikit-learn's digits, split by label skew."""

import numpy as np
from sklearn.datasets import load_digits

from privfed import Context
from privfed.context import derived_rng
from privfed.partition import dirichlet

FEATURES, CLASSES = 65, 10


def digits(seed: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return train features, train labels, test features, test labels; features have unit norm."""
    pixels, labels = load_digits(return_X_y=True)
    rows = np.c_[pixels / 16 - 0.5, np.ones(len(pixels))]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    order = derived_rng(seed or 0, "split").permutation(len(rows))
    test, train = order[:360], order[360:]
    return rows[train], labels[train], rows[test], labels[test]


def load_data(context: Context) -> tuple[np.ndarray, np.ndarray]:
    """Return this node's part of the training data."""
    rows, labels, _, _ = digits(context.seed)
    nodes, mine = context.node_config["num-partitions"], context.node_config["partition-id"]
    part = dirichlet(labels, nodes, 0.5, derived_rng(context.seed or 0, "partition"), min_examples=2)[mine]
    return rows[part], labels[part]


def train(weights: np.ndarray, rows: np.ndarray, labels: np.ndarray, steps: int, rate: float) -> np.ndarray:
    """Take full-batch gradient steps on the cross-entropy."""
    for _ in range(steps):
        weights = weights - rate * rows.T @ (softmax(rows @ weights) - np.eye(CLASSES)[labels]) / len(labels)
    return weights


def softmax(scores: np.ndarray) -> np.ndarray:
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def accuracy(weights: np.ndarray, rows: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean((rows @ weights).argmax(axis=1) == labels))
'''

_SKLEARN_CLIENT = '''"""What every node runs: train, clip the update, and send it masked."""

from PACKAGE.task import load_data, train

from privfed import ArrayRecord, ClientApp, Context, Message, MetricRecord, RecordDict
from privfed.mods import clip, secure_aggregation

app = ClientApp(mods=[secure_aggregation(), clip(8.0)])


@app.train()
def train_round(message: Message, context: Context) -> Message:
    weights = message.content["arrays"].to_numpy_ndarrays()[0]
    rows, labels = load_data(context)
    weights = train(weights, rows, labels, context.run_config["local-steps"], context.run_config["learning-rate"])
    metrics = MetricRecord({"num-examples": len(labels)})
    return Message(RecordDict({"arrays": ArrayRecord([weights]), "metrics": metrics}), reply_to=message)
'''

_SKLEARN_SERVER = '''"""What the server runs: it learns only the sum of the updates."""

import numpy as np

from PACKAGE.task import CLASSES, FEATURES, accuracy, digits

from privfed import ArrayRecord, Context, Grid, MetricRecord, SecureStage, ServerApp
from privfed.protocols import SecAgg
from privfed.strategies import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    _, _, rows, labels = digits(context.seed)

    def evaluate(_: int, arrays: ArrayRecord) -> MetricRecord:
        return MetricRecord({"accuracy": accuracy(arrays.to_numpy_ndarrays()[0], rows, labels)})

    strategy = FedAvg(stage=SecureStage(SecAgg(threshold=0.6)), fraction_evaluate=0.0)
    initial = ArrayRecord([np.zeros((FEATURES, CLASSES))])
    strategy.start(grid, initial, num_rounds=context.run_config["num-rounds"], evaluate_fn=evaluate)
'''

_IGNORE = "__pycache__/\nruns/\n"


def _template(task: str, client: str, server: str, dependencies: str, config: str) -> dict[str, str]:
    return {
        "pyproject.toml": _MANIFEST.format(dependencies=dependencies, config=config),
        "PACKAGE/__init__.py": "",
        "PACKAGE/task.py": task,
        "PACKAGE/client_app.py": client,
        "PACKAGE/server_app.py": server,
        "README.md": "# APPNAME\n\nRun it with `privfed run .`; change settings with `-c key=value`.\n",
        ".gitignore": _IGNORE,
    }


TEMPLATES = {
    "numpy": _template(
        _NUMPY_TASK, _NUMPY_CLIENT, _NUMPY_SERVER, "", "num-rounds = 5\nlocal-steps = 5\nlearning-rate = 0.1"
    ),
    "sklearn": _template(
        _SKLEARN_TASK,
        _SKLEARN_CLIENT,
        _SKLEARN_SERVER,
        ', "scikit-learn>=1.4"',
        "num-rounds = 10\nlocal-steps = 50\nlearning-rate = 20.0",
    ),
}
