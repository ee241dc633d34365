"""Draw what a ledger spent: the stored reading, the certified band around the truth, and the budget."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.figure import Figure

from privfed.privacy import Accountant
from privfed.privacy.ledger import Ledger

_POINTS = 60  # at which the band is computed; charges between them are joined by a line


def bands(book: Ledger) -> list[tuple[int, float, float]]:
    """Return (charge number, lower, upper epsilon) at up to 60 charges of the ledger, the last included."""
    terms = book.terms
    accountant = Accountant(unit=terms.unit, relation=terms.relation, observer=terms.observer)
    stride = max(1, math.ceil(len(book.entries) / _POINTS))
    points = []
    for entry in book.entries:
        accountant.step(entry.event, entry.count)
        if entry.sequence % stride == 0 or entry.sequence == len(book.entries):
            bound = accountant.epsilon(terms.budget.delta)
            points.append((entry.sequence, bound.lower, bound.upper))
    return points


def draw(book: Ledger, path: Path) -> None:
    """Write a plot of the ledger's spending to `path`; its suffix names the format."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    points = bands(book)
    numbers = [0, *(number for number, _, _ in points)]
    lower = [0.0, *(low for _, low, _ in points)]
    upper = [0.0, *(high for _, _, high in points)]
    axes.fill_between(
        numbers, lower, upper, step="post", alpha=0.3, color="tab:blue", label="certified: lower to upper"
    )
    axes.step(numbers, upper, where="post", color="tab:blue", linewidth=1.5)
    budget = book.terms.budget
    if book.measure == "epsilon":
        charged = [0, *(entry.sequence for entry in book.entries)]
        stored = [0.0, *(entry.spent for entry in book.entries)]
        axes.step(charged, stored, where="post", color="black", linewidth=0.8, label="charged")
    if math.isfinite(budget.epsilon):
        axes.axhline(budget.epsilon, color="tab:red", linestyle="--", label=f"budget {budget.epsilon:g}")
    axes.set_xlabel("charge")
    axes.set_ylabel(f"epsilon at delta = {budget.delta:g}")
    axes.set_title(
        f"{book.terms.owner}: unit {book.terms.unit}, {book.terms.relation}, observer {book.terms.observer}",
        fontsize=10,
    )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=150)
