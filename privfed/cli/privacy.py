"""`privfed privacy`: what a plan costs, what noise a budget needs, what a ledger has spent.

Every epsilon is printed with the unit it protects, the relation between neighbours and the observer it holds against;
without these three it means nothing.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from privfed.privacy import Accountant, Bound, FixedSizeSampled, Gaussian, Laplace, PoissonSampled
from privfed.privacy import calibrate as calibrate_noise
from privfed.privacy.bound import printed
from privfed.privacy.events import Event, event_from_json
from privfed.privacy.ledger import Ledger, LedgerError

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]
Answer = TypeVar("Answer")

RELATIONS = ("add_remove", "replace_one", "zero_out")
OBSERVERS = ("output", "server")
ALPHAS = (0.001, 0.01, 0.05, 0.1, 0.5)


@dataclass(frozen=True, slots=True)
class Question:
    """Hold in whose terms a number is asked for, and how it is to be printed."""

    unit: str
    relation: str
    observer: str
    form: str

    def terms(self) -> dict[str, str]:
        """Return the three words every epsilon is printed with."""
        return {"unit": self.unit, "relation": self.relation, "observer": self.observer}

    def accountant(self, event: Event, rounds: int) -> Accountant:
        """Return an accountant that took `rounds` steps of the event."""
        return _checked(lambda: Accountant(self.unit, self.relation, self.observer).step(event, rounds))

    def emit(self, values: dict[str, Any], lines: list[str]) -> None:
        """Print one answer with the terms it is meant in."""
        if self.form == "json":
            click.echo(json.dumps({**self.terms(), **values}, indent=1, sort_keys=True))
            return
        for line in lines:
            click.echo(line)
        click.echo(f"unit {self.unit}, relation {self.relation}, observer {self.observer}")


@dataclass(frozen=True, slots=True)
class Scheme:
    """Hold which mechanism runs on which cohorts, and how often."""

    mechanism: str
    rate: float | None
    sample_size: int | None
    population: int | None
    rounds: int

    def __post_init__(self) -> None:
        if self.rate is not None and self.sample_size is not None:
            raise click.UsageError("--rate and --sample-size exclude each other: a cohort is drawn one way")
        if self.sample_size is not None and self.population is None:
            raise click.UsageError("--sample-size needs --population: the share that is drawn is what matters")

    def event(self, noise_multiplier: float) -> Event:
        """Return the event of one round; a refused argument becomes a usage error."""
        return _checked(lambda: self._event(noise_multiplier))

    def _event(self, noise_multiplier: float) -> Event:
        inner = Gaussian(noise_multiplier) if self.mechanism == "gaussian" else Laplace(noise_multiplier)
        if self.rate is not None:
            return PoissonSampled(self.rate, inner)
        if self.sample_size is not None and self.population is not None:
            return FixedSizeSampled(self.sample_size, self.population, inner)
        return inner

    def scenarios(self) -> list[tuple[str, Scheme]]:
        """Name the ways of sampling to compare: none, Poisson and, where a size is given, fixed size."""
        rate = self.rate
        if self.sample_size is not None and self.population:
            rate = self.sample_size / self.population
        found = [("no sampling", Scheme(self.mechanism, None, None, None, self.rounds))]
        if rate is not None:
            found.append((f"Poisson {rate:g}", Scheme(self.mechanism, rate, None, None, self.rounds)))
        if self.sample_size is not None:
            found.append((f"fixed {self.sample_size} of {self.population}", self))
        return found


def _checked(work: Callable[[], Answer]) -> Answer:
    """Run, and show a refused argument as a usage error instead of a traceback."""
    try:
        return work()
    except ValueError as refusal:
        raise click.UsageError(str(refusal)) from refusal


def _gather(
    kind: Callable[..., Any], name: str, options: dict[str, Callable[[Command], Command]]
) -> Callable[[Command], Command]:
    """Return a decorator that adds options to a command and hands them over as one object."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def gathered(**given: Any) -> Any:
            return command(**{name: kind(**{option: given.pop(option) for option in options})}, **given)

        wrapped: Command = gathered
        for option in reversed(options.values()):
            wrapped = option(wrapped)
        return wrapped

    return decorate


