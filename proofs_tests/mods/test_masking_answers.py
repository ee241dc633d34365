"""What apps answer under the mod that masks: cut to its range, and no value of it shows in whether a node refuses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from privfed import mods
from privfed.apps import ClientApp
from privfed.array import Array
from privfed.message import Error, ErrorCode, Message
from privfed.protocols import SecAgg
from privfed.protocols.session import Policy
from privfed.record import ArrayRecord, ConfigRecord, MetricRecord
from privfed.ring import DEMANDS, NOISED, VECTOR, Layout
from privfed.update import PLAN, UPDATE
from proofs_tests.mods.federation import Federation, identity_of, moved


def answering(reply: Callable[[Message], Message], policy: Policy = Policy()) -> Federation:
    lab = Federation(SecAgg(threshold=2), policy)
    lab.app = ClientApp(mods=[mods.secure_aggregation(policy, identity=identity_of)])
    lab.app.train()(lambda message, context: reply(message))
    return lab


def test_the_nodes_policy_names_the_weight() -> None:
    """A server that has all alike weigh by a metric which is 0 on all nodes but one would read that one's update."""
    metrics = MetricRecord({"num-examples": 1, "rare-cases": 0})
    for key, known, refusals in (
        ("num-examples", "num-examples", set()),
        ("rare-cases", None, set()),
        ("rare-cases", "num-examples", {"WeightMismatch"}),
    ):
        lab = answering(lambda message: moved(1, message, metrics=metrics), Policy(weight_key=known))
        lab.weight_key = key
        assert lab.session(1, layout=Layout(32, 3, 4, 8.0, 8.0, ()))[1] == refusals
    unweighed = Federation(SecAgg(threshold=2), Policy(weight_key="num-examples"))
    assert unweighed.session(1)[0].result is not None, "where all weigh the same, no metric weighs"


def test_an_error_of_the_app_passes_as_it_is() -> None:
    def fail(message: Message) -> Message:
        return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, "Tired"), reply_to=message)

    assert answering(fail).session(1)[1] == {"Tired"}


@pytest.mark.parametrize("clip", [1e-3, 1.0, 2.0 * (1 - 2.0**-20), 2.0, 100.0])
def test_an_apps_own_update_is_cut_to_the_plans_clip_and_no_refusal_tells_its_norm(clip: float) -> None:
    """The update is 1 in four elements: its norm is 2."""
    layout = Layout(32, 3, 4, 8.0, None, ())
    server, refusals = own_update(np.ones(4, np.float32)).session(1, more={PLAN: ConfigRecord({"clip": clip})})
    assert refusals == set()
    assert server.result is not None
    np.testing.assert_allclose(layout.decode(server.result.total, 3).total, 3 * min(1, clip / 2), atol=1e-6)


@pytest.mark.parametrize("plan", [{}, {"clip": "wide"}, {"clip": float("nan")}, {"clip": 0.0}, {"clip": -1.0},
                                  {"clip": 1.0, "bit-weight": float("nan")}])  # fmt: skip
def test_a_plan_without_a_clip_is_refused(plan: dict[str, Any]) -> None:
    assert own_update(np.ones(4, np.float32)).session(1, more={PLAN: ConfigRecord(plan)})[1] == {"Refused"}


def own_update(values: Any) -> Federation:
    """Nodes whose app sends an update itself."""
    made: dict[str, Any] = {"arrays": ArrayRecord({"w": Array(values)}), UPDATE: ConfigRecord({})}
    return answering(lambda message: moved(0, message, **made))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("how", ["weights", "update", "clipped", "planned", "metric", "weight"])
def test_numbers_that_are_not_finite_make_no_node_refuse(how: str, value: float) -> None:
    """A server that picks the model could else make nodes overflow by their data, and read data from who refuses."""
    spoilt = np.full(4, value, np.float32)
    metrics = MetricRecord({"num-examples": 1, "loss": 1.0})
    more = {PLAN: ConfigRecord({"clip": 1.0})} if how == "planned" else {}
    layout = Layout(32, 3, 4, 8.0, None if more else 8.0, () if more else (("loss", 0.0, 2.0),))

    def reply(message: Message, context: Any) -> Message:
        given = MetricRecord(dict(metrics))
        if context.node_id != 2:
            return moved(1 / 4, message, metrics=given)
        if how in ("metric", "weight"):
            given["loss" if how == "metric" else "num-examples"] = float(value)
            return moved(1 / 4, message, metrics=given)
        # The model is -3e38, so that 3e38 is a change beyond float32.
        records: dict[str, Any] = {"arrays": ArrayRecord({"w": Array(spoilt)}), "metrics": given}
        return moved(0, message, **records, **({UPDATE: ConfigRecord({})} if how == "update" else {}))

    lab = Federation(SecAgg(threshold=2))
    inside = [mods.clip(10.0)] if how == "clipped" else [mods.clip()] if more else []
    lab.app = ClientApp(mods=[mods.secure_aggregation(Policy(), identity=identity_of), *inside])
    lab.app.train()(reply)
    lab.weight_key = "" if more else "num-examples"
    server, refusals = lab.session(1, layout=layout, more=more, value=-3e38 if how == "weights" else 0.0)
    assert refusals == set()
    assert server.result is not None


