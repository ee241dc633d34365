"""One self-contained HTML page about a run. Needs the extra `report` (matplotlib)."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from privfed.decoder import json_decoder
from privfed.errors import PrivfedError
from privfed.runtime.run_folder import RunFolder

Rounds = Sequence[Mapping[str, Any]]
Series = dict[str, tuple[list[int], list[float]]]

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #1a1a1a }}
h1 {{ font-size: 1.5rem }} h2 {{ font-size: 1.15rem; margin-top: 2rem }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }}
th, td {{ text-align: left; padding: .25rem .6rem }}
tr:nth-child(even) {{ background: #f4f4f4 }} th {{ border-bottom: 2px solid #999 }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem }}
svg {{ width: 100%; height: auto }} .state-failed {{ color: #b00020 }} .state-completed {{ color: #00695c }}
.scroll {{ overflow-x: auto }}
</style>
<h1>{title}</h1>
<p>State: <b class="state-{state}">{state}</b> {reason}</p>
{privacy}
<div class="grid">{plots}</div>
<h2>Rounds</h2><div class="scroll">{rounds}</div>
<h2>Operations</h2><p>For the operator; what is counted here is not covered by any epsilon above.</p>
<div class="scroll">{operations}</div>
<h2>Configuration</h2>{config}
<h2>Versions</h2>{versions}
"""


