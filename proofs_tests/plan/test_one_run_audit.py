"""One-run audits of plans that no canary in every round can audit: local noise, and cohorts drawn by chance.

Every node is a canary with a coordinate of its own, in or out by a fair coin; who was in is guessed from what an
observer sees of one run [SNJ23, MMC24]. Bounds are at 99.9 %: an honest mechanism exceeds its claim with probability
below 1e-3. An eighth of the noise is caught: these tests find smaller faults less surely than the canary audits do.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from privfed import mods
from privfed.apps import ClientApp
from privfed.array import Array
from privfed.audit.privacy import epsilon_one_run, epsilon_one_run_fdp
from privfed.context import Context
from privfed.grid import LocalGrid
from privfed.message import Message
from privfed.plan import PrivacyPlan
from privfed.privacy import mechanisms
from privfed.privacy.sampling import FixedSizeSampler, PoissonSampler, Sampler
from privfed.record import ArrayRecord, RecordDict
from privfed.strategies import FedAvg

CANARIES, NODES, DELTA, SIGNIFICANCE = 1500, 800, 1e-5, 1e-3


@pytest.fixture
def weakened(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = mechanisms.gaussian_variance
    monkeypatch.setattr(mechanisms, "gaussian_variance", lambda z, steps: honest(z, steps) / 64)


def audit_local() -> tuple[float, float]:
    """Return the claimed epsilon and the lower bound: each node answers once, with one vector or its opposite."""
    coins = np.random.default_rng(5).random(CANARIES) < 0.5
    mod, scores = mods.local_dp(1.0, epsilon=2.0, delta=DELTA), np.empty(CANARIES)
    request = RecordDict({"arrays": ArrayRecord([np.zeros(1)])})
    claimed = 0.0
    for node, inside in enumerate(coins):
        answer = RecordDict({"arrays": ArrayRecord([np.array([9.0 if inside else -9.0])])})
        context = Context(node_id=node + 1)
        reply = mod(Message(request, node + 1, "train"), context, lambda m, c, a=answer: Message(a, reply_to=m))
        scores[node] = reply.content.array_records["arrays"]["0"].numpy()[0]
        claimed = claimed or mods.local.spent(context, DELTA).upper
    terms = {"significance": SIGNIFICANCE, "delta": DELTA, "threshold": 1.0}
    return claimed, epsilon_one_run_fdp(scores[coins], scores[~coins], **terms)


def audit_sampled(sampler: Sampler, relation: str, noise_multiplier: float, rounds: int = 2) -> tuple[float, float]:
    """Return the claimed epsilon and the lower bound: a node in has the clip in its own coordinate, in every round.

    One that is out sends zero, or the opposite under replace_one; both are neighbours of one that is in. The bound
    takes no shape of the trade-off for granted.
    """
    coins, away = np.random.default_rng(7).random(NODES) < 0.5, -1.0 if relation == "replace_one" else 0.0
    plan = PrivacyPlan(
        clip=1.0,
        noise_multiplier=noise_multiplier,
        delta=DELTA,
        sampler=sampler,
        relation=relation,
        population=NODES,
    )
    app = ClientApp(mods=[mods.clip()])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        values = message.content.array_records["arrays"]["w"].numpy()
        values[context.node_id - 1] += 1.0 if coins[context.node_id - 1] else away
        return Message(RecordDict({"arrays": ArrayRecord({"w": Array(values)})}), reply_to=message)

    strategy = FedAvg(privacy=plan, fraction_evaluate=0.0, min_train_nodes=1)
    result = strategy.start(LocalGrid(app, NODES), ArrayRecord({"w": Array(np.zeros(NODES))}), num_rounds=rounds)
    assert result.epsilon is not None
    sums = result.arrays["w"].numpy() * sampler.expected_size(NODES)
    terms = {"significance": SIGNIFICANCE, "delta": DELTA, "threshold": 1.0}
    return result.epsilon, epsilon_one_run(sums[coins], sums[~coins], **terms)


AUDITS: dict[str, Callable[[], tuple[float, float]]] = {
    "local": audit_local,
    "Poisson": lambda: audit_sampled(PoissonSampler(0.5), "add_remove", 4.0),
    "fixed size": lambda: audit_sampled(FixedSizeSampler(NODES // 2, NODES), "replace_one", 8.0),
}


@pytest.mark.parametrize("name", AUDITS)
def test_one_run_shows_no_more_than_is_claimed(name: str) -> None:
    claimed, bound = AUDITS[name]()
    assert 0.5 < claimed <= 2.0
    assert bound <= claimed


@pytest.mark.usefixtures("weakened")
@pytest.mark.parametrize("name", AUDITS)
def test_an_eighth_of_the_noise_is_caught(name: str) -> None:
    claimed, bound = AUDITS[name]()
    assert bound > claimed
