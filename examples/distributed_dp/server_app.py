"""What the server runs: FedAvg with momentum; the nodes add the noise, so that it protects from the server too."""

import numpy as np
from task import SHAPE, accuracy, digits

from privfed import ArrayRecord, Context, Grid, MetricRecord, PrivacyPlan, SecureStage, ServerApp
from privfed.protocols import SecAggPlus
from privfed.strategies import FedAvgM

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    _, _, rows, labels = digits(context.seed)
    rounds = int(config["num-rounds"])
    budget = {"clip": float(config["clip"]), "epsilon": float(config["epsilon"]), "delta": float(config["delta"])}
    if config["mechanism"] == "skellam":
        withstand = {"max_dropped": float(config["max-dropped"]), "max_colluding": float(config["max-colluding"])}
        plan = PrivacyPlan(**budget, mechanism="skellam", observer="server", bits=20, **withstand)
    else:  # to compare with: the server adds the noise, and is trusted with the sum before it does
        plan = PrivacyPlan(**budget, relation="zero_out")
    strategy = FedAvgM(
        stage=SecureStage(SecAggPlus()),
        privacy=plan,
        fraction_evaluate=0.0,
        server_learning_rate=float(config["server-learning-rate"]),
        server_momentum=float(config["server-momentum"]),
    )

    def evaluate(_: int, arrays: ArrayRecord) -> MetricRecord:
        return MetricRecord({"accuracy": accuracy(arrays.to_numpy_ndarrays()[0], rows, labels)})

    initial = ArrayRecord([np.zeros(SHAPE)])
    result = strategy.start(grid, initial, num_rounds=rounds, evaluate_fn=evaluate)
    print(f"test accuracy after {rounds} rounds: {result.evaluate_metrics_serverapp[rounds]['accuracy']:.1%}")
    terms = ", ".join(f"{name} {value}" for name, value in plan.terms.items())
    print(f"{plan.mechanism} noise: epsilon = {result.epsilon:.4f} at delta = {plan.delta:g} ({terms})")
