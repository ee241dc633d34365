"""Noise that follows the drops: never less than planned, and little more; given away only as far as drops allow.

Noise comes from the operating system; each statistical check raises a false alarm with probability below 10^-7.
"""

from __future__ import annotations

import math
import os
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from privfed.context import Context
from privfed.errors import PlanRefused, QuorumError
from privfed.message import Message
from privfed.mods.level import Levels
from privfed.plan import PrivacyPlan
from privfed.privacy.share import NoiseParameters
from privfed.protocols import LightSecAgg, SecAgg, SecAggPlus
from privfed.record import ConfigRecord, RecordDict
from privfed.ring import REMOVED
from privfed.strategies import FedAvg, SecureStage
from proofs_tests.plan.network import NONE, Network, app_of, flat, model, update_of

NODES, SIZE, MASK = 20, 1 << 12, 2
SIGMAS = 5.6  # two-sided normal: 2 * 10^-8
PROTOCOLS = [
    SecAgg(threshold=0.6),
    SecAggPlus(neighbours=12, threshold=4, dropout=0.3, corrupt=0.1),
    LightSecAgg(threshold=13),
]


def plan_of(**changes: Any) -> PrivacyPlan:
    given_values: dict[str, Any] = {
        "clip": 1.0, "noise_multiplier": 1.5, "mechanism": "skellam", "max_dropped": 6, "max_colluding": 2,
        "exact_drops": True,
    }  # fmt: skip
    return PrivacyPlan(**{**given_values, **changes})


@given(
    st.integers(2, 300), st.floats(0, 0.9), st.floats(0, 0.4), st.sets(st.floats(0, 1), max_size=3), st.floats(0.1, 50)
)
@settings(max_examples=200, deadline=None)
def test_honest_survivors_keep_at_least_the_planned_noise(
    nodes: int, dropped: float, colluding: float, places: set[float], scale: float
) -> None:
    most = int(dropped * nodes)
    known = min(int(colluding * nodes), nodes - most - 1)
    levels = tuple(sorted({int(place * most) for place in places} | {most}))
    found = NoiseParameters(1.0, 1.0, nodes, 10, 32, scale, max_dropped=most, max_colluding=known, drop_levels=levels)
    planned = (Fraction(found.noise_multiplier) * Fraction(found.scale)) ** 2
    for drops in range(most + 1):
        level = found.level(nodes - drops)
        assert levels[level] >= drops
        assert level == 0 or levels[level - 1] < drops
        kept = sum(Fraction(part) for part in found.components[: level + 1])
        honest = (nodes - drops - known) * kept
        assert honest >= planned
        # And little more than the level's own drops ask for.
        assert honest <= planned * Fraction(nodes - drops - known, nodes - levels[level] - known) * (
            1 + Fraction(1, 2**30)
        )
    assert found.event == NoiseParameters(1.0, 1.0, nodes, 10, 32, scale, most, known).event


def test_parts_add_up_and_are_taken_off_exactly() -> None:
    found = NoiseParameters(1.0, 1.0, 10, 50, 20, 30.0, max_dropped=6, drop_levels=(0, 2, 4, 6))
    seed, keys = os.urandom(32), iter([bytes([i]) * 32 for i in range(99)])
    vector, given_keys = found.encode_removable(np.zeros(50), seed, lambda count: next(keys)[:count])
    assert len(given_keys) == 3
    total = vector.astype(np.uint64)
    for level in range(4):
        left = found.remove(total, [given_keys[level:]], level).astype(np.int64)
        wanted = sum(found.component(place, bytes([place]) * 32) for place in range(level + 1))
        assert np.array_equal(np.where(left >= 1 << 19, left - (1 << 20), left), wanted)
    assert np.array_equal(found.remove(total, [], 0), total)


@pytest.mark.parametrize("dropped", [0, 1, 2, 5, 6])
@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: type(protocol).__name__)
def test_the_sum_has_what_its_drops_ask_for(protocol: Any, dropped: int) -> None:
    gone = dict.fromkeys(range(3, 3 + dropped), MASK)
    grid = Network(app_of(), NODES, gone)
    result = FedAvg(stage=SecureStage(protocol), privacy=plan_of(), **NONE).start(grid, model(SIZE), 1)
    there = [node for node in range(1, NODES + 1) if node not in gone]
    noise = flat(result.arrays) * NODES - sum(update_of(node, SIZE, 1.0) for node in there)
    level = next(count for count in (0, 2, 4, 6) if count >= dropped)
    planned = 1.5**2 * len(there) / (NODES - level - 2)
    assert abs(np.mean(noise**2) / planned - 1) < SIGMAS * math.sqrt(2 / SIZE)
    assert abs(noise.mean()) < SIGMAS * math.sqrt(planned / SIZE)
    assert abs(stats.kurtosis(noise)) < SIGMAS * math.sqrt(24 / SIZE) + 0.1  # the fourth moment's own tail
    assert stats.kstest(noise / math.sqrt(planned), "norm").pvalue > 1e-8
    # Before the parts were taken off it was more, by more than the test's error, or there was nothing to take off.
    worst = 1.5**2 * len(there) / (NODES - 6 - 2)
    assert level == 6 or worst / planned - 1 > SIGMAS * math.sqrt(2 / SIZE)
    assert sum(REMOVED in reply.content for reply in grid.replies) == len(there)


