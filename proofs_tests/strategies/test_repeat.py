"""A question that nodes answer once in a run is not asked twice: the old answer is told, or the cause and the fix."""

from __future__ import annotations

from typing import Any

import pytest

from privfed.errors import QuorumError, RunFailed
from privfed.protocols import SecAgg
from privfed.record import ConfigRecord
from privfed.strategies import FedAvg, GroupedStage, SecureStage
from proofs_tests.strategies.test_grouped import MODEL, Nodes, app_of

STAGES: list[Any] = [
    lambda: SecureStage(SecAgg(threshold=2), max_weight=4, evaluate_metrics={"loss": (0, 1)}),
    lambda: GroupedStage(SecAgg(threshold=2), 2, max_weight=4, evaluate_metrics={"loss": (0, 1)}),
]


@pytest.mark.parametrize("stage", STAGES, ids=["SecureStage", "GroupedStage"])
def test_an_unchanged_model_is_evaluated_once(stage: Any) -> None:
    grid = Nodes(app_of(), 6)
    result = FedAvg(fraction_train=0, stage=stage()).start(grid, MODEL, 3)
    asked = [one for one in grid.sent if one[0] == "SecAgg"]
    assert len(asked) == 6 * 4, "one session"
    assert [metrics["evaluate-replies"].get("reused-from-round") for metrics in result.rounds] == [None, 1, 1]
    assert all(metrics["evaluate"]["loss"] == pytest.approx(0.5, abs=1e-6) for metrics in result.rounds)
    assert result.rounds[2]["evaluate-replies"]["bytes-up"] == 0


def test_another_question_about_the_same_model_is_refused_before_it_is_asked() -> None:
    grid, stage = Nodes(app_of(), 4), STAGES[0]()
    strategy = FedAvg(fraction_train=0, stage=stage)
    strategy.start(grid, MODEL, 1)
    before = len(grid.sent)
    with pytest.raises(RunFailed, match="evaluate round 1, the model of round 1: nodes open one sum") as caught:
        strategy.start(grid, MODEL, 1, evaluate_config=ConfigRecord({"split": "other"}))
    assert "start a new run" in str(caught.value)
    assert len(grid.sent) == before


def test_training_on_an_unchanged_model_says_cause_and_fix() -> None:
    class Stuck(FedAvg):
        def update(self, server_round: int, arrays: Any, view: Any) -> Any:
            return arrays

    grid = Nodes(app_of(), 4)
    with pytest.raises(RunFailed, match="train round 2, the model of round 1: nodes open one sum"):
        Stuck(fraction_evaluate=0, stage=STAGES[0]()).start(grid, MODEL, 2)
    assert len(grid.sent) == 4 * 4
    # A server that does not remember hears it from the nodes, in the same words.
    with pytest.raises(RunFailed, match=r"nodes open one sum .*SumAlreadyOpened") as caught:
        Stuck(fraction_evaluate=0, stage=STAGES[0]()).start(grid, MODEL, 1)
    assert not isinstance(caught.value, QuorumError)


def test_a_changed_model_and_another_run_are_asked_again() -> None:
    stage = STAGES[0]()
    strategy = FedAvg(stage=stage)
    result = strategy.start(Nodes(app_of(), 4), MODEL, 2)
    assert all("reused-from-round" not in metrics["evaluate-replies"] for metrics in result.rounds)
    again = strategy.start(Nodes(app_of(), 4), MODEL, 1)
    assert again.rounds[0]["evaluate-replies"]["bytes-up"] > 0
