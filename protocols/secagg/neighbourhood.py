"""Who holds whose shares, and who masks with whom.

Full graph: every node holds shares of every node, itself included. Sparse, semi-honest: a k-regular graph drawn by the
server's seed. Sparse, active: every node chooses k out-neighbours itself, among the whole cohort and not among those
who are said to be there, so that no server can choose them; shares go to the chosen ones that are there, masks are
shared along edges of either direction [BBGLR+20, section 4].
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from privfed.protocols.graph import chance_of_marked, corrupt_quantile, neighbours_of
from privfed.protocols.keys import derive, node_bytes
from privfed.protocols.secagg.messages import Terms

_LOG_2_41 = -41 * math.log(2)
_LOG_2_40 = -40 * math.log(2)


def is_full(terms: Terms, present: Sequence[int]) -> bool:
    """Return whether the graph is the full one: in active mode a server that thins out the cohort cannot make it so."""
    size = len(terms.session.nodes) if terms.active else len(present)
    return terms.degree == 0 or terms.degree >= size - 1


def holders(terms: Terms, node: int, present: Sequence[int], seed: bytes, root: bytes | None) -> tuple[int, ...]:
    """Return who gets shares of this node's secrets, ascending. root: the node's own secret, for the active choice."""
    if is_full(terms, present):
        return tuple(present)
    if not terms.active:
        return tuple(sorted(neighbours_of(node, present, terms.degree, seed)))
    assert root is not None
    key = derive(root, b"out-neighbours", terms.digest())
    others = (other for other in terms.session.nodes if other != node)
    ranked = sorted(others, key=lambda other: hashlib.sha256(key + node_bytes(other)).digest())
    return tuple(sorted(set(ranked[: terms.degree]) & set(present)))


def able(holding: Mapping[int, Collection[int]], threshold: int) -> set[int]:
    """Return the nodes that go on: the largest set in which each has `threshold` of its holders in the set too.

    A secret with fewer holders could never be recovered, so nobody may mask with that node, which takes a neighbour
    from others in turn.
    """
    left = set(holding)
    while short := {node for node in left if sum(holder in left for holder in holding[node]) < threshold}:
        left -= short
    return left


def least_threshold(terms: Terms, corrupt: int) -> int:
    """Return the least threshold that is safe when `corrupt` nodes of the cohort are.

    Active: 2 t > holders + corrupt holders, or one server could gather t shares of both secrets of a node by telling
    two stories. Semi-honest: t > corrupt holders. On a sparse graph the corrupt holders are their 2^-41 quantile.
    """
    nodes = terms.session.nodes
    corrupt = min(corrupt, len(nodes) - 1)  # the node that asks is not
    if is_full(terms, nodes):
        holding, among = len(nodes), corrupt
    else:
        holding, among = terms.degree, corrupt_quantile(len(nodes), corrupt, terms.degree)
    return (holding + among) // 2 + 1 if terms.active else among + 1


def most_corrupt(terms: Terms) -> int:
    """Return how many nodes of the cohort may collude with the server and learn no more than the sum."""
    counts = range(len(terms.session.nodes))
    safe = bisect_right(counts, terms.threshold, key=lambda corrupt: least_threshold(terms, corrupt))
    return max(0, safe - 1)


def _log_choose(n: int, k: int) -> float:
    if k < 0 or k > n:
        return -math.inf
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def chosen_graph_connected(n: int, bad: int, degree: int) -> bool:
    """Return whether honest live nodes stay connected except with probability 2^-41, each choosing `degree` others.

    Union bound over the sets of s honest live nodes none of whom chose, or was chosen by, the rest of the honest live.
    """
    from scipy.special import gammaln  # here, because importing privfed loads no scipy

    def log_choose(top: NDArray[np.float64] | float, size: NDArray[np.float64] | float) -> NDArray[np.float64]:
        left = np.asarray(top) - size
        logs = gammaln(np.asarray(top) + 1) - gammaln(np.asarray(size) + 1) - gammaln(np.maximum(left, 0) + 1)
        return np.where(left < 0, -np.inf, logs)

    honest = n - bad
    if honest < 2:
        return honest == 1
    sizes = np.arange(1, honest // 2 + 1, dtype=np.float64)
    whole = log_choose(n - 1, degree)
    inside = sizes * (log_choose(n - 1 - (honest - sizes), degree) - whole)
    outside = (honest - sizes) * (log_choose(n - 1 - sizes, degree) - whole)
    terms = log_choose(honest, sizes) + inside + outside
    return bool(np.exp(np.minimum(terms, 0)).sum() <= math.exp(_LOG_2_41))


def least_survivors(terms: Terms, corrupt: int) -> int:
    """Return the fewest survivors whose honest ones are connected, in the sparse graph that the nodes chose.

    At least two of them are honest. More than there are nodes when no survivors are enough: the degree is too small.
    """
    n = len(terms.session.nodes)
    low, high = min(corrupt + 2, n + 1), n + 1
    while low < high:
        middle = (low + high) // 2
        if chosen_graph_connected(n, min(corrupt + n - middle, n), terms.degree):
            high = middle
        else:
            low = middle + 1
    return low


def in_degree_limit(n: int, degree: int) -> int:
    """Return the least d with n * P[in-degree > d] <= 2^-40 when every node chooses `degree` others uniformly."""
    chance = degree / (n - 1)
    log_tail = -math.inf
    for value in range(n - 1, 0, -1):
        term = _log_choose(n - 1, value) + value * math.log(chance) + (n - 1 - value) * math.log1p(-chance)
        top = max(log_tail, term)
        log_tail = top + math.log(math.exp(log_tail - top) + math.exp(term - top))
        if math.log(n) + log_tail > _LOG_2_40:
            return value
    return 0


def fallen_out(terms: Terms, confirmed: int, survivors: int, corrupt: int) -> int:
    """Return how many honest nodes of the list that was signed may not be in its sum, but for a chance of 2^-40.

    A server can relay no shares of some nodes, list them, and have those who chose them not confirm. No honest node
    of the sum that confirmed chose one of them: it would have masked with it, and the mask would be left in the sum.
    So of the honest others no more than n - `confirmed` did. Union bound over the sets that may have fallen out,
    each other node choosing `degree` of n; a Chernoff bound for the tail. Of sums so small that nobody in them need
    have confirmed, `_outgrown` says how likely they are. docs/secure-aggregation.md has the proof.
    """
    n, degree = len(terms.session.nodes), terms.degree
    whole, silent, tail = _log_choose(n - 1, degree), n - confirmed, 0.0
    for size in range(n - corrupt - 1 - _outgrown(terms, n - survivors, corrupt), 0, -1):
        others = n - corrupt - size
        none = _log_choose(n - 1 - size, degree) - whole  # log of the chance to choose none of them
        share, some = silent / others, -math.expm1(none)
        if share >= some:
            return size
        distance = (1 - share) * (math.log1p(-share) - none)
        distance += share * math.log(share / some) if share else 0.0
        tail += math.exp(min(0.0, _log_choose(n, size) - others * distance))
        if tail > math.exp(_LOG_2_40) / 4:
            return size
    return 0


def _outgrown(terms: Terms, gone: int, corrupt: int) -> int:
    """Return the most m such that sums over m honest nodes or fewer have a chance of 3/4 2^-40 at most.

    gone: nodes that are not on the list. A node of the sum masked with `threshold` of those it chose, and as many hold
    its share and are not gone; so all but `degree` - `threshold` of the former, at most, are corrupt or in the sum.
    """
    n, total = len(terms.session.nodes), 0.0
    least = terms.threshold - min(gone, terms.degree - terms.threshold)
    for size in range(1, n - corrupt):
        chance = chance_of_marked(n - 1, corrupt + size - 1, terms.degree, least)
        if chance:
            total += math.exp(min(0.0, _log_choose(n, size) + size * math.log(chance)))
        if total > 0.75 * math.exp(_LOG_2_40):
            return size - 1
    return n - corrupt - 1
