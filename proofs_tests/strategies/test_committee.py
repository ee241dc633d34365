"""A committee drawn over the network: SecureStage(OneShot(committee=NUMBER)), its beacon, its samples, its crashes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privfed import mods
from privfed.apps import ClientApp
from privfed.array import Array
from privfed.context import Context
from privfed.errors import QuorumError, RunFailed
from privfed.grid import LocalGrid
from privfed.message import Message
from privfed.protocols import OneShot
from privfed.protocols.beacon import ATTEMPTS
from privfed.protocols.session import Drawn, Policy
from privfed.record import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from privfed.ring import SECURE
from privfed.runtime.identity import SimulatedIdentities
from privfed.strategies import FedAvg, GroupedStage, SecureStage
from privfed.strategies.exchange import Exchange
from proofs_tests.strategies.test_session_journal import Crashed, Fleet, Recorder, Server

MODEL = ArrayRecord({"w": Array(np.zeros(3, np.float32))})
NONE: dict[str, Any] = {"fraction_evaluate": 0}
NODES = 12
STEPS = [("Beacon", 0), ("Beacon", 1), ("Beacon", 2), ("OneShot", 0), ("OneShot", 1), ("OneShot", 2)]


def app_of(policy: Policy | None = None, trained: dict[int, int] | None = None, **arguments: Any) -> ClientApp:
    identities = SimulatedIdentities(range(1, NODES + 1))
    own = mods.secure_aggregation(policy, identity=lambda context: identities(context.node_id), **arguments)
    app = ClientApp(mods=[own])

    def train(message: Message, context: Context) -> Message:
        if trained is not None:
            trained[context.node_id] = trained.get(context.node_id, 0) + 1
        arrays = message.content.array_records["arrays"].map(lambda v: v + v.dtype.type(context.node_id))
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1, "loss": 0.5})})
        return Message(content, reply_to=message)

    app.train()(train)
    app.evaluate()(train)
    return app


class Nodes(LocalGrid):
    """Keeps what was sent; `mute(name, stage, node)` says whose request is lost; `hidden` nodes are not connected."""

    def __init__(self, app: ClientApp, nodes: int | Mapping[int, Context] = NODES, **arguments: Any) -> None:
        super().__init__(app, nodes, **arguments)
        self.hidden: set[int] = set()
        self.mute: Callable[[str, int, int], bool] = lambda name, stage, node: False
        self.change: Callable[[Message], Message] = lambda message: message
        self.sent: list[tuple[str, int, int]] = []

    def get_node_ids(self) -> list[int]:
        return [node for node in super().get_node_ids() if node not in self.hidden]

    def push_messages(self, messages: Any) -> list[str]:
        batch, heard = list(messages), []
        for message in batch:
            name = str(message.content.config_records[SECURE + ".protocol"]["name"])
            stage = int(str(message.content.config_records[SECURE]["stage"]))
            one = (name, stage, message.metadata.dst_node_id)
            self.sent.append(one)
            if not self.mute(*one):
                heard.append(self.change(message) if "arrays" in message.content else message)
        super().push_messages(heard)
        return [message.metadata.message_id for message in batch]


def stage_of(size: int = 5, threshold: int = 3, **arguments: Any) -> SecureStage:
    return SecureStage(OneShot(threshold, committee=size, **arguments), max_weight=4, max_value=16)


def start(grid: Any, stage: SecureStage, rounds: int = 1, arrays: ArrayRecord = MODEL, **arguments: Any) -> Any:
    return FedAvg(**{**NONE, "stage": stage, "min_train_nodes": 2, **arguments}).start(grid, arrays, rounds)


def test_one_argument_has_the_committee_drawn_once_for_the_run() -> None:
    grid = Nodes(app_of())
    stage = SecureStage(OneShot(3, committee=5), max_weight=4, max_value=16, evaluate_metrics={"loss": (0, 1)})
    result = FedAvg(stage=stage).start(grid, MODEL, 2)
    assert [one for one in grid.sent if one[0] == "Beacon"] == [
        ("Beacon", s, n) for s in range(3) for n in range(1, NODES + 1)
    ]
    assert len(stage.committee) == 5
    opened = {node for name, step, node in grid.sent if (name, step) == ("OneShot", 2)}
    assert opened == set(stage.committee), "nobody else has a share"
    np.testing.assert_allclose(result.arrays["w"].view(), 13.0, atol=1e-3)
    again = stage_of()
    start(grid, again, arrays=result.arrays)
    assert again.committee == stage.committee, "a server that starts again gets the committee that the nodes keep"
    other = stage_of()
    start(Nodes(app_of()), other)
    third = stage_of()
    start(Nodes(app_of()), third)
    assert len({stage.committee, other.committee, third.committee}) > 1, "drawn (equal by chance: below 2e-6)"


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_nodes_vanish_before_every_step(step: tuple[str, int]) -> None:
    """Two of twelve: the sum is that of the nodes whose input came, whoever of them sits on the committee."""
    grid, stage = Nodes(app_of()), stage_of()
    gone: set[int] = set()

    def mute(name: str, at: int, node: int) -> bool:
        if (name, at) == step:
            # Of the committee where it is known, so that the members that are left open the sum.
            gone.update({2, 7} if not stage.committee else set(stage.committee[:2]))
        return node in gone

    grid.mute = mute
    result = start(grid, stage)
    left = set(range(1, NODES + 1)) - (gone if STEPS.index(step) <= 3 else set())
    np.testing.assert_allclose(result.arrays["w"].view(), np.mean(sorted(left)), atol=1e-3)
    assert result.rounds[0]["train-replies"]["valid"] == len(left)
    if STEPS.index(step) < 2:
        assert not gone & set(stage.committee), "who did not reveal is not drawn"


def test_too_few_members_left_open_nothing() -> None:
    grid, stage = Nodes(app_of()), stage_of()
    grid.mute = lambda name, at, node: (name, at) == ("OneShot", 2) and node in stage.committee[:3]
    with pytest.raises(QuorumError, match="2 nodes answered at stage 'open', 3 are needed"):
        start(grid, stage)


def test_a_node_that_did_not_see_the_draw_is_left_out() -> None:
    """It connected later, or missed the end of the draw: it has no committee to compare with, and sends nothing."""
    grid, stage = Nodes(app_of()), stage_of()
    grid.hidden = {12}
    result = start(grid, stage)
    np.testing.assert_allclose(result.arrays["w"].view(), 6.0, atol=1e-3)
    grid.hidden = set()
    result = start(grid, stage, arrays=result.arrays)
    assert result.rounds[0]["train-replies"]["valid"] == 11
    assert [one["node"] for one in result.rounds[0]["train-replies"]["excluded"]] == [12]


def test_members_outside_a_sample_help_and_do_not_train() -> None:
    trained: dict[int, int] = {}
    grid, stage = Nodes(app_of(trained=trained)), stage_of()
    result = start(grid, stage, rounds=6, fraction_train=0.25)
    assert sum(trained.values()) == 6 * 3, "three nodes of a sample train in each round, and nobody else"
    assert all(one["train-replies"]["valid"] == 3 for one in result.rounds)
    asked = [node for name, at, node in grid.sent if (name, at) == ("OneShot", 1)]
    assert asked == sorted(stage.committee) * 6, "the same committee opens every sum"
    silent = Nodes(app_of())
    stage = stage_of()
    silent.mute = lambda name, at, node: name == "OneShot" and node in stage.committee[:2]
    result = start(silent, stage, fraction_train=0.5)
    left = result.rounds[0]["train-replies"]["valid"]
    assert 4 <= left <= 6


class Choosing(SecureStage):
    """A server that names members of its own choice as those that were drawn."""

    members: tuple[int, ...] = ()

    def _agreed(self, exchange: Exchange) -> Any:
        agreed: Any = super()._agreed(exchange)
        return replace(agreed, committee=Drawn(self.members, NODES))


def test_a_server_that_swaps_the_committee_after_the_draw_gets_nothing() -> None:
    grid, stage = Nodes(app_of()), Choosing(OneShot(3, committee=5), max_weight=4, max_value=16)
    honest = stage_of()
    result = start(grid, honest)
    stage.members = tuple(sorted(set(range(1, NODES + 1)) - {honest.committee[0]}))[:5]
    assert stage.members != honest.committee
    with pytest.raises(QuorumError, match="stage send: POLICY_REFUSED RemoteError"):
        start(grid, stage, arrays=result.arrays)


def test_a_server_that_draws_nothing_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Choosing, "_agreed", lambda self, exchange: replace(self.protocol, committee=Drawn((1, 2, 3, 4, 5), NODES))
    )
    trained: dict[int, int] = {}
    with pytest.raises(QuorumError, match="12 x stage send: POLICY_REFUSED RemoteError"):
        start(Nodes(app_of(trained=trained)), Choosing(OneShot(3, committee=5), max_weight=4))
    assert trained == {}, "nobody even trains"


def renamed(committee: Any, message: Message) -> Message:
    """Return the message with another committee among the protocol's parameters."""
    content = RecordDict(dict(message.content))
    place = SECURE + ".protocol"
    content[place] = ConfigRecord({**content.config_records[place], "committee": committee})
    return message.with_content(content)


