"""A node's policy around an app: enforced by the node, whatever the app and the server do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from privfed.apps import ClientApp
from privfed.array import Array
from privfed.cli.node_mod import _floors, node_wrap
from privfed.context import Context
from privfed.errors import QuorumError
from privfed.grid import LocalGrid, MemoryRecorder
from privfed.message import ErrorCode, Message
from privfed.mods import distributed_dp, secure_aggregation
from privfed.plan import PrivacyPlan
from privfed.privacy import Accountant, Central, Event, Gaussian
from privfed.privacy.ledger import Ledger
from privfed.protocols import SecAgg
from privfed.record import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from privfed.runtime.policy import NodePolicy
from privfed.strategies import FedAvg, SecureStage
from privfed.update import PLAN, flatten, norm

EVENT = Central(Gaussian(4.0))


def policy(**tables: dict[str, object]) -> NodePolicy:
    return NodePolicy.parse({name.replace("_", "-"): table for name, table in tables.items()})


def train(event: Event | None = None, run_id: int = 5, kind: str = "train", round: int = 1) -> Message:
    content = RecordDict({"arrays": ArrayRecord({"w": Array(np.zeros(4, np.float32))})})
    if event is not None:
        content[PLAN] = ConfigRecord(
            {"mechanism": "gaussian", "clip": 1.0, "event": event.to_json(), "insecure": False, "unit": "client"}
        )
    return Message(content, 1, kind, group_id=str(round)).with_metadata(run_id=run_id)


class App:
    def __init__(self, **metrics: float) -> None:
        self.asked = 0
        self.metrics = metrics or {"num-examples": 3.0}
        self.extra: dict[str, ConfigRecord] = {}

    def __call__(self, message: Message, context: Context) -> Message:
        self.asked += 1
        arrays = ArrayRecord({"w": Array(np.full(4, 3.0, np.float32))})
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord(self.metrics), **self.extra})
        return Message(content, reply_to=message)


def ask(held: NodePolicy, message: Message, folder: Path, app: App | None = None) -> tuple[Message, App]:
    asked = app if app is not None else App()
    reply = node_wrap(held, folder)(asked)(message, Context(run_id=message.metadata.run_id, node_id=1))
    return reply, asked


def test_plans_that_are_not_allowed_are_refused_before_the_app_is_asked(tmp_path: Path) -> None:
    held = policy(privacy={"plans": ["central"], "observer": "output"})
    reply, app = ask(held, train(), tmp_path)
    assert (reply.error.code, app.asked) == (ErrorCode.POLICY_REFUSED, 0)
    reply, app = ask(held, train(EVENT), tmp_path)
    assert (reply.has_error(), app.asked) == (False, 1)
    assert norm(reply.content.array_records["arrays"]) <= 1.0 + 1e-12  # the plan's clip, by the node
    strange = train(EVENT)
    strange.content[PLAN] = ConfigRecord({"mechanism": "magic"})
    assert ask(held, strange, tmp_path)[0].error.reason == "PlanRefused"


def test_budgets_of_the_run_and_of_the_period(tmp_path: Path) -> None:
    accountant = Accountant(relation="zero_out", observer="output")
    accountant.step(EVENT, 2)
    two = accountant.epsilon(delta=1e-5).upper * 1.0001
    accountant.step(EVENT, 1)
    three = accountant.epsilon(delta=1e-5).upper * 1.0001
    held = policy(
        privacy={
            "plans": ["central"],
            "observer": "output",
            "max-epsilon-per-run": two,
            "max-epsilon-per-period": three,
        }
    )
    answers = [not ask(held, train(EVENT, run, round=r), tmp_path)[0].has_error() for run in (5, 6) for r in (1, 2, 3)]
    assert answers == [True, True, False, True, False, False]
    assert ask(held, train(EVENT, 6, round=4), tmp_path)[0].error.reason == "BudgetExceeded"
    ledgers = {path.parent.name: len(Ledger.read(path).entries) for path in tmp_path.rglob("node-1.jsonl")}
    assert {name.split("-")[0]: count for name, count in ledgers.items() if name != "run-6"} == {"period": 3, "run": 2}
    # What is not accounted is refused under a limit.
    assert ask(held, train(EVENT, 7, kind="evaluate"), tmp_path)[0].error.code == ErrorCode.POLICY_REFUSED


def test_a_limit_needs_a_place_for_its_ledger() -> None:
    with pytest.raises(ValueError, match="ledgers"):
        node_wrap(policy(privacy={"max-epsilon-per-run": 1.0}))


def test_names_that_may_not_leave_stop_the_reply(tmp_path: Path) -> None:
    held = policy(outward={"records": ["arrays", "metrics"], "metrics": ["num-examples"]})
    assert not ask(held, train(), tmp_path)[0].has_error()
    assert ask(held, train(), tmp_path, App(age=41.0))[0].error.reason == "OutwardRefused"
    leaking = App()
    leaking.extra = {"rows": ConfigRecord({"first": "x"})}
    assert ask(held, train(), tmp_path, leaking)[0].error.reason == "OutwardRefused"


@pytest.mark.parametrize("name", ["privfed.leak", "privfed.secure.reply", "privfed.noised", "privfed.update"])
def test_an_app_borrows_no_name_of_the_protocols(tmp_path: Path, name: str) -> None:
    """They leave whatever the policy's patterns say."""
    leaking = App()
    leaking.extra = {name: ConfigRecord({"first": "x"})}
    for held in (policy(), policy(outward={"records": ["arrays", "metrics"]})):
        assert ask(held, train(), tmp_path, leaking)[0].error.reason == "OutwardRefused"


