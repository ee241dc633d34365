"""Boosted trees in XGBoost's JSON form: read what a node sends as the untrusted text it is, merge, and write.

Only what prediction reads is checked, and all of that: a forest that passes cannot send a reader out of its arrays.
Numeric splits and scalar leaves only.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tree = dict[str, Any]
_INTEGERS = ("default_left", "left_children", "parents", "right_children", "split_indices", "split_type")
_NUMBERS = ("base_weights", "loss_changes", "split_conditions", "sum_hessian")
_LISTS = _INTEGERS + _NUMBERS
_PARTS = ("left_children", "right_children", "split_indices", "split_conditions", "default_left")
_KIND = ("objective", "learner_model_param")
_LARGEST = float(np.finfo(np.float32).max)
MAX_BYTES = 256 << 20


class ForestError(ValueError):
    """Bytes that are no forest, or one that does not fit; the text says why."""


@dataclass(frozen=True)
class Forest:
    """trees in order, the class each belongs to, and where each boosting round starts (its end included).

    shell: the rest of the document. Two forests with equal `kind` predict the same thing and may be merged.
    """

    trees: tuple[Tree, ...]
    classes: tuple[int, ...]
    starts: tuple[int, ...]
    shell: dict[str, Any]

    @property
    def kind(self) -> tuple[str, str]:
        """The objective, and the numbers of features, classes and targets and the base score."""
        learner = self.shell["learner"]
        objective, parameters = (json.dumps(learner[key], sort_keys=True) for key in _KIND)
        return objective, parameters

    @property
    def rounds(self) -> int:
        """Boosting rounds."""
        return len(self.starts) - 1

    def extends(self, other: Forest) -> bool:
        """Return whether this forest is `other`, unchanged, and perhaps more trees."""
        if self.kind != other.kind or self.starts[: len(other.starts)] != other.starts:
            return False
        mine = self.trees[: len(other.trees)]
        return len(mine) == len(other.trees) and all(
            a[part] == b[part] for a, b in zip(mine, other.trees, strict=True) for part in _PARTS
        )

    def scaled(self, factor: float) -> Forest:
        """Return a forest that predicts `factor` times as much above the base score."""
        return replace(self, trees=tuple(_scale(tree, factor) for tree in self.trees))

    def joined(self, other: Forest) -> Forest:
        """Return this forest followed by another. Raises ForestError when they predict different things."""
        if self.kind != other.kind:
            raise ForestError("objective, base score, or numbers of features or classes differ")
        end = len(self.trees)
        return replace(
            self,
            trees=self.trees + other.trees,
            classes=self.classes + other.classes,
            starts=self.starts + tuple(end + start for start in other.starts[1:]),
        )

    def write(self) -> NDArray[np.uint8]:
        """Return the document's bytes, which `xgboost.Booster.load_model(bytearray(...))` reads."""
        learner = dict(self.shell["learner"])
        booster = dict(learner["gradient_booster"])
        model = dict(booster["model"])
        parameters = {**model["gbtree_model_param"], "num_trees": str(len(self.trees))}
        model.update(
            gbtree_model_param=parameters,
            trees=[{**tree, "id": number} for number, tree in enumerate(self.trees)],
            tree_info=list(self.classes),
            iteration_indptr=list(self.starts),
        )
        booster["model"] = model
        learner["gradient_booster"] = booster
        document = {**self.shell, "learner": learner}
        return np.frombuffer(json.dumps(document, allow_nan=False, separators=(",", ":")).encode(), np.uint8)


def read(data: NDArray[np.uint8]) -> Forest:
    """Read a forest. Raises ForestError, and nothing else, on anything that is none."""
    if data.nbytes > MAX_BYTES:
        raise ForestError(f"{data.nbytes} bytes are more than {MAX_BYTES}")
    try:
        return _read(json.loads(data.tobytes(), parse_constant=_no_constant))
    except ForestError:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, RecursionError, OverflowError, ValueError) as cause:
        raise ForestError(f"not an XGBoost JSON model: {type(cause).__name__}") from cause