def test_a_committee_that_the_server_names_is_refused_unless_corrupt_members_are_counted() -> None:
    named = SecureStage(OneShot(3, committee=(1, 2, 3, 4, 5)), max_weight=4, max_value=16)
    with pytest.raises(QuorumError, match="POLICY_REFUSED CommitteeNamed"):
        start(Nodes(app_of()), named)
    for other in (bytes([1, 2, 3, 4, 5]), 2.5, "12345"):  # bytes are a sequence of numbers as well
        grid = Nodes(app_of())
        grid.change = partial(renamed, other)
        with pytest.raises(QuorumError, match="POLICY_REFUSED CommitteeNamed"):
            start(grid, named)
    everybody = SecureStage(OneShot(8, corrupt=3), max_weight=4, max_value=16)
    start(Nodes(app_of(Policy(corrupt=0.25))), everybody)
    counted = SecureStage(OneShot(5, committee=(1, 2, 3, 4, 5, 6), corrupt=3), max_weight=4, max_value=16)
    start(Nodes(app_of(Policy(corrupt=0.25))), counted)
    pinned = app_of(protocols={"OneShot": OneShot(3, committee=(1, 2, 3, 4, 5))})
    start(Nodes(pinned), named)


@pytest.mark.parametrize(
    ("policy", "cause"),
    [
        (Policy(min_neighbours=5), "commit: POLICY_REFUSED RemoteError"),
        (Policy(min_cohort=13), "commit: POLICY_REFUSED RemoteError"),
        (Policy(min_threshold=4), "send: POLICY_REFUSED RemoteError"),
        (Policy(corrupt=0.1), "send: POLICY_REFUSED RemoteError"),
        (Policy(grouped=True), "send: POLICY_REFUSED NotGrouped"),
    ],
)
def test_a_nodes_floors_hold_in_the_draw_and_after_it(policy: Policy, cause: str) -> None:
    with pytest.raises((QuorumError, RunFailed), match=f"12 x stage {cause}"):
        start(Nodes(app_of(policy)), stage_of())


