"""`privfed fetch`: the results of a run of a SuperLink, on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from privfed.cli.remote import connect, superlink_options
from privfed.errors import AppError

if TYPE_CHECKING:
    from privfed.runtime.result import ResultRows

_CHOICES = {"none": "none", "last": "newest", "kept": "all"}


@click.command()
@click.argument("run")
@superlink_options
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder [default: among the runs of this machine].",
)
@click.option(
    "--model",
    type=click.Choice(list(_CHOICES)),
    default="last",
    show_default=True,
    help="Which models: none, that of the last round, or all that were kept.",
)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def fetch(run: str, superlink: str | None, keys: Path | None, output: Path | None, model: str, debug: bool) -> None:
    """Bring the model, metrics and logs of RUN from a SuperLink; what broke off goes on where it did.

    For whoever submitted the run, and for operators. The folder is a run folder like those of simulations, with the
    model also as model.safetensors.
    """
    del debug
    if superlink is None:
        raise AppError("say where the run is: --superlink HOST:PORT; a run on this machine is in its folder already")
    folder, rows = bring(superlink, keys, run, output, _CHOICES[model])
    print(f"run {rows.run}: {rows.state}, round {rows.round}", file=sys.stderr)
    click.echo(str(folder))


def bring(superlink: str, keys: Path | None, run: str, output: Path | None, models: str) -> tuple[Path, ResultRows]:
    """Fetch a run into a folder, by default under its name among the runs of this machine; return where, and what."""
    from privfed.runtime.run_folder import home
    from privfed.runtime.take_home import fetch as fetch_results

    with connect(superlink, keys) as control:
        name = control.show(run).name
        if not name.replace("-", "").isalnum():
            raise AppError(f"the SuperLink calls the run {name[:80]!r}, which is no name of a folder")
        folder = output or home() / "runs" / name
        return folder, fetch_results(control, name, folder, models, _progress if sys.stderr.isatty() else _quiet)


def _progress(path: str, here: int, size: int) -> None:
    end = "\n" if here == size else ""
    print(f"\r{path}: {here / 1e6:.1f} of {size / 1e6:.1f} MB", end=end, file=sys.stderr, flush=True)


def _quiet(path: str, here: int, size: int) -> None: ...