@pytest.mark.parametrize("name", ["more", "privfed.packed"])
def test_nothing_leaves_beside_the_update_that_is_bounded(tmp_path: Path, name: str) -> None:
    leaking = App()
    leaking.extra = {name: ArrayRecord({"w": Array(np.full(4, 1e6, np.float32))})}
    plans = {"plans": ["none", "central"], "observer": "output"}
    for held, message in (
        (policy(mods={"clip": 1.0}), train()),
        (policy(privacy=plans), train(EVENT)),
        (policy(privacy=plans), train(EVENT, kind="query.look")),
    ):
        assert ask(held, message, tmp_path, leaking)[0].error.reason == "OutwardRefused"
    assert not ask(policy(), train(), tmp_path, leaking)[0].has_error()


@pytest.mark.parametrize("limits", [{}, {"max-epsilon-per-run": 50.0}, {"max-epsilon-per-period": 50.0}])
def test_a_node_keeps_its_turns_whether_or_not_it_counts(tmp_path: Path, limits: dict[str, float]) -> None:
    held = policy(privacy={"plans": ["central"], "observer": "output", "min-separation": 3, **limits})
    context = Context(run_id=5, node_id=1)
    app = node_wrap(held, tmp_path)(App())
    answered = [number for number in range(1, 9) if not app(train(EVENT, round=number), context).has_error()]
    assert answered == [1, 4, 7]


def test_a_node_keeps_the_turns_of_the_plan_too(tmp_path: Path) -> None:
    app, context = node_wrap(policy(), tmp_path)(App()), Context(run_id=5, node_id=1)
    answered = []
    for number in range(1, 7):
        message = train(EVENT, round=number)
        message.content[PLAN] = ConfigRecord({**message.content.config_records[PLAN], "separation": 2})
        answered += [number] if not app(message, context).has_error() else []
    assert answered == [1, 3, 5]


