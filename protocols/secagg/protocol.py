"""The parameters of SecAgg and SecAgg+, and what they become for a cohort."""

from __future__ import annotations

from dataclasses import dataclass

from privfed.protocols.codec import decode, encode_session, read_session
from privfed.protocols.errors import DecodeError, LocalError
from privfed.protocols.graph import corrupt_quantile, count, full_graph_thresholds, solve_full_graph, solve_parameters
from privfed.protocols.secagg.client import SecAggClient
from privfed.protocols.secagg.messages import Terms
from privfed.protocols.secagg.neighbourhood import chosen_graph_connected, most_corrupt
from privfed.protocols.secagg.server import SecAggServer
from privfed.protocols.session import Identity, Policy, Random, Session, os_random
from privfed.protocols.shamir import MAX_THRESHOLD, P

MODES = ("semi_honest", "active")
Threshold = int | float | None


@dataclass(frozen=True, slots=True)
class SecAgg:
    """Secure aggregation over the full graph [BIK+17].

    threshold: nodes that must answer at the end: a count, a share of the cohort, or None, solved from `corrupt` and
    `dropout` (shares of the cohort). mode "active" defends against a server that lies: every node has an Identity, and
    2 * threshold > n + corrupt nodes. threads: for masks.

    Guarantees: the server, with up to threshold - 1 nodes, learns the sum over the survivors and nothing else about an
    honest input (semi_honest: if it follows the protocol). Raises LocalError before any message when infeasible.
    """

    threshold: Threshold = None
    mode: str = "semi_honest"
    corrupt: float = 1 / 3
    dropout: float = 0.1
    threads: int = 1

    def __post_init__(self) -> None:
        _check(self.threshold, self.mode, self.corrupt, self.dropout)

    @property
    def stages(self) -> tuple[str, ...]:
        return _stages(self.mode)

    def terms(self, session: Session) -> Terms:
        """Return what these parameters become for a cohort."""
        n, active = len(session.nodes), self.mode == "active"
        if self.threshold is None:
            threshold = solve_full_graph(n, self.corrupt, self.dropout, active).threshold
            if not threshold:
                raise LocalError(
                    f"no threshold is safe for {n} nodes with corrupt={self.corrupt:.3g}, dropout={self.dropout:.3g}, "
                    f"mode={self.mode!r}: lower one of them, or use more nodes"
                )
        else:
            threshold = _count(self.threshold, n)
        if not 2 <= threshold <= n:
            raise LocalError(f"threshold must be between 2 and the {n} nodes of the cohort, got {threshold}")
        if active and threshold not in full_graph_thresholds(n, count(n, self.corrupt), 0, True):
            raise LocalError(
                f"active mode needs 2 * threshold > n + corrupt nodes: {2 * threshold} > {n} + {count(n, self.corrupt)}"
            )
        return _limited(Terms(session, 0, threshold, active))

    def withstands(self, session: Session) -> int:
        """Return how many nodes of a session may collude with its server and learn no more than the sum."""
        return most_corrupt(self.terms(session))

    def differs(self, terms: Terms) -> str:
        """Return what in a session's terms is not as these parameters fix it, "" when nothing.

        A threshold that is solved (None) fixes nothing: a node's `Policy` has the floors.
        """
        if terms.degree:
            return f"a graph of degree {terms.degree}, the full one is set"
        return _threshold_differs(self.threshold, terms.threshold, len(terms.session.nodes))

    def server(self, session: Session, *, random: Random = os_random) -> SecAggServer:
        corrupt = count(len(session.nodes), self.corrupt)
        return SecAggServer(self.terms(session), self.stages, random, self.threads, corrupt)

    def client(
        self,
        node: int,
        *,
        identity: Identity | None = None,
        policy: Policy = Policy(),
        random: Random = os_random,
    ) -> SecAggClient:
        return SecAggClient(node, self.stages, identity, policy, random, self.threads, self.differs, self.corrupt)


