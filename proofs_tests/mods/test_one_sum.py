"""A node helps to open one sum a model and action: whoever asks again for the same model gets nothing."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.protocols import SecAgg
from privfed.protocols.session import Policy
from privfed.record import ConfigRecord, RecordDict
from privfed.ring import Layout, bind
from proofs_tests.mods.federation import KINDS, Federation, model


@KINDS
def test_one_sum_a_model_and_action(protocol: Any) -> None:
    """The second cohort lacks a node: the difference of the two sums would be its input."""
    lab = Federation(protocol)
    first, refusals = lab.session(1)
    assert first.result is not None
    assert not refusals
    before = lab.trained
    second, refusals = lab.session(2, nodes=(1, 2))
    assert refusals == {"SumAlreadyOpened"}
    assert second.result is None
    assert lab.trained == before, "the app does not even run"
    again, refusals = lab.session(3, config={"learning-rate": 0.5})
    assert refusals == {"SumAlreadyOpened"}, "another configuration is no other model"
    assert again.result is None
    for number, kind, value in ((4, "train", 1.0), (5, "evaluate", 0.0)):
        assert lab.session(number, kind=kind, value=value)[0].result is not None
    assert lab.session(7, value=1.0)[1] == {"SumAlreadyOpened"}


@KINDS
def test_a_session_that_opened_nothing_may_be_tried_again(protocol: Any) -> None:
    lab = Federation(protocol)
    for number, upto in ((1, 1), (2, len(protocol.stages) - 1)):
        server, refusals = lab.session(number, upto=upto)
        assert server.result is None
        assert not refusals
    assert lab.session(3)[0].result is not None
    assert lab.session(4)[1] == {"SumAlreadyOpened"}


def test_a_query_is_opened_once_but_another_question_is_another_sum() -> None:
    lab = Federation(SecAgg(threshold=2))
    assert lab.session(1, kind="query", config={"above": 10})[0].result is not None
    assert lab.session(2, kind="query", config={"above": 11})[0].result is not None
    assert lab.session(3, kind="query", config={"above": 10}, nodes=(1, 2))[1] == {"SumAlreadyOpened"}


@KINDS
def test_after_a_lie_the_session_is_over_for_the_node(protocol: Any) -> None:
    """A server may not try until a node accepts: the honest request that follows finds nothing."""
    for spoil in range(1, len(protocol.stages)):
        lab = Federation(protocol)
        server, refusals = lab.session(1, spoil=spoil)
        assert refusals == {"SessionOutOfOrder"}, protocol.stages[spoil]
        assert server.result is None
        assert lab.session(2, value=1.0)[0].result is not None


def test_session_numbers_rise() -> None:
    lab = Federation(SecAgg(threshold=2))
    assert lab.session(5)[0].result is not None
    for number in (5, 4, 0):
        assert lab.session(number, value=float(number + 1))[1] == {"SessionOutOfOrder"}


def test_the_nodes_own_share_of_corrupt_nodes_holds_in_the_mod() -> None:
    """The request says threshold 2 of 3; a node that assumes two corrupt nodes does not join."""
    assert Federation(SecAgg(threshold=2), Policy(corrupt=1 / 3)).session(1)[0].result is not None
    assert Federation(SecAgg(threshold=2), Policy(corrupt=0.67)).session(1)[1] == {"RemoteError"}


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=4))
def test_each_model_is_summed_once_whatever_the_order(values: list[int]) -> None:
    lab, seen = Federation(SecAgg(threshold=2)), set[int]()
    for number, value in enumerate(values, 1):
        opened = lab.session(number, value=float(value))[0].result is not None
        assert opened == (value not in seen)
        seen.add(value)


@pytest.mark.parametrize("names", [("train", "train.default"), ("query.default", "query")])
def test_the_default_action_is_one_action_under_both_its_names(names: tuple[str, str]) -> None:
    """The app answers both alike: a sum under each, over cohorts that differ by a node, would be that node's input."""
    lab = Federation(SecAgg(threshold=2))
    assert lab.session(1, kind=names[0])[0].result is not None
    before = lab.trained
    assert lab.session(2, kind=names[1], nodes=(1, 2))[1] == {"SumAlreadyOpened"}
    assert lab.trained == before


@KINDS
def test_the_binding_that_a_node_insists_on_holds_in_the_mod(protocol: Any) -> None:
    content = RecordDict({"arrays": model(0.0)})
    content["config"] = ConfigRecord({})
    wanted = bind(content, Layout(32, 3, 4, 8.0, None, ()), "train", keys=("arrays", ""), group="1")
    assert Federation(protocol, Policy(binding=wanted)).session(1)[0].result is not None
    assert Federation(protocol, Policy(binding=bytes(32))).session(1)[1] == {"BindingMismatch"}
