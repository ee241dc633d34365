"""Local privacy on a node: what leaves is noised as claimed, counted, and nothing else leaves."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from privfed.apps import CallNext
from privfed.array import Array
from privfed.context import Context
from privfed.message import ErrorCode, Message
from privfed.mods import local_dp, noise
from privfed.mods.local import spent
from privfed.privacy import Accountant, Gaussian
from privfed.record import ArrayRecord, MetricRecord, RecordDict
from privfed.update import UPDATE, flatten

SIZE = 20_000


def train(size: int = SIZE, dtype: str = "float32", kind: str = "train") -> Message:
    arrays = ArrayRecord({"w": Array(np.zeros(size, dtype)), "b": Array(np.zeros((), dtype))})
    return Message(RecordDict({"arrays": arrays}), 1, kind)


def app(step: float = 0.0) -> CallNext:
    def answer(message: Message, context: Context) -> Message:
        arrays = message.content.array_records["arrays"]
        moved = ArrayRecord({name: array.replace(array.compute() + step) for name, array in arrays.items()})
        metrics = MetricRecord({"num-examples": 17, "loss": 0.25})
        return Message(RecordDict({"arrays": moved, "metrics": metrics}), reply_to=message)

    return answer


def values(reply: Message) -> np.ndarray:
    return flatten(reply.content.array_records["arrays"])


def test_noise_has_the_stated_law() -> None:
    """Kolmogorov-Smirnov and variance of 20,001 draws of operating-system noise; false alarms 2e-6 in all."""
    reply = local_dp(2.0, noise_multiplier=3.0)(train(dtype="float64"), Context(), app())
    drawn = values(reply) / 6.0
    assert stats.kstest(drawn, "norm").pvalue > 1e-6
    spread = abs(drawn.var() - 1) / math.sqrt(2 / drawn.size)
    assert spread < 4.9  # two-sided normal tail 1e-6


def test_only_the_noised_update_leaves() -> None:
    reply = local_dp(1.0, noise_multiplier=1.0)(train(), Context(), app(5.0))
    assert set(reply.content) == {"arrays", "metrics", UPDATE}
    assert dict(reply.content.metric_records["metrics"]) == {"num-examples": 1.0}
    # sqrt(20,001) * 5 = 707 was clipped to 1, spread over 20,001 elements: the mean is 1/141 +- 1/141 (4.9 sd).
    assert abs(values(reply).mean() - 1 / math.sqrt(SIZE + 1)) < 4.9 / math.sqrt(SIZE + 1)
    assert reply.content.array_records["arrays"]["w"].dtype == "float32"


@pytest.mark.parametrize("kind", ["evaluate", "evaluate.again"])
def test_other_replies_are_refused(kind: str) -> None:
    asked = []
    reply = local_dp(1.0, epsilon=1.0)(train(8, kind=kind), Context(), lambda m, c: asked.append(m) or m)
    assert reply.error.code == ErrorCode.POLICY_REFUSED
    assert not asked


@settings(max_examples=10, deadline=None)
@given(epsilon=st.sampled_from([0.1, 1.0, 8.0, 50.0]), rounds=st.integers(1, 4))
def test_it_spends_at_most_epsilon_and_then_refuses(epsilon: float, rounds: int) -> None:
    context, mod = Context(), local_dp(1.0, epsilon=epsilon, rounds=rounds)
    for done in range(rounds):
        assert not mod(train(4), context, app()).has_error()
        assert spent(context, 1e-5).upper <= epsilon
        assert done < rounds
    assert spent(context, 1e-5).upper > 0.99 * epsilon  # and wastes little
    refused = mod(train(4), context, app())
    assert (refused.error.code, refused.error.reason) == (ErrorCode.POLICY_REFUSED, "PlanRefused")
    assert spent(context, 1e-5).upper <= epsilon


def test_spending_is_an_independent_accountants() -> None:
    context, mod = Context(), local_dp(1.0, noise_multiplier=5.0)
    for _ in range(3):
        mod(train(4), context, app())
    mod_context = Accountant(unit="client", relation="replace_one", observer="server")
    mod_context.step(Gaussian(5.0), 3)
    assert spent(context, 1e-6) == mod_context.epsilon(delta=1e-6)


def test_numbers_that_are_not_finite_leave_as_noise_and_are_paid_for() -> None:
    """An error in their place would tell of the node's data what no noise hides."""
    context = Context()
    reply = local_dp(1.0, epsilon=1.0)(train(4), context, app(math.nan))
    assert not reply.has_error()
    assert np.isfinite(values(reply)).all()
    assert spent(context, 1e-5).upper > 0


def test_record_noise_is_not_clipped_and_is_of_its_unit() -> None:
    context = Context()
    reply = noise(0.5, 1e-9 + 1e-3, unit="record")(train(4, "float64"), context, app(5.0))
    assert np.allclose(values(reply), 5.0, atol=0.01)
    refused = local_dp(1.0, epsilon=1.0)(train(4), context, app())
    assert refused.error.code == ErrorCode.POLICY_REFUSED  # units do not mix


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"max_norm": 0.0, "epsilon": 1.0}, "max_norm"),
        ({"max_norm": math.inf, "epsilon": 1.0}, "max_norm"),
        ({"max_norm": 1.0}, "epsilon"),
        ({"max_norm": 1.0, "epsilon": 1.0, "noise_multiplier": 1.0}, "epsilon"),
        ({"max_norm": 1.0, "epsilon": -1.0}, "epsilon|budget"),
        ({"max_norm": 1.0, "noise_multiplier": 0.0}, "noise_multiplier"),
        ({"max_norm": 1.0, "epsilon": 1.0, "rounds": 0}, "rounds"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        local_dp(**arguments)  # type: ignore[arg-type]  # what is under test


def test_noise_names_its_bad_arguments() -> None:
    for arguments in ((0.0, 1.0), (1.0, 0.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match=r"sensitivity|noise_multiplier"):
            noise(*arguments, unit="record")
    with pytest.raises(ValueError, match="unit"):
        noise(1.0, 1.0, unit="row")
