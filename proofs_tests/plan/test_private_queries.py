"""Queries under a privacy plan: clipped, noised and charged like a round of training, by the server and by the node.

Statistical tests state how often a right implementation would fail; noise comes from the operating system.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privfed import mods
from privfed.apps import ClientApp, Mod
from privfed.array import Array
from privfed.context import Context
from privfed.errors import PlanRefused, QuorumError, RunFailed
from privfed.grid import LocalGrid, MemoryRecorder
from privfed.message import Message
from privfed.plan import AdaptiveClip, PrivacyPlan
from privfed.privacy import Accountant, Central, Gaussian
from privfed.privacy.correlated import Tree
from privfed.privacy.ledger import Ledger
from privfed.privacy.sampling import PoissonSampler
from privfed.protocols import LightSecAgg, SecAgg, SecAggPlus
from privfed.record import ArrayRecord, MetricRecord, RecordDict
from privfed.strategies import FedAnalytics, FedAvg, GroupedStage, PlainStage, SecureStage
from privfed.strategies.release import open_release
from privfed.update import PLAN
from proofs_tests.plan.network import Network

SIZE, NODES = 2000, 12
SHAPES: dict[str, tuple[int, ...]] = {"histogram": (SIZE - 1,), "count": ()}


def answer_of(node: int, length: float = 1.0) -> np.ndarray:
    values = np.random.default_rng(node).normal(size=SIZE)
    return np.asarray(values * (length / np.linalg.norm(values)))


def app_of(*chain: Mod, length: dict[int, float] | None = None, broken: int | None = None) -> ClientApp:
    app = ClientApp(mods=list(chain))

    @app.query("look")
    def look(message: Message, context: Context) -> Message:
        if context.node_id == broken:
            raise ValueError
        values = answer_of(context.node_id, (length or {}).get(context.node_id, 1.0))
        arrays = ArrayRecord({"histogram": Array(values[:-1].copy()), "count": Array(np.array(values[-1]))})
        metrics = MetricRecord({"num-examples": 10**6, "secret": 0.5})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict({"arrays": message.content["arrays"]}), reply_to=message)

    return app


def flat(totals: dict[str, np.ndarray]) -> np.ndarray:
    return np.append(totals["histogram"], totals["count"])


def truth(nodes: range = range(1, NODES + 1)) -> np.ndarray:
    return np.asarray(np.sum([answer_of(node) for node in nodes], axis=0))


STAGES: list[Any] = [
    (PlainStage(), False),
    (SecureStage(SecAgg()), True),
    (GroupedStage(SecAgg(threshold=2), 3), True),
]


@pytest.mark.parametrize(("stage", "masked"), STAGES, ids=["plain", "secure", "grouped"])
def test_the_server_noises_the_sum_of_answers(stage: Any, masked: bool) -> None:
    """The variance of 2000 errors over (z C)^2 is within 5 standard errors of 1: false alarms 6e-7."""
    plan = PrivacyPlan(clip=2.0, noise_multiplier=1.5)
    app = app_of(*([mods.secure_aggregation()] if masked else []), mods.clip())
    grid = LocalGrid(app, NODES)
    answer = FedAnalytics(stage=stage, privacy=plan).query(grid, SHAPES, action="look")
    error = flat(answer.totals) - truth()
    assert answer.stddev == 3.0
    assert abs(np.mean(error**2) / 9.0 - 1) < 5 * math.sqrt(2 / SIZE)
    assert abs(error.mean()) < 5 * 3.0 / math.sqrt(SIZE)
    assert answer.totals["count"].shape == ()


@pytest.mark.parametrize("mechanism", ["skellam", "discrete_gaussian"])
@pytest.mark.parametrize(
    "protocol", [SecAgg(threshold=8), SecAggPlus(neighbours=10, threshold=6), LightSecAgg(threshold=8)], ids=repr
)
@pytest.mark.parametrize("dropped", [0, 3])
def test_the_nodes_noise_their_answers(protocol: Any, mechanism: str, dropped: int) -> None:
    """The sum has the noise of its survivors: variance within 5 standard errors, false alarms 6e-7 a case."""
    plan = PrivacyPlan(clip=2.0, noise_multiplier=1.5, mechanism=mechanism, max_dropped=4, bits=24)
    grid = Network(
        app_of(mods.secure_aggregation(), mods.distributed_dp()), NODES, dict.fromkeys(range(1, dropped + 1), 2)
    )
    answer = FedAnalytics(stage=SecureStage(protocol), privacy=plan).query(grid, SHAPES, action="look")
    error = flat(answer.totals) - truth(range(dropped + 1, NODES + 1))
    survivors = NODES - dropped
    expected = (1.5 * 2.0) ** 2 * survivors / (NODES - 4)
    assert abs(np.mean(error**2) / expected - 1) < 5 * math.sqrt(2 / SIZE)
    assert answer.stddev == pytest.approx(3.0 * math.sqrt(NODES / 8))
    assert answer.nodes == NODES
    assert answer.excluded == {}


@pytest.mark.parametrize("distributed", [False, True])
def test_one_node_moves_the_sum_by_at_most_the_clip(distributed: bool) -> None:
    """Noise of norm about 0.02 * sqrt(2000) = 0.9 cannot hide an answer a thousand times too long."""
    kind = {"mechanism": "skellam", "bits": 24} if distributed else {}
    plan = PrivacyPlan(clip=1.0, noise_multiplier=0.02, **kind)
    inner = mods.distributed_dp() if distributed else mods.clip()
    app = app_of(mods.secure_aggregation(), inner, length={3: 1000.0})
    answer = FedAnalytics(stage=SecureStage(SecAgg()), privacy=plan).query(LocalGrid(app, NODES), SHAPES, action="look")
    assert np.linalg.norm(flat(answer.totals) - truth()) < 1.5


def test_an_answer_that_is_not_clipped_does_not_count() -> None:
    plan = PrivacyPlan(clip=1.0, noise_multiplier=0.001)
    grid = LocalGrid(app_of(length={3: 1.5}), NODES)
    answer = FedAnalytics(privacy=plan).query(grid, SHAPES, action="look")
    others = truth() - answer_of(3)
    assert np.linalg.norm(flat(answer.totals) - others) < 0.1
    with pytest.raises(QuorumError, match="not clipped"):
        FedAnalytics(min_nodes=12, privacy=plan).query(grid, SHAPES, action="look")


def test_what_leaves_beside_the_noised_sum_is_public() -> None:
    """A node that fails changes neither the count nor the list; the planned cohort is what is said."""
    plan = PrivacyPlan(clip=1.0, noise_multiplier=1.0)
    answers = [
        FedAnalytics(privacy=plan).query(LocalGrid(app_of(mods.clip(), broken=bad), NODES), SHAPES, action="look")
        for bad in (None, 5)
    ]
    for answer in answers:
        assert (answer.nodes, answer.excluded, answer.stddev) == (NODES, {}, 1.0)
    assert answers[0].privacy == answers[1].privacy
    assert set(answers[0].privacy) == {
        "epsilon", "delta", "unit", "relation", "observer", "noise-multiplier", "cohort", "budget", "clip",
    }  # fmt: skip


def test_epsilon_is_that_of_an_independent_computation(tmp_path: Path) -> None:
    """Two queries and a round of training, of one plan, are charged to one ledger of the run."""
    recorder = MemoryRecorder()
    recorder.ledger_path = tmp_path / "ledger.jsonl"
    grid = LocalGrid(app_of(mods.clip()), NODES, recorder=recorder)
    plan = PrivacyPlan(clip=1.0, noise_multiplier=2.0)
    analytics = FedAnalytics(privacy=plan)
    accountant = Accountant(relation="add_remove", observer="output")
    for count in (1, 2):
        answer = analytics.query(grid, SHAPES, {"number": count}, action="look")
        accountant.step(Central(Gaussian(2.0)))
        assert answer.privacy["epsilon"] == pytest.approx(accountant.epsilon(delta=1e-5).upper, rel=1e-9)
    result = FedAvg(privacy=plan, fraction_evaluate=0.0).start(grid, ArrayRecord([np.zeros(5)]), num_rounds=1)
    accountant.step(Central(Gaussian(2.0)))
    assert result.epsilon == pytest.approx(accountant.epsilon(delta=1e-5).upper, rel=1e-9)
    ledger = Ledger.read(recorder.ledger_path)
    assert [entry.run.partition(".")[2] for entry in ledger.entries] == ["query", "query", ""]
    assert ledger.replay().agrees


def test_runs_without_a_file_share_one_ledger_too() -> None:
    grid = LocalGrid(app_of(mods.clip()), NODES)
    plan = PrivacyPlan(clip=1.0, noise_multiplier=2.0)
    spent = [FedAnalytics(privacy=plan).query(grid, SHAPES, action="look").privacy["epsilon"] for _ in range(2)]
    for _ in range(2):
        result = FedAvg(privacy=plan, fraction_evaluate=0.0).start(grid, ArrayRecord([np.zeros(5)]), num_rounds=1)
        spent.append(result.epsilon)
    accountant = Accountant(relation="add_remove", observer="output").step(Central(Gaussian(2.0)), 4)
    assert spent == sorted(set(spent))
    assert spent[-1] == pytest.approx(accountant.epsilon(delta=1e-5).upper, rel=1e-9)
    with pytest.raises(PlanRefused, match="was started under"):
        FedAnalytics(privacy=PrivacyPlan(clip=1.0, epsilon=8.0)).query(grid, SHAPES, action="look")


def test_a_budget_is_kept_and_a_query_beyond_it_is_not_asked() -> None:
    asked: list[str] = []

    def note(message: Message, context: Context, call_next: Any) -> Message:
        asked.append(message.metadata.message_type)
        return call_next(message, context)

    grid = LocalGrid(app_of(note, mods.clip()), NODES)
    analytics = FedAnalytics(privacy=PrivacyPlan(clip=1.0, epsilon=2.0, rounds=2))
    answers = [analytics.query(grid, SHAPES, {"n": n}, action="look") for n in (1, 2)]
    assert float(str(answers[0].privacy["epsilon"])) < float(str(answers[1].privacy["epsilon"])) <= 2.0
    assert len(asked) == 2 * NODES
    with pytest.raises(RunFailed, match="was not started"):
        analytics.query(grid, SHAPES, {"n": 3}, action="look")
    assert len(asked) == 2 * NODES


@pytest.mark.parametrize("distributed", [False, True])
def test_the_charge_is_durable_before_the_sum_is_noised_or_opened(distributed: bool, tmp_path: Path) -> None:
    recorder = MemoryRecorder()
    recorder.ledger_path = path = tmp_path / "ledger.jsonl"
    entries: list[int] = []

    class Watched(SecureStage):
        def _authorise(self, exchange: Any, drive: Any) -> None:
            super()._authorise(exchange, drive)
            if distributed and drive.server.stage == self.protocol.stages[-1]:
                entries.append(len(Ledger.read(path).entries))

        def collect(self, exchange: Any) -> Any:
            outcome = super().collect(exchange)
            if not distributed:
                release = outcome.view.release

                def noted(*arguments: Any) -> Any:
                    entries.append(len(Ledger.read(path).entries))
                    return release(*arguments)

                object.__setattr__(outcome.view, "release", noted)
            return outcome

    kind = {"mechanism": "skellam", "bits": 24} if distributed else {}
    plan = PrivacyPlan(clip=1.0, noise_multiplier=1.0, **kind)
    inner = mods.distributed_dp() if distributed else mods.clip()
    grid = LocalGrid(app_of(mods.secure_aggregation(), inner), NODES, recorder=recorder)
    FedAnalytics(stage=Watched(SecAgg()), privacy=plan).query(grid, SHAPES, action="look")
    assert entries == [1]


def test_a_server_that_dies_at_the_last_stage_has_paid(tmp_path: Path) -> None:
    recorder = MemoryRecorder()
    recorder.ledger_path = tmp_path / "ledger.jsonl"
    app = app_of(mods.secure_aggregation(), mods.distributed_dp())
    grid = Network(app, NODES, dies=3, recorder=recorder)
    plan = PrivacyPlan(clip=1.0, noise_multiplier=1.0, mechanism="skellam", bits=24)
    analytics = FedAnalytics(stage=SecureStage(SecAgg(threshold=8)), privacy=plan)
    with pytest.raises(KeyboardInterrupt):
        analytics.query(grid, SHAPES, action="look")
    assert len(Ledger.read(recorder.ledger_path).entries) == 1
    grid.dies = 99
    analytics.query(grid, SHAPES, action="look")  # other noise: another release
    assert len(Ledger.read(recorder.ledger_path).entries) == 2


def test_a_secret_cohort_amplifies_and_an_empty_one_is_noise() -> None:
    plan = PrivacyPlan(clip=1.0, noise_multiplier=1.0, sampler=PoissonSampler(0.5), population=NODES)
    grid = LocalGrid(app_of(mods.clip()), NODES)
    answer = FedAnalytics(privacy=plan).query(grid, SHAPES, action="look")
    accountant = Accountant(relation="add_remove", observer="output").step(Central(Gaussian(1.0)))
    assert float(str(answer.privacy["epsilon"])) < accountant.epsilon(delta=1e-5).upper
    assert answer.nodes == NODES // 2
    nobody = PrivacyPlan(clip=1.0, noise_multiplier=1.0, sampler=PoissonSampler(1e-9), population=NODES)
    noise = FedAnalytics(privacy=nobody).query(LocalGrid(app_of(mods.clip()), NODES), SHAPES, action="look")
    # Standard deviation 1 in 2000 entries, within 5 standard errors: false alarms 6e-7.
    assert abs(np.mean(flat(noise.totals) ** 2) - 1) < 5 * math.sqrt(2 / SIZE)


def test_test_randomness_is_worth_nothing_and_gives_the_same_answer() -> None:
    plan = PrivacyPlan(clip=1.0, noise_multiplier=1.0)
    answers = []
    for _ in range(2):
        grid = LocalGrid(app_of(mods.clip()), NODES, recorder=MemoryRecorder(insecure_test_randomness=4))
        answers.append(FedAnalytics(privacy=plan).query(grid, SHAPES, action="look"))
    assert answers[0].privacy["epsilon"] == math.inf
    np.testing.assert_array_equal(answers[0].totals["histogram"], answers[1].totals["histogram"])


@pytest.mark.parametrize(
    ("plan", "stage", "text"),
    [
        (PrivacyPlan(clip=1.0, noise_multiplier=1.0, correlation=Tree()), PlainStage(), "correlation"),
        (PrivacyPlan(clip=1.0, noise_multiplier=1.0, adaptive=AdaptiveClip()), PlainStage(), "adaptive"),
        (PrivacyPlan(clip=1.0, noise_multiplier=1.0, mechanism="skellam"), PlainStage(), "skellam"),
    ],
)
def test_a_plan_that_a_query_cannot_keep_is_refused(plan: PrivacyPlan, stage: Any, text: str) -> None:
    with pytest.raises(PlanRefused, match=text):
        FedAnalytics(stage=stage, privacy=plan)


# --- what a node makes of it --------------------------------------------------------------------------------------


def question(plan: PrivacyPlan, number: int = 1, **changes: Any) -> Message:
    template = ArrayRecord({"histogram": Array(np.zeros(SIZE - 1)), "count": Array(np.zeros(()))})
    release = open_release(plan, LocalGrid(app_of(), NODES), template, NODES, 1, purpose="query")
    instruction = release.instruction(number)
    instruction.update(changes)
    return Message(RecordDict({"arrays": template, PLAN: instruction}), 1, "query.look", group_id=str(number))


CENTRAL = PrivacyPlan(clip=0.5, noise_multiplier=4.0)
SHARED = PrivacyPlan(clip=0.5, noise_multiplier=4.0, mechanism="skellam", bits=24)


@pytest.mark.parametrize(("plan", "observer"), [(CENTRAL, "output"), (SHARED, "server")], ids=["central", "shared"])
def test_a_node_counts_its_answers_and_stops(plan: PrivacyPlan, observer: str, tmp_path: Path) -> None:
    noise = mods.distributed_dp() if plan.distributed else mods.clip()
    budget = mods.privacy_budget(3.0, relation="zero_out", observer=observer, ledgers=tmp_path)
    app, context = app_of(budget, noise), Context(node_id=1)
    accountant, answers = Accountant(relation="zero_out", observer=observer), 0
    while True:
        message = question(plan, number=1)  # always the first: queries have no rounds to keep apart
        reply = app(message, context)
        if reply.has_error():
            assert reply.error.reason == "BudgetExceeded"
            break
        answers += 1
        accountant.step(open_release(plan, LocalGrid(app_of(), NODES), message.content["arrays"], NODES, 1).event)
        assert accountant.epsilon(delta=1e-5).upper <= 3.0
    assert answers >= 2
    ledger = Ledger.read(tmp_path / "node-1.jsonl")
    assert len(ledger.entries) == answers
    assert ledger.spent == pytest.approx(accountant.epsilon(delta=1e-5).upper, rel=1e-9)


@pytest.mark.parametrize(("plan", "observer"), [(CENTRAL, "output"), (SHARED, "server")], ids=["central", "shared"])
@pytest.mark.parametrize("kind", ["train", "query.look"])
def test_no_plan_but_correlated_noise_is_paid_for_once(plan: PrivacyPlan, observer: str, kind: str) -> None:
    """A server that says "once" of another plan had rounds for nothing."""
    charged: list[float] = []
    counted = mods.privacy_budget(math.inf, observer=observer, on_charge=lambda entry: charged.append(entry.spent))
    context = Context(node_id=1)

    def made(message: Message, context: Context) -> Message:
        return Message(RecordDict(), reply_to=message)

    for number in (1, 2, 3):
        content = question(plan, number, once=True).content
        assert not counted(Message(content, 1, kind, group_id=str(number)), context, made).has_error()
    assert 0 < charged[0] < charged[1] < charged[2]


def test_a_question_without_a_plan_is_refused_unless_its_owner_lets_it_pass() -> None:
    message = Message(RecordDict({"arrays": ArrayRecord([np.zeros(3)])}), 1, "query.look")

    def made(message: Message, context: Context) -> Message:
        return Message(RecordDict(), reply_to=message)

    for mod in (mods.privacy_budget(1.0), mods.distributed_dp()):
        assert mod(message, Context(node_id=1), made).error.reason == "PlanRefused"
    free = mods.privacy_budget(1.0, unaccounted=["query"], observer="output", ledgers=None)
    assert not free(message, Context(node_id=1), made).has_error()
    # With a plan it is counted all the same: half an epsilon is not enough for two.
    context = Context(node_id=1)
    cheap = mods.privacy_budget(1.0, unaccounted=["query"], observer="output")
    replies = [cheap(question(CENTRAL), context, made).has_error() for _ in range(3)]
    assert replies[-1]


def test_local_noise_covers_answers() -> None:
    """Noise of standard deviation z in 2000 entries, within 5 standard errors: false alarms 6e-7."""
    app, context = app_of(mods.local_dp(1.0, noise_multiplier=3.0)), Context(node_id=1)
    message = Message(question(CENTRAL).content.copy(), 1, "query.look")
    del message.content[PLAN]
    reply = app(message, context)
    arrays = reply.content.array_records["arrays"]
    values = np.append(arrays["histogram"].numpy(), arrays["count"].numpy())
    assert abs(np.mean((values - answer_of(1)) ** 2) / 9 - 1) < 5 * math.sqrt(2 / SIZE)
    assert set(reply.content.metric_records["metrics"]) == {"num-examples"}
    assert mods.local.spent(context, 1e-5).upper > 0
