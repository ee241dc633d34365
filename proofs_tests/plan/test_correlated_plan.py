"""Plans with correlated noise in runs: one charge, the planned noise, turns kept, resumed without a second price."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from privfed.apps import ClientApp
from privfed.array import Array
from privfed.context import Context
from privfed.errors import PlanRefused, RunFailed
from privfed.grid import Checkpoint, LocalGrid, MemoryRecorder
from privfed.message import Message
from privfed.mods import clip, privacy_budget, secure_aggregation
from privfed.plan import AdaptiveClip, PrivacyPlan
from privfed.privacy import Accountant, Central, Gaussian, MatrixGaussian
from privfed.privacy.correlated import Banded, Tree, sensitivity
from privfed.privacy.ledger import Ledger
from privfed.privacy.sampling import PoissonSampler
from privfed.protocols import SecAgg
from privfed.record import ArrayRecord, ConfigRecord, RecordDict
from privfed.strategies import FedAvg, SecureStage
from privfed.update import PLAN, flatten

SIZE = 400


def client(log: list[tuple[int, int]], mods: list[object] | None = None, step: float = 0.01) -> ClientApp:
    app = ClientApp(mods=mods if mods is not None else [clip()])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        log.append((int(message.metadata.group_id), context.node_id))
        arrays = message.content.array_records["arrays"]
        moved = ArrayRecord({name: array.replace(array.compute() + step) for name, array in arrays.items()})
        return Message(RecordDict({"arrays": moved}), reply_to=message)

    return app


class Killed(BaseException):
    """The process was ended here."""


class Recorder(MemoryRecorder):
    """Keeps every checkpoint, and may die before a commit."""

    def __init__(self, path: Path | None = None, dies_before: int = -1, checkpoint: Checkpoint | None = None) -> None:
        super().__init__(checkpoint)
        self.ledger_path = path
        self.dies_before = dies_before
        self.kept: list[Checkpoint] = []

    def commit(self, checkpoint: Checkpoint) -> None:
        if self.dies_before == checkpoint.round:
            raise Killed
        self.kept.append(checkpoint)
        super().commit(checkpoint)


def start(plan: PrivacyPlan, recorder: Recorder, rounds: int, log: list[tuple[int, int]], **options: object):
    grid = LocalGrid(client(log, options.pop("mods", None)), 12, recorder=recorder)
    strategy = FedAvg(privacy=plan, fraction_evaluate=0.0, min_train_nodes=1, **options)
    return strategy.start(grid, ArrayRecord({"w": Array(np.zeros(SIZE))}), num_rounds=rounds)


@pytest.mark.parametrize("correlation", [Tree(), Banded.square_root(4), Banded((1.0, -0.5))])
@pytest.mark.parametrize("secure", [False, True])
def test_releases_have_the_noise_of_the_matrix(correlation, secure: bool) -> None:
    """Each round's noise, over 400 coordinates: variance within 6 standard errors of the plan's (false alarms 2e-9)."""
    plan = PrivacyPlan(clip=1.0, noise_multiplier=0.5, correlation=correlation, separation=4, relation="zero_out")
    recorder, log, rounds = Recorder(), [], 8
    options = {"stage": SecureStage(SecAgg(threshold=2)), "mods": [secure_aggregation(), clip()]} if secure else {}
    result = start(plan, recorder, rounds, log, **options)
    # Twelve nodes in four turns: three a round, each again after four rounds.
    turns = {number: sorted(node for at, node in log if at == number) for number in range(1, rounds + 1)}
    assert turns == {number: [node for node in range(1, 13) if node % 4 == number % 4] for number in turns}
    models = [flatten(one.arrays) for one in recorder.kept]
    noise = np.diff(models, axis=0) * 3.0 - 3 * 0.01
    matrix = correlation.encoder(rounds)
    deviation = 0.5 * sensitivity(correlation, rounds, 4)
    expected = (np.linalg.inv(matrix) ** 2).sum(axis=1) * deviation**2
    assert (np.abs(noise.var(axis=1) / expected - 1) < 6 * math.sqrt(2 / SIZE)).all()
    # Encoded again, the rows' noise is independent and of the stated deviation.
    rows = matrix @ noise
    assert np.abs(rows.std(axis=1) / deviation - 1).max() < 6 / math.sqrt(2 * SIZE)
    assert np.abs(np.corrcoef(rows) - np.eye(rounds)).max() < 6 / math.sqrt(SIZE)
    one = Accountant(relation="zero_out").step(Gaussian(0.5))
    assert result.epsilon == pytest.approx(one.epsilon(delta=1e-5).upper, rel=1e-6)


def test_the_run_is_charged_once_and_before_its_first_release(tmp_path: Path) -> None:
    plan = PrivacyPlan(clip=1.0, epsilon=2.0, correlation=Tree(), separation=3)
    recorder = Recorder(tmp_path / "ledger.jsonl")
    result = start(plan, recorder, 6, [])
    ledger = Ledger.read(tmp_path / "ledger.jsonl")
    assert [entry.round for entry in ledger.entries] == [1, 2, 3, 4, 5, 6]
    assert len({entry.spent for entry in ledger.entries}) == 1
    assert 1.99 < result.epsilon <= 2.0
    assert ledger.replay().agrees


@pytest.mark.parametrize("correlation", [Tree(), Banded.square_root(3)])
def test_a_round_released_twice_costs_more_and_a_resumed_run_goes_on(correlation, tmp_path: Path) -> None:
    plan = PrivacyPlan(clip=1.0, noise_multiplier=2.0, correlation=correlation, separation=4, rounds=6)
    whole = Recorder(tmp_path / "whole.jsonl")
    undisturbed = start(plan, whole, 6, [])
    first = Recorder(tmp_path / "ledger.jsonl", dies_before=4)
    with pytest.raises(Killed):
        start(plan, first, 6, [])
    second = Recorder(tmp_path / "ledger.jsonl", checkpoint=first.checkpoint)
    resumed = start(plan, second, 6, [])
    assert [one.round for one in second.kept] == [4, 5, 6]
    ledger = Ledger.read(tmp_path / "ledger.jsonl")
    assert [entry.round for entry in ledger.entries] == [1, 2, 3, 4, 4, 5, 6]
    assert resumed.epsilon > undisturbed.epsilon
    spent = [entry.spent for entry in ledger.entries]
    assert spent[3] == spent[0] < spent[4] == spent[-1]
    # Clean stop between rounds: no second price.
    third = Recorder(tmp_path / "clean.jsonl")
    grid_rounds = start(plan, third, 3, [])
    assert grid_rounds.epsilon == pytest.approx(undisturbed.epsilon)


def test_a_run_longer_than_planned_is_refused() -> None:
    plan = PrivacyPlan(clip=1.0, noise_multiplier=2.0, correlation=Tree(), rounds=3)
    with pytest.raises((PlanRefused, RunFailed), match="planned for 3"):
        start(plan, Recorder(), 5, [])


def test_nodes_keep_their_distance_and_pay_once() -> None:
    plan = PrivacyPlan(clip=1.0, noise_multiplier=2.0, correlation=Tree(), separation=4, relation="zero_out")
    one = Accountant(relation="zero_out").step(Gaussian(2.0)).epsilon(delta=1e-5).upper
    log: list[tuple[int, int]] = []
    budget = privacy_budget(one * 1.001, observer="output")
    start(plan, Recorder(), 8, log, mods=[budget, clip()])
    assert sorted(number for number, node in log if node == 5) == [1, 5]
    # A server that asks more often than its plan says is refused.
    app = client([], [budget, clip()])
    context = Context(run_id=1, node_id=5)
    content = RecordDict({"arrays": ArrayRecord({"w": Array(np.zeros(3))})})

    told = {"mechanism": "gaussian", "clip": 1.0, "insecure": False, "once": True, "separation": 4}
    content[PLAN] = ConfigRecord({**told, "event": Central(MatrixGaussian(4.0, 2.0)).to_json()})
    answers = [
        not app(Message(content, 5, "train", group_id=str(number)).with_metadata(run_id=1), context).has_error()
        for number in (1, 4, 5, 9)
    ]
    assert answers == [True, False, True, True]


def test_a_round_that_a_node_is_asked_again_is_paid_again() -> None:
    """The server noises what it is sent again: two releases, of which the node used to pay one."""
    charged: list[float] = []
    budget = privacy_budget(math.inf, observer="output", on_charge=lambda entry: charged.append(entry.spent))
    content = RecordDict({"arrays": ArrayRecord({"w": Array(np.zeros(3))})})
    told = {"mechanism": "gaussian", "clip": 1.0, "insecure": False, "once": True, "separation": 1}
    content[PLAN] = ConfigRecord({**told, "event": Central(MatrixGaussian(4.0, 2.0)).to_json()})
    app, context = client([], [budget, clip()]), Context(run_id=1, node_id=5)
    for number in (1, 2, 3, 3, 4, 2):
        message = Message(content, 5, "train", group_id=str(number)).with_metadata(run_id=1)
        assert not app(message, context).has_error()
    new = [after > before for before, after in pairwise([0.0, *charged])]
    assert new == [True, False, False, True, False, True]


def test_a_run_that_has_paid_for_other_things_pays_for_its_correlated_noise(tmp_path: Path) -> None:
    """Rounds of another plan, of the same run and terms, are not taken for a part of the price."""
    terms = {"clip": 1.0, "noise_multiplier": 2.0, "relation": "add_remove"}
    recorder = Recorder(tmp_path / "ledger.jsonl")
    start(PrivacyPlan(**terms), recorder, 2, [])
    start(PrivacyPlan(**terms, correlation=Tree()), Recorder(tmp_path / "ledger.jsonl"), 4, [])
    events = [entry.event for entry in Ledger.read(tmp_path / "ledger.jsonl").entries]
    assert events[:2] == [Central(Gaussian(2.0))] * 2
    assert isinstance(events[2], Central)
    assert isinstance(events[2].inner, MatrixGaussian)


def test_plans_that_cannot_be_are_refused() -> None:
    with pytest.raises(PlanRefused, match="correlation"):
        PrivacyPlan(clip=1.0, noise_multiplier=1.0, mechanism="skellam", correlation=Tree())
    with pytest.raises(PlanRefused, match="sampler"):
        PrivacyPlan(clip=1.0, noise_multiplier=1.0, sampler=PoissonSampler(0.1), correlation=Tree())
    with pytest.raises(PlanRefused, match="adaptive"):
        PrivacyPlan(clip=1.0, noise_multiplier=1.0, adaptive=AdaptiveClip(), correlation=Tree())
    with pytest.raises(ValueError, match="separation"):
        PrivacyPlan(clip=1.0, noise_multiplier=1.0, separation=2)
    with pytest.raises(ValueError, match="separation"):
        PrivacyPlan(clip=1.0, noise_multiplier=1.0, correlation=Tree(), separation=0)