def _read(document: dict[str, Any]) -> Forest:
    learner = document["learner"]
    booster = learner["gradient_booster"]
    if booster["name"] != "gbtree":
        raise ForestError(f"the booster is {booster['name']!r}, only gbtree can be merged")
    parameters, model = learner["learner_model_param"], booster["model"]
    features, groups = int(parameters["num_feature"]), max(1, int(parameters["num_class"]))
    if int(parameters["num_target"]) > 1:
        raise ForestError("models of several targets cannot be merged")
    trees, classes, starts = model["trees"], model["tree_info"], model["iteration_indptr"]
    if len(trees) != len(classes) or int(model["gbtree_model_param"]["num_trees"]) != len(trees):
        raise ForestError("the numbers of trees disagree")
    if any(type(one) is not int or not 0 <= one < groups for one in classes):
        raise ForestError("a tree belongs to no class")
    if (
        any(type(start) is not int for start in starts)
        or starts[0] != 0
        or starts[-1] != len(trees)
        or any(a >= b for a, b in itertools.pairwise(starts))
    ):
        raise ForestError("the boosting rounds do not divide the trees")
    checked = tuple(_check(tree, features) for tree in trees)
    return Forest(checked, tuple(classes), tuple(starts), _shell(document))


def _shell(document: dict[str, Any]) -> dict[str, Any]:
    """Return a fresh document around no trees: nothing that is not understood is handed on."""
    version, learner = document["version"], document["learner"]
    if len(version) != 3 or any(type(part) is not int for part in version):
        raise ForestError("the version is no list of three integers")
    model = {"gbtree_model_param": {"num_parallel_tree": "1"}, "trees": [], "tree_info": [], "iteration_indptr": [0]}
    shell = {
        "attributes": {},
        "feature_names": [],
        "feature_types": [],
        "gradient_booster": {"name": "gbtree", "model": model},
        "learner_model_param": learner["learner_model_param"],
        "objective": learner["objective"],
    }
    return {"learner": shell, "version": version}


def _check(tree: Tree, features: int) -> Tree:
    """Return what is understood of a tree."""
    nodes = int(tree["tree_param"]["num_nodes"])
    if nodes < 1 or any(type(tree[name]) is not list or len(tree[name]) != nodes for name in _LISTS):
        raise ForestError("a tree's arrays differ in length")
    for name in _INTEGERS:
        if any(type(value) is not int for value in tree[name]):
            raise ForestError(f"{name} holds something that is no integer")
    for name in _NUMBERS:
        if not all(type(value) in (int, float) and abs(value) <= _LARGEST for value in tree[name]):  # false for NaN
            raise ForestError(f"{name} holds something that is no finite number")
    leaf, deleted = (tree["tree_param"][name] for name in ("size_leaf_vector", "num_deleted"))
    if leaf not in ("0", "1") or deleted != "0" or any(tree["split_type"]) or tree["categories"]:
        raise ForestError("only numeric splits and scalar leaves can be merged")
    if any(value not in (0, 1) for value in tree["default_left"]):
        raise ForestError("default_left is neither 0 nor 1")
    reached = 0
    for node, (left, right, index) in enumerate(
        zip(tree["left_children"], tree["right_children"], tree["split_indices"], strict=True)
    ):
        if left == -1 and right == -1:
            continue
        # Children come after their parent and each has one: no cycle can be written down.
        if not (node < left < nodes and node < right < nodes and left != right and 0 <= index < features):
            raise ForestError("a split leaves its tree or the features")
        if tree["parents"][left] != node or tree["parents"][right] != node:
            raise ForestError("a node is not its parent's child")
        reached += 2
    if reached != nodes - 1:
        raise ForestError("a tree has nodes that are not reached")
    empty: dict[str, Any] = {
        name: [] for name in ("categories", "categories_nodes", "categories_segments", "categories_sizes")
    }
    size = {"num_deleted": "0", "num_feature": str(features), "num_nodes": str(nodes), "size_leaf_vector": leaf}
    lists: Tree = {name: tree[name] for name in _INTEGERS}
    lists.update({name: [float(value) for value in tree[name]] for name in _NUMBERS})
    return {**lists, **empty, "tree_param": size}


def _scale(tree: Tree, factor: float) -> Tree:
    leaves = [left == -1 for left in tree["left_children"]]
    # A leaf's value is its split condition; XGBoost keeps it in float32.
    values = [
        float(np.float32(value * factor)) if leaf else value
        for value, leaf in zip(tree["split_conditions"], leaves, strict=True)
    ]
    weights = [float(np.float32(value * factor)) for value in tree["base_weights"]]
    return {**tree, "split_conditions": values, "base_weights": weights}


def _no_constant(name: str) -> float:
    raise ForestError(f"{name} is no finite number")
