"""What a person sees of a run: a live line and a table on a terminal, plain lines elsewhere, JSON lines on request."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from privfed.privacy.bound import printed

Listener = Callable[[str, Mapping[str, object]], None]
F = TypeVar("F", bound=Callable[..., Any])


def log_options(command: F) -> F:
    """Add --log-format and --debug to a command."""
    form = click.option(
        "--log-format",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        help="Lines for people, or JSON for machines, on stderr.",
    )
    debug = click.option("--debug", is_flag=True, help="Log more; show tracebacks.")
    return form(debug(command))


def display(form: str) -> Listener:
    """Return a listener of a run's events. form: "text" or "json"."""
    if form == "json":
        return _print_json
    if sys.stdout.isatty():
        return _Terminal()
    return _Plain()


def _print_json(event: str, fields: Mapping[str, object]) -> None:
    print(json.dumps({"event": event, **fields}, default=str), flush=True)


def flat(metrics: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Flatten nested round metrics to the numbers and texts worth a column."""
    found: dict[str, object] = {}
    for key, value in metrics.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found.update(flat(value, f"{name}."))
        elif isinstance(value, int | float | str) and not isinstance(value, bool):
            found[name] = value
    return found


def worth_showing(metrics: Mapping[str, object]) -> dict[str, object]:
    """Return the columns of a round: metrics, epsilon, valid replies; not byte counts."""
    hidden = ("bytes", "round", "nodes", "seconds")
    rest = {name: value for name, value in metrics.items() if name != "privacy"}
    shown = {name: value for name, value in flat(rest).items() if not name.split(".")[-1].startswith(hidden)}
    shown = {name: value for name, value in shown.items() if not isinstance(value, str) or len(value) < 24}
    shown = {name: value for name, value in shown.items() if ".updates." not in name}  # kept in the run's metrics
    privacy = metrics.get("privacy")
    if isinstance(privacy, Mapping) and "epsilon" in privacy:
        # An epsilon means nothing without its unit, relation, observer and delta.
        terms = ", ".join(str(privacy.get(name, "?")) for name in ("unit", "relation", "observer"))
        epsilon = privacy["epsilon"]
        text = printed(epsilon, up=True, digits=4) if isinstance(epsilon, float) else text_of(epsilon)
        shown["epsilon"] = f"{text} at delta {privacy.get('delta', '?')} ({terms})"
    return shown


def text_of(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class _Plain:
    """One line an event that a person wants to know."""

    def __call__(self, event: str, fields: Mapping[str, object]) -> None:
        if event == "run":
            print(f"run {fields['name']}: {fields['app']} with {fields['nodes']} nodes", flush=True)
        elif event == "round-end":
            metrics = fields.get("metrics")
            shown = worth_showing(metrics) if isinstance(metrics, Mapping) else {}
            line = "  ".join(f"{name}={text_of(value)}" for name, value in shown.items())
            print(f"round {fields.get('round')}  {line}", flush=True)
        elif event == "excluded":
            print("  excluded: " + ", ".join(f"{name}={value}" for name, value in fields.items()), flush=True)
        elif event == "client-error":
            last = str(fields.get("traceback", "")).rsplit(" | ", 1)[-1]
            print(f"  node {fields.get('node')} failed: {last}", flush=True)
        elif event == "ended":
            print(f"{fields['state']} after {fields['rounds']} rounds: {fields['folder']}", flush=True)


class _Terminal(_Plain):
    """Plain lines, and below them one live line that says what the run is doing now."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False)
        self._started = time.monotonic()
        self._live = False

    def __call__(self, event: str, fields: Mapping[str, object]) -> None:
        if self._live:
            sys.stdout.write("\r\033[K")
            self._live = False
        if event == "round-end":
            metrics = fields.get("metrics")
            shown = worth_showing(metrics) if isinstance(metrics, Mapping) else {}
            cells = "  ".join(f"[dim]{name}[/dim] [bold]{text_of(value)}[/bold]" for name, value in shown.items())
            self._console.print(f"[cyan]round {fields.get('round'):>3}[/cyan]  {cells}")
        else:
            super().__call__(event, fields)
        if event in ("round-start", "stage", "replies"):
            what = " ".join(f"{name}={value}" for name, value in fields.items() if not isinstance(value, list | dict))
            sys.stdout.write(f"\r\033[K{event} {what}  {time.monotonic() - self._started:.0f} s"[:160])
            sys.stdout.flush()
            self._live = True
