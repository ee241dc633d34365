"""`privfed superlink`: the server side of a federation, until it is told to end."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from privfed import failpoint
from privfed.cli.display import log_options
from privfed.cli.launching import Launching, launching_options, make_folder
from privfed.errors import AppError

if TYPE_CHECKING:
    from privfed.runtime.launcher import Launcher
    from privfed.runtime.listeners import Listeners
    from privfed.runtime.oidc import Tokens
    from privfed.runtime.superlink import SuperLinkOptions
    from privfed.runtime.tenure import Tenure


@click.command()
@click.option("--fleet", default="127.0.0.1:7810", show_default=True, metavar="HOST:PORT", help="Where nodes connect.")
@click.option(
    "--control", default="127.0.0.1:7811", show_default=True, metavar="HOST:PORT", help="Where users connect."
)
@click.option("--monitor", metavar="HOST:PORT", help="Serve /healthz and /metrics there [default: nowhere].")
@click.option("--token-control", metavar="HOST:PORT", help="Where users with bearer tokens connect; needs --oidc.")
@click.option(
    "--oidc",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Whose tokens are taken: a TOML file, see docs/deployment.md.",
)
@click.option("--keys", type=click.Path(path_type=Path), help="The SuperLink's key folder, made with `privfed keys`.")
@click.option("--insecure", is_flag=True, help="No encryption, no identities; on loopback only.")
@click.option("--force-insecure", is_flag=True, help="Let --insecure listen where others can reach it.")
@click.option(
    "--home", type=click.Path(path_type=Path), help="Where everything is kept [default: $PRIVFED_HOME/superlink]."
)
@click.option("--database", metavar="URL", help="A PostgreSQL database [default: the SQLite file link.db in --home].")
@click.option("--arrays", metavar="URL", help="Large arrays go to s3://BUCKET/FOLDER [default: arrays/ in --home].")
@click.option(
    "--shared",
    type=click.Path(file_okay=False, path_type=Path),
    help="A folder that several SuperLinks on one --database see: one serves, and the others pass calls on to it.",
)
@click.option(
    "--advertise", metavar="HOST", help="Where the other SuperLinks reach this one [default: where it listens]."
)
@click.option(
    "--lease-seconds",
    type=click.FloatRange(min=1),
    default=5.0,
    show_default=True,
    help="With --shared: after so long without a sign of the one that serves, another one takes over.",
)
@launching_options("ServerApps", "HOME")
@log_options
def superlink(
    fleet: str,
    control: str,
    monitor: str | None,
    token_control: str | None,
    oidc: Path | None,
    keys: Path | None,
    insecure: bool,
    force_insecure: bool,
    home: Path | None,
    database: str | None,
    arrays: str | None,
    shared: Path | None,
    advertise: str | None,
    lease_seconds: float,
    isolation: str,
    exec_socket: Path | None,
    exec_group: str | None,
    log_format: str,
    debug: bool,
) -> None:
    """Serve a federation: nodes on --fleet, users on --control.

    \b
    privfed superlink --keys link --home link-home --fleet link.example.org:7810 --control link.example.org:7811
    On one machine:  privfed superlink --insecure --home link-home

    Runs are kept in --home, and go on from their last committed round after a restart. Ctrl-C and SIGTERM end it in
    good order, a second one at once. With --database and --shared, another SuperLink may be started elsewhere, with a
    --home of its own: nodes and users may connect to either, and it takes over within seconds when this one is gone.
    """
    from privfed.cli.journal import configure
    from privfed.runtime.credentials import Credentials, require_tls_1_3

    require_tls_1_3()
    failpoint.take_up("superlink")
    from privfed.runtime.run_folder import home as default_home
    from privfed.runtime.superlink import SuperLinkOptions

    _check_addresses({"--fleet": fleet, "--control": control, "--monitor": monitor, "--token-control": token_control})
    _check_pairs(insecure, keys, token_control, oidc, advertise, shared)
    launched = _launching(isolation, exec_socket, exec_group, shared)
    configure(log_format, debug=debug)
    options = SuperLinkOptions(
        home=make_folder(home or default_home() / "superlink", "--home"),
        fleet=fleet,
        control=control,
        monitor=monitor,
        token_control=token_control,
        tokens=_tokens(oidc),
        database=database,
        arrays=arrays,
        advertise=advertise,
        credentials=Credentials.load(keys) if keys is not None else None,
        force_insecure=force_insecure,
        insecure_test_randomness=_test_randomness(),
    )
    if insecure:
        print("INSECURE: nothing is encrypted, and everybody who reaches the ports is trusted", file=sys.stderr)
    _serve_in_turn(options, shared, lease_seconds, launched)


def _serve_in_turn(options: SuperLinkOptions, shared: Path | None, lease_seconds: float, launched: Launching) -> None:
    """Serve until told to end, alone or beside others that share the runs."""
    if shared is not None:
        options = dataclasses.replace(options, tenure=_tenure(options, lease_seconds))
    try:
        asyncio.run(_serve(options, shared, launched))
    finally:
        if options.tenure is not None:
            options.tenure.resign()


def _check_pairs(
    insecure: bool,
    keys: Path | None,
    token_control: str | None,
    oidc: Path | None,
    advertise: str | None,
    shared: Path | None,
) -> None:
    """Raise AppError for an option without the one that it goes with, or beside one that it excludes."""
    if insecure == (keys is not None):
        raise AppError("say who may connect: --keys FOLDER (see `privfed keys`), or --insecure for loopback tests")
    if (token_control is None) != (oidc is None):
        raise AppError("--token-control and --oidc go together: an address, and whose tokens are taken there")
    if advertise is not None and shared is None:
        raise AppError("--advertise is told to the SuperLinks that share a folder with this one: it goes with --shared")


def _launching(isolation: str, exec_socket: Path | None, exec_group: str | None, shared: Path | None) -> Launching:
    launched = Launching.chosen(isolation, exec_socket, exec_group)
    if shared is not None and launched.group is not None:
        raise AppError(
            "--exec-group: a SuperLink that takes over cannot read what another user's apps have written; "
            "with --shared, run the superexec as the SuperLink's user, and leave --exec-group out"
        )
    return launched


def _check_addresses(given: Mapping[str, str | None]) -> None:
    """Raise AppError for what is no address: of a port that is too large, the system would take a part."""
    for option, address in given.items():
        host, colon, port = (address or "localhost:0").rpartition(":")
        if not (host and colon and port.isdecimal() and int(port[:6]) < 1 << 16):
            raise AppError(f"{option} {address!r}: write HOST:PORT with a port below 65536; 0 lets the system choose")


def _tenure(options: SuperLinkOptions, seconds: float) -> Tenure:
    """Return this SuperLink's part in taking turns."""
    from privfed.runtime.tenure import Tenure

    if options.database is None:
        raise AppError("--shared goes with --database: SQLite serves one SuperLink, several share a PostgreSQL")
    if options.arrays is not None:  # a bucket has no rename that keeps a late writer out
        raise AppError(
            "--shared keeps arrays in that folder, where a SuperLink that lost its turn cannot write: no --arrays"
        )
    owner = options.credentials.peer.name if options.credentials is not None else ""
    return Tenure(options.database, owner or f"{socket.gethostname()} ({options.fleet})", seconds)


