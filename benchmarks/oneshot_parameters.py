"""Estimate the hardness behind the one-shot protocol's parameters: primal uSVP, core-SVP, no dependencies.

    python benchmarks/oneshot_parameters.py [--json]

Model: Kannan/Bai-Galbraith embedding of LWE with dimension n, modulus q, secret and error of given standard
deviations and as many samples as the attack likes [ADPS16, AGVW17]. BKZ-beta finds the planted vector when
sqrt(beta) sd_e <= delta^(2 beta - d - 1) vol^(1/d), with delta(beta) of the geometric series assumption and vol of
the lattice whose secret part is scaled by sd_e / sd_s. It costs 2^(0.292 beta) classically, 2^(0.265 beta) with a
quantum computer (core-SVP), or, in the gate-like reading, 2^(0.292 beta + 16.4) for each of 8 d calls.
The rows of the homomorphic encryption standard for 128 bits, put through the same formula, say what it is worth.
malb/lattice-estimator finds the same beta, 355, for the protocol's row; docs/oneshot-security.md quotes its costs.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass

CALLS = 8
SIEVE_CONSTANT = 16.4


@dataclass(frozen=True)
class Instance:
    """LWE of dimension n modulo 2^log_q, secret and error of these standard deviations."""

    name: str
    n: int
    log_q: float
    secret: float
    error: float


@dataclass(frozen=True)
class Estimate:
    """Cheapest attack: block size, lattice dimension, log2 of its costs."""

    beta: int
    dimension: int
    classical: float
    quantum: float
    gates: float


TERNARY = math.sqrt(2 / 3)
STANDARD = 8 / math.sqrt(2 * math.pi)
INSTANCES = (
    Instance("HE standard 128, n = 1024", 1024, 27, TERNARY, STANDARD),
    Instance("HE standard 128, n = 2048", 2048, 54, TERNARY, STANDARD),
    Instance("HE standard 128, n = 4096", 4096, 109, TERNARY, STANDARD),
    Instance("one-shot: q = 2^54, sd 6.4 less hints", 2048, 54, 3.2, 3.2),
    Instance("margin: q = 2^52", 2048, 52, 3.2, 3.2),
    Instance("margin: q = 2^50", 2048, 50, 3.2, 3.2),
    Instance("too large: q = 2^56", 2048, 56, 3.2, 3.2),
)


def log_delta(beta: int) -> float:
    """log2 of the root Hermite factor of BKZ-beta [Che13]."""
    return math.log2((math.pi * beta) ** (1 / beta) * beta / (2 * math.pi * math.e)) / (2 * (beta - 1))


def succeeds(lwe: Instance, beta: int, samples: int) -> bool:
    """Tell whether BKZ-beta finds the planted vector among so many samples."""
    d = lwe.n + samples + 1
    volume = (samples * lwe.log_q + lwe.n * math.log2(lwe.error / lwe.secret)) / d
    return math.log2(math.sqrt(beta) * lwe.error) <= (2 * beta - d - 1) * log_delta(beta) + volume


def best_samples(lwe: Instance, beta: int) -> int | None:
    """Fewest samples, a multiple of 8, with which BKZ-beta succeeds; None if there are none."""
    return next((m for m in range(8, 3 * lwe.n, 8) if succeeds(lwe, beta, m)), None)


def estimate(lwe: Instance) -> Estimate:
    """Find the least block size that breaks an instance, by bisection: success is monotone in it."""
    low, high = 60, 2000
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if best_samples(lwe, middle) is not None else (middle + 1, high)
    samples = best_samples(lwe, low)
    assert samples is not None
    d = lwe.n + samples + 1
    gates = 0.292 * low + SIEVE_CONSTANT + math.log2(CALLS * d)
    return Estimate(low, d, round(0.292 * low, 1), round(0.265 * low, 1), round(gates, 1))


def smoothing_loss(sampled: float, coordinates: int) -> float:
    """log2 of the statistical loss of splitting honest coordinates of sd `sampled` into two of sd `sampled`/2.

    What a sum of two leaves is a discrete Gaussian of sd s/sqrt(2); it is the sum of two of sd s/2 up to
    2 exp(-2 pi^2 r^2) a coordinate, 1/r^2 = 2 / (s/2)^2 (the smoothing parameter of Z in one dimension).
    """
    r = sampled / 2 / math.sqrt(2)
    return 1 - 2 * math.pi**2 * r**2 / math.log(2) + math.log2(coordinates)


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = {lwe.name: estimate(lwe) for lwe in INSTANCES}
    losses = {sampled: round(smoothing_loss(sampled, 1 << 20), 1) for sampled in (3.2, 4.5, 6.4)}
    if options.json:
        print(json.dumps({"estimates": {name: asdict(row) for name, row in rows.items()}, "log2_loss": losses}))
        return
    print(f"{'':40} beta     d  classical  quantum  gates")
    for name, row in rows.items():
        print(f"{name:40} {row.beta:4} {row.dimension:5}  {row.classical:9.1f}  {row.quantum:7.1f}  {row.gates:5.1f}")
    for sampled, loss in losses.items():
        print(f"sampled sd {sampled}: splitting 2^20 coordinates loses 2^{loss}")


if __name__ == "__main__":
    main()
