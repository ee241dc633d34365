"""`privfed supernode`: a node of a federation, from start to SIGTERM."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import resource
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from privfed import __version__, failpoint
from privfed.cli.display import log_options
from privfed.cli.launching import Launching, launching_options, make_folder
from privfed.errors import AppError

if TYPE_CHECKING:
    from privfed.apps import CallNext
    from privfed.context import UserConfig
    from privfed.protocols.session import Identity
    from privfed.runtime.audit_log import AuditLog
    from privfed.runtime.bundle import Bundle
    from privfed.runtime.confinement import Limits
    from privfed.runtime.credentials import Credentials
    from privfed.runtime.fleet import RunGrant
    from privfed.runtime.launcher import Launcher
    from privfed.runtime.policy import NodePolicy

FOLDER = click.Path(file_okay=False, path_type=Path)
_LOOK_SECONDS = 0.2


@click.command()
@click.option(
    "--superlink", "address", required=True, metavar="HOST:PORT[,...]", help="The SuperLink's address for nodes."
)
@click.option("--keys", type=FOLDER, help="The node's key folder, made with `privfed keys`.")
@click.option("--insecure", is_flag=True, help="No encryption and no identity; for one machine. Needs --node-id.")
@click.option("--force-insecure", is_flag=True, help="Let --insecure connect to another machine.")
@click.option("--node-id", type=click.IntRange(min=1), help="Who the node says it is, with --insecure.")
@click.option(
    "--policy",
    "policy_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="What this node allows; see `privfed policy new`.",
)
@click.option("--data", type=FOLDER, default="privfed-node", show_default=True, help="The node's own folder, kept.")
@click.option("--node-config", "settings", multiple=True, metavar="KEY=VALUE", help="A setting of apps; repeatable.")
@launching_options("apps", "DATA")
@click.option(
    "--app-network",
    type=click.Choice(["off", "auto", "on"]),
    help="The network of apps: refuse to start where it cannot be taken away, take it where it can, or leave it "
    "[the policy's; auto without one].",
)
@click.option(
    "--app-writable", multiple=True, type=FOLDER, help="Folder that apps may change, beside their own; repeatable."
)
@click.option("--slots", type=click.IntRange(1, 64), default=4, show_default=True, help="Tasks at a time.")
@click.option(
    "--task-seconds",
    type=click.FloatRange(min=1),
    default=3600.0,
    show_default=True,
    help="The longest a task may take.",
)
@click.option("--drain-seconds", type=click.FloatRange(min=0), default=30.0, show_default=True, help="On SIGTERM.")
@log_options
def supernode(**given: Any) -> None:
    """Run a node: it connects to the SuperLink, takes tasks, and runs the apps its policy approves.

    \b
    privfed supernode --superlink link.example.org:7810 --keys node-a --policy policy.toml
    On one machine:  privfed supernode --superlink 127.0.0.1:7810 --insecure --node-id 1 --data node-1

    SIGTERM and Ctrl-C let the tasks at work finish; a second one ends it at once. Nothing that was answered is lost
    either way. What apps print goes to DATA/log.
    """
    _serve(_Asked(**given))


@dataclass(frozen=True, slots=True)
class _Asked:
    """The options of the command."""

    address: str
    keys: Path | None
    insecure: bool
    force_insecure: bool
    node_id: int | None
    policy_file: Path | None
    data: Path
    settings: tuple[str, ...]
    isolation: str
    exec_socket: Path | None
    exec_group: str | None
    app_network: str | None
    app_writable: tuple[Path, ...]
    slots: int
    task_seconds: float
    drain_seconds: float
    log_format: str
    debug: bool


def _serve(asked: _Asked) -> None:
    from privfed.cli.journal import configure
    from privfed.runtime.fleet import FleetClient, FleetOptions
    from privfed.runtime.handshake import is_loopback
    from privfed.runtime.node_store import NodeStore
    from privfed.runtime.supernode import NodeOptions, SuperNode

    launched = Launching.chosen(asked.isolation, asked.exec_socket, asked.exec_group)
    configure(asked.log_format, debug=asked.debug)
    failpoint.take_up("node")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold the node's keys
    credentials = _credentials(asked.keys, asked.insecure, asked.node_id)
    if asked.insecure and not asked.force_insecure and not all(map(is_loopback, asked.address.split(","))):
        raise AppError(
            f"--insecure: {asked.address} is another machine, and all that the node sends could be read and changed on "
            "the way: give --keys (see `privfed keys`), or --force-insecure"
        )
    policy, data = _policy(asked.policy_file, asked.insecure), asked.data
    digest = hashlib.sha256(asked.policy_file.read_bytes()).hexdigest() if asked.policy_file is not None else "none"
    make_folder(data, "--data")
    limits = _limits(policy, asked.app_network, data, asked.keys, asked.app_writable)
    store = NodeStore(data / "state")
    launcher = _launcher(launched, data, limits)
    audit = _audit(data, asked.keys)
    longest = policy.limits.task_seconds if policy is not None else asked.task_seconds
    options = NodeOptions(
        node_config=_node_config(asked.settings),
        identity=_identity(credentials),
        wrap=_wrap(policy, data, audit),
        approve=_approve(policy, credentials, audit),
        task_seconds=min(asked.task_seconds, longest),
        drain_seconds=asked.drain_seconds,
        remind=_reminder(credentials, audit),
    )
    connection = FleetOptions(
        slots=asked.slots,
        holding=tuple(one.token for one in store.unsent()),
        runs=tuple(store.runs()),
        on_status=logging.getLogger("privfed.node").info,
        cache=str(data / "cache"),
    )
    stopping = threading.Event()
    _stop_on_signals(stopping.set)
    facts = {"version": __version__, "superlink": asked.address, "isolation": asked.isolation, "policy": digest}
    audit.record("node-started", **facts)
    try:
        if connection.holding or connection.runs or _await_launcher(launcher, stopping):
            fleet = FleetClient(asked.address, credentials, asked.node_id, connection)
            SuperNode(fleet, store, launcher, data, options, stopping).run()
        else:
            launcher.close()
        audit.record("node-stopped")
    finally:
        store.close()
        audit.close()


def _await_launcher(launcher: Launcher, stopping: threading.Event) -> bool:
    """Wait until apps can be run, so that no run counts on a node that cannot; return whether they can be.

    A node that has a part in a run, or answers to hand in, does not wait: its tasks do.
    """
    logger, told = logging.getLogger("privfed.node"), ""
    while (reason := launcher.waits_for()) and not stopping.is_set():
        if reason != told:
            told = reason
            logger.warning("this node does not connect yet: it waits for %s", reason)
        stopping.wait(_LOOK_SECONDS)
    return not stopping.is_set()


def _reminder(credentials: Credentials | None, audit: AuditLog) -> Callable[[], None]:
    """Return what warns, once each, of certificates that expire within a month, and notes which keys are in use."""
    told: set[str] = set()
    seen: tuple[int, int] | None = None

    def remind() -> None:
        nonlocal seen
        if credentials is not None:
            keys = credentials.peer.serial, credentials.trust.roster.version
            with contextlib.suppress(OSError):  # the disk does not take it: it is noted the next time
                if keys != seen:
                    audit.record("keys-in-use", serial=f"{keys[0]:x}", roster=keys[1])
                    seen = keys
        for warning in map(str, credentials.warnings() if credentials is not None else ()):
            if warning not in told:
                told.add(warning)
                logging.getLogger("privfed.node").warning("%s", warning)

    return remind


def _stop_on_signals(stop: Callable[[], None]) -> None:
    def end(number: int, frame: object) -> None:
        del frame
        stop()
        signal.signal(number, signal.SIG_DFL)

    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, end)


def _credentials(keys: Path | None, insecure: bool, node_id: int | None) -> Credentials | None:
    if insecure:
        if keys is not None:
            raise AppError("--insecure and --keys exclude each other: with keys the connection is encrypted")
        if node_id is None:
            raise AppError("--insecure needs --node-id: without a certificate the node must say who it is")
        click.echo("warning: --insecure: nothing is encrypted and nobody proves who they are", err=True)
        return None
    if keys is None:
        raise AppError("give the node's --keys (see `privfed keys`), or --insecure to try things on one machine")
    if node_id is not None:
        raise AppError("--node-id goes with --insecure: the certificate says who the node is")
    from privfed.runtime.credentials import Credentials

    return Credentials.load(keys)


def _policy(path: Path | None, insecure: bool) -> NodePolicy | None:
    if path is None:
        if not insecure:
            raise AppError("give a --policy: a node runs only the apps it approves (`privfed policy new` writes one)")
        click.echo("warning: no --policy: this node runs any app it is sent", err=True)
        return None
    from privfed.runtime.policy import NodePolicy

    return NodePolicy.load(path)


def _node_config(settings: tuple[str, ...]) -> UserConfig:
    """Read KEY=VALUE pairs; a value that is a TOML boolean or number is one."""
    config: UserConfig = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise AppError(f"--node-config {setting!r}: write --node-config key=value")
        config[key.strip()] = _value(text.strip())
    return config


def _value(text: str) -> bool | int | float | str:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip("\"'")


def _limits(
    policy: NodePolicy | None, network: str | None, data: Path, keys: Path | None, writable: tuple[Path, ...]
) -> Limits:
    """Return what apps may do: of DATA they see their own code and folder, and of the keys nothing."""
    from privfed.runtime.confinement import Limits

    hidden = tuple(str(folder.resolve()) for folder in [data, *([keys] if keys is not None else [])])
    for folder in writable:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    own = tuple(str(folder.resolve()) for folder in writable)
    if policy is None:
        return Limits(network=network or "auto", hidden=hidden, writable=own)
    asked = policy.limits
    if network == "on" and not asked.network:
        raise AppError("--app-network on: the policy's [limits] has network = false")
    return Limits(
        memory=asked.memory_mib * (1 << 20) if asked.memory_mib is not None else None,
        cpu=asked.cpu_seconds,
        network=network or ("on" if asked.network else "off"),
        hidden=hidden,
        writable=own,
    )


def _launcher(launched: Launching, data: Path, limits: Limits) -> Launcher:
    from privfed.runtime.confinement import probe

    if launched.isolation == "subprocess":
        logging.getLogger("privfed.node").info("apps: %s", probe(limits))
    return launched.launcher(data, "work", limits)


def _identity(credentials: Credentials | None) -> Callable[[int], Identity | None]:
    if credentials is None:
        return lambda node_id: None

    def identify(node_id: int) -> Identity | None:
        del node_id  # the certificate says it, and a message to another node was refused
        return credentials.identity()

    return identify


def _approve(
    policy: NodePolicy | None, credentials: Credentials | None, audit: AuditLog
) -> Callable[[RunGrant, Bundle], None]:
    from privfed.runtime.policy import PolicyRefusal

    def approve(grant: RunGrant, bundle: Bundle) -> None:
        facts: dict[str, str | int] = {"run": grant.run_id, "app": bundle.name[:100], "bundle": bundle.digest}
        try:
            trust = credentials.trust if credentials is not None else None
            why = policy.approve(bundle, trust) if policy is not None else "run without a policy"
        except PolicyRefusal as refusal:
            audit.record("app-refused", **facts, reason=str(refusal)[:500])
            raise
        audit.record("app-approved", **facts, reason=why)
        logging.getLogger("privfed.node").info("run %d: app %s is %s", grant.run_id, bundle.name, why)

    return approve


def _wrap(policy: NodePolicy | None, data: Path, audit: AuditLog) -> Callable[[CallNext], CallNext]:
    from privfed.cli.node_mod import node_wrap

    return node_wrap(policy, data / "ledgers", audit.record)


def _audit(data: Path, keys: Path | None) -> AuditLog:
    """Open the node's audit log, signed with its identity key; without one, with a key of the log's own."""
    from privfed.runtime.audit_log import AuditLog, own_key

    path = keys / "identity.key" if keys is not None else None
    folder = data / "audit"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = path.read_bytes() if path is not None and path.exists() else own_key(folder / "audit.key")
    return AuditLog(folder / "audit.jsonl", key)
