"""Every published fact about privacy accounting, by the function its kind maps to."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import special

from privfed.audit import privacy as audit
from privfed.privacy import rdp
from privfed.privacy.accountant import Accountant
from privfed.privacy.adaptive import combined_multiplier, delta_multiplier
from privfed.privacy.calibration import calibrate_bound
from privfed.privacy.dominating import pairs
from privfed.privacy.events import (
    DiscreteGaussian,
    Event,
    Gaussian,
    Laplace,
    MatrixGaussian,
    PoissonSampled,
    PureDP,
    RandomAllocation,
    RandomizedResponse,
)
from privfed.privacy.matrix import tree_sensitivity
from privfed.privacy.tradeoff import gdp_mu

FACTS = json.loads((Path(__file__).parents[1] / "vectors" / "dp_reference.json").read_text())["facts"]
Inputs = dict[str, Any]


def event_of(i: Inputs) -> Event:
    """Return the event of a fact: noise over the sensitivity it states, sampled if it has a rate below 1."""
    mechanism, sensitivity = i.get("mechanism", "poisson_gaussian"), i.get("sensitivity", 1)
    inner: Event
    if "laplace" in mechanism:
        inner = Laplace(i["b"] / sensitivity)
    elif "discrete_gaussian" in mechanism:
        inner = DiscreteGaussian(i["sigma"], sensitivity, i.get("truncation"))
    elif mechanism == "randomized_response":
        return RandomizedResponse(i["p"], i["k"])
    elif "random_allocation" in mechanism:
        return RandomAllocation(i["t"], Gaussian(i["sigma"]))
    else:
        inner = Gaussian(i["sigma"] / sensitivity)
    return PoissonSampled(i["q"], inner) if "q" in i else inner


RELATIONS = {"replace_special": "zero_out", "replace_one": "replace_one", "REPLACE": "replace_one"}


def accountant_of(i: Inputs) -> Accountant:
    relation = RELATIONS.get(i.get("rel", i.get("adjacency", "")), "add_remove")
    return Accountant(relation=relation).step(event_of(i), i.get("T", i.get("epochs", 1)))


def delta_fact(i: Inputs) -> float:
    """Directional: a hockey stick of one dominating pair, REMOVE or ADD; otherwise an accountant's estimate."""
    if i.get("adjacency") in ("REMOVE", "ADD"):
        both = pairs(event_of(i), "add_remove")
        assert both is not None
        return both[i["adjacency"] == "ADD"].profile(i["eps"])
    return accountant_of(i).delta(i["eps"]).estimate


def epsilon_fact(i: Inputs) -> float:
    if i.get("method") == "rdp_constant":
        first, last = map(int, i["orders"].split(".."))
        orders = list(range(first, last + 1))
        return rdp.epsilon_of(orders, [i["rdp"]] * len(orders), i["delta"])
    if str(i.get("method", "")).startswith("rdp"):
        orders = list(np.arange(1.001, 100, 0.001))
        return rdp.epsilon_of(orders, rdp.divergence(event_of(i), orders, "add_remove"), i["delta"])
    return accountant_of(i).epsilon(i["delta"]).estimate


OPACUS_ORDERS = [1 + x / 10 for x in range(1, 100)] + list(range(12, 64))


def composed_divergence(i: Inputs, orders: list[float]) -> np.ndarray[Any, Any]:
    return i["T"] * rdp.divergence(event_of(i), orders, "add_remove")


def renyi_epsilon_fact(i: Inputs) -> float:
    return rdp.epsilon_of(OPACUS_ORDERS, composed_divergence(i, OPACUS_ORDERS), i["delta"])


def moments_fact(i: Inputs) -> float:
    """The moments accountant of 2016: orders up to 33, first conversion."""
    orders = [float(a) for a in range(2, 34)]
    return rdp.classic_epsilon_of(orders, composed_divergence(i, orders), i["delta"])


def old_conversion_fact(i: Inputs) -> float:
    orders = [1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0, 3.5, 4.0, 4.5, *range(5, 64), 128, 256, 512]
    return rdp.classic_epsilon_of(orders, composed_divergence(i, orders), i["delta"])


def sigma_fact(i: Inputs) -> float:
    if i.get("method") == "rdp":
        low, high, found = 0.0, 10.0, 0.0  # the published figure stops when epsilon is within 0.01 of the target
        while i["eps"] - found > 0.01:
            middle = (low + high) / 2
            at_middle = renyi_epsilon_fact({**i, "sigma": middle})
            low, high, found = (low, middle, at_middle) if at_middle < i["eps"] else (middle, high, found)
        return high
    found = calibrate_bound(
        lambda z: PoissonSampled(i["q"], Gaussian(z)), count=i["T"], epsilon=i["eps"], delta=i["delta"]
    )
    assert found.lower <= found.estimate <= found.upper <= found.lower * 1.001
    return found.estimate


def scale_fact(i: Inputs) -> float:
    return calibrate_bound(Laplace, count=i["T"], epsilon=i["eps"], delta=i["delta"]).estimate


def renyi_fact(i: Inputs) -> list[float]:
    orders = [math.inf if a == "inf" else a for a in i["orders"]]
    return rdp.divergence(event_of(i), orders, RELATIONS[i["rel"]]).tolist()


