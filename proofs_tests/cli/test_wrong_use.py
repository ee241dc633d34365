"""Wrong paths, addresses and certificates: the error names the thing, the cause and the next step."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from privfed.cli.main import cli
from privfed.errors import PrivfedError


def told(*words: str) -> str:
    """Return what a command that must fail says."""
    result = CliRunner().invoke(cli, list(words))
    assert result.exit_code != 0
    assert result.exception is None or isinstance(result.exception, PrivfedError | SystemExit), result.exception
    return result.output if isinstance(result.exception, SystemExit) else f"{result.output}{result.exception}"


@pytest.mark.parametrize("option", ["--fleet", "--control", "--monitor"])
@pytest.mark.parametrize("address", ["127.0.0.1:99999", "127.0.0.1", "7810", ":7810", "127.0.0.1:x"])
def test_a_superlink_listens_at_no_other_address_than_it_was_told(tmp_path: Path, option: str, address: str) -> None:
    text = told("superlink", "--insecure", "--home", str(tmp_path / "home"), option, address)
    assert f"{option} {address!r}: write HOST:PORT" in text
    assert not (tmp_path / "home").exists()


def test_folders_that_cannot_be_made_are_named_with_their_option() -> None:
    text = told("superlink", "--insecure", "--home", "/proc/nowhere")
    assert "--home /proc/nowhere cannot be made: No such file or directory; give a folder" in text
    words = ["supernode", "--superlink", "127.0.0.1:1", "--insecure", "--node-id", "1", "--data", "/proc/nowhere"]
    assert "--data /proc/nowhere cannot be made" in told(*words)


@pytest.mark.parametrize("words", [["ls"], ["node", "ls"], ["log", "x"], ["stop", "x"], ["fetch", "x"]])
def test_an_address_where_nobody_is_says_so_and_what_to_look_at(words: list[str]) -> None:
    text = told(*words, "--superlink", "127.0.0.1:1")
    assert "127.0.0.1:1 cannot be reached" in text and "refused" in text and "is the SuperLink running" in text
    assert "write HOST:PORT" in told(*words, "--superlink", "127.0.0.1:123456")


def test_keys_that_are_not_there_are_named() -> None:
    assert "nokeys/ca.pem: No such file or directory; make keys with" in told(
        "ls", "--superlink", "127.0.0.1:1", "--keys", "nokeys"
    )
    assert "nokeys/ca.pem" in told("superlink", "--keys", "nokeys")


def test_options_of_a_superexec_go_with_external_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (
        ["superlink", "--insecure"],
        ["supernode", "--superlink", "127.0.0.1:1", "--insecure", "--node-id", "1"],
    ):
        for option in (["--exec-socket", "x"], ["--exec-group", "0"]):
            assert "--exec-socket and --exec-group go with --isolation external" in told(*words, *option)
    assert "there is no group 'nobody-has-this'" in told(
        "superlink", "--insecure", "--isolation", "external", "--exec-group", "nobody-has-this"
    )
    shared = ["--shared", "x", "--database", "postgresql+psycopg://x@127.0.0.1:1/y"]
    assert "leave --exec-group out" in told(
        "superlink", "--insecure", "--isolation", "external", "--exec-group", "0", *shared
    )
