"""`privfed policy`: what this node lets anybody do with its data."""

from __future__ import annotations

from pathlib import Path

import click

POLICY = click.Path(dir_okay=False, path_type=Path)
_debug = click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
_policy = click.option("--policy", "path", type=POLICY, default="policy.toml", show_default=True, help="The file.")


@click.group()
def policy() -> None:
    """Write, check and extend a node's policy.toml."""


@policy.command()
@_policy
@_debug
def new(path: Path) -> None:
    """Write a strict policy to begin with: no app runs, distributed noise only, epsilon 8 a run."""
    from privfed.runtime.policy import TEMPLATE, NodePolicy, PolicyError

    if path.exists():
        raise PolicyError(f"{path} exists: it is not replaced")
    path.write_text(TEMPLATE, encoding="utf-8")
    NodePolicy.load(path)
    click.echo(f"wrote {path}; read it, then give it to `privfed supernode --policy {path}`")


@policy.command()
@click.argument("bundle_file", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--keys", type=click.Path(exists=True, file_okay=False, path_type=Path), help="This node's key folder.")
@_policy
@_debug
def check(bundle_file: Path | None, keys: Path | None, path: Path) -> None:
    """Check the policy file; with BUNDLE_FILE, whether this node would run that app. Exit code 3: it would not."""
    from privfed.runtime.bundle import open_bundle
    from privfed.runtime.credentials import Credentials
    from privfed.runtime.policy import NodePolicy, PolicyRefusal

    held = NodePolicy.load(path)
    click.echo(f"{path} is a valid policy")
    for warning in _remarks(held):
        click.echo(f"note: {warning}")
    if bundle_file is None:
        return
    trust = Credentials.load(keys).trust if keys is not None else None
    bundle = open_bundle(bundle_file.read_bytes())
    try:
        click.echo(f"app {bundle.name!r} may run: {held.approve(bundle, trust)}")
    except PolicyRefusal as refusal:
        click.echo(str(refusal), err=True)
        if trust is None and bundle.signatures:
            click.echo("give --keys, this node's key folder, to judge its signatures", err=True)
        raise click.exceptions.Exit(3) from None


def _remarks(policy: object) -> list[str]:
    from privfed.runtime.policy import NodePolicy

    assert isinstance(policy, NodePolicy)
    found = []
    if not policy.apps.signers and not policy.apps.bundles:
        found.append("no app may run: approve a bundle or a signer")
    if "none" in policy.privacy.plans and policy.privacy.limited:
        found.append('plan "none" is allowed, but epsilon is limited: updates without noise are refused')
    if not policy.secure_aggregation.required:
        found.append("updates may leave in the clear: [secure-aggregation] required is false")
    if "central" in policy.privacy.plans and policy.privacy.observer == "server" and policy.privacy.limited:
        found.append(
            'central plans are refused: against the server they cost an infinite epsilon (observer = "server")'
        )
    return found


@policy.command()
@click.argument("bundle_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@_policy
@_debug
def approve(bundle_file: Path, path: Path) -> None:
    """Let this node run the app in BUNDLE_FILE. Look at its code first: `unzip` shows it."""
    from privfed.runtime.bundle import open_bundle
    from privfed.runtime.policy import approve_in_file

    bundle = open_bundle(bundle_file.read_bytes())
    fresh = approve_in_file(path, bundle.digest)
    click.echo(f"app {bundle.name!r} ({bundle.digest}) {'is now' if fresh else 'was already'} approved in {path}")