def audit_fact(i: Inputs) -> float:
    stated = re.search(r"shift (\d+)", i["scores"])
    assert stated is not None
    n, shift = i["n_in"], float(stated.group(1))
    quantiles = special.ndtri((np.arange(n) + 0.5) / n)
    method = audit.epsilon_one_run_fdp if "f-DP" in i["method"] else audit.epsilon_one_run
    return method(quantiles + shift, quantiles, significance=i["significance"], delta=i["delta"])


def tree_fact(i: Inputs) -> float:
    event = MatrixGaussian(i["sigma"], tree_sensitivity(i["steps"]))
    return Accountant().step(event).epsilon(i["delta"]).upper


def mu_fact(i: Inputs) -> float:
    accountant = Accountant()
    for epsilon in i["eps"]:
        accountant.step(PureDP(float(epsilon)))
    return gdp_mu(accountant, tuple(i["fpr_range"]))


KINDS: dict[str, Callable[[Inputs], Any]] = {
    "audit_eps_lower": audit_fact,
    "b": scale_fact,
    "delta": delta_fact,
    "effective_z": lambda i: (
        combined_multiplier([i["z_delta"], i["z_bits"]])
        if "z_bits" in i
        else combined_multiplier([delta_multiplier(i["z"], i["sigma_b"]), i["sigma_b"] / i["bit_sensitivity"]])
    ),
    "epsilon": epsilon_fact,
    "epsilon_bracket": lambda i: accountant_of(i).epsilon(i["delta"], tol=5e-3),
    "epsilon_gdp": lambda i: accountant_of(i).epsilon(i["delta"]),
    "epsilon_moments": moments_fact,
    "epsilon_rdp": renyi_epsilon_fact,
    "epsilon_rdp_old_conversion": old_conversion_fact,
    "epsilon_upper": tree_fact,
    "gdp_mu": mu_fact,
    "norm": lambda i: rdp.rounded_norm(i["l2"], i["dim"], math.exp(-0.5) if i["beta"] == "exp(-0.5)" else i["beta"]),
    "rdp": renyi_fact,
    "scale": lambda i: rdp.lattice_scale(
        i["local_sigma"], i["clip"], i["bits"], i["n"], i["dim"], deviations=i["k"], rho=i["rho"]
    ),
    "sigma": sigma_fact,
    "tau": lambda i: rdp.sum_distance(i["n"], i["sigma_over_gamma"]),
    "z_delta": lambda i: delta_multiplier(i["z"], i["sigma_b"]),
}


def test_every_kind_has_a_function() -> None:
    assert {fact["kind"] for fact in FACTS} <= set(KINDS)
    assert len(FACTS) >= 54


def moments_epsilon(q: float, sigma: float, steps: int, delta: float) -> float:
    """Return the moments accountant's epsilon with whole orders up to 32, by binomial sums [ACG+16]."""
    best = math.inf
    for order in range(2, 34):
        terms = [
            math.comb(order, k) * (1 - q) ** (order - k) * q**k * math.exp(k * (k - 1) / (2 * sigma**2))
            for k in range(order + 1)
        ]
        best = min(best, (steps * math.log(math.fsum(terms)) - math.log(delta)) / (order - 1))
    return best


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact["id"])
def test_fact(fact: dict[str, Any]) -> None:
    """The computed number agrees with the published one within the tolerance the fact states."""
    found, expected, tolerance = KINDS[fact["kind"]](fact["inputs"]), fact["expected"], fact["tolerance"]
    if fact["id"] == "abadi-fig2-E400":
        # Not reproducible: the paper's own formula, min over whole lambda <= 32 of (T alpha(lambda) + ln 1/delta) /
        # lambda, is 2.5759 here (lambda = 9) with the larger direction, 2.5592 with the smaller, 2.5263 with alpha's
        # leading term q^2 lambda (lambda + 1) / (2 sigma^2). At 100 epochs it does give the 1.26 printed beside it.
        assert moments_epsilon(0.01, 4, 40_000, 1e-5) == pytest.approx(found, rel=1e-9)
        assert round(moments_epsilon(0.01, 4, 10_000, 1e-5), 2) == 1.26
        assert accountant_of(fact["inputs"]).epsilon(1e-5).upper < expected < found < expected * 1.011
    elif tolerance == "<":
        assert found < expected
    elif tolerance == "bracket":
        assert expected[0] <= found.upper and found.lower <= expected[1]
        assert found.upper - found.lower < expected[1] - expected[0]
    elif tolerance == "range":  # a known under-estimate: ours must stay above it
        assert found.lower > expected[1]
    elif isinstance(tolerance, str):
        assert found == pytest.approx(expected, rel=float(tolerance.split()[1]), abs=0)
    else:
        # Nothing can agree better than the figure was printed. The sampled Laplace at delta 1e-14 is one: its exact
        # ceiling 3 ln(1 + (e^2 - 1) / 5) = 2.46964497 stands as 2.46964, which is 2e-6 away.
        digits = len(str(expected).partition(".")[2])
        assert found == pytest.approx(expected, rel=0, abs=max(tolerance, 0.51 * 10.0**-digits))