_FORM = click.option(
    "--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True, help="How to print."
)
_UNIT = click.option("--unit", default="client", show_default=True, help="Who is protected: client, record, ...")
_question = _gather(
    Question,
    "question",
    {
        "unit": _UNIT,
        "relation": click.option(
            "--relation",
            type=click.Choice(RELATIONS),
            default="add_remove",
            show_default=True,
            help="How two neighbouring populations differ in one unit.",
        ),
        "observer": click.option(
            "--observer",
            type=click.Choice(OBSERVERS),
            default="output",
            show_default=True,
            help="Against whom: 'server' sees the cohort, so sampling hides nothing from it.",
        ),
        "form": _FORM,
    },
)
_scheme = _gather(
    Scheme,
    "scheme",
    {
        "mechanism": click.option(
            "--mechanism",
            type=click.Choice(["gaussian", "laplace"]),
            default="gaussian",
            show_default=True,
            help="Which noise is added to the sum.",
        ),
        "rate": click.option("--rate", type=float, help="Poisson cohorts: every unit joins with this probability."),
        "sample_size": click.option("--sample-size", type=int, help="Cohorts of exactly this many of --population."),
        "population": click.option("--population", type=int, help="Units in all, for --sample-size."),
        "rounds": click.option(
            "--rounds", type=int, default=1, show_default=True, help="How often the mechanism runs."
        ),
    },
)
_MULTIPLIER_HELP = "Noise standard deviation (Laplace: scale) over C, the bound on one unit's contribution."
_multiplier = click.option("--noise-multiplier", type=float, required=True, help=_MULTIPLIER_HELP)
_either = _gather(
    lambda noise_multiplier, event_text: (noise_multiplier, event_text),
    "noise",
    {
        "noise_multiplier": click.option("--noise-multiplier", type=float, help=_MULTIPLIER_HELP),
        "event_text": click.option(
            "--event", "event_text", help="Any event as JSON, instead of mechanism, noise and sampling options."
        ),
    },
)
_delta = click.option("--delta", type=float, required=True, help="Failure probability; far below 1 / population.")


def _chosen(noise: tuple[float | None, str | None], scheme: Scheme) -> Event:
    """Return the event that options or JSON describe."""
    multiplier, text = noise
    if (multiplier is None) == (text is None):
        raise click.UsageError("give one of --noise-multiplier and --event")
    if text is not None:
        return _checked(lambda: event_from_json(text))
    assert multiplier is not None
    return scheme.event(multiplier)


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else "inf"


def _fields(bound: Bound) -> dict[str, Any]:
    return {
        "lower": _finite(bound.lower),
        "estimate": _finite(bound.estimate),
        "upper": _finite(bound.upper),
        "method": bound.method,
        "proof": bound.proof,
    }


def _lines(name: str, bound: Bound) -> list[str]:
    high = printed(bound.upper, up=True)
    return [
        f"{name} <= {high}  (certified: {printed(bound.lower, up=False)} <= {name} <= {high})",
        f"by {bound.method}: {bound.proof}",
    ]


@click.group()
def privacy() -> None:
    """Differential privacy: costs, budgets and ledgers.

    Two numbers describe a guarantee: epsilon bounds how much likelier one unit's presence makes any outcome, up to a
    probability delta. The upper bound is what you may promise.
    """


@privacy.command()
@_either
@_delta
@_scheme
@_question
def epsilon(noise: tuple[float | None, str | None], delta: float, scheme: Scheme, question: Question) -> None:
    """Compute epsilon at a given delta."""
    accountant = question.accountant(_chosen(noise, scheme), scheme.rounds)
    bound = _checked(lambda: accountant.epsilon(delta))
    values = {"delta": delta, "rounds": scheme.rounds, "epsilon": _fields(bound)}
    question.emit(values, [*_lines("epsilon", bound), f"at delta = {delta:g}, {scheme.rounds} rounds"])


@privacy.command()
@_either
@click.option("--epsilon", type=float, required=True, help="The epsilon to compute delta at.")
@_scheme
@_question
def delta(noise: tuple[float | None, str | None], epsilon: float, scheme: Scheme, question: Question) -> None:
    """Compute delta at a given epsilon."""
    accountant = question.accountant(_chosen(noise, scheme), scheme.rounds)
    bound = _checked(lambda: accountant.delta(epsilon))
    values = {"epsilon": epsilon, "rounds": scheme.rounds, "delta": _fields(bound)}
    question.emit(values, [*_lines("delta", bound), f"at epsilon = {epsilon:g}, {scheme.rounds} rounds"])


@privacy.command()
@click.option("--epsilon", type=float, required=True, help="The budget.")
@_delta
@_scheme
@_question
def calibrate(epsilon: float, delta: float, scheme: Scheme, question: Question) -> None:
    """Find the least noise that keeps a budget.

    The multiplier is rounded up: the certified upper bound at that noise is within the budget.
    """
    multiplier = _checked(
        lambda: calibrate_noise(
            scheme.event,
            count=scheme.rounds,
            epsilon=epsilon,
            delta=delta,
            unit=question.unit,
            relation=question.relation,
            observer=question.observer,
        )
    )
    bound = question.accountant(scheme.event(multiplier), scheme.rounds).epsilon(delta)
    values = {
        "noise_multiplier": multiplier,
        "delta": delta,
        "rounds": scheme.rounds,
        "epsilon": _fields(bound),
    }
    lines = [f"noise multiplier {printed(multiplier, up=True, digits=8)}", *_lines("epsilon", bound)]
    question.emit(values, [*lines, f"at delta = {delta:g}, {scheme.rounds} rounds"])


