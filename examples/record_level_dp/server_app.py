"""What the server runs: plain FedAvg. What reaches it is private already, record by record."""

from task import accuracy, digits, load, model, weights

from privfed import ArrayRecord, Context, Grid, MetricRecord, ServerApp
from privfed.strategies import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config, (_, test) = context.run_config, digits(context.seed)

    def evaluate(_: int, arrays: ArrayRecord) -> MetricRecord:
        module = model()
        load(module, arrays.to_numpy_ndarrays())
        return MetricRecord({"accuracy": accuracy(module, test)})

    initial, rounds = ArrayRecord(list(weights(model()))), int(config["num-rounds"])
    result = FedAvg(fraction_evaluate=0.0).start(grid, initial, num_rounds=rounds, evaluate_fn=evaluate)
    print(f"test accuracy: {result.evaluate_metrics_serverapp[rounds]['accuracy']:.1%}")
    spent = result.train_metrics_clientapp[rounds]["epsilon"]
    print(
        f"epsilon = {spent:.4f} at delta = {config['delta']} (unit record, relation zero_out, observer output) per node"
    )
