"""Add up what a run spends, and say how much that is from both sides."""

from __future__ import annotations

from collections.abc import Mapping

from privfed.privacy import events as ev
from privfed.privacy import rdp
from privfed.privacy.argument import number, whole
from privfed.privacy.bound import Bound
from privfed.privacy.dominating import RENYI_ONLY, checked_terms, gaussian_mu, pairs, silent, simplify
from privfed.privacy.query import Plan


class Accountant:
    """Compose events that were fixed beforehand and bracket what they cost together.

    unit: what a neighbour differs in ("client", "record", ...). relation: "add_remove", "replace_one" or "zero_out".
    observer: "output" sees what is released, "server" also the cohorts (sampling then amplifies nothing). Accountants
    that differ in any of the three do not compose. tol: how close upper and lower should come, relative.
    """

    def __init__(
        self, unit: str = "client", relation: str = "add_remove", observer: str = "output", *, tol: float = 1e-3
    ) -> None:
        checked_terms(relation, observer)
        if not isinstance(unit, str) or not unit:
            raise ValueError(f"unit: must be a word such as 'client' or 'record', not {unit!r}")
        self.unit, self.relation, self.observer, self.tol = unit, relation, observer, _tolerance(tol)
        self._counts: dict[ev.Event, int] = {}
        self._plan: Plan | None = None

    @property
    def events(self) -> Mapping[ev.Event, int]:
        """Return what was added, as plain events with counts (a copy)."""
        return dict(self._counts)

    def step(self, event: ev.Event, count: int = 1) -> Accountant:
        """Add `count` times the event; ValueError, and no change, if it cannot be accounted for. Return self."""
        self._add(self._checked(event, count))
        return self

    def _checked(self, event: ev.Event, count: int) -> list[tuple[ev.Event, int]]:
        if not isinstance(event, ev.Event):
            raise ValueError(f"event: must be an event, not {event!r}")
        parts = [part for part in simplify(event, whole("count", count), self.observer) if part[1]]
        for part, _ in parts:
            if part not in self._counts:
                _supported(part, self.relation)
        return parts

    def _add(self, parts: list[tuple[ev.Event, int]]) -> None:
        for part, times in parts:
            self._counts[part] = self._counts.get(part, 0) + times
        if parts:
            self._plan = self._plan.grown(self._counts) if self._plan is not None else None

    def compose(self, other: Accountant) -> Accountant:
        """Add everything another accountant of the same unit, relation and observer holds. Return self."""
        if not isinstance(other, Accountant):
            raise ValueError(f"other: must be an accountant, not {other!r}")
        for name in ("unit", "relation", "observer"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(
                    f"{name}: {getattr(self, name)!r} and {getattr(other, name)!r} protect different things; "
                    "account for both in the same terms from the start"
                )
        self._add(list(other._counts.items()))
        return self

    def copy(self) -> Accountant:
        """Return an independent accountant with the same content."""
        twin = Accountant(self.unit, self.relation, self.observer, tol=self.tol)
        twin._counts = dict(self._counts)
        return twin

    def preview(self, event: ev.Event, count: int = 1) -> Accountant:
        """Return a copy to which the event was added; this accountant stays as it is."""
        return self.copy().step(event, count)

    @property
    def plan(self) -> Plan:
        """The composition so far, ready for questions."""
        if self._plan is None:
            self._plan = Plan(dict(self._counts), self.relation)
        return self._plan

    def epsilon(self, delta: float, *, tol: float | None = None) -> Bound:
        """Return the epsilon at which everything so far has this delta; 0 <= delta < 1."""
        delta = number("delta", delta, 0, 1, below=True)
        return self.plan.epsilon(delta, self.tol if tol is None else _tolerance(tol))

    def delta(self, epsilon: float, *, tol: float | None = None) -> Bound:
        """Return the delta of everything so far at this epsilon, which may be negative."""
        epsilon = number("epsilon", epsilon)
        return self.plan.delta(epsilon, self.tol if tol is None else _tolerance(tol))

    def estimate(self, delta: float) -> float:
        """Return the estimate of epsilon alone: accurate, fast, and no guarantee."""
        return self.plan.estimate(number("delta", delta, 0, 1, below=True))

    def divergence(self, order: float) -> float:
        """Return the Renyi divergence of everything so far at one order above 1."""
        order = number("order", order, 1, above=True)
        parts = self._counts.items()
        return sum(count * float(rdp.divergence(part, [order], self.relation)[0]) for part, count in parts)

    def tradeoff(self, alpha: float, *, tol: float | None = None) -> Bound:
        """Return the least false-negative rate of any test at false-positive rate alpha; the guarantee is `lower`."""
        from privfed.privacy.tradeoff import tradeoff

        return tradeoff(self, number("alpha", alpha, 0, 1), self.tol if tol is None else _tolerance(tol))

    def tpr_at(self, fpr: float, *, tol: float | None = None) -> Bound:
        """Return the largest true-positive rate of any membership test at this false-positive rate."""
        from privfed.privacy.tradeoff import flipped

        return flipped(self.tradeoff(number("fpr", fpr, 0, 1), tol=tol))

    def bayes_risk(self, prior: float, *, tol: float | None = None) -> Bound:
        """Return the least error probability of guessing membership with this prior; the guarantee is `lower`."""
        from privfed.privacy.tradeoff import bayes_risk

        return bayes_risk(self, number("prior", prior, 0, 1), self.tol if tol is None else _tolerance(tol))


def _tolerance(tol: float) -> float:
    return number("tol", tol, 0, 1, above=True, below=True)


def _supported(event: ev.Event, relation: str) -> None:
    """Raise ValueError if nothing is proved about the event under the relation."""
    if isinstance(event, ev.Unaccounted) or gaussian_mu(event, relation) is not None or silent(event):
        return
    if isinstance(event, RENYI_ONLY):
        return
    if isinstance(event, ev.PoissonSampled) and isinstance(event.inner, RENYI_ONLY):
        if relation == "replace_one" or (isinstance(event.inner, ev.ZCDP) and relation == "zero_out"):
            raise ValueError(f"relation: sampled {type(event.inner).__name__} has no proof under {relation}")
        return
    try:
        pairs(event, relation)
    except OverflowError:
        return
