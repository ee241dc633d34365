"""Three nodes with the mod, and a server that asks whatever a test says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

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
RUN = 1
SIGNING = {node: bytes([node]) * 32 for node in NODES}
ROSTER = {node: keys.signing_public(key) for node, key in SIGNING.items()}
PROTOCOLS: list[Any] = [SecAgg(threshold=2), LightSecAgg(threshold=2), OneShot(threshold=2)]
INPUT_STAGE = {"SecAgg": 2, "SecAggPlus": 2, "LightSecAgg": 2, "OneShot": 0}

KINDS = pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: type(protocol).__name__)

Change = Callable[[RecordDict], None]


def only_at(stage: int, change: Change) -> Callable[[int], Change | None]:
    return lambda at: change if at == stage else None


def model(value: float) -> ArrayRecord:
    return ArrayRecord({"w": Array(np.full(4, value, np.float32))})


def moved(by: float, message: Message, **records: Any) -> Message:
    """An app's answer: the model, moved."""
    arrays = message.content.array_records["arrays"].map(lambda values: values + values.dtype.type(by))
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({}), **records}), reply_to=message)


def identity_of(context: Context) -> Identity:
    return Identity(context.node_id, SIGNING[context.node_id], ROSTER)


class Federation:
    """The app adds 1 to the model. arguments: of the mod, beside policy and identity. ask: how a node is asked."""

    def __init__(self, protocol: Any, policy: Policy = Policy(), **arguments: Any) -> None:
        self.protocol = protocol
        self.contexts = {node: Context(run_id=RUN, node_id=node) for node in NODES}
        self.trained = 0
        self.weight_key, self.shared = "", b""
        self.ask: Callable[[Message], Message] = self.answer
        mod = mods.secure_aggregation(policy, identity=identity_of, **arguments)
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
        more: Mapping[str, ConfigRecord] = {},
        told: Mapping[str, Any] = {},
        layout: Layout | None = None,
        change: Callable[[int], Change | None] = lambda stage: None,
        kind_at: Callable[[int], str] | None = None,
    ) -> tuple[Server, set[str]]:
        """Run a session; returns the server and the reasons nodes gave for refusing.

        upto: stages to run. spoil: the stage at which node 1 is sent a damaged request first. more: further records,
        to which it is bound. told: facts of the protocol's session that differ from the message's. layout: another
        one than the model's. change: what to do to a stage's instructions. kind_at: the kind of a stage's messages.
        """
        plan = layout if layout is not None else Layout(32, len(nodes), 4, 8.0, None, ())
        content = RecordDict({"arrays": model(value)})
        content["config"] = ConfigRecord(config)
        content.update(more)
        protocol: Protocol = self.protocol
        last = kind if kind_at is None else kind_at(INPUT_STAGE[type(protocol).__name__])
        binding = bind(content, plan, last, keys=("arrays", self.weight_key), shared=self.shared, group="1")
        facts = Session(RUN, number, kind, nodes, plan.size, plan.bits, binding)
        server = protocol.server(replace(facts, **told))
        refusals: set[str] = set()
        for stage in range(min(upto, len(protocol.stages))):
            name = kind if kind_at is None else kind_at(stage)
            for node, request in sorted(server.outbound().items()):
                if (stage, node) == (spoil, 1):
                    damaged = bytes(request[:-1]) + bytes([request[-1] ^ 1])
                    self.ask(self.message(stage, number, node, damaged, content, plan, name, binding))
                message = self.message(stage, number, node, bytes(request), content, plan, name, binding)
                edit = change(stage)
                if edit is not None:
                    edit(message.content)
                reply = self.ask(message)
                if reply.has_error():
                    refusals.add(str(reply.error.reason))
                    continue
                server.receive(node, reply.content.array_records[REPLY][BUFFER].data)
            if refusals:
                break
            server.close()
        return server, refusals

    def answer(self, message: Message) -> Message:
        return self.app(message, self.contexts[message.metadata.dst_node_id])

    def message(
        self,
        stage: int,
        number: int,
        node: int,
        request: bytes,
        content: RecordDict,
        layout: Layout,
        kind: str,
        binding: bytes,
    ) -> Message:
        name = type(self.protocol).__name__
        whole = RecordDict({SECURE + ".layout": layout.to_config()})
        whole[SECURE + ".protocol"] = ConfigRecord(dict[str, ConfigValue](name=name, threshold=2))
        with_input = stage == INPUT_STAGE[name]
        header: dict[str, ConfigValue] = {
            "number": number,
            "stage": stage,
            "binding": binding,
            "input": with_input,
            "arrays-key": "arrays",
            "weight-key": self.weight_key,
        }
        whole[SECURE] = ConfigRecord(header)
        if with_input:
            whole.update(content)
        whole[REQUEST] = ArrayRecord({BUFFER: Array("uint8", (len(request),), "raw", memoryview(request))})
        return Message(whole, node, kind, ttl=60.0, group_id="1")
