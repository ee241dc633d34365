"""A node's budget and metric floor: refuse first, charge before anything leaves, forget nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from privfed.context import Context
from privfed.message import Error, ErrorCode, Message
from privfed.mods import metric_floor, privacy_budget
from privfed.privacy import Accountant, Central, Event, Gaussian, PoissonSampled
from privfed.privacy.ledger import Ledger
from privfed.record import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from privfed.update import PLAN


def train(charged: Event | None = None, kind: str = "train", round: int = 1, **plan: object) -> Message:
    content = RecordDict({"arrays": ArrayRecord()})
    if charged is not None:
        told = {"mechanism": "gaussian", "event": charged.to_json(), "insecure": False, **plan}
        content[PLAN] = ConfigRecord(told)  # type: ignore[arg-type]  # hostile values too
    return Message(content, 7, kind, group_id=str(round))


class App:
    """An app that counts how often it was asked."""

    def __init__(self, reply: RecordDict | Error | None = None) -> None:
        self.asked = 0
        self.reply = reply if reply is not None else RecordDict({"metrics": MetricRecord({"loss": 1.0})})

    def __call__(self, message: Message, context: Context) -> Message:
        self.asked += 1
        return Message(self.reply, reply_to=message)


EVENT = Central(Gaussian(5.0))


def limit_for(rounds: int) -> float:
    accountant = Accountant(relation="zero_out", observer="output")
    accountant.step(EVENT, rounds)
    return accountant.epsilon(delta=1e-5).upper


@pytest.mark.parametrize("on_disk", [False, True])
def test_it_answers_until_the_budget_is_spent(tmp_path: Path, on_disk: bool) -> None:
    folder = tmp_path / "ledgers" if on_disk else None
    mod = privacy_budget(limit_for(3) * 1.0001, observer="output", ledgers=folder)
    context, app = Context(run_id=5, node_id=7), App()
    for round in (1, 2, 3):
        assert not mod(train(EVENT, round=round), context, app).has_error()
    refused = mod(train(EVENT, round=4), context, app)
    assert (refused.error.code, refused.error.reason) == (ErrorCode.POLICY_REFUSED, "BudgetExceeded")
    assert app.asked == 3  # refused before the app was asked
    if folder is not None:
        ledger = Ledger.read(folder / "node-7.jsonl")
        assert [entry.round for entry in ledger.entries] == [1, 2, 3]
        assert ledger.replay().agrees
        # The next run goes on from there, another node has its own.
        assert mod(train(EVENT), Context(run_id=6, node_id=7), app).has_error()
        assert not mod(train(EVENT), Context(run_id=6, node_id=8), app).has_error()
    else:
        assert not mod(train(EVENT), Context(run_id=6, node_id=7), app).has_error()


def test_an_error_costs_nothing_and_a_reply_made_twice_costs_twice(tmp_path: Path) -> None:
    mod = privacy_budget(100.0, observer="output", ledgers=tmp_path)
    context, message = Context(run_id=5, node_id=7), train(EVENT)
    mod(message, context, App(Error(ErrorCode.UNKNOWN, "x")))
    assert not Ledger.read(tmp_path / "node-7.jsonl").entries
    mod(message, context, App())
    mod(message, context, App())
    assert len(Ledger.read(tmp_path / "node-7.jsonl").entries) == 2


@pytest.mark.parametrize(
    "message",
    [
        train(),
        train(EVENT, kind="evaluate"),
        train(kind="query"),
        train(EVENT, insecure=True),
        train(EVENT, insecure=0),
        train(EVENT, event="{}"),
        train(EVENT, event=5),
        train(EVENT, mechanism="skellam"),
        train(EVENT, mechanism="none"),
        train(PoissonSampled(0.1, Central(Gaussian(1e-9)))),
    ],
)
def test_what_is_not_accounted_is_refused(message: Message) -> None:
    app = App()
    reply = privacy_budget(8.0, observer="output")(message, Context(run_id=5, node_id=7), app)
    assert reply.error.code == ErrorCode.POLICY_REFUSED
    assert app.asked == 0


def test_central_noise_protects_nothing_from_the_server() -> None:
    app = App()
    assert privacy_budget(1e9)(train(EVENT), Context(run_id=5), app).error.reason == "PlanRefused"
    assert app.asked == 0


def test_an_owner_may_let_evaluation_pass() -> None:
    mod = privacy_budget(8.0, observer="output", unaccounted=("evaluate",))
    assert not mod(train(kind="evaluate"), Context(), App()).has_error()
    assert mod(train(kind="query"), Context(), App()).has_error()


def test_participations_keep_their_distance() -> None:
    mod, context, app = privacy_budget(1e6, observer="output", min_separation=3), Context(run_id=5), App()
    answered = [not mod(train(EVENT, round=round), context, app).has_error() for round in range(1, 9)]
    assert answered == [True, False, False, True, False, False, True, False]


def test_bad_arguments_are_named() -> None:
    for arguments in (
        {"epsilon": 0.0},
        {"epsilon": 1.0, "delta": 1.0},
        {"epsilon": 1.0, "relation": "x"},
        {"epsilon": 1.0, "observer": "x"},
        {"epsilon": 1.0, "min_separation": 0},
        {"epsilon": 1.0, "unaccounted": ("train",)},
    ):
        with pytest.raises(ValueError, match=list(arguments)[-1]):
            privacy_budget(**arguments)  # type: ignore[arg-type]  # what is under test


def floor(metrics: dict[str, float], message: Message | None = None, **arguments: object) -> Message:
    reply = RecordDict({"arrays": ArrayRecord()}) if message is None else RecordDict()
    reply["metrics"] = MetricRecord(metrics)
    mod = metric_floor(10, **arguments)  # type: ignore[arg-type]  # several kinds
    return mod(message if message is not None else train(), Context(), App(reply))


def kept(reply: Message) -> dict[str, float]:
    return dict(reply.content.metric_records["metrics"])  # type: ignore[arg-type]  # numbers


def test_metrics_about_few_stay() -> None:
    assert kept(floor({"num-examples": 10, "loss": 0.5})) == {"num-examples": 10, "loss": 0.5}
    assert kept(floor({"num-examples": 9, "loss": 0.5})) == {}
    assert kept(floor({"loss": 0.5})) == {}
    assert kept(floor({"num-examples": 19, "loss": 0.5}, allowed=["num-examples"], round_to=5)) == {"num-examples": 15}
    assert kept(floor({"num-examples": float("nan"), "loss": 0.5})) == {}


def test_metrics_stay_under_a_plan_and_a_reply_of_nothing_else_is_refused() -> None:
    reply = floor({"num-examples": 1_000, "loss": 0.5}, train(EVENT, kind="evaluate"))
    assert (reply.error.code, reply.error.reason) == (ErrorCode.POLICY_REFUSED, "TooFewExamples")
