"""`privfed build`: an app folder as one signed file."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("app", type=click.Path(exists=True, path_type=Path))
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="[default: NAME-DIGEST.pfb]")
@click.option("--sign", "keys", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Key folder.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def build(app: Path, out: Path | None, keys: Path | None, form: str, debug: bool) -> None:
    """Pack the app in the folder APP into a bundle; or, given a bundle, sign it once more (--sign) or describe it.

    The same files make the same digest on every machine; nodes approve a bundle by its digest or by a signer.
    """
    from privfed.runtime.bundle import add_signature, open_bundle
    from privfed.runtime.bundle import build as pack
    from privfed.runtime.credentials import Credentials
    from privfed.runtime.disk import write_atomically

    del debug
    signer = Credentials.load(keys) if keys is not None else None
    if app.is_dir():
        data = pack(app, signer)
    else:
        data = app.read_bytes()
        if signer is not None:
            data, out = add_signature(data, signer), out or app
    bundle = open_bundle(data)
    if app.is_dir() or signer is not None:
        out = out or Path(f"{bundle.name}-{bundle.digest[:12]}.pfb")
        write_atomically(out, data)
    facts = {
        "bundle": str(out or app),
        "name": bundle.name,
        "digest": bundle.digest,
        "files": len(bundle.files),
        "bytes": len(data),
        "signatures": len(bundle.signatures),
    }
    if form == "json":
        click.echo(json.dumps(facts))
        return
    for key, value in facts.items():
        click.echo(f"{key:<11}{value}")
