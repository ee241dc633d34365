"""`privfed ls`, `log` and `stop`: the runs on this machine, or of a SuperLink."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from privfed.cli.remote import show_log, show_runs, stop_run, superlink_options
from privfed.errors import AppError


@click.command()
@superlink_options
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="Newest runs to show.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def ls(superlink: str | None, keys: Path | None, limit: int, form: str, debug: bool) -> None:
    """List the runs on this machine, or of a SuperLink, newest last; a run that waits says for what."""
    del debug
    if superlink is not None:
        show_runs(superlink, keys, limit, form)
        return
    from privfed.runtime.run_folder import RunFolderError, home, list_runs

    rows = []
    for folder in list_runs()[-limit:]:
        try:
            status, config = folder.status, folder.config
        except RunFolderError as fault:
            rows.append({"run": folder.name, "app": "?", "state": "broken", "round": 0, "reason": str(fault)})
            continue
        row = {"run": folder.name, "app": config.get("name", ""), "state": status.state, "round": status.round}
        rows.append({**row, "reason": status.reason})
    if form == "json":
        click.echo(json.dumps(rows))
        return
    if not rows:
        click.echo(f"no runs in {home() / 'runs'}")
    for row in rows:
        click.echo(
            f"{row['run']:<24} {row['state']:<10} round {row['round']:<4} {row['app']:<16} {row['reason']}".rstrip()
        )


@click.command()
@click.argument("run")
@superlink_options
@click.option("--follow", "-f", is_flag=True, help="Go on until the run ends.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def log(run: str, superlink: str | None, keys: Path | None, follow: bool, debug: bool) -> None:
    """Show the log of RUN (a name, the beginning of one, or a folder)."""
    del debug
    if superlink is not None:
        show_log(superlink, keys, run, follow)
        return
    from privfed.runtime.run_folder import ENDED, RunFolder, find_run

    folder = RunFolder.open(find_run(run))
    path, at = folder.path / "log.txt", 0
    while True:
        ended = folder.status.state in ENDED
        if path.exists():
            with path.open(encoding="utf-8") as file:
                file.seek(at)
                text = file.read()
                at = file.tell()
            click.echo(text, nl=False)
        if ended or not follow:
            return
        time.sleep(0.2)


@click.command()
@click.argument("run")
@superlink_options
@click.option("--wait", type=click.FloatRange(min=0), default=60.0, show_default=True, help="Seconds to wait; 0: none.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def stop(run: str, superlink: str | None, keys: Path | None, wait: float, debug: bool) -> None:
    """Ask RUN to stop after its current round; it can be resumed."""
    del debug
    if superlink is not None:
        stop_run(superlink, keys, run, wait)
        return
    from privfed.runtime.run_folder import ENDED, RunFolder, find_run

    folder = RunFolder.open(find_run(run))
    if folder.status.state in ENDED:
        raise AppError(f"run {folder.name} is {folder.status.state} already")
    folder.request_stop()
    deadline = time.monotonic() + wait
    while time.monotonic() < deadline and folder.status.state not in ENDED:
        time.sleep(0.05)
    if wait and folder.status.state not in ENDED:
        raise AppError(f"run {folder.name} is still in its round after {wait:g} s; it stops when the round ends")
    click.echo(f"{folder.name}: {folder.status.state if wait else 'asked to stop'}")
