"""`privfed node`: which nodes a SuperLink serves."""

from __future__ import annotations

import json
from pathlib import Path

import click

from privfed.cli.remote import connect, superlink_options
from privfed.errors import AppError


@click.group()
def node() -> None:
    """List, approve and revoke the nodes of a SuperLink."""


def _address(superlink: str | None) -> str:
    if superlink is None:
        raise AppError("say which SuperLink: --superlink HOST:PORT, the control address it prints")
    return superlink


@node.command("ls")
@superlink_options
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def list_nodes(superlink: str | None, keys: Path | None, form: str, debug: bool) -> None:
    """List the nodes that a SuperLink knows."""
    del debug
    with connect(_address(superlink), keys) as control:
        rows = list(control.nodes())
    if form == "json":
        names = ("node_id", "name", "state", "connected", "seen")
        click.echo(json.dumps([{name: getattr(row, name) for name in names} for row in rows]))
        return
    if not rows:
        click.echo("no node has called yet")
    for row in rows:
        click.echo(f"{row.node_id:<20} {row.state:<10} {'connected' if row.connected else '-':<10} {row.name}")


@node.command()
@click.argument("node_id", type=click.IntRange(min=1))
@superlink_options
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def approve(node_id: int, superlink: str | None, keys: Path | None, debug: bool) -> None:
    """Serve NODE_ID from now on."""
    del debug
    with connect(_address(superlink), keys) as control:
        control.approve(node_id)
    click.echo(f"node {node_id}: approved")


@node.command()
@click.argument("node_id", type=click.IntRange(min=1))
@superlink_options
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def revoke(node_id: int, superlink: str | None, keys: Path | None, debug: bool) -> None:
    """Serve NODE_ID no more, and disconnect it."""
    del debug
    with connect(_address(superlink), keys) as control:
        control.revoke(node_id)
    click.echo(f"node {node_id}: revoked")


@node.command()
@click.argument("roster_file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@superlink_options
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def roster(roster_file: Path, superlink: str | None, keys: Path | None, debug: bool) -> None:
    """Hand ROSTER_FILE, as the authority signed it, to a SuperLink, which hands it on to its nodes."""
    del debug
    with connect(_address(superlink), keys) as control:
        version = control.hand_roster(roster_file.read_bytes())
    click.echo(f"the roster in force has version {version}")
