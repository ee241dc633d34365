"""`privfed run`: an app, or a run to go on with, in a simulation on this machine or on the nodes of a SuperLink."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from privfed.cli.remote import superlink_options
from privfed.errors import AppError

if TYPE_CHECKING:
    from privfed.cli.display import Listener
    from privfed.runtime.run_folder import RunFolder


@click.command()
@click.argument("app", required=False, type=click.Path(path_type=Path))
@superlink_options
@click.option(
    "--nodes",
    type=click.IntRange(min=1),
    help="Simulated nodes [default: the app's, or 10]; of a SuperLink: connected ones to wait for [default: all].",
)
@click.option("-c", "--config", "settings", multiple=True, metavar="KEY=VALUE", help="Change a setting; repeatable.")
@click.option("--seed", type=int, help="Drives data, partition, initial model and training, never masks or noise.")
@click.option("--threads", type=click.IntRange(min=1), help="Worker threads [default: one a core].")
@click.option("--run-dir", type=click.Path(path_type=Path), help="Where to keep the run [default: $PRIVFED_HOME/runs].")
@click.option("--keep", default="last:3", show_default=True, help="Checkpoints to keep: last:N, best[:METRIC].")
@click.option("--resume", metavar="RUN", help="Go on from the last committed round of a run.")
@click.option("--detach", is_flag=True, help="Run in the background; print the run's name.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def run(
    app: Path | None,
    superlink: str | None,
    keys: Path | None,
    nodes: int | None,
    settings: tuple[str, ...],
    seed: int | None,
    threads: int | None,
    run_dir: Path | None,
    keep: str,
    resume: str | None,
    detach: bool,
    form: str,
    debug: bool,
) -> None:
    """Run the app in the folder APP, or go on with a run (--resume).

    The run leaves a folder with its configuration, metrics, checkpoints, privacy ledger and log. With --superlink it
    runs on the nodes of a federation, APP may be a bundle too, and the folder is there.
    """
    if superlink is not None:
        if threads is not None or run_dir is not None:
            raise AppError("--threads and --run-dir are for simulations: leave them out with --superlink")
        _run_there(superlink, keys, app, settings, (seed, nodes, keep), resume, detach, form)
        return
    from privfed.cli.display import display
    from privfed.runtime.run_folder import Keep, RunFolder

    del debug
    listener, kept = display(form), Keep.parse(keep)
    if resume is None:
        folder = RunFolder.create(run_dir, _asked(app, nodes, settings, seed), keep=kept, listener=listener)
    else:
        if app is not None or nodes is not None or settings or seed is not None or run_dir is not None:
            raise AppError("--resume takes the app, nodes, settings and seed from the run: give none of them")
        folder = RunFolder.open(_resumable(resume), keep=kept, listener=listener)
    if detach:
        _detach(folder.path, keep, threads)
        click.echo(json.dumps({"run": folder.name}) if form == "json" else folder.name)
        return
    _simulate(folder, threads, listener)


def _run_there(
    superlink: str,
    keys: Path | None,
    app: Path | None,
    settings: tuple[str, ...],
    how: tuple[int | None, int | None, str],
    resume: str | None,
    detach: bool,
    form: str,
) -> None:
    from privfed.cli import remote
    from privfed.runtime.control import Submission
    from privfed.runtime.federation import open_app

    if resume is not None:
        if app is not None or settings or how[:2] != (None, None):
            raise AppError("--resume takes the app, nodes, settings and seed from the run: give none of them")
        remote.resume(superlink, keys, resume, detach, form)
        return
    if app is None:
        raise AppError("say which app: `privfed run FOLDER --superlink HOST:PORT` (or --resume RUN)")
    from privfed.runtime.credentials import BearerToken, Credentials

    seed, nodes, keep = how
    signer = Credentials.load(keys) if keys is not None and not BearerToken.holds(keys) else None
    submission = Submission(open_app(app, signer), _pairs(settings), seed, nodes, keep)
    remote.submit(superlink, keys, submission, detach, form)


def _asked(app: Path | None, nodes: int | None, settings: tuple[str, ...], seed: int | None) -> dict[str, object]:
    from privfed.runtime.app_folder import AppFolder

    if app is None:
        raise AppError("say which app: `privfed run FOLDER` (or --resume RUN)")
    manifest = AppFolder.open(app)
    return {
        "app": str(manifest.path),
        "name": manifest.name,
        "run-config": manifest.with_config(_pairs(settings)),
        "nodes": nodes or manifest.nodes,
        "seed": seed,
    }


def _resumable(name: str) -> Path:
    from privfed.runtime.run_folder import RunFolder, find_run

    folder = RunFolder.open(find_run(name))
    status = folder.status
    # A detached run is handed to its own process as pending.
    if status.state in ("running", "pending") and status.process != os.getpid():
        raise AppError(f"run {folder.name} is running in process {status.process}: stop it first")
    if status.state == "completed":
        raise AppError(f"run {folder.name} is completed: there is nothing left to do")
    return folder.path


def _simulate(folder: RunFolder, threads: int | None, listener: Listener) -> None:
    from privfed.runtime.app_folder import AppFolder
    from privfed.runtime.simulation import run_simulation

    config = folder.config
    server_app, client_app = AppFolder.open(Path(config["app"])).load()
    listener("run", {"name": folder.name, "app": config["name"], "nodes": config["nodes"], "folder": str(folder.path)})
    result = run_simulation(
        server_app,
        client_app,
        config["nodes"],
        run_config=config["run-config"],
        seed=config["seed"],
        threads=threads,
        run_dir=folder,
    )
    listener("ended", {"state": result.status, "rounds": len(result.rounds), "folder": str(folder.path)})


def _pairs(settings: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise AppError(f"-c {setting!r}: write -c key=value")
        pairs[key.strip()] = value.strip().strip("\"'")
    return pairs


def _detach(path: Path, keep: str, threads: int | None) -> None:
    """Start the run in a process of its own session, which outlives this terminal."""
    from privfed.runtime.run_folder import RunFolder, Status

    command = [sys.executable, "-m", "privfed.cli.main", "run", "--resume", str(path), "--keep", keep]
    command += ["--threads", str(threads)] if threads else []
    # A pending run is taken over by the process that resumes it: hand it over as stopped.
    folder = RunFolder.open(path)
    folder.set_status(Status("stopped", "about to start in the background", started=folder.status.started))
    with (path / "output.txt").open("ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, env={**os.environ}
        )
    folder.set_status(Status("pending", "", process=process.pid, started=folder.status.started))
