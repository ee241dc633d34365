"""Bearer tokens: one good kind, and everything else refused."""

from __future__ import annotations

import base64
import hmac
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from joserfc import jwt
from joserfc.jwk import KeySet, OctKey, RSAKey

from privfed.errors import AppError
from privfed.runtime.oidc import TokenRefused, Tokens, bearer
from proofs_tests.deployment.identity_provider import ISSUER, KEY, OTHER, POLICY, claims, place, token


def test_a_good_token_makes_a_user_of_its_role(tmp_path: Path) -> None:
    tokens = Tokens(place(tmp_path))
    peer = tokens.authenticate(token())
    assert (peer.role, peer.name, peer.common_name) == ("viewer", "alice.at.example.org", "user-alice.at.example.org")
    assert tokens.authenticate(token(groups=["staff", "admins"])).role == "operator"
    assert tokens.authenticate(token(groups="admins", aud="privfed")).role == "operator"
    assert bearer({"authorization": f"Bearer {token()}"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iss": "https://evil.example.org"}, "another issuer"),
        ({"iss": None}, "another issuer"),
        ({"aud": "other"}, "not for"),
        ({"aud": None}, "not for"),
        ({"exp": 1_000_000_000, "iat": 999_999_000}, "expired"),
        ({"exp": None}, "lacks the times"),
        ({"iat": None}, "lacks the times"),
        ({"exp": True}, "lacks the times"),
        ({"nbf": 9_999_999_999}, "not valid yet"),
        ({"exp": 9_999_999_999}, "lives longer"),
        ({"preferred_username": None}, "no name"),
        ({"preferred_username": "../../root"}, "no name"),
        ({"preferred_username": 7}, "no name"),
        ({"groups": ["strangers"]}, "no role"),
        ({"groups": None}, "no role"),
        ({"groups": {"admins": 1}}, "no role"),
    ],
)
def test_claims_that_let_nobody_in(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenRefused, match=message):
        Tokens(place(tmp_path)).authenticate(token(**changes))


def test_signatures_that_do_not_count(tmp_path: Path) -> None:
    tokens = Tokens(place(tmp_path))
    head, body, mark = token().split(".")
    none = base64.urlsafe_b64encode(b'{"alg":"none","kid":"one"}').decode().rstrip("=")
    # The public key as a shared secret: the classic confusion.
    confused = base64.urlsafe_b64encode(b'{"alg":"HS256","kid":"one"}').decode().rstrip("=")
    code = hmac.digest(KEY.as_pem(private=False), f"{confused}.{body}".encode(), "sha256")
    forged = [
        token(key=OTHER),
        f"{head}.{body}.",
        f"{none}.{body}.",
        f"{head}.{body}.{mark[:-4]}AAAA",
        f"{confused}.{body}.{base64.urlsafe_b64encode(code).decode().rstrip('=')}",
        token(key=RSAKey.generate_key(2048, {"kid": "one"}), algorithm="RS256"),
    ]
    for one in forged:
        with pytest.raises(TokenRefused, match="not signed by"):
            tokens.authenticate(one)


def test_a_shared_secret_in_the_key_file_lets_nobody_in(tmp_path: Path) -> None:
    secret = OctKey.generate_key(256, {"kid": "one"})
    keys = {"keys": [KEY.as_dict(private=False), secret.as_dict(private=True)]}
    path = place(tmp_path)
    (tmp_path / "jwks.json").write_text(json.dumps(keys))
    forged = jwt.encode({"alg": "HS256", "kid": "one"}, claims(), secret, algorithms=["HS256"])
    with pytest.raises(TokenRefused):
        Tokens(path).authenticate(forged)


def test_new_keys_are_taken_up_and_a_broken_file_changes_nothing(tmp_path: Path) -> None:
    tokens = Tokens(place(tmp_path))
    fresh = token(key=OTHER)
    with pytest.raises(TokenRefused):
        tokens.authenticate(fresh)
    place(tmp_path, keys=KeySet([OTHER]))
    os.utime(tmp_path / "jwks.json", ns=(1, 1))
    assert tokens.authenticate(fresh).role == "viewer"
    (tmp_path / "jwks.json").write_text("{")
    os.utime(tmp_path / "jwks.json", ns=(2, 2))
    assert tokens.authenticate(fresh).role == "viewer"


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.getbasetemp()
    path = folder / "oidc.toml"
    tokens = Tokens(path if path.exists() else place(folder))
    with pytest.raises(TokenRefused):
        tokens.authenticate(text)
    with pytest.raises(TokenRefused):
        bearer({"authorization": text.replace("Bearer", "")})


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (POLICY.replace(f'issuer = "{ISSUER}"', 'issuer = ""'), "anybody's token"),
        (POLICY.replace("viewer", "emperor"), "emperor"),
        (POLICY.replace("jwks.json", "missing.json"), "no set of public keys"),
        (POLICY + "extra = 1\n", "extra|Expected"),
        ("issuer =", "oidc.toml"),
    ],
)
def test_a_bad_policy_is_named(tmp_path: Path, policy: str, message: str) -> None:
    with pytest.raises(AppError, match=message):
        Tokens(place(tmp_path, policy))
