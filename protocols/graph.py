"""Who masks with whom: degree and threshold, the random neighbour graph, and the beacon it is drawn from.

SecAgg+ [BBGLR+20] gives every node k neighbours instead of n - 1. It is safe only if nobody who profits chose
the graph, if no node has t corrupt neighbours, and if the honest nodes left after dropouts stay connected.
`solve_parameters` finds the least k and t for which each of these fails with negligible probability, exactly;
`neighbours` draws the graph from a 32-byte seed, so that every party computes the same one; `beacon_seed`
makes that seed from one contribution per node.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privfed.protocols.errors import RemoteError

SIGMA = 40
"""Statistical security: the two ways to lose privacy share 2^-SIGMA evenly."""
ETA = 20
"""Availability: some node is left with too few live neighbours with probability <= 2^-ETA."""

_LOG_LEAK = -(SIGMA + 1) * math.log(2)
_LOG_FAIL = -ETA * math.log(2)
_MARGIN = 0.9
"""Beyond this share of bad nodes (a live honest tenth is left) no degree is offered."""
_SLACK = 1e-14
"""0.29 * 100 is 28.999...; a rate never loses a node to rounding."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """neighbours: degree k of the graph. threshold: shares t that recover a secret. (0, 0): infeasible."""

    neighbours: int
    threshold: int

    @property
    def feasible(self) -> bool:
        return self.neighbours > 0


INFEASIBLE = Parameters(0, 0)


def count(n: int, rate: float) -> int:
    """Number of nodes a rate stands for: floor(rate * n)."""
    return math.floor((rate + _SLACK) * n)


def _check(n: int, adversarial: float, dropout: float) -> None:
    if n < 1:
        raise ValueError(f"n must be at least 1 node, got {n}")
    for name, rate in (("adversarial", adversarial), ("dropout", dropout)):
        if not 0 <= rate <= 1:
            raise ValueError(f"{name} must be a share of the nodes between 0 and 1, got {rate}")


def _hypergeometric(n: int, marked: int, drawn: int) -> tuple[int, NDArray[np.float64]]:
    """First value and probabilities of the marked among `drawn` of n, from ratios of terms in log space."""
    low, high = max(0, drawn + marked - n), min(drawn, marked)
    x = np.arange(low, high, dtype=np.float64)
    logs = np.zeros(high - low + 1)
    np.cumsum(np.log((marked - x) * (drawn - x)) - np.log((x + 1) * (n - marked - drawn + x + 1)), out=logs[1:])
    logs -= logs.max()
    pmf = np.exp(logs)
    return low, pmf / pmf.sum()


def chance_of_marked(n: int, marked: int, drawn: int, least: int) -> float:
    """Return P[at least `least` marked among `drawn` of n], with the digits of a small one; below 1e-300 it is 0."""
    low, pmf = _hypergeometric(n, marked, drawn)
    return float(pmf[max(least - low, 0) :].sum())


def corrupt_quantile(n: int, corrupt: int, drawn: int) -> int:
    """Least c with n * P[more than c corrupt among `drawn` of n] <= 2^-(SIGMA + 1)."""
    low, pmf = _hypergeometric(n, corrupt, drawn)
    tail = np.cumsum(pmf[::-1])[::-1]  # tail[i] = P[X >= low + i], added from the small end
    above = np.append(tail[1:], 0.0)  # P[X > low + i]
    return low + int(np.argmax(above <= math.exp(_LOG_LEAK) / n))


def _live_quantile(n: int, live: int, drawn: int) -> int:
    """Largest t with n * P[fewer than t live among `drawn` of n] <= 2^-ETA."""
    low, pmf = _hypergeometric(n, live, drawn)
    below = np.cumsum(pmf)  # P[X <= low + i] = P[X < low + i + 1]
    return low + int(np.searchsorted(below, math.exp(_LOG_FAIL) / n, side="right"))


def _connected_degree(n: int, bad: int) -> int:
    """Least even k at which losing `bad` random nodes splits the rest with probability <= 2^-(SIGMA + 1).

    To disconnect a Harary graph two disjoint runs of k / 2 nodes of its ring must be bad; there are
    n (n - k - 1) / 2 pairs of places, and k given places are all bad with probability C(bad, k) / C(n, k).
    """
    log_bad = 0.0
    for k in range(2, n - 1, 2):
        if k > bad:
            return k
        log_bad += math.log((bad - k + 2) / (n - k + 2)) + math.log((bad - k + 1) / (n - k + 1))
        if math.log(n) + math.log(n - k - 1) - math.log(2) + log_bad < _LOG_LEAK:
            return k
    return n


def solve_parameters(n: int, adversarial: float, dropout: float, active: bool) -> Parameters:
    """Find the least even degree k < n - 1 and least threshold t >= 2 of a random Harary graph on n nodes.

    adversarial, dropout: shares of the nodes that may be corrupt, and that may vanish; counts are floored.
    Union bounds over exact hypergeometric tails [BBGLR+20]:
      privacy (sigma = 40): n P[corrupt neighbours >= t] <= 2^-41, P[honest survivors disconnected] <= 2^-41
      availability (eta = 20): n P[live neighbours < t] <= 2^-20
      active: 2 t > k + c, c the least number with n P[corrupt neighbours > c] <= 2^-41, so that no server
      gathers t shares of both secrets of one node by telling two stories.
    Parameters(0, 0) when no such graph exists, or when more than 0.9 of the nodes may be corrupt or gone
    (active: dropouts count twice). Raises ValueError for n < 1 or a rate outside [0, 1].
    """
    _check(n, adversarial, dropout)
    if adversarial + (2 if active else 1) * dropout > _MARGIN + 1e-12:
        return INFEASIBLE
    corrupt, gone = count(n, adversarial), count(n, dropout)
    k = _connected_degree(n, corrupt + gone)
    while k < n - 1:
        c = corrupt_quantile(n, corrupt, k)
        least = (k + c) // 2 + 1 if active else max(c + 1, 2)
        missing = least - _live_quantile(n, n - gone, k)
        if missing <= 0:
            return Parameters(k, least)
        # Per added neighbour the live quantile rises by at most 1 and `least` by at least 0 (active: a half):
        # the next degree that can work is `missing` (active: twice that) away; none feasible is jumped over.
        k += 2 * missing if active else missing + missing % 2
    return INFEASIBLE


def full_graph_thresholds(n: int, corrupt: int, gone: int, active: bool) -> range:
    """Thresholds that are safe and available when every node is everyone's neighbour; empty if there is none.

    Semi-honest: corrupt < t <= n - gone. Active: also 2 t > n + corrupt. t >= 2: a share is no secret.
    """
    least = (n + corrupt) // 2 + 1 if active else corrupt + 1
    return range(max(2, least), n - gone + 1)


def solve_full_graph(n: int, adversarial: float, dropout: float, active: bool) -> Parameters:
    """Find the least threshold of the complete graph over n nodes; Parameters(0, 0) when there is none."""
    _check(n, adversarial, dropout)
    allowed = full_graph_thresholds(n, count(n, adversarial), count(n, dropout), active)
    return Parameters(n - 1, allowed[0]) if allowed else INFEASIBLE


def _ring(nodes: Sequence[int], seed: bytes) -> NDArray[np.int64]:
    """The nodes in a uniformly random order that seed and roster determine."""
    if len(seed) != 32:
        raise ValueError(f"seed must be 32 bytes, got {len(seed)}")
    roster = np.array(sorted(set(nodes)), dtype="<i8")
    if len(roster) != len(nodes) or (len(roster) and roster[0] <= 0):
        raise ValueError("nodes must be distinct ids above 0")
    stream = hashlib.shake_256(b"privfed graph v1\0" + seed + hashlib.sha256(roster.tobytes()).digest())
    keys = np.frombuffer(stream.digest(16 * len(roster)), dtype="<u8").reshape(2, -1)
    # 128-bit sort keys: two of 10^6 nodes tie, and so bias the order, with probability 2^-89.
    order: NDArray[np.int64] = roster[np.lexsort((keys[0], keys[1]))].astype(np.int64)
    return order


def _steps(n: int, degree: int) -> NDArray[np.int64]:
    """Offsets along the ring to a node's neighbours."""
    if not 0 < degree < n or (degree % 2 and degree != n - 1):
        raise ValueError(f"degree must be even and below {n - 1}, or {n - 1} (everyone); got {degree}")
    half = degree // 2
    offsets = range(1, n) if degree == n - 1 else (*range(-half, 0), *range(1, half + 1))
    return np.array(offsets, dtype=np.int64)


