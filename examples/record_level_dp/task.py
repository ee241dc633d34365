"""The data and the model: a small network on scikit-learn's digits, about 287 of them on each of five nodes."""

from collections.abc import Iterator

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from privfed.context import derived_rng
from privfed.partition import iid

TEST = 360


def model() -> nn.Module:
    """Return an untrained network. No BatchNorm: it would mix the records of a batch."""
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def digits(seed: int | None) -> tuple[TensorDataset, TensorDataset]:
    """Return training and test digits."""
    pixels, labels = load_digits(return_X_y=True)
    order = derived_rng(seed or 0, "split").permutation(len(labels))
    rows, kinds = torch.tensor(pixels / 16 - 0.5, dtype=torch.float32), torch.tensor(labels)
    test, train = order[:TEST], order[TEST:]
    return TensorDataset(rows[train], kinds[train]), TensorDataset(rows[test], kinds[test])


def partition(seed: int | None, nodes: int, mine: int) -> TensorDataset:
    """Return one node's digits."""
    train, _ = digits(seed)
    part = iid(len(train), nodes, derived_rng(seed or 0, "partition"))[mine]
    return TensorDataset(*train[np.sort(part)])


def weights(module: nn.Module) -> Iterator[np.ndarray]:
    """Yield the network's parameters."""
    for parameter in module.parameters():
        yield parameter.detach().numpy()


def load(module: nn.Module, arrays: list[np.ndarray]) -> None:
    """Set the network's parameters."""
    with torch.no_grad():
        for parameter, array in zip(module.parameters(), arrays, strict=True):
            parameter.copy_(torch.from_numpy(array))


def accuracy(module: nn.Module, data: TensorDataset) -> float:
    rows, kinds = data.tensors
    with torch.no_grad():
        return float((module(rows).argmax(dim=1) == kinds).float().mean())