def test_a_node_that_pins_the_size_joins_no_other() -> None:
    pinned = app_of(protocols={"OneShot": OneShot(3, committee=5)})
    start(Nodes(pinned), stage_of())
    with pytest.raises(QuorumError, match="send: POLICY_REFUSED RemoteError"):
        start(Nodes(pinned), stage_of(4))


def test_corrupt_nodes_are_counted_as_the_draw_spreads_them() -> None:
    """Policy(corrupt=...) of the nodes the committee was drawn from; all of them could be in one small sample."""
    policy = Policy(corrupt=1 / 12)
    start(Nodes(app_of(policy)), stage_of(6, 4, corrupt=1))
    with pytest.raises(RunFailed, match="two different sums"):
        start(Nodes(app_of(policy)), stage_of(6, 3, corrupt=1))
    with pytest.raises(RunFailed, match="fewer than two honest"):
        start(Nodes(app_of(policy)), stage_of(6, 4, corrupt=1), fraction_train=0.17)


def test_a_server_that_keeps_dropping_reveals_gets_no_committee() -> None:
    grid = Nodes(app_of())
    grid.mute = lambda name, at, node: (name, at) == ("Beacon", 1) and node == grid.sent.count(("Beacon", 0, 12))
    with pytest.raises(QuorumError, match="no committee could be drawn"):
        start(grid, stage_of())
    assert grid.sent.count(("Beacon", 1, 12)) == ATTEMPTS
    grid.mute = lambda name, at, node: False
    with pytest.raises(QuorumError, match="reveal: POLICY_REFUSED RemoteError"):
        start(grid, stage_of())


