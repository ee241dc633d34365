"""What the server runs: FedAvg over secure sums, with noise for a stated epsilon; and what that cost in accuracy."""

import numpy as np
from client_app import train_round
from task import SHAPE, accuracy, digits, train

from privfed import (
    ArrayRecord,
    ClientApp,
    Context,
    Grid,
    LocalGrid,
    MetricRecord,
    PrivacyPlan,
    SecureStage,
    ServerApp,
)
from privfed.protocols import SecAgg
from privfed.strategies import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config, rows = context.run_config, digits(context.seed)
    rounds = int(config["num-rounds"])
    initial = ArrayRecord([np.zeros(SHAPE)])

    def evaluate(_: int, arrays: ArrayRecord) -> MetricRecord:
        return MetricRecord({"accuracy": accuracy(arrays.to_numpy_ndarrays()[0], rows[2], rows[3])})

    plan = PrivacyPlan(clip=float(config["clip"]), epsilon=float(config["epsilon"]), delta=float(config["delta"]))
    strategy = FedAvg(stage=SecureStage(SecAgg(threshold=0.6)), privacy=plan, fraction_evaluate=0.0)
    result = strategy.start(grid, initial, num_rounds=rounds, evaluate_fn=evaluate)
    private = result.evaluate_metrics_serverapp[rounds]["accuracy"]
    print(f"test accuracy, private:                 {private:.1%}")
    if config["baselines"]:
        print(f"test accuracy, federated, no privacy:   {no_privacy(grid, context, initial, rounds):.1%}")
        central = train(np.zeros(SHAPE), rows[0], rows[1], rounds * int(config["local-steps"]), 20.0)
        print(f"test accuracy, centralised, no privacy: {accuracy(central, rows[2], rows[3]):.1%}")
    epsilon = result.epsilon if result.epsilon is not None else float("inf")
    terms = ", ".join(f"{name} {value}" for name, value in plan.terms.items())
    print(f"epsilon = {epsilon:.4f} at delta = {plan.delta:g} ({terms}); the server saw only sums over the nodes")


def no_privacy(grid: Grid, context: Context, initial: ArrayRecord, rounds: int) -> float:
    """Train the same model over the same nodes in the clear."""
    plain, nodes = ClientApp(), len(grid.get_node_ids())
    plain.train()(train_round)
    local = {
        node: Context(
            node_id=node,
            node_config={"partition-id": node - 1, "num-partitions": nodes},
            run_config=context.run_config,
            seed=context.seed,
        )
        for node in range(1, nodes + 1)
    }
    result = FedAvg(fraction_evaluate=0.0).start(LocalGrid(plain, local), initial, num_rounds=rounds)
    _, _, rows, labels = digits(context.seed)
    return accuracy(result.arrays.to_numpy_ndarrays()[0], rows, labels)