@privacy.command()
@_either
@click.option(
    "--alpha",
    "alphas",
    type=float,
    multiple=True,
    default=ALPHAS,
    show_default=True,
    help="An attacker's false-positive rate; repeat for several.",
)
@_scheme
@_question
def tradeoff(
    noise: tuple[float | None, str | None], alphas: tuple[float, ...], scheme: Scheme, question: Question
) -> None:
    """Bound any attacker: the least false-negative rate at each false-positive rate."""
    accountant = question.accountant(_chosen(noise, scheme), scheme.rounds)
    points = [(alpha, _checked(functools.partial(accountant.tradeoff, alpha))) for alpha in alphas]
    lines = ["false positives   false negatives at least   true positives at most"]
    lines += [
        f"{alpha:15.6g}   {printed(beta.lower, up=False):>24}   {printed(1 - beta.lower, up=True):>22}"
        for alpha, beta in points
    ]
    question.emit({"points": [{"alpha": alpha, "beta": _fields(beta)} for alpha, beta in points]}, lines)


def _answer(question: Question, event: Event, rounds: int, delta: float) -> dict[str, Any]:
    try:
        return {"epsilon": _fields(question.accountant(event, rounds).epsilon(delta))}
    except (ValueError, click.UsageError) as refusal:
        return {"refused": getattr(refusal, "message", str(refusal))}


@privacy.command()
@_multiplier
@_delta
@_scheme
@_UNIT
@_FORM
def compare(noise_multiplier: float, delta: float, scheme: Scheme, unit: str, form: str) -> None:
    """Show the same noise under every sampler, relation and observer."""
    rows: list[dict[str, Any]] = []
    _checked(lambda: Accountant(unit))
    for name, one in scheme.scenarios():
        event = one.event(noise_multiplier)
        for relation in RELATIONS:
            for observer in OBSERVERS:
                question = Question(unit, relation, observer, form)
                rows.append({"sampler": name, **question.terms(), **_answer(question, event, one.rounds, delta)})
    if form == "json":
        click.echo(json.dumps({"delta": delta, "rounds": scheme.rounds, "rows": rows}, indent=1))
        return
    click.echo(f"{'sampler':26} {'relation':12} {'observer':9} epsilon at delta = {delta:g}, unit {unit}")
    for row in rows:
        found = (
            printed(float(row["epsilon"]["upper"]), up=True) if "epsilon" in row else f"not proved: {row['refused']}"
        )
        click.echo(f"{row['sampler']:26} {row['relation']:12} {row['observer']:9} {found}")


@privacy.command()
@click.argument("path", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the spending to this file.")
@click.option("--head", help="The hash the ledger must end with, kept from an earlier look.")
@_FORM
def ledger(path: Path, plot: Path | None, head: str | None, form: str) -> None:
    """Check a ledger's chain, add it up again and show what is spent."""
    try:
        book = Ledger.read(path)
    except (LedgerError, OSError) as fault:
        raise click.ClickException(f"{path}: {fault}") from fault
    if head is not None and head != book.head:
        raise click.ClickException(f"{path}: ends with {book.head}, not {head}; charges were removed or added")
    replay, terms = book.replay(), book.terms
    values = {
        "owner": terms.owner,
        "budget": terms.budget.fields(),
        "charges": len(book.entries),
        "measure": book.measure,
        "spent": _finite(book.spent),
        "limit": _finite(book.limit),
        "recomputed": _finite(replay.recomputed),
        "agrees": replay.agrees,
        "torn": book.torn,
        "head": book.head,
    }
    spent = printed(book.spent, up=True)
    verdict = "agrees" if replay.agrees else "DISAGREES; the stored amount governs"
    lines = [
        f"{terms.owner}: {len(book.entries)} charges, {book.measure} {spent} of {book.limit:.6g} spent",
        f"budget: epsilon {terms.budget.epsilon:g} at delta = {terms.budget.delta:g}, by {terms.budget.filter}",
        f"added up again: {replay.recomputed:.6g} ({verdict})",
        f"head {book.head}" + ("  (an unacknowledged half line follows it)" if book.torn else ""),
    ]
    Question(terms.unit, terms.relation, terms.observer, form).emit(values, lines)
    if plot is not None:
        _draw(book, plot)
    if not replay.agrees:
        raise click.exceptions.Exit(1)


def _draw(book: Ledger, plot: Path) -> None:
    try:
        from privfed.cli.spending import draw
    except ImportError as missing:
        raise click.ClickException("--plot needs matplotlib: pip install 'privfed[report]'") from missing
    draw(book, plot)
    click.echo(f"wrote {plot}", err=True)