@dataclass(frozen=True, slots=True)
class SecAggPlus:
    """Secure aggregation over a sparse graph [BBGLR+20]: each node masks with about log n others.

    neighbours: degree k of the graph; None solves k and the threshold from `corrupt` and `dropout`, for 2^-40 security
    and 2^-20 failure. threshold: of a node's k neighbours, a count, a share, or None. In active mode every node chooses
    its k neighbours itself, and 2 * threshold > k + c with c the 2^-41 quantile of corrupt ones.
    """

    neighbours: int | None = None
    threshold: Threshold = None
    mode: str = "semi_honest"
    corrupt: float = 1 / 3
    dropout: float = 0.1
    threads: int = 1

    def __post_init__(self) -> None:
        _check(self.threshold, self.mode, self.corrupt, self.dropout)
        whole = self.neighbours is None or isinstance(self.neighbours, int)
        if not whole or (self.neighbours is not None and (self.neighbours < 2 or self.neighbours % 2)):
            raise ValueError(f"neighbours must be even and >= 2, got {self.neighbours!r}")

    @property
    def stages(self) -> tuple[str, ...]:
        return _stages(self.mode)

    def terms(self, session: Session) -> Terms:
        """Return what these parameters become for a cohort."""
        n, active = len(session.nodes), self.mode == "active"
        degree, solved = self.neighbours, 0
        if degree is None or self.threshold is None:
            parameters = solve_parameters(n, self.corrupt, self.dropout, active)
            if degree is None and not parameters.feasible:
                # A cohort too small for a sparse graph: the full one is always there.
                return SecAgg(self.threshold, self.mode, self.corrupt, self.dropout).terms(session)
            degree, solved = degree or parameters.neighbours, parameters.threshold
        if degree >= n - 1:
            return SecAgg(self.threshold, self.mode, self.corrupt, self.dropout).terms(session)
        threshold = solved if self.threshold is None else _count(self.threshold, degree)
        if not 2 <= threshold <= degree:
            raise LocalError(f"threshold must be between 2 and the {degree} neighbours, got {threshold}")
        if active:
            self._check_active(n, degree, threshold)
        return _limited(Terms(session, degree, threshold, active))

    def withstands(self, session: Session) -> int:
        """Return how many nodes of a session may collude with its server and learn no more than the sum."""
        return most_corrupt(self.terms(session))

    def differs(self, terms: Terms) -> str:
        """Return what in a session's terms is not as these parameters fix it, "" when nothing.

        A degree or threshold that is solved (None) fixes nothing: a node's `Policy` has the floors.
        """
        n = len(terms.session.nodes)
        if self.neighbours is not None:
            degree = self.neighbours if self.neighbours < n - 1 else 0
            if terms.degree != degree:
                return f"a graph of degree {terms.degree or n - 1}, {degree or n - 1} is set"
        return _threshold_differs(self.threshold, terms.threshold, terms.degree or n)

    def _check_active(self, n: int, degree: int, threshold: int) -> None:
        corrupt = count(n, self.corrupt)
        quantile = corrupt_quantile(n, corrupt, degree)
        if 2 * threshold <= degree + quantile:
            raise LocalError(
                "active mode needs 2 * threshold > neighbours + corrupt neighbours: "
                f"{2 * threshold} > {degree} + {quantile}"
            )
        if not chosen_graph_connected(n, corrupt + count(n, self.dropout), degree):
            raise LocalError(f"{degree} neighbours of {n} nodes do not keep the honest ones connected: use more")

    def server(self, session: Session, *, random: Random = os_random) -> SecAggServer:
        corrupt = count(len(session.nodes), self.corrupt)
        return SecAggServer(self.terms(session), self.stages, random, self.threads, corrupt)

    def client(
        self,
        node: int,
        *,
        identity: Identity | None = None,
        policy: Policy = Policy(),
        random: Random = os_random,
    ) -> SecAggClient:
        return SecAggClient(node, self.stages, identity, policy, random, self.threads, self.differs, self.corrupt)


def _stages(mode: str) -> tuple[str, ...]:
    middle = ("confirm",) if mode == "active" else ()
    return ("advertise", "share", "mask", *middle, "reveal")


def _check(threshold: Threshold, mode: str, corrupt: float, dropout: float) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if threshold is not None and not isinstance(threshold, int | float):
        raise ValueError(f"threshold must be a count, a share or None, got {threshold!r}")
    if isinstance(threshold, float) and not 0 < threshold <= 1:
        raise ValueError(f"threshold as a share must be in (0, 1], got {threshold}")
    if isinstance(threshold, int) and threshold < 2:
        raise ValueError(f"threshold must be at least 2: one share must not be the secret, got {threshold}")
    for name, value in (("corrupt", corrupt), ("dropout", dropout)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be a share in [0, 1), got {value}")


def _count(threshold: int | float, n: int) -> int:
    # A share is rounded up: never fewer than asked for.
    return threshold if isinstance(threshold, int) else max(2, -int(-threshold * n // 1))


def _threshold_differs(pinned: Threshold, asked: int, holders: int) -> str:
    if pinned is None or asked == (own := _count(pinned, holders)):
        return ""
    return f"a threshold of {asked} of {holders} holders, {own} is set"


def _limited(terms: Terms) -> Terms:
    try:
        if decode(encode_session(terms.session), read_session) != terms.session:
            raise LocalError("session.nodes must be distinct and ascending")
    except (DecodeError, OverflowError) as fault:
        raise LocalError(f"session cannot be sent: {fault}") from None
    if len(terms.session.nodes) >= P or terms.threshold > MAX_THRESHOLD:
        raise LocalError(f"at most {P - 1} nodes and a threshold of {MAX_THRESHOLD}: use SecAggPlus")
    return terms