def _test_randomness() -> int | None:
    """Return the seed of noise that a test asked for by the environment; nothing else can ask for it."""
    text = os.environ.get("PRIVFED_INSECURE_TEST_RANDOMNESS")
    if not text:
        return None
    if not text.isdecimal():
        raise AppError("PRIVFED_INSECURE_TEST_RANDOMNESS must be a whole number; leave it out but for tests")
    print("INSECURE TEST: the noise of every privacy plan is predictable and protects nobody", file=sys.stderr)
    return int(text)


def _tokens(oidc: Path | None) -> Tokens | None:
    from privfed.runtime.oidc import Tokens

    return Tokens(oidc) if oidc is not None else None


def _launcher(launched: Launching, home: Path, state: Path, keys: Path | None) -> Launcher:
    """Return what runs server apps; those in processes see neither keys nor the store, nor what other runs have."""
    from privfed.runtime.confinement import Limits

    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    hidden = tuple(str(folder.resolve()) for folder in [home, state, *([keys] if keys is not None else [])])
    return launched.launcher(home, "processes", Limits(hidden=hidden))


async def _serve(options: SuperLinkOptions, shared: Path | None, launched: Launching) -> None:
    from privfed.runtime.listeners import Listeners
    from privfed.runtime.superlink import SuperLink

    ended = asyncio.Event()
    loop = asyncio.get_running_loop()

    def end(number: int) -> None:
        """End in good order, and at once when asked again: a database that hangs may keep it waiting."""
        ended.set()
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, number)
    listeners = Listeners(options)
    if shared is not None and options.tenure is not None:
        state = await _stand_by(options, options.tenure, listeners, shared, ended)
        if state is None:
            return
        options = dataclasses.replace(options, state=state)
    keys = options.credentials.folder if options.credentials is not None else None
    launcher = _launcher(launched, options.home, options.state or options.home, keys)
    # In a thread: it opens the database, and whoever calls meanwhile is told to try again.
    link = await loop.run_in_executor(None, SuperLink, options, launcher, listeners)
    await link.start()
    if shared is None:
        _say(link.addresses)
    await ended.wait()
    logging.getLogger("privfed.superlink").info("ending; runs go on when the SuperLink is started again")
    await link.stop()


async def _stand_by(
    options: SuperLinkOptions, tenure: Tenure, listeners: Listeners, shared: Path, ended: asyncio.Event
) -> Path | None:
    """Pass calls on until it is this SuperLink's turn; return the folder to serve from, or None when it is to end."""
    from privfed.runtime.standby import Standby

    standby = Standby(options, tenure, listeners)
    await standby.start()
    _say(listeners.addresses)
    turn, told = asyncio.create_task(standby.await_turn(shared)), asyncio.create_task(ended.wait())
    await asyncio.wait({turn, told}, return_when=asyncio.FIRST_COMPLETED)
    if not ended.is_set():
        return turn.result()
    turn.cancel()
    await listeners.stop()
    listeners.close()
    return None


def _say(addresses: Mapping[str, str]) -> None:
    for name, address in addresses.items():
        click.echo(f"{name}: {address}")
    sys.stdout.flush()
