"""Who holds whose shares, and who masks with whom.

Full graph: every node holds shares of every node, itself included. Sparse, semi-honest: a k-regular graph drawn by the
server's seed. Sparse, active: every node chooses k out-neighbours itself, so that no server can choose them; shares
go to the chosen ones, masks are shared along edges of either direction [BBGLR+20, section 4].
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from privfed.protocols.graph import neighbours_of
from privfed.protocols.keys import derive, node_bytes
from privfed.protocols.secagg.messages import Terms

_LOG_2_41 = -41 * math.log(2)
_LOG_2_40 = -40 * math.log(2)


def is_full(terms: Terms, present: Sequence[int]) -> bool:
    """Return whether the graph over the nodes present is the full one."""
    return terms.degree == 0 or terms.degree >= len(present) - 1


def holders(terms: Terms, node: int, present: Sequence[int], seed: bytes, root: bytes | None) -> tuple[int, ...]:
    """Return who gets shares of this node's secrets, ascending. root: the node's own secret, for the active choice."""
    if is_full(terms, present):
        return tuple(present)
    if not terms.active:
        return tuple(sorted(neighbours_of(node, present, terms.degree, seed)))
    assert root is not None
    key = derive(root, b"out-neighbours", terms.digest())
    others = (other for other in present if other != node)
    ranked = sorted(others, key=lambda other: hashlib.sha256(key + node_bytes(other)).digest())
    return tuple(sorted(ranked[: terms.degree]))


def _log_choose(n: int, k: int) -> float:
    if k < 0 or k > n:
        return -math.inf
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def chosen_graph_connected(n: int, bad: int, degree: int) -> bool:
    """Return whether honest live nodes stay connected except with probability 2^-41, each choosing `degree` others.

    Union bound over the sets of s honest live nodes none of whom chose, or was chosen by, the rest of the honest live.
    """
    honest = n - bad
    whole = _log_choose(n - 1, degree)
    total = 0.0
    for size in range(1, honest // 2 + 1):
        inside = size * (_log_choose(n - 1 - (honest - size), degree) - whole)
        outside = (honest - size) * (_log_choose(n - 1 - size, degree) - whole)
        term = _log_choose(honest, size) + inside + outside
        if term > _LOG_2_41:
            return False
        total += math.exp(term)
    return total <= math.exp(_LOG_2_41)


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