def write_report(folder: RunFolder) -> str:
    """Return the page of a run as HTML: plots as inline SVG, nothing loaded from anywhere.

    Raises PrivfedError when matplotlib is missing.
    """
    rounds, status = folder.rounds, folder.status
    versions = json_decoder(dict[str, Any]).decode((folder.path / "versions.json").read_bytes())
    operations = folder.operations
    plots = [
        _plot("Metrics", _series(rounds, _is_metric), "round"),
        _epsilon_plot(rounds),
        _plot("Participation", _counts(operations, ("nodes", "valid", "excluded")), "round", whole=True),
        _plot("Bytes of replies and instructions", _counts(operations, ("bytes_down", "bytes_up")), "round"),
        _plot("Secure-aggregation steps: nodes that answered", _stages(operations), "round", whole=True),
    ]
    config = folder.config
    return _PAGE.format(
        title=html.escape(f"{config.get('name', 'run')} · {folder.name}"),
        state=html.escape(status.state),
        reason=html.escape(status.reason),
        privacy=_privacy(rounds),
        plots="".join(plot for plot in plots if plot),
        rounds=_rounds_table(rounds),
        operations=_operations_table(operations),
        config=_table([(key, value) for key, value in flatten(config).items()]),
        versions=_table(list(versions.items())),
    )


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested tables: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat.update(flatten(item, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


_PARTICIPATION = ("valid", "nodes", "excluded", "survivors", "cohort", "dropped", "missing")


def _is_participation(name: str) -> bool:
    return _last(name) in _PARTICIPATION


def _is_metric(name: str) -> bool:
    other = ("round", "delta", "epsilon", "error-bound", "noise-multiplier", "clip", "denominator")
    return not (
        name.startswith("privacy.")
        or _is_participation(name)
        or "bytes" in name
        or "seconds" in name
        or _last(name) in other
    )


def _series(rounds: Rounds, wanted: Callable[[str], bool]) -> Series:
    series: Series = {}
    for place, metrics in enumerate(rounds):
        for name, value in flatten(metrics).items():
            if isinstance(value, int | float) and not isinstance(value, bool) and wanted(name):
                xs, ys = series.setdefault(name, ([], []))
                xs.append(int(metrics.get("round", place + 1)))
                ys.append(float(value))
    return series


def _counts(operations: Rounds, names: Sequence[str]) -> Series:
    series: Series = {}
    for entry in operations:
        if entry.get("event") == "replies":
            for name in names:
                xs, ys = series.setdefault(f"{entry.get('kind')} {name}", ([], []))
                xs.append(int(entry.get("round", 0)))
                ys.append(float(entry.get(name, 0)))
    return series


def _stages(operations: Rounds) -> Series:
    series: Series = {}
    for entry in operations:
        if entry.get("event") == "stage":
            xs, ys = series.setdefault(f"{entry.get('kind')} {entry.get('stage')}", ([], []))
            xs.append(int(entry.get("round", 0)))
            ys.append(float(entry.get("answered", 0)))
    return series


def _operations_table(operations: Rounds) -> str:
    """Sum the steps of all rounds: how many were asked, how many vanished, how many bytes went."""
    totals: dict[str, list[int]] = {}
    for entry in operations:
        if entry.get("event") == "stage":
            row = totals.setdefault(f"{entry.get('kind')} {entry.get('stage')}", [0, 0, 0, 0])
            gone = int(entry.get("asked", 0)) - int(entry.get("answered", 0))
            found = (entry.get("asked", 0), gone, entry.get("bytes_down", 0), entry.get("bytes_up", 0))
            totals[f"{entry.get('kind')} {entry.get('stage')}"] = [a + int(b) for a, b in zip(row, found, strict=True)]
    causes: dict[str, int] = {}
    for entry in operations:
        if entry.get("event") == "excluded":
            causes[str(entry.get("cause"))] = causes.get(str(entry.get("cause")), 0) + 1
    head = "".join(f"<th>{name}</th>" for name in ("step", "asked", "did not answer", "bytes down", "bytes up"))
    body = "".join(
        f"<tr><td>{html.escape(name)}</td>" + "".join(f"<td>{_text(v)}</td>" for v in row) + "</tr>"
        for name, row in totals.items()
    )
    steps = f"<table><tr>{head}</tr>{body}</table>" if totals else "<p>No secure aggregation.</p>"
    excluded = _table([(f"excluded: {cause}", count) for cause, count in causes.items()])
    return steps + (excluded if causes else "")


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PrivfedError("the report needs matplotlib: pip install 'privfed[report]'") from None
    return Figure(figsize=(5.2, 3.2), layout="constrained")


def _svg(figure: Any) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return "<div>" + text[text.index("<svg") :] + "</div>"


def _plot(title: str, series: Series, label: str, *, whole: bool = False) -> str:
    if not series:
        return ""
    figure = _figure()
    axes = figure.subplots()
    for name, (xs, ys) in sorted(series.items()):
        axes.plot(xs, ys, marker="o", markersize=3, label=name)
    axes.set_title(title)
    axes.set_xlabel(label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if whole:
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return _svg(figure)


def _spent(rounds: Rounds) -> list[tuple[int, Mapping[str, Any]]]:
    found = []
    for place, metrics in enumerate(rounds):
        privacy = metrics.get("privacy", metrics)
        if isinstance(privacy, Mapping) and "epsilon" in privacy:
            found.append((int(metrics.get("round", place + 1)), privacy))
    return found


def _epsilon_plot(rounds: Rounds) -> str:
    spent = _spent(rounds)
    if not spent:
        return ""
    figure = _figure()
    axes = figure.subplots()
    xs = [number for number, _ in spent]
    upper = [float(privacy["epsilon"]) for _, privacy in spent]
    axes.plot(xs, upper, color="#b00020", label="epsilon, upper bound")
    lower = [float(privacy["epsilon-lower"]) for _, privacy in spent if "epsilon-lower" in privacy]
    if len(lower) == len(upper):
        axes.fill_between(xs, lower, upper, color="#b00020", alpha=0.2)
    budget = spent[-1][1].get("budget", spent[-1][1].get("epsilon-budget"))
    if isinstance(budget, int | float):
        axes.axhline(float(budget), color="#444", linestyle="--", label=f"budget {budget:g}")
    axes.set_ylim(bottom=0)
    axes.set_title("Privacy spent")
    axes.set_xlabel("round")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return _svg(figure)


def _privacy(rounds: Rounds) -> str:
    spent = _spent(rounds)
    if not spent:
        return "<p>No privacy plan: nothing is claimed about what the models reveal.</p>"
    last = spent[-1][1]
    rows = [(name, value) for name, value in last.items() if isinstance(value, str | int | float)]
    return "<h2>Privacy</h2>" + _table(rows)


def _rounds_table(rounds: Rounds) -> str:
    flat = [flatten(metrics) for metrics in rounds]
    names = list(dict.fromkeys(name for row in flat for name in row))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{_text(row.get(name, ''))}</td>" for name in names) + "</tr>" for row in flat)
    return f"<table><tr>{head}</tr>{body}</table>" if names else "<p>No round was committed.</p>"


def _table(rows: Sequence[tuple[str, Any]]) -> str:
    return (
        "<table>"
        + "".join(f"<tr><td>{html.escape(name)}</td><td>{_text(v)}</td></tr>" for name, v in rows)
        + "</table>"
    )


def _text(value: object) -> str:
    return html.escape(f"{value:.5g}" if isinstance(value, float) else str(value))
