"""The mod that masks among others: what passes it by, which mod masks when two would, whose identity it takes."""

from __future__ import annotations

from typing import Any

import pytest

from privfed import mods
from privfed.apps import CallNext, ClientApp
from privfed.context import Context
from privfed.message import Error, ErrorCode, Message
from privfed.protocols import LightSecAgg, OneShot, SecAgg
from privfed.protocols.session import Policy
from privfed.record import RecordDict
from proofs_tests.mods.federation import Federation, identity_of, model, moved


def plain(kind: str) -> Message:
    return Message(RecordDict({"arrays": model(0.0)}), 1, kind)


def test_kinds_are_kinds() -> None:
    with pytest.raises(ValueError, match="kinds must be among train, evaluate, query, got fit"):
        mods.secure_aggregation(kinds=("train", "fit"))
    mod = mods.secure_aggregation(kinds=("train",))
    for kind, passes in (("train", False), ("train.warm_up", False), ("evaluate", True), ("query.mean", True)):
        reply = mod(plain(kind), Context(node_id=1), lambda message, context: moved(1, message))
        assert reply.has_content() == passes
        assert passes or reply.error == Error(ErrorCode.POLICY_REFUSED, "SecureAggregationRequired")


STRICTER: list[Policy] = [
    Policy(min_cohort=3),
    Policy(min_survivors=3),
    Policy(min_threshold=3),
    Policy(min_neighbours=2),
    Policy(min_bits=9),
    Policy(require_active=True),
    Policy(min_round=1),
    Policy(corrupt=0.1),
    Policy(max_dimension=9),
    Policy(binding=bytes(32)),
    Policy(run=1),
    Policy(round=1),
    Policy(action="train"),
    Policy(bits=32),
    Policy(dimension=4),
    Policy(weight_key="num-examples"),
]


@pytest.mark.parametrize("inner", STRICTER, ids=repr)
def test_inside_a_weaker_mod_it_refuses_and_inside_as_strict_a_one_it_stands_aside(inner: Policy) -> None:
    def ask(outer: Policy, **arguments: Any) -> Message:
        context = Context(node_id=1, masked=outer)
        mod = mods.secure_aggregation(inner, **arguments)
        return mod(plain("train"), context, lambda message, context: moved(1, message))

    assert ask(Policy()).error == Error(ErrorCode.POLICY_REFUSED, "NodePolicyTooWeak")
    assert ask(inner).has_content()
    # What the outer one does with an identity or a protocol of its own, it cannot know.
    assert ask(inner, identity=identity_of(Context(node_id=1))).error.reason == "NodePolicyTooWeak"
    assert ask(inner, protocols={"LightSecAgg": LightSecAgg}).error.reason == "NodePolicyTooWeak"


@pytest.mark.parametrize("breaks", [False, True])
def test_what_it_calls_knows_that_it_is_masked_and_what_follows_does_not(breaks: bool) -> None:
    seen: list[Policy | None] = []
    policy = Policy(min_cohort=3)
    lab = Federation(SecAgg(threshold=2), policy)

    def inner(message: Message, context: Context, call_next: CallNext) -> Message:
        seen.append(context.masked)
        if breaks:
            raise KeyError("inner")
        return call_next(message, context)

    lab.app = ClientApp(mods=[mods.secure_aggregation(policy, identity=identity_of), inner])
    lab.app.train()(lambda message, context: moved(1, message))
    if breaks:
        with pytest.raises(KeyError):
            lab.session(1)
    else:
        assert lab.session(1)[0].result is not None
    assert set(seen) == {policy}
    assert all(context.masked is None for context in lab.contexts.values())


def test_identity_comes_from_the_runtime_unless_it_is_given() -> None:
    """OneShot needs one: without any the node refuses, and a foreign one is no node's own."""
    for own, runtime, refusal in (
        (identity_of, None, set()),
        (None, identity_of, set()),
        (None, None, {"LocalError"}),
        (identity_of(Context(node_id=2)), identity_of, {"LocalError"}),
    ):
        lab = Federation(OneShot(threshold=2))
        lab.app = ClientApp(mods=[mods.secure_aggregation(identity=own)])
        lab.app.train()(lambda message, context: moved(1, message))
        for context in lab.contexts.values():
            if runtime is not None:
                context.identify = lambda context=context, runtime=runtime: runtime(context)
        assert lab.session(1)[1] == refusal
