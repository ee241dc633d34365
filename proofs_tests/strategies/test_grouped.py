"""Groups come from a beacon, stay for the run, and no node joins a session over other nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from privfed import mods
from privfed.apps import ClientApp
from privfed.array import Array
from privfed.context import Context
from privfed.errors import PlanRefused, QuorumError
from privfed.grid import LocalGrid
from privfed.message import Message
from privfed.protocols import LightSecAgg, OneShot, SecAgg, SecAggPlus
from privfed.protocols.beacon import ATTEMPTS, anonymity
from privfed.protocols.session import Policy, Session
from privfed.record import ArrayRecord, MetricRecord, RecordDict
from privfed.ring import SECURE
from privfed.strategies import FedAvg, GroupedStage, SecureStage

MODEL = ArrayRecord({"w": Array(np.zeros(3, np.float32))})
NONE: dict[str, Any] = {"fraction_evaluate": 0}


def app_of(policy: Policy | None = None) -> ClientApp:
    app = ClientApp(mods=[mods.secure_aggregation(policy)])

    def train(message: Message, context: Context) -> Message:
        arrays = message.content.array_records["arrays"].map(lambda values: values + values.dtype.type(1))
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1, "loss": 0.5})})
        return Message(content, reply_to=message)

    app.train()(train)
    app.evaluate()(train)
    return app


class Nodes(LocalGrid):
    """Keeps what was sent; `mute(name, stage, node)` says whose answer is lost; ids above `there` are not connected."""

    def __init__(self, app: ClientApp, nodes: int | Mapping[int, Context], there: int = 99, **arguments: Any) -> None:
        super().__init__(app, nodes, **arguments)
        self.there = there
        self.mute: Callable[[str, int, int], bool] = lambda name, stage, node: False
        self.sent: list[tuple[str, int, int]] = []

    def get_node_ids(self) -> list[int]:
        return [node for node in super().get_node_ids() if node <= self.there]

    def push_messages(self, messages: Any) -> list[str]:
        batch, heard = list(messages), []
        for message in batch:
            name = str(message.content.config_records[SECURE + ".protocol"]["name"])
            stage = int(str(message.content.config_records[SECURE]["stage"]))
            one = (name, stage, message.metadata.dst_node_id)
            self.sent.append(one)
            if not self.mute(*one):
                heard.append(message)
        super().push_messages(heard)
        return [message.metadata.message_id for message in batch]


def stage_of(size: int = 4, **arguments: Any) -> GroupedStage:
    return GroupedStage(SecAgg(threshold=2), size, max_weight=4, **arguments)


def test_groups_are_fixed_for_a_run_and_kept_by_the_nodes() -> None:
    """The server must not be able to average a persistent node out of groups that change."""
    grid, stage = Nodes(app_of(), 29), stage_of(evaluate_metrics={"loss": (0, 1)})
    result = FedAvg(stage=stage).start(grid, MODEL, 2)
    groups = stage.groups
    assert sorted(node for group in groups for node in group) == list(range(1, 30))
    assert sorted(map(len, groups)) == [4, 4, 4, 4, 4, 4, 5]
    assert [one for one in grid.sent if one[0] == "Beacon"] == [
        ("Beacon", s, n) for s in range(3) for n in range(1, 30)
    ]
    assert result.rounds[1]["train-replies"]["groups"] == 7
    # A server that starts again, with another beacon in mind, gets the groups that the nodes keep.
    again = stage_of()
    FedAvg(**NONE, stage=again).start(grid, result.arrays, 1)
    assert again.groups == groups
    other = stage_of()
    FedAvg(**NONE, stage=other).start(Nodes(app_of(), 29), MODEL, 1)
    assert other.groups != groups, "groups are random (equal by chance: below 1e-20)"


def test_a_node_refuses_a_session_over_other_nodes_than_its_group() -> None:
    grid = Nodes(app_of(), 8)
    result = FedAvg(**NONE, stage=stage_of()).start(grid, MODEL, 1)
    with pytest.raises(QuorumError, match="8 x stage advertise: POLICY_REFUSED RemoteError"):
        FedAvg(**NONE, stage=SecureStage(SecAgg(threshold=2))).start(grid, result.arrays, 1)


def test_a_node_that_insists_on_a_group_joins_nothing_before_the_beacon() -> None:
    insists = app_of(Policy(grouped=True))
    with pytest.raises(QuorumError, match="POLICY_REFUSED NotGrouped"):
        FedAvg(**NONE, stage=SecureStage(SecAgg(threshold=2))).start(Nodes(insists, 4), MODEL, 1)
    FedAvg(**NONE, stage=stage_of()).start(Nodes(insists, 8), MODEL, 1)


def test_a_node_that_vanishes_before_it_reveals_costs_an_attempt() -> None:
    grid, stage = Nodes(app_of(), 9), stage_of()
    grid.mute = lambda name, stage, node: node == 5 and (name, stage) == ("Beacon", 1)
    result = FedAvg(**NONE, stage=stage).start(grid, MODEL, 1)
    assert sorted(node for group in stage.groups for node in group) == [1, 2, 3, 4, 6, 7, 8, 9]
    assert [one["node"] for one in result.rounds[0]["train-replies"]["excluded"]] == [5]


def test_a_server_that_keeps_dropping_reveals_gets_no_groups() -> None:
    """Each attempt shows it a seed; a node reveals in `ATTEMPTS` of them, and then in no more."""
    grid = Nodes(app_of(), 12)
    grid.mute = lambda name, stage, node: (name, stage) == ("Beacon", 1) and node == grid.sent.count(("Beacon", 0, 12))
    with pytest.raises(QuorumError, match="no groups could be drawn"):
        FedAvg(**NONE, stage=stage_of()).start(grid, MODEL, 1)
    assert grid.sent.count(("Beacon", 1, 12)) == ATTEMPTS
    grid.mute = lambda name, stage, node: False
    with pytest.raises(QuorumError, match="reveal: POLICY_REFUSED RemoteError"):
        FedAvg(**NONE, stage=stage_of()).start(grid, MODEL, 1)


def test_a_node_that_connects_later_is_in_no_group() -> None:
    grid, stage = Nodes(app_of(), 9, there=8), stage_of()
    strategy = FedAvg(**NONE, stage=stage)
    result = strategy.start(grid, MODEL, 1)
    grid.there = 9
    late = strategy.start(grid, result.arrays, 1)
    excluded = late.rounds[0]["train-replies"]["excluded"]
    assert [(one["node"], "not there when" in one["cause"]) for one in excluded] == [(9, True)]
    assert ("SecAgg", 0, 9) not in grid.sent


def test_a_sample_of_nodes_is_a_sample_of_whole_groups() -> None:
    grid, stage = Nodes(app_of(), 40), stage_of()
    FedAvg(fraction_train=0.5, **NONE, stage=stage).start(grid, MODEL, 6)
    sent = [node for name, step, node in grid.sent if (name, step) == ("SecAgg", 0)]
    rounds = [set(sent[at : at + 20]) for at in range(0, 120, 20)]
    assert len(sent) == 120
    assert all(set(group) <= asked or not set(group) & asked for group in stage.groups for asked in rounds)
    assert any(asked != rounds[0] for asked in rounds), "samples differ (equal by chance: below 1e-12)"


def test_nobody_waits_for_a_member_that_is_not_there() -> None:
    grid, stage = Nodes(app_of(), 8), stage_of()
    result = FedAvg(**NONE, stage=stage).start(grid, MODEL, 1)
    grid.there, before = 7, len(grid.sent)
    result = FedAvg(**NONE, stage=stage).start(grid, result.arrays, 1)
    assert ("SecAgg", 0, 8) not in grid.sent[before:]
    assert result.rounds[0]["train-replies"]["valid"] == 7


def test_the_anonymity_counts_those_who_are_left() -> None:
    grid, stage = Nodes(app_of(), 60), GroupedStage(SecAgg(threshold=7), 30, max_weight=4, corrupt=0.1)
    result = FedAvg(**NONE, stage=stage).start(grid, MODEL, 1)
    whole = anonymity(60, 30, 0.1)
    assert 0 < whole == 24, "all six corrupt nodes may be in one group"
    assert result.rounds[0]["train-replies"]["anonymity"] == whole
    grid.mute = lambda name, stage, node: (name, stage, node) == ("SecAgg", 2, 7)
    result = FedAvg(**NONE, stage=stage).start(grid, result.arrays, 1)
    assert result.rounds[0]["train-replies"]["anonymity"] == whole - 1
    weak = GroupedStage(SecAgg(threshold=6), 30, max_weight=4, corrupt=0.1)
    result = FedAvg(**NONE, stage=weak).start(grid, result.arrays, 1)
    assert result.rounds[0]["train-replies"]["anonymity"] == 0, "the six together open what they like"


@pytest.mark.parametrize(
    ("protocol", "most"),
    [
        (SecAgg(threshold=7), 6),
        (SecAgg(threshold=9, mode="active", corrupt=0.1), 5),
        (SecAggPlus(neighbours=6, threshold=4), 3),
        (LightSecAgg(threshold=9), 5),
        (LightSecAgg(threshold=9, privacy=3), 3),
        (OneShot(9), 5),
        (OneShot(12), 10),
        (OneShot(4, committee=(1, 2, 3, 4, 5)), 2),
    ],
    ids=repr,
)
def test_how_many_corrupt_nodes_parameters_withstand(protocol: Any, most: int) -> None:
    """The policies of nodes say the same."""
    nodes = tuple(range(1, 13))
    assert protocol.withstands(Session(1, 1, "train", nodes, 4, 32)) == most


def test_a_group_may_hold_more_than_its_share_of_the_corrupt_nodes() -> None:
    """Six of 60 are corrupt, and may all be in one group of 30: three, its share, are too few to count with."""
    policy = Policy(corrupt=0.1)
    grid = Nodes(app_of(policy=policy), 60)
    with pytest.raises(QuorumError, match="RemoteError"):
        FedAvg(**NONE, stage=GroupedStage(SecAgg(threshold=6), 30, max_weight=4)).start(grid, MODEL, 1)
    FedAvg(**NONE, stage=GroupedStage(SecAgg(threshold=7), 30, max_weight=4)).start(grid, MODEL, 1)
    small = Nodes(app_of(policy=policy), 60)
    with pytest.raises(QuorumError, match="WeakSession"):
        FedAvg(**NONE, stage=GroupedStage(SecAgg(threshold=6), 6, max_weight=4)).start(small, MODEL, 1)


def test_groups_anew_every_round_are_refused() -> None:
    with pytest.raises(PlanRefused, match="redraw"):
        stage_of(redraw=True)
    with pytest.raises(ValueError, match="corrupt"):
        stage_of(corrupt=1.0)