def neighbours(nodes: Sequence[int], degree: int, seed: bytes) -> dict[int, tuple[int, ...]]:
    """Draw the neighbour graph: a Harary graph over a random order of the nodes, the same for everyone.

    nodes: distinct ids > 0, in any order. degree: even, or len(nodes) - 1 for the full graph. seed: 32 bytes.
    Returns node -> its `degree` neighbours, ascending; b is a neighbour of a exactly when a is one of b.
    """
    ring = _ring(nodes, seed)
    steps = _steps(len(ring), degree)
    places = (np.arange(len(ring))[:, None] + steps[None, :]) % len(ring)
    around = np.sort(ring[places], axis=1)
    return {node: tuple(row) for node, row in zip(ring.tolist(), around.tolist(), strict=True)}


def neighbours_of(node: int, nodes: Sequence[int], degree: int, seed: bytes) -> tuple[int, ...]:
    """Draw one node's entry of `neighbours`, without the rest. Raises ValueError for a foreign node."""
    ring = _ring(nodes, seed)
    place = np.flatnonzero(ring == node)
    if len(place) != 1:
        raise ValueError(f"node {node} is not among the nodes")
    return tuple(sorted(ring[(place[0] + _steps(len(ring), degree)) % len(ring)].tolist()))


def beacon_commitment(context: bytes, node: int, contribution: bytes) -> bytes:
    """Commit to a node's 32 random bytes, for this context (a session digest) and this node only."""
    if len(contribution) != 32:
        raise ValueError(f"contribution must be 32 bytes, got {len(contribution)}")
    bound = len(context).to_bytes(4, "big") + context + node.to_bytes(8, "big")
    return hashlib.sha256(b"privfed beacon commitment v1\0" + bound + contribution).digest()