@pytest.mark.parametrize(
    ("metrics", "weight", "records", "allowed"),
    [
        ({}, None, ["arrays"], True),
        ({}, "num-examples", ["arrays"], True),
        ({"age": (0.0, 120.0)}, "num-examples", ["arrays"], False),
        ({}, "age", ["arrays"], False),
        ({}, "num-examples", ["metrics"], False),
    ],
)
def test_names_that_may_not_leave_leave_in_no_sum_either(
    metrics: dict[str, tuple[float, float]], weight: str | None, records: list[str], allowed: bool, tmp_path: Path
) -> None:
    held = policy(outward={"records": records, "metrics": ["num-examples"]}, secure_aggregation={"required": True})
    app, recorder = App(**{"num-examples": 3.0, "age": 41.0}), MemoryRecorder()
    stage = SecureStage(SecAgg(threshold=2), train_metrics=metrics)
    strategy = FedAvg(stage=stage, weighted_by_key=weight or "num-examples", fraction_evaluate=0.0)
    grid = LocalGrid(node_wrap(held, tmp_path)(app), 3, recorder=recorder)
    start = ArrayRecord({"w": Array(np.zeros(4, np.float32))})
    if allowed:
        assert len(strategy.start(grid, start, num_rounds=1).rounds) == 1
        return
    with pytest.raises(QuorumError, match="OutwardRefused"):
        strategy.start(grid, start, num_rounds=1)
    assert app.asked == 0


def test_what_must_be_masked_is_refused_in_the_clear(tmp_path: Path) -> None:
    reply, app = ask(policy(secure_aggregation={"required": True}), train(), tmp_path)
    assert (reply.error.reason, app.asked) == ("SecureAggregationRequired", 0)


def test_the_node_clips_and_noises_by_itself(tmp_path: Path) -> None:
    """Standard deviation of 4 x 300 values of noise within 5 standard errors of 2: false alarms 6e-7."""
    held = policy(privacy={"plans": ["local"]}, mods={"clip": 1.0, "local-noise-multiplier": 2.0})
    drawn = np.concatenate(
        [flatten(ask(held, train(), tmp_path)[0].content.array_records["arrays"]) for _ in range(300)]
    )
    assert abs((drawn - 0.5).std() - 2.0) < 5 * 2.0 / np.sqrt(2 * drawn.size)
    limited = policy(
        privacy={"plans": ["local"], "max-epsilon-per-run": 1.5}, mods={"clip": 1.0, "local-noise-multiplier": 4.0}
    )
    answers = [not ask(limited, train(round=r), tmp_path)[0].has_error() for r in (1, 2, 3, 4)]
    accountant = Accountant(relation="zero_out", observer="server")
    allowed = 0
    while allowed < 4:
        accountant.step(Gaussian(4.0))
        if accountant.epsilon(delta=1e-5).upper > 1.5:
            break
        allowed += 1
    assert answers == [True] * allowed + [False] * (4 - allowed)
    assert 0 < allowed < 4


@pytest.mark.parametrize("brings_its_own", [True, False])
def test_a_distributed_plan_is_followed_by_the_node_whatever_the_app_brings(
    tmp_path: Path, brings_its_own: bool
) -> None:
    """20 nodes whose policies ask for masks and noise; apps with and without these mods give the same guarantee."""
    held = policy(
        privacy={"plans": ["distributed"], "max-epsilon-per-run": 20.0},
        secure_aggregation={"required": True, "protocols": ["SecAgg"]},
    )
    client = ClientApp(mods=[secure_aggregation(), distributed_dp()] if brings_its_own else [])

    @client.train()
    def fit(message: Message, context: Context) -> Message:
        arrays = message.content.array_records["arrays"]
        moved = ArrayRecord({name: array.replace(array.compute() + 0.01) for name, array in arrays.items()})
        return Message(RecordDict({"arrays": moved}), reply_to=message)

    plan = PrivacyPlan(clip=1.0, mechanism="skellam", noise_multiplier=0.5, delta=1e-5, max_dropped=2, bits=24)
    strategy = FedAvg(stage=SecureStage(SecAgg(threshold=11)), privacy=plan, fraction_evaluate=0.0)
    recorder = MemoryRecorder()
    grid = LocalGrid(node_wrap(held, tmp_path)(client), 20, recorder=recorder)
    start = ArrayRecord({"w": Array(np.zeros(300, np.float32))})
    result = strategy.start(grid, start, num_rounds=2)
    moved = flatten(result.arrays)
    assert np.isfinite(moved).all()
    # Two rounds of mean 0.01 in 300 coordinates, noise of sd 0.5 / 20 each: the mean's error is below 6 sd.
    assert abs(moved.mean() - 0.02) < 6 * np.sqrt(2) * 0.5 / 20 / np.sqrt(300)
    ledger = Ledger.read(next(iter(tmp_path.glob("run-*/node-7.jsonl"))))
    assert len(ledger.entries) == 2
    assert 0 < ledger.spent <= 20.0


