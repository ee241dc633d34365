"""A strategy: the loop of rounds around one rule for turning what a stage brings back into the next model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from privfed.array import Array
from privfed.errors import PlanRefused, QuorumError, RunFailed
from privfed.grid import Checkpoint, Grid
from privfed.mapped import let_go, zeros_in_file
from privfed.record import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from privfed.strategies.cohort import cohort_size, draw_cohort, wait_for_nodes
from privfed.strategies.exchange import Exchange
from privfed.strategies.guard import count
from privfed.strategies.metric import MetricsFunction, average_metrics
from privfed.strategies.pace import Pace
from privfed.strategies.result import Result
from privfed.strategies.resume import START, Resumption
from privfed.strategies.stage import PlainStage, Stage
from privfed.strategies.view import Float64s, GroupMeans, Outcome, Sum, Updates, View
from privfed.update import BLOCK, PLAN, RESERVED, split

if TYPE_CHECKING:
    from privfed.plan import PrivacyPlan
    from privfed.strategies.release import Release

EvaluateFunction = Callable[[int, ArrayRecord], MetricRecord | None]
"""(round, arrays) -> metrics on the server; round 0 is the initial model."""

_ALIGNMENT = 64
_ROUND_0 = "privfed.round-0"


@dataclass
class _Run:
    """One call of `start`: what stays the same in every round, and what each leaves behind."""

    grid: Grid
    arrays: ArrayRecord
    timeout: float
    train_config: ConfigRecord
    evaluate_config: ConfigRecord
    evaluate_fn: EvaluateFunction | None
    release: Release | None
    resumption: Resumption
    initial: MetricRecord | None = None
    rounds: list[dict[str, object]] = field(default_factory=list)


class Strategy:
    """Run rounds of training and evaluation; a subclass says in `update` what becomes of a round's view.

    Arguments have Flower's names and meanings. stage: what the server can see. privacy: a PrivacyPlan, or None.
    pace: over-selection, deadline and minimum completion of training rounds; default: ask no more than needed, wait.

    A subclass declares what it `needs` to see, and whether the sensitivity of what it reads is that of a clipped sum
    (`linear`): only then may it run under a privacy plan; `unbounded` says why it is not. It overrides `update`, and,
    where it needs to, `configure`, `configure_node`, `save` and `load`.
    """

    needs: ClassVar[type[View]] = Sum
    linear: ClassVar[bool] = False
    unbounded: ClassVar[str] = (
        "it says neither that it reads the mean alone (`linear = True`) nor what it reads instead"
    )

    def __init__(
        self,
        fraction_train: float = 1.0,
        fraction_evaluate: float = 1.0,
        min_train_nodes: int = 2,
        min_evaluate_nodes: int = 2,
        min_available_nodes: int = 2,
        weighted_by_key: str = "num-examples",
        arrayrecord_key: str = "arrays",
        configrecord_key: str = "config",
        train_metrics_aggr_fn: MetricsFunction | None = None,
        evaluate_metrics_aggr_fn: MetricsFunction | None = None,
        *,
        stage: Stage | None = None,
        privacy: PrivacyPlan | None = None,
        pace: Pace | None = None,
    ) -> None:
        for name, fraction in (("fraction_train", fraction_train), ("fraction_evaluate", fraction_evaluate)):
            if not 0 <= fraction <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {fraction}")
        least = {"min_train_nodes": min_train_nodes, "min_evaluate_nodes": min_evaluate_nodes}
        for name, number in {**least, "min_available_nodes": min_available_nodes}.items():
            count(number, name, 1)
        for name, key in (("arrayrecord_key", arrayrecord_key), ("configrecord_key", configrecord_key)):
            if key.startswith(RESERVED):
                raise ValueError(f"{name} {key!r} is reserved: choose one that does not start with {RESERVED!r}")
        self.fraction_train = fraction_train
        self.fraction_evaluate = fraction_evaluate
        self.min_train_nodes = min_train_nodes
        self.min_evaluate_nodes = min_evaluate_nodes
        self.min_available_nodes = max(min_available_nodes, *least.values())
        self.weighted_by_key = weighted_by_key
        self.arrayrecord_key = arrayrecord_key
        self.configrecord_key = configrecord_key
        self.train_metrics_aggr_fn = train_metrics_aggr_fn or average_metrics
        self.evaluate_metrics_aggr_fn = evaluate_metrics_aggr_fn or average_metrics
        self.stage = stage if stage is not None else PlainStage()
        self.privacy = privacy
        self.pace = pace if pace is not None else Pace()
        self._check_stage()
        self._check_privacy()

    def configure(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord) -> RecordDict:
        """Return the content of this round's training instructions, the same for every node."""
        content = RecordDict({self.arrayrecord_key: arrays})
        content[self.configrecord_key] = config
        return content

    def configure_node(self, server_round: int, node: int, content: RecordDict) -> RecordDict:
        """Return the content for one node; override it to configure nodes apart (a stage that hides refuses that)."""
        return content

    def update(self, server_round: int, arrays: ArrayRecord, view: View) -> ArrayRecord:
        """Return the next model from this one and the view that `needs` names."""
        raise TypeError(f"{type(self).__name__} must define update(server_round, arrays, view)")

    def save(self) -> RecordDict:
        """Return what the strategy must remember between rounds; it is part of every checkpoint."""
        return RecordDict()

    def load(self, state: RecordDict) -> None:
        """Take up what `save` returned, or start anew from an empty record."""

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFunction | None = None,
    ) -> Result:
        """Run the rounds, or those that a resumed run has not committed, and return the last model and all metrics.

        timeout: seconds that each wait (for nodes, for a round's replies) may last.
        Raises RunFailed (QuorumError when too few replies count) with the reason; the committed model is unchanged.
        """
        if num_rounds < 0:
            raise ValueError(f"num_rounds must be >= 0, got {num_rounds}")
        if not timeout > 0:
            raise ValueError(f"timeout must be > 0 seconds, got {timeout}")
        for name, array in initial_arrays.items():
            if array.dtype == "bool":
                raise ValueError(f"initial_arrays[{name!r}] is bool, which has no mean: use uint8")
        resumption = Resumption(grid.recorder)
        run = _Run(
            grid,
            initial_arrays,
            timeout,
            train_config if train_config is not None else ConfigRecord(),
            evaluate_config if evaluate_config is not None else ConfigRecord(),
            evaluate_fn,
            self._release(grid, initial_arrays, num_rounds, timeout, resumption.checkpoint),
            resumption,
        )
        try:
            first = self._restore(run)
            for server_round in range(first, num_rounds + 1):
                self._run_round(run, server_round)
        finally:
            if run.release is not None:
                run.release.close()
        return self._result(run)

    def _check_stage(self) -> None:
        wanted = {self.needs, GroupMeans} if self.needs is Updates else {self.needs}
        if not wanted & self.stage.offers:
            offered = ", ".join(sorted(view.__name__ for view in self.stage.offers))
            raise ValueError(
                f"stage: {type(self).__name__} needs {self.needs.__name__}, and {self.stage!r} offers only {offered}"
            )
        if type(self).configure_node is not Strategy.configure_node and not self.stage.per_node:
            raise ValueError(
                f"stage: {type(self).__name__} configures nodes apart, and under {self.stage!r} every node must get "
                "the same instructions, or the server could tell their updates apart"
            )
        if self.fraction_evaluate > 0:
            self.stage.check_evaluation()

    def _check_privacy(self) -> None:
        if self.privacy is None:
            return
        name = type(self).__name__
        if not self.linear or self.needs is not Sum:
            raise PlanRefused(
                f"privacy: no sensitivity is stated for {name}: {self.unbounded}; use FedAvg or another strategy that "
                "reads only the sum"
            )
        if type(self).configure_node is not Strategy.configure_node:
            raise PlanRefused(f"privacy: {name} configures nodes apart, which the plan does not account for")
        self.stage.check_privacy(self.privacy)
        if self.fraction_train != 1 or self.pace.over_selection or self.pace.min_completion:
            raise PlanRefused(
                "privacy: the plan's sampler draws the cohorts; leave fraction_train at 1, and over_selection and "
                "min_completion of the pace at 0"
            )
        if self.fraction_evaluate > 0:
            raise PlanRefused(
                "privacy: metrics of evaluation rounds are not accounted for under a plan; pass fraction_evaluate=0 "
                "and evaluate on the server with evaluate_fn"
            )

    def _release(
        self, grid: Grid, model: ArrayRecord, num_rounds: int, timeout: float, checkpoint: Checkpoint | None
    ) -> Release | None:
        if self.privacy is None:
            return None
        from privfed.strategies.release import open_release

        kept = checkpoint.state.get(PLAN) if checkpoint is not None else None
        if isinstance(kept, ConfigRecord):
            population = int(str(kept["population"]))
        else:
            population = len(wait_for_nodes(grid, self.min_available_nodes, timeout))
        release = open_release(self.privacy, grid, model, population, num_rounds)
        if isinstance(kept, ConfigRecord):
            release.restore(kept)
        return release

    def _restore(self, run: _Run) -> int:
        """Take up the last committed round; return the number of the next."""
        run.grid.recorder.report("sampling", **self._sampling(run))
        checkpoint = run.resumption.checkpoint
        if checkpoint is None:
            self.load(RecordDict())
            run.initial = run.evaluate_fn(0, run.arrays) if run.evaluate_fn is not None else None
            run.grid.recorder.commit(Checkpoint(0, run.arrays, self._state(run)))
            return 1
        state = checkpoint.state.copy()
        if _ROUND_0 in state:
            run.initial = MetricRecord(dict(state.metric_records[_ROUND_0]))
            del state[_ROUND_0]
        state.pop(PLAN, None)
        state.pop(START, None)
        self.load(state)
        run.arrays = checkpoint.arrays
        run.rounds = [dict(metrics) for metrics in checkpoint.metrics]
        return checkpoint.round + 1

    def _sampling(self, run: _Run) -> dict[str, object]:
        """Say how cohorts are drawn, for the record of the run."""
        if run.release is not None:
            sampler, source = repr(run.release.plan.cohorts), "operating system"
            return {"train": sampler, "randomness": source, "population": run.release.population}
        return {
            "train": f"uniform without replacement, fraction {self.fraction_train:g}, at least {self.min_train_nodes}",
            "evaluate": f"uniform without replacement, fraction {self.fraction_evaluate:g}",
            "randomness": "fresh" if run.grid.seed is None else f"seed {run.grid.seed}",
        }

    def _state(self, run: _Run) -> RecordDict:
        state = self.save()
        run.resumption.mark(state)
        if run.initial is not None:
            state[_ROUND_0] = run.initial
        if run.release is not None:
            state[PLAN] = run.release.state()
        return state

    def _run_round(self, run: _Run, server_round: int) -> None:
        recorder = run.grid.recorder
        recorder.report("round-start", round=server_round)
        metrics: dict[str, object] = {"round": server_round}
        if self.fraction_train > 0:
            run.arrays = self._train(run, server_round, metrics)
        if self.fraction_evaluate > 0:
            self._evaluate(run, server_round, metrics)
        if run.evaluate_fn is not None:
            server = run.evaluate_fn(server_round, run.arrays)
            if server is not None:
                metrics["server"] = dict(server)
        run.rounds.append(metrics)
        recorder.commit(Checkpoint(server_round, run.arrays, self._state(run), tuple(run.rounds)))
        recorder.report("round-end", round=server_round, metrics=metrics)

    def _train(self, run: _Run, server_round: int, metrics: dict[str, object]) -> ArrayRecord:
        nodes = wait_for_nodes(run.grid, self.min_available_nodes, run.timeout)
        config = ConfigRecord({**run.train_config, "server-round": server_round})
        content = self.configure(server_round, run.arrays, config)
        if run.release is not None:
            run.release.authorise(server_round)
            cohort = run.release.draw(nodes, server_round)
            content[PLAN] = run.release.instruction(server_round)
            exchange = run.release.prepare(self._exchange(run, server_round, "train", content, cohort))
            self._run_privately(run, self.pace.applied(exchange, len(cohort)), metrics)
            return self._applied(run, server_round, run.release.view())
        size = cohort_size(len(nodes), self.fraction_train, self.min_train_nodes)
        cohort = draw_cohort(run.grid, nodes, self.pace.asked(size, len(nodes)), "train", server_round)
        exchange = self.pace.applied(self._exchange(run, server_round, "train", content, cohort), size)
        outcome = self.stage.collect(exchange)
        self._judge(exchange, outcome, self.pace.quorum(size, self.min_train_nodes), metrics)
        if not isinstance(outcome.view, Sum | Updates):
            raise TypeError(f"{self.stage!r} brought back {type(outcome.view).__name__}, not {self.needs.__name__}")
        return self._applied(run, server_round, outcome.view)

    def _run_privately(self, run: _Run, exchange: Exchange, metrics: dict[str, object]) -> None:
        """Collect under the plan and charge the ledger; what the plan does not cover is not recorded."""
        if run.release is None:
            raise TypeError("no plan is in force")
        outcome = self.stage.collect(exchange) if exchange.nodes else Outcome()
        # A small cohort drawn by chance is part of the mechanism; nodes of the cohort that fail are not.
        self._judge(exchange, outcome, min(self.min_train_nodes, len(exchange.nodes)), None)
        metrics["privacy"] = run.release.charge(exchange.round, outcome.view)
        metrics["train"] = {}

    def _applied(self, run: _Run, server_round: int, view: View) -> ArrayRecord:
        try:
            return self.update(server_round, run.arrays, view)
        except (ValueError, FloatingPointError) as cause:
            raise RunFailed(
                f"round {server_round}: {type(self).__name__} could not update the model: {cause}"
            ) from cause

    def _evaluate(self, run: _Run, server_round: int, metrics: dict[str, object]) -> None:
        nodes = wait_for_nodes(run.grid, self.min_available_nodes, run.timeout)
        size = cohort_size(len(nodes), self.fraction_evaluate, self.min_evaluate_nodes)
        cohort = draw_cohort(run.grid, nodes, size, "evaluate", server_round)
        config = ConfigRecord({**run.evaluate_config, "server-round": server_round})
        content = RecordDict({self.arrayrecord_key: run.arrays})
        content[self.configrecord_key] = config
        exchange = self._exchange(run, server_round, "evaluate", content, cohort)
        self._judge(exchange, self.stage.measure(exchange), self.min_evaluate_nodes, metrics)

    def _exchange(
        self, run: _Run, server_round: int, kind: str, content: RecordDict, cohort: tuple[int, ...]
    ) -> Exchange:
        train = kind == "train"
        apart = train and type(self).configure_node is not Strategy.configure_node
        return Exchange(
            grid=run.grid,
            round=server_round,
            kind=kind,
            content=content,
            nodes=cohort,
            deadline=time.monotonic() + run.timeout,
            model=run.arrays,
            arrays_key=self.arrayrecord_key,
            weight_key=None if self.privacy is not None else self.weighted_by_key,
            metrics_function=self.train_metrics_aggr_fn if train else self.evaluate_metrics_aggr_fn,
            need=self.needs,
            content_for=(lambda node: self.configure_node(server_round, node, content)) if apart else None,
        )

    def _judge(self, exchange: Exchange, outcome: Outcome, quorum: int, metrics: dict[str, object] | None) -> None:
        """Report an exchange, record it unless a plan forbids, and fail the round when too few replies count."""
        recorder = exchange.grid.recorder
        recorder.report(
            "replies",
            round=exchange.round,
            kind=exchange.kind,
            nodes=len(exchange.nodes),
            valid=outcome.valid,
            excluded=len(exchange.nodes) - outcome.valid,
            bytes_down=outcome.bytes_down,
            bytes_up=outcome.bytes_up,
        )
        for exclusion in outcome.excluded:
            recorder.report(
                "excluded", round=exchange.round, kind=exchange.kind, node=exclusion.node, cause=exclusion.cause
            )
        if outcome.valid < quorum:
            causes = "; ".join(f"{count} x {cause}" for cause, count in outcome.causes().items())
            detail = f"{exchange.kind} round {exchange.round} asked {len(exchange.nodes)} nodes"
            hint = _hint(exchange, outcome)
            raise QuorumError(outcome.valid, quorum, f"{detail}: {causes}{hint}" if causes else detail)
        if metrics is None:
            return
        metrics[exchange.kind] = dict(outcome.metrics)
        metrics[f"{exchange.kind}-replies"] = {
            "nodes": len(exchange.nodes),
            "valid": outcome.valid,
            "excluded": [{"node": one.node, "cause": one.cause} for one in outcome.excluded],
            "bytes-down": outcome.bytes_down,
            "bytes-up": outcome.bytes_up,
            **outcome.notes,
        }

    def _result(self, run: _Run) -> Result:
        result = Result(run.arrays, rounds=tuple(run.rounds))
        if run.initial is not None:
            result.evaluate_metrics_serverapp[0] = run.initial
        places = (
            ("train", result.train_metrics_clientapp),
            ("evaluate", result.evaluate_metrics_clientapp),
            ("server", result.evaluate_metrics_serverapp),
        )
        for metrics in run.rounds:
            for name, place in places:
                found = metrics.get(name)
                if isinstance(found, dict):
                    place[int(str(metrics["round"]))] = MetricRecord(found)
            privacy = metrics.get("privacy")
            if isinstance(privacy, dict):
                result.epsilon = float(privacy["epsilon"])
        return result


