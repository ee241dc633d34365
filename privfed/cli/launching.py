"""What --isolation, --exec-socket and --exec-group say: where the processes of apps come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from privfed.errors import AppError

if TYPE_CHECKING:
    from privfed.runtime.confinement import Limits
    from privfed.runtime.launcher import Launcher

F = TypeVar("F", bound=Callable[..., Any])


def make_folder(path: Path, option: str) -> Path:
    """Make a folder of this user alone, and return it. Raises AppError naming the option when that cannot be done."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as fault:
        raise AppError(f"{option} {path} cannot be made: {fault.strerror}; give a folder this user may write") from None
    return path


def launching_options(apps: str, home: str) -> Callable[[F], F]:
    """Return what adds --isolation, --exec-socket and --exec-group. apps, home: what a command calls its own."""

    def add(command: F) -> F:
        isolation = click.option(
            "--isolation",
            type=click.Choice(["inline", "subprocess", "external"]),
            default="subprocess",
            show_default=True,
            help=f"Where {apps} run: in this process, in a confined child, or by a `privfed superexec`.",
        )
        socket = click.option(
            "--exec-socket",
            type=click.Path(path_type=Path),
            help=f"Socket of --isolation external [{home}/exec.sock].",
        )
        group = click.option(
            "--exec-group", metavar="NAME|ID", help="Group that the user of the superexec shares with this one."
        )
        return isolation(socket(group(command)))

    return add


@dataclass(frozen=True, slots=True)
class Launching:
    """isolation: inline, subprocess or external. socket, group: of external; None is the default, and no group."""

    isolation: str
    socket: Path | None = None
    group: int | None = None

    @classmethod
    def chosen(cls, isolation: str, socket: Path | None, group: str | None) -> Launching:
        """Read what the command line says. Raises AppError for what does not go together."""
        if (socket is not None or group is not None) and isolation != "external":
            raise AppError("--exec-socket and --exec-group go with --isolation external")
        return cls(isolation, socket, _group(group))

    def launcher(self, home: Path, processes: str, limits: Limits) -> Launcher:
        """Return the launcher. home: the folder of whoever launches; processes: the one in it for those of apps."""
        from privfed.runtime.launcher import InlineLauncher, ProcessLauncher

        if self.isolation == "inline":
            click.echo("warning: --isolation inline: apps run in this process and can do all it can", err=True)
            return InlineLauncher()
        if self.isolation == "subprocess":
            return ProcessLauncher(home / processes, limits)
        from privfed.runtime.superexec import ExecHost

        host = ExecHost(self.socket or home / "exec.sock", limits, self.group)
        click.echo(
            f"waiting for: privfed superexec --connect unix:{host.path} --token-file {host.token_file}", err=True
        )
        return ProcessLauncher(home / processes, limits, host.spawn, host.prepare, host.close, host.waits_for)


def _group(name: str | None) -> int | None:
    import grp

    if name is None or name.isdecimal():
        return int(name) if name else None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise AppError(f"--exec-group: there is no group {name!r} on this system") from None