def test_a_protocol_that_is_not_listed_is_refused(tmp_path: Path) -> None:
    held = policy(secure_aggregation={"protocols": ["LightSecAgg"]})
    message = train()
    message.content["privfed.secure.protocol"] = ConfigRecord({"name": "SecAgg"})
    reply, app = ask(held, message, tmp_path)
    assert (reply.error.reason, app.asked) == ("ProtocolRefused", 0)


def test_every_floor_of_the_policy_reaches_the_mask() -> None:
    told: dict[str, object] = {
        "require-active": True, "min-cohort": 3, "min-threshold": 4, "min-neighbours": 5, "min-bits": 9,
        "corrupt": 0.25, "weight-key": "num-examples", "min-survivors": 6, "max-dimension": 7, "grouped": True,
    }  # fmt: skip
    floors = _floors(policy(secure_aggregation=told))
    assert {name: getattr(floors, name.replace("-", "_")) for name in told} == told


def test_queries_and_evaluations_follow_the_policy_too(tmp_path: Path) -> None:
    """Without a limit on epsilon nothing counted them, and they left without noise where only plans are allowed."""
    for plans in (["central"], ["distributed"], ["local"]):
        held = policy(privacy={"plans": plans, "observer": "output"})
        for kind in ("query", "query.look", "evaluate", "evaluate.again"):
            reply, app = ask(held, train(kind=kind), tmp_path)
            assert (reply.error.reason, app.asked) == ("PlanRefused", 0)
    for kind in ("query.look", "evaluate"):
        free = policy(privacy={"plans": ["central"], "unaccounted": [kind.partition(".")[0]]})
        assert ask(free, train(kind=kind), tmp_path)[1].asked == 1
        assert ask(policy(), train(kind=kind), tmp_path)[1].asked == 1  # plan "none" is among the default's


def test_a_query_under_a_plan_is_clipped_and_charged_by_the_node(tmp_path: Path) -> None:
    held = policy(privacy={"plans": ["central"], "observer": "output", "max-epsilon-per-run": 2.5})
    reply, _ = ask(held, train(EVENT, kind="query.look"), tmp_path)
    assert norm(reply.content.array_records["arrays"]) <= 1.0 + 1e-12
    while not reply.has_error():
        reply, _ = ask(held, train(EVENT, kind="query.look"), tmp_path)
    assert reply.error.reason == "BudgetExceeded"
    ledger = Ledger.read(next(iter(tmp_path.glob("run-*/node-1.jsonl"))))
    accountant = Accountant(relation="zero_out", observer="output").step(EVENT, len(ledger.entries))
    assert ledger.spent == pytest.approx(accountant.epsilon(delta=1e-5).upper, rel=1e-9)
    assert 0 < ledger.spent <= 2.5 < accountant.step(EVENT).epsilon(delta=1e-5).upper


def test_the_nodes_own_noise_is_on_answers_to_queries(tmp_path: Path) -> None:
    """Standard deviation of 4 x 300 values of noise within 5 standard errors of 2: false alarms 6e-7."""
    held = policy(privacy={"plans": ["local"]}, mods={"clip": 1.0, "local-noise-multiplier": 2.0})
    drawn = [ask(held, train(kind="query.look"), tmp_path)[0].content.array_records["arrays"] for _ in range(300)]
    values = np.concatenate([flatten(arrays) for arrays in drawn])
    assert abs((values - 0.5).std() - 2.0) < 5 * 2.0 / np.sqrt(2 * values.size)
