"""`privfed new`: a new app from a template."""

from __future__ import annotations

import re
from pathlib import Path

import click

from privfed.cli.template import TEMPLATES
from privfed.errors import AppError


@click.command()
@click.argument("name")
@click.option(
    "--template",
    type=click.Choice(sorted(TEMPLATES)),
    default="numpy",
    show_default=True,
    help="numpy: a linear model on made-up data, no dependency. sklearn: digits, with secure aggregation.",
)
@click.option("--path", type=click.Path(path_type=Path, file_okay=False), help="Where to make it [default: ./NAME].")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def new(name: str, template: str, path: Path | None, debug: bool) -> None:
    """Make a new app NAME from a template. Needs no network."""
    del debug
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
        raise AppError(f"app name {name!r} must start with a letter and hold only letters, digits, '-' and '_'")
    target = path or Path(name)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise AppError(f"{target} exists and is not empty: choose another name or --path")
    package = name.lower().replace("-", "_")
    for relative, text in TEMPLATES[template].items():
        file = target / relative.replace("PACKAGE", package)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.replace("PACKAGE", package).replace("APPNAME", name), encoding="utf-8")
    click.echo(f"Made {target}. Run it with:\n  privfed run {target}")
