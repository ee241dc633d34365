"""The systemd units: their commands exist, and their sandboxes leave apps the namespaces they are confined with."""

from __future__ import annotations

import configparser
import re
import shlex
from pathlib import Path

import click
import pytest

from privfed.cli.main import cli

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))


def read(path: Path) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(strict=False, delimiters="=", comment_prefixes="#")
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # names are told apart by case
    parser.read_string(path.read_text())
    return parser


def test_there_is_a_unit_for_each_long_lived_process() -> None:
    assert [path.stem for path in UNITS] == ["privfed-superexec", "privfed-superlink", "privfed-supernode"]


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_units_command_is_one_that_exists(path: Path) -> None:
    program, name, *words = shlex.split(read(path)["Service"]["ExecStart"])
    assert program.endswith("/privfed")
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    known = {option for parameter in command.params for option in parameter.opts}
    used = {word for word in words if word.startswith("--")}
    assert used <= known
    required = {option for parameter in command.params if parameter.required for option in parameter.opts}
    assert required <= used


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_unit_is_hardened_and_lets_apps_be_confined(path: Path) -> None:
    service = read(path)["Service"]
    assert service["Restart"] == "always"
    assert set(service["RestrictNamespaces"].split()) == {"user", "net", "mnt"}, "what confinement unshares"
    assert "@mount" in service["SystemCallFilter"].split(), "hidden folders are covered by a mount"
    for name in ("NoNewPrivileges", "ProtectHome", "PrivateTmp", "RestrictSUIDSGID", "ProtectKernelModules"):
        assert service[name] == "true", name
    assert (service["ProtectSystem"], service["CapabilityBoundingSet"], service["UMask"]) == ("strict", "", "0077")
    assert service["User"] != "root"


def test_options_that_a_unit_suggests_exist_and_their_folders_can_be_written() -> None:
    for path in UNITS:
        name = path.stem.removeprefix("privfed-").replace("superexec", "supernode")
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        known = {option for parameter in command.params for option in parameter.opts}
        suggested = [line for line in path.read_text().splitlines() if re.match(r"#.*PRIVFED_\w+_OPTIONS=", line)]
        assert suggested, path
        for line in suggested:
            words = line.partition("_OPTIONS=")[2].split()
            assert {word for word in words if word.startswith("--")} <= known, line
            if "--shared" in words:
                shared = words[words.index("--shared") + 1]
                assert f"-{shared}" in read(path)["Service"]["ReadWritePaths"].split(), "and no fault where it is not"