def test_a_node_without_finite_numbers_counts_for_nothing_and_is_counted() -> None:
    layout = Layout(32, 3, 4, 8.0, 8.0, (("loss", 0.0, 2.0),))

    def reply(message: Message, context: Any) -> Message:
        given = MetricRecord({"num-examples": 1, "loss": 1.0})
        return moved(float("nan") if context.node_id == 2 else 0.25, message, metrics=given)

    lab = Federation(SecAgg(threshold=2))
    lab.app = ClientApp(mods=[mods.secure_aggregation(Policy(), identity=identity_of)])
    lab.app.train()(reply)
    lab.weight_key = "num-examples"
    server, _ = lab.session(1, layout=layout)
    assert server.result is not None
    decoded = layout.decode(server.result.total, 3)
    assert (decoded.weight, decoded.clamped) == (2.0, 1)
    np.testing.assert_allclose(decoded.total * decoded.scale / decoded.weight, 0.25, rtol=1e-6)


def test_whether_an_update_is_refused_for_want_of_a_clip_tells_nothing_about_it() -> None:
    """A server names clips as it likes: an update that no mods.clip() made is refused under each, short or long."""
    for clip in (1e-9, 1.0, 1e9):
        lab = Federation(SecAgg(threshold=2))
        assert lab.session(1, more={PLAN: ConfigRecord({"clip": clip})})[1] == {"UpdateNotClipped"}


@pytest.mark.parametrize("layout", [
    Layout(32, 3, 4, 0.5, None), Layout(32, 3, 4, 8.0, 0.5), Layout(32, 3, 4, 8.0, 8.0, (("loss", 0.0, 1.0),)),
    Layout(32, 3, 4, 8.0, 8.0, (("loss", 90.0, 91.0),)), Layout(32, 3, 4, 1e-9, 1e-9, (("loss", 0.0, 1e-9),)),
])  # fmt: skip
def test_a_nodes_values_do_not_show_in_whether_it_refuses(layout: Layout) -> None:
    """The update is 1 in each element, the weight 1, the loss 50: no range that a server names makes nodes refuse."""

    def reply(message: Message) -> Message:
        return moved(1, message, metrics=MetricRecord({"num-examples": 1, "loss": 50.0}))

    lab = answering(reply)
    lab.weight_key = "num-examples"
    server, refusals = lab.session(1, layout=layout)
    assert refusals == set()
    assert server.result is not None
    decoded = layout.decode(server.result.total, 3)
    assert decoded.clamped == (3 if layout.counts else 0)
    np.testing.assert_allclose(decoded.total * decoded.scale / decoded.weight, min(1, layout.max_value), rtol=1e-6)


def test_an_update_is_checked_like_full_weights() -> None:
    for key, shape, refusal in (("w", 4, set()), ("v", 4, {"UpdateError"}), ("w", 3, {"UpdateError"})):
        update = ArrayRecord({key: Array(np.ones(shape, np.float32))})
        records: dict[str, Any] = {"arrays": update, UPDATE: ConfigRecord({})}
        lab = answering(partial(moved, 0, **records))
        assert lab.session(1)[1] == refusal


@pytest.mark.parametrize("missing", [NOISED, DEMANDS, "", "bits", "min-survivors", "shape"])
def test_a_sum_of_noised_vectors_takes_nothing_else(missing: str) -> None:
    layout = Layout(32, 3, 8, 1.0, None, (), min_survivors=3, integers=True)

    def reply(message: Message) -> Message:
        size = 7 if missing == "shape" else 8
        records: dict[str, Any] = {
            NOISED: ArrayRecord({VECTOR: Array(np.ones(size, np.uint32))}),
            DEMANDS: ConfigRecord({"bits": 31 if missing == "bits" else 32, "min-survivors": 3}),
        }
        if missing == "min-survivors":
            records[DEMANDS] = ConfigRecord({"bits": 32, "min-survivors": 4})
        records.pop(missing, None)
        return moved(1, message, **records)

    refusals = {"": set(), NOISED: {"NoiseMissing"}, DEMANDS: {"NoiseMissing"}, "shape": {"RingOverflow"}}
    assert answering(reply).session(1, layout=layout)[1] == refusals.get(missing, {"WeakSession"})
