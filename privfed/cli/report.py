"""`privfed report`: one HTML page about a run."""

from __future__ import annotations

from pathlib import Path

import click

from privfed.cli.remote import superlink_options


@click.command()
@click.argument("run")
@superlink_options
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="File [default: in the run folder]."
)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def report(run: str, superlink: str | None, keys: Path | None, output: Path | None, debug: bool) -> None:
    """Write one self-contained HTML page about RUN (a name, the beginning of one, or a folder).

    With --superlink its metrics are fetched first, as `privfed fetch --model none` does.
    """
    from privfed.report import write_report
    from privfed.runtime.run_folder import RunFolder, find_run

    del debug
    if superlink is not None:
        from privfed.cli.fetch import bring

        folder = RunFolder.open(bring(superlink, keys, run, None, "none")[0])
    else:
        folder = RunFolder.open(find_run(run))
    target = output or folder.path / "report.html"
    target.write_text(write_report(folder), encoding="utf-8")
    click.echo(str(target))