def test_it_costs_what_the_planned_noise_costs() -> None:
    def epsilon(**changes: Any) -> float | None:
        strategy = FedAvg(stage=SecureStage(PROTOCOLS[0]), privacy=plan_of(**changes), **NONE)
        return strategy.start(Network(app_of(), NODES), model(50), 2).epsilon

    assert epsilon() == epsilon(exact_drops=False)


class Lying(SecureStage):
    """A server that says fewer nodes dropped than did."""

    claimed = 0
    when = 3

    def _authorise(self, exchange: Any, drive: Any) -> None:
        super()._authorise(exchange, drive)
        drive.keep = self.claimed if self.protocol.stages.index(drive.server.stage) >= self.when else None


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: type(protocol).__name__)
def test_a_server_cannot_understate_the_drops(protocol: Any) -> None:
    gone = dict.fromkeys(range(3, 6), MASK)  # three dropped: level 2, of four
    for claimed, refused in ((0, True), (1, True), (2, False), (3, False), (4, True), (-1, True)):
        stage = Lying(protocol)
        stage.claimed = claimed
        strategy, grid = FedAvg(stage=stage, privacy=plan_of(), **NONE), Network(app_of(), NODES, gone)
        if refused:
            with pytest.raises(QuorumError, match=r"RemoteError|PlanRefused"):
                strategy.start(grid, model(20), 1)
        else:
            strategy.start(grid, model(20), 1)
        answers = [reply.content for reply in grid.replies if reply.has_content()]
        given_away = [len(answer[REMOVED]["keys"]) for answer in answers if REMOVED in answer]
        assert given_away == ([] if refused else [3 - claimed] * 17)


def test_a_level_cannot_be_named_after_the_survivors_were_agreed() -> None:
    """LightSecAgg checks the survivors at `confirm`: a level that comes with `reveal` comes too late."""
    stage = Lying(LightSecAgg(threshold=13))
    stage.when = 4
    with pytest.raises(QuorumError, match="PlanRefused"):
        FedAvg(stage=stage, privacy=plan_of(), **NONE).start(Network(app_of(), NODES), model(20), 1)


class Forgetful(Network):
    """Some nodes do not give their keys."""

    def pull_messages(self, message_ids: Any) -> list[Message]:
        replies = super().pull_messages(message_ids)
        for reply in replies:
            if reply.metadata.src_node_id % 2 and reply.has_content() and REMOVED in reply.content:
                del reply.content[REMOVED]
        return replies


def test_a_survivor_that_gives_nothing_leaves_more_noise() -> None:
    strategy = FedAvg(stage=SecureStage(PROTOCOLS[0]), privacy=plan_of(), **NONE)
    result = strategy.start(Forgetful(app_of(), NODES), model(SIZE), 1)
    noise = flat(result.arrays) * NODES - sum(update_of(node, SIZE, 1.0) for node in range(1, NODES + 1))
    planned = 1.5**2 * (10 / (NODES - 2) + 10 / (NODES - 8))
    assert abs(np.mean(noise**2) / planned - 1) < SIGMAS * math.sqrt(2 / SIZE)


def test_a_level_is_refused_where_there_is_none() -> None:
    levels = Levels(RecordDict())
    assert levels.floor(3, None) == 0
    with pytest.raises(PlanRefused, match="no removable parts"):
        levels.floor(3, 0)
    demands = ConfigRecord({"level-survivors": [10, 8], "level-keys": [b"k" * 32]})
    levels.keep(demands, 2)
    assert [levels.floor(3, level) for level in (0, 1)] == [10, 8]
    levels.answered(1, over=False)
    assert levels.floor(4, 1) == 8
    for stage, level in ((4, 0), (3, 2), (3, -1)):
        with pytest.raises(PlanRefused, match="named once"):
            levels.floor(stage, level)
    levels.answered(1, over=True)
    assert levels.removed == ConfigRecord({"keys": []})
    levels.forget()
    assert levels.removed is None
    assert Context().mod_states == {}


@pytest.mark.parametrize(
    ("changes", "error"),
    [({"mechanism": "discrete_gaussian"}, PlanRefused), ({"mechanism": "gaussian", "max_dropped": 0}, PlanRefused)],
)
def test_only_skellam_noise_comes_in_parts(changes: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=r"exact_drops"):
        plan_of(**{"max_colluding": 0, **changes})


@pytest.mark.parametrize("levels", [(0, 2), (2, 2, 6), (6, 0), (0, 1, 2, 3, 6), (-1, 6), (1.0, 6)])
def test_levels_that_make_no_sense_are_refused(levels: Any) -> None:
    with pytest.raises(ValueError, match="drop_levels"):
        NoiseParameters(1.0, 1.0, 10, 50, 20, 30.0, max_dropped=6, drop_levels=levels)
