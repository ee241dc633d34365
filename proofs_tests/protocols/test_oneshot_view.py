"""What the server of the one-shot protocol sees: nothing repeats, and nothing tells inputs of one sum apart."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import scipy.stats

from privfed.protocols.oneshot import OneShot, ring, sharing
from privfed.protocols.session import Session
from proofs_tests.protocols.oneshot_cohort import Cohort, seeded


def test_public_polynomials_change_with_every_fact_of_the_session() -> None:
    base = Session(1, 1, "train", (1, 2, 3), 5, 20)
    facts = {
        "run": 2,
        "round": 2,
        "action": "evaluate",
        "nodes": (1, 2, 4),
        "dimension": 6,
        "bits": 19,
        "binding": b"\x01" + bytes(31),
    }
    sessions = [base, *(Session(**({s: getattr(base, s) for s in facts} | {name: facts[name]})) for name in facts)]
    seen = {OneShot(2).agree(session).public()(64) for session in sessions}
    seen |= {OneShot(3).agree(base).public()(64), OneShot(2, bounded=True).agree(base).public()(64)}
    seen |= {OneShot(2, committee=(1, 2)).agree(base).public()(64)}
    assert len(seen) == 11


def test_secret_and_error_are_fresh_in_every_step() -> None:
    """One request answered twice from the same state: nothing repeats but the header's digest."""
    cohort = Cohort(3, OneShot(2))
    request = cohort.server.outbound()[1]
    first = cohort.answer(1, request)
    cohort.kept[1] = b""
    second = cohort.answer(1, request)
    same = np.frombuffer(first, dtype=np.uint8) == np.frombuffer(second, dtype=np.uint8)
    assert same[:40].all()
    assert same[40:].mean() < 0.01


def ciphertexts(inputs: list[int], label: str) -> tuple[np.ndarray, np.ndarray]:
    """(ciphertext bytes of all nodes, total) of a session with constant inputs."""
    cohort = Cohort(len(inputs), OneShot(2), dimension=4096, bits=20, seed=label)
    for node, value in enumerate(inputs, 1):
        cohort.inputs[node] = np.full(4096, value, dtype=np.uint64)
    said = cohort.stage()
    size = cohort.protocol.agree(cohort.session).ciphertext_bytes
    vectors = np.stack([np.frombuffer(said[node][1], dtype=np.uint8)[136 : 136 + size] for node in sorted(said)])
    cohort.server.close()
    while cohort.server.stage:
        cohort.stage()
        cohort.server.close()
    assert cohort.server.result is not None
    return vectors, cohort.server.result.total


def test_ciphertexts_of_equal_sums_look_alike() -> None:
    """Bytes of every plane against the uniform law, for two input sets of one sum, and the two against each other.

    Nine chi-squares: a sound protocol fails at rate 9e-6; the seeds are fixed. Dropping the mask a s fails all.
    """
    views = [ciphertexts(inputs, f"view {inputs}") for inputs in ([0, 0, 999_999], [333_333] * 3)]
    assert np.array_equal(views[0][1], views[1][1])
    histograms = [[np.bincount(vector, minlength=256) for vector in view[0]] for view in views]
    for view in histograms:
        for counts in view:
            assert scipy.stats.chisquare(counts).pvalue > 1e-6
    for left, right in zip(*histograms, strict=True):
        assert scipy.stats.chi2_contingency(np.stack([left, right])).pvalue > 1e-6


def test_what_the_server_opens_is_the_sum_of_the_secrets_only() -> None:
    """The opened polynomial has the law of a sum: its mean square is n 6.4^2 within 6 standard deviations."""
    cohort = Cohort(8, OneShot(5), seed="sum of secrets")
    cohort.run()
    shares = cohort.server._shares
    total = sharing.combine(shares, 5, cohort.session.nodes, 8)
    ratio = float(np.mean(total.astype(np.float64) ** 2)) / (8 * 6.4**2)
    assert abs(ratio - 1) < 6 * (2 / ring.N) ** 0.5


def test_fewer_shares_than_the_threshold_say_nothing() -> None:
    """t - 1 shares are uniform for secrets 0 and 85 alike: chi-square over 64 cells, rate 2e-6, fixed seeds."""
    for value in (0, 85):
        shares = sharing.split(np.full(ring.N, value, dtype=np.int8), 3, 5, seeded(f"shares of {value}"))
        for pair in combinations(range(5), 2):
            cells = (shares[list(pair)] * 8 // sharing.PRIME).tolist()
            counts = np.bincount(np.array(cells[0]) * 8 + np.array(cells[1]), minlength=64)
            assert scipy.stats.chisquare(counts).pvalue > 1e-7
