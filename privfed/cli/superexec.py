"""`privfed superexec`: runs the processes of apps for a node or a SuperLink on this machine."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from privfed import failpoint
from privfed.cli.display import log_options
from privfed.errors import AppError

if TYPE_CHECKING:
    from privfed.runtime.confinement import Limits

RETRY_SECONDS = 0.25
"""An attempt is one call on a local socket, and a run may be waiting for it."""


@click.command()
@click.option("--connect", required=True, metavar="unix:PATH", help="The socket at which it is awaited.")
@click.option(
    "--token-file",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Proves that this superexec is the operator's; written beside the socket.",
)
@click.option(
    "--app-network",
    type=click.Choice(["off", "auto", "on"]),
    default="auto",
    show_default=True,
    help="The most network that apps get, whatever is asked for: none, none where the system can do that, or all.",
)
@click.option("--memory-mib", type=click.IntRange(min=64), help="Most memory of one app process [no limit].")
@log_options
def superexec(
    connect: str, token_file: Path, app_network: str, memory_mib: int | None, log_format: str, debug: bool
) -> None:
    """Start and end the processes of apps for a SuperNode or a SuperLink with --isolation external.

    \b
    privfed superexec --connect unix:DATA/exec.sock --token-file DATA/exec.token      a node's ClientApps
    privfed superexec --connect unix:HOME/exec.sock --token-file HOME/exec.token      a SuperLink's ServerApps

    Run it as another user than they, of a group that both are in (their --exec-group), so that apps cannot read what
    they keep. It connects again when they restart; SIGTERM ends it and every app.
    """
    from privfed.cli.journal import configure
    from privfed.runtime.confinement import Limits

    configure(log_format, debug=debug)
    failpoint.take_up("superexec")
    kind, _, path = connect.partition(":")
    if kind != "unix" or not path:
        raise AppError(f"--connect {connect!r}: write unix:PATH")
    cap = Limits(network=app_network, memory=memory_mib * (1 << 20) if memory_mib else None)
    # `run` waits for requests; an exception in it ends its processes, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        _serve(Path(path), token_file, cap)


def _serve(path: Path, token_file: Path, cap: Limits) -> None:
    """Serve whoever listens at the path, for ever."""
    from privfed.runtime.superexec import ExecError, SuperExec

    told = ""
    while True:
        try:
            # Read every time: a node that restarts writes a new token.
            SuperExec(path, token_file.read_text().strip(), cap).run()
        except (ExecError, OSError) as fault:
            missing = f"there is no {token_file}: is who wrote it running, with --isolation external?"
            text = missing if isinstance(fault, FileNotFoundError) else str(fault)
            if text != told:
                told = text
                logging.getLogger("privfed.exec").warning("%s; trying again", told)
            time.sleep(RETRY_SECONDS)
