"""Our mods pass the property suite, and mods that break a property fail it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from privfed import mods
from privfed.array import Array
from privfed.audit import ModCheckFailed, check_mod
from privfed.context import Context
from privfed.message import Message
from privfed.plan import BIT
from privfed.record import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from privfed.update import PLAN


@pytest.mark.parametrize(
    "mod",
    [
        mods.clip(1.0),
        mods.clip(1e-3),
        mods.clip(1e9),
        mods.message_size(),
        mods.compose(),
        mods.compose(mods.message_size(), mods.clip(2.0)),
    ],
)
def test_ours_pass(mod: Any) -> None:
    assert check_mod(mod).passed


PLANNED: dict[str, Any] = {"clip": 2.0, "bit-weight": 0.5, "mechanism": "gaussian"}


def told(mod: Any) -> Any:
    """The mod under a plan whose clip adapts, on training messages; its bit is taken off, which has its own tests."""

    def under_plan(message: Message, context: Context, call_next: Any) -> Message:
        if message.metadata.message_type.partition(".")[0] != "train":
            return mod(message, context, call_next)
        content = RecordDict({**message.content, PLAN: ConfigRecord(PLANNED)})
        reply = mod(message.with_content(content), context, lambda m, c: call_next(message, c))
        if reply.has_error() or BIT not in reply.content.array_records["arrays"]:
            return reply
        arrays = {name: array for name, array in reply.content.array_records["arrays"].items() if name != BIT}
        return reply.with_content(RecordDict({**reply.content, "arrays": ArrayRecord(arrays)}))

    return under_plan


def test_adaptive_clip_passes_under_its_plan_and_refuses_training_without() -> None:
    assert check_mod(told(mods.adaptive_clip())).passed
    found = {problem for _, problem in check_mod(mods.adaptive_clip(), raise_on_failure=False).problems}
    assert any("ordinary reply became an error (PlanRefused)" in problem for problem in found)


@pytest.mark.parametrize(
    "mod",
    [mods.metric_floor(1), mods.unpack(), mods.compose(mods.unpack(), mods.sparsify(1.0))],
    ids=["metric_floor", "unpack", "sparsify"],
)
def test_what_needs_no_plan_passes(mod: Any) -> None:
    assert check_mod(mod).passed


@pytest.mark.parametrize("bits", [1, 8, 16])
def test_quantising_passes_once_it_is_unpacked(bits: int) -> None:
    assert check_mod(mods.compose(mods.unpack(), mods.quantize(bits)), deterministic=False).passed


@pytest.mark.parametrize("mod", [mods.local_dp(1.0, noise_multiplier=1.0), mods.noise(1.0, 1.0, unit="record")])
def test_local_noise_lets_nothing_else_leave(mod: Any) -> None:
    assert check_mod(mod, deterministic=False, withholds=True).passed


@pytest.mark.parametrize("mod", [mods.privacy_budget(8.0), mods.distributed_dp()], ids=["budget", "distributed"])
def test_what_needs_a_plan_refuses_without(mod: Any) -> None:
    assert check_mod(mod, refuses=True).passed


def test_a_mod_that_withholds_but_half_fails() -> None:
    def rounded(message: Message, context: Context, call_next: Any) -> Message:
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        metrics = reply.content.metric_records.get("metrics", {})
        content = RecordDict({"arrays": reply.content["arrays"]})
        content["metrics"] = MetricRecord({"num-examples": 10 * round(float(str(metrics["num-examples"])) / 10)})
        return reply.with_content(content)

    def leaky(message: Message, context: Context, call_next: Any) -> Message:
        reply = call_next(message, context)
        content = reply.content if reply.has_content() else RecordDict()
        return (
            reply
            if reply.has_error()
            else reply.with_content(RecordDict({"arrays": content["arrays"], "metrics": content["metrics"]}))
        )

    assert check_mod(rounded, withholds=True).passed  # 7 and 8 examples are both 10
    report = check_mod(leaky, withholds=True, raise_on_failure=False)
    assert any(check == "other-records" for check, _ in report.problems)


def test_secure_aggregation_refuses_what_is_plain() -> None:
    assert check_mod(mods.secure_aggregation(), refuses=True).passed
    assert not check_mod(mods.secure_aggregation(), raise_on_failure=False).passed


def on_reply(change: Any) -> Any:
    def mod(message: Message, context: Context, call_next: Any) -> Message:
        reply = call_next(message, context)
        if reply.has_content():
            change(reply.content, context)
        return reply

    return mod


def counting() -> Any:
    seen = []

    def change(content: Any, context: Context) -> None:
        seen.append(1)
        content["arrays"] = content["arrays"].map(lambda x: x + x.dtype.type(len(seen)))

    return on_reply(change)


def flatten(content: Any, context: Context) -> None:
    content["arrays"] = ArrayRecord({key: Array(np.atleast_1d(a.numpy())) for key, a in content["arrays"].items()})


def widen(content: Any, context: Context) -> None:
    content["arrays"] = ArrayRecord({key: Array(a.numpy().astype(np.float64)) for key, a in content["arrays"].items()})


def drop_metrics(content: Any, context: Context) -> None:
    del content["metrics"]


def rename(content: Any, context: Context) -> None:
    content["more"] = MetricRecord({"x": 1})


def touch_state(content: Any, context: Context) -> None:
    context.state["mod"] = ConfigRecord({"x": 1})


def repair(content: Any, context: Context) -> None:
    content["arrays"] = content["arrays"].map(lambda x: np.nan_to_num(x) if x.dtype.kind == "f" else x)


def swallow(message: Message, context: Context, call_next: Any) -> Message:
    reply = call_next(message, context)
    return reply if reply.has_content() else Message(message.content, reply_to=message)


def twice(message: Message, context: Context, call_next: Any) -> Message:
    call_next(message, context)
    return call_next(message, context)


def edit_request(message: Message, context: Context, call_next: Any) -> Message:
    message.content["config"] = ConfigRecord({"server-round": 2})
    return call_next(message, context)


def echo(message: Message, context: Context, call_next: Any) -> Message:
    call_next(message, context)
    return message


def crash(message: Message, context: Context, call_next: Any) -> Message:
    raise RuntimeError("no")


@pytest.mark.parametrize(
    ("mod", "check"),
    [
        (on_reply(flatten), "shape: "),
        (on_reply(widen), "shape: "),
        (on_reply(drop_metrics), "other-records"),
        (on_reply(rename), "other-records"),
        (on_reply(touch_state), "own-state"),
        (on_reply(repair), "not-a-number"),
        (counting(), "hidden-state"),
        (counting(), "composition"),
        (swallow, "errors-pass"),
        (twice, "addressing"),
        (echo, "addressing"),
        (edit_request, "shared-request"),
        (crash, "raised RuntimeError"),
    ],
)
def test_mods_that_break_a_property_fail(mod: Any, check: str) -> None:
    with pytest.raises(ModCheckFailed, match=check):
        check_mod(mod)


def test_state_in_the_context_is_fine() -> None:
    def remember(message: Message, context: Context, call_next: Any) -> Message:
        state = context.mod_state("remember")
        count = int(str(state["n"]["x"])) + 1 if "n" in state else 1
        state["n"] = ConfigRecord({"x": count})
        reply = call_next(message, context)
        if reply.has_content():
            reply.content["privfed.count"] = ConfigRecord({"x": count})
        return reply

    assert check_mod(remember, raise_on_failure=False).problems == ()


def test_noise_is_allowed_when_it_is_said() -> None:
    rng = np.random.default_rng()
    noisy = on_reply(
        lambda content, context: content.update(
            arrays=content["arrays"].map(lambda x: x + x.dtype.type(rng.integers(9)))
        )
    )
    assert check_mod(noisy, deterministic=False).passed
    assert not check_mod(noisy, raise_on_failure=False).passed
