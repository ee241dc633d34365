"""Commands against a SuperLink: what `privfed run`, `ls`, `log` and `stop` do with --superlink."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from privfed.errors import AppError, RunFailed

if TYPE_CHECKING:
    from privfed.cli.display import Listener
    from privfed.runtime.control import ControlClient, RunRow, Submission

ENDED = ("completed", "failed", "stopped")
RETRY_SECONDS = 600.0
"""How long one who follows a run waits for a SuperLink that is away."""
_PAUSE = 1.0
F = TypeVar("F", bound=Callable[..., Any])


def superlink_options(command: F) -> F:
    """Add --superlink and --keys to a command."""
    link = click.option(
        "--superlink",
        metavar="HOST:PORT[,...]",
        help="The control address of a SuperLink, or of several that stand in for each other [this machine].",
    )
    keys = click.option(
        "--keys", type=click.Path(path_type=Path), help="Your key folder, or one with `ca.pem` and a bearer `token`."
    )
    return link(keys(command))


def connect(superlink: str, keys: Path | None) -> ControlClient:
    """Return a connection to a SuperLink."""
    from privfed.runtime.control import ControlClient
    from privfed.runtime.credentials import BearerToken, Credentials
    from privfed.runtime.handshake import NetworkError, is_loopback, read_addresses

    try:
        addresses = read_addresses(superlink)
    except NetworkError as fault:
        raise AppError(f"--superlink {fault}; it is the control address the SuperLink prints") from None
    if keys is None and not all(map(is_loopback, addresses)):
        print(f"INSECURE: without --keys, what goes to {superlink} can be read and changed on the way", file=sys.stderr)
    if keys is not None and BearerToken.holds(keys):
        return ControlClient(superlink, BearerToken(keys))
    return ControlClient(superlink, Credentials.load(keys) if keys is not None else None)


def submit(superlink: str, keys: Path | None, submission: Submission, detach: bool, form: str) -> None:
    """Start a run there, and follow it unless detached."""
    with connect(superlink, keys) as control:
        row = control.submit(submission)
        if detach:
            click.echo(json.dumps({"run": row.name}) if form == "json" else row.name)
            return
        attend(control, row, form)


def resume(superlink: str, keys: Path | None, name: str, detach: bool, form: str) -> None:
    """Go on with a run there."""
    with connect(superlink, keys) as control:
        shown = [piece.offset for piece in control.follow(name, "events", until_end=False)]
        row = control.resume(name)
        if detach:
            click.echo(json.dumps({"run": row.name}) if form == "json" else row.name)
            return
        attend(control, row, form, shown[-1])


def attend(control: ControlClient, row: RunRow, form: str, offset: int = 0) -> None:
    """Show a run until it ends; Ctrl-C leaves it alone. Raises RunFailed when it fails."""
    from privfed.cli.display import display

    print(f"run {row.name} on {control.address}; Ctrl-C detaches, the run goes on", file=sys.stderr)
    try:
        state, reason = follow(control, row.name, display(form), offset)
    except KeyboardInterrupt:
        print(
            f"\ndetached: the run goes on. `privfed log -f {row.name} --superlink {control.address}` shows it, "
            f"`privfed stop {row.name} --superlink {control.address}` stops it",
            file=sys.stderr,
        )
        raise click.exceptions.Exit(130) from None
    if state == "failed":
        raise RunFailed(reason)
    if state == "stopped":
        print(f"stopped: {reason}", file=sys.stderr)
    print(
        f"`privfed fetch {row.name} --superlink {control.address}` brings its model and metrics here", file=sys.stderr
    )


def follow(control: ControlClient, name: str, listener: Listener, offset: int = 0) -> tuple[str, str]:
    """Pass events on as they come, over restarts of the SuperLink; return how the run ended and why."""
    from privfed.runtime.handshake import NetworkError, Refused

    told = ""
    away: float | None = None
    while True:
        try:
            for piece in control.follow(name, "events", offset):
                away = None
                offset = piece.offset
                for line in piece.data.splitlines():
                    event: Mapping[str, object] = json.loads(line)
                    listener(str(event["event"]), {key: value for key, value in event.items() if key != "event"})
                if piece.state in ENDED:
                    return piece.state, piece.reason
                if piece.reason != told and worth_telling(piece.state, piece.reason):
                    told = piece.reason
                    print(f"{piece.state}: {told}", file=sys.stderr)
        except Refused:
            raise
        except NetworkError as fault:
            away = away if away is not None else time.monotonic()
            if time.monotonic() - away > RETRY_SECONDS:
                raise
            if told != str(fault):
                told = str(fault)
                print(f"{told}; trying again", file=sys.stderr)
        time.sleep(_PAUSE)


def worth_telling(state: str, reason: str) -> bool:
    """Return whether one who follows a run is told what it waits for: not for replies that are on their way."""
    usual = reason.startswith("waits for replies") and "not connected" not in reason
    return state == "pending" or (reason.startswith("waits for") and not usual)


def show_runs(superlink: str, keys: Path | None, limit: int, form: str) -> None:
    """List the runs of a SuperLink."""
    with connect(superlink, keys) as control:
        rows = control.runs(limit)
    if form == "json":
        names = ("name", "app", "state", "round", "reason", "by", "nodes")
        click.echo(json.dumps([{name: getattr(row, name) for name in names} for row in rows]))
        return
    if not rows:
        click.echo(f"no runs on {superlink}")
    for row in rows:
        text = f"{row.name:<24} {row.state:<10} round {row.round:<4} {row.app:<16} {row.by:<16} {row.reason}"
        click.echo(text.rstrip())


def show_log(superlink: str, keys: Path | None, name: str, follow: bool) -> None:
    """Show the log of a run of a SuperLink."""
    with connect(superlink, keys) as control:
        for piece in control.follow(name, "log", until_end=follow):
            click.echo(piece.data.decode(errors="replace"), nl=False)


def stop_run(superlink: str, keys: Path | None, name: str, wait: float) -> None:
    """Ask a run of a SuperLink to stop, and wait for it."""
    with connect(superlink, keys) as control:
        row = control.stop(name)
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline and row.state not in ENDED:
            time.sleep(0.1)
            row = control.show(row.name)
    if wait and row.state not in ENDED:
        raise AppError(f"run {row.name} is still in its round after {wait:g} s; it stops when the round ends")
    click.echo(f"{row.name}: {row.state if wait else 'asked to stop'}")
