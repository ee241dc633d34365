"""A node helps to open one sum a model and action: whoever asks again for the same model gets nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed import mods
from privfed.apps import ClientApp
from privfed.array import Array
from privfed.context import Context
from privfed.message import Message
from privfed.protocols import LightSecAgg, OneShot, SecAgg, keys
from privfed.protocols.session import Identity, Policy, Protocol, Server, Session
from privfed.record import ArrayRecord, ConfigRecord, ConfigValue, MetricRecord, RecordDict
from privfed.ring import BUFFER, REPLY, REQUEST, SECURE, Layout, bind

NODES = (1, 2, 3)
SIGNING = {node: bytes([node]) * 32 for node in NODES}
ROSTER = {node: keys.signing_public(key) for node, key in SIGNING.items()}
PROTOCOLS: list[Any] = [SecAgg(threshold=2), LightSecAgg(threshold=2), OneShot(threshold=2)]
INPUT_STAGE = {"SecAgg": 2, "LightSecAgg": 2, "OneShot": 0}


def model(value: float) -> ArrayRecord:
    return ArrayRecord({"w": Array(np.full(4, value, np.float32))})


class Federation:
    """Three nodes with the mod, and a server that asks whatever a test says."""

    def __init__(self, protocol: Any, policy: Policy = Policy()) -> None:
        self.protocol = protocol
        self.contexts = {node: Context(run_id=1, node_id=node) for node in NODES}
        self.trained = 0
        mod = mods.secure_aggregation(
            policy, identity=lambda context: Identity(context.node_id, SIGNING[context.node_id], ROSTER)
        )
        self.app = ClientApp(mods=[mod])
        for register in (self.app.train, self.app.evaluate, self.app.query):
            register()(self._answer)

    def _answer(self, message: Message, context: Context) -> Message:
        self.trained += 1
        arrays = message.content.array_records["arrays"].map(lambda values: values + values.dtype.type(1))
        content = RecordDict({"arrays": arrays})
        content["metrics"] = MetricRecord({})
        return Message(content, reply_to=message)

    def session(
        self,
        number: int,
        *,
        value: float = 0.0,
        kind: str = "train",
        nodes: tuple[int, ...] = NODES,
        upto: int = 99,
        spoil: int = -1,
        config: Mapping[str, ConfigValue] = {},
    ) -> tuple[Server, set[str]]:
        """Run a session; returns the server and the reasons nodes gave for refusing. upto: stages to run. spoil: the
        stage at which node 1 is sent a damaged request first."""
        layout = Layout(32, len(nodes), 4, 8.0, None, ())
        content = RecordDict({"arrays": model(value)})
        content["config"] = ConfigRecord(config)
        binding = bind(content, layout, kind)
        protocol: Protocol = self.protocol
        server = protocol.server(Session(1, number, kind, nodes, layout.size, 32, binding))
        refusals: set[str] = set()
        for stage in range(min(upto, len(protocol.stages))):
            for node, request in sorted(server.outbound().items()):
                if (stage, node) == (spoil, 1):
                    damaged = bytes(request[:-1]) + bytes([request[-1] ^ 1])
                    self.app(self._message(stage, number, node, damaged, content, layout, kind), self.contexts[node])
                reply = self.app(
                    self._message(stage, number, node, bytes(request), content, layout, kind), self.contexts[node]
                )
                if reply.has_error():
                    refusals.add(str(reply.error.reason))
                    continue
                server.receive(node, reply.content.array_records[REPLY][BUFFER].data)
            if refusals:
                break
            server.close()
        return server, refusals

    def _message(
        self, stage: int, number: int, node: int, request: bytes, content: RecordDict, layout: Layout, kind: str
    ) -> Message:
        name = type(self.protocol).__name__
        whole = RecordDict({SECURE + ".layout": layout.to_config()})
        whole[SECURE + ".protocol"] = ConfigRecord(dict[str, ConfigValue](name=name, threshold=2))
        with_input = stage == INPUT_STAGE[name]
        header: dict[str, ConfigValue] = {
            "number": number,
            "stage": stage,
            "binding": bind(content, layout, kind),
            "input": with_input,
            "arrays-key": "arrays",
            "weight-key": "",
        }
        whole[SECURE] = ConfigRecord(header)
        if with_input:
            whole.update(content)
        whole[REQUEST] = ArrayRecord({BUFFER: Array("uint8", (len(request),), "raw", memoryview(request))})
        return Message(whole, node, kind, ttl=60.0, group_id="1")


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: type(protocol).__name__)
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


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: type(protocol).__name__)
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


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: type(protocol).__name__)
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


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: type(protocol).__name__)
def test_the_binding_that_a_node_insists_on_holds_in_the_mod(protocol: Any) -> None:
    content = RecordDict({"arrays": model(0.0)})
    content["config"] = ConfigRecord({})
    wanted = bind(content, Layout(32, 3, 4, 8.0, None, ()), "train")
    assert Federation(protocol, Policy(binding=wanted)).session(1)[0].result is not None
    assert Federation(protocol, Policy(binding=bytes(32))).session(1)[1] == {"BindingMismatch"}
