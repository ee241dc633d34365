"""`privfed`: the command line. Each command is loaded when it is called, so `--help` and `--version` are instant."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from privfed import __version__

COMMANDS = {
    "new": ("privfed.cli.new", "new", "Make a new app from a template; works offline."),
    "run": ("privfed.cli.run", "run", "Run an app in a simulation, or on a federation."),
    "ls": ("privfed.cli.runs", "ls", "List runs and what they wait for, here or of a SuperLink."),
    "log": ("privfed.cli.runs", "log", "Show the log of a run."),
    "stop": ("privfed.cli.runs", "stop", "Ask a run to stop after its current round."),
    "fetch": ("privfed.cli.fetch", "fetch", "Bring the model and metrics of a SuperLink's run to this machine."),
    "report": ("privfed.cli.report", "report", "Write one self-contained HTML page about a run."),
    "build": ("privfed.cli.build", "build", "Pack an app into one deterministic, signed file."),
    "policy": ("privfed.cli.policy", "policy", "What this node lets anybody do with its data."),
    "audit": ("privfed.cli.audit", "audit", "Audit privacy plans by experiment."),
    "verify": ("privfed.cli.verify", "verify", "Check audit logs and privacy ledgers."),
    "keys": ("privfed.cli.keys", "keys", "Make a federation's authority, certificates and roster."),
    "superlink": ("privfed.cli.superlink", "superlink", "Serve a federation across machines."),
    "supernode": ("privfed.cli.supernode", "supernode", "Run a node of a federation: it runs apps on its data."),
    "superexec": (
        "privfed.cli.superexec",
        "superexec",
        "Run app processes for a node or a SuperLink, as another user.",
    ),
    "node": ("privfed.cli.node", "node", "List, approve and revoke the nodes of a SuperLink."),
    "privacy": ("privfed.cli.privacy", "privacy", "What a plan costs, what noise a budget needs, what was spent."),
}


class LazyGroup(click.Group):
    """A group that imports a command's module only when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = click.utils.make_str(args[0])
        if name not in COMMANDS and not name.startswith("-"):
            import difflib

            close = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
            ctx.fail(f"no command {name!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="privfed")
def cli() -> None:
    """Privacy-first federated learning."""


def main() -> Any:
    """Run the command line; a framework error is one clear message, a traceback only with --debug."""
    try:
        return cli.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as fault:
        fault.show()
        return fault.exit_code
    except (KeyboardInterrupt, click.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except Exception as fault:
        if "--debug" in sys.argv:
            raise
        from privfed.cli.fault import explain

        return explain(fault)


if __name__ == "__main__":
    sys.exit(main())