def beacon_seed(context: bytes, commitments: Mapping[int, bytes], contributions: Mapping[int, bytes]) -> bytes:
    """Make the 32-byte seed from every committed contribution; uniform if one committed node is honest.

    commitments: node -> `beacon_commitment`, fixed before any contribution is seen, one per node.
    contributions: node -> the 32 bytes it revealed, or that t of its peers' shares recovered.
    There is no seed without all of them: a server free to withhold some could pick among 2^corrupt seeds.
    Raises RemoteError: beacon-unopened (culprits did not reveal: recover their shares or abort),
    beacon-mismatch (they revealed something else), beacon-foreign (server added some), beacon-empty.
    """
    if not commitments:
        raise RemoteError("beacon-empty", (0,), "nobody committed")
    if foreign := sorted(set(contributions) - set(commitments)):
        raise RemoteError("beacon-foreign", (0,), f"nodes {foreign} never committed")
    wrong = [
        node
        for node, value in contributions.items()
        if len(value) != 32 or not hmac.compare_digest(beacon_commitment(context, node, value), commitments[node])
    ]
    if wrong:
        raise RemoteError("beacon-mismatch", wrong, "the revealed bytes do not open the commitment")
    if missing := sorted(set(commitments) - set(contributions)):
        raise RemoteError("beacon-unopened", missing, "recover their contributions from shares, or abort")
    seed = hashlib.sha256(b"privfed beacon seed v1\0" + len(context).to_bytes(4, "big") + context)
    for node in sorted(commitments):
        seed.update(node.to_bytes(8, "big") + contributions[node])
    return seed.digest()