def _hint(exchange: Exchange, outcome: Outcome) -> str:
    if exchange.kind == "evaluate" and any("AppError" in cause for cause in outcome.causes()):
        return " (without an @app.evaluate handler, pass fraction_evaluate=0)"
    return ""


def add_update(arrays: ArrayRecord, update: Float64s) -> ArrayRecord:
    """Return `arrays` plus a flat float64 update, each array in its own dtype (integers rounded).

    Raises ValueError when a sum does not fit the dtype.
    """
    given = split(update, arrays)
    sizes = {name: array.nbytes + -array.nbytes % _ALIGNMENT for name, array in arrays.items()}
    together = zeros_in_file(sum(sizes.values()), np.uint8)  # one file for all, where it is large
    moved, start = {}, 0
    for name, array in arrays.items():
        size = array.nbytes
        place = np.empty(size, np.uint8) if together is None else together[start : start + size]
        moved[name] = _add(name, array, given[name].reshape(-1), place.data)
        start += sizes[name]
    return ArrayRecord(moved)


def _add(name: str, array: Array, update: Float64s, data: memoryview) -> Array:
    """Write an array plus an update into `data`."""
    if not update.size:
        return array
    size = array.nbytes // update.size
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, update.size, BLOCK):
            part = update[start : start + BLOCK]
            place = slice(start * size, (start + part.size) * size)
            old = Array(array.dtype, part.shape, "raw", array.data[place])
            new = old.replace(np.add(old.compute(), part, dtype=np.float64))
            if not bool(np.isfinite(new.compute()).all()):
                raise ValueError(f"array {name!r} leaves the range of {array.dtype}")
            data[place] = new.data
            for done in (part, array.data[place], data[place]):
                let_go(done)
    return Array(array.dtype, array.shape, "raw", data.toreadonly())
