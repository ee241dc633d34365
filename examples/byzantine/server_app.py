"""What the server runs: every rule against every attack, with and without mixing, on even and on skewed data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from client_app import ATTACKS
from client_app import app as client_app
from picture import draw
from task import SHAPE, accuracy, digits

from privfed import ArrayRecord, ConfigRecord, Context, Grid, LocalGrid, ServerApp
from privfed.strategies import (
    RFA,
    Bulyan,
    FedAvg,
    FedMedian,
    FedTrimmedAvg,
    Krum,
    MultiKrum,
    NearestNeighborMixing,
    Strategy,
)

app = ServerApp()


def rules(f: int, nodes: int) -> dict[str, Callable[..., Any]]:
    return {
        "median": FedMedian,
        "trimmed mean": lambda **rest: FedTrimmedAvg(beta=f / nodes, **rest),
        "geometric median": RFA,
        "Krum": lambda **rest: Krum(num_malicious_nodes=f, **rest),
        "multi-Krum": lambda **rest: MultiKrum(num_malicious_nodes=f, num_nodes_to_select=nodes - f, **rest),
        "Bulyan": lambda **rest: Bulyan(num_malicious_nodes=f, **rest),
    }


def strategies(f: int, nodes: int) -> dict[str, Callable[[], Strategy]]:
    """Return name -> a function that makes the strategy anew."""

    def plain(make: Callable[..., Any]) -> Callable[[], Strategy]:
        return lambda: make(fraction_evaluate=0.0)

    def mixed(make: Callable[..., Any]) -> Callable[[], Strategy]:
        return lambda: NearestNeighborMixing(make(), num_malicious_nodes=f, fraction_evaluate=0.0)

    made = {"mean": plain(FedAvg)}
    for name, make in rules(f, nodes).items():
        made[name] = plain(make)
        made[f"NNM + {name}"] = mixed(make)
    return made


def contexts(context: Context, nodes: int) -> dict[int, Context]:
    """Return the contexts of nodes in this process: 208 short runs need no federation and no checkpoints."""
    return {
        node: Context(
            node_id=node,
            node_config={"partition-id": node - 1, "num-partitions": nodes},
            run_config=context.run_config,
            seed=context.seed,
        )
        for node in range(1, nodes + 1)
    }


@app.main()
def main(grid: Grid, context: Context) -> None:
    config, nodes = context.run_config, len(grid.get_node_ids())
    _, _, rows, labels = digits(context.seed or 0)
    skews = {"even": 0.0, f"Dirichlet({config['alpha']})": float(config["alpha"])}
    made = strategies(int(config["attackers"]), nodes)
    initial = ArrayRecord([np.zeros(SHAPE, np.float32)])
    tables = {}
    for skew, alpha in skews.items():
        table = np.empty((len(made), len(ATTACKS)))
        print(f"\ntest accuracy in %, {skew} data, {config['attackers']} of {nodes} nodes Byzantine")
        print(f"{'':22}" + "".join(f"{attack:>14}" for attack in (*ATTACKS, "worst")))
        for line, (name, make) in enumerate(made.items()):
            for column, attack in enumerate(ATTACKS):
                order = ConfigRecord({"attack": attack, "rule": name, "alpha": alpha})
                local = LocalGrid(client_app, contexts(context, nodes), seed=context.seed)
                result = make().start(local, initial, int(config["num-rounds"]), train_config=order)
                table[line, column] = accuracy(result.arrays.to_numpy_ndarrays()[0], rows, labels)
            print(f"{name:22}" + "".join(f"{100 * value:14.1f}" for value in (*table[line], table[line].min())))
        tables[skew] = table
    if config["picture"]:
        print("\n" + draw(Path(str(config["picture"])), tables, list(made), list(ATTACKS)))
