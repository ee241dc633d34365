"""Users with bearer tokens on a listener of their own: roles hold there as elsewhere, and nobody else gets in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from privfed.runtime.authority import Authority
from privfed.runtime.control import ControlClient, Submission
from privfed.runtime.credentials import BearerToken, Credentials
from privfed.runtime.federation import open_app
from privfed.runtime.handshake import NetworkError
from privfed.runtime.oidc import Tokens
from privfed.runtime.superlink import SuperLinkError
from proofs_tests.deployment.identity_provider import OTHER, bearer_of, place, token
from proofs_tests.deployment.kill_federation import member
from proofs_tests.deployment.local_link import EXAMPLES, LocalLink


def link_keys(folder: Path) -> Credentials:
    return member(Authority.create(folder / "authority", "test"), folder / "link", "link", "main")


def test_tokens_let_their_roles_in_and_nobody_else(tmp_path: Path) -> None:
    (tmp_path / "oidc").mkdir()
    link = LocalLink(tmp_path / "home", link_keys(tmp_path))
    tokens = Tokens(place(tmp_path / "oidc"))
    link.options = replace(link.options, tokens=tokens, token_control="127.0.0.1:0")
    with link:
        address = link.link.addresses["token-control"]
        submission = Submission(open_app(EXAMPLES / "minimal"), {}, seed=1, nodes=2)
        with ControlClient(address, bearer_of(tmp_path, "viewer", token())) as control:
            assert len(control.runs(10)) == 0
            with pytest.raises(NetworkError, match="viewer"):
                control.submit(submission)
        with ControlClient(address, bearer_of(tmp_path, "admin", token(groups=["admins"]))) as control:
            row = control.submit(submission)
            assert row.by == "user-alice.at.example.org"
            control.stop(row.name)
        for name, text, cause in (
            ("forged", token(key=OTHER), "not signed"),
            ("late", token(exp=1_000_000_000, iat=999_999_000), "expired"),
            ("stranger", token(groups=["strangers"]), "no role"),
            ("empty", "x", "not signed"),
        ):
            with (
                ControlClient(address, bearer_of(tmp_path, name, text)) as control,
                pytest.raises(NetworkError, match=cause),
            ):
                control.runs(10)
        # Without a token, and with a token where certificates are asked for.
        bare = grpc.ssl_channel_credentials((tmp_path / "authority" / "ca.pem").read_bytes())

        class Bare:
            def channel_credentials(self) -> grpc.ChannelCredentials:
                return bare

        with ControlClient(address, Bare()) as control, pytest.raises(NetworkError, match="bearer token"):  # type: ignore[arg-type]  # what is under test
            control.runs(10)
        with ControlClient(link.control, BearerToken(tmp_path / "admin")) as control, pytest.raises(NetworkError):
            control.runs(10)


def test_tokens_need_keys_and_an_address(tmp_path: Path) -> None:
    tokens = Tokens(place(tmp_path))
    for options in ({"tokens": tokens}, {"tokens": tokens, "token_control": "127.0.0.1:0"}, {"token_control": "x:1"}):
        link = LocalLink(tmp_path / "home")
        link.options = replace(link.options, **options)
        with pytest.raises(SuperLinkError, match=r"token|keys"), link:
            pass