def test_a_committee_larger_than_the_federation_is_an_error_of_its_own() -> None:
    with pytest.raises(RunFailed, match="committee=13 is more than the 12 nodes"):
        start(Nodes(app_of()), stage_of(13, 9))
    grid, stage = Nodes(app_of()), stage_of()
    result = start(grid, stage)
    with pytest.raises(RunFailed, match="a committee of 5 was drawn in this run, one of 4 is asked for"):
        start(grid, stage_of(4), arrays=result.arrays)
    with pytest.raises(ValueError, match="open the sums of every group"):
        GroupedStage(OneShot(3, committee=4), 6)


def test_members_without_input_open_one_sum_a_model_too() -> None:
    """Two sums over one model and cohorts that differ by a node give it away: no member helps with the second.

    The cohorts have no member, so that nobody in them remembers the first sum.
    """
    grid, stage = Nodes(app_of()), stage_of()
    first = start(grid, stage)
    members = set(stage.committee)
    grid.hidden = members
    second = start(grid, stage_of(), arrays=first.arrays)
    assert second.rounds[0]["train-replies"]["valid"] == NODES - len(members)
    grid.hidden = members | {min(set(range(1, NODES + 1)) - members)}
    with pytest.raises(RunFailed, match="5 x stage send: POLICY_REFUSED SumAlreadyOpened"):
        start(grid, stage_of(), arrays=first.arrays)

    def another_model(message: Message) -> Message:
        content = RecordDict(dict(message.content))
        content["arrays"] = ArrayRecord({"w": Array(np.full(3, 9, np.float32))})
        return message.with_content(content) if message.metadata.dst_node_id in members else message

    grid.change = another_model
    with pytest.raises(QuorumError, match="5 x stage send: POLICY_REFUSED BindingMismatch"):
        start(grid, stage_of(), arrays=first.arrays)


def test_a_member_that_is_not_shown_the_model_opens_nothing() -> None:
    """It would forget that it opened a sum over it, and open another one over a node less."""
    grid, stage = Nodes(app_of()), stage_of()
    first = start(grid, stage)
    members = set(stage.committee)

    def hide(message: Message) -> Message:
        if message.metadata.dst_node_id not in members:
            return message
        content = RecordDict({name: record for name, record in message.content.items() if name.startswith(SECURE)})
        content[SECURE] = ConfigRecord({**content.config_records[SECURE], "input": False})
        return message.with_content(content)

    grid.change, grid.hidden = hide, members
    with pytest.raises(QuorumError, match="5 x stage open: POLICY_REFUSED SessionOutOfOrder"):
        start(grid, stage_of(), arrays=first.arrays)


def make() -> SecureStage:
    return SecureStage(OneShot(2, committee=3), max_weight=8)


@pytest.mark.parametrize("left", [1, 3, 4, 5, 8, 9, 11, 12, 13, 16, 18, 19, 21])
def test_a_server_that_crashes_takes_up_the_draw_and_the_session(left: int, tmp_path: Path) -> None:
    """4 nodes: replies 1-12 are the draw's, 13-16 the inputs, 17-19 signatures, 20-22 shares."""
    fleet, recorder = Fleet(), Recorder(tmp_path)
    with pytest.raises(Crashed):
        FedAvg(**NONE, stage=make()).start(Server(fleet, recorder, left), MODEL, 2)
    server, stage = Server(fleet, Recorder(tmp_path, recorder.checkpoint)), make()
    result = FedAvg(**NONE, stage=stage).start(server, MODEL, 2)
    np.testing.assert_allclose(result.arrays["w"].view(), 5.0, atol=1e-3)
    assert set(fleet.trained.values()) == {2}
    assert server.asked == 12 + 2 * 10 - left, "no node is asked again for what a journal has"
    assert len(stage.committee) == 3
    assert not (tmp_path / "draw-committee.journal").exists()


def test_a_damaged_file_of_the_committee_is_named(tmp_path: Path) -> None:
    fleet = Fleet()
    FedAvg(**NONE, stage=make()).start(Server(fleet, Recorder(tmp_path)), MODEL, 1)
    path = tmp_path / "committee"
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunFailed, match="committee is damaged"):
        FedAvg(**NONE, stage=make()).start(Server(fleet, Recorder(tmp_path)), MODEL, 1)
    path.unlink()
    stage = make()
    model = ArrayRecord({"w": Array(np.ones(3, np.float32))})
    FedAvg(**NONE, stage=stage).start(Server(fleet, Recorder(tmp_path)), model, 1)
    assert len(stage.committee) == 3, "the nodes told it"
